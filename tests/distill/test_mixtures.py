"""Mixtures: exact shares in every batch, the same for any number of processes, and real faces that nobody overlooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.augment import Augment
from distill.mixtures import MixedRng, MixtureSource, Part, exact_counts, whole_parts
from distill.sources import FolderSource, OnlineSource, Place
from distill.teachers import CachedTeacher, FrozenTeacher, MixedTeacher
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output
from mining.resampling import SynthDistillRule
from tests.distill.test_sources import folder, generator
from tests.distill.test_teachers import net


def mixture(
    path: Path, rank: int = 0, processes: int = 1, rule: SynthDistillRule | None = None, **shares: float
) -> MixtureSource:
    """Fifteen training faces of people ``a``, seventeen of ``b`` after three that are held out, and a generator."""
    shares = shares or {"a": 1, "b": 2, "drawn": 1}
    parts = {}
    for name in shares:
        if name == "drawn":
            parts[name] = Part(OnlineSource(generator=generator(), resampling=rule), shares[name])
        else:
            if not (path / name).exists():
                folder(path / name, people=3 if name == "a" else 4)
            source = FolderSource(path=str(path / name), size=32, aligned=True, views=2)
            parts[name] = Part(source, shares[name])
    made = MixtureSource(parts=parts, held_out="b" if "b" in parts else None, size=32)
    made.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes, held_out=3))
    return made


def test_every_batch_holds_exact_shares_and_parts_show_each_face_once_an_epoch(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    assert source.counts == {"a": 2, "b": 4, "drawn": 2}
    rows: dict[str, list[int]] = {"a": [], "b": []}
    for step in range(8):
        batch = source.batch(step)
        assert batch.images.shape == (8, 3, 32, 32)
        for name, (where, part) in batch.parts.items():
            assert len(where) == source.counts[name]
            if name in rows:
                rows[name] += part.rows.tolist()
                assert torch.equal(batch.images[where], part.images.float()), "each face stands at its own place"
    # Fifteen faces of a, none held out; twenty of b, of which three are.
    assert sorted(rows["a"][:15]) == list(range(15))
    assert sorted(rows["b"][:17]) == list(range(17))
    assert torch.equal(source.held_out(), source.sources["b"].held_out())


def test_identities_of_the_parts_are_kept_apart_and_the_unlabelled_have_none(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    assert source.labelled and source.classes == 7
    batch = source.batch(0)
    for name, (where, part) in batch.parts.items():
        expected = {"a": 0, "b": 3}.get(name)
        if expected is None:
            assert (batch.labels[where] == -1).all()
        else:
            assert torch.equal(batch.labels[where], part.labels + expected)


def test_faces_of_parts_without_groups_come_by_themselves(tmp_path: Path) -> None:
    settings = {"path": str(folder(tmp_path / "a", people=3, images=8)), "size": 32, "aligned": True}
    parts = {
        "grouped": Part(FolderSource(**settings, together=4, scattered=0.5), 1),
        "single": Part(FolderSource(**settings), 1),
    }
    source = MixtureSource(parts=parts)
    source.prepare(Place(seed=3, batch_size=16))
    batch = source.batch(0)
    assert source.scatters and batch.scattered is not None
    assert batch.scattered[source.where["single"]].all()
    assert torch.equal(batch.scattered[source.where["grouped"]], batch.parts["grouped"][1].scattered)
    assert batch.scattered.sum() == 12
    assert mixture(tmp_path / "other").batch(0).scattered is None


def test_landmarks_of_the_parts_stand_at_their_faces_and_the_others_have_none(tmp_path: Path) -> None:
    source, drawn = mixture(tmp_path), Rng.of(0, "landmarks", range(15)).uniform(5, 2)
    assert source.batch(0).landmarks is None
    source.sources["a"].landmarks = drawn
    batch = source.batch(0)
    where, part = batch.parts["a"]
    assert torch.equal(batch.landmarks[where], drawn[part.rows])
    others = torch.cat([batch.parts[name][0] for name in ("b", "drawn")])
    assert batch.landmarks.shape == (8, 5, 2) and batch.landmarks[others].isnan().all()
    # As the loop has it: they move with their own faces.
    augment = Augment(rotate=20.0, shift=0.1)
    assert torch.equal(augment.points(batch.landmarks, batch.rng)[where], augment.points(drawn[part.rows], part.rng))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_of_one(tmp_path: Path, processes: int) -> None:
    shares = {"a": 1, "b": 1} if processes == 4 else {}
    whole = mixture(tmp_path, **shares)
    pieces = [mixture(tmp_path, rank, processes, **shares) for rank in range(processes)]
    for step in (0, 6):
        batch, parts = whole.batch(step), [piece.batch(step) for piece in pieces]
        torch.testing.assert_close(
            torch.cat([p.images for p in parts]).float(), batch.images.float(), atol=1e-3, rtol=0
        )
        assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
        assert torch.equal(torch.cat([p.rng.uniform(3) for p in parts]), batch.rng.uniform(3))


def test_each_face_is_augmented_as_its_own_source_would(tmp_path: Path) -> None:
    source, augment = mixture(tmp_path), Augment(noise=1.0, blur=0.5, gray=0.5)
    batch = source.batch(4)
    together = augment(batch.images, batch.rng)
    for where, part in batch.parts.values():
        alone = augment(batch.images[where], part.rng)
        torch.testing.assert_close(together[where], alone, atol=1e-3, rtol=1e-5)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_mixed_numbers_are_the_parts_numbers(sizes: list[int], seed: int) -> None:
    parts = [Rng.of(seed, f"part {i}", range(10 * i, 10 * i + n), step=i) for i, n in enumerate(sizes)]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    mixed = MixedRng.join(parts, order)
    expected = torch.cat([part.child("x").uniform(2) for part in parts])[order]
    assert torch.equal(mixed.child("x").uniform(2), expected)
    some = torch.arange(0, len(order), 2).flip(0)
    assert torch.equal(mixed.rows(some).child("x").uniform(2), expected[some])
    assert torch.equal(mixed.child("x").rows(slice(1, None)).uniform(2), expected[1:])


def test_feedback_reaches_the_part_that_resamples_and_survives_a_checkpoint(tmp_path: Path) -> None:
    source = mixture(tmp_path, rule=SynthDistillRule(coefficient=0.5))
    batch = source.batch(0)
    where = batch.parts["drawn"][0]
    embedding = torch.eye(8)
    teacher = embedding.clone()
    teacher[where[0]] *= -1  # one drawn face on which they disagree
    source.feedback(batch, Output(embedding), Output(teacher))
    again = source.batch(1)
    moved = (again.images - batch.images)[where].flatten(1).abs().mean(1)
    assert moved[0] < 1e-3 < moved[1]
    resumed = mixture(tmp_path, rule=SynthDistillRule(coefficient=0.5))
    resumed.load_state_dict(source.state_dict())
    torch.testing.assert_close(resumed.batch(1).images, again.images, atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="'else'"):
        resumed.load_state_dict({"else/scales": torch.zeros(2)})


def test_a_cached_teacher_answers_for_the_parts_that_recur(tmp_path: Path) -> None:
    source, augment = mixture(tmp_path), Augment()
    layers = ("stages.0",)
    caches = {
        name: CachedTeacher(
            net(),
            None,
            folder=tmp_path / "cache",
            source=source.sources[name],
            augment=augment,
            seed=3,
            features=layers,
        )
        for name in ("a", "b")
    }
    for cache in caches.values():
        cache.fill(0, 1, torch.device("cpu"), list)
        cache.see = None  # from here on the recognizer is not asked about their faces
    teacher, asked = MixedTeacher(net(), None, layers, caches), FrozenTeacher(net(), None, layers)
    for step in range(4):
        batch = source.batch(step)
        images = augment(batch.images, batch.rng)
        found, truth = teacher(images, batch), asked.see(images)
        torch.testing.assert_close(found.embedding, truth.embedding, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.features["stages.0"], truth.features["stages.0"], atol=1e-4, rtol=1e-4)


def test_the_record_says_whose_faces_are_real(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    assert source.real and source.record()["real_share"] == 0.75
    records = {record["part"]: record for record in source.records()}
    assert records["a"]["real_faces"] and not records["drawn"]["real_faces"]
    assert records["b"]["faces_per_batch"] == 4 and records["b"]["held_out"] and not records["a"]["held_out"]
    drawn = MixtureSource(parts={"drawn": Part(OnlineSource(generator=generator()), 1.0)})
    drawn.prepare(Place(batch_size=4))
    assert not drawn.real
    # What only validation looks at is real too.
    assert mixture(tmp_path, b=0, drawn=1).real


def test_two_generators_of_one_kind_draw_different_faces() -> None:
    parts = {name: Part(OnlineSource(generator=generator()), 1.0) for name in ("x", "y")}
    source = MixtureSource(parts=parts)
    source.prepare(Place(batch_size=8))
    faces = source.batch(0).images.flatten(1)
    assert (torch.pdist(faces) > 1).all()


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_shares_that_are_counts_are_met(counts: list[int]) -> None:
    shares = {str(i): n / sum(counts) for i, n in enumerate(counts)}
    assert list(exact_counts(shares, sum(counts)).values()) == counts
    assert sum(whole_parts(shares, 17).values()) == 17


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a 115\.2, b 12\.8 faces of the parts, not whole numbers; use batch_size 130"
    ):
        exact_counts({"a": 0.9, "b": 0.1}, 128)
    with pytest.raises(InputError, match="positive share"):
        MixtureSource(parts={})
    source = OnlineSource(generator=generator())
    with pytest.raises(InputError, match="held_out is 'c'; the parts are a"):
        MixtureSource(parts={"a": Part(source, 1.0)}, held_out="c")
    with pytest.raises(InputError, match="a: 1 faces of a batch cannot be split over 2 processes"):
        mixture(tmp_path, 0, 2, a=1, b=7)
    source = mixture(tmp_path)
    source.size = None
    with pytest.raises(InputError, match="differ in size"):
        source.batch(0)
