"""DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795) for embedding teachers, and for classifiers.

Pixels are optimized until a batch has, in every layer of the teacher, the statistics that its batch normalizations
remember of the training faces, while each picture is drawn to a target of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from faceless.errors import InputError
from faceless.files import sha256
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.inversion.base import Inverter, check_comparable, frozen, to_pixels
from synth.inversion.priors import energy, repulsion, total_variation
from synth.inversion.statistics import BatchStatistics, layers
from synth.inversion.targets import Moments, Sphere, Targets, center, head


class DeepInversion(Inverter):
    """Faces whose statistics inside of the teacher are those of its training faces.

    Minimizes, over pixels in -1..1, ``main * target + statistics * R + tv_l1 * TV1 + tv_l2 * TV2 + l2 * |x| +
    repulsion * P + adaptive * A`` by Adam. R is `BatchStatistics.distance`, TV `total_variation`, P `repulsion`. The
    published defaults are for 224 pixels in units of their standard deviation; these are for 112 pixels in -1..1.

    Args:
        teacher: anything `faceless.load` takes; it needs batch normalization, or ``recorded``.
        targets: what each face is drawn to; None takes `Moments` where the teacher's last layer knows them, else
            `Sphere`.
        face_size: side of the faces in pixels; None for the teacher's.
        schedule: pairs of a divisor of the side, and steps at that size; each stage begins with the last one's result
            enlarged, and warms up and anneals its own learning rate (cosine).
        lr, betas: of Adam.
        main, statistics, tv_l1, tv_l2, l2, repulsion: weights.
        first: of the first layer's statistics.
        jitter: largest shift in pixels at full size, drawn for every step; what leaves one side enters at the other.
        flip: mirror at every other step, by chance.
        adaptive: weight of Adaptive DeepInversion's competition: faces on which ``student`` and teacher differ.
            Embeddings: the mean cosine of the two. Logits: one minus their Jensen-Shannon divergence at temperature 3.
        student: what the faces compete against: anything `faceless.load` takes.
        recorded: file of `synth.inversion.statistics.measure`, in place of batch normalizations.

    Raises:
        InputError: a teacher without statistics, or a student whose output cannot be compared with the teacher's.
    """

    def __init__(
        self,
        *,
        teacher: str | Recognizer,
        targets: Targets | None = None,
        face_size: int | None = None,
        schedule: Sequence[tuple[int, int]] = ((2, 400), (1, 400)),
        lr: float = 0.1,
        betas: tuple[float, float] = (0.5, 0.9),
        main: float = 1.0,
        statistics: float = 0.05,
        first: float = 10.0,
        tv_l1: float = 0.0,
        tv_l2: float = 1e-4,
        l2: float = 1e-5,
        repulsion: float = 1.0,
        jitter: int = 4,
        flip: bool = True,
        adaptive: float = 0.0,
        student: str | Recognizer | None = None,
        recorded: str | None = None,
    ):
        super().__init__(teacher, face_size)
        self.recorded = recorded
        self.layers = layers(self.teacher, self.teacher_name, recorded) if statistics or recorded else []
        self.targets = targets or (Sphere() if head(self.teacher) is None else Moments())
        self.targets.check(self.teacher, self.teacher_name)
        self.schedule = [(int(divisor), int(steps)) for divisor, steps in schedule]
        for divisor, steps in self.schedule:
            if divisor < 1 or self.face_size // divisor < 4 or steps < 1:
                raise InputError(
                    f"schedule has [{divisor}, {steps}]: use divisors of {self.face_size} and positive steps"
                )
        if not self.schedule or self.schedule[-1][0] != 1:
            raise InputError("schedule must end at full size, with a divisor of 1")
        if lr <= 0 or jitter < 0:
            raise InputError("lr must be positive, and jitter cannot be negative")
        if adaptive and student is None:
            raise InputError("adaptive needs student: the recognizer to compete against")
        self.lr, self.betas, self.jitter, self.flip = lr, betas, jitter, flip
        self.main, self.statistics, self.first = main, statistics, first
        self.tv_l1, self.tv_l2, self.l2, self.repulsion, self.adaptive = tv_l1, tv_l2, l2, repulsion, adaptive
        # In a tuple: a student is no part of this module.
        self.student: tuple[Recognizer, ...] = ()
        if adaptive and student is not None:
            self.compete(frozen(student), adaptive)

    def compete(self, student: Recognizer, adaptive: float) -> None:
        """Seek faces on which this student and the teacher differ, with that weight; it may learn meanwhile."""
        check_comparable(student, self.teacher)
        self.student, self.adaptive = (student,), adaptive

    def against(self) -> Recognizer | None:
        return self.student[0] if self.student else None

    def provenance(self) -> dict[str, Any]:
        found = super().provenance()
        return found if self.recorded is None else found | {"statistics_sha256": sha256(self.recorded)}

    @torch.inference_mode(False)
    @torch.enable_grad()
    def invert(self, n: int, rng: Rng) -> Tensor:
        self._follow_device()
        targets = self.targets.sample(rng, self.teacher).to(self.device)
        divisor = self.schedule[0][0]
        x = rng.child("noise").normal(3, self.face_size // divisor, self.face_size // divisor).to(self.device)
        x = x.clamp(-1, 1)
        with BatchStatistics(self.layers, first=self.first) as statistics:
            for stage, (divisor, steps) in enumerate(self.schedule):
                side = self.face_size // divisor
                if x.shape[-1] != side:
                    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
                x = self._descend(x, targets, statistics, steps, self.jitter // divisor, rng.child(f"stage {stage}"))
        return to_pixels(x)

    def _descend(
        self, x: Tensor, targets: Tensor, statistics: BatchStatistics, steps: int, jitter: int, rng: Rng
    ) -> Tensor:
        # One shift and flip for the whole batch, drawn for all steps at once.
        once = rng.rows(slice(0, 1))
        shifts = (once.child("jitter").integers(2 * jitter + 1, steps, 2)[0] - jitter).tolist()
        flips = once.child("flip").integers(2, steps)[0].tolist()
        x = x.detach().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=self.lr, betas=self.betas)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * annealed(step, steps)
            seen_as = x.roll(shifts[step], (2, 3)) if jitter else x
            if self.flip and flips[step]:
                seen_as = seen_as.flip(3)
            # Of the pictures only: a student that learns meanwhile keeps its own gradients.
            (x.grad,) = torch.autograd.grad(self.loss(seen_as, targets, statistics), x)
            optimizer.step()
            with torch.no_grad():
                self.project(x, step)
        return x.detach()

    def project(self, x: Tensor, step: int) -> None:
        """What is done to pictures in place between steps: they stay within the pixels' range."""
        x.clamp_(-1, 1)

    def loss(self, x: Tensor, targets: Tensor, statistics: BatchStatistics) -> Tensor:
        """The scalar that is minimized, of pictures ``[B, 3, H, W]`` in -1..1."""
        pixels = to_pixels(x)
        seen = self.teacher(pixels)
        loss = self.main * self.targets.loss(seen, targets)
        if self.statistics:
            loss = loss + self.statistics * statistics.distance()
        if self.tv_l1 or self.tv_l2:
            absolute, euclidean = total_variation(x)
            loss = loss + self.tv_l1 * absolute + self.tv_l2 * euclidean
        if self.l2:
            loss = loss + self.l2 * energy(x)
        if self.repulsion:
            loss = loss + self.repulsion * repulsion(seen.embedding, center(self.teacher))
        for student in self.student:
            loss = loss + self.adaptive * agreement(student(pixels), seen)
        return loss

    def _follow_device(self) -> None:
        """Statistics and student are no part of the module, so `to` leaves them where they were."""
        for layer in self.layers:
            layer.mean, layer.variance = layer.mean.to(self.device), layer.variance.to(self.device)
        for student in self.student:
            student.to(self.device)


def annealed(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over the first tenth, at most 100 steps, then cosine to zero.

    >>> [round(annealed(step, 100), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = min(100, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def agreement(student: Output, teacher: Output, temperature: float = 3.0) -> Tensor:
    """How much two networks agree, to be made small (Adaptive DeepInversion, Yin et al., equation 8).

    With logits on both sides, one minus the Jensen-Shannon divergence of their softmax, in nats. (The published code
    clamps probabilities to 0.01..0.99, and so has no gradient with a thousand classes or more.) Else the mean cosine of
    the embeddings, for which the paper has no form.
    """
    if student.logits is None or teacher.logits is None:
        return F.cosine_similarity(student.embedding, teacher.embedding).mean()
    p, q = (F.log_softmax(logits / temperature, 1) for logits in (student.logits, teacher.logits))
    middle = torch.logaddexp(p, q) - math.log(2)
    divergence = F.kl_div(middle, p, reduction="batchmean", log_target=True) / 2
    divergence = divergence + F.kl_div(middle, q, reduction="batchmean", log_target=True) / 2
    return 1 - divergence
