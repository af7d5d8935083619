"""The teacher cache says what the teacher says, survives interruption, and knows when it does not apply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import faceless
from distill import teachers
from distill.augment import Augment
from distill.losses.adaptive_centers import class_centers
from distill.sources import FolderSource, Place
from distill.teachers import CachedTeacher, FrozenTeacher
from faceless.errors import InputError
from tests.distill.test_sources import folder


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    found = FolderSource(path=str(folder(tmp_path / "faces")), size=32, aligned=True, views=2)
    found.prepare(Place(seed=3, batch_size=4, held_out=3))
    return found


def net() -> faceless.Recognizer:
    torch.manual_seed(0)
    return faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1))


def cached(source: FolderSource, path: Path, seed: int = 3, augment: Augment | None = None) -> CachedTeacher:
    return CachedTeacher(net(), None, folder=path, source=source, augment=augment or Augment(), seed=seed)


def test_cached_answers_are_the_teachers(source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "PART", 5)  # several parts
    teacher, asked = cached(source, tmp_path / "cache"), FrozenTeacher(net())
    monkeypatch.setattr(teachers, "OPEN", 2)
    teacher.fill(0, 2, torch.device("cpu"), list)
    assert teacher.missing(), "the other process has its share to do"
    teacher.fill(1, 2, torch.device("cpu"), list)  # looks at what is there only now, and takes its own share even so
    assert not teacher.missing()
    everything = []
    for step in range(6):
        batch = source.batch(step)
        images = Augment()(batch.images, batch.rng)
        truth = asked(images, batch).embedding
        torch.testing.assert_close(teacher(images, batch).embedding, truth, atol=1e-4, rtol=1e-4)
        everything.append(truth)
    torch.testing.assert_close(teacher.mean(), torch.cat(everything).mean(0), atol=1e-4, rtol=1e-4)
    assert len(teacher._open) == 2


def test_an_interrupted_filling_ends_with_the_same_bytes(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "PART", 5)
    whole, torn = cached(source, tmp_path / "a"), cached(source, tmp_path / "b")
    whole.fill(0, 1, torch.device("cpu"), list)
    torn.fill(0, 1, torch.device("cpu"), lambda work: work[:3])
    assert len(torn.missing()) == 3
    torn.fill(0, 1, torch.device("cpu"), list)
    files = sorted(p.relative_to(whole.folder) for p in whole.folder.rglob("*.npy"))
    assert len(files) == 6
    for name in files:
        assert (whole.folder / name).read_bytes() == (torn.folder / name).read_bytes()


def test_another_seed_or_augmentation_is_another_cache(source: FolderSource, tmp_path: Path) -> None:
    folders = {
        cached(source, tmp_path).folder,
        cached(source, tmp_path, seed=4).folder,
        cached(source, tmp_path, augment=Augment(gray=1.0)).folder,
    }
    assert len(folders) == 3


def test_damage_is_named(source: FolderSource, tmp_path: Path) -> None:
    teacher = cached(source, tmp_path)
    teacher.fill(0, 1, torch.device("cpu"), list)
    path = teacher.path(0, 0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged teacher cache"):
        teacher(torch.zeros(4, 3, 32, 32), source.batch(0))


def test_views_must_be_counted(source: FolderSource, tmp_path: Path) -> None:
    source.views = None
    with pytest.raises(InputError, match="views"):
        cached(source, tmp_path)


def test_a_frozen_teacher_stays_frozen() -> None:
    teacher = FrozenTeacher(net())
    teacher.train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.see(torch.rand(4, 3, 32, 32) * 255)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_teacher_of_plain_faces_answers_once_for_all_views(source: FolderSource, tmp_path: Path) -> None:
    teacher = CachedTeacher(net(), None, folder=tmp_path, source=source, augment=None, seed=3)
    teacher.fill(0, 1, torch.device("cpu"), list)
    assert len(list(teacher.folder.rglob("*.npy"))) == 1
    asked = FrozenTeacher(net())
    for step in range(6):
        batch = source.batch(step)
        truth = asked.see(batch.images).embedding
        torch.testing.assert_close(teacher(batch.images, batch).embedding, truth, atol=1e-4, rtol=1e-4)


def test_features_lie_beside_the_embeddings_which_runs_without_them_share(source: FolderSource, tmp_path: Path) -> None:
    plain = cached(source, tmp_path)
    plain.fill(0, 1, torch.device("cpu"), list)
    before = {path: path.stat().st_mtime_ns for path in plain.folder.rglob("*.npy")}
    layers = ("stages.0", "stages.1")
    teacher = CachedTeacher(net(), None, folder=tmp_path, source=source, augment=Augment(), seed=3, features=layers)
    assert teacher.folder == plain.folder and teacher.missing()
    teacher.fill(0, 1, torch.device("cpu"), list)
    assert not teacher.missing()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    asked = FrozenTeacher(net(), None, layers)
    for step in (0, 4):
        batch = source.batch(step)
        images = Augment()(batch.images, batch.rng)
        found, truth = teacher(images, batch), asked(images, batch)
        for layer in layers:
            torch.testing.assert_close(found.features[layer], truth.features[layer], atol=1e-4, rtol=1e-4)
    path = teacher.path(0, 0, "stages.1")
    path.write_bytes(path.read_bytes()[:200])
    teacher._open.clear()
    with pytest.raises(InputError, match="damaged teacher cache"):
        teacher(torch.zeros(4, 3, 32, 32), source.batch(0))


def test_class_centers_are_the_mean_unit_embeddings_of_all_views(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "PART", 5)
    teacher = cached(source, tmp_path)
    teacher.fill(0, 1, torch.device("cpu"), list)
    labels = torch.tensor([0, 1, 1, -1, 3, 0, 0, 1, 3, 3, -1, 0])
    mean, rows = teacher.mean(), torch.arange(12)
    asked, found = FrozenTeacher(net()), []
    for view in range(2):
        images = Augment()(source.faces(rows), source.augmentation(rows, view))
        found.append(asked.see(images).embedding - mean)
    torch.testing.assert_close(teacher.embeddings() - mean, found[0], atol=1e-4, rtol=1e-4)
    expected = class_centers(torch.cat(found), labels.repeat(2), 4)
    torch.testing.assert_close(teacher.class_centers(labels, 4, mean), expected, atol=1e-4, rtol=1e-4)
    assert (teacher.class_centers(labels, 4)[2] == 0).all()
