"""Unified knowledge distillation for face recognition: instance and relation terms over hard samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import FaceLoss, Loss, mean, positive, same_dim
from distill.losses.margin import SphereFace2
from distill.memory import EmbeddingMemory
from faceless.recognizer import Output


class ILED(FaceLoss):
    """Pull student embeddings to the teacher's, hard faces more (instance-level embedding distillation).

    Mean of (1 - c) softplus(scale (target - c) + bias) / scale, c being the cosine: steeper than `CosineEmbedding`
    where student and teacher disagree, flat where they agree. No labels.
    arXiv 2508.11376; no official code: the distance weight 1 - c and the sign of the bias are our reading of its text.

    Args:
        scale, target, bias: r, s0 and b of the paper; the target is best among 0.5, 0.7, 0.9 there.
        weighted: with the factor 1 - c; without it the slope saturates below the target.

    Shape:
        both embeddings ``[B, D]`` of any norm; returns a scalar.

    Raises:
        ValueError: scale is not positive, or the two D differ.

    >>> import torch
    >>> face = Output(torch.randn(8, 128))
    >>> ILED()(face, face).round(decimals=5).abs()
    tensor(0.)
    """

    def __init__(self, *, scale: float = 40.0, target: float = 0.9, bias: float = 0.1, weighted: bool = True):
        super().__init__()
        self.scale = positive(scale=scale)
        self.target = target
        self.bias = bias
        self.weighted = weighted

    def each(self, student: Output, teacher: Output) -> Tensor:
        S, T = same_dim(student, teacher)
        cosines = (F.normalize(S) * F.normalize(T)).sum(1)
        scale, target = self.shape(cosines)
        terms = F.softplus(scale * (target - cosines) + self.bias) / scale
        return (1 - cosines) * terms if self.weighted else terms

    def shape(self, cosines: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Scale and target for a batch."""
        return self.scale, self.target


class RPSD(Loss):
    """Let the student be as similar to remembered faces as the teacher is (relation-based pairwise similarity).

    Mean over batch and bank of softplus(scale (|s.m_s - t.m_t| - tolerance) + bias) / scale; each network is compared
    with its own earlier embeddings of the same faces. Not 0 at a perfect match. No labels.
    arXiv 2508.11376; no official code.

    Args:
        embedding_dim: D of the teacher, and of the student unless told.
        size: faces in the bank over all processes; the paper has 3 batches.
        student_dim: D of the student, where it differs.
        scale, tolerance, bias: r', t and b' of the paper.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm; returns a scalar, 0 while the bank is empty.

    Raises:
        ValueError: an argument is not positive, or a D is not what was said.

    >>> import torch
    >>> loss, face = RPSD(embedding_dim=4), Output(torch.randn(8, 4))
    >>> [loss(face, face).item() > 0 for _ in range(2)]
    [False, True]
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        size: int = 192,
        student_dim: int | None = None,
        scale: float = 60.0,
        tolerance: float = 0.05,
        bias: float = 1.0,
    ):
        super().__init__()
        self.scale = positive(scale=scale)
        self.tolerance = tolerance
        self.bias = bias
        self.students = EmbeddingMemory(size, student_dim or embedding_dim, initial="empty")
        self.teachers = EmbeddingMemory(size, embedding_dim, initial="empty")

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s, t = F.normalize(student.embedding), F.normalize(teacher.embedding)
        difference = (self.students.products(s) - self.teachers.products(t)).abs()
        if self.training:
            self.students.push(s)
            self.teachers.push(t)
        scale, tolerance = self.shape(difference)
        return mean(F.softplus(scale * (difference - tolerance) + self.bias)) / scale

    def shape(self, difference: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Scale and tolerance for a batch."""
        return self.scale, self.tolerance


class UnifiedKD(Loss):
    """The whole loss: instance * `ILED` + relation * `RPSD` + `SphereFace2` on labels.

    arXiv 2508.11376 (VGGFace2, SGD, batch 64, R100 to R18). The weight of ILED is not stated there; 20 makes its slope
    at a hard face about that of the other two.

    Args:
        embedding_dim: D of both networks.
        classes: identities of the SphereFace2 term; None leaves it out, and labels with it.
        size: faces in the bank of RPSD.
        instance, relation: weights.
        negatives: random classes per step, as for `distill.losses.margin.ArcFace`.
        seed: of the class centers.

    Shape:
        both embeddings ``[B, D]``, labels ``[B]`` where there are classes; returns a scalar.

    Raises:
        ValueError: as the three losses.

    >>> import torch
    >>> loss = UnifiedKD(embedding_dim=8)
    >>> loss(Output(torch.randn(4, 8)), Output(torch.randn(4, 8))).item() > 0
    True
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        classes: int | None = None,
        size: int = 192,
        instance: float = 20.0,
        relation: float = 40.0,
        negatives: int | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        self.instance = positive(instance=instance)
        self.relation = positive(relation=relation)
        self.iled = ILED()
        self.rpsd = RPSD(embedding_dim=embedding_dim, size=size)
        self.recognition = None
        if classes is not None:
            self.classes = classes
            self.recognition = SphereFace2(embedding_dim=embedding_dim, classes=classes, negatives=negatives, seed=seed)
            self.needs_labels = True

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        total = self.instance * self.iled.compute(student, teacher, labels)
        total = total + self.relation * self.rpsd.compute(student, teacher, labels)
        if self.recognition is not None:
            total = total + self.recognition.compute(student, teacher, labels)
        return total
