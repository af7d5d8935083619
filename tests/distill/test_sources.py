"""Sources: the same faces for any number of processes and from any step, held-out faces apart, feedback that counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.sources import FolderSource, OnlineSource, Place
from faceless.errors import InputError
from faceless.recognizer import Output
from mining.resampling import SynthDistillRule
from synth.generators.dcgan import DCGAN


def generator() -> DCGAN:
    torch.manual_seed(0)
    return DCGAN(None, latent_dim=8, channels=4)


def online(rank: int = 0, processes: int = 1, rule: SynthDistillRule | None = None) -> OnlineSource:
    source = OnlineSource(generator=generator(), resampling=rule)
    source.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes, held_out=5))
    return source


def folder(path: Path, people: int = 3, images: int = 5) -> Path:
    numbers = np.random.default_rng(0)
    for person in range(people):
        (path / f"p{person}").mkdir(parents=True)
        for image in range(images):
            pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"p{person}" / f"{image}.png")
    return path


def real(path: Path, rank: int = 0, processes: int = 1, held_out: int = 3, views: int | None = None) -> FolderSource:
    source = FolderSource(path=str(path), size=32, aligned=True, views=views)
    source.prepare(Place(seed=3, batch_size=4, rank=rank, processes=processes, held_out=held_out))
    return source


def test_processes_share_the_faces_of_one() -> None:
    whole = online()
    halves = [online(rank, 2) for rank in range(2)]
    for step in (0, 7):
        parts = [half.batch(step) for half in halves]
        batch = whole.batch(step)
        torch.testing.assert_close(torch.cat([p.images for p in parts]), batch.images, atol=1e-3, rtol=0)
        assert torch.equal(torch.cat([p.rng.indices for p in parts]), batch.rng.indices)


def test_every_step_draws_other_faces_and_none_is_held_out() -> None:
    source = online()
    seen = torch.cat([source.batch(step).images for step in range(4)]).flatten(1).round()
    assert len(seen.unique(dim=0)) == 32
    aside = source.held_out().float().flatten(1)
    assert len(aside) == 5
    assert torch.cdist(aside, seen).min() > 10


def test_resampling_follows_agreement() -> None:
    rule = SynthDistillRule(coefficient=0.5)
    source = online(rule=rule)
    fresh = source.batch(0)
    student = Output(torch.eye(8))
    teacher = Output(torch.cat([torch.eye(8)[:4], -torch.eye(8)[4:]]))  # four agreements, four opposites
    source.feedback(fresh, student, teacher)
    again = source.batch(1)
    moved = (again.images - fresh.images).flatten(1).abs().mean(1)
    assert (moved[:4] > 5e-3).all(), "agreeing faces move on"
    assert (moved[4:] < 1e-5).all(), "opposite faces are looked at again where they are"
    # What a resumed run knows is enough for the same second step.
    resumed = online(rule=rule)
    resumed.load_state_dict(source.state_dict())
    torch.testing.assert_close(resumed.batch(1).images, again.images, atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="needs the feedback of step 2"):
        resumed.batch(3)


def test_an_epoch_shows_each_training_face_once_and_held_out_ones_never(tmp_path: Path) -> None:
    source = real(folder(tmp_path / "faces"))
    rows = torch.cat([source.position(step)[0] for step in range(9)])  # 36 samples: three epochs of 12
    for epoch in rows.split(12):
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(rows[:12], rows[12:24])
    assert torch.equal(source.batch(2).images, source.benchmark.images[rows[8:12]])
    assert torch.equal(source.held_out(), source.benchmark.images[12:])
    assert source.real and source.record()["real_faces"]


def test_rows_are_shared_between_processes_and_steps_can_be_asked_in_any_order(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    whole, halves = real(path), [real(path, rank, 2) for rank in range(2)]
    for step in (5, 0, 3):
        assert torch.equal(torch.cat([half.batch(step).images for half in halves]), whole.batch(step).images)


def test_views_recur(tmp_path: Path) -> None:
    source = real(folder(tmp_path / "faces"), views=2)
    views = [source.batch(step).view for step in range(9)]
    assert views == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    rows = torch.tensor([4, 1])
    assert torch.equal(source.augmentation(rows, 1).uniform(3), source.augmentation(rows, 1).uniform(3))
    assert not torch.equal(source.augmentation(rows, 1).uniform(3), source.augmentation(rows, 0).uniform(3))


def test_impossible_batches_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    with pytest.raises(InputError, match="do not fill one batch"):
        real(path, held_out=12)
    with pytest.raises(InputError, match="cannot be split evenly over 3"):
        real(path, processes=3)
