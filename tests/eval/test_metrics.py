"""Figures against scikit-learn, closed forms, and definitions written out by brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from eval import metrics

# Few distinct values, so that ties are the rule.
coarse = st.lists(st.integers(0, 6).map(lambda v: v / 4), min_size=1, max_size=25)
fine = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=25)
scores = st.one_of(coarse, fine)
rates = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0])


def normal_scores(genuine: int = 3000, impostor: int = 20000, separation: float = 2.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(separation, 1, genuine), rng.normal(0, 1, impostor)


def truth(genuine, impostor):
    return np.r_[np.ones(len(genuine)), np.zeros(len(impostor))], np.r_[genuine, impostor]


@given(scores, scores)
def test_curve_is_sklearns_without_dropped_points(genuine, impostor):
    points = metrics.curve(genuine, impostor)
    fpr, tpr, thresholds = roc_curve(*truth(genuine, impostor), drop_intermediate=False)
    np.testing.assert_array_equal(points.thresholds, thresholds)
    np.testing.assert_allclose(points.fmr, fpr, atol=1e-12)
    np.testing.assert_allclose(points.tar, tpr, atol=1e-12)


@given(scores, scores)
def test_auc_is_sklearns_and_the_share_of_won_comparisons(genuine, impostor):
    won = np.subtract.outer(np.array(genuine), np.array(impostor))
    by_hand = (won > 0).mean() + (won == 0).mean() / 2
    assert metrics.auc(genuine, impostor) == pytest.approx(by_hand, abs=1e-12)
    assert metrics.auc(genuine, impostor) == pytest.approx(roc_auc_score(*truth(genuine, impostor)), abs=1e-12)


@given(scores, scores, rates)
def test_tar_at_far_is_the_lowest_score_that_keeps_to_the_rate(genuine, impostor, far):
    genuine, impostor = np.array(genuine), np.array(impostor)
    k = int(np.floor(far * len(impostor) + 1e-9))
    allowed = [t for t in np.r_[genuine, impostor] if (impostor >= t).sum() <= k]
    point = metrics.tar_at_far(genuine, impostor, far)
    assert point.allowed == k
    if allowed:
        assert point.threshold == min(allowed)
        assert point.tar == pytest.approx((genuine >= min(allowed)).mean())
    else:
        assert point.threshold > max(impostor.max(), genuine.max())
        assert point.tar == 0
    assert point.false_matches == (impostor >= point.threshold).sum() <= k
    assert point.fmr == metrics.fmr(impostor, point.threshold) <= far + 1e-12
    assert point.fnmr == pytest.approx(metrics.fnmr(genuine, point.threshold))


@given(scores, scores, rates)
def test_tar_at_far_is_the_best_point_of_sklearns_roc_within_the_rate(genuine, impostor, far):
    fpr, tpr, _ = roc_curve(*truth(genuine, impostor), drop_intermediate=False)
    assert metrics.tar_at_far(genuine, impostor, far).tar == pytest.approx(tpr[fpr <= far + 1e-12].max())


@given(scores, scores)
def test_eer_follows_fvc2000(genuine, impostor):
    genuine, impostor = np.array(genuine), np.array(impostor)
    rates_at = [
        ((impostor >= t).mean(), (genuine < t).mean())
        for t in [*sorted({*genuine.tolist(), *impostor.tolist()}), np.inf]
    ]
    left = [pair for pair in rates_at if pair[1] <= pair[0]][-1]
    right = next(pair for pair in rates_at if pair[0] <= pair[1])
    expected = min(sum(left), sum(right)) / 2
    assert metrics.eer(genuine, impostor) == pytest.approx(expected, abs=1e-12)


def test_known_answers_by_hand():
    genuine, impostor = [0.9, 0.8, 0.7, 0.3], [0.75, 0.4, 0.2, 0.1]
    assert metrics.eer(genuine, impostor) == 0.25  # at 0.7 one of four on either side
    assert metrics.auc(genuine, impostor) == 13 / 16
    assert metrics.fmr(impostor, 0.4) == 0.5  # at the threshold is accepted
    assert metrics.fnmr(genuine, 0.7) == 0.25
    assert metrics.tar_at_far(genuine, impostor, 0.25).tar == 0.75
    assert metrics.tar_at_far(genuine, impostor, 0.24).tar == 0.5


def test_normal_scores_have_the_closed_form_figures():
    genuine, impostor = normal_scores(200_000, 400_000, separation=2.0)
    # Phi(-1), Phi(sqrt 2), Phi(2 - Phi^-1(0.99)) for two unit normals two apart.
    assert metrics.eer(genuine, impostor) == pytest.approx(0.158655, abs=2e-3)
    assert metrics.auc(genuine, impostor) == pytest.approx(0.921350, abs=2e-3)
    assert metrics.tar_at_far(genuine, impostor, 1e-2).tar == pytest.approx(0.372081, abs=6e-3)


@pytest.mark.parametrize(
    ("genuine", "impostor", "eer", "auc"),
    [([1.0], [0.0], 0.0, 1.0), ([0.0], [1.0], 1.0, 0.0), ([0.5] * 3, [0.5] * 7, 0.5, 0.5)],
    ids=["separated", "reversed", "constant"],
)
def test_degenerate_scores(genuine, impostor, eer, auc):
    assert metrics.eer(genuine, impostor) == eer
    assert metrics.auc(genuine, impostor) == auc


def test_a_tie_is_never_split():
    impostor = [0.9] * 3 + [0.1] * 97
    point = metrics.tar_at_far([0.95, 0.9, 0.5], impostor, 0.02)
    assert (point.allowed, point.false_matches, point.threshold) == (2, 0, 0.95)
    point = metrics.tar_at_far([0.95, 0.9, 0.5], impostor, 0.03)
    assert (point.allowed, point.false_matches, point.threshold) == (3, 3, 0.5)


def test_no_score_high_enough_gives_the_next_float():
    point = metrics.tar_at_far(np.float32([0.5]), np.float32([0.7]), 0.1)
    assert point.tar == 0
    assert point.threshold == float(np.nextafter(np.float32(0.7), np.float32(1)))


def test_rates_count_as_the_decimals_they_are_written_as():
    assert int(0.29 * 100) == 28  # what binary floating point makes of it
    assert metrics.allowed_errors(0.29, 100) == 29
    # IJB-C: 15,638,932 impostor pairs.
    assert [metrics.allowed_errors(far, 15_638_932) for far in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)] == [
        15,
        156,
        1563,
        15638,
        156389,
        1563893,
    ]
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.allowed_errors(1.5, 10)


@pytest.mark.parametrize(
    "figure", [metrics.eer, metrics.auc, metrics.curve, lambda g, i: metrics.tar_at_far(g, i, 0.1)]
)
@pytest.mark.parametrize("bad", [[], [np.nan, 0.5], [np.inf]])
def test_unusable_scores_are_errors(figure, bad):
    with pytest.raises(ValueError, match=r"no genuine scores|genuine scores are NaN or infinite"):
        figure(bad, [0.1, 0.2])
    with pytest.raises(ValueError, match=r"no impostor scores|impostor scores are NaN or infinite"):
        figure([0.1, 0.2], bad)


def insightface_by_its_definition(distances, same, folds=10):
    """Thresholds, folds and decisions one by one, with scikit-learn's folds as the official script uses them."""
    grid = np.arange(0, 4, 0.01)
    accuracies = []
    for train, test in KFold(folds, shuffle=False).split(distances):
        best = np.argmax([np.mean((distances[train] < t) == same[train]) for t in grid])
        accuracies.append(np.mean((distances[test] < grid[best]) == same[test]))
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize("pairs", [600, 637])
def test_insightface_accuracy_is_the_official_loop(pairs):
    rng = np.random.default_rng(pairs)
    same = rng.random(pairs) < 0.5
    # On the grid, so that "<" against "<=" matters.
    distances = np.round(np.clip(rng.normal(np.where(same, 1.1, 1.8), 0.3), 0, 4), 2)
    result = metrics.insightface_accuracy(distances, same)
    mean, std = insightface_by_its_definition(distances, same)
    assert result.mean == pytest.approx(mean, abs=1e-12)
    assert result.std == pytest.approx(std, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=4, max_size=30))
