"""Activation maximization (Erhan et al., 2009; Simonyan et al., 2014): pictures from noise, by the targets alone."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from faceless.errors import InputError
from faceless.recognizer import Recognizer
from synth.inversion.deep_inversion import DeepInversion
from synth.inversion.targets import Targets


class ActivationMaximization(DeepInversion):
    """Pictures that the teacher embeds near a target; needs no batch statistics, so it serves any teacher.

    Between steps the pictures are blurred now and then, which keeps down the fine texture that networks are easily
    fooled by. A baseline for `DeepInversion`, not a rival.

    Args:
        teacher, targets, face_size, lr, tv_l2, l2, jitter, repulsion: as in `DeepInversion`.
        steps: at full size.
        blur_every: steps between two blurs; 0 never blurs.
        blur: their standard deviation in pixels.
    """

    def __init__(
        self,
        *,
        teacher: str | Recognizer,
        targets: Targets | None = None,
        face_size: int | None = None,
        steps: int = 300,
        lr: float = 0.05,
        tv_l2: float = 1e-4,
        l2: float = 1e-5,
        repulsion: float = 1.0,
        jitter: int = 4,
        blur_every: int = 8,
        blur: float = 0.5,
    ):
        super().__init__(
            teacher=teacher,
            targets=targets,
            face_size=face_size,
            schedule=((1, steps),),
            lr=lr,
            betas=(0.9, 0.999),
            statistics=0.0,
            tv_l2=tv_l2,
            l2=l2,
            repulsion=repulsion,
            jitter=jitter,
        )
        if blur_every < 0 or blur <= 0:
            raise InputError("blur_every cannot be negative, and blur must be positive")
        self.blur_every, self.blur = blur_every, blur

    def project(self, x: Tensor, step: int) -> None:
        if self.blur_every and step % self.blur_every == self.blur_every - 1:
            reach = 2 * max(1, round(3 * self.blur)) + 1
            x.copy_(gaussian_blur(x, [reach, reach], [self.blur, self.blur]))
        super().project(x, step)
