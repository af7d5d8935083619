"""The benchmark of mining, on few faces: it prints what the issue of a reader is, and finds what brute force finds."""

from __future__ import annotations

import numpy as np

from scripts.bench import mine


def test_mining_of_few_faces_is_measured() -> None:
    given = {"faces": 3000, "dim": 32, "people": 100, "subset": 600, "neighbors": 5}
    found = mine.main([text for key, value in given.items() for text in (f"--{key}", str(value))])
    for name in ("recall_teacher", "recall_student", "hnsw_recall"):
        assert 0.95 <= found[name] <= 1
    assert found["numpy_seconds_extrapolated"] == found["numpy_seconds_on_subset"] * 25
    assert found["peak_gib"] > found["data_gib"] == 2 * 3000 * 32 * 4 / 2**30
    assert found["pairs"] > 0 < found["ratio"]


def test_recall_counts_what_is_found() -> None:
    rows = np.eye(6, dtype=np.float32)[[0, 0, 0, 3, 4, 5]]
    asked = np.array([0, 1])
    assert mine.recall(np.array([[1, 2], [0, 2]]), rows, asked) == 1
    assert mine.recall(np.array([[1, 3], [0, 4]]), rows, asked) == 0.5
