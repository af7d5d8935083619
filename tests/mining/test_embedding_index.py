"""The index against brute force in numpy, its determinism, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceless.errors import InputError
from mining.embedding_index import EmbeddingIndex


def clustered(n: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    centers = numbers.standard_normal((clusters, dim))
    return (centers[numbers.integers(clusters, size=n)] + 0.5 * numbers.standard_normal((n, dim))).astype(np.float32)


def scores_by_hand(queries: np.ndarray, rows: np.ndarray, metric: str) -> np.ndarray:
    """All to all, in double precision; larger is nearer."""
    queries, rows = queries.astype(np.float64), rows.astype(np.float64)
    if metric == "cosine":
        return (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
            rows / np.linalg.norm(rows, axis=1, keepdims=True)
        ).T
    return -np.sqrt(((queries[:, None] - rows[None]) ** 2).sum(-1))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_search_finds_what_brute_force_finds(metric: str, kind: str) -> None:
    rows = clustered(2000)
    queries = rows[::40] + np.random.default_rng(1).normal(0, 0.2, (50, 16)).astype(np.float32)
    index = EmbeddingIndex.of(rows, metric=metric, kind=kind, recall=1.0)
    assert (index.kind, index.metric, len(index)) == (kind, metric, 2000)
    scores, ids = index.search(queries, 10)
    expected = scores_by_hand(queries, rows, metric)
    best = np.argsort(-expected, axis=1)[:, :10]
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), best.tolist())])
    assert found == 1.0 if kind == "flat" else found > 0.95
    sign = 1 if metric == "cosine" else -1
    np.testing.assert_allclose(sign * scores, np.take_along_axis(expected, ids, 1), atol=2e-5)
    assert (np.diff(sign * scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), radius=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_range_search_returns_exactly_what_lies_within(metric: str, n: int, radius: float, seed: int) -> None:
    rows = clustered(n, dim=3, clusters=3, seed=seed)
    index = EmbeddingIndex.of(rows, metric=metric, kind="flat")
    limits, scores, ids = index.within(rows, radius)
    expected = scores_by_hand(rows, rows, metric)
    bound = radius if metric == "cosine" else -radius
    for query in range(n):
        part = slice(limits[query], limits[query + 1])
        must = set(np.flatnonzero(expected[query] > bound + 1e-4))
        may = set(np.flatnonzero(expected[query] >= bound - 1e-4))
        assert must <= set(ids[part]) <= may
        assert (np.diff(scores[part]) <= 0).all() if metric == "cosine" else (np.diff(scores[part]) >= 0).all()
    first, second, _ = index.pairs(rows, radius)
    assert (first < second).all()
    assert len(first) == (np.count_nonzero(np.repeat(np.arange(n), np.diff(limits)) < ids))


def test_the_radius_itself_is_within() -> None:
    rows = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    index = EmbeddingIndex.of(rows, kind="flat")
    assert index.within(rows[:1], 0.6)[2].tolist() == [0, 2]
    far = EmbeddingIndex.of(np.array([[0, 0], [3, 4]], np.float32), metric="l2", kind="flat")
    assert far.within(np.zeros((1, 2), np.float32), 5.0)[2].tolist() == [0, 1]


def test_a_row_is_not_its_own_neighbor_and_equal_rows_come_by_number() -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    index = EmbeddingIndex.of(rows, kind="flat")
    scores, ids = index.neighbors(rows, 2)
    assert ids.tolist() == [[1, 3], [0, 3], [0, 1], [0, 1]]
    assert index.search(rows[2:3], 4)[1].tolist() == [[2, 0, 1, 3]]
    assert scores[2].tolist() == [0, 0]
    few, where = EmbeddingIndex.of(rows[:1], kind="flat").search(rows[:1], 3)
    assert where.tolist() == [[0, -1, -1]]
    assert few[0, 1] == -np.inf


def test_neighbors_of_all_rows_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are looked up list by list, in chunks; what comes back is in the order of the rows."""
    monkeypatch.setattr("mining.embedding_index.CHUNK", 300)
    rows = clustered(1500)
    index = EmbeddingIndex.of(rows, kind="ivf", recall=0.9)
    order = index._by_list()
    assert sorted(order.tolist()) == list(range(1500)) and (np.diff(order) < 0).any()
    lists = index.index.quantizer.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), 1)[1][order, 0]
    assert np.count_nonzero(np.diff(lists)) < index.index.nlist, "rows of a list are together"
    scores, ids = index.neighbors(rows, 5)
    for first in (0, 700, 1499):
        one = index.neighbors(rows[first : first + 1], 5, first)
        assert np.array_equal(ids[first], one[1][0]) and np.allclose(scores[first], one[0][0], atol=1e-6)
    assert not (ids == np.arange(1500)[:, None]).any()


