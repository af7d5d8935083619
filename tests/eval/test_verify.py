"""Verification end to end: the teacher on the AT&T faces, the command, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

import faceless
from eval.benchmarks import Benchmark
from eval.verify import FARS, benchmark_for, main, table, verify
from faceless.errors import InputError
from tests.eval.run_folder import faces, recognizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher():
    net = faceless.load("dlib-resnet29")
    benchmark = benchmark_for(net, "att-faces")
    return net, benchmark, verify(net, benchmark)


def test_the_teacher_knows_the_att_faces(teacher):
    """Measured with dlib's own embeddings of its own chips: EER 0.3 %, TAR@FAR=1e-3 98.6 %, rank-1 100 %."""
    _, _, result = teacher
    assert (len(result.genuine), len(result.impostor)) == (1800, 78_000)
    assert 0.001 < result.eer < 0.006
    assert 0.975 < result.points["1e-3"].tar < 0.995
    assert result.rank1 == 1.0


def test_summary_has_the_promised_keys_and_survives_json(teacher):
    _, _, result = teacher
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    promised = ["benchmark", "model", "genuine", "impostor", "eer", "tar_at_far", "rank1", "intervals"]
    assert list(summary)[: len(promised)] == promised
    assert list(summary["tar_at_far"]) == ["1e-2", "1e-3", "1e-4"]
    assert summary["allowed_false_matches"] == {"1e-2": 780, "1e-3": 78, "1e-4": 7}
    for key in FARS:
        low, high = summary["intervals"]["tar_at_far"][key]
        assert 0 <= low <= summary["tar_at_far"][key] <= high <= 1
    low, high = summary["intervals"]["eer"]
    assert 0 <= low < summary["eer"] < high < 0.02
    assert any("rule of 30" in line for line in summary["cautions"])


