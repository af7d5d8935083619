"""What mining costs: neighborhood disagreement and pair mining of many embeddings, against brute force in numpy.

``python scripts/bench/mine.py --faces 1000000 --dim 512`` draws clustered embeddings, mines them, and prints seconds,
peak memory, the recall of IVF and HNSW against Flat, and the ratio to all-to-all products in numpy, which are measured
on a subset and extrapolated with the square of the number of faces.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from faceless.randomness import Rng
from mining.disagreement import disagreeing_pairs, impostor_threshold, neighborhoods
from mining.embedding_index import EmbeddingIndex

CHUNK = 8192


def clustered(faces: int, dim: int, people: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings ``[faces, dim]`` of two networks that agree on most: people, their faces, and noise."""
    centers = Rng.of(0, "people", range(people)).normal(dim)
    teacher, student = np.empty((faces, dim), np.float32), np.empty((faces, dim), np.float32)
    for first in range(0, faces, CHUNK):
        rng = Rng.of(0, "faces", range(first, min(first + CHUNK, faces)))
        rows = centers[rng.integers(people, 1)[:, 0]] + 0.7 * rng.normal(dim)
        for out, noise in ((teacher, 0.0), (student, 0.4)):
            found = rows + noise * rng.child(f"student {noise}").normal(dim)
            out[first : first + len(rows)] = found / found.norm(dim=1, keepdim=True)
    return teacher, student


def brute_force(teacher: np.ndarray, student: np.ndarray, k: int) -> float:
    """Seconds for the nearest ``k`` of every row in both spaces by all-to-all products, a block at a time."""
    begin = time.perf_counter()
    for rows in (teacher, student):
        for first in range(0, len(rows), 1024):
            cosines = rows[first : first + 1024] @ rows.T
            np.argpartition(-cosines, k + 1, axis=1)[:, : k + 1]
    return time.perf_counter() - begin


def recall(index: EmbeddingIndex, rows: np.ndarray, exact: np.ndarray, asked: np.ndarray, k: int) -> float:
    found = index.search(rows[asked], k)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, exact)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--people", type=int, default=0, help="0: a tenth of the faces")
    parser.add_argument("--neighbors", type=int, default=10)
    parser.add_argument("--subset", type=int, default=20_000)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--hnsw", type=int, default=50_000, help="faces of the HNSW comparison, whose graph is slow")
    given = parser.parse_args()
    k = given.neighbors
    teacher, student = clustered(given.faces, given.dim, given.people or max(2, given.faces // 10))
    data = 2 * teacher.nbytes / 2**30
    slow = brute_force(teacher[: given.subset], student[: given.subset], k) * (given.faces / given.subset) ** 2
    results = {"faces": given.faces, "dim": given.dim, "data_gib": data, "numpy_seconds_extrapolated": slow}

    begin = time.perf_counter()
    kind = "ivf" if given.faces > given.subset else "auto"
    near = neighborhoods(student, teacher, k, kind=kind, recall=given.recall)
    results["neighborhood_seconds"] = time.perf_counter() - begin
    results["mean_overlap"] = float(near.overlap.mean())

    begin = time.perf_counter()
    thresholds = [impostor_threshold(rows, 1e-4, pairs=300_000) for rows in (student, teacher)]
    pairs = disagreeing_pairs(student, teacher, *thresholds, near)
    results["pairs_seconds"] = time.perf_counter() - begin
    results["ratio"] = slow / (results["neighborhood_seconds"] + results["pairs_seconds"])
    results["pairs"] = len(pairs)
    results["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    asked = np.arange(0, given.faces, max(1, given.faces // 500))
    exact = EmbeddingIndex.of(teacher, kind="flat").search(teacher[asked], k)[1]
    ivf = EmbeddingIndex.of(teacher, kind="ivf", recall=given.recall, k=k)
    results["ivf"] = {"recall": recall(ivf, teacher, exact, asked, k), "lists": ivf.index.nlist, "probes": ivf.effort}
    few = teacher[: given.hnsw]
    asked = np.arange(0, len(few), max(1, len(few) // 500))
    exact = EmbeddingIndex.of(few, kind="flat").search(few[asked], k)[1]
    begin = time.perf_counter()
    hnsw = EmbeddingIndex.of(few, kind="hnsw", recall=given.recall, k=k)
    results["hnsw"] = {
        "faces": len(few),
        "recall": recall(hnsw, few, exact, asked, k),
        "effort": hnsw.effort,
        "build_seconds": time.perf_counter() - begin,
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
