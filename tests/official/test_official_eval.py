"""Figures against InsightFace's evaluation scripts on the same embeddings: random, clustered, with ties, degenerate."""

import ast
import heapq
import math
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sklearn.preprocessing
from sklearn.metrics import auc, roc_curve

from eval import metrics
from eval.benchmarks import ijb, pairs, protocol

pytestmark = pytest.mark.official

INSIGHTFACE = "deepinsight/insightface"
FARS = [10**-6, 10**-5, 10**-4, 10**-3, 10**-2, 10**-1]


@pytest.fixture
def verification(official):
    mxnet = ModuleType("mxnet")
    mxnet.ndarray = ModuleType("mxnet.ndarray")
    return official(INSIGHTFACE, "recognition/arcface_torch/eval/verification.py", {"mxnet": mxnet})


def script(path: str) -> tuple[ast.Module, str]:
    """A script that starts to work when it is imported, as a syntax tree."""
    file = Path(os.environ.get("FACELESS_OFFICIAL", "/nowhere"), INSIGHTFACE, path)
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return ast.parse(file.read_text("utf-8")), str(file)


def run(nodes: list[ast.stmt], file: str, names: dict) -> dict:
    exec(compile(ast.Module(nodes, []), file, "exec"), names)
    return names


def functions(path: str, *wanted: str, **names):
    tree, file = script(path)
    chosen = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    found = run(chosen, file, {"np": np, "sklearn": sklearn, **names})
    return [found[name] for name in wanted]


def embeddings(kind: str, count: int = 600, dim: int = 32, seed: int = 0):
    """``[2 count, D]`` rows, pair i being 2i and 2i+1, and which pairs are genuine, in blocks as in lfw.bin."""
    rng = np.random.default_rng(seed)
    same = np.arange(count) // (count // 20) % 2 == 0
    rows = rng.normal(size=(2 * count, dim))
    if kind in ("clustered", "ties"):
        rows[1::2][same] = rows[0::2][same] + 0.9 * rng.normal(size=(int(same.sum()), dim))
    if kind == "ties":  # a few directions only: most distances occur many times
        rows = np.sign(rows[:, :3]) @ rng.normal(size=(3, dim))
    if kind == "degenerate":
        rows[:] = rows[0]
    return rows.astype(np.float32), same


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random", "clustered", "ties", "degenerate"])
def test_fold_accuracy_to_the_digit(verification, kind, seed):
    rows, same = embeddings(kind, seed=seed)
    unit = sklearn.preprocessing.normalize(rows.astype(np.float64))
    _, _, accuracy = verification.calculate_roc(np.arange(0, 4, 0.01), unit[0::2], unit[1::2], same)
    listed = pairs.Pairs("x", [b""] * len(rows), same, 112, "0")
    ours = listed.scores(rows).figures()["accuracy"]
    assert ours["folds"] == accuracy.tolist()
    assert (ours["mean"], ours["std"]) == (accuracy.mean(), accuracy.std())


@pytest.mark.parametrize("kind", ["random", "clustered", "ties", "degenerate"])
def test_val_where_theirs_works_and_why_it_does_not(verification, kind, capsys):
    """Their curve holds most FARs more than once: SciPy refuses it. Without duplicates both take the same pairs."""
    rows, same = embeddings(kind)
    unit = sklearn.preprocessing.normalize(rows.astype(np.float64))
    distances = np.square(unit[0::2] - unit[1::2]).sum(1)
    ours = metrics.insightface_val(distances, same)
    grid = np.arange(0, 4, 0.001)
    crashed = None
    try:
        theirs = verification.calculate_val(grid, unit[0::2], unit[1::2], same, 1e-3)
    except ValueError as error:
        crashed = str(error)
    if kind == "degenerate":
        assert crashed or theirs[0] >= ours.mean
    else:
        assert crashed is None or "duplicate" in crashed
    # Whatever they interpolate, the thresholds they may choose among have our rates.
    for threshold in ours.thresholds[:3]:
        val, far = verification.calculate_val_far(threshold, distances, same)
        assert val == pytest.approx((distances[same] < threshold).mean())
        assert far == pytest.approx((distances[~same] < threshold).mean())
    with capsys.disabled():
        print(f"VAL@FAR=1e-3, {kind}: ours {ours.mean:.5f}, theirs {crashed or f'{theirs[0]:.5f}'}")


