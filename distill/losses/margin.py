"""Margin heads: classify the student's embeddings by identity, with a margin. They need labels of some kind."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import gather
from distill.losses.base import Loss, labeled_cross_entropy, labeled_mean, one_of, positive
from faceless.devices import moved
from faceless.randomness import Rng
from faceless.recognizer import Output

GRADIENTS = ("straight-through", "exact")
STARTS = ("random", "teacher")


def random_rows(count: int, dim: int, seed: int, purpose: str, std: float = 0.01) -> Tensor:
    """``[count, dim]`` normal numbers, drawn in pieces so that a million rows fit into memory."""
    pieces = [Rng.of(seed, purpose, range(i, min(i + 65536, count))).normal(dim) for i in range(0, count, 65536)]
    return torch.cat(pieces) * std


class ClassCenters(nn.Module):
    """Cosines ``[B, C]`` of embeddings ``[B, D]`` to class centers that learn."""

    def __init__(self, embedding_dim: int, classes: int, seed: int, purpose: str):
        super().__init__()
        self.centers = nn.Parameter(random_rows(classes, embedding_dim, seed, purpose))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) @ F.normalize(self.centers.to(x.dtype)).T


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError for labels outside -1..classes-1; on the CPU only, elsewhere looking makes the host wait."""
    if labels.device.type == "cpu" and len(labels) and not -1 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, the head has {classes} classes"
        )


def arc(cosines: Tensor, margin: float, gradient: str) -> Tensor:
    """cos(theta + margin) of cosines of any shape.

    From theta + margin > pi on, where that would rise again, cos - margin sin(margin). With gradient
    ``"straight-through"`` the derivative is 1; ``"exact"`` has that of the formula, finite also at cosine 1.
    """
    inside = cosines.clamp(-1 + 1e-7, 1 - 1e-7)
    moved = inside * math.cos(margin) - (1 - inside.square()).sqrt() * math.sin(margin)
    moved = torch.where(cosines > -math.cos(margin), moved, cosines - margin * math.sin(margin))
    return moved if gradient == "exact" else cosines + (moved - cosines).detach()


def margin_softmax(cosines: Tensor, labels: Tensor, *, kind: str, scale: float, margin: float, gradient: str) -> Tensor:
    """Cross-entropy of ``cosines [B, C]`` after a margin on the target's, mean over the faces with a label.

    Args:
        kind: ``"arc"``: cos(theta + margin) (ArcFace). ``"cos"``: cos(theta) - margin (CosFace).
    """
    known = labels.clamp(min=0).unsqueeze(1)
    target = cosines.gather(1, known)
    moved = arc(target, margin, gradient) if kind == "arc" else target - margin
    return labeled_cross_entropy(scale * cosines.scatter(1, known, moved), labels)


