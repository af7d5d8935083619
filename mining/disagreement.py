"""How far a student is from its teacher: on a face, in a face's neighborhood, and in decisions about pairs of faces.

Everything works on rows in memory. Online, neighborhoods are looked up in a batch and a memory (`nearest`); offline, in
an `EmbeddingIndex` of a whole corpus (`neighborhoods`, `disagreeing_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceless.randomness import Rng
from mining.embedding_index import CHUNK, EmbeddingIndex, Floats, Ids


def pointwise(student: Tensor, teacher: Tensor, metric: str = "cosine") -> Tensor:
    """``[N]``: 1 - cosine, or the Euclidean distance (``l2``), of two embeddings ``[N, D]`` of the same faces.

    >>> pointwise(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([1.])
    """
    if metric == "cosine":
        return 1 - F.cosine_similarity(student.float(), teacher.float())
    if metric == "l2":
        return (student.float() - teacher.float()).norm(dim=1)
    raise ValueError(f"metric is {metric!r}; use cosine or l2")


def common(first: Tensor, second: Tensor) -> Tensor:
    """``[N, k]``: how many members two ranked lists ``[N, k]`` share among their first 1, 2, …, k entries.

    Entries of a list differ, except that -1 stands for nothing any number of times.

    >>> common(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 9]])).tolist()
    [[0, 2, 2]]
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"two lists of equal shape [N, k], got {list(first.shape)} and {list(second.shape)}")
    k = first.shape[1]
    filler = -1 - torch.arange(2 * k, device=first.device)  # so that missing entries never meet
    both = torch.cat((first, second), 1)
    both = torch.where(both < 0, filler, both)
    values, places = both.sort(stable=True, dim=1)
    met = values[:, 1:] == values[:, :-1]
    # A member enters the intersection at the deeper of its two ranks; what is in one list only never does.
    depth = torch.maximum(places[:, :-1], places[:, 1:] - k).masked_fill(~met, k)
    entered = torch.zeros(len(both), k + 1, dtype=torch.int64, device=both.device)
    return entered.scatter_add_(1, depth, torch.ones_like(depth))[:, :k].cumsum(1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """``[N]``: share of common members of two neighbor lists ``[N, k]``, in 0..1."""
    return common(first, second)[:, -1].float() / first.shape[1]


def rank_biased_overlap(first: Tensor, second: Tensor, persistence: float = 0.9) -> Tensor:
    """``[N]``: similarity of two rankings ``[N, k]`` in which early ranks weigh more, in 0..1.

    The extrapolated rank-biased overlap of lists of equal length: agreement A_d is the share of common members among
    the first d, and RBO = A_k p^k + (1 - p) / p * sum over d of A_d p^d. Webber, Moffat, Zobel: A similarity measure
    for indefinite rankings, ACM TOIS 28(4), 2010, equation 23.

    Args:
        persistence: p in (0, 1); the first 10 ranks carry 86 % of the weight at 0.9.

    >>> rank_biased_overlap(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))
    tensor([1.])
    """
    if not 0 < persistence < 1:
        raise ValueError(f"persistence is {persistence}; it must lie between 0 and 1")
    k = first.shape[1]
    depths = torch.arange(1, k + 1, device=first.device, dtype=torch.float64)
    agreement = common(first, second) / depths
    weights = (1 - persistence) / persistence * persistence**depths
    weights[-1] += persistence**k
    return (agreement @ weights).float()


def nearest(rows: Tensor, memory: Tensor, k: int) -> Tensor:
    """``[B, k]``: numbers of the rows of ``memory [M, D]`` with the largest cosine, the nearest first."""
    return (F.normalize(rows.float()) @ F.normalize(memory.float()).T).topk(k, dim=1).indices


def neighborhood(student: Tensor, teacher: Tensor, student_memory: Tensor, teacher_memory: Tensor, k: int) -> Tensor:
    """``[B]``: 1 - overlap of each face's ``k`` neighbors in two row-aligned memories ``[M, D]``; for online use."""
    return 1 - overlap(nearest(student, student_memory, k), nearest(teacher, teacher_memory, k))


@dataclass(frozen=True)
class Neighborhoods:
    """Who is near whom in the two spaces, and how far that agrees.

    Attributes:
        student, teacher: ``[N, k]`` row numbers, the nearest first, without the row itself.
        student_cosines, teacher_cosines: ``[N, k]`` of those.
        overlap, rbo: ``[N]`` float32; see `overlap` and `rank_biased_overlap`.
    """

    student: Ids
    teacher: Ids
    student_cosines: Floats
    teacher_cosines: Floats
    overlap: Floats
    rbo: Floats


def neighborhoods(
    student: Floats, teacher: Floats, k: int = 20, *, persistence: float = 0.9, kind: str = "auto", recall: float = 0.99
) -> Neighborhoods:
    """Compare the ``k`` nearest neighbors of all faces of a corpus in the two spaces.

    Args:
        student, teacher: embeddings ``[N, D]`` of the same faces; D may differ.
        kind, recall: of the indexes, see `EmbeddingIndex.of`.
    """
    if len(student) != len(teacher):
        raise ValueError(f"embeddings of the same faces, got {len(student)} and {len(teacher)}")
    k = min(k, len(student) - 1)
    if k < 1:
        raise ValueError("a neighborhood needs at least two faces")
    (s_cosines, s_ids), (t_cosines, t_ids) = (
        EmbeddingIndex.of(rows, kind=kind, recall=recall, k=k).neighbors(rows, k) for rows in (student, teacher)
    )
    shared, ranked = np.empty(len(student), np.float32), np.empty(len(student), np.float32)
    for first in range(0, len(student), CHUNK):
        part = slice(first, first + CHUNK)
        s, t = torch.from_numpy(s_ids[part]), torch.from_numpy(t_ids[part])
        shared[part] = overlap(s, t)
        ranked[part] = rank_biased_overlap(s, t, persistence)
    return Neighborhoods(s_ids, t_ids, s_cosines, t_cosines, shared, ranked)


@dataclass(frozen=True)
class Threshold:
    """A cosine that so many impostor pairs reach.

    Attributes:
        value: the lowest cosine that accepts at most the share ``far`` of the pairs.
        far: the false match rate asked for.
        pairs: different impostor pairs, at most, that it was found on; below 30 / far it is a guess.
        spread: standard deviation of the impostors' cosines.
    """

    value: float
    far: float
    pairs: int
    spread: float


def impostor_threshold(
    rows: Floats, far: float, *, labels: Ids | None = None, pairs: int = 1_000_000, seed: int = 0
) -> Threshold:
    """Calibrate a decision threshold on random pairs of different faces.

    Generated faces rarely show one identity twice, so two of them drawn at random count as impostors; with ``labels``
    pairs of one label are left out. All processes and machines draw the same pairs.

    Args:
        rows: embeddings ``[N, D]``.
        labels: ``[N]`` identities, -1 for unknown.
    """
    if not 0 < far < 1:
        raise ValueError(f"far is {far}; it must lie between 0 and 1")
    if len(rows) < 2:
        raise ValueError("impostor pairs need at least two faces")
    cosines = []
    for first in range(0, pairs, CHUNK):
        rng = Rng.of(seed, "impostor pairs", range(first, min(first + CHUNK, pairs)))
        drawn = rng.integers(len(rows), 1)[:, 0].numpy()
        other = (drawn + 1 + rng.child("other").integers(len(rows) - 1, 1)[:, 0].numpy()) % len(rows)
        if labels is not None:
            stranger = (labels[drawn] != labels[other]) | (labels[drawn] < 0)
            drawn, other = drawn[stranger], other[stranger]
        cosines.append(_cosines(rows, drawn, other))
    found = threshold_of(np.concatenate(cosines), far)
    # Of few faces the same pairs are drawn many times over.
    return replace(found, pairs=min(found.pairs, len(rows) * (len(rows) - 1) // 2))


def threshold_of(impostors: Floats, far: float) -> Threshold:
    """The lowest threshold that at most ``floor(far * n)`` of ``impostors [n]`` reach.

    >>> threshold_of(np.array([0.1, 0.2, 0.3, 0.4], np.float32), 0.25).value > 0.3
    True
    """
    if not len(impostors):
        raise ValueError("there are no impostor pairs")
    value = above_all_but(impostors, int(far * len(impostors) + 1e-9))
    return Threshold(value, far, len(impostors), float(impostors.std()))


def above_all_but(scores: Floats, allowed: int) -> float:
    """The lowest threshold that at most ``allowed`` of ``scores [n]`` reach; equal scores are never split."""
    place = len(scores) - 1 - allowed
    return float(np.nextafter(np.partition(scores, place)[place], np.float32(np.inf), dtype=np.float32))


@dataclass(frozen=True)
class Pairs:
    """Pairs of faces that the teacher decides rightly and the student wrongly, the worst first.

    Attributes:
        first, second: ``[P]`` row numbers, first < second.
        teacher, student: ``[P]`` cosines.
        missed: ``[P]`` whether it is the same face to the teacher (else the student confuses two).
        severity: ``[P]`` how far both cosines lie on the two sides of their thresholds, in standard deviations of
            impostor cosines.
        cut: faces all of whose neighbors are above a threshold, so that more may be, which were not looked at.
    """

    first: Ids
    second: Ids
    teacher: Floats
    student: Floats
    missed: np.ndarray
    severity: Floats
    cut: int

    def __len__(self) -> int:
        return len(self.first)


def disagreeing_pairs(
    student: Floats,
    teacher: Floats,
    student_threshold: Threshold,
    teacher_threshold: Threshold,
    near: Neighborhoods,
    *,
    labels: Ids | None = None,
) -> Pairs:
    """Find the pairs on whose identity student and teacher decide differently, and the teacher rightly.

    A pair that only one of the two accepts is above that one's threshold, so it lies among the nearest neighbors in
    that space: only those are looked at, never all pairs. Without ``labels`` the teacher is taken to be right.

    Args:
        student, teacher: embeddings ``[N, D]`` of the same faces; D may differ.
        student_threshold, teacher_threshold: each calibrated in its own space, see `impostor_threshold`.
        near: the neighbors of each face in each space (`neighborhoods`): only these pairs are looked at.
        labels: ``[N]`` identities, -1 for unknown (whose pairs are left out).
    """
    accepted: list[Ids] = []  # pairs as one number each
    cut = np.zeros(len(student), bool)
    for ids, cosines, threshold in (
        (near.student, near.student_cosines, student_threshold),
        (near.teacher, near.teacher_cosines, teacher_threshold),
    ):
        above = (cosines >= threshold.value) & (ids >= 0)
        cut |= above[:, -1] & (ids.shape[1] < len(ids) - 1)
        a, b = np.repeat(np.arange(len(ids)), above.sum(1)), ids[above]
        accepted.append(np.unique(np.minimum(a, b) * len(student) + np.maximum(a, b)))
    # On what both accept they agree: most pairs need no further look.
    by_student, by_teacher = accepted
    codes = np.setxor1d(by_student, by_teacher, assume_unique=True)
    a, b = codes // len(student), codes % len(student)
    s, t = _cosines(student, a, b), _cosines(teacher, a, b)
    same = t >= teacher_threshold.value
    chosen = same != (s >= student_threshold.value)
    if labels is not None:
        chosen &= (same == (labels[a] == labels[b])) & (labels[a] >= 0) & (labels[b] >= 0)
    a, b, s, t, same = a[chosen], b[chosen], s[chosen], t[chosen], same[chosen]
    severity = (np.abs(s - student_threshold.value) / max(student_threshold.spread, 1e-12)) + (
        np.abs(t - teacher_threshold.value) / max(teacher_threshold.spread, 1e-12)
    )
    order = np.lexsort((b, a, -severity))
    return Pairs(
        a[order], b[order], t[order], s[order], same[order], severity[order].astype(np.float32), int(cut.sum())
    )


def _cosines(rows: Floats, first: Ids, second: Ids) -> Floats:
    """``[P]`` cosines of pairs of rows, a chunk at a time."""
    out = np.empty(len(first), np.float32)
    for begin in range(0, len(first), CHUNK):
        part = slice(begin, begin + CHUNK)
        a, b = (torch.from_numpy(np.asarray(rows[which[part]], np.float32)) for which in (first, second))
        out[part] = F.cosine_similarity(a, b)
    return out