def test_accuracy_uses_a_threshold_that_is_best_on_the_other_folds(pairs):
    values, same = np.array([p[0] for p in pairs], dtype=float), np.array([p[1] for p in pairs])
    result = metrics.accuracy(values, same, folds=4)
    everything = [-np.inf, *(np.arange(9) - 0.5), np.inf]
    for (train, test), got, threshold in zip(KFold(4).split(values), result.folds, result.thresholds, strict=True):
        reached = [np.mean((values[train] >= t) == same[train]) for t in everything]
        assert np.mean((values[train] >= threshold) == same[train]) == pytest.approx(max(reached))
        assert got == pytest.approx(np.mean((values[test] >= threshold) == same[test]))
    assert result.mean == pytest.approx(np.mean(result.folds))


def test_folds_need_pairs_and_truth():
    with pytest.raises(ValueError, match="3 pairs cannot be split into 10 folds"):
        metrics.accuracy([0.1, 0.2, 0.3], [1, 0, 1])
    with pytest.raises(ValueError, match="as many booleans"):
        metrics.insightface_accuracy([0.1] * 20, [True] * 19)


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_ranks_are_positions_in_the_sorted_gallery(faces, seed):
    rng = np.random.default_rng(seed)
    identities = rng.integers(0, 4, faces)
    similarity = rng.integers(0, 4, (faces, faces)).astype(float)
    for probe, rank in enumerate(metrics.mate_ranks(similarity, identities)):
        gallery = [n for n in range(faces) if n != probe]
        # Strangers first among equals: a tie counts against.
        gallery.sort(key=lambda n: (-similarity[probe, n], identities[n] == identities[probe]))
        found = [identities[n] == identities[probe] for n in gallery]
        strangers_ahead = found.index(True) if any(found) else -1
        assert rank == strangers_ahead + 1