def test_scores_are_the_cosines_of_all_pairs_once_each():
    net, benchmark = recognizer(24), faces(5, 4)
    result = verify(net, benchmark, bootstrap=0)
    embeddings = net.embed(benchmark.images).double()
    genuine, impostor, hits = [], [], 0
    for i in range(20):
        cosines = [float(embeddings[i] @ embeddings[j]) for j in range(20)]
        for j in range(i + 1, 20):
            (genuine if i // 4 == j // 4 else impostor).append(cosines[j])
        best = max((j for j in range(20) if j != i), key=lambda j: cosines[j])
        hits += best // 4 == i // 4
    np.testing.assert_allclose(result.genuine, genuine, atol=1e-6)
    np.testing.assert_allclose(result.impostor, impostor, atol=1e-6)
    assert result.rank1 == hits / 20
    assert result.intervals == {}
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    values = np.r_[result.genuine, result.impostor]
    assert result.auc == pytest.approx(roc_auc_score(truth, values))
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    assert result.points["1e-2"].tar == pytest.approx(tpr[fpr <= 1e-2].max())


def test_the_order_of_faces_does_not_matter():
    net, benchmark = recognizer(24), faces(5, 4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Benchmark("s", benchmark.images[order], benchmark.identities[order], benchmark.names)
    one, other = verify(net, benchmark), verify(net, shuffled)
    assert one.summary()["eer"] == other.summary()["eer"]
    assert one.intervals["tar_at_far"] == other.intervals["tar_at_far"]
    np.testing.assert_array_equal(np.sort(one.impostor), np.sort(other.impostor))


def test_flip_adds_the_mirrored_face():
    net, benchmark = recognizer(24), faces(5, 4)
    mirrored = Benchmark("m", benchmark.images.flip(-1), benchmark.identities, benchmark.names)
    with_flip = verify(net, benchmark, flip=True, bootstrap=0)
    np.testing.assert_allclose(with_flip.genuine, verify(net, mirrored, flip=True, bootstrap=0).genuine, atol=1e-6)
    assert np.abs(with_flip.genuine - verify(net, benchmark, bootstrap=0).genuine).max() > 1e-3


def test_faces_that_subsets_share_are_embedded_once(monkeypatch):
    net, benchmark, known = recognizer(24), faces(5, 4), {}
    some = benchmark.subset([1, 3])
    covered = replace(benchmark, images=255 - benchmark.images, gallery=benchmark.images)
    wanted = [verify(net, one, bootstrap=0) for one in (benchmark, some, covered)]
    found = [verify(net, one, bootstrap=0, known=known) for one in (benchmark, some, covered)]
    assert len(known) == 40
    monkeypatch.setattr(type(net), "embed", None)  # nothing is embedded again
    part = verify(net, covered.subset([0, 2]), bootstrap=0, known=known)
    for result, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(result.genuine, expected.genuine, atol=1e-6)
        np.testing.assert_allclose(result.impostor, expected.impostor, atol=1e-6)
    np.testing.assert_array_equal(part.genuine, found[2].genuine[[*range(6), *range(12, 18)]])


def test_broken_weights_are_named():
    net = recognizer(8)
    with torch.no_grad():
        net.backbone.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"embeddings of 20 of 20 faces are NaN"):
        verify(net, faces(5, 4))


def test_people_without_pairs():
    benchmark = faces(5, 1)
    with pytest.raises(InputError, match="two people or more"):
        verify(recognizer(8), benchmark)
    with pytest.raises(InputError, match="two people or more"):
        verify(recognizer(8), faces(5, 4).subset([2]))


def test_table_puts_iso_terms_beside(teacher):
    text = table([teacher[2], teacher[2]])
    assert "78,000 impostor pairs" in text
    assert "1 - FNMR@FMR=1e-3" in text
    assert max(map(len, text.splitlines())) < 140


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / "eval" / "verify.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        student = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=seed)
        faceless.save(student, folder / f"m{seed}", record={})
    return str(folder / "m0"), str(folder / "m1")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    benchmark = faces(4, 3)
    for row, image in enumerate(benchmark.images):
        target = folder / f"p{row // 3}" / f"{row % 3}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(target)
    return folder


def test_command_writes_json_and_figures(models, people, tmp_path):
    files = {"json": tmp_path / "out" / "figures.json", "figures": tmp_path / "plots"}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    done = command("--model", models[0], "--benchmark", str(people), "--people", "1-3", "--bootstrap", "50", *options)
    assert done.returncode == 0, done.stderr
    written = json.loads(files["json"].read_text())
    assert (written["genuine"], written["impostor"], written["people"]) == (9, 27, 3)
    assert (written["model"], written["benchmark"], written["subset"]) == (models[0], people.name, "1-3")
    assert sorted(path.name for path in files["figures"].iterdir()) == ["det.svg", "roc.svg", "scores.svg"]
    main(["--model", *models, "--benchmark", str(people), "--bootstrap", "0", "--json", str(files["json"])])
    assert [entry["model"] for entry in json.loads(files["json"].read_text())] == list(models)


def test_mistakes_are_one_line_and_exit_code_2(models, people, tmp_path, capsys):
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "b").mkdir()
    (tmp_path / "bad" / "a" / "1.png").write_text("no image")
    shutil.copytree(models[0], Path(models[0]).parent / "run" / "student")
    for arguments, expected in (
        (["--model", models[0], "--benchmark", str(tmp_path / "bad")], "holds no images"),
        (["--model", models[0], "--benchmark", str(people), "--people", "3-9"], "numbers from 1 to 4"),
        (["--model", models[0], "--bootstrap", "-1"], "--bootstrap -1"),
        (["--model", models[0], "--device", "tpu"], "use auto, cpu or cuda"),
        (["--model", models[0], "--flip", "maybe"], "flip: Expected bool or null. Got value: maybe"),
        (["--model", models[0], "--sharpness", "1"], "sharpness"),
        (["--modle", models[0]], "'modle'; did you mean model"),
        (["--model", str(Path(models[0]).parent / "run")], "give " + str(Path(models[0]).parent / "run" / "student")),
        (["--model", models[0], "--json", f"{__file__}/figures.json"], "test_verify.py is a file and no folder"),
        (["--model", models[0], "--figures", __file__], "test_verify.py is a file and no folder"),
        (["--model", "dlib-resnet28"], "dlib-resnet29"),
        ([], "model"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert expected in line
        assert printed.out == ""


def test_a_mistake_on_the_command_line_shows_no_traceback(tmp_path):
    (tmp_path / "alone").mkdir()
    done = command("--model", "dlib-resnet29", "--benchmark", str(tmp_path), "--seed", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
