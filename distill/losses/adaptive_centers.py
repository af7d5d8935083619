"""Margin softmax against class centers that come from the teacher instead of being learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import gather
from distill.losses.base import Loss, one_of, positive, same_dim
from distill.losses.margin import (
    GRADIENTS,
    check_labels,
    check_negatives,
    margin_softmax,
    random_rows,
    sampled_cosines,
)
from faceless.recognizer import Output


def class_centers(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean unit embedding of each class: ``[N, D]`` and ``[N]`` give ``[classes, D]``, zero where a class has no face.

    >>> class_centers(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 1]), 2)
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    check_labels(labels, classes)
    known = labels >= 0
    sums = embeddings.new_zeros(classes, embeddings.shape[1])
    sums.index_add_(0, labels[known], F.normalize(embeddings)[known])
    return sums / torch.bincount(labels[known], minlength=classes).clamp(min=1).unsqueeze(1)


class _Draws(nn.Module):
    """How often random classes were drawn; a module of its own, so that it is only in checkpoints that need it."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)


class _TeacherCenters(Loss):
    needs_labels = True
    classes: int
    centers: Tensor

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        kind: str,
        scale: float,
        margin: float,
        gradient: str,
        negatives: int | None,
        seed: int | None,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes is {classes}; a head needs at least 2")
        self.classes = classes
        self.negatives = check_negatives(negatives)
        self.draws = _Draws() if negatives is not None and negatives < classes else None
        self.seed = seed or 0
        self.kind = one_of(("arc", "cos"), kind=kind)
        self.scale = positive(scale=scale)
        self.gradient = one_of(GRADIENTS, gradient=gradient)
        self.margin = margin
        self.register_buffer("centers", random_rows(classes, embedding_dim, self.seed, "teacher centers"))

    def _softmax(self, S: Tensor, labels: Tensor) -> Tensor:
        centers = self.centers
        if self.draws is not None:
            assert self.negatives is not None
            step = self.draws.step
            if self.training:
                self.draws.step += 1
            cosines, labels = sampled_cosines(S, centers, labels, self.negatives, self.seed, step)
        else:
            cosines = F.normalize(S) @ F.normalize(centers).to(S.dtype).T
        return margin_softmax(
            cosines, labels, kind=self.kind, scale=self.scale, margin=self.margin, gradient=self.gradient
        )


class FrozenCenters(_TeacherCenters):
    """Classify the student's embeddings by the teacher's own classifier (ArcDistill, CosDistill).

    The centers never move: the teacher's classification layer, or the mean teacher embedding of each class
    (`class_centers`). The teacher need not run.
    Boutros, Štruc, Damer: AdaDistill, ECCV 2024.

    Args:
        embedding_dim: D of both networks.
        classes: number of identities C.
        kind: ``"arc"`` or ``"cos"``: where the margin applies.
        scale, margin: multiplies the cosines; radians or cosine.
        gradient, negatives: as for `distill.losses.margin.ArcFace`.
        seed: of the random classes.

    Shape:
        both embeddings ``[B, D]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: no centers were given to `prime`, an argument is out of range, or labels or D do not fit.

    >>> loss = FrozenCenters(embedding_dim=8, classes=5)
    >>> loss.prime(torch.randn(5, 8))
    >>> loss(Output(torch.randn(2, 8)), Output(torch.randn(2, 8)), torch.tensor([4, 4])).shape
    torch.Size([])
    """

    needs_centers = True

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        kind: str = "arc",
        scale: float = 64.0,
        margin: float = 0.45,
        gradient: str = "exact",
        negatives: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(embedding_dim, classes, kind, scale, margin, gradient, negatives, seed)
        self.primed = False

    @torch.no_grad()
    def prime(self, centers: Tensor) -> None:
        """Set the centers ``[C, D]``, of any norm."""
        if centers.shape != self.centers.shape:
            raise ValueError(f"centers are {list(self.centers.shape)}, got {list(centers.shape)}")
        self.centers.copy_(centers)
        self.primed = True

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if not self.primed:
            raise ValueError("FrozenCenters has no centers yet; give it the teacher's with prime()")
        if student.embedding.shape[1] != self.centers.shape[1]:
            raise ValueError(
                f"the centers have {self.centers.shape[1]} numbers, the embeddings {student.embedding.shape[1]}"
            )
        check_labels(labels, len(self.centers))
        return self._softmax(student.embedding, labels)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([int(self.primed)])

    def set_extra_state(self, state: Tensor) -> None:
        self.primed = bool(state[0])


