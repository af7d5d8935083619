"""Sources: the same faces for any number of processes and from any step, held-out faces apart, feedback that counts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distill.sources import FolderSource, OnlineSource, ParquetSource, Place, read_labels
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


def parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def encoded(*shades: int, side: int = 32) -> list[bytes]:
    found = []
    for shade in shades:
        file = io.BytesIO()
        Image.new("RGB", (side, side), (shade, 0, 0)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def test_parquet_files_of_others_are_read_with_their_labels(tmp_path: Path) -> None:
    whose = ["ann", "bob", "ann", None, "cid", "bob"]
    images = encoded(10, 20, 30, 40, 50, 60)
    records = [{"bytes": data, "path": "x.png"} for data in images]
    parquet(tmp_path / "b.parquet", image=records[3:], label=whose[3:])
    parquet(tmp_path / "a.parquet", image=records[:3], label=whose[:3])
    source = ParquetSource(path=str(tmp_path), size=16)
    source.prepare(Place(batch_size=2, held_out=2))
    assert source.real and source.record()["real_faces"] and source.size == 4 and source.classes == 3
    assert source.labels.tolist() == [0, 1, 0, -1, 2, 1]
    assert source.faces(torch.arange(6))[:, 0].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30, 40, 50, 60]
    batch = source.batch(0)
    assert torch.equal(batch.labels, source.labels[batch.rows])
    plain = ParquetSource(path=str(parquet(tmp_path / "c.parquet", face=images)), image="face", label=None, real=False)
    plain.prepare(Place(batch_size=2))
    assert not plain.labelled and not plain.real and plain.batch(0).images.shape == (2, 3, 112, 112)
    assert plain.fingerprint() != source.fingerprint()


def test_parquet_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    wide = io.BytesIO()
    Image.new("L", (5000, 4)).save(wide, "PNG")
    path = parquet(tmp_path / "x.parquet", image=[b"no image", wide.getvalue()], label=[0, 1])
    for changes, named in (
        ({"image": "imgae"}, "did you mean image"),
        ({"path": str(tmp_path / "y")}, "not a readable"),
    ):
        source = ParquetSource(**({"path": str(path)} | changes))
        with pytest.raises(InputError, match=named):
            source.prepare(Place(batch_size=1))
    source = ParquetSource(path=str(path))
    source.prepare(Place(batch_size=1))
    with pytest.raises(InputError, match="row 0 holds no readable image"):
        source.faces(torch.tensor([0]))
    with pytest.raises(InputError, match="row 1 is 5000 x 4"):
        source.faces(torch.tensor([1]))


def test_people_of_a_folder_and_labels_of_a_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces", people=4)
    source = FolderSource(path=str(path), people="2-3", size=32, aligned=True)
    source.prepare(Place(batch_size=4))
    assert source.people() == [(str(path), "2-3")] and source.record()["identities"] == ["p1", "p2"]
    assert source.size == 10 and source.classes == 2
    everybody = real(path, held_out=0)
    assert torch.equal(source.faces(torch.arange(10)), everybody.faces(torch.arange(5, 15)))
    np.save(tmp_path / "labels.npy", np.array([3, -1, 7]))
    assert read_labels(tmp_path / "labels.npy").tolist() == [3, -1, 7]
    with pytest.raises(InputError, match="one for each of 20 faces"):
        everybody.label(torch.tensor([3, -1, 7]))
    for wrong in (np.zeros(3), np.zeros((2, 2), int)):
        np.save(tmp_path / "labels.npy", wrong)
        with pytest.raises(InputError, match="one whole number"):
            read_labels(tmp_path / "labels.npy")