def synthetic_ijb(templates: int = 2000, dim: int = 64, seed: int = 0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, templates)
    people = np.arange(templates) % (templates // 4)
    centers = rng.normal(size=(templates // 4, dim))
    rows = np.repeat(centers[people], sizes, 0) + 2.2 * rng.normal(size=(sizes.sum(), dim))
    rows *= rng.uniform(5, 25, (len(rows), 1))
    numbers = np.repeat(np.arange(templates) * 3 + 1, sizes)
    media = rng.integers(0, 4, len(rows)) + 10 * numbers
    faceness = rng.uniform(0.3, 1, len(rows)).astype(np.float32)
    left, right = np.meshgrid(np.arange(0, templates // 2), np.arange(templates // 2, templates), indexing="ij")
    left, right = left.ravel(), right.ravel()
    order = rng.permutation(len(left))[:400_000]
    left, right = left[order], right[order]
    return rows.astype(np.float32), numbers, media, faceness, left, right, people[left] == people[right]


def tied(scores: np.ndarray, kind: str) -> np.ndarray:
    return {"as they are": scores, "ties": np.round(scores, 2), "constant": np.full_like(scores, 0.5)}[kind]


def their_table(label: np.ndarray, score: np.ndarray) -> list[str]:
    """The loop at the end of eval_ijbc.py, which draws the ROC and fills the table."""
    tree, file = script("recognition/arcface_torch/eval_ijbc.py")
    (loop,) = [n for n in tree.body if isinstance(n, ast.For) and n.target.id == "method"]
    rows: list[list[str]] = []
    names = {
        "np": np,
        "roc_curve": roc_curve,
        "auc": auc,
        "methods": ["m"],
        "scores": {"m": score},
        "label": label,
        "colours": {"m": 0},
        "x_labels": FARS,
        "target": "IJBC",
        "plt": SimpleNamespace(plot=lambda *args, **kwargs: None),
        "tpr_fpr_table": SimpleNamespace(add_row=rows.append),
    }
    run([loop], file, names)
    return rows[0][1:]


def nearest(genuine: np.ndarray, impostor: np.ndarray) -> list[str]:
    """What their rule makes of our exact curve: points in the middle of straight runs are dropped first."""
    curve = metrics.curve(genuine, impostor)
    true, false = np.rint(curve.tar * len(genuine)), np.rint(curve.fmr * len(impostor))
    kept = np.ones(len(true), bool)
    # scikit-learn drops before it puts (0, 0) in front.
    kept[2:-1] = (np.diff(true[1:], 2) != 0) | (np.diff(false[1:], 2) != 0)
    fpr, tpr = (false / len(impostor))[kept][::-1], (true / len(genuine))[kept][::-1]
    return [f"{100 * tpr[np.argmin(np.abs(fpr - far))]:.2f}" for far in FARS]


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", ["as they are", "ties", "constant"])
def test_ijb_verification_of_2000_templates(norms, kind, capsys):
    rows, numbers, media, faceness, left, right, same = synthetic_ijb()
    image2template, verify = functions(
        "recognition/arcface_torch/eval_ijbc.py", "image2template_feature", "verification"
    )
    weighed = rows if norms else rows / np.sqrt(np.sum(rows**2, -1, keepdims=True))
    with capsys.disabled():
        theirs, unique = image2template(weighed * faceness[:, None], numbers, media)
    weights = faceness if norms else faceness / np.linalg.norm(rows, axis=1)
    found, ours = ijb.pool(rows, numbers, media, weights)
    assert found.tolist() == unique.tolist()
    assert np.abs(ours - theirs).max() < 1e-6  # they multiply and average in float32

    score = tied(verify(theirs, unique, unique[left], unique[right]), kind)
    exact = (theirs[left] * theirs[right]).sum(1)
    assert np.abs(tied(exact, kind) - score).max() < 1e-9 or kind == "ties"
    # Their table, to the digit, is their rule on our curve.
    table = their_table(same.astype(int), score)
    assert nearest(score[same], score[~same]) == table
    # And our own points on the same scores never exceed the rate, which theirs do where the nearest point lies above.
    points = metrics.tar_at_fars(score[same], score[~same], [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    fpr, tpr, _ = roc_curve(same, score, drop_intermediate=False)
    for point in points:
        assert point.tar == tpr[fpr <= point.far + 1e-12].max()
    if kind == "as they are":
        fast, single = ijb.operating_points(theirs, left, right, same, {str(f): f for f in FARS})
        assert np.abs(single - score).max() < 1e-6
        for point, other in zip(points, fast.values(), strict=True):
            assert abs(point.tar - other.tar) <= 1 / same.sum()
            assert abs(point.false_matches - other.false_matches) <= 1
    with capsys.disabled():
        ours_text = [f"{100 * point.tar:.2f}" for point in points]
        print(f"IJB 1:1, norms {norms}, {kind}: theirs {' '.join(table)}; ours {' '.join(ours_text)}")


def test_ijb_search(capsys):
    """Their 1:N merges the galleries and is closed: rank-k is that of our search in the merged gallery."""
    rows, numbers, media, faceness, *_ = synthetic_ijb(400)
    (evaluation,) = functions("recognition/_evaluation_/ijb/ijb_1n.py", "evaluation", heapq=heapq, math=math)
    _, vectors = ijb.pool(rows, numbers, media, faceness)
    gallery, probes = vectors[:100], vectors[100:400]
    people = np.arange(400) % 100
    evaluation(probes, gallery, people[100:])
    printed = capsys.readouterr().out
    theirs = {line.split(" = ")[0]: float(line.split(" = ")[1]) for line in printed.splitlines() if "top" in line}
    found = metrics.search(probes, people[100:], gallery, people[:100])
    assert {f"top{k}": found.rank_k(k) for k in (1, 5, 10)} == theirs


def test_unit_is_sklearns():
    rows, _ = embeddings("random")
    rows[3] = 0
    expected = sklearn.preprocessing.normalize(rows.astype(np.float64))
    np.testing.assert_allclose(protocol.unit(rows), expected, rtol=0, atol=3e-16)
