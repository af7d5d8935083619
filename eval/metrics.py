"""Verification and identification figures as pure functions of scores.

A score is a similarity: larger means more alike. A comparison is accepted when its score is **at or above** the
threshold, so, with ISO/IEC 19795-1's names beside the customary ones,

* FMR (false match rate; "FAR" in most papers) is the share of impostor scores at or above the threshold,
* FNMR (false non-match rate; 1 - "TAR") is the share of genuine scores below it.

Only thresholds that occur as scores (and one above all of them) are considered; nothing is interpolated between them,
and comparisons with equal scores are always accepted or rejected together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faceless.randomness import Rng

Array = NDArray[Any]

#: Below so many errors a rate's confidence interval is wider than +-30 % at 90 % (Doddington's rule of 30).
RULE_OF_30 = 30
#: Shares of comparisons that `error_versus_discard` rejects.
DISCARDED = (0.0, 0.05, 0.1, 0.2, 0.3)


def _checked(scores: Any, name: str) -> Array:
    """One-dimensional finite scores; float32 stays float32, so that ties survive."""
    array = np.asarray(scores)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} scores are one-dimensional, these have shape {array.shape}")
    if not len(array):
        raise ValueError(f"there are no {name} scores")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {len(array)} {name} scores are NaN or infinite")
    return array


def fmr(impostor: Any, threshold: float) -> float:
    """Share of impostor scores at or above ``threshold`` (ISO/IEC 19795-1 false match rate).

    >>> fmr([0.1, 0.2, 0.3, 0.4], 0.3)
    0.5
    """
    return float(np.mean(_checked(impostor, "impostor") >= threshold))


def fnmr(genuine: Any, threshold: float) -> float:
    """Share of genuine scores below ``threshold`` (ISO/IEC 19795-1 false non-match rate)."""
    return float(np.mean(_checked(genuine, "genuine") < threshold))


@dataclass(frozen=True)
class Curve:
    """Every operating point there is, from the strictest threshold to the laxest.

    Attributes:
        thresholds: ``[T]`` descending; the first is ``inf`` (nothing accepted), the others are all distinct scores.
        fmr: ``[T]`` share of impostors accepted, non-decreasing, from 0 to 1.
        fnmr: ``[T]`` share of genuine comparisons rejected, non-increasing, from 1 to 0.
    """

    thresholds: Array
    fmr: Array
    fnmr: Array

    @property
    def tar(self) -> Array:
        """``[T]`` share of genuine comparisons accepted, 1 - FNMR."""
        return 1.0 - self.fnmr


def curve(genuine: Any, impostor: Any) -> Curve:
    """The exact ROC and DET: a step function with one point for each distinct score.

    >>> points = curve([0.9, 0.4], [0.4, 0.1])
    >>> points.thresholds.tolist(), points.fmr.tolist(), points.fnmr.tolist()
    ([inf, 0.9, 0.4, 0.1], [0.0, 0.0, 0.5, 1.0], [1.0, 0.5, 0.0, 0.0])
    """
    genuine, impostor = np.sort(_checked(genuine, "genuine")), np.sort(_checked(impostor, "impostor"))
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    accepted = len(impostor) - np.searchsorted(impostor, thresholds, side="left")
    rejected = np.searchsorted(genuine, thresholds, side="left")
    return Curve(
        np.concatenate([[np.inf], thresholds]),
        np.concatenate([[0.0], accepted / len(impostor)]),
        np.concatenate([[1.0], rejected / len(genuine)]),
    )


def allowed_errors(rate: float, count: int) -> int:
    """``floor(rate * count)`` with ``rate`` as the decimal it is written as: 0.29 of 100 is 29, not 28."""
    numerator, denominator = _decimal(rate)
    return numerator * int(count) // denominator


def _decimal(rate: float) -> tuple[int, int]:
    exact = Fraction(str(rate))
    if not 0 <= exact <= 1:
        raise ValueError(f"a rate lies between 0 and 1, not {rate}")
    return exact.numerator, exact.denominator


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold chosen for a false accept rate does.

    Attributes:
        far: the rate asked for.
        tar: share of genuine comparisons accepted (1 - FNMR).
        threshold: lowest score that may serve as threshold.
        fmr: the false match rate that this threshold really has; at most ``far``.
        allowed: k, impostors that ``far`` allows.
        false_matches: impostors at or above the threshold; below k where a tie would have to be split.
        false_non_matches: genuine comparisons below the threshold.
    """

    far: float
    tar: float
    threshold: float
    fmr: float
    allowed: int
    false_matches: int
    false_non_matches: int

    @property
    def fnmr(self) -> float:
        return 1.0 - self.tar


def tar_at_far(genuine: Any, impostor: Any, far: float) -> OperatingPoint:
    """The true accept rate at a false accept rate that is never exceeded.

    k = floor(far x impostors); the threshold is the lowest score with at most k impostors at or above it, so impostors
    with equal scores are never split. When no score is high enough, it is the next float above the highest one.

    Raises:
        ValueError: no scores, NaN or infinite scores, or a rate outside 0..1.

    >>> point = tar_at_far([0.9, 0.5, 0.3], [0.5, 0.5, 0.2, 0.1], far=0.25)
    >>> round(point.tar, 3), point.threshold, point.allowed, point.false_matches
    (0.333, 0.9, 1, 0)
    """
    return tar_at_fars(genuine, impostor, [far])[0]


