"""Losses between feature maps inside the two networks; adapters are built from the shapes found there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.base import Loss, mean, positive
from faceless.randomness import Rng
from faceless.recognizer import Output


class FeatureLoss(Loss):
    """A loss between one feature of each network; with `teacher_learns`, the gradient reaches the teacher's too."""

    needs_features = True
    teacher_learns = False

    def __init__(self, student_layer: str, teacher_layer: str):
        super().__init__()
        self.student_features = (student_layer,)
        self.teacher_features = (teacher_layer,)

    def maps(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """Both features as ``[B, C, H, W]`` in the type of the embeddings."""
        found = []
        for who, output, (name,) in (
            ("student", student, self.student_features),
            ("teacher", teacher, self.teacher_features),
        ):
            if name not in output.features:
                raise ValueError(f"the {who} gives no feature {name!r}")
            found.append(as_map(output.features[name].to(output.embedding.dtype)))
        Fs, Ft = found
        if self.teacher_learns:
            return Fs, Ft
        return Fs, Ft.clone() if Ft.is_inference() else Ft.detach()


def as_map(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` from a map, from tokens ``[B, N, C]`` or from vectors ``[B, C]``.

    Tokens fill a square; one token too many is a class token in front, and dropped. A map that is square in its first
    two axes only has its channels last, as in Swin.

    >>> as_map(torch.zeros(2, 50, 64)).shape, as_map(torch.zeros(2, 64)).shape
    (torch.Size([2, 64, 7, 7]), torch.Size([2, 64, 1, 1]))
    >>> as_map(torch.zeros(2, 7, 7, 96)).shape
    torch.Size([2, 96, 7, 7])
    """
    if x.ndim == 4:
        return x.permute(0, 3, 1, 2) if x.shape[1] == x.shape[2] != x.shape[3] else x
    if x.ndim == 2:
        return x[:, :, None, None]
    if x.ndim == 3:
        for tokens in (x, x[:, 1:]):
            side = math.isqrt(tokens.shape[1])
            if side > 0 and side * side == tokens.shape[1]:
                return tokens.transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(f"features are [B, C], [B, C, H, W] or a square of tokens [B, N, C], got {list(x.shape)}")


@torch.no_grad()
def draw_linear(weight: Tensor, seed: int, purpose: str) -> None:
    """Fill the ``weight [outputs, inputs, ...]`` of a linear map: unit variance in, unit variance out."""
    inputs = weight[0].numel()
    numbers = Rng.of(seed, purpose, range(len(weight))).uniform(inputs, low=-1.0, high=1.0)
    weight.copy_((numbers * math.sqrt(3 / inputs)).view_as(weight))


def smaller(Fs: Tensor, Ft: Tensor) -> tuple[int, int]:
    """The height and the width that neither map must be enlarged to."""
    return min(Fs.shape[2], Ft.shape[2]), min(Fs.shape[3], Ft.shape[3])


class Hint(FeatureLoss):
    """Match a feature map of the teacher: mean squared error over batch, channels and places.

    The larger map is shrunk (bilinear, low-pass filtered); a student of other channels passes a learned linear map of
    its channels (a 1x1 convolution without bias or activation, which could not match signed maps). No labels.
    Romero et al.: FitNets, ICLR 2015, equation 3.

    Args:
        student_layer, teacher_layer: names of the sub-modules that give the two features: maps ``[B, C, H, W]``,
            tokens ``[B, N, C]`` or vectors ``[B, C]``.
        seed: of the learned map.

    Shape:
        features as above; returns a scalar.

    Raises:
        ValueError: a feature is missing, or has other shapes than `prepare` saw.

    >>> hint = Hint(student_layer="stage2", teacher_layer="layer3")
    >>> student = Output(torch.zeros(2, 4), features={"stage2": torch.randn(2, 8, 7, 7)})
    >>> teacher = Output(torch.zeros(2, 4), features={"layer3": torch.randn(2, 16, 14, 14)})
    >>> hint.prepare(student, teacher)
    >>> hint(student, teacher).item() > 0
    True
    """

    def __init__(self, *, student_layer: str, teacher_layer: str, seed: int | None = None):
        super().__init__(student_layer, teacher_layer)
        self.seed = seed or 0
        self.adapter: nn.Conv2d | None = None

    def prepare(self, student: Output, teacher: Output) -> None:
        Fs, Ft = self.maps(student, teacher)
        inputs, outputs = Fs.shape[1], Ft.shape[1]
        if inputs == outputs:
            return
        self.adapter = nn.Conv2d(inputs, outputs, 1, bias=False)
        draw_linear(self.adapter.weight, self.seed, "hint adapter")

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        Fs, Ft = self.maps(student, teacher)
        expected = Ft.shape[1] if self.adapter is None else self.adapter.in_channels
        if Fs.shape[1] != expected:
            raise ValueError(f"the student's features have {Fs.shape[1]} channels, not {expected}; prepare comes first")
        size = smaller(Fs, Ft)
        Fs, Ft = (
            x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True) for x in (Fs, Ft)
        )
        if self.adapter is not None:
            Fs = F.conv2d(Fs, self.adapter.weight.to(Fs.dtype))
        return mean((Fs - Ft).square())


class Hints(Loss):
    """The mean of `Hint` over several stages, each with an adapter of its own.

    The feature term of AFL-KD, whose pseudocode has one projection for all stages; the stages differ in channels. No
    labels.

    Args:
        student_layers, teacher_layers: as for `Hint`, stage by stage.
        seed: of the learned maps.

    Shape:
        features as for `Hint`; returns a scalar.

    Raises:
        ValueError: no stages, as many student as teacher layers are not given, or as `Hint`.

    >>> hints = Hints(student_layers=["a", "b"], teacher_layers=["a", "b"])
    >>> two = {"a": torch.ones(2, 8, 7, 7), "b": torch.ones(2, 4)}
    >>> hints(Output(torch.zeros(2, 4), features=two), Output(torch.zeros(2, 4), features=two))
    tensor(0.)
    """

    needs_features = True

    def __init__(self, *, student_layers: Sequence[str], teacher_layers: Sequence[str], seed: int | None = None):
        super().__init__()
        if len(student_layers) != len(teacher_layers) or not student_layers:
            raise ValueError(f"{len(student_layers)} student_layers and {len(teacher_layers)} teacher_layers: no pairs")
        self.student_features, self.teacher_features = tuple(student_layers), tuple(teacher_layers)
        self.stages = nn.ModuleList(
            Hint(student_layer=mine, teacher_layer=theirs, seed=(seed or 0) + stage)
            for stage, (mine, theirs) in enumerate(zip(student_layers, teacher_layers))
        )

    def prepare(self, student: Output, teacher: Output) -> None:
        for stage in self.stages:
            cast(Hint, stage).prepare(student, teacher)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        terms = [cast(Hint, stage).compute(student, teacher, labels) for stage in self.stages]
        return torch.stack(terms).mean()


class AttentionTransfer(FeatureLoss):
    """Look where the teacher looks: mean squared difference of unit-norm attention maps.

    The attention of a place is the mean over channels of |feature|^power; the larger feature map is average-pooled
    first. No adapter: channels may differ. No labels.
    Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, section 3.1, in the form of their code (the
    paper's equation 2 sums un-squared norms).

    Args:
        student_layer, teacher_layer: as for `Hint`.
        power: p of the attention.

    Shape:
        features as for `Hint`; returns a scalar, about 1e-3 for random maps: published weights are near 1,000.

    Raises:
        ValueError: power is not positive, or a feature is missing.

    >>> loss = AttentionTransfer(student_layer="stage2", teacher_layer="layer3")
    >>> student = Output(torch.zeros(2, 4), features={"stage2": torch.randn(2, 8, 7, 7)})
    >>> teacher = Output(torch.zeros(2, 4), features={"layer3": torch.randn(2, 16, 14, 14)})
    >>> loss(student, teacher).item() > 0
    True
    """

    def __init__(self, *, student_layer: str, teacher_layer: str, power: float = 2.0):
        super().__init__(student_layer, teacher_layer)
        self.power = positive(power=power)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        maps = self.maps(student, teacher)
        size = smaller(*maps)
        a_s, a_t = (F.normalize(F.adaptive_avg_pool2d(x, size).abs().pow(self.power).mean(1).flatten(1)) for x in maps)
        return mean((a_s - a_t).square())