class AdaDistill(_TeacherCenters):
    """Classify the student's embeddings by centers that follow the teacher, faster where the student still lags.

    Each face moves its class center: w = a w + (1 - a) t with a = clamp(cos(s, t)), or, ``weighted``, a = cos(s, t)
    times clamp(cos(w, t)), both clamped to [1e-6, 1]. The margin softmax then uses the moved centers. Faces of one
    class in a batch act one after the other, in rank and batch order, all with the a they have at its start; every
    process holds the same centers. (The official code keeps an arbitrary one of them, and lets processes drift apart.)
    Boutros, Štruc, Damer: AdaDistill, ECCV 2024.

    Args:
        embedding_dim: D of both networks.
        classes: number of identities C; real, generated or pseudo.
        kind: ``"arc"`` or ``"cos"``: where the margin applies.
        scale, margin: multiplies the cosines; radians or cosine.
        weighted: the a of the paper's best runs (alpha'); without, its alpha.
        renormalize: keep stored centers at unit length. Officially they shrink below it, so that later faces weigh more
            than 1 - a.
        gradient: as for `distill.losses.margin.ArcFace`; officially exact.
        negatives: as for `distill.losses.margin.ArcFace`; centers move all the same.
        seed: of the initial centers, which the first face of a class all but replaces, and of the random classes.

    Shape:
        both embeddings ``[B, D]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or labels or D do not fit.

    >>> loss = AdaDistill(embedding_dim=8, classes=5)
    >>> loss(Output(torch.randn(2, 8)), Output(torch.randn(2, 8)), torch.tensor([4, 4])).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        kind: str = "arc",
        scale: float = 64.0,
        margin: float = 0.45,
        weighted: bool = True,
        renormalize: bool = False,
        gradient: str = "exact",
        negatives: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(embedding_dim, classes, kind, scale, margin, gradient, negatives, seed)
        self.weighted = weighted
        self.renormalize = renormalize

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        S, T = same_dim(student, teacher)
        if S.shape[1] != self.centers.shape[1]:
            raise ValueError(f"the centers have {self.centers.shape[1]} numbers, the embeddings {S.shape[1]}")
        check_labels(labels, len(self.centers))
        if self.training:
            self._move(F.normalize(S.detach()), F.normalize(T), labels)
        return self._softmax(S, labels)

    @torch.no_grad()
    def _move(self, s: Tensor, t: Tensor, labels: Tensor) -> None:
        agreement, t, labels = gather((s * t).sum(1)), gather(t), gather(labels)
        if not len(labels):
            return
        slots = labels.clamp(min=0)
        old = self.centers[slots].to(t.dtype)
        if self.weighted:
            agreement = agreement * (F.normalize(old) * t).sum(1).clamp(1e-6, 1)
        keep = agreement.clamp(1e-6, 1)
        keep = torch.where(labels < 0, 1, keep)  # a face without a label leaves its stand-in class 0 as it is
        # One after the other in closed form: w prod(a) + sum of (1 - a_i) t_i times the a of the later faces.
        same = slots.unsqueeze(1) == slots
        factors = torch.where(same, keep, 1)
        later = torch.where(same.triu(1), keep, 1).prod(1)
        kept = factors.prod(1, keepdim=True)
        moved = old * kept + same.to(t.dtype) @ (((1 - keep) * later).unsqueeze(1) * t)
        if self.renormalize:
            moved = torch.where(kept < 1, F.normalize(moved), moved)
        first = same.int().argmax(1)  # equal up to rounding for all of a class; one of them, so that no write can race
        self.centers[slots] = moved[first].to(self.centers.dtype)
