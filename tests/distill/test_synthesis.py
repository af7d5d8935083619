"""Data-free sources: the same faces whenever stopped and for any number of processes, and a run that learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import faceless
from distill.sources import Batch, Place
from distill.synthesis import SynthesisSource
from distill.train import main
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.generators.adversarial import GeneratorTraining, LatentInversion

TINY = {"widths": [8], "depths": [1], "embedding_dim": 8, "input_size": 32}
SMALL = {"latent_dim": 8, "channels": 4, "directions": 8}


def network(seed: int) -> Recognizer:
    net = faceless.create("slimresnet", seed=seed, **TINY).train()
    with torch.no_grad():
        for k in range(10):
            net(Rng.of(k, "faces", range(8)).uniform(3, 32, 32, low=0, high=255))
    return net.eval().requires_grad_(False)


def source(kind: str, rank: int = 0, processes: int = 1) -> SynthesisSource:
    if kind == "drawn":
        method = GeneratorTraining(**SMALL, category=1.0, adversarial=1.0)
        made = SynthesisSource(synthesizer=method, every=2)
    else:
        method = LatentInversion(**SMALL, statistics=1.0, category=1.0, iterations=1, momentum=0.9)
        made = SynthesisSource(synthesizer=method, every=2, faces=6, pool=15, priority=1.0)
    made.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes))
    made.watch(network(0), network(1))
    return made


def judged(batch: Batch) -> tuple[Output, Output]:
    brightness = batch.images.float().flatten(1)[:, :8]
    return Output(brightness), Output(brightness.flip(1) + 1)


@pytest.mark.parametrize("kind", ["drawn", "pool"])
def test_stopped_at_any_step_and_split_over_processes(kind: str) -> None:
    whole = source(kind)
    halves = [source(kind, rank, 2) for rank in range(2)]
    states, images = [], []
    for step in range(6):
        states.append({key: value.clone() for key, value in whole.state_dict().items()})
        batch = whole.batch(step)
        images.append(batch.images)
        parts = [half.batch(step) for half in halves]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.rng.indices for part in parts]), batch.rng.indices)
        whole.feedback(batch, *judged(batch))
        for half in halves:  # what two processes would gather
            half.worth = whole.worth.clone()
    for step in (3, 4):
        resumed = source(kind)
        resumed.load_state_dict(states[step])
        assert torch.equal(resumed.batch(step).images, images[step])
        assert torch.equal(resumed.batch(step).images, images[step])  # asked again
    assert not torch.equal(images[0], images[1])
    assert whole.student.training


def test_the_pool_holds_the_newest_and_favors_what_is_worth_it() -> None:
    made = source("pool")
    made.keep(torch.arange(20.0).view(-1, 1, 1, 1).expand(-1, 3, 32, 32))
    assert sorted(made.kept[:, 0, 0, 0].tolist()) == list(range(5, 20))
    made.worth[:] = 0.0
    made.worth[[4, 9]] = torch.tensor([1.0, 3.0])
    drawn = made.choose(Rng.of(0, "test", range(4000)))
    assert set(drawn.tolist()) == {4, 9}
    assert abs((drawn == 9).float().mean() - 0.75) < 0.03


def test_feedback_is_the_cosine_distance() -> None:
    made = source("pool")
    batch = made.batch(0)
    assert batch.rows is not None
    student = torch.eye(8)
    teacher = torch.eye(8).clone()
    teacher[0] = -teacher[0]
    made.feedback(batch, Output(student), Output(teacher))
    latest = {int(row): place for place, row in enumerate(batch.rows)}
    for row, place in latest.items():
        alike = {p for p, r in enumerate(batch.rows) if int(r) == row}
        if len(alike) == 1:
            assert made.worth[row] == pytest.approx(2.0 if place == 0 else 1e-3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"every": 0}, "every must be"),
        ({"priority": 1.0}, "priority needs a pool"),
        ({"synthesizer": LatentInversion(**SMALL)}, "set pool"),
    ],
)
def test_bad_arguments(arguments: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        SynthesisSource(**{"synthesizer": GeneratorTraining(**SMALL)} | arguments)


def test_faces_that_do_not_exist_yet_cannot_be_held_out() -> None:
    with pytest.raises(InputError, match=r"validation\.faces must be 0"):
        SynthesisSource(synthesizer=GeneratorTraining(**SMALL)).prepare(Place(held_out=4))


@pytest.mark.parametrize("recipe", ["data_free_dafl", "data_free_fast"])
def test_a_run_from_nothing_but_a_teacher_resumes_exactly(tmp_path: Path, recipe: str) -> None:
    faceless.save(network(0), tmp_path / "teacher")

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        init = "source.init_args"
        arguments = {
            "config": f"distill/recipes/{recipe}.yaml",
            "teacher": str(tmp_path / "teacher"),
            "student.options": json.dumps({"widths": [8], "depths": [1]}),
            "student.input_size": 32,
            f"{init}.synthesizer.init_args.channels": 4,
            f"{init}.synthesizer.init_args.directions": 8,
            "output": str(tmp_path / name),
            "steps": 6,
            "batch_size": 8,
            "checkpoint_every": 3,
            "verification.benchmark": "null",
            "tensorboard": "false",
            "threads": 1,
        }
        if recipe == "data_free_fast":
            arguments |= {f"{init}.faces": 4, f"{init}.pool": 16, f"{init}.every": 2}
        main([text for key, value in arguments.items() for text in (f"--{key}", str(value))] + list(more))
        return faceless.load(tmp_path / name / "student").state_dict()

    whole = run("whole")
    run("cut")
    for path in (tmp_path / "cut" / "checkpoints").iterdir():
        if "6" in path.name:
            path.unlink()
    assert list((tmp_path / "cut" / "checkpoints").iterdir())
    again = run("cut")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    settings = yaml.safe_load((tmp_path / "whole" / "settings.yaml").read_text())
    assert settings["validation"]["faces"] == 0
    record = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert "synthesis" in json.dumps(record) and '"real_faces": true' not in json.dumps(record)
