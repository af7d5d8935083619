"""Every regime in two processes is what it is in one, and a killed one goes on to the same bytes."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from torch import multiprocessing

import faceless
from distill.train import main
from tests.distill.test_ensembles import ensemble_recipe
from tests.distill.test_prompts_run import prompted_recipe
from tests.distill.test_regimes import PEER, mutual, snapshots
from tests.distill.test_train import (
    TINY,
    corpus_recipe,
    finished,
    kill_and_resume,
    launch,
    lines,
    recipe,
    student_bytes,
)

REGIMES = ("ensemble", "snapshots", "mutual", "deep_mutual", "degrade", "chain", "prompts", "running", "refo")
SHORT: dict[str, Any] = {"steps": 5, "checkpoint_every": 2, "validation": {"faces": 8, "every": 5, "neighbors": 3}}


def running() -> dict[str, Any]:
    """Losses that follow running statistics, count their steps, or learn a parameter."""
    named: dict[str, dict[str, Any]] = {
        "adaptive_parameters.AdaptiveILED": {},
        "adaptive_parameters.AdaptiveRPSD": {"embedding_dim": 16, "size": 24},
        "adaptive_parameters.AdaptiveQUD": {"embedding_dim": 16, "queue_size": 32, "rule": "learned"},
        "ranking.EKD": {"same_person": 0.2, "one_in": [2, 5]},
        "ranking.PairwiseRanking": {"scores": 20},
    }
    kinds = {
        name.split(".")[1]: {"class_path": f"distill.losses.{name}", "init_args": given}
        for name, given in named.items()
    }
    return {name: {"loss": loss} for name, loss in kinds.items()}


def deep_mutual() -> dict[str, Any]:
    """Two students that classify, and nobody else."""
    deep = {"class_path": "distill.losses.mutual.DeepMutual", "init_args": {"embedding_dim": 16, "classes": 8}}
    return {"peers": [PEER], "losses": {"deep": {"loss": deep}}, "center": False}


def refo(folder: Path) -> dict[str, Any]:
    """A network that was trained before learns on, and a proxy holds it back with a weight that follows gradients."""
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=5, **TINY)
    faceless.save(net, folder / "start", {})
    given = {"embedding_dim": 16, "classes": 8, "start": "teacher"}
    margin = {"class_path": "distill.losses.margin.ArcFace", "init_args": given}
    proxy = {"class_path": "distill.losses.embedding.FeatureL2", "init_args": {"form": "unit"}}
    losses = {"arcface": {"loss": margin}, "proxy": {"loss": proxy}}
    start = {"student": {"start": str(folder / "start")}, "teacher_cache": str(folder / "cache")}
    return start | {"losses": losses, "adaptive": {"rule": "matched"}, "center": False}


def change(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
    return path


def write(name: str, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    net = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", **TINY)
    faceless.save(net, folder / "teacher", {})
    kinds: dict[str, dict[str, Any]] = {
        "ensemble": {},
        "snapshots": snapshots(folder / "stages", 2),
        "mutual": mutual(1),
        "degrade": {"degrade": {"resolutions": [16, 8], "schedule": "descending", "mask": 0.5, "occlude": 0.5}},
        "chain": {"chain": [{}, {}]},
        "running": {"losses": running(), "adaptive": {"rule": "magnitude", "every": 2}},
    }
    if name == "ensemble":
        return ensemble_recipe(folder, **SHORT | changes)
    if name == "prompts":
        return change(prompted_recipe(folder), SHORT | changes)
    if name in ("deep_mutual", "refo"):
        np.save(folder / "identities.npy", np.arange(64) % 8)
        path = corpus_recipe(folder, folder / "teacher")
        source = yaml.safe_load(path.read_text())["source"]
        source["init_args"]["labels"] = str(folder / "identities.npy")
        regime = deep_mutual() if name == "deep_mutual" else refo(folder)
        return change(path, {"source": source} | regime | SHORT | changes)
    return recipe(folder, folder / "teacher", **SHORT | kinds[name] | changes)


def work(rank: int, ports: list[int], folder: str) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in here.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="1")
    seen = []
    for name, port in zip(REGIMES, ports):
        os.environ["MASTER_PORT"] = str(port)
        main(["--config", f"{folder}/{name}/recipe.yaml", "--output", f"{folder}/{name}/two"])
        seen.append(PartialState().num_processes)
        AcceleratorState._reset_state(reset_partial_state=True)  # the processes of a run part at its end
    torch.save(seen, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regimes")
    for name in REGIMES:
        write(name, folder / name)
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in REGIMES]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    multiprocessing.spawn(work, args=(ports, str(folder)), nprocs=2)
    for rank in range(2):
        assert torch.load(folder / f"{rank}.pt", weights_only=True) == [2] * len(REGIMES)
    return folder


@pytest.mark.parametrize("name", REGIMES)
def test_two_processes_are_one(runs: Path, name: str) -> None:
    main(["--config", str(runs / name / "recipe.yaml"), "--output", str(runs / name / "one")])
    one, two = ([e["loss"] for e in lines(runs / name / kind) if "loss" in e] for kind in ("one", "two"))
    assert len(one) == 5 and one == pytest.approx(two, rel=1e-3)
    assert (runs / name / "two" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_killed_at_random_moments(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path / name, steps=60, checkpoint_every=5)
    started = time.monotonic()
    finished(launch(path, tmp_path / "whole"))
    took = time.monotonic() - started
    before = student_bytes(tmp_path / "whole")
    # In the same folder, as a chain's students name it.
    (tmp_path / "whole").rename(tmp_path / "aside")
    kill_and_resume(path, tmp_path / "whole", 3, took)
    assert student_bytes(tmp_path / "whole") == before
