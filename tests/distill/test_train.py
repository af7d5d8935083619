"""The training command, end to end on tiny networks: it trains, resumes to the same bytes, and refuses mistakes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import faceless
from distill.train import main
from eval.verify import benchmark_for, verify
from faceless.errors import InputError, command
from faceless.recognizer import resize
from synth.corpus import Corpus
from tests.distill.test_sources import folder

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = {
    "class_path": "synth.generators.dcgan.DCGAN",
    "init_args": {"weights": None, "latent_dim": 8, "channels": 4},
}
TINY = {"widths": [8, 16], "depths": [1, 1]}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", **TINY)
    faceless.save(net, tmp_path / "teacher", {})
    return tmp_path / "teacher"


def recipe(folder: Path, teacher: Path, /, **changes: Any) -> Path:
    # Random generator weights come from PyTorch's global state, which is not seeded yet when settings are built: give
    # the generator weights of its own.
    weights = folder / "generator.pt"
    if not weights.exists():
        from synth.generators.dcgan import DCGAN

        torch.manual_seed(1)
        torch.save(DCGAN(None, latent_dim=8, channels=4).state_dict(), weights)
    source = {
        "class_path": "distill.sources.OnlineSource",
        "init_args": {
            "generator": {
                "class_path": GENERATOR["class_path"],
                "init_args": GENERATOR["init_args"] | {"weights": str(weights)},
            },
            "resampling": {"class_path": "mining.resampling.SynthDistillRule"},
        },
    }
    settings = {
        "output": str(folder / "run"),
        "teacher": str(teacher),
        "source": source,
        "student": {"name": "slimresnet", "input_size": 32, "options": TINY},
        "center": True,
        "losses": {
            "cosine": {"loss": {"class_path": "distill.losses.embedding.CosineEmbedding"}},
            "contrast": {
                "weight": 0.5,
                "loss": {
                    "class_path": "distill.losses.contrastive.QUD",
                    "init_args": {"embedding_dim": 16, "queue_size": 32},
                },
            },
        },
        "augment": {"size": 32},
        "steps": 12,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every": 3,
        "device": "cpu",
        "precision": "fp32",  # whatever this CPU computes natively
        "threads": 1,
        "tensorboard": False,
        "optimizer": {"warmup": 3},
        "validation": {"faces": 16, "every": 6, "neighbors": 3},
        "verification": {"benchmark": None},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student_bytes(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / "student" / name).read_bytes() for name in ("model.safetensors", "config.json", "README.md")
    }


def test_a_run_trains_and_leaves_everything(tmp_path: Path, teacher: Path) -> None:
    main(["--config", str(recipe(tmp_path, teacher, steps=40, log_every=5)), "--optimizer.lr", "0.01"])
    run = tmp_path / "run"
    losses = [entry["loss"] for entry in lines(run) if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.1, losses
    checks = [entry["validation"] for entry in lines(run) if "validation" in entry]
    assert checks[-1]["cosine"] > 0.1
    student = faceless.load(run / "student")
    assert student.embedding_dim == 16
    assert student.spec.framing == "dlib"
    record = json.loads((run / "provenance.json").read_text())
    assert record["real_faces_in_training"] is False
    assert len(record["sources"][0]["weights_sha256"]) == 64
    assert yaml.safe_load((run / "settings.yaml").read_text())["optimizer"]["lr"] == 0.01
    assert "<html" in (run / "report.html").read_text()
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["record"]["real_faces_in_training"] is False


def corpus_recipe(folder: Path, teacher: Path) -> Path:
    recipe(folder, teacher)  # saves the generator's weights
    made = {
        "generator": {
            "class_path": GENERATOR["class_path"],
            "init_args": GENERATOR["init_args"] | {"weights": str(folder / "generator.pt")},
        },
        "count": 64,
        "align": None,
        "workers": 0,
        "block": 32,
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(made))
    source = {
        "class_path": "distill.sources.CorpusSource",
        "init_args": {"path": str(folder / "corpus"), "recipe": str(folder / "corpus.yaml"), "views": 2},
    }
    return recipe(folder, teacher, source=source, validation={"faces": 16, "every": 6, "neighbors": 3})


@pytest.mark.parametrize("sees", ["view", "face"])
def test_a_corpus_is_written_first_and_a_teacher_cache_changes_nothing(
    tmp_path: Path, teacher: Path, sees: str
) -> None:
    path = corpus_recipe(tmp_path, teacher)
    common = ["--config", str(path), "--teacher_sees", sees]
    main([*common, "--output", str(tmp_path / "asked")])
    main([*common, "--output", str(tmp_path / "cached"), "--teacher_cache", str(tmp_path / "cache")])
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == (2 if sees == "view" else 1)
    record = json.loads((tmp_path / "cached" / "provenance.json").read_text())
    assert record["sources"][0]["faces"] == 48, "16 of the 64 are held out"
    assert record["sources"][0]["manifest"]["real_faces"] is False
    # The running mean and the mean over the cache differ, so compare what the teacher said, not the losses.
    again = tmp_path / "again"
    main([*common, "--output", str(again), "--teacher_cache", str(tmp_path / "cache")])
    assert student_bytes(again) == student_bytes(tmp_path / "cached")
    main([*common, "--output", str(tmp_path / "plain"), "--center", "false"])
    main([*common, "--output", str(tmp_path / "kept"), "--center", "false", "--teacher_cache", str(tmp_path / "cache")])
    for a, b in zip(lines(tmp_path / "plain"), lines(tmp_path / "kept"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# Dropout draws from PyTorch's global state, which no checkpoint holds.
DROPPING = {"student": {"name": "iresnet18", "input_size": 32, "options": {"dropout": 0.4}}}


@pytest.mark.parametrize("student", [{}, DROPPING], ids=["plain", "dropout"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, student: dict
) -> None:
    path = recipe(tmp_path, teacher, **student)
    main(["--config", str(path), "--output", str(tmp_path / "whole")])

    from distill.checkpoints import Metrics

    class StoppedError(Exception):
        pass

    write = Metrics.write
    for stop in (2, 8, 11):  # before the first checkpoint, between two, just before the end

        def failing(self: Metrics, entry: dict, stop: int = stop) -> None:
            if entry["step"] > stop:
                raise StoppedError
            write(self, entry)

        monkeypatch.setattr(Metrics, "write", failing)
        with pytest.raises(StoppedError):
            main(["--config", str(path), "--output", str(tmp_path / "torn")])
    monkeypatch.setattr(Metrics, "write", write)
    main(["--config", str(path), "--output", str(tmp_path / "torn")])
    assert student_bytes(tmp_path / "torn") == student_bytes(tmp_path / "whole")
    timeless = [{k: v for k, v in entry.items() if k != "faces_per_second"} for entry in lines(tmp_path / "torn")]
    assert timeless == [
        {k: v for k, v in entry.items() if k != "faces_per_second"} for entry in lines(tmp_path / "whole")
    ]


def launch(path: Path, output: Path, *more: str, processes: int = 1) -> subprocess.Popen:
    start = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--main_process_port", "0"]
    arguments = ["distill/train.py", "--config", str(path), "--output", str(output), *more]
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def kill_and_resume(path: Path, folder: Path, kills: int, window: float) -> None:
    """Kill the command ``kills`` times at random moments, then let it end."""
    numbers = random.Random(0)
    for _ in range(kills):
        process = launch(path, folder)
        time.sleep(numbers.uniform(0, window))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished(launch(path, folder))


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, steps=400, checkpoint_every=20, log_every=20)
    started = time.monotonic()
    finished(launch(path, tmp_path / "whole"))
    kill_and_resume(path, tmp_path / "torn", 10, time.monotonic() - started)
    assert student_bytes(tmp_path / "torn") == student_bytes(tmp_path / "whole")


def test_a_kill_at_a_random_moment(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, steps=60, checkpoint_every=5)
    started = time.monotonic()
    finished(launch(path, tmp_path / "whole"))
    kill_and_resume(path, tmp_path / "torn", 2, time.monotonic() - started)
    assert student_bytes(tmp_path / "torn") == student_bytes(tmp_path / "whole")


def test_two_processes_draw_the_same_faces_and_agree_in_loss(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, steps=20)
    main(["--config", str(path), "--output", str(tmp_path / "one")])
    assert "2 processes on cpu" in finished(launch(path, tmp_path / "two", processes=2))
    for name in ("student/model.safetensors", "provenance.json", "report.html"):
        assert (tmp_path / "two" / name).is_file()
    one, two = ([e for e in lines(tmp_path / name) if "loss" in e] for name in ("one", "two"))
    assert [e["step"] for e in one] == [e["step"] for e in two] == list(range(1, 21))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4), a["step"]
    checks = [[e["validation"] for e in lines(tmp_path / name) if "validation" in e] for name in ("one", "two")]
    for a, b in zip(*checks, strict=True):
        assert a["cosine"] == pytest.approx(b["cosine"], abs=2e-3)


MISTAKES = {
    "unknown key": (["--stepz", "3"], "stepz"),
    "unknown nested key": (["--optimizer.lrr", "3"], "optimizer.lr"),
    "wrong type": (["--steps", "many"], "steps"),
    "unknown teacher": (["--teacher", "dlib-resnet2"], "dlib-resnet29"),
    "list of teachers": (["--teacher", "[one, two]"], "members: [one, two]"),
    "unknown student": (["--student.name", "slimresne"], "slimresnet"),
    "dimensions": (["--student.embedding_dim", "8", "--projection", "none"], "student.embedding_dim"),
    "no recipe": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "uneven": (["--steps", "0"], "steps is 0"),
    "no steps between validations": (["--validation.every", "0"], "every"),
    "negative validation": (["--validation.faces", "-3"], "faces"),
    "momentum": (["--optimizer.momentum", "1.5"], "momentum"),
    "absent benchmark": (["--verification.benchmark", "lfw-not-here"], "lfw-not-here"),
}
if not torch.cuda.is_available():
    MISTAKES["no gpu"] = (["--device", "cuda"], "device")


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(recipe(tmp_path, teacher)), *arguments])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert named in message


def test_a_wrong_key_inside_a_recipe_is_named_with_its_file(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, teacher, optimizer={"warmpu": 3})
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "warmpu" in message and "warmup" in message and "recipe.yaml" in message


def test_a_list_of_teachers_in_a_recipe_is_told_which_classes_hold_several(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe(tmp_path, teacher).read_text()) | {"teacher": ["one", "two"]}))
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    kinds = "distill.ensembles.Ensemble or distill.ensembles.Nobody or distill.ensembles.Snapshots"
    assert message == f"error: {path}: teacher: no class; write class_path with {kinds}, and init_args"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seed", "-1"], "seed is -1; it must be from 0"),
        (["--threads", "-1"], "threads is -1; use 0 for all cores"),
        (["--output", __file__], "test_train.py is a file and no folder; choose another output"),
        (["--verification.benchmark", "lfw.bin"], "afterwards eval/verify.py --model"),
        (["--verification.benchmark", "ijbc:somewhere"], "a run verifies on att-faces or a folder of people"),
        (["--student.embedding_dim", "0"], "embedding_dim is 0"),
    ],
)
def test_mistakes_show_before_any_face_is_made(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(recipe(tmp_path, teacher)), *arguments])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists() and not (tmp_path / "run").exists()


HEAD = {"class_path": "distill.losses.margin.ArcFace", "init_args": {"embedding_dim": 16, "classes": 4}}


@pytest.mark.parametrize(
    ("losses", "arguments", "line"),
    [
        ({"head": {"loss": HEAD}}, [], "losses.head needs labels"),
        (None, ["--teacher_cache", "cache", "--source.init_args.views", "null"], "teacher_cache needs source"),
        (None, ["--source.init_args.labels", "nowhere.npy"], "nowhere.npy: no such file"),
        (None, ["--precision", "fp16"], "precision is fp16, which is for GPUs"),
    ],
)
def test_what_cannot_be_shows_before_a_corpus_is_written(
    tmp_path: Path,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
    losses: dict | None,
    arguments: list[str],
    line: str,
) -> None:
    path = corpus_recipe(tmp_path, teacher)
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(settings | {"losses": losses or settings["losses"]}))
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path), *arguments])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists() and not (tmp_path / "run").exists()


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, teacher, steps=3)
    main(["--config", str(path)])
    before = student_bytes(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path), "--seed", "5"])
    assert stop.value.code == 2
    assert "another seed" in capsys.readouterr().err
    assert student_bytes(tmp_path / "run") == before


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The weights blow up at step 10, in the middle of a run that was well.
    monkeypatch.setattr("distill.train.learning_rate", lambda _, step, __: 1e37 if step >= 10 else 1e-3)
    path = recipe(tmp_path, teacher, steps=200, log_every=7, optimizer={"name": "sgd", "clip": 0})
    with pytest.raises(SystemExit) as stop:
        command(main)(["--config", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: step 1") and "not a finite number" in message
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert saved and str(saved[-1]) in message
    for path in saved:
        state = torch.load(path, weights_only=True)
        assert state["step"] <= 10
        assert all(bool(v.isfinite().all()) for v in state["student"].values() if v.is_floating_point())


def test_afl_kd_on_pseudo_identities_with_cached_features(tmp_path: Path, teacher: Path) -> None:
    path = corpus_recipe(tmp_path, teacher)
    settings = yaml.safe_load(path.read_text())
    families = "distill.losses"
    layers = {"student_layers": ["stages.0", "stages.1"], "teacher_layers": ["stages.0", "stages.1"]}
    settings["losses"] = {
        "classes": {"loss": {"class_path": f"{families}.logits.CrossEntropy"}},
        "scores": {"loss": {"class_path": f"{families}.logits.LogitKD"}},
        "features": {"loss": {"class_path": f"{families}.features.Hints", "init_args": layers}},
        "centers": {
            "loss": {
                "class_path": f"{families}.adaptive_centers.FrozenCenters",
                "init_args": {"embedding_dim": 16, "classes": 6, "negatives": 3},
            }
        },
    }
    settings |= {
        "pseudo_identities": 6,
        "classifier": {"scale": 16.0},
        "adaptive": {"every": 4, "lowest": 0.0, "highest": 1.0},
        "teacher_cache": str(tmp_path / "cache"),
        "optimizer": {"name": "muon", "lr": 0.02, "warmup": 3},
    }
    path.write_text(yaml.safe_dump(settings))
    main(["--config", str(path)])
    logged = [entry for entry in lines(tmp_path / "run") if "loss" in entry]
    weights = [entry["weights"] for entry in logged]
    assert all(sum(w.values()) == pytest.approx(4.0) for w in weights)
    assert weights[0] != weights[3] != weights[4] == weights[7] != weights[8]
    assert len(list((tmp_path / "cache").rglob("feature-stages.?/*/*.npy"))) == 4
    # Stopped after a checkpoint, it goes on to the same bytes.
    whole = student_bytes(tmp_path / "run")
    for newer in sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))[1:]:
        newer.unlink()
    main(["--config", str(path)])
    assert student_bytes(tmp_path / "run") == whole


def test_a_run_says_of_its_student_what_the_command_says(tmp_path: Path, teacher: Path) -> None:
    """The teacher sees 32 pixels, the faces have 64: nobody may cut these down for everybody."""
    faces = folder(tmp_path / "faces", people=5, images=4, side=64)
    path = recipe(tmp_path, teacher, steps=2, verification={"benchmark": str(faces), "bootstrap": 0})
    main(["--config", str(path)])
    rows = json.loads((tmp_path / "run" / "verification.json").read_text())["subsets"]["all"]
    student = faceless.load(tmp_path / "run" / "student")
    found = verify(student, benchmark_for(student, faces), bootstrap=0).summary()
    assert rows[1]["label"] == "student"
    for key in ("auc", "eer", "thresholds"):
        assert rows[1][key] == pytest.approx(found[key], abs=1e-6)


def test_what_a_teacher_says_of_a_benchmark_is_kept_for_other_runs(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path / "cache"))
    faces = folder(tmp_path / "faces", people=5, images=4, side=64)
    check = {"benchmark": str(faces), "people": ["4-5"], "conditions": ["8px/clean"], "bootstrap": 0}
    path = recipe(tmp_path, teacher, steps=2, verification=check)
    kept = []
    for seed in ("0", "1"):
        main(["--config", str(path), "--seed", seed, "--output", str(tmp_path / seed)])
        kept.append(sorted((tmp_path / "cache" / "embeddings").iterdir()))
    # All people, as they are and worse; subsets and galleries are among these, and students change.
    assert kept[0] == kept[1] and [np.load(file).shape for file in kept[0]] == [(20, 16), (20, 16)]
    first, second = (json.loads((tmp_path / seed / "verification.json").read_text())["subsets"] for seed in "01")
    for name in ("all", "4-5", "all 8px/clean", "4-5 8px/clean"):
        assert first[name][0]["auc"] == second[name][0]["auc"]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("student", lambda state: {name: rows.flatten()[:1] for name, rows in state.items()}),
        ("average", lambda state: dict(list(state.items())[1:])),
        ("objective", lambda state: {}),
        ("optimizer", lambda state: {"state": {}, "param_groups": []}),
        ("source", lambda state: {"another": torch.zeros(3)}),
        ("source", lambda state: None),
    ],
    ids=["student", "average", "objective", "optimizer", "source", "none"],
)
def test_a_checkpoint_of_another_run_is_named_and_left_alone(
    tmp_path: Path, teacher: Path, part: str, change: Callable[[Any], Any]
) -> None:
    path = recipe(tmp_path, teacher, steps=4, checkpoint_every=2)
    main(["--config", str(path)])
    newest = tmp_path / "run" / "checkpoints" / "step-00000004.pt"
    state = torch.load(newest, weights_only=True)
    torch.save(state | {part: change(state[part])}, newest)
    bytes_before = newest.read_bytes()
    with pytest.raises(InputError, match=rf"step-00000004\.pt: its {part} does not fit this run \(.+\); put the right"):
        main(["--config", str(path)])
    assert newest.read_bytes() == bytes_before
    newest.unlink()
    main(["--config", str(path)])
    assert newest.is_file()


def mixed_recipe(folder_: Path, teacher: Path, **changes: Any) -> Path:
    faces = folder_ / "people"
    if not faces.exists():
        folder(faces, people=6, images=4)
    path = corpus_recipe(folder_, teacher)
    settings = yaml.safe_load(path.read_text())
    real = {"path": str(faces), "people": "1-3", "size": 32, "aligned": True, "views": 1}
    drawn = settings["source"]
    settings["source"] = {
        "class_path": "distill.mixtures.MixtureSource",
        "init_args": {
            "held_out": "drawn",
            "size": 32,
            "parts": {
                "drawn": {"share": 3, "source": drawn},
                "real": {"share": 1, "source": {"class_path": "distill.sources.FolderSource", "init_args": real}},
            },
        },
    }
    settings["verification"] = {"benchmark": str(faces), "people": ["4-6"], "bootstrap": 20}
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def test_a_mixture_with_real_faces_says_so_everywhere_and_verifies_on_other_people(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mixed_recipe(tmp_path, teacher)
    main(["--config", str(path), "--teacher_cache", str(tmp_path / "cache")])
    assert "REAL FACES" in capsys.readouterr().out
    run = tmp_path / "run"
    record = json.loads((run / "provenance.json").read_text())
    assert record["real_faces_in_training"] is True
    assert record["split"] == {"trained_on": ["p0", "p1", "p2"], "verified_on": ["4-6"]}
    parts = {source["part"]: source for source in record["sources"]}
    assert parts["real"]["faces_per_batch"] == 2 and parts["real"]["people"] == "1-3" and parts["real"]["faces"] == 12
    assert parts["drawn"]["faces_per_batch"] == 6 and parts["drawn"]["real_faces"] is False
    config = json.loads((run / "student" / "config.json").read_text())["record"]
    assert config["real_faces_in_training"]
    told = {part["part"]: part for part in config["training_faces"]}
    assert told["real"] == {
        "part": "real",
        "share": 0.25,
        "kind": "folder",
        "real_faces": True,
        "faces": 12,
        "people": "1-3",
    }
    assert told["drawn"]["generator"] == "DCGAN" and told["drawn"]["licence"] and told["drawn"]["share"] == 0.75
    # No photograph of a real person gets into the report unasked.
    shown = np.load(run / "faces.npz")["images"]
    drawn = resize(Corpus(tmp_path / "corpus").images(range(48)).float(), 32, 32).round().byte().numpy()
    assert len(shown) and all((face == drawn).all((1, 2, 3)).any() for face in shown)
    subsets = json.loads((run / "verification.json").read_text())["subsets"]
    assert list(subsets) == ["4-6"] and subsets["4-6"][0]["people"] == 3
    # The same, asking the teacher at every step, but for the mean.
    main(["--config", str(path), "--output", str(tmp_path / "a"), "--center", "false"])
    cached = ["--teacher_cache", str(tmp_path / "cache")]
    main(["--config", str(path), "--output", str(tmp_path / "b"), "--center", "false", *cached])
    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_student_that_goes_on_brings_its_past_along(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, teacher, steps=2)
    main(["--config", str(path), "--output", str(tmp_path / "first")])
    start = str(tmp_path / "first" / "student")
    capsys.readouterr()
    main(["--config", str(path), "--output", str(tmp_path / "second"), "--student.start", start])
    assert "REAL FACES" not in capsys.readouterr().out
    record = json.loads((tmp_path / "second" / "provenance.json").read_text())
    assert record["real_faces_in_training"] is False
    assert record["started_from"]["sha256"] == faceless.load(start).source["sha256"]
    # Without a record, or with one of real people, nobody may be told that there were none.
    for told, reason in ((None, "has no record"), (True, "was trained on real people")):
        net = faceless.load(start)
        faceless.save(net, tmp_path / "other", {} if told is None else {"real_faces_in_training": told})
        again = tmp_path / f"third-{told}"
        main(["--config", str(path), "--output", str(again), "--student.start", str(tmp_path / "other")])
        assert "REAL FACES" in capsys.readouterr().out
        assert reason in json.loads((again / "provenance.json").read_text())["real_faces_because"][0]
        assert json.loads((again / "student" / "config.json").read_text())["record"]["real_faces_in_training"] is True
    for wrong, named in (
        (["--student.input_size", "48"], "student.input_size is 48"),
        (["--student.options", "{widths: [4, 8]}"], "student.options"),
    ):
        with pytest.raises(SystemExit):
            command(main)(["--config", str(path), "--output", str(tmp_path / "x"), "--student.start", start, *wrong])
        assert named in capsys.readouterr().err


def test_a_student_trained_in_half_precision_is_verified_in_full(tmp_path: Path, teacher: Path) -> None:
    faces = folder(tmp_path / "faces", people=5, images=4, side=32)
    path = recipe(
        tmp_path, teacher, steps=2, precision="bf16", ema=0.0, verification={"benchmark": str(faces), "bootstrap": 0}
    )
    finished(launch(path, tmp_path / "run"))  # precision is one for all runs of a process
    rows = json.loads((tmp_path / "run" / "verification.json").read_text())["subsets"]["all"]
    student = faceless.load(tmp_path / "run" / "student")
    found = verify(student, benchmark_for(student, faces), bootstrap=0).summary()
    assert rows[1]["thresholds"] == pytest.approx(found["thresholds"], abs=1e-6)


def test_half_precision_with_a_student_of_another_dimension(tmp_path: Path, teacher: Path) -> None:
    path = recipe(tmp_path, teacher, steps=2, precision="bf16")
    finished(launch(path, tmp_path / "run", "--student.embedding_dim", "8"))
    assert faceless.load(tmp_path / "run" / "student").embedding_dim == 8


def test_other_faces_or_another_teacher_under_the_same_name_are_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpus_recipe(tmp_path, teacher)
    main(["--config", str(path)])
    shutil.rmtree(tmp_path / "corpus")
    settings = yaml.safe_load((tmp_path / "corpus.yaml").read_text()) | {"seed": 7}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path), "--keep_checkpoints", "5"])
    assert "names another source" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "corpus")
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(settings | {"seed": 0}))
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=9, **TINY)
    faceless.save(net, tmp_path / "teacher", {})
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path)])
    assert "names another teacher" in capsys.readouterr().err


def test_faces_that_were_changed_in_place_are_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = corpus_recipe(tmp_path, teacher)
    main(["--config", str(path), "--steps", "1"])
    shard = next((tmp_path / "corpus").rglob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path), "--steps", "1", "--output", str(tmp_path / "again")])
    assert shard.name in capsys.readouterr().err


def test_verifying_on_people_who_were_trained_on_is_refused(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = str(tmp_path / "people")
    for subset, named in ((["3-6"], "person 3"), ([], "set verification.people")):
        path = mixed_recipe(tmp_path, teacher, verification={"benchmark": people, "people": subset})
        with pytest.raises(SystemExit):
            command(main)(["--config", str(path)])
        assert named in capsys.readouterr().err


def test_labels_that_do_not_fit_are_named_before_the_run(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"class_path": "distill.losses.margin.ArcFace", "init_args": {"embedding_dim": 16, "classes": 4}}
    frozen = {"class_path": "distill.losses.adaptive_centers.FrozenCenters", "init_args": head["init_args"]}
    cache = ["--teacher_cache", str(tmp_path / "cache")]
    for loss, arguments, named in (
        (head, [], "losses.head needs labels"),
        (head, ["--pseudo_identities", "6"], "needs teacher_cache"),
        (head, ["--pseudo_identities", "6", *cache], "losses.head is for 4 classes, and the faces have 6 identities"),
        (frozen, cache, "losses.head needs labels"),
    ):
        path = corpus_recipe(tmp_path, teacher)
        settings = yaml.safe_load(path.read_text()) | {"losses": {"head": {"loss": loss}}}
        path.write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit):
            command(main)(["--config", str(path), *arguments])
        assert named in capsys.readouterr().err
    path = recipe(tmp_path, teacher)
    with pytest.raises(SystemExit):
        command(main)(["--config", str(path), "--pseudo_identities", "6", *cache])
    assert "OnlineSource is none" in capsys.readouterr().err