def tar_at_fars(genuine: Any, impostor: Any, fars: Sequence[float]) -> list[OperatingPoint]:
    """`tar_at_far` at several rates, for tens of millions of impostors: only the best ones that matter are sorted.

    >>> [point.tar for point in tar_at_fars([0.9, 0.5, 0.3], [0.5, 0.4, 0.2, 0.1], [0.25, 0.5])]
    [0.6666666666666666, 1.0]
    """
    genuine, impostor = np.sort(_checked(genuine, "genuine")), _checked(impostor, "impostor")
    counts = [allowed_errors(far, len(impostor)) for far in fars]
    kept = min(len(impostor), max(counts, default=0) + 1)
    top = np.sort(np.partition(impostor, len(impostor) - kept)[len(impostor) - kept :])
    return [_point(genuine, top, len(impostor), far, k) for far, k in zip(fars, counts)]


def _point(genuine: Array, top: Array, impostors: int, far: float, k: int) -> OperatingPoint:
    """The operating point that lets ``k`` pass; ``top`` holds at least the ``k + 1`` best impostors, ascending."""
    if k >= impostors:
        threshold = min(genuine[0], top[0])
    else:
        refused = top[-1 - k]  # the best impostor that may not pass, and with it all that tie with it
        above = [scores[i] for scores in (genuine, top) if (i := scores.searchsorted(refused, "right")) < len(scores)]
        threshold = min(above) if above else np.nextafter(refused, refused.dtype.type(np.inf))
    return _at(genuine, threshold, len(top) - int(np.searchsorted(top, threshold, side="left")), impostors, far, k)


def _at(
    genuine: Array, threshold: float, false_matches: int, impostors: int, far: float, allowed: int
) -> OperatingPoint:
    missed = int(np.searchsorted(genuine, threshold, side="left"))
    return OperatingPoint(
        far=far,
        tar=(len(genuine) - missed) / len(genuine),
        threshold=float(threshold),
        fmr=false_matches / impostors,
        allowed=allowed,
        false_matches=false_matches,
        false_non_matches=missed,
    )


@dataclass(frozen=True)
class Streamed:
    """Exact figures of scores that never were in memory together; ``genuine`` and ``impostor`` count them."""

    points: list[OperatingPoint]
    eer: float
    auc: float
    genuine: int
    impostor: int


