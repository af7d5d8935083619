"""Losses on how faces relate to each other; most of them let student and teacher differ in dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.gather import gather
from distill.losses.base import Loss, mean, one_of, positive, same_dim
from distill.memory import EmbeddingMemory
from faceless.devices import moved
from faceless.randomness import Rng
from faceless.recognizer import Output

_NORMALIZED = ("teacher", "both", "none")


def _scaled(student: Output, teacher: Output, normalized: str) -> tuple[Tensor, Tensor]:
    """Embeddings of all processes, unit length where asked."""
    S, T = gather(student.embedding), gather(teacher.embedding)
    return F.normalize(S) if normalized == "both" else S, T if normalized == "none" else F.normalize(T)


def _distances(X: Tensor) -> Tensor:
    """Euclidean distances ``[B, B]``: exactly 0, with gradient 0, between equal rows."""
    # Differences, not |x|^2 + |y|^2 - 2xy, which loses close pairs to cancellation.
    return torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")


class RKDDistance(Loss):
    """Keep the distances between the faces of a batch, relative to their mean (RKD-D).

    Huber loss between ||S_i - S_j|| / mean and ||T_i - T_j|| / mean, averaged over all B^2 pairs; each mean is over the
    positive distances, and the student's carries gradient. No labels.
    Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, section 3.2.1.

    Args:
        normalized: whose embeddings are made unit length first: ``"teacher"`` (the authors' runs), ``"both"`` or
            ``"none"``.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]``; returns a scalar, 0 for a batch of one.

    >>> faces = torch.randn(8, 16)
    >>> RKDDistance(normalized="none")(Output(2 * faces), Output(faces)).round(decimals=5).abs()
    tensor(0.)
    """

    def __init__(self, *, normalized: str = "teacher"):
        super().__init__()
        self.normalized = one_of(_NORMALIZED, normalized=normalized)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        S, T = _scaled(student, teacher, self.normalized)
        return mean(F.smooth_l1_loss(_relative(_distances(S)), _relative(_distances(T)), reduction="none"))


def _relative(distances: Tensor) -> Tensor:
    """Divide by the mean of the positive ones; all zeros stay zeros."""
    positives = (distances > 0).sum().clamp(min=1)
    return distances / (distances.sum() / positives).clamp(min=torch.finfo(distances.dtype).tiny)


class RKDAngle(Loss):
    """Keep the angles between the faces of a batch (RKD-A).

    Huber loss between the cosines of the angle at j between i and k, over all triplets. The angle at a face that
    coincides with i or k (distance below sqrt(machine epsilon) of the mean) counts as cosine 0 and has no gradient,
    which would grow without bound there. No labels.
    Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, section 3.2.2.

    Args:
        normalized: whose embeddings are made unit length first: ``"teacher"`` (the authors' runs), ``"both"`` or
            ``"none"``.
        vertices: faces j per step at most; larger batches use a new random subset each step. Time and memory are
            ``vertices`` x B x (B + D).
        seed: of the subsets.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]``; returns a scalar, 0 for a batch of one.

    >>> faces = torch.randn(8, 16)
    >>> RKDAngle(normalized="none")(Output(2 * faces + 1), Output(faces)).round(decimals=5).abs()
    tensor(0.)
    """

    def __init__(self, *, normalized: str = "teacher", vertices: int = 128, seed: int | None = None):
        super().__init__()
        self.normalized = one_of(_NORMALIZED, normalized=normalized)
        self.vertices = int(positive(vertices=vertices))
        self.seed = seed or 0
        self.step = 0

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        S, T = _scaled(student, teacher, self.normalized)
        chosen = moved(self._choose(len(S)), S.device)
        return mean(F.smooth_l1_loss(_angles(S, chosen), _angles(T, chosen), reduction="none"))

    def _choose(self, batch: int) -> Tensor:
        step = self.step
        if self.training:
            self.step += 1
        if batch <= self.vertices:
            return torch.arange(batch)
        return Rng.of(self.seed, "RKD vertices", range(batch), step).uniform(1).flatten().argsort()[: self.vertices]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)


def _angles(X: Tensor, vertices: Tensor) -> Tensor:
    """Cosines ``[V, B, B]`` of the angle at each vertex between every two rows of ``X [B, D]``."""
    lengths = _distances(X)[vertices]
    apart = lengths > lengths.mean() * torch.finfo(X.dtype).eps ** 0.5
    inverse = torch.where(apart, lengths, torch.inf).reciprocal()  # 0, with gradient 0, where it would blow up
    directions = (X.unsqueeze(0) - X[vertices].unsqueeze(1)) * inverse.unsqueeze(2)
    return directions @ directions.transpose(1, 2)


class SimilarityToMemory(Loss):
    """Let the student be as similar to remembered faces as the teacher is.

    Mean of (s.m - t.m)^2 over batch and memory, m being earlier teacher embeddings; with ``paired``, (s.m_s - t.m_t)^2,
    where each network is compared with its own earlier embeddings of the same faces. No labels. SEED (Fang et al., ICLR
    2021) compares the same similarities as probabilities.

    Args:
        embedding_dim: D of the teacher, and of the student unless told.
        size: faces remembered over all processes.
        paired: compare the student with its own memory.
        student_dim: D of the student, where it differs; needs ``paired``.
        initial: ``"empty"``, or ``"random"`` directions until ``size`` faces were seen (not with ``paired``).
        seed: of the random directions.

    Shape:
        both embeddings ``[B, D]`` of any norm; returns a scalar, 0 while the memory is empty.

    Raises:
        ValueError: arguments that do not go together, or the two D differ.

    >>> loss = SimilarityToMemory(embedding_dim=4, initial="random")
    >>> loss(Output(torch.randn(8, 4)), Output(torch.randn(8, 4))).item() > 0
    True
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        size: int = 4096,
        paired: bool = False,
        student_dim: int | None = None,
        initial: str = "empty",
        seed: int | None = None,
    ):
        super().__init__()
        if student_dim not in (None, embedding_dim) and not paired:
            raise ValueError("a student of another dimension cannot be compared with teacher embeddings; set paired")
        if paired and initial == "random":
            raise ValueError("random rows are not pairs; with paired, initial is 'empty'")
        self.teachers = EmbeddingMemory(size, embedding_dim, initial=initial, seed=seed or 0)
        self.students = EmbeddingMemory(size, student_dim or embedding_dim, initial="empty") if paired else None

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        if self.students is None:
            s, t = (F.normalize(x) for x in same_dim(student, teacher))
            difference = self.teachers.products(s - t)
        else:
            s, t = F.normalize(student.embedding), F.normalize(teacher.embedding)
            difference = self.students.products(s) - self.teachers.products(t)
        if self.training:
            self.teachers.push(t)
            if self.students is not None:
                self.students.push(s)
        return mean(difference.square())


