"""Losses between the two embeddings of one face, and the centering of the teacher that all losses share."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import processes
from distill.losses.base import FaceLoss, one_of, same_dim
from faceless.recognizer import Output


class Centering(nn.Module):
    """Subtract the teacher's mean embedding from the teacher's embeddings.

    Some teachers (dlib's among them) put all faces into a narrow cone: strangers have cosines above 0.8, and a loss of
    angles sees little but the common mean. Its removal spreads the angles. The student is left alone: it learns to emit
    centered embeddings itself, so what is deployed needs no mean, and compares by plain cosine.

    The mean is an exponential average of the teacher's batch means over all processes, corrected for its start at zero.
    It is updated in training mode, before it is used, so that the first batch is centered on its own mean. `prime` sets
    it once and for all instead.

    Args:
        embedding_dim: D of the teacher.
        momentum: weight of the old average at each step, in [0, 1).

    Shape:
        embedding ``[B, D]``; returns the output with a centered embedding in float32 or better.

    Raises:
        ValueError: momentum is out of range, or an embedding does not have D numbers.

    >>> center = Centering(2)
    >>> center(Output(torch.tensor([[5.0, 1.0], [5.0, -1.0]]))).embedding
    tensor([[ 0.,  1.],
            [ 0., -1.]])
    """

    average: Tensor
    weight: Tensor
    keep: Tensor

    def __init__(self, embedding_dim: int, momentum: float = 0.99):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        self.register_buffer("average", torch.zeros(embedding_dim))
        self.register_buffer("weight", torch.zeros(()))
        # 1 once primed: the average then stays, without a branch that would wait for the device.
        self.register_buffer("keep", torch.tensor(float(momentum)))

    @property
    def primed(self) -> bool:
        """Whether `prime` was called; asking waits for the device."""
        return bool(self.keep == 1)

    @property
    def mean(self) -> Tensor:
        """``[D]``: the teacher's mean; zero before the first batch."""
        return self.average / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)

    @torch.no_grad()
    def prime(self, mean: Tensor) -> None:
        """Center on ``mean [D]``, known beforehand (over a corpus, say), from now on."""
        if mean.shape != self.average.shape:
            raise ValueError(f"the mean has {list(self.average.shape)} numbers, got {list(mean.shape)}")
        self.average.copy_(mean)
        self.weight.fill_(1)
        self.keep.fill_(1)

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Let a batch ``[B, D]`` of every process take part in the mean."""
        sums = torch.cat((teacher.to(self.average).sum(0), self.average.new_full((1,), len(teacher))))
        if processes() > 1:
            dist.all_reduce(sums)
        count = sums[-1]
        # A step without any face must not pull the average towards zero.
        keep = torch.where(count > 0, self.keep, torch.ones_like(self.keep))
        self.average.lerp_(sums[:-1] / count.clamp(min=1), 1 - keep)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - keep)

    def forward(self, teacher: Output) -> Output:
        T = teacher.embedding
        if T.shape[1:] != self.average.shape:
            raise ValueError(f"this centering is for embeddings of {len(self.average)} numbers, got {T.shape[1]}")
        if self.training:
            self.update(T)
        return replace(teacher, embedding=T - self.mean)


class CosineEmbedding(FaceLoss):
    """Turn each student embedding towards the teacher's: mean of 1 - cos.

    The plainest loss that ignores norms. Half of `FeatureL2` in its ``"unit"`` form.

    Shape:
        both embeddings ``[B, D]``; returns a scalar in 0..2. An embedding of zeros counts as cosine 0.

    >>> face = Output(torch.randn(8, 128))
    >>> CosineEmbedding()(face, face).round(decimals=5).abs()
    tensor(0.)
    """

    def each(self, student: Output, teacher: Output) -> Tensor:
        S, T = same_dim(student, teacher)
        return 1 - (F.normalize(S) * F.normalize(T)).sum(1)


class FeatureL2(FaceLoss):
    """Squared distance between student and teacher embeddings.

    The three forms differ by constants that published weights hide, so a weight belongs to its form.

    Args:
        form: ``"raw"``: mean over B and D of the embeddings as they are (SynthDistill: Otroshi Shahreza, George,
            Marcel, IJCB 2023). ``"unit"``: of unit vectors, summed over D, mean over B, which is mean(2 - 2 cos).
            ``"unit-mean"``: the same divided by D (PocketNet: Boutros et al., IEEE Access 2022, there times 100; the
            baseline of QUD, there times 1).

    Shape:
        both embeddings ``[B, D]``; returns a scalar.

    Raises:
        ValueError: an unknown form, or the two D differ.

    >>> FeatureL2()(Output(torch.zeros(1, 4)), Output(torch.ones(1, 4)))
    tensor(1.)
    """

    def __init__(self, *, form: str = "raw"):
        super().__init__()
        self.form = one_of(("raw", "unit", "unit-mean"), form=form)

    def each(self, student: Output, teacher: Output) -> Tensor:
        S, T = same_dim(student, teacher)
        if self.form != "raw":
            S, T = F.normalize(S), F.normalize(T)
        squares = (S - T).square()
        return squares.sum(1) if self.form == "unit" else squares.mean(1)
