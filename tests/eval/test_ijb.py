"""IJB protocols: pooling, scores and search by brute force; folders as they come, and as they should not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval import benchmarks, metrics
from eval.benchmarks import ijb, protocol
from faceless.align import template
from faceless.errors import InputError
from tests.eval.run_folder import faces, recognizer


def some_templates(count: int, dim: int = 16, seed: int = 0):
    """Embeddings of several faces for each template, templates of few people, and their media."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, count)
    people = np.arange(count) % max(2, count // 4)
    centers = rng.normal(size=(people.max() + 1, dim))
    numbers = np.sort(rng.choice(10 * count, count, replace=False)) + 3
    templates = np.repeat(numbers, sizes)
    embeddings = np.repeat(centers[people], sizes, 0) + rng.normal(size=(sizes.sum(), dim))
    media = rng.integers(0, 3, sizes.sum())
    order = rng.permutation(len(templates))
    weights = rng.uniform(0.2, 1, sizes.sum())
    return embeddings.astype(np.float32)[order], templates[order], media[order], weights, people


@pytest.mark.parametrize("pooled", [1, 7, 1 << 14])
def test_pooling_by_its_definition(pooled, monkeypatch):
    monkeypatch.setattr(ijb, "POOLED", pooled)
    embeddings, templates, media, weights, _ = some_templates(40)
    numbers, vectors = ijb.pool(embeddings, templates, media, weights)
    assert numbers.tolist() == sorted(set(templates.tolist()))
    for number, vector in zip(numbers, vectors, strict=True):
        mine = templates == number
        total = sum(
            np.mean([e * w for e, w, m in zip(embeddings[mine], weights[mine], media[mine]) if m == medium], axis=0)
            for medium in set(media[mine].tolist())
        )
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-7)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.booleans())
def test_points_are_those_of_double_precision_rounded_once(seed, sparse):
    rng = np.random.default_rng(seed)
    embeddings, templates, media, weights, people = some_templates(60, seed=seed)
    vectors = ijb.pool(embeddings, templates, media, weights)[1]
    left, right = np.triu_indices(60, 1)
    if sparse:  # then pairs are gathered instead of picked out of all products
        chosen = np.sort(rng.choice(len(left), 25, replace=False))
        left, right = left[chosen], right[chosen]
    same = people[left] == people[right]
    if same.all() or not same.any():
        return
    fars = {"low": 0.01, "high": 0.3}
    points, scores = ijb.operating_points(vectors, left, right, same, fars)
    exact = (vectors[left] * vectors[right]).sum(1).astype(np.float32)
    np.testing.assert_allclose(scores, exact, atol=5e-7)
    for key, far in fars.items():
        expected = metrics.tar_at_far(exact[same], exact[~same], far)
        assert (points[key].tar, points[key].false_matches) == (expected.tar, expected.false_matches)
        assert points[key].threshold == pytest.approx(expected.threshold, abs=1e-7)


def test_both_ways_to_score_agree(monkeypatch):
    vectors = protocol.unit(np.random.default_rng(0).normal(size=(50, 8)))
    left, right = np.repeat(np.arange(20), 30), np.tile(np.arange(20, 50), 20)
    picked = ijb.pair_scores(vectors, left, right)
    monkeypatch.setattr(ijb, "MAX_GRID", 10)
    np.testing.assert_allclose(ijb.pair_scores(vectors, left, right), picked, atol=3e-7)
    np.testing.assert_allclose(picked, (vectors[left] * vectors[right]).sum(1), atol=3e-7)