class SimilarityPreserving(Loss):
    """Keep the rows of the batch's similarity matrix.

    ||G_S - G_T||_F^2 / B^2, where G is X X^T with rows made unit length. No labels.
    Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019 (there on feature maps, with weight 3,000).

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]``; returns a scalar.

    >>> faces = torch.randn(8, 16)
    >>> SimilarityPreserving()(Output(2 * faces), Output(faces)).round(decimals=5).abs()
    tensor(0.)
    """

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        S, T = gather(student.embedding), gather(teacher.embedding)
        return mean((F.normalize(S @ S.T) - F.normalize(T @ T.T)).square())


class DarkRank(Loss):
    """Keep the order of each face's nearest neighbors in the batch (hard DarkRank).

    With score -alpha d^beta of unit vectors, the negative log-likelihood (Plackett-Luce) that the student ranks the
    teacher's ``neighbors`` nearest faces as the teacher does. Not 0 at a perfect match. No labels.
    Chen, Wang, Zhang: DarkRank, AAAI 2018.

    Args:
        alpha, beta: of the score.
        neighbors: ranked faces L; at most B - 1 are.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm; returns a scalar, 0 for a batch of one or two.

    Raises:
        ValueError: an argument is not positive.

    >>> DarkRank()(Output(torch.randn(8, 4)), Output(torch.randn(8, 4))).item() > 0
    True
    """

    def __init__(self, *, alpha: float = 3.0, beta: float = 3.0, neighbors: int = 4):
        super().__init__()
        self.alpha = positive(alpha=alpha)
        self.beta = positive(beta=beta)
        self.neighbors = int(positive(neighbors=neighbors))

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s, t = F.normalize(gather(student.embedding)), F.normalize(gather(teacher.embedding))
        others = _distances(t).fill_diagonal_(torch.inf)  # a near-duplicate must not take a face's own place
        order = others.sort(stable=True, dim=1).indices[:, : min(self.neighbors, max(len(t) - 1, 0))]
        scores = -self.alpha * _distances(s).gather(1, order).pow(self.beta)
        of_the_rest = scores.flip(1).logcumsumexp(1).flip(1)
        return mean((of_the_rest - scores).sum(1))


class PKT(Loss):
    """Keep each face's distribution of similarities to the others in the batch.

    Mean over B^2 of P_T log(P_T / P_S), P being (cos + 1) / 2 with rows that sum to 1, the diagonal included. This is
    the divergence divided by B, about 1e-5 for random embeddings: published weights are near 30,000. No labels.
    Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.

    Args:
        epsilon: added to both probabilities within the logarithm.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm; returns a scalar, 0 for a batch of one.

    Raises:
        ValueError: epsilon is not positive.

    >>> faces = torch.randn(8, 16)
    >>> PKT()(Output(2 * faces), Output(faces)).round(decimals=5).abs()
    tensor(0.)
    """

    def __init__(self, *, epsilon: float = 1e-7):
        super().__init__()
        self.epsilon = positive(epsilon=epsilon)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        p_s, p_t = (_neighborhood(gather(x.embedding)) for x in (student, teacher))
        return mean(p_t * ((p_t + self.epsilon).log() - (p_s + self.epsilon).log()))


def _neighborhood(X: Tensor) -> Tensor:
    x = F.normalize(X)
    similarity = (x @ x.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)
