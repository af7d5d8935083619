"""Seconds and memory of 1:1 verification on the scale of IJB-C against the customary scripts, in one run.

    python scripts/bench/eval.py [--templates 23124] [--pairs 15658489] [--dim 512] [--threads 2] [--quick]

Templates and pairs are simulated with the counts of IJB-C: 3,531 first and 19,593 second templates, 19,557 genuine
pairs. The customary route gathers both sides of blocks of 100,000 pairs in float64, draws the ROC with scikit-learn and
looks for the nearest false positive rate in a list. Both results are compared before any time is printed. The ROC and
its area are timed against scikit-learn's ``roc_curve`` and ``roc_auc_score`` on these scores; accuracy over ten folds
of 6,000 pairs, as LFW has them, against InsightFace's ``evaluate``, if ``FACELESS_OFFICIAL`` names a folder with its
code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import metrics
from eval.benchmarks import ijb
from eval.benchmarks.pairs import Pairs
from eval.benchmarks.protocol import unit
from faceless.errors import command

SECONDS, GIB, RATIO = 6.0, 4.0, 8.0
VERIFICATION = "deepinsight/insightface/recognition/arcface_torch/eval/verification.py"


def simulate(templates: int, pairs: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors, first and second rows of the pairs, and which are genuine."""
    rng = np.random.default_rng(0)
    first = max(2, round(templates * 3531 / 23124))
    second = templates - first
    genuine = max(1, round(pairs * 19557 / 15_658_489))
    people = np.concatenate([np.arange(first), np.arange(second) % first])
    rows = rng.normal(size=(first, dim))[people] + 1.6 * rng.normal(size=(templates, dim))
    mates = rng.choice(second, genuine, replace=genuine > second)
    left = np.concatenate([people[first + mates], rng.integers(0, first, pairs - genuine)])
    right = np.concatenate([first + mates, first + rng.integers(0, second, pairs - genuine)])
    order = rng.permutation(pairs)
    left, right = left[order].astype(np.int32), right[order].astype(np.int32)
    return unit(rows), left, right, people[left] == people[right]


def customary(vectors: np.ndarray, left: np.ndarray, right: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, list]:
    """Scores, and the nearest points of scikit-learn's curve, found as the scripts find them."""
    scores = np.zeros(len(left))
    for start in range(0, len(left), 100_000):
        part = slice(start, start + 100_000)
        scores[part] = np.sum(vectors[left[part]] * vectors[right[part]], -1)
    fpr, tpr, _ = roc_curve(same, scores)
    fpr, tpr = fpr[::-1], tpr[::-1]
    points = []
    for far in ijb.FARS.values():
        _, index = min(list(zip(abs(fpr - far), range(len(fpr)))))
        points.append((fpr[index], tpr[index]))
    return scores, points


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def compare_curves(genuine: np.ndarray, impostor: np.ndarray) -> None:
    """The whole ROC and its area, against scikit-learn."""
    label = np.repeat([1, 0], [len(genuine), len(impostor)])
    scores = np.concatenate([genuine, impostor])
    ours, seconds = timed(lambda: metrics.curve(genuine, impostor))
    (fpr, tpr, _), theirs = timed(lambda: roc_curve(label, scores, drop_intermediate=False))
    same = np.array_equal(ours.fmr, fpr) and np.allclose(ours.tar, tpr, rtol=0, atol=1e-15)
    print(f"ROC: {'equal' if same else 'DIFFERENT'}, {theirs / seconds:.1f} times as fast as roc_curve")
    area, seconds = timed(lambda: metrics.auc(genuine, impostor))
    other, theirs = timed(lambda: roc_auc_score(label, scores))
    print(f"AUC: differs by {abs(area - other):.0e}, {theirs / seconds:.1f} times as fast as roc_auc_score")


def compare_folds(pairs: int, dim: int) -> None:
    """InsightFace's evaluate without its VAL, which SciPy refuses, on simulated pairs."""
    file = Path(os.environ.get("FACELESS_OFFICIAL", ""), VERIFICATION)
    if not file.is_file():
        print("accuracy over folds: set FACELESS_OFFICIAL for a comparison")
        return
    mxnet = sys.modules["mxnet"] = ModuleType("mxnet")
    mxnet.ndarray = sys.modules["mxnet.ndarray"] = ModuleType("mxnet.ndarray")
    spec = importlib.util.spec_from_file_location("verification", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calculate_val = lambda *args, **options: (0.0, 0.0, 0.0)
    rng = np.random.default_rng(1)
    same = np.arange(pairs) // (pairs // 20) % 2 == 0
    rows = rng.normal(size=(2 * pairs, dim))
    rows[1::2][same] = rows[0::2][same] + 1.5 * rng.normal(size=(int(same.sum()), dim))
    rows = rows.astype(np.float32)
    (_, _, accuracy, *_), theirs = timed(lambda: module.evaluate(normalize(rows.astype(np.float64)), same))
    listed = Pairs("simulated", [b""] * len(rows), same, 112, "0")
    ours, seconds = timed(lambda: listed.scores(rows).figures()["accuracy"])
    equal = "equal" if ours["folds"] == accuracy.tolist() else "DIFFERENT"
    print(f"accuracy over folds: {equal}, all figures of ours {theirs / seconds:.1f} times as fast as its accuracy")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=23_124)
    parser.add_argument("--pairs", type=int, default=15_658_489)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a hundredth of the pairs, to see that it works")
    settings = parser.parse_args()
    if settings.quick:
        settings.templates, settings.pairs = settings.templates // 10, settings.pairs // 100
    torch.set_num_threads(settings.threads)
    vectors, left, right, same = simulate(settings.templates, settings.pairs, settings.dim)

    start, busy = time.perf_counter(), time.process_time()
    points, scores = ijb.operating_points(vectors, left, right, same, ijb.FARS)
    ours, ours_busy = time.perf_counter() - start, time.process_time() - busy
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, busy = time.perf_counter(), time.process_time()
    exact, nearest = customary(vectors, left, right, same)
    theirs, theirs_busy = time.perf_counter() - start, time.process_time() - busy

    print(f"{len(vectors):,} templates, {len(left):,} pairs, {int(same.sum()):,} genuine, {settings.dim} dimensions")
    print(f"largest difference of a score: {float(np.abs(scores - exact).max()):.1e}")
    print(f"{'FAR':>6}{'TAR ours':>12}{'FMR ours':>14}{'TAR nearest':>14}{'FMR nearest':>14}")
    for (key, point), (fpr, tpr) in zip(points.items(), nearest):
        print(f"{key:>6}{point.tar:12.6f}{point.fmr:14.3e}{tpr:14.6f}{fpr:14.3e}")
    print(f"ours {ours:.1f} s ({ours_busy:.1f} s of processor time), {gib:.2f} GiB with the vectors and pairs")
    print(f"customary {theirs:.1f} s ({theirs_busy:.1f} s of processor time)")
    ratio = theirs / ours
    met = ours < SECONDS and gib < GIB and ratio >= RATIO
    print(
        f"{ratio:.1f} times as fast ({theirs_busy / ours_busy:.1f} in processor time); the aim is {RATIO:g} times, "
        f"{SECONDS:g} s and {GIB:g} GiB on 2 cores: {'reached' if met else 'missed'}"
    )
    compare_curves(scores[same], scores[~same])
    compare_folds(6000 if not settings.quick else 600, settings.dim)


if __name__ == "__main__":
    main()
