"""Disagreement against plain loops over sets, and pairs against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mining.disagreement import (
    Threshold,
    common,
    disagreeing_pairs,
    impostor_threshold,
    nearest,
    neighborhood,
    neighborhoods,
    overlap,
    pointwise,
    rank_biased_overlap,
    threshold_of,
)

lists = st.integers(1, 8).flatmap(
    lambda k: st.tuples(*[st.lists(st.integers(0, 11), min_size=k, max_size=k, unique=True)] * 2)
)


def rows(n: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def test_pointwise_against_numpy() -> None:
    S, T = rows(20), rows(20, seed=1)
    cosine = 1 - (S * T).sum(1) / np.linalg.norm(S, axis=1) / np.linalg.norm(T, axis=1)
    np.testing.assert_allclose(pointwise(torch.tensor(S), torch.tensor(T)), cosine, atol=1e-6)
    distance = np.sqrt(((S - T) ** 2).sum(1))
    np.testing.assert_allclose(pointwise(torch.tensor(S), torch.tensor(T), "l2"), distance, rtol=1e-6)
    with pytest.raises(ValueError, match="use cosine or l2"):
        pointwise(torch.tensor(S), torch.tensor(T), "dot")


@settings(max_examples=80, deadline=None)
@given(both=lists, p=st.floats(0.05, 0.98))
def test_rankings_against_sets(both: tuple[list[int], list[int]], p: float) -> None:
    """Webber et al.'s extrapolated RBO, summed as their equation 23 is written, over Python sets."""
    a, b = both
    k = len(a)
    shared = [len(set(a[:d]) & set(b[:d])) for d in range(1, k + 1)]
    first, second = torch.tensor([a]), torch.tensor([b])
    assert common(first, second)[0].tolist() == shared
    assert overlap(first, second).item() == pytest.approx(shared[-1] / k)
    extrapolated = shared[-1] / k * p**k + (1 - p) / p * sum(x / d * p**d for d, x in enumerate(shared, 1))
    assert rank_biased_overlap(first, second, p).item() == pytest.approx(extrapolated, abs=1e-6)
    assert rank_biased_overlap(second, first, p).item() == pytest.approx(extrapolated, abs=1e-6)


def test_missing_neighbors_never_meet() -> None:
    a, b = torch.tensor([[4, -1, -1]]), torch.tensor([[-1, 4, -1]])
    assert common(a, b).tolist() == [[0, 1, 1]]


def test_neighborhoods_against_all_to_all() -> None:
    S, T = rows(200), rows(200, dim=5, seed=1)
    found = neighborhoods(S, T, k=7)
    for space, ids in ((S, found.student), (T, found.teacher)):
        unit = space / np.linalg.norm(space, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -2)
        assert np.array_equal(np.sort(ids, 1), np.sort(np.argsort(-cosines, axis=1)[:, :7], 1))
    expected = [len(set(a) & set(b)) / 7 for a, b in zip(found.student.tolist(), found.teacher.tolist())]
    np.testing.assert_allclose(found.overlap, expected, rtol=1e-6)
    turned = T @ np.linalg.qr(rows(5, 5, seed=2))[0]
    same = neighborhoods(turned, T, k=7)
    assert same.overlap.min() > 0.8
    assert same.rbo.mean() > 0.99


def test_a_batch_against_a_memory() -> None:
    S, T = torch.tensor(rows(6)), torch.tensor(rows(6, seed=1))
    MS, MT = torch.tensor(rows(40, seed=2)), torch.tensor(rows(40, seed=3))
    order = (F.normalize(S) @ F.normalize(MS).T).argsort(1, descending=True)[:, :5]
    assert torch.equal(nearest(S, MS, 5), order)
    expected = [1 - len(set(a) & set(b)) / 5 for a, b in zip(nearest(S, MS, 5).tolist(), nearest(T, MT, 5).tolist())]
    assert neighborhood(S, T, MS, MT, 5).tolist() == pytest.approx(expected)
    assert neighborhood(S, S, MS, MS, 5).max() == 0


def test_thresholds_accept_no_more_than_their_rate() -> None:
    assert threshold_of(np.arange(100, dtype=np.float32), 0.05).value == np.nextafter(np.float32(94), np.float32(99))
    tied = threshold_of(np.array([0.1, 0.5, 0.5, 0.5], np.float32), 0.5)
    assert tied.value > 0.5, "three tied impostors cannot be split"
    # Cosines of independent Gaussian rows have variance 1 / D.
    found = impostor_threshold(rows(3000, dim=64), 0.05, pairs=60_000)
    assert found.spread == pytest.approx(1 / 8, rel=0.02)
    assert found.value == pytest.approx(1.645 / 8, rel=0.05)
    assert found == impostor_threshold(rows(3000, dim=64), 0.05, pairs=60_000)
    labels = np.arange(3000) // 1500
    mixed = impostor_threshold(rows(3000, dim=64), 0.05, labels=labels, pairs=60_000)
    assert 0.45 < mixed.pairs / 60_000 < 0.55
    assert impostor_threshold(rows(50), 1e-3).pairs == 50 * 49 / 2, "fifty faces have no more pairs, however many drawn"
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            impostor_threshold(rows(10), bad)


@pytest.mark.parametrize("labelled", [False, True])
def test_pairs_are_those_that_all_pairs_hold(labelled: bool) -> None:
    T = rows(120)
    S = T + 0.5 * rows(120, seed=1)
    labels = np.random.default_rng(0).integers(-1, 30, 120) if labelled else None
    thresholds = Threshold(0.5, 0.1, 1000, 0.3), Threshold(0.6, 0.1, 1000, 0.2)
    found = disagreeing_pairs(S, T, *thresholds, neighborhoods(S, T, 119), labels=labels)
    expected = {}
    unit_s, unit_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (S.astype(float), T.astype(float)))
    for i in range(120):
        for j in range(i + 1, 120):
            s, t = unit_s[i] @ unit_s[j], unit_t[i] @ unit_t[j]
            if (s >= 0.5) == (t >= 0.6):
                continue
            if labels is not None and (min(labels[i], labels[j]) < 0 or (labels[i] == labels[j]) != bool(t >= 0.6)):
                continue
            expected[i, j] = abs(s - 0.5) / 0.3 + abs(t - 0.6) / 0.2
    pairs = list(zip(found.first.tolist(), found.second.tolist()))
    assert set(pairs) == set(expected)
    assert len(pairs) == len(expected) > (5 if labelled else 300)
    np.testing.assert_allclose(found.severity, [expected[pair] for pair in pairs], atol=1e-4)
    assert (np.diff(found.severity) <= 0).all()
    assert np.array_equal(found.missed, found.teacher >= 0.6)
    assert found.cut == 0
    assert disagreeing_pairs(S, T, *thresholds, neighborhoods(S, T, 3)).cut > 0