def test_rank_k_grows_with_k_and_leaves_lone_faces_out():
    similarity = np.array([[1, 0.2, 0.9, 0.1], [0.2, 1, 0.1, 0.0], [0.9, 0.1, 1, 0.3], [0.1, 0.0, 0.3, 1]])
    identities = ["a", "a", "b", "c"]  # b and c have one face each
    assert metrics.mate_ranks(similarity, identities).tolist() == [2, 1, 0, 0]
    assert metrics.rank_k(similarity, identities, 1) == 0.5
    assert metrics.rank_k(similarity, identities, 2) == 1.0
    with pytest.raises(ValueError, match="nobody has two faces"):
        metrics.rank_k(similarity, [0, 1, 2, 3])


def some_people(people: int, faces: int, seed: int, digits: int | None = None):
    rng = np.random.default_rng(seed)
    identities = np.repeat(np.arange(people), faces)
    first, second = np.triu_indices(len(identities), 1)
    same = identities[first] == identities[second]
    values = rng.normal(2.0 * same, 1.0)
    values = values if digits is None else np.round(values, digits)
    couples = np.stack([identities[first], identities[second]], 1)
    return values[same], values[~same], couples[same, 0], couples[~same]


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(0, 10_000), st.sampled_from([0, 1, None]))
def test_bootstrap_is_the_figures_of_the_repeated_scores(people, faces, seed, digits):
    genuine, impostor, genuine_people, impostor_people = some_people(people, faces, seed, digits)
    weights = metrics.resamples(people, 6, seed)
    fars = (0.3, 0.05, 0.0)
    result = metrics.bootstrap(genuine, impostor, genuine_people, impostor_people, weights, fars)
    for row, drawn in enumerate(weights):
        again = np.repeat(genuine, drawn[genuine_people])
        others = np.repeat(impostor, drawn[impostor_people].prod(1))
        if not len(others):
            assert np.isnan(result.eer[row])
            continue
        assert result.eer[row] == pytest.approx(metrics.eer(again, others), abs=1e-12)
        assert result.auc[row] == pytest.approx(metrics.auc(again, others), abs=1e-12)
        for column, far in enumerate(fars):
            assert result.tar[row, column] == pytest.approx(metrics.tar_at_far(again, others, far).tar, abs=1e-12)


