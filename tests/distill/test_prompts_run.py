"""Runs with prompts in the teacher and landmarks of the faces: they resume, learn, and say what does not fit."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import multiprocessing

import faceless
from distill.checkpoints import Checkpoints, Metrics
from distill.losses.cross_architecture import URFM, PromptGuard
from distill.objective import Objective
from distill.prompts import PromptedTeacher, Prompts
from distill.sources import Batch
from distill.train import main
from faceless.errors import InputError, command
from faceless.randomness import Rng
from tests.distill.test_sources import folder
from tests.distill.test_train import corpus_recipe, student_bytes

pytest.importorskip("timm")

SIDES = {"centers": 4, "dim": 8, "heads": 2, "teacher_learns": True}
LAYERS = {"student_layer": "stages.1", "teacher_layer": "model.blocks.5"}


def transformer() -> faceless.Recognizer:
    return faceless.create("timm", model="test_vit", embedding_dim=16, input_size=160, framing="dlib", seed=0)


def prompted_recipe(folder: Path) -> Path:
    net = transformer()
    faceless.save(net, folder / "vit", {})
    path = corpus_recipe(folder, folder / "vit")
    marks = np.random.default_rng(0).uniform(0.2, 0.8, (64, 5, 2)).astype(np.float32)
    marks[::7] = np.nan
    np.save(folder / "landmarks.npy", marks)
    settings = yaml.safe_load(path.read_text())
    settings["source"]["init_args"] |= {"landmarks": str(folder / "landmarks.npy")}
    settings["losses"] = {
        "cosine": {"loss": {"class_path": "distill.losses.embedding.CosineEmbedding"}},
        "urfm": {"loss": {"class_path": "distill.losses.cross_architecture.URFM", "init_args": LAYERS | SIDES}},
        "guard": {"loss": {"class_path": "distill.losses.cross_architecture.PromptGuard"}},
    }
    settings |= {
        "prompts": {"tokens": 5},
        "steps": 5,
        "checkpoint_every": 2,
        "center": False,
        "validation": {"faces": 0},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_prompts_learn_and_a_run_with_them_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path / "cache"))
    path = prompted_recipe(tmp_path)
    faces = folder(tmp_path / "faces", people=2, images=2)
    check = ["--verification", json.dumps({"benchmark": str(faces), "people": [], "bootstrap": 0})]
    main(["--config", str(path), "--output", str(tmp_path / "whole"), *check])
    # What this teacher says is not what its file says.
    assert not (tmp_path / "cache" / "embeddings").exists()
    saved = Checkpoints(tmp_path / "whole" / "checkpoints", 1).latest()
    learned = {name: value for name, value in saved["objective"].items() if name.startswith("prompts.")}
    initial = Prompts(tokens=5).into(transformer())
    assert len(learned) == len(initial) == 6
    assert all((value - before).abs().max() > 1e-4 for value, before in zip(learned.values(), initial))

    class StoppedError(Exception):
        pass

    write = Metrics.write

    def failing(self: Metrics, entry: dict) -> None:
        if entry["step"] > 3:
            raise StoppedError
        write(self, entry)

    monkeypatch.setattr(Metrics, "write", failing)
    with pytest.raises(StoppedError):
        main(["--config", str(path), "--output", str(tmp_path / "torn")])
    monkeypatch.setattr(Metrics, "write", write)
    main(["--config", str(path), "--output", str(tmp_path / "torn")])
    assert student_bytes(tmp_path / "torn") == student_bytes(tmp_path / "whole")
    # Landmarks are not for show.
    marks = np.load(tmp_path / "landmarks.npy")
    np.save(tmp_path / "landmarks.npy", np.full_like(marks, np.nan))
    main(["--config", str(path), "--output", str(tmp_path / "template")])
    assert student_bytes(tmp_path / "template") != student_bytes(tmp_path / "whole")


def test_what_does_not_go_with_prompts_or_landmarks_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompted_recipe(tmp_path)
    slim = faceless.create("slimresnet", embedding_dim=16, input_size=32, widths=[8, 16], depths=[1, 1])
    faceless.save(slim, tmp_path / "slim", {})
    short = tmp_path / "short.npy"
    np.save(short, np.zeros((3, 5, 2), np.float32))
    for arguments, named in (
        (["--teacher", str(tmp_path / "slim")], "prompts need a ViT or Swin of timm"),
        (["--teacher_cache", str(tmp_path / "cache")], "remove teacher_cache"),
        (["--prompts", "null"], "the teacher has no 'prompted': PromptGuard is for a teacher with prompts"),
        (["--prompts.tokens", "0"], "prompts.tokens is 0"),
        (["--losses.urfm.loss.init_args.teacher_learns", "false"], "prompts: no loss lets the teacher learn"),
        (["--adaptive.rule", "matched"], "adaptive.rule matched follows gradients of the student"),
        (["--losses.urfm.loss.init_args.framing", "arcface"], "losses.urfm: framing is arcface, and the teacher knows"),
        (["--source.init_args.landmarks", str(short)], "short.npy: holds float32 (3, 5, 2)"),
        (["--source.init_args.landmarks", str(path)], "not a readable .npy file of landmarks"),
    ):
        with pytest.raises(SystemExit):
            command(main)(["--config", str(path), *arguments])
        assert named in capsys.readouterr().err
    settings = yaml.safe_load(path.read_text())
    del settings["losses"]["guard"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="teacher_learns is for a teacher with prompts"):
        main(["--config", str(path), "--prompts", "null"])
    with pytest.raises(InputError, match="add a PromptGuard"):
        main(["--config", str(path)])


def learn(rank: int = 0, processes: int = 1) -> torch.Tensor:
    """Prompts after some steps on six faces, of which each process sees its share."""
    student = faceless.create("slimresnet", embedding_dim=16, input_size=32, widths=[8], depths=[1], seed=0).eval()
    net = transformer()
    prompts = Prompts(tokens=3).into(net)
    urfm = URFM(**{**LAYERS, "student_layer": "stages.0"}, **SIDES)
    losses = {"urfm": urfm, "guard": PromptGuard()}
    objective = Objective(losses, dict.fromkeys(losses, 1.0), student_dim=16, teacher_dim=16)
    objective.prompts = prompts
    objective.probe(student, net)
    names = objective.student_features
    teacher = PromptedTeacher(net, features=objective.teacher_features)
    optimizer = torch.optim.SGD(objective.parameters(), 1.0)
    whole = objective if processes == 1 else torch.nn.parallel.DistributedDataParallel(objective)
    images = 255 * Rng.of(0, "faces", range(6)).uniform(3, 32, 32)
    share = slice(rank * 6 // processes, (rank + 1) * 6 // processes)
    batch = Batch(images[share], Rng.of(0, "view", range(6)))
    for _ in range(3):
        loss, _ = whole(student(batch.images, features=names), teacher(batch.images, batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([p.detach() for p in prompts])


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(learn(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_prompts_follow_the_faces_of_all_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    expected = learn()
    start = torch.stack([p.detach() for p in Prompts(tokens=3).into(transformer())])
    assert (expected - start).abs().max() > 1e-4
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
