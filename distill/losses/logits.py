"""Losses between class scores of student and teacher over the same classes.

A teacher trained on other people has no such scores. `ClassScores` gives both networks some, without a margin.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.base import FaceLoss, Loss, labeled_cross_entropy, labeled_mean, positive
from distill.losses.margin import check_labels
from faceless.recognizer import Output


def both_scores(student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
    """Logits ``[B, C]`` of both, which must be over the same classes."""
    assert student.logits is not None and teacher.logits is not None
    if student.logits.shape != teacher.logits.shape or student.logits.ndim != 2 or student.logits.shape[1] < 2:
        raise ValueError(
            "student and teacher need logits [B, C] over the same two or more classes, got "
            f"{list(student.logits.shape)} and {list(teacher.logits.shape)}"
        )
    return student.logits, teacher.logits


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class ClassScores(nn.Module):
    """Scores of both networks over the identities of the training faces: scaled cosines to class centers.

    The teacher's centers are the mean teacher embedding of each class, and stay. The student's either are the same, or
    start there and learn.

    Args:
        embedding_dim: D of the teacher, and of the student as the losses see it.
        scale: multiplies the cosines; with 64, a temperature of 4 leaves 16.
        learned: whether the student's centers learn.

    Shape:
        embeddings ``[B, D]`` of any norm; adds logits ``[B, C]``. C is 2 until `prime` says how many classes there are.

    >>> scores = ClassScores(2, scale=10.0)
    >>> scores.prime(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> scores.of_teacher(Output(torch.tensor([[6.0, 8.0]]))).logits
    tensor([[ 6.,  8., 10.]])
    """

    centers: Tensor

    def __init__(self, embedding_dim: int, *, scale: float = 64.0, learned: bool = True):
        super().__init__()
        self.scale = positive(scale=scale)
        self.learned = learned
        self.prime(torch.ones(2, embedding_dim))

    @torch.no_grad()
    def prime(self, centers: Tensor) -> None:
        """Set the teacher's centers ``[C, D]``, of any norm, and start the student's there."""
        self.register_buffer("centers", F.normalize(centers))
        self.students = nn.Parameter(F.normalize(centers)) if self.learned else None

    def of_teacher(self, teacher: Output) -> Output:
        """The teacher's output with logits."""
        return replace(teacher, logits=self._scores(teacher.embedding, self.centers))

    def of_student(self, student: Output) -> Output:
        """The student's output with logits."""
        return replace(
            student, logits=self._scores(student.embedding, self.centers if self.students is None else self.students)
        )

    def _scores(self, x: Tensor, centers: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, centers.dtype)
            return self.scale * F.normalize(x.to(dtype)) @ F.normalize(centers.to(dtype)).T


class LogitKD(FaceLoss):
    """Match the softened class probabilities: T^2 KL(softmax(z_T / T) || softmax(z_S / T)), mean over the batch.

    No labels. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 2.

    Args:
        temperature: T; with scaled cosines of scale 64, T = 4 means an effective scale of 16.

    Shape:
        logits ``[B, C]`` of both; returns a scalar.

    Raises:
        ValueError: temperature is not positive, or logits are missing or differ in shape.

    >>> scores = Output(torch.randn(4, 8), logits=torch.randn(4, 10))
    >>> LogitKD()(scores, scores).round(decimals=5).abs()
    tensor(0.)
    """

    needs_logits = True

    def __init__(self, *, temperature: float = 4.0):
        super().__init__()
        self.temperature = positive(temperature=temperature)

    def each(self, student: Output, teacher: Output) -> Tensor:
        z_s, z_t = ((z / self.temperature).log_softmax(1) for z in both_scores(student, teacher))
        return self.temperature**2 * divergence(z_t, z_s)


class DKD(Loss):
    """Decoupled KD: target against the rest, and the rest among itself, with weights of their own.

    T^2 (alpha KL of (p_y, 1 - p_y) + beta KL of the probabilities of the other classes). All in logarithms, so that
    confident teachers (scale 64) give no log(0).
    Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, equation 7. Officially its weight grows over the first 20
    epochs.

    Args:
        alpha, beta: weights of the two parts.
        temperature: T.

    Shape:
        logits ``[B, C]`` of both, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: temperature is not positive, or logits or labels are missing or do not fit.

    >>> scores = Output(torch.randn(4, 8), logits=torch.randn(4, 10))
    >>> DKD()(scores, scores, torch.tensor([0, 9, 9, -1])).round(decimals=5).abs()
    tensor(0.)
    """

    needs_logits = True
    needs_labels = True

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.temperature = positive(temperature=temperature)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        (binary_s, rest_s), (binary_t, rest_t) = (
            _decouple(z / self.temperature, labels) for z in both_scores(student, teacher)
        )
        terms = self.alpha * divergence(binary_t, binary_s) + self.beta * divergence(rest_t, rest_s)
        return self.temperature**2 * labeled_mean(terms, labels)


class NKD(Loss):
    """Normalized KD: the teacher's confidence weighs the target's cross-entropy, beside that of the other classes.

    -(p_T,y log p_S,y) - gamma T^2 sum over the other classes of p_T log p_S, renormalized without the target and
    softened by T. Not 0 at a perfect match.
    Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023.

    Args:
        gamma: weight of the other classes.
        temperature: T of the other classes.

    Shape:
        logits ``[B, C]`` of both, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    Raises:
        ValueError: temperature is not positive, or logits or labels are missing or do not fit.

    >>> scores = Output(torch.randn(4, 8), logits=torch.randn(4, 10))
    >>> NKD()(scores, scores, torch.tensor([0, 9, 9, -1])).item() > 0
    True
    """

    needs_logits = True
    needs_labels = True

    def __init__(self, *, gamma: float = 1.5, temperature: float = 1.0):
        super().__init__()
        self.gamma = gamma
        self.temperature = positive(temperature=temperature)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        z_s, z_t = both_scores(student, teacher)
        (hard_s, _), (hard_t, _) = _decouple(z_s, labels), _decouple(z_t, labels)
        (_, rest_s), (_, rest_t) = (_decouple(z / self.temperature, labels) for z in (z_s, z_t))
        target = hard_t[:, 0].exp() * hard_s[:, 0]
        others = (rest_t.exp() * rest_s).sum(1)
        return -labeled_mean(target + self.gamma * self.temperature**2 * others, labels)


class CrossEntropy(Loss):
    """Cross-entropy of the student's logits with the labels, mean over the faces that have one.

    Shape:
        student logits ``[B, C]``, labels ``[B]`` in 0..C-1, or -1 for none; returns a scalar.

    >>> scores = Output(torch.zeros(2, 8), logits=torch.zeros(2, 4))
    >>> CrossEntropy()(scores, scores, torch.tensor([1, -1])).exp()
    tensor(4.)
    """

    needs_teacher = False
    needs_labels = True

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        assert labels is not None
        if student.logits is None:
            raise ValueError("CrossEntropy needs logits of the student")
        check_labels(labels, student.logits.shape[1])
        return labeled_cross_entropy(student.logits, labels)


def _decouple(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[B, 2]`` of target and rest, and ``[B, C - 1]`` of the rest's classes among themselves."""
    check_labels(labels, z.shape[1])
    target = labels.clamp(min=0).unsqueeze(1)
    # Column j of the rest is class j, or j + 1 from the target on.
    columns = torch.arange(z.shape[1] - 1, device=z.device).expand(len(z), -1)
    rest = z.gather(1, columns + (columns >= target))
    both = torch.cat((z.gather(1, target), rest.logsumexp(1, keepdim=True)), 1)
    return both.log_softmax(1), rest.log_softmax(1)