@pytest.fixture(scope="module")
def benchmark_folder(tmp_path_factory) -> Path:
    """Four people with three templates each of two faces, in an IJB-C folder; subject 3 is in no gallery."""
    folder = tmp_path_factory.mktemp("ijbc")
    (folder / "meta").mkdir()
    (folder / "loose_crop").mkdir()
    stack = faces(4, 6).images
    points = " ".join(f"{v:.3f}" for v in template("arcface", "arcface5", 32).flatten().tolist())
    names, tid = [], []
    for row, image in enumerate(stack):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "loose_crop" / f"{row}.png")
        names.append(f"{row}.png {points} {0.5 + 0.01 * row:.4f}\n")
        tid.append(f"{row}.png {100 + row // 2} {row}\n")
    (folder / "meta" / "ijbc_name_5pts_score.txt").write_text("".join(names))
    (folder / "meta" / "ijbc_face_tid_mid.txt").write_text("".join(tid))
    pairs = [(a, b, int(a // 3 == b // 3)) for a in range(12) for b in range(a)]
    lines = "".join(f"{100 + a} {100 + b} {label}\n" for a, b, label in pairs)
    (folder / "meta" / "ijbc_template_pair_label.txt").write_text(lines)
    for name, rows in {"gallery_G1": [0, 3], "gallery_G2": [6], "probe_mixed": [1, 2, 4, 7, 9, 10]}.items():
        lines = "".join(f"{100 + row},{row // 3},x.jpg\n" for row in rows)
        (folder / "meta" / f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\n" + lines)
    return folder


def test_a_whole_folder(benchmark_folder):
    found = benchmarks.find(f"ijbc:{benchmark_folder}", "arcface", 32)
    crops = torch.stack(list(found.faces()))
    # Landmarks that lie on the template cut the image as it is.
    assert (crops.int() - faces(4, 6).images.int()).abs().max() <= 1
    report = protocol.evaluate(recognizer(24), found, cache=False)
    figures = report.figures
    assert (figures["templates"], figures["genuine"], figures["impostor"]) == (12, 12, 54)
    assert figures["allowed_false_matches"]["1e-1"] == 5
    first = figures["search"]["gallery_G1"]
    assert (first["mated"], first["non_mated"]) == (3, 3)
    assert (figures["search"]["gallery_G2"]["mated"], figures["search"]["gallery_G2"]["non_mated"]) == (1, 5)
    assert figures["search"]["mean"]["rank1"] == (first["rank1"] + figures["search"]["gallery_G2"]["rank1"]) / 2
    assert report.summary()["pooling"] == {"media": "mean", "faceness": True, "norms": True}
    assert "norms kept, faceness on" in report.heading
    # Settings change the vectors, not the faces.
    bare = ijb.Templates(benchmark_folder, "ijbc", "arcface", 32, faceness=False, norms=False)
    assert bare.digest == found.digest
    other = protocol.evaluate(recognizer(24), bare, cache=False)
    assert np.abs(other.genuine - report.genuine).max() > 1e-4
    for kind, faceness, norms in (
        ("ijbc-norms", False, True),
        ("ijbc-faceness", True, False),
        ("ijbc-plain", False, False),
    ):
        named = benchmarks.find(f"{kind}:{benchmark_folder}", "arcface", 32)
        assert (named.name, named.faceness, named.norms) == (kind, faceness, norms)


def test_people_are_resampled_where_the_lists_name_them_all(benchmark_folder, tmp_path):
    folder = shutil.copytree(benchmark_folder, tmp_path / "named")
    found = ijb.Templates(folder, "ijbc", "arcface", 32)
    net = recognizer(24)
    assert protocol.evaluate(net, found, cache=False).summary()["intervals_of"] == "independent pairs"
    lists = folder / "meta" / "ijbc_1N_probe_mixed.csv"
    lists.write_text(lists.read_text() + "".join(f"{100 + row},{row // 3},x.jpg\n" for row in (5, 8, 11)))
    report = protocol.evaluate(net, ijb.Templates(folder, "ijbc", "arcface", 32), cache=False)
    assert report.summary()["intervals_of"] == "people"
    people = np.array([a // 3 for a in range(12) for b in range(a) if a // 3 == b // 3])
    accepted = report.genuine >= report.figures["thresholds"]["1e-1"]
    shares = metrics.bootstrap_share(accepted, people, metrics.resamples(4, 1000))
    assert report.figures["intervals"]["tar_at_far"]["1e-1"] == pytest.approx(list(metrics.interval(shares)))
    # One template with two subjects: nobody knows whose its pairs are.
    lists.write_text(lists.read_text().replace("111,3", "111,2"))
    assert ijb.Templates(folder, "ijbc", "arcface", 32).subjects is None


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ijbc_name_5pts_score.txt", None, "cannot be read"),
        ("ijbc_name_5pts_score.txt", lambda t: t.replace("0.png", "../0.png", 1), "outside of the benchmark"),
        ("ijbc_name_5pts_score.txt", lambda t: t.replace("0.png", "/etc/passwd", 1), "outside of the benchmark"),
        ("ijbc_name_5pts_score.txt", lambda t: t.replace("0.5000", "nan", 1), "not finite"),
        ("ijbc_name_5pts_score.txt", lambda t: t.replace("0.5000", "high", 1), "its lines are not"),
        ("ijbc_face_tid_mid.txt", lambda t: t.split("\n", 1)[1], "its 23 faces are not the 24"),
        ("ijbc_face_tid_mid.txt", lambda t: t.replace(" 100 ", " -100 "), "template numbers lie in 0"),
        ("ijbc_face_tid_mid.txt", lambda t: t.replace(" 100 ", " 99999999999 "), "template numbers lie in 0"),
        ("ijbc_template_pair_label.txt", lambda t: t + "999 100 1\n", "templates without faces"),
        ("ijbc_template_pair_label.txt", lambda t: t + "101 100 7\n", "labels other than 0 and 1"),
        ("ijbc_template_pair_label.txt", lambda t: t + "101 100\n", "its lines are not"),
        ("ijbc_template_pair_label.txt", lambda t: "101 100 1\n", "needs genuine and impostor pairs"),
        ("ijbc_1N_gallery_G1.csv", lambda t: t + "555,1,x\n", "templates without faces"),
        ("../loose_crop/3.png", None, r"3\.png: cannot be read"),
    ],
)
def test_damaged_protocols_name_the_file(benchmark_folder, tmp_path, file, change, message):
    shutil.copytree(benchmark_folder, tmp_path / "b")
    path = tmp_path / "b" / "meta" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        benchmarks.find(f"ijbc:{tmp_path / 'b'}", "arcface", 32)
    assert "\n" not in str(caught.value)


def test_without_search_files_there_is_no_search(benchmark_folder, tmp_path):
    shutil.copytree(benchmark_folder, tmp_path / "b")
    (tmp_path / "b" / "meta" / "ijbc_1N_probe_mixed.csv").unlink()
    found = benchmarks.find(f"ijbc:{tmp_path / 'b'}", "arcface", 32)
    assert "search" not in protocol.evaluate(recognizer(24), found, cache=False).figures
