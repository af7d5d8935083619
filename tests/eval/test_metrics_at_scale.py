"""Figures of very many scores against the plain ones, and figures of lists of pairs against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from sklearn.model_selection import KFold

from eval import metrics

FARS = (0.0, 0.05, 0.1, 0.3, 0.7, 1.0)
# Few distinct values, so that ties are the rule; and any value that a cosine may take.
coarse = st.lists(st.integers(-3, 3).map(lambda v: v / 4), min_size=1, max_size=30)
fine = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30)
scores = st.one_of(coarse, fine).map(np.float32)


def pieces(values: np.ndarray, size: int = 7):
    return lambda: (values[start : start + size] for start in range(0, len(values), size))


@given(scores, scores)
def test_several_rates_at_once_are_each_rate_alone(genuine, impostor):
    together = metrics.tar_at_fars(genuine, impostor, FARS)
    assert together == [metrics.tar_at_far(genuine, impostor, far) for far in FARS]


@given(scores, scores)
@example(np.float32([0.5]), np.float32([0.7]))
@example(np.float32([-0.0, 0.0]), np.float32([0.0, -0.0]))
def test_streamed_figures_are_those_of_scores_in_memory(genuine, impostor):
    found = metrics.streamed(genuine, pieces(impostor), FARS)
    assert found.points == [metrics.tar_at_far(genuine, impostor, far) for far in FARS]
    assert found.eer == pytest.approx(metrics.eer(genuine, impostor), abs=1e-12)
    assert found.auc == pytest.approx(metrics.auc(genuine, impostor), abs=1e-12)
    assert (found.genuine, found.impostor) == (len(genuine), len(impostor))


def test_streamed_figures_of_half_a_million_scores():
    rng = np.random.default_rng(0)
    genuine = rng.normal(0.5, 0.15, 3_000).astype(np.float32)
    impostor = rng.normal(0.0, 0.12, 500_000).astype(np.float32)
    fars = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    found = metrics.streamed(genuine, pieces(impostor, 77_777), fars)
    assert found.points == [metrics.tar_at_far(genuine, impostor, far) for far in fars]
    assert found.eer == pytest.approx(metrics.eer(genuine, impostor), abs=1e-15)
    assert found.auc == pytest.approx(metrics.auc(genuine, impostor), abs=1e-15)


def test_streams_that_cannot_be_trusted():
    genuine = np.float32([0.5])
    passes = iter([[np.float32([0.1, 0.2])], [np.float32([0.3, 0.2])]])
    with pytest.raises(ValueError, match="second pass"):
        metrics.streamed(genuine, lambda: next(passes), [0.1])
    with pytest.raises(ValueError, match="no impostor"):
        metrics.streamed(genuine, lambda: [np.float32([])], [0.1])
    with pytest.raises(ValueError, match="float64"):
        metrics.streamed(genuine, lambda: [np.array([0.1])], [0.1])
    with pytest.raises(ValueError, match="1 of 2 impostor scores are NaN"):
        metrics.streamed(genuine, lambda: [np.float32([np.nan, 0])], [0.1])


@settings(max_examples=12)
@given(scores, scores)
def test_sweep_is_sklearns(genuine, impostor):
    sweep = metrics.threshold_sweep(genuine, impostor)
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    for column, threshold in enumerate(sweep.thresholds):
        accepted = np.r_[genuine, impostor].astype(np.float64) >= threshold
        assert sweep.accuracy[column] == pytest.approx(accuracy_score(truth, accepted))
        assert sweep.recall[column] == pytest.approx(recall_score(truth, accepted))
        assert sweep.f1[column] == pytest.approx(f1_score(truth, accepted, zero_division=0))
        expected = precision_score(truth, accepted, zero_division=np.nan)
        assert sweep.precision[column] == pytest.approx(expected, nan_ok=True)


def test_sweep_summary_leaves_undefined_precision_out():
    summary = metrics.threshold_sweep([0.42], [0.1]).summary()
    assert summary["thresholds"] == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    assert summary["precision"]["values"] == [1.0, 1.0, 1.0, None, None, None, None, None, None]
    assert (summary["precision"]["best"], summary["precision"]["mean"]) == (1.0, 1.0)
    assert summary["recall"]["mean"] == pytest.approx(3 / 9)
    assert metrics.threshold_sweep([0.1], [0.1]).summary()["precision"]["best"] is None


def test_sweep_of_the_published_share_of_genuine_pairs():
    """AFL-KD, table 2, all rows at full precision: accuracy = 1 - 0.184 (1 - recall)."""
    sweep = metrics.threshold_sweep([0.9] * 142 + [0.5] * 42, [0.1] * 816, [0.7])
    assert sweep.accuracy[0] == pytest.approx(1 - 0.184 * (1 - sweep.recall[0]))


@pytest.mark.parametrize(("events", "trials"), [(0, 10), (3, 100), (50, 50), (1, 3000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(events, trials, level):
    expected = binomtest(events, trials).proportion_ci(level, method="wilson")
    assert metrics.wilson(events, trials, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("far", [1e-3, 0.1, 0.3])
def test_val_takes_the_largest_threshold_that_keeps_to_the_rate(seed, far):
    rng = np.random.default_rng(seed)
    same = np.tile([True, False, False], 20)
    distances = np.round(np.clip(rng.normal(np.where(same, 1.0, 1.6), 0.3), 0, 3.9), 2)
    result = metrics.insightface_val(distances, same, far, folds=4)
    grid = np.arange(0, 4, 0.001)
    rates, fars = [], []
    for (train, test), threshold in zip(KFold(4).split(distances), result.thresholds, strict=True):
        reached = (distances[train][~same[train]] < grid[:, None]).mean(1)
        assert threshold == grid[np.flatnonzero(reached <= far)[-1]]
        rates.append(np.mean(distances[test][same[test]] < threshold))
        fars.append(np.mean(distances[test][~same[test]] < threshold))
    assert result.mean == pytest.approx(np.mean(rates))
    assert result.std == pytest.approx(np.std(rates))
    assert result.far == pytest.approx(np.mean(fars))


def test_val_needs_both_kinds_in_every_fold():
    with pytest.raises(ValueError, match="pairs 0 to 1 are all of one kind"):
        metrics.insightface_val([0.1] * 4, [True, True, False, False], folds=2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([1, 20, 1000]))
def test_search_by_brute_force(probes, faces, seed, block):
    rng = np.random.default_rng(seed)
    P, G = rng.integers(-1, 2, (probes, 3)).astype(float), rng.integers(-1, 2, (faces, 3)).astype(float)
    who, known = rng.integers(0, 4, probes), rng.integers(0, 4, faces)
    found = metrics.search(P, who, G, known, block=block)
    for row in range(probes):
        mates = [float(P[row] @ g) for g, person in zip(G, known) if person == who[row]]
        others = [float(P[row] @ g) for g, person in zip(G, known) if person != who[row]]
        assert found.mate[row] == max(mates, default=-np.inf)
        assert found.stranger[row] == max(others, default=-np.inf)
        assert found.ranks[row] == (1 + sum(score >= max(mates) for score in others) if mates else 0)


def test_open_set_search_by_hand():
    # Four mated probes, and three strangers to the gallery whose best scores are .6, .5, .4.
    found = metrics.Search(
        np.array([1, 1, 2, 1, 0, 0, 0]),
        np.float32([0.9, 0.55, 0.7, 0.3, -np.inf, -np.inf, -np.inf]),
        np.float32([0.2, 0.1, 0.8, 0.1, 0.6, 0.5, 0.4]),
    )
    assert (found.rank_k(1), found.rank_k(2)) == (0.75, 1.0)
    point = found.fnir_at_fpir(0.34)  # one of three may pass
    assert (point.allowed, point.false_matches) == (1, 1)
    assert point.threshold == np.float32(0.55)
    assert point.fnmr == 0.25
    assert found.fnir_at_fpir(0.0).fnmr == 0.5
    with pytest.raises(ValueError, match="with and without a mate"):
        metrics.Search(np.array([1]), np.float32([1]), np.float32([0])).fnir_at_fpir(0.1)
    with pytest.raises(ValueError, match="no probe has a mate"):
        metrics.Search(np.array([0]), np.float32([-np.inf]), np.float32([0])).rank_k()
