"""Clusters against scikit-learn and plain loops; the command against known identities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceless.errors import InputError
from mining.disagreement import impostor_threshold
from mining.faces import Faces, unit
from mining.identities import cluster, criterion, distinct, main, purity, refine, remaining
from tests.mining.tiny_corpus import network, pictures, write


def people(count: int, faces: int, spread: float, seed: int = 0, dim: int = 32) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    centers = unit(numbers.standard_normal((count, dim)).astype(np.float32))
    truth = np.repeat(np.arange(count), faces)
    return unit(centers[truth] + spread * numbers.standard_normal((len(truth), dim)).astype(np.float32)), truth


def test_separate_people_are_found_again() -> None:
    rows, truth = people(5, 30, 0.05)
    centers, labels = cluster(rows, 5, restarts=10)
    assert purity(labels, truth) == 1.0
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    again = cluster(rows, 5, restarts=10)
    assert np.array_equal(again[0], centers) and np.array_equal(again[1], labels)
    with pytest.raises(InputError, match="use fewer"):
        cluster(rows[:5], 6)


def test_purity_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics.cluster")
    numbers = np.random.default_rng(0)
    labels, truth = numbers.integers(0, 6, 200), numbers.integers(0, 9, 200)
    table = metrics.contingency_matrix(truth, labels)
    assert purity(labels, truth) == pytest.approx(table.max(0).sum() / table.sum())
    with pytest.raises(ValueError, match="no face has both"):
        purity(labels, np.full(200, -1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=60))
def test_rounds_drop_what_one_by_one_drops(count: int, ties: list[tuple[int, int]]) -> None:
    ties = [(a % count, b % count) for a, b in ties if a % count != b % count]
    stays: list[bool] = []
    for number in range(count):
        stays.append(not any(stays[min(tie)] for tie in ties if max(tie) == number))
    later = np.array([max(tie) for tie in ties], np.int64)
    earlier = np.array([min(tie) for tie in ties], np.int64)
    assert remaining(count, later, earlier).tolist() == stays


@pytest.mark.parametrize("count, faces", [(60, 20), (60, 6), (200, 5)])
def test_the_criterion_prefers_the_true_number(count: int, faces: int) -> None:
    """Half as many clusters hold two people each, and look as tight from their centers; twice as many cut people."""
    rows, truth = people(count, faces, 0.06, dim=128)
    threshold = impostor_threshold(rows, 1e-3, labels=truth)
    assert distinct(rows, threshold.value) == pytest.approx(count, rel=0.02)
    value = {}
    for factor in (0.5, 0.7, 1.0, 1.4, 2.0):
        inside, between = criterion(rows, *cluster(rows, round(factor * count), rounds=10), threshold)
        value[factor] = inside - between
    assert max(value, key=lambda factor: value[factor]) == 1.0
    assert criterion(rows, unit(np.eye(count, 128, dtype=np.float32)), truth, threshold) == (1.0, 0.0)
    assert criterion(rows, rows, np.arange(len(rows)), threshold)[0] == 0, "who is alone accepts nobody"


def test_unrelated_faces_hardly_get_identities() -> None:
    """The mean of a few unrelated faces is near to each of them, since they make it."""
    rows, _ = people(400, 1, 0.0, dim=128)
    threshold = impostor_threshold(rows, 1e-3)
    centers, labels = cluster(rows, 100)
    own = np.einsum("nd,nd->n", rows, centers[labels])
    assert (own >= threshold.value).mean() > 0.7
    assert (refine(rows, centers, labels, threshold.value)[0] >= 0).mean() < 0.15


def test_refinement_drops_strays_and_keeps_the_rest() -> None:
    rows, truth = people(10, 12, 0.05)
    strays = unit(np.random.default_rng(5).standard_normal((8, 32)).astype(np.float32))
    halfway = unit(rows[:1] + rows[12:13])
    everybody = np.concatenate((rows, strays, halfway))
    centers, labels = cluster(everybody, 12, restarts=10)
    found, cosines, lead = refine(everybody, centers, labels, 0.5, neighbors=5, margin=0.15)
    assert purity(found, np.concatenate((truth, np.full(9, -1)))) == 1.0
    assert (found[: len(rows)] >= 0).mean() > 0.95
    assert (found[len(rows) :] == -1).all()
    assert sorted(set(found[found >= 0].tolist())) == list(range(found.max() + 1)), "consecutive"
    assert lead[-1] < 0.15
    assert cosines[-1] > 0.5


def test_the_command_leaves_labels_that_a_source_can_read(tmp_path: Path) -> None:
    truth = np.arange(160) % 8
    corpus = write(tmp_path / "corpus", pictures(truth), identity=truth)
    out = tmp_path / "out"
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "net", 0), "--output", str(out)]
    main([*given, "--clusters", "8", "--far", "0.1", "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    labels = np.load(out / "identities.npy", allow_pickle=False)
    found = json.loads((out / "identities.json").read_text())
    assert labels.dtype == np.int64 and labels.shape == (160,)
    assert labels.max() + 1 == found["identities"]
    assert found["labeled"] == (labels >= 0).sum() > 80
    assert found["purity"]["identities"] == pytest.approx(purity(labels, truth))
    assert purity(labels, truth) > 0.8
    assert found["fingerprint"] == Faces(corpus).fingerprint


def test_pairs_of_one_person_do_not_raise_the_bar(tmp_path: Path) -> None:
    """Of 8 people every eighth random pair is one person: at a rate below that, none but copies would be one."""
    truth = np.arange(160) % 8
    corpus = write(tmp_path / "corpus", pictures(truth), identity=truth)
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "net", 0), "--cache", str(tmp_path / "cache")]
    main([*given, "--far", "0.001", "--device", "cpu", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "identities.json").read_text())
    assert found["labeled"] > 120 and found["identities"] <= 16
    write(tmp_path / "corpus", pictures(truth), identity=np.zeros(160, np.int64))
    with pytest.raises(InputError, match="all faces have one identity"):
        main([*given, "--device", "cpu"])
    with pytest.raises(InputError, match="seed is -1; it must be within 0"):
        main([*given, "--seed", "-1"])


def test_where_nothing_is_dense_nobody_has_a_label(tmp_path: Path) -> None:
    """As many clusters as faces: none of them has a core."""
    rows, _ = people(20, 1, 0.0)
    found, cosines, lead = refine(rows, rows, np.arange(20), 0.5)
    assert (found == -1).all() and np.isfinite(cosines).all() and np.isfinite(lead).all()
    corpus = write(tmp_path / "corpus", pictures(np.arange(20)))
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "net", 0), "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="no cluster is left after refinement"):
        main([*given, "--clusters", "20", "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    with pytest.raises(InputError, match=r"far is 0.0; .*between 0 and 1"):
        main([*given, "--far", "0"])


def test_identities_that_nobody_knows_leave_purity_out(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(40) % 4), identity=np.full(40, -1))
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "net", 0), "--output", str(tmp_path / "out")]
    main([*given, "--clusters", "4", "--far", "0.2", "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert "purity" not in json.loads((tmp_path / "out" / "identities.json").read_text())
