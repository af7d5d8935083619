"""Verification and identification figures as pure functions of scores.

A score is a similarity: larger means more alike. A comparison is accepted when its score is **at or above** the
threshold, so, with ISO/IEC 19795-1's names beside the customary ones,

* FMR (false match rate; "FAR" in most papers) is the share of impostor scores at or above the threshold,
* FNMR (false non-match rate; 1 - "TAR") is the share of genuine scores below it.

Only thresholds that occur as scores (and one above all of them) are considered; nothing is interpolated between them,
and comparisons with equal scores are always accepted or rejected together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faceless.randomness import Rng

Array = NDArray[Any]

#: Below so many errors a rate's confidence interval is wider than +-30 % at 90 % (Doddington's rule of 30).
RULE_OF_30 = 30


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
    genuine, impostor = np.sort(_checked(genuine, "genuine")), np.sort(_checked(impostor, "impostor"))
    k = allowed_errors(far, len(impostor))
    if k >= len(impostor):
        threshold = min(genuine[0], impostor[0])
    else:
        refused = impostor[-1 - k]  # the best impostor that may not pass, and with it all that tie with it
        above = [
            scores[i] for scores in (genuine, impostor) if (i := scores.searchsorted(refused, "right")) < len(scores)
        ]
        threshold = min(above) if above else np.nextafter(refused, refused.dtype.type(np.inf))
    false_matches = len(impostor) - int(np.searchsorted(impostor, threshold, side="left"))
    missed = int(np.searchsorted(genuine, threshold, side="left"))
    return OperatingPoint(
        far=far,
        tar=(len(genuine) - missed) / len(genuine),
        threshold=float(threshold),
        fmr=false_matches / len(impostor),
        allowed=k,
        false_matches=false_matches,
        false_non_matches=missed,
    )


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


def resamples(people: int, replicates: int, seed: int = 0) -> Array:
    """``[replicates, people]`` int64: how often each person is drawn when as many are drawn with replacement."""
    drawn = Rng.of(seed, "bootstrap", range(replicates)).integers(people, people).numpy()
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