def sampled_classes(
    labels: Tensor, classes: int, negatives: int, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which classes a step looks at: those of the batch on any process, and random ones.

    Every process finds the same ones. How many places there are depends on shapes alone, so that the host need not wait
    for the device to count the classes.

    Args:
        labels: ``[B]`` of this process, -1 for none.
        classes: how many there are.
        negatives: random classes to draw; some may be drawn twice, or be in the batch.
        seed, step: of the draw.

    Returns:
        The classes ``[C']``, ascending, ``labels`` as places among them (-1 stays), and which places ``[C']`` repeat
        the class before them and do not count.

    >>> sampled_classes(torch.tensor([7, 7, -1]), 9, 2, seed=0, step=0)
    (tensor([6, 7, 7, 8, 8]), tensor([ 1,  1, -1]), tensor([False, False,  True, False,  True]))
    """
    drawn = Rng.of(seed, "negative classes", range(negatives), step).integers(classes, 1)
    drawn = moved(drawn.flatten(), labels.device)
    present = gather(labels)  # of all processes, so that they all use the same classes
    chosen = torch.cat((torch.where(present < 0, drawn[0], present), drawn)).sort().values
    repeated = chosen.diff(prepend=chosen[:1] - 1) == 0
    return chosen, torch.where(labels < 0, labels, torch.searchsorted(chosen, labels)), repeated


def sampled_cosines(
    S: Tensor, centers: Tensor, labels: Tensor, negatives: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Cosines ``[B, C']`` of embeddings to the centers of `sampled_classes`, and the labels as their columns.

    Those of repeated classes are -inf: they add nothing to a softmax.
    """
    chosen, labels, repeated = sampled_classes(labels, len(centers), negatives, seed, step)
    cosines = F.normalize(S) @ F.normalize(centers[chosen]).to(S.dtype).T
    return cosines.masked_fill(repeated, -math.inf), labels


def check_negatives(negatives: int | None) -> int | None:
    """The argument of that name, if it is None or positive."""
    if negatives is not None and negatives < 1:
        raise ValueError(f"negatives is {negatives}; it must be positive, or None for all classes")
    return negatives


class _Head(Loss):
    """Class centers that learn, and which of them a step looks at."""

    classes: int

    needs_teacher = False
    needs_labels = True

    def __init__(
        self, embedding_dim: int, classes: int, start: str, negatives: int | None, seed: int | None, std: float
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes is {classes}; a head needs at least 2")
        self.classes = classes
        self.negatives = check_negatives(negatives)
        self.seed = seed or 0
        self.step = 0
        self.std = std
        self.centers = nn.Parameter(random_rows(classes, embedding_dim, self.seed, "class centers", std))
        self.needs_centers = one_of(STARTS, start=start) == "teacher"
        self.primed = False

    @torch.no_grad()
    def prime(self, centers: Tensor) -> None:
        """Start from the directions of ``centers [C', D]``, C' <= C; classes without a face, or zeros, stay random."""
        classes, dim = self.centers.shape
        rows = random_rows(classes, dim, self.seed, "class centers", self.std).to(centers)
        if len(centers) > len(rows) or centers.shape[1] != rows.shape[1]:
            raise ValueError(
                f"start is teacher, whose centers are {list(centers.shape)}, and those that learn {list(rows.shape)}"
            )
        # As long as random ones, so that a step turns them as far.
        lengths = rows[: len(centers)].norm(dim=1, keepdim=True)
        known = centers.norm(dim=1, keepdim=True) > 0
        rows[: len(centers)] = torch.where(known, lengths * F.normalize(centers), rows[: len(centers)])
        self.centers.copy_(rows)
        self.primed = True

    def cosines(self, student: Output, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines ``[B, C']`` to the centers in use, -inf for repeated ones, and labels as their columns (-1 stays)."""
        S = student.embedding
        if self.needs_centers and not self.primed:
            raise ValueError(f"{type(self).__name__} has no centers to start from yet; give it some with prime()")
        if S.shape[1] != self.centers.shape[1]:
            raise ValueError(f"the centers have {self.centers.shape[1]} numbers, the embeddings {S.shape[1]}")
        check_labels(labels, self.classes)
        centers: Tensor = self.centers
        if self.negatives is not None and self.negatives < self.classes:
            step = self.step
            if self.training:
                self.step += 1
            return sampled_cosines(S, centers, labels, self.negatives, self.seed, step)
        return F.normalize(S) @ F.normalize(centers.to(S.dtype)).T, labels

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)


class ArcFace(_Head):
    """Softmax over identities with an angular margin: the target's cos(theta) becomes cos(theta + margin).

    Deng, Guo, Xue, Zafeiriou: ArcFace, CVPR 2019, equation 3.

    Args:
        embedding_dim: D of the student.
        classes: number of identities C; real, generated or pseudo.
        scale: multiplies the cosines.
        margin: radians.
        gradient: ``"straight-through"``: the margin moves values, not derivatives (InsightFace, OpenSphere).
            ``"exact"``: the formula's derivative, larger at small angles.
        start: of the class centers: ``"random"``, or ``"teacher"``: where the teacher sees them (`prime`), for a
            student of the teacher's D that is to learn identities where the teacher has put them.
        negatives: random classes to compare with per step beside those of the batch (Partial FC: An et al., CVPR 2022);
            None takes all C. The logits are then B x classes compared; the centers' gradient, and what the optimizer
            keeps of it, stay C x D.
        seed: of the centers and of the random classes.

    Shape:
        student embedding ``[B, D]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or labels or D do not fit.

    >>> labels = torch.tensor([0, 3, 3, -1])
    >>> ArcFace(embedding_dim=8, classes=5)(Output(torch.randn(4, 8)), Output(torch.randn(4, 8)), labels).shape
    torch.Size([])
    """

    _kind = "arc"

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        scale: float = 64.0,
        margin: float = 0.5,
        gradient: str = "straight-through",
        start: str = "random",
        negatives: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(embedding_dim, classes, start, negatives, seed, std=0.01)
        self.scale = positive(scale=scale)
        self.gradient = one_of(GRADIENTS, gradient=gradient)
        self.margin = margin

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        cosines, labels = self.cosines(student, labels)
        return margin_softmax(
            cosines, labels, kind=self._kind, scale=self.scale, margin=self.margin, gradient=self.gradient
        )


class CosFace(ArcFace):
    """Softmax over identities with a margin on the cosine: the target's becomes cos(theta) - margin.

    Wang et al.: CosFace, CVPR 2018, equation 4. Arguments and shapes as for `ArcFace`.

    >>> labels = torch.tensor([0, 3, 3, -1])
    >>> CosFace(embedding_dim=8, classes=5)(Output(torch.randn(4, 8)), Output(torch.randn(4, 8)), labels).shape
    torch.Size([])
    """

    _kind = "cos"

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        scale: float = 64.0,
        margin: float = 0.35,
        start: str = "random",
        negatives: int | None = None,
        seed: int | None = None,
    ):
        super().__init__(
            embedding_dim=embedding_dim,
            classes=classes,
            scale=scale,
            margin=margin,
            start=start,
            negatives=negatives,
            seed=seed,
        )


class SphereFace2(_Head):
    """One binary classification per identity instead of a softmax (SphereFace2-C).

    With g(x) = 2 ((x + 1) / 2)^power - 1, the logit of a class is scale (g(cos) -/+ margin) + bias, minus for the
    target. Binary cross-entropies are weighted by ``balance`` (target) and 1 - ``balance`` (others), summed over
    classes, times ``strength`` / scale. The bias starts where both kinds pull equally at cosine 0.
    Wen, Liu, Weller, Raj, Singh: SphereFace2, ICLR 2022.

    Args:
        embedding_dim: D of the student.
        classes: number of identities C.
        scale, margin, power, balance, strength: of the formula (r, m, t, alpha and lw of OpenSphere).
        gradient: ``"straight-through"``: the logit's derivative by the cosine is the scale (OpenSphere); ``"exact"``.
        start, negatives, seed: as for `ArcFace`.

    Shape:
        student embedding ``[B, D]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or labels or D do not fit.

    >>> labels = torch.tensor([0, 3, 3, -1])
    >>> SphereFace2(embedding_dim=8, classes=5)(Output(torch.randn(4, 8)), Output(torch.randn(4, 8)), labels).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int,
        scale: float = 40.0,
        margin: float = 0.4,
        power: float = 3.0,
        balance: float = 0.7,
        strength: float = 50.0,
        gradient: str = "straight-through",
        start: str = "random",
        negatives: int | None = None,
        seed: int | None = None,
    ):
        # The spread of Xavier initialization; only the directions of the centers matter to the loss.
        super().__init__(embedding_dim, classes, start, negatives, seed, std=math.sqrt(2 / (classes + embedding_dim)))
        self.scale = positive(scale=scale)
        self.power = positive(power=power)
        self.strength = positive(strength=strength)
        self.gradient = one_of(GRADIENTS, gradient=gradient)
        if not 0 < balance < 1:
            raise ValueError(f"balance is {balance}; it must lie between 0 and 1")
        self.balance = balance
        self.margin = margin
        target, other = (scale * (2 * 0.5**power - 1 + side * margin) for side in (-1, 1))
        z = balance / ((1 - balance) * (classes - 1))
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(target - other))
        self.bias = nn.Parameter(torch.tensor(math.log(2 * z) - other - math.log(1 - z + root)))

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        cosines, labels = self.cosines(student, labels)
        repeated = cosines.isneginf()
        cosines = cosines.masked_fill(repeated, 0)
        is_target = torch.zeros_like(cosines).scatter(1, labels.clamp(min=0).unsqueeze(1), 1)
        # (cos + 1) / 2 may round below 0, where a fractional power is not a number.
        moved = 2 * ((cosines + 1) / 2).clamp(min=0).pow(self.power) - 1 - self.margin * (2 * is_target - 1)
        if self.gradient == "straight-through":
            moved = cosines + (moved - cosines).detach()
        logits = self.scale * moved + self.bias.to(cosines.dtype)
        weights = (self.balance * is_target + (1 - self.balance) * (1 - is_target)).masked_fill(repeated, 0)
        terms = F.binary_cross_entropy_with_logits(logits, is_target, weight=weights, reduction="none")
        return labeled_mean(self.strength / self.scale * terms.sum(1), labels)