def test_batches_make_the_same_index_as_one_call() -> None:
    rows = clustered(500)
    whole, parts = EmbeddingIndex(16, kind="hnsw"), EmbeddingIndex(16, kind="hnsw")
    whole.add(rows)
    for part in np.split(rows, [13, 200]):
        parts.add(part)
    for a, b in zip(whole.search(rows, 5), parts.search(rows, 5)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_same_rows_same_answers_also_from_a_file(kind: str, tmp_path: Path) -> None:
    rows = clustered(1500)
    index, again = (EmbeddingIndex.of(rows, kind=kind) for _ in range(2))
    index.save(tmp_path / "index")
    again.save(tmp_path / "again")
    assert (tmp_path / "index").read_bytes() == (tmp_path / "again").read_bytes()
    expected = index.search(rows[:99], 7)
    for memory_map in (False, True):
        loaded = EmbeddingIndex.load(tmp_path / "index", memory_map=memory_map)
        assert (loaded.kind, loaded.metric, loaded.effort) == (kind, "cosine", index.effort)
        for a, b in zip(loaded.search(rows[:99], 7), expected):
            assert np.array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tuning_reaches_the_recall_that_it_reports() -> None:
    rows = clustered(4000, clusters=400)
    index = EmbeddingIndex.of(rows, kind="ivf", recall=0.0)
    assert index.effort == 1
    queries = clustered(200, clusters=400, seed=0)
    best = np.argsort(-scores_by_hand(queries, rows, "cosine"), axis=1)[:, :10]

    def recall() -> float:
        found = index.search(queries, 10)[1]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist())]))

    before = recall()
    reported = index.tune(queries, 0.97)
    assert before < 0.9 < 0.97 <= reported
    assert abs(recall() - reported) < 0.005
    effort = index.effort
    assert index.tune(queries, 0.97, among=rows) == reported and index.effort == effort
    index.effort = effort - max(1, effort // 8) - 1
    assert recall() < 0.97, "an effort much smaller would not do"


def test_size_chooses_the_kind() -> None:
    assert EmbeddingIndex(4, size=100_000).kind == "flat"
    big = EmbeddingIndex(4, size=1_000_000)
    assert big.kind == "ivf"
    assert big.index.nlist == 2000


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kind is 'tree'; use"):
        EmbeddingIndex(4, kind="tree")
    with pytest.raises(InputError, match="metric is 'dot'; use"):
        EmbeddingIndex(4, metric="dot")
    with pytest.raises(RuntimeError, match="train"):
        EmbeddingIndex(4, kind="ivf", size=1000).add(np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="rows of 4 numbers"):
        EmbeddingIndex(4).add(np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        EmbeddingIndex(2).add(np.array([[0, np.nan]], np.float32))
    with pytest.raises(InputError, match="no such index"):
        EmbeddingIndex.load(tmp_path / "none")
    with pytest.raises(InputError, match="an ivf index needs size"):
        EmbeddingIndex(4, kind="ivf")
    with pytest.raises(ValueError, match="radius is -5; distances are not negative"):
        EmbeddingIndex.of(clustered(50), metric="l2").within(clustered(50), -5)
    index = EmbeddingIndex.of(clustered(50), kind="flat")
    index.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:500])
    with pytest.raises(InputError, match="build it again"):
        EmbeddingIndex.load(tmp_path / "cut")