def test_resamples_draw_as_many_people_and_depend_on_the_seed_alone():
    weights = metrics.resamples(40, 500, seed=3)
    assert (weights.sum(1) == 40).all()
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(1 - 1 / 40, abs=0.03)  # multinomial with 40 equal chances
    np.testing.assert_array_equal(weights[:10], metrics.resamples(40, 10, seed=3))
    assert (weights[:10] != metrics.resamples(40, 10, seed=4)).any()


def test_shares_are_resampled_some_replicates_at_a_time():
    rng = np.random.default_rng(2)
    trials = rng.integers(1, 9, 50)
    hits = rng.binomial(trials, 0.7)
    shares = [np.repeat(hits, drawn).sum() / np.repeat(trials, drawn).sum() for drawn in metrics.resamples(50, 1000)]
    expected = np.percentile(shares, [2.5, 97.5])
    for block in (70 * 50, 333 * 50, 1 << 24):
        np.testing.assert_allclose(metrics.share_interval(hits, trials, block=block), expected, atol=1e-12)
    assert metrics.share_interval([3], [4]) is None


def test_intervals_by_person_are_wider_than_pretending_that_pairs_are_independent():
    """Each person has an own level of similarity: 45 pairs of one person say little more than one."""
    rng = np.random.default_rng(1)
    genuine, impostor, genuine_people, impostor_people = some_people(30, 10, seed=1)
    genuine = genuine + rng.normal(0, 1.5, 30)[genuine_people]
    result = metrics.bootstrap(genuine, impostor, genuine_people, impostor_people, metrics.resamples(30, 1000), (0.1,))
    low, high = metrics.interval(result.tar[:, 0])
    tar = metrics.tar_at_far(genuine, impostor, 0.1).tar
    assert low < tar < high
    assert (high - low) / 2 > 3 * 1.96 * np.sqrt(tar * (1 - tar) / len(genuine))


def test_interval_of_a_mean_has_the_textbook_width():
    hits = np.random.default_rng(0).random(400) < 0.3
    shares = metrics.bootstrap_share(hits, np.arange(400), metrics.resamples(400, 4000))
    low, high = metrics.interval(shares)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 400), rel=0.07)


def test_replicates_without_pairs_are_left_out_of_the_interval():
    assert metrics.interval([np.nan, 0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no replicate"):
        metrics.interval([np.nan])


def test_a_thousand_replicates_of_the_att_pairs_take_seconds():
    genuine, impostor, genuine_people, impostor_people = some_people(40, 10, seed=0)
    assert (len(genuine), len(impostor)) == (1800, 78_000)
    start = time.process_time()
    metrics.bootstrap(genuine, impostor, genuine_people, impostor_people, metrics.resamples(40, 1000))
    assert time.process_time() - start < 10  # 0.7 s alone on one core


def test_small_counts_are_marked():
    assert metrics.caution(0, 3000) == "no error in 3000: the rate is below 0.001 at 95 % (rule of 3)"
    assert "fewer than 30" in metrics.caution(29, 10**6)
    assert metrics.caution(30, 10**6) is None