def streamed(genuine: Any, impostor: Callable[[], Iterable[Any]], fars: Sequence[float]) -> Streamed:
    """`tar_at_far`, `eer` and `auc` of any number of impostor scores, to the last digit, in two passes.

    The first pass counts scores by the upper 16 bits of their floating-point pattern, which are in the order of the
    scores; the second resolves the few of those 65,536 bins in which a wanted score lies. Memory holds the genuine
    scores and one block.

    Args:
        genuine: ``[G]`` float32 scores.
        impostor: called twice; yields the impostor scores as float32 blocks of any length, the same both times.
        fars: at which operating points are wanted.

    Raises:
        ValueError: no scores, scores that are not finite or not float32, or a second pass that differs from the first.

    >>> blocks = [np.float32([0.5, 0.5]), np.float32([0.2, 0.1])]
    >>> found = streamed(np.float32([0.9, 0.5, 0.3]), lambda: blocks, [0.25])
    >>> round(found.points[0].tar, 3), found.points[0].allowed, found.points[0].false_matches
    (0.333, 1, 0)
    """
    genuine = np.sort(_single(genuine, "genuine"))
    below, not_above = np.zeros(len(genuine), np.int64), np.zeros(len(genuine), np.int64)
    coarse = np.zeros(1 << 16, np.int64)
    for block in impostor():
        scores = np.sort(_single(block, "impostor"))
        below += np.searchsorted(scores, genuine, side="left")
        not_above += np.searchsorted(scores, genuine, side="right")
        coarse += np.bincount(_ordered(scores) >> 16, minlength=len(coarse))
    impostors = int(coarse.sum())
    if not impostors:
        raise ValueError("there are no impostor scores")
    counts = [allowed_errors(far, impostors) for far in fars]

    # EER: the highest genuine score with FMR >= FNMR. The curves cross there, or at an impostor score between it and
    # the next genuine one, where FNMR is that of `rejected` and FMR has reached it with `needed` impostors.
    meets = (impostors - below) * len(genuine) >= np.searchsorted(genuine, genuine, side="left") * impostors
    last = int(np.flatnonzero(meets)[-1])
    rejected = int(np.searchsorted(genuine, genuine[last], side="right"))
    needed = max(1, -(-rejected * impostors // len(genuine)))

    chosen = _select(coarse, impostor, {*(min(k, impostors - 1) for k in counts), needed - 1})
    points = []
    for far, k in zip(fars, counts):
        refused = chosen.at(min(k, impostors - 1))
        if k >= impostors:
            threshold, false_matches = min(genuine[0], refused.score), impostors
        else:
            above = [*genuine[np.searchsorted(genuine, refused.score, side="right") :][:1], *refused.next_higher]
            threshold = min(above) if above else np.nextafter(refused.score, np.float32(np.inf))
            false_matches = refused.greater
        points.append(_at(genuine, threshold, false_matches, impostors, far, k))

    crossing = chosen.at(needed - 1)
    if crossing.score > genuine[last]:
        here, above_here = (crossing.at_least, rejected), (crossing.greater, rejected)
    else:
        here = impostors - int(below[last]), int(np.searchsorted(genuine, genuine[last], side="left"))
        above_here = impostors - int(not_above[last]), rejected
    rates = [(matches / impostors, misses / len(genuine)) for matches, misses in (here, above_here)]
    equal = here[0] * len(genuine) == here[1] * impostors
    return Streamed(
        points,
        rates[0][0] if equal else min(map(sum, rates)) / 2,
        (int(below.sum()) + int(not_above.sum())) / (2 * len(genuine) * impostors),
        len(genuine),
        impostors,
    )


def _single(scores: Any, name: str) -> Array:
    if np.asarray(scores).dtype != np.float32:
        raise ValueError(f"{name} scores are streamed as float32, not {np.asarray(scores).dtype}")
    return _checked(scores, name) if len(scores) else np.asarray(scores)


def _ordered(scores: Array) -> Array:
    """``uint32`` numbers in the order of float32 scores (the usual trick of sorting floats by their bits)."""
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0 and 0, which are equal, the same pattern
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _score(ordered: Array) -> Array:
    return np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class _Ranked:
    """A score, how many are greater, how many are at least it, and the next higher one if there is any."""

    score: Any
    greater: int
    at_least: int
    next_higher: list[Any]


@dataclass(frozen=True)
class _Selection:
    """Distinct ``scores`` of resolved bins, descending; ``greater`` and ``at_least`` count all scores."""

    scores: Array
    greater: Array
    at_least: Array

    def at(self, rank: int) -> _Ranked:
        """The score with ``rank`` others before it in descending order; its bin must be among the resolved ones."""
        i = int(np.searchsorted(self.greater, rank, side="right")) - 1
        higher = [self.scores[i - 1]] if self.greater[i] else []
        return _Ranked(self.scores[i], int(self.greater[i]), int(self.at_least[i]), higher)


def _select(coarse: Array, blocks: Callable[[], Iterable[Any]], ranks: set[int]) -> _Selection:
    """Resolve the bins in which the scores of these descending ranks lie, and the next filled ones above them."""
    higher = np.cumsum(coarse[::-1])[::-1] - coarse  # scores in higher bins; falls from bin to bin
    filled = np.flatnonzero(coarse)
    wanted: set[int] = set()
    for rank in ranks:
        place = int(np.searchsorted(filled, np.argmax(higher <= rank)))
        wanted.update(filled[place : place + 2].tolist())
    bins = np.array(sorted(wanted, reverse=True))
    number = np.full(len(coarse), -1)
    number[bins] = np.arange(len(bins))
    fine = np.zeros(len(bins) << 16, np.int64)
    for block in blocks():
        keys = _ordered(_single(block, "impostor"))
        row = number[keys >> 16]
        inside = row >= 0
        fine += np.bincount((row[inside] << 16) | (keys[inside] & 0xFFFF), minlength=len(fine))
    scores, greater, at_least = [], [], []
    for bin_, counts in zip(bins.tolist(), fine.reshape(len(bins), -1)):
        if counts.sum() != coarse[bin_]:
            raise ValueError("the second pass over the impostor scores differs from the first")
        low = np.flatnonzero(counts)[::-1]
        reached = higher[bin_] + np.cumsum(counts[low])
        scores.append(_score(np.uint32(bin_ << 16) | low.astype(np.uint32)))
        greater.append(reached - counts[low])
        at_least.append(reached)
    return _Selection(np.concatenate(scores), np.concatenate(greater), np.concatenate(at_least))


def eer(genuine: Any, impostor: Any) -> float:
    """Equal error rate of the step curves, as in FVC2000 (Maio et al., IEEE TPAMI 24(3), 2002, section 3.4).

    FMR and FNMR rarely meet in a point. Of the two thresholds around the crossing, the one with the smaller
    FMR + FNMR counts, and the mean of its two rates is the EER; where the rates are equal, it is that rate.

    >>> eer([0.9, 0.8, 0.3, 0.7], [0.1, 0.2, 0.4, 0.0])
    0.25
    """
    points = curve(genuine, impostor)
    first = int(np.argmax(points.fmr >= points.fnmr))  # there is one: at the lowest score FMR = 1 and FNMR = 0
    total = points.fmr + points.fnmr
    if points.fmr[first] == points.fnmr[first]:
        return float(points.fmr[first])
    return float(min(total[first], total[first - 1]) / 2)


def auc(genuine: Any, impostor: Any) -> float:
    """Area under the ROC: probability that a genuine score exceeds an impostor score, ties counting one half.

    >>> auc([0.9, 0.4], [0.4, 0.1])
    0.875
    """
    genuine, impostor = _checked(genuine, "genuine"), np.sort(_checked(impostor, "impostor"))
    below = np.searchsorted(impostor, genuine, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(impostor, genuine, side="right").sum(dtype=np.int64)
    return float((int(below) + int(not_above)) / (2 * len(genuine) * len(impostor)))


@dataclass(frozen=True)
class FoldAccuracy:
    """Accuracy over folds: ``mean`` and population ``std`` of ``folds [K]``, each at its own ``thresholds [K]``."""

    mean: float
    std: float
    folds: Array
    thresholds: Array


def _fold_bounds(pairs: int, folds: int) -> Array:
    """``[folds + 1]`` limits of contiguous folds; the first ``pairs % folds`` hold one pair more."""
    if not 2 <= folds <= pairs:
        raise ValueError(f"{pairs} pairs cannot be split into {folds} folds")
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.concatenate([[0], np.cumsum(sizes)])


def _accuracy_over_folds(correct: Array, sizes: Array, thresholds: Array) -> FoldAccuracy:
    """``correct [K, T]`` right decisions of each fold at each threshold; the first best of the other folds is used."""
    best = np.argmax(correct.sum(0) - correct, axis=1)
    accuracy = correct[np.arange(len(sizes)), best] / sizes
    return FoldAccuracy(float(accuracy.mean()), float(accuracy.std()), accuracy, thresholds[best])


def _correct_by_fold(values: Array, same: Array, folds: int, accepted_below: Array) -> tuple[Array, Array]:
    """Right decisions ``[K, T]`` of accepting ``values < accepted_below[t]``, and the fold sizes ``[K]``."""
    bounds = _fold_bounds(len(values), folds)
    rows = []
    for start, stop in pairwise(bounds):
        fold, truth = values[start:stop], same[start:stop]
        right = np.searchsorted(np.sort(fold[truth]), accepted_below, side="left")
        wrong = np.searchsorted(np.sort(fold[~truth]), accepted_below, side="left")
        rows.append(right + (np.count_nonzero(~truth) - wrong))
    return np.stack(rows), np.diff(bounds)


def _checked_pairs(values: Any, same: Any) -> tuple[Array, Array]:
    values, same = _checked(values, "pair").astype(np.float64), np.asarray(same)
    if same.shape != values.shape or not np.isin(same, (0, 1)).all():
        raise ValueError(f"{len(values)} scores need as many booleans, not shape {same.shape}")
    return values, same.astype(bool)


def insightface_accuracy(distances: Any, same: Any, folds: int = 10) -> FoldAccuracy:
    """Accuracy as InsightFace's ``eval/verification.py`` computes it for the ``.bin`` pair lists.

    Accept d < t for t in 0, 0.01, …, 3.99; contiguous unshuffled folds; the first t that is best on the other folds;
    mean and population standard deviation. Folds share people, which is optimistic (arXiv 2405.15965).

    Args:
        distances: ``[P]`` squared Euclidean distances of unit-norm embeddings, 0..4.
        same: ``[P]`` whether a pair shows one person.
    """
    distances, same = _checked_pairs(distances, same)
    grid = np.arange(0, 4, 0.01)
    return _accuracy_over_folds(*_correct_by_fold(distances, same, folds, grid), grid)


def accuracy(scores: Any, same: Any, folds: int = 10) -> FoldAccuracy:
    """Accuracy over contiguous folds with no grid: every threshold that decides the other folds differently is tried.

    Accept score >= t. Candidates lie half-way between neighboring distinct scores; of several best, the highest (the
    fewest false matches) is taken.

    Args:
        scores: ``[P]`` similarities.
        same: ``[P]`` whether a pair shows one person.

    >>> accuracy([0.9, 0.1, 0.8, 0.2], [True, False, True, False], folds=2).mean
    1.0
    """
    scores, same = _checked_pairs(scores, same)
    bounds = _fold_bounds(len(scores), folds)
    parts, thresholds = [], []
    for start, stop in pairwise(bounds):
        training, truth = np.delete(scores, np.s_[start:stop]), np.delete(same, np.s_[start:stop])
        distinct = np.unique(training)
        middle = distinct[:-1] + np.diff(distinct) / 2
        candidates = np.concatenate(
            [[np.inf], np.maximum(middle, np.nextafter(distinct[:-1], np.inf))[::-1], [-np.inf]]
        )
        accepted = len(training[truth]) - np.searchsorted(np.sort(training[truth]), candidates, side="left")
        refused = np.searchsorted(np.sort(training[~truth]), candidates, side="left")
        best = candidates[np.argmax(accepted + refused)]
        parts.append(np.mean((scores[start:stop] >= best) == same[start:stop]))
        thresholds.append(best)
    return FoldAccuracy(float(np.mean(parts)), float(np.std(parts)), np.array(parts), np.array(thresholds))


@dataclass(frozen=True)
class FoldRate:
    """TAR over folds: ``mean`` and population ``std``, and the mean FAR that the chosen thresholds have on test."""

    mean: float
    std: float
    far: float
    thresholds: Array


def insightface_val(distances: Any, same: Any, far: float = 1e-3, folds: int = 10) -> FoldRate:
    """VAL@FAR of InsightFace's ``eval/verification.py`` without its interpolation.

    Accept d < t for t in 0, 0.001, …, 3.999. Of each fold's thresholds the largest is taken with which at most ``far``
    of the impostors of the other folds are accepted. InsightFace interpolates between thresholds of different FAR over
    a curve in which most FARs occur more than once, which SciPy refuses today and which used to give a threshold that
    depended on how it ordered them.

    Args:
        distances: ``[P]`` squared Euclidean distances of unit-norm embeddings, 0..4.
        same: ``[P]`` whether a pair shows one person; both kinds in every fold.
    """
    distances, same = _checked_pairs(distances, same)
    grid = np.arange(0, 4, 0.001)
    bounds = _fold_bounds(len(distances), folds)
    accepted = []
    for start, stop in pairwise(bounds):
        fold, truth = distances[start:stop], same[start:stop]
        if truth.all() or not truth.any():
            raise ValueError(f"pairs {start} to {stop - 1} are all of one kind; every fold needs both")
        accepted.append([np.searchsorted(np.sort(fold[kind]), grid, side="left") for kind in (truth, ~truth)])
    right, wrong = np.array(accepted).transpose(1, 0, 2)
    sizes = np.array([np.count_nonzero(same[start:stop]) for start, stop in pairwise(bounds)])
    others = np.diff(bounds) - sizes
    limits = [allowed_errors(far, int(others.sum() - count)) for count in others]
    # Counts never fall with the threshold, so the last one that keeps to the limit is the largest.
    best = np.array([np.searchsorted(row, k, side="right") - 1 for row, k in zip(wrong.sum(0) - wrong, limits)])
    rows = np.arange(folds)
    rates = right[rows, best] / sizes
    return FoldRate(float(rates.mean()), float(rates.std()), float((wrong[rows, best] / others).mean()), grid[best])


@dataclass(frozen=True)
class Sweep:
    """Figures of accepting scores at or above each of ``thresholds [T]``; a precision of no accepted pair is NaN."""

    thresholds: Array
    accuracy: Array
    precision: Array
    recall: Array
    f1: Array

    def summary(self) -> dict[str, Any]:
        """Best and mean over the thresholds of each figure, each by itself: a row of bests mixes thresholds."""
        result: dict[str, Any] = {"thresholds": self.thresholds.tolist()}
        for name in SWEPT:
            values = getattr(self, name)
            defined = values[~np.isnan(values)]
            result[name] = {
                "best": float(defined.max()) if len(defined) else None,
                "mean": float(defined.mean()) if len(defined) else None,
                "values": [None if np.isnan(value) else float(value) for value in values],
            }
        return result


#: The figures of `Sweep`.
SWEPT = ("accuracy", "precision", "recall", "f1")
#: 0.30, 0.35, …, 0.70.
SWEEP_THRESHOLDS = tuple(round(0.30 + 0.05 * step, 2) for step in range(9))


def threshold_sweep(genuine: Any, impostor: Any, thresholds: Sequence[float] = SWEEP_THRESHOLDS) -> Sweep:
    """Accuracy, precision, recall and F1 over fixed thresholds, as AFL-KD reports them (doi 10.5281/zenodo.15502091).

    Its step is not published; ours is 0.05. Accuracy, precision and F1 depend on how many pairs are genuine.

    >>> threshold_sweep([0.9, 0.4], [0.6, 0.1, 0.1, 0.1], [0.5]).f1
    array([0.5])
    """
    genuine, impostor = np.sort(_checked(genuine, "genuine")), np.sort(_checked(impostor, "impostor"))
    limits = np.asarray(thresholds, dtype=np.float64)
    true = len(genuine) - np.searchsorted(genuine.astype(np.float64), limits, side="left")
    false = len(impostor) - np.searchsorted(impostor.astype(np.float64), limits, side="left")
    with np.errstate(invalid="ignore"):
        precision = true / (true + false)
    return Sweep(
        limits,
        (true + len(impostor) - false) / (len(genuine) + len(impostor)),
        precision,
        true / len(genuine),
        2 * true / (true + false + len(genuine)),
    )


def wilson(events: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a rate of independent trials (Wilson, JASA 22, 1927); too narrow where trials share people.

    >>> [round(bound, 4) for bound in wilson(3, 100)]
    [0.0103, 0.0845]
    """
    if not 0 <= events <= trials or not trials:
        raise ValueError(f"{events} of {trials} is no rate")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, share = events / trials, z * z / trials
    center, reach = rate + share / 2, z * ((rate * (1 - rate) + share / 4) / trials) ** 0.5
    return max(0.0, (center - reach) / (1 + share)), min(1.0, (center + reach) / (1 + share))


def mate_ranks(similarity: Any, identities: Any) -> Array:
    """Rank at which each face finds another face of its person, leaving the face itself out of the gallery.

    Closed-set identification over one set of faces: every face is a probe, all other faces are the gallery.
    rank = 1 + gallery faces of *other* people at least as similar as the most similar mate: ties count against.

    Args:
        similarity: ``[N, N]``, larger is more alike; its diagonal is ignored.
        identities: ``[N]``.

    Returns:
        ``[N]`` int64; 0 where a person has a single face, who therefore cannot be a probe.
    """
    similarity, identities = np.asarray(similarity), np.asarray(identities)
    if similarity.shape != (len(identities), len(identities)):
        raise ValueError(f"similarity of {len(identities)} faces is [N, N], not {similarity.shape}")
    _checked(similarity.ravel(), "similarity")
    ranks = np.zeros(len(identities), dtype=np.int64)
    for probe, identity in enumerate(identities):
        mates = identities == identity
        others = similarity[probe, ~mates]
        mates[probe] = False
        if mates.any():
            ranks[probe] = 1 + np.count_nonzero(others >= similarity[probe, mates].max())
    return ranks


def rank_k(similarity: Any, identities: Any, k: int = 1) -> float:
    """Share of probes whose best mate is beaten or equaled by fewer than ``k`` faces of others; see `mate_ranks`.

    >>> rank_k([[1, 0.9, 0.2], [0.9, 1, 0.9], [0.2, 0.9, 1]], [0, 0, 1])  # the second face's mate ties with a stranger
    0.5
    """
    if k < 1:
        raise ValueError(f"k is {k}; it counts from 1")
    ranks = mate_ranks(similarity, identities)
    if not ranks.any():
        raise ValueError("nobody has two faces, so nobody can be found again")
    return float(np.mean(ranks[ranks > 0] <= k))


@dataclass(frozen=True)
class Search:
    """What searching each probe in a gallery found.

    Attributes:
        ranks: ``[P]`` rank of the best mate, ties counting against; 0 where the gallery holds no mate.
        mate: ``[P]`` float32 score of the best mate; -inf where there is none.
        stranger: ``[P]`` float32 score of the best other; -inf where there is none.
    """

    ranks: Array
    mate: Array
    stranger: Array

    def rank_k(self, k: int = 1) -> float:
        """Share of mated probes found at rank ``k`` or better (closed set, "CMC")."""
        mated = self.ranks > 0
        if not mated.any():
            raise ValueError("no probe has a mate in the gallery")
        return float(np.mean(self.ranks[mated] <= k))

    def fnir_at_fpir(self, fpir: float) -> OperatingPoint:
        """FNIR (ISO/IEC 19795-1) at a false positive identification rate that is never exceeded.

        FPIR is the share of probes *without* a mate whose best score reaches the threshold. A mated probe is missed
        when its best mate does not reach it, whatever its rank. Fields of the result read as of a search: ``fmr`` is
        FPIR and ``fnmr`` FNIR.
        """
        mated = self.ranks > 0
        if mated.all() or not mated.any():
            raise ValueError("an open-set search needs probes with and without a mate in the gallery")
        return tar_at_far(self.mate[mated], self.stranger[~mated], fpir)


def search(
    probes: Any,
    probe_people: Any,
    gallery: Any,
    gallery_people: Any,
    block: int = 1 << 24,
    leave_one_out: bool = False,
) -> Search:
    """Compare every probe with the whole gallery, some probes at a time.

    Args:
        probes, gallery: ``[P, D]`` and ``[N, D]`` unit-norm embeddings.
        probe_people, gallery_people: ``[P]`` and ``[N]`` int64 identities.
        leave_one_out: the probes are the gallery, and none may find itself, as in `mate_ranks`.
        block: scores in memory at a time.

    >>> found = search(np.eye(2), [0, 1], np.eye(2)[[0, 0]], [0, 2])
    >>> found.ranks.tolist(), found.mate.tolist(), found.stranger.tolist()
    ([2, 0], [1.0, -inf], [1.0, 0.0])
    """
    probes, gallery = np.asarray(probes, dtype=np.float64), np.asarray(gallery, dtype=np.float64)
    probe_people, gallery_people = np.asarray(probe_people), np.asarray(gallery_people)
    if len(probes) != len(probe_people) or len(gallery) != len(gallery_people) or not len(gallery):
        raise ValueError("probes and a gallery of one face or more need an identity each")
    if leave_one_out and len(probes) != len(gallery):
        raise ValueError("leaving one out is for probes that are the gallery")
    order = np.argsort(gallery_people, kind="stable")
    itself = np.argsort(order)
    gallery, known = gallery[order].T, gallery_people[order]
    first, last = (np.searchsorted(known, probe_people, side=side) for side in ("left", "right"))
    ranks = np.zeros(len(probes), np.int64)
    mate, stranger = (np.full(len(probes), -np.inf, np.float32) for _ in range(2))
    step = max(1, block // len(known))
    for start in range(0, len(probes), step):
        scores = (probes[start : start + step] @ gallery).astype(np.float32)
        _checked(scores.ravel(), "similarity")
        for row, values in enumerate(scores, start):
            low, high = first[row], last[row]
            if leave_one_out:
                values[itself[row]] = -np.inf
            if high - low > leave_one_out:
                mate[row] = values[low:high].max()
                values[low:high] = -np.inf
                ranks[row] = 1 + np.count_nonzero(values >= mate[row])
            if high - low < len(known):
                stranger[row] = values.max()
    return Search(ranks, mate, stranger)


def resamples(people: int, replicates: int, seed: int = 0, first: int = 0) -> Array:
    """``[replicates, people]`` int64: how often each person is drawn when as many are drawn with replacement.

    ``first`` is the number of the first replicate, for those who want them some at a time.
    """
    drawn = Rng.of(seed, "bootstrap", range(first, first + replicates)).integers(people, people).numpy()
    flat = drawn + np.arange(replicates)[:, None] * people
    return np.bincount(flat.ravel(), minlength=replicates * people).reshape(replicates, people)


@dataclass(frozen=True)
class Bootstrap:
    """Figures of each replicate, ``[R]`` (``tar [R, F]``); NaN where it drew no genuine or no impostor pair."""

    fars: tuple[float, ...]
    eer: Array
    auc: Array
    tar: Array


def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a figure's replicates; replicates that could not be computed (NaN) are left out."""
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not {level}")
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("no replicate could be computed")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    genuine: Any,
    impostor: Any,
    genuine_people: Any,
    impostor_people: Any,
    weights: Array,
    fars: Sequence[float] = (1e-2, 1e-3, 1e-4),
) -> Bootstrap:
    """Resample people, not pairs: pairs that share a person are not independent.

    In a replicate that draws person s w_s times, a genuine pair of s counts w_s times and an impostor pair of s and t
    w_s x w_t times; k and the threshold are chosen anew. Figures are those of `eer`, `auc` and `tar_at_far` on the
    multiset of scores, computed from scores sorted once and weighted cumulative counts.

    Args:
        genuine, impostor: ``[G]`` and ``[I]`` scores.
        genuine_people: ``[G]`` 0..S-1, whose pair it is.
        impostor_people: ``[I, 2]`` 0..S-1, which two people meet.
        weights: ``[R, S]`` draws, from `resamples`.
        fars: at which `Bootstrap.tar` is wanted.
    """
    genuine, impostor = _checked(genuine, "genuine"), _checked(impostor, "impostor")
    genuine_people, impostor_people = np.asarray(genuine_people), np.asarray(impostor_people)
    if genuine_people.shape != genuine.shape or impostor_people.shape != (len(impostor), 2):
        raise ValueError("people are [G] for genuine and [I, 2] for impostor scores")
    order, other = np.argsort(-genuine, kind="stable"), np.argsort(-impostor, kind="stable")
    genuine, genuine_people = genuine[order], genuine_people[order]
    impostor, (first, second) = impostor[other], impostor_people[other].T

    # How many of each kind, in descending order, lie at or above each threshold; ahead of it one above all scores.
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    genuine_at = np.concatenate([[0], np.searchsorted(-genuine, -thresholds, side="right")])
    impostor_at = np.concatenate([[0], np.searchsorted(-impostor, -thresholds, side="right")])
    # Genuine scores that strictly exceed the i-th impostor, who is refused; with nobody refused all of them pass.
    genuine_over = np.append(np.searchsorted(-genuine, -impostor, side="left"), len(genuine))
    impostor_over = np.searchsorted(-impostor, -genuine, side="left")
    impostor_from = np.searchsorted(-impostor, -genuine, side="right")

    rates = [_decimal(far) for far in fars]
    replicates = len(weights)
    result = Bootstrap(
        tuple(fars), np.full(replicates, np.nan), np.full(replicates, np.nan), np.full((replicates, len(fars)), np.nan)
    )
    passed = np.zeros(len(genuine) + 1, dtype=np.int64)
    matched = np.zeros(len(impostor) + 1, dtype=np.int64)
    for row, drawn in enumerate(np.ascontiguousarray(weights, dtype=np.int64)):
        genuine_weight = drawn[genuine_people]
        np.cumsum(genuine_weight, out=passed[1:])
        np.cumsum(drawn[first] * drawn[second], out=matched[1:])
        all_genuine, all_impostor = int(passed[-1]), int(matched[-1])
        if not all_genuine or not all_impostor:
            continue
        k = [numerator * all_impostor // denominator for numerator, denominator in rates]
        refused = np.searchsorted(matched[1:], k, side="right")
        result.tar[row] = passed[genuine_over[refused]] / all_genuine
        # A genuine score wins against the impostors below it and half of those that equal it.
        lost = genuine_weight @ (matched[impostor_over] + matched[impostor_from])
        result.auc[row] = 1.0 - lost / (2 * all_genuine * all_impostor)

        def excess(t: int, a: int = all_genuine, b: int = all_impostor) -> int:
            """(FMR - FNMR) x pairs at threshold ``t``, an exact integer that never falls with ``t``."""
            return int(matched[impostor_at[t]]) * a - (a - int(passed[genuine_at[t]])) * b

        low, high = 0, len(thresholds)  # excess(low) < 0 <= excess(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
        total = [
            matched[impostor_at[t]] / all_impostor + 1.0 - passed[genuine_at[t]] / all_genuine for t in (low, high)
        ]
        result.eer[row] = (total[1] if excess(high) == 0 else min(total)) / 2
    return result


def bootstrap_share(hits: Any, people: Any, weights: Array) -> Array:
    """``[R]`` share of hits among trials ``[T]`` that belong to ``people [T]``, in each replicate of `resamples`."""
    hits, people = np.asarray(hits, dtype=np.float64), np.asarray(people)
    trials = np.bincount(people, minlength=weights.shape[1]).astype(np.float64)
    successes = np.bincount(people, weights=hits, minlength=weights.shape[1])
    with np.errstate(invalid="ignore"):
        return (weights @ successes) / (weights @ trials)


def share_interval(
    hits: Any, trials: Any, replicates: int = 1000, seed: int = 0, block: int = 1 << 24
) -> tuple[float, float] | None:
    """Interval of the share of hits among trials, ``[S]`` counts of each person; people are resampled.

    None of a single person, of whom nothing is known about others. Any number of people: ``block`` draws at a time.

    >>> share_interval([5, 5, 5], [10, 10, 10])
    (0.5, 0.5)
    """
    hits, trials = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if len(hits) < 2:
        return None
    step = max(1, block // len(hits))
    shares = []
    for start in range(0, replicates, step):
        weights = resamples(len(hits), min(step, replicates - start), seed, start).astype(np.float64)
        with np.errstate(invalid="ignore"):  # of people without trials alone
            shares.append((weights @ hits) / (weights @ trials))
    return interval(np.concatenate(shares))


def bootstrap_pairs(
    genuine: Any, impostor: Any, replicates: int, seed: int = 0, fars: Sequence[float] = (1e-2, 1e-3, 1e-4)
) -> Bootstrap:
    """`bootstrap` where nobody knows whose the pairs are: as many genuine and as many impostor pairs are drawn anew.

    Pairs share people, so the truth is wider.
    """
    genuine, impostor = _checked(genuine, "genuine"), _checked(impostor, "impostor")
    count = len(genuine)
    # Each pair is a person of its own, and each impostor pair meets one more who is drawn once in every replicate.
    weights = np.ones((replicates, count + len(impostor) + 1), np.int64)
    weights[:, :count] = resamples(count, replicates, seed)
    weights[:, count:-1] = resamples(len(impostor), replicates, seed + 1)
    others = np.stack([np.arange(count, count + len(impostor)), np.full(len(impostor), count + len(impostor))], 1)
    return bootstrap(genuine, impostor, np.arange(count), others, weights, fars)


def group_rates(
    genuine: Any,
    impostor: Any,
    genuine_people: Any,
    impostor_people: Any,
    groups: Sequence[str],
    threshold: float,
    weights: Array | None = None,
) -> dict[str, Any]:
    """FMR and FNMR within each group of people at one common threshold.

    Args:
        genuine, impostor: ``[G]`` and ``[I]`` scores.
        genuine_people, impostor_people: ``[G]`` and ``[I, 2]`` positions in ``groups``; impostor pairs of two groups
            count in none.
        groups: of each person.
        threshold: a score at or above it is accepted; it stays as it is in the replicates.
        weights: ``[R, S]`` from `resamples`, for 95 % intervals; none without.

    Raises:
        ValueError: a group has no genuine or no impostor pair.

    >>> found = group_rates([0.9, 0.2], [0.5, 0.1], [0, 2], [[0, 1], [2, 3]], ["a", "a", "b", "b"], 0.4)
    >>> [(name, rates["fmr"], rates["fnmr"]) for name, rates in found["groups"].items()]
    [('a', 1.0, 0.0), ('b', 0.0, 1.0)]
    """
    genuine, impostor = _checked(genuine, "genuine"), _checked(impostor, "impostor")
    first, second = np.asarray(impostor_people).T
    names = sorted(set(groups))
    number = np.array([names.index(group) for group in groups])
    own = number[np.asarray(genuine_people)]
    common = np.where(number[first] == number[second], number[first], -1)
    found: dict[str, dict[str, Any]] = {}
    for position, name in enumerate(names):
        mine, theirs = own == position, common == position
        if not mine.any() or not theirs.any():
            raise ValueError(f"group {name} has {int(mine.sum())} genuine and {int(theirs.sum())} impostor pairs")
        missed, matched = genuine[mine] < threshold, impostor[theirs] >= threshold
        rates: dict[str, Any] = {
            "genuine": int(mine.sum()),
            "impostor": int(theirs.sum()),
            "fmr": float(matched.mean()),
            "fnmr": float(missed.mean()),
        }
        if weights is not None:
            people = np.flatnonzero(number == position)
            place = np.empty(len(number), np.int64)
            place[people] = np.arange(len(people))
            drawn = weights[:, people].astype(np.float64)
            pairs = place[first[theirs]] * len(people) + place[second[theirs]]
            hits, trials = (
                np.bincount(pairs, part, len(people) ** 2).reshape(len(people), -1)
                for part in (matched.astype(np.float64), None)
            )
            with np.errstate(invalid="ignore"):
                rates["fmr_interval"] = interval(((drawn @ hits) * drawn).sum(1) / ((drawn @ trials) * drawn).sum(1))
            rates["fnmr_interval"] = interval(
                bootstrap_share(missed, place[np.asarray(genuine_people)[mine]], weights[:, people])
            )
        found[name] = rates
    result: dict[str, Any] = {"threshold": float(threshold), "groups": found}
    for rate in ("fmr", "fnmr"):
        values = [rates[rate] for rates in found.values()]
        result[f"{rate}_max_min_ratio"] = max(values) / min(values) if min(values) else None
    return result


def pareto(costs: Any, values: Any) -> Array:
    """Which of ``[M]`` models no other beats: none has as high a value at a lower cost, or a higher one as cheaply.

    >>> pareto([1, 2, 3, 3], [0.5, 0.9, 0.8, 0.9]).tolist()
    [True, True, False, False]
    """
    costs, values = np.asarray(costs, dtype=np.float64), np.asarray(values, dtype=np.float64)
    cheaper, better = costs[:, None] < costs, values[:, None] > values  # [i, j]: i against j
    as_cheap, as_good = costs[:, None] <= costs, values[:, None] >= values
    return ~((cheaper & as_good) | (as_cheap & better)).any(0)


def error_versus_discard(
    genuine: Any, quality: Any, threshold: float, discarded: Sequence[float] = DISCARDED
) -> dict[float, float]:
    """FNMR of the genuine comparisons that remain when those of the lowest quality are rejected.

    A quality score is good when the rate falls fast. The threshold stays, as it would in use.
    Source: Grother, Tabassi: Performance of biometric quality measures, IEEE TPAMI 29(4), 2007; ISO/IEC 29794-1.

    Args:
        genuine: ``[G]`` scores.
        quality: ``[G]`` of each comparison: of the worse of its two faces.
        threshold: scores at or above it are accepted.
        discarded: shares of the comparisons to reject, below 1. Equal qualities are rejected in the order given.

    Returns:
        The rate for each share.

    >>> error_versus_discard([0.9, 0.2, 0.8, 0.7], [3.0, 1.0, 2.0, 4.0], 0.5, (0.0, 0.25))
    {0.0: 0.25, 0.25: 0.0}
    """
    genuine, quality = _checked(genuine, "genuine"), _checked(quality, "quality")
    if genuine.shape != quality.shape:
        raise ValueError(f"{len(quality)} qualities of {len(genuine)} genuine comparisons")
    rejected = (genuine < threshold)[np.argsort(quality, kind="stable")]
    return {share: float(rejected[allowed_errors(share, len(genuine)) :].mean()) for share in discarded}


def caution(errors: int, trials: int) -> str | None:
    """What to bear in mind about a rate of ``errors`` in ``trials``, or None.

    Source: ISO/IEC 19795-1, rule of 3 and rule of 30, for independent trials (with people shared between pairs the
    truth is wider).

    >>> caution(0, 3000)
    'no error in 3000: the rate is below 0.001 at 95 % (rule of 3)'
    """
    if errors == 0:
        return f"no error in {trials}: the rate is below {3 / trials:.2g} at 95 % (rule of 3)"
    if errors < RULE_OF_30:
        return f"only {errors} error{'s' * (errors > 1)}: fewer than 30 fix no rate to +-30 % (rule of 30)"
    return None