@pytest.mark.parametrize("effort", [1, 3, 1000])
@pytest.mark.parametrize("together", [7, 400, 10_000])
def test_all_rows_at_once_find_what_faiss_finds_for_each(
    monkeypatch: pytest.MonkeyPatch, effort: int, together: int
) -> None:
    """Most rows lie in one list, some lists are empty, and what is in memory at a time is bounded."""
    monkeypatch.setattr("mining.embedding_index.CHUNK", together)
    monkeypatch.setattr("mining.embedding_index.TOGETHER", together)
    monkeypatch.setattr("mining.embedding_index.PRODUCTS", 900)
    heap = 5 + 0.1 * np.random.default_rng(1).standard_normal((900, 16), np.float32)
    rows = np.concatenate((clustered(600), heap))
    index = EmbeddingIndex(16, kind="ivf", size=len(rows))
    index.train(rows[::2])
    index.add(rows[:1450])  # fewer than it was made for
    index.effort = effort
    rows = rows[:1450]
    if index.effort < index.index.nlist:
        # Rows as near to one list more may be looked for in either, as the last bits of a product fall.
        nearest = index.index.quantizer.search(index._ready(rows), index.effort + 1)[0]
        clear = nearest[:, -2] - nearest[:, -1] > 1e-6
        assert clear.sum() > 1300
        rows = rows[clear]
    scores, ids = index._search_together(rows, 9)
    expected, by_faiss = index.search(rows, 9)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    far = (np.diff(expected, axis=1) < -1e-5).all(1) & np.isfinite(expected).all(1)  # of equals either comes first
    assert far.sum() > 100
    # What comes last may have an equal that is not shown.
    assert np.array_equal(ids[far, :-1], by_faiss[far, :-1])
    assert np.array_equal(ids < 0, by_faiss < 0)
    if effort == 1000:
        flat = EmbeddingIndex.of(rows, kind="flat").neighbors(rows, 8)
        np.testing.assert_allclose(index.neighbors(rows, 8)[0], flat[0], atol=2e-6)


def test_rows_far_from_all_others_have_neighbors_too() -> None:
    """A row in a small list of its own finds nobody there; the search then goes on."""
    rows = np.concatenate((clustered(1500, clusters=3), 9 * np.eye(16, dtype=np.float32), -9 * np.eye(16)[:4]))
    index = EmbeddingIndex.of(rows.astype(np.float32), kind="ivf", recall=0.0)
    effort = index.effort
    assert effort == 1 and (index.search(rows, 61)[1] < 0).any()
    scores, ids = index.neighbors(rows, 60)
    assert (ids >= 0).all() and np.isfinite(scores).all()
    assert all(len(set(found) - {row}) == 60 for row, found in enumerate(ids.tolist()))
    assert index.effort == effort


@pytest.mark.parametrize("kind", ["auto", "flat", "ivf", "hnsw"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_rows(kind: str, count: int) -> None:
    rows = clustered(50)[:count]
    index = EmbeddingIndex.of(rows, kind=kind)
    scores, ids = index.neighbors(rows, 5)
    assert scores.shape == ids.shape == (count, max(0, count - 1))
    assert ids.ravel().tolist() == ([1, 0] if count == 2 else [])


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    rows = clustered(5000)
    there = EmbeddingIndex.of(rows, kind="flat")
    if there._searcher(10) is there.index:
        pytest.skip("this FAISS has no GPU")
    here = EmbeddingIndex.of(rows, kind="flat", gpu=False)
    np.testing.assert_allclose(there.search(rows, 5)[0], here.search(rows, 5)[0], atol=1e-5)
