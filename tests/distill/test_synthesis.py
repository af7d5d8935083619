"""Data-free sources: the same faces whenever stopped and for any number of processes, and a run that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import faceless
from distill.losses.embedding import CosineEmbedding
from distill.mixtures import MixtureSource, Part
from distill.objective import Objective
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
        made = SynthesisSource(synthesizer=method, every=2, faces=6, pool=15, priority=1.0, correction=(0.4, 1.0))
    made.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes, steps=10))
    made.watch(network(0), network(1))
    return made


def judged(batch: Batch) -> tuple[Output, Output]:
    brightness = batch.images.float().flatten(1)[:, :8]
    return Output(brightness), Output(brightness.flip(1) + 1)


@pytest.mark.parametrize("pool", [0, 15])
def test_no_ensemble_is_aligned_on_faces_that_do_not_exist_yet(pool: int) -> None:
    early = SynthesisSource(synthesizer=GeneratorTraining(**SMALL, category=1.0, adversarial=1.0), pool=pool)
    early.prepare(Place(batch_size=8))
    with pytest.raises(InputError, match="name one recognizer as teacher"):
        early.sample(4)


@pytest.mark.parametrize("kind", ["drawn", "pool"])
def test_stopped_at_any_step_and_split_over_processes(kind: str) -> None:
    whole = source(kind)
    halves = [source(kind, rank, 2) for rank in range(2)]
    states, images, weights = [], [], []
    for step in range(6):
        states.append({key: value.clone() for key, value in whole.state_dict().items()})
        batch = whole.batch(step)
        images.append(batch.images)
        parts = [half.batch(step) for half in halves]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.rng.indices for part in parts]), batch.rng.indices)
        if kind == "pool":
            weights.append(batch.weights)
            assert torch.equal(torch.cat([part.weights for part in parts]), batch.weights)
        whole.feedback(batch, *judged(batch))
        for half in halves:  # what two processes would gather
            half.worth = whole.worth.clone()
    for step in (3, 4):
        resumed = source(kind)
        resumed.load_state_dict(states[step])
        assert torch.equal(resumed.batch(step).images, images[step])
        again = resumed.batch(step)  # asked again
        assert torch.equal(again.images, images[step])
        assert kind == "drawn" or torch.equal(again.weights, weights[step])
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


def replayed(worth: list[float], priority: float = 0.7) -> SynthesisSource:
    made = source("pool")
    made.priority, made.stored = priority, len(worth)
    made.worth[: len(worth)] = torch.tensor(worth)
    return made


def test_weights_make_up_for_what_is_drawn_more_often() -> None:
    """(N P)^-exponent, which grows from 0.4 to 1 over the run's ten steps; 1 leaves nothing of the priorities."""
    worth = [0.1, 1.3, 0.02, 0.5, 1e-3]
    made, rows = replayed(worth), torch.arange(5)
    chance = np.array(worth) ** 0.7 / (np.array(worth) ** 0.7).sum()
    for step, exponent in ((0, 0.4), (5, 0.7), (10, 1.0)):
        np.testing.assert_allclose(made.weights(rows, step), (5 * chance) ** -exponent, rtol=1e-5)
    terms = np.array([3.0, -1.0, 4.0, 1.0, 5.0])
    assert (chance * made.weights(rows, 10).numpy() * terms).sum() == pytest.approx(terms.mean(), rel=1e-5)
    assert (chance * terms).sum() != pytest.approx(terms.mean(), rel=0.1)


def test_the_expected_gradient_is_that_of_the_whole_pool() -> None:
    """Each drawn face moves the student by its weight; over many draws that is the gradient of the plain mean."""
    made = replayed([0.2, 1.3, 0.05, 0.5])
    numbers = torch.Generator().manual_seed(0)
    faces, teacher = (torch.randn(4, 6, generator=numbers, dtype=torch.float64) for _ in range(2))
    objective = Objective({"cosine": CosineEmbedding()}, {"cosine": 1.0}, student_dim=6, teacher_dim=6)

    def gradient(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        net = torch.eye(6, dtype=torch.float64, requires_grad=True)
        loss, _ = objective(Output(faces[rows] @ net), Output(teacher[rows]), None, weights)
        return torch.autograd.grad(loss, net)[0]

    drawn = made.choose(Rng.of(0, "test", range(200_000)))
    whole = gradient(torch.arange(4))
    error = (gradient(drawn, made.weights(drawn, 10)) - whole).norm() / whole.norm()
    assert error < 0.02 < (gradient(drawn) - whole).norm() / whole.norm() / 5


def test_a_loss_that_cannot_weight_faces_is_refused_before_the_first_step(tmp_path: Path) -> None:
    faceless.save(network(0), tmp_path / "teacher")
    given = {
        "config": "distill/recipes/data_free_ssd.yaml",
        "teacher": tmp_path / "teacher",
        "output": tmp_path / "run",
        "precision": "fp32",
    }
    loss = {"loss": {"class_path": "distill.losses.relational.RKDDistance"}}
    given |= {"verification.benchmark": "null", "losses": json.dumps({"relations": loss})}
    with pytest.raises(InputError, match=r"losses\.relations: RKDDistance is no mean over single faces.*correction"):
        main([text for key, value in given.items() for text in (f"--{key}", str(value))])
    assert not (tmp_path / "run").exists()


def test_weights_in_a_mixture_are_those_of_the_part() -> None:
    synthesis = source("pool")
    drawn = GeneratorTraining(**SMALL, category=1.0)
    parts = {"made": Part(synthesis, 0.5), "drawn": Part(SynthesisSource(synthesizer=drawn), 0.5)}
    mixed = MixtureSource(parts=parts)
    assert mixed.weighs
    mixed.prepare(Place(seed=3, batch_size=8, steps=10))
    mixed.watch(network(0), network(1))
    mixed.batch(0)
    synthesis.worth[:6] = torch.linspace(0.1, 1.0, 6)
    batch = mixed.batch(0)
    where, part = batch.parts["made"]
    assert torch.equal(batch.weights[where], part.weights) and len(set(part.weights.tolist())) > 1
    assert (batch.weights[batch.parts["drawn"][0]] == 1).all()


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
        ({"pool": 4, "correction": (0.0, 1.0)}, "makes up for priority"),
        ({"pool": 4, "priority": 1.0, "correction": (0.0, 1.5)}, "lie in 0..1"),
        ({"synthesizer": LatentInversion(**SMALL)}, "set pool"),
    ],
)
def test_bad_arguments(arguments: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        SynthesisSource(**{"synthesizer": GeneratorTraining(**SMALL)} | arguments)


def test_faces_that_do_not_exist_yet_cannot_be_held_out() -> None:
    with pytest.raises(InputError, match=r"validation\.faces must be 0"):
        SynthesisSource(synthesizer=GeneratorTraining(**SMALL)).prepare(Place(held_out=4))


@pytest.mark.parametrize("recipe", ["data_free_dafl", "data_free_fast", "data_free_ssd"])
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
            "precision": "fp32",
        }
        if recipe != "data_free_dafl":
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
