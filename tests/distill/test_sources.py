"""Sources: the same faces for any number of processes and from any step, held-out faces apart, feedback that counts."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import faceless
from distill import sources
from distill.mixtures import MixtureSource, Part
from distill.sources import CorpusSource, FolderSource, OnlineSource, ParquetSource, Place, read_labels, read_landmarks
from distill.train import main
from faceless import align
from faceless.errors import InputError
from faceless.randomness import permutation
from faceless.recognizer import Output
from mining.resampling import SynthDistillRule
from synth.generators.dcgan import DCGAN
from tests.synth.test_corpus import write as corpus


def generator() -> DCGAN:
    torch.manual_seed(0)
    return DCGAN(None, latent_dim=8, channels=4)


def online(rank: int = 0, processes: int = 1, rule: SynthDistillRule | None = None) -> OnlineSource:
    source = OnlineSource(generator=generator(), resampling=rule)
    source.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes, held_out=5))
    return source


def folder(path: Path, people: int = 3, images: int = 5, side: int = 32) -> Path:
    numbers = np.random.default_rng(0)
    for person in range(people):
        (path / f"p{person}").mkdir(parents=True)
        for image in range(images):
            pixels = numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)
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
    files = sorted((tmp_path / "faces").glob("*/*"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    assert torch.equal(source.batch(2).images, pixels[rows[8:12]])
    assert torch.equal(source.held_out(), pixels[12:])
    assert source.real and source.record()["real_faces"]


def test_rows_are_shared_between_processes_and_steps_can_be_asked_in_any_order(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    whole, halves = real(path), [real(path, rank, 2) for rank in range(2)]
    for step in (5, 0, 3):
        assert torch.equal(torch.cat([half.batch(step).images for half in halves]), whole.batch(step).images)


def test_a_batch_across_the_end_of_an_epoch_is_of_one_view_on_any_number_of_processes(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    whole, halves = (
        [real(path, rank, processes, held_out=1, views=2) for rank in range(processes)] for processes in (1, 2)
    )
    for step in (2, 3, 10):  # of 14 faces: samples 12 to 15 and 40 to 43 cross, and there the halves part
        batch, parts = whole[0].batch(step), [half.batch(step) for half in halves]
        assert {part.view for part in parts} == {batch.view} == {4 * step // 14 % 2}
        assert torch.equal(torch.cat([part.rows for part in parts]), batch.rows)
        assert torch.equal(torch.cat([part.rng.uniform(3) for part in parts]), batch.rng.uniform(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_need_not_wait_for_faces(tmp_path: Path) -> None:
    source = FolderSource(path=str(folder(tmp_path / "faces")), size=32, aligned=True)
    source.prepare(Place(batch_size=4, device=torch.device("cuda")))
    assert all(source.batch(step).images.is_pinned() for step in range(2))


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


def test_the_orders_of_two_epochs_are_made_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(sources, "permutation", lambda *given: made.append(given) or permutation(*given))
    source = real(folder(tmp_path / "faces"), held_out=1)  # 14 faces in batches of 4
    rows = torch.cat([source.batch(step).rows for step in range(14)])
    assert [sorted(epoch.tolist()) for epoch in rows.split(14)] == [list(range(14))] * 4
    assert len(made) == 5  # the fifth for the batch that is read ahead


def test_a_folder_of_any_size_is_read_when_its_faces_are_wanted(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces", people=5001, images=0)
    (face,) = encoded(30)
    for person in path.iterdir():
        (person / "0.png").write_bytes(face)  # one each, and more than a benchmark takes
    (path / "p4000" / "0.png").write_bytes(b"no image")
    source = FolderSource(path=str(path), size=16, aligned=True)
    source.prepare(Place(batch_size=4, held_out=4))
    assert source.size == 4997 and source.classes == 5001
    assert (
        source.faces(torch.tensor([7, 5000])).shape == (2, 3, 16, 16) and source.faces(torch.tensor([])).shape[0] == 0
    )
    with pytest.raises(InputError, match=r"p4000/0\.png: cannot be read as an image"):
        source.faces(torch.tensor([1, 4000]))
    Image.new("RGB", (20, 30)).save(path / "p1" / "0.png")
    with pytest.raises(InputError, match="20 x 30 pixels are no aligned square crop; say aligned: false"):
        source.faces(torch.tensor([1]))


def test_a_fingerprint_changes_with_any_face(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    before = real(path).record()["fingerprint"]
    assert real(path).record()["fingerprint"] == before
    Image.new("RGB", (32, 32)).save(path / "p1" / "2.png")
    assert real(path).record()["fingerprint"] != before


def test_faces_that_are_cut_otherwise_than_the_teacher_knows_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "faces")
    crops = FolderSource(path=str(path), aligned=True, framing="arcface")
    assert crops.check_framing("arcface") is None
    with pytest.raises(InputError, match=r"faces: its faces are arcface crops, and the teacher knows dlib crops"):
        crops.check_framing("dlib")
    whole, cut = OnlineSource(generator=generator()), OnlineSource(generator=generator(), landmarks=True)
    assert "OnlineSource: does not say" in whole.check_framing("arcface") and cut.check_framing("dlib") is None
    table = str(parquet(tmp_path / "x.parquet", image=encoded(1, 2)))
    assert "does not say" in ParquetSource(path=table, label=None).check_framing("dlib")
    assert ParquetSource(path=table, label=None, framing="dlib").check_framing("dlib") is None
    with pytest.raises(InputError, match="framing is 'arkface'"):
        ParquetSource(path=table, framing="arkface")
    for framing, line in ((None, "does not say"), ("dlib", "are dlib crops")):
        written = CorpusSource(path=str(corpus(tmp_path / f"corpus-{framing}", framing=framing)))
        with pytest.raises(InputError, match=line) if framing else nullcontext():
            assert line in written.check_framing("arcface")
        written.prepare(Place(batch_size=4))
        assert written.record()["framing"] == framing
    # Of a corpus that is still to be written, the recipe says it.
    planned = CorpusSource(path=str(tmp_path / "none"), recipe="synth/recipes/quickstart.yaml")
    assert planned.check_framing("dlib") is None and not (tmp_path / "none").exists()
    mixed = MixtureSource(parts={"a": Part(whole, 1), "b": Part(crops, 1)})
    with pytest.raises(InputError, match="are arcface crops"):
        mixed.check_framing("dlib")
    assert mixed.check_framing("arcface").count("does not say") == 1


@pytest.mark.parametrize("framing", ["dlib", "arcface"])
def test_online_faces_are_cut_to_the_framing_by_its_own_landmarks(framing: str) -> None:
    """Eyes and mouth, found anew in the crops among dlib's 68 points, lie where the template has them."""
    pytest.importorskip("dlib")
    source = OnlineSource(generator=DCGAN(), landmarks=True, framing=framing, size=112, detect_size=112)
    source.prepare(Place(batch_size=12))
    crops = source.batch(0).images.round().clamp(0, 255).byte()
    marks = align.detect(crops, points=68, detect_size=224, landmark_size=224)
    assert marks.found.sum() >= 4
    roll = align.geometry(marks.points[marks.found], framing)[0]
    found = align.arcface_points(marks.points[marks.found]).mean(0)
    expected = align.template(framing, "arcface5", 112)
    assert (found - expected).norm(dim=1).max() < 5 and roll.abs().median() < 6
    for wrong in ({"tries": 0}, {"size": 8}, {"framing": "arkface"}):
        with pytest.raises(InputError, match=r"tries must be|size is 8|framing is 'arkface'"):
            OnlineSource(generator=generator(), **wrong)


def test_a_run_compares_framings_before_it_makes_a_face(tmp_path: Path) -> None:
    net = faceless.create("slimresnet", embedding_dim=8, input_size=32, framing="arcface", widths=[4, 8], depths=[1, 1])
    faceless.save(net, tmp_path / "teacher", {})
    loss = {"cosine": {"loss": {"class_path": "distill.losses.embedding.CosineEmbedding"}}}
    source = {"path": str(tmp_path / "corpus"), "recipe": "synth/recipes/quickstart.yaml"}
    settings = {
        "teacher": str(tmp_path / "teacher"),
        "output": str(tmp_path / "run"),
        "source": {"class_path": "distill.sources.CorpusSource", "init_args": source},
        "student": {"name": "slimresnet", "input_size": 32, "options": {"widths": [4, 8], "depths": [1, 1]}},
        "losses": loss,
        "verification": {"benchmark": None},
        "device": "cpu",
        "precision": "fp32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="are dlib crops, and the teacher knows arcface crops"):
        main(["--config", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "corpus").exists()


def test_labels_of_another_corpus_are_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus")
    np.save(tmp_path / "labels.npy", np.arange(600) % 5)
    source = CorpusSource(path=str(path), labels=str(tmp_path / "labels.npy"), faces=100)
    source.prepare(Place(batch_size=4))
    assert source.labels.tolist() == [row % 5 for row in range(100)]
    np.save(tmp_path / "labels.npy", np.arange(700) % 5)
    with pytest.raises(InputError, match=r"labels\.npy: 700 labels, and .*corpus has 600 faces"):
        source.prepare(Place(batch_size=4))
    # Of as many faces, but of others: mining/identities.py notes beside them of which.
    np.save(tmp_path / "identities.npy", np.arange(600) % 5)
    noted = CorpusSource(path=str(path), labels=str(tmp_path / "identities.npy"))
    for fingerprint in (source.fingerprint, None):
        (tmp_path / "identities.json").write_text(json.dumps({"fingerprint": fingerprint} if fingerprint else {}))
        noted.prepare(Place(batch_size=4))
    (tmp_path / "identities.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    with pytest.raises(InputError, match=r"identities\.npy: made of other faces than .*corpus has now.*identities\.py"):
        noted.prepare(Place(batch_size=4))
    np.save(tmp_path / "landmarks.npy", np.zeros((600, 5, 2), np.float32))
    (tmp_path / "landmarks.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    with pytest.raises(InputError, match=r"landmarks\.npy: made of other faces than .*corpus has now.*landmarks\.py"):
        CorpusSource(path=str(path), landmarks=str(tmp_path / "landmarks.npy")).prepare(Place(batch_size=4))


def test_a_finished_corpus_needs_no_generator(tmp_path: Path) -> None:
    torch.save(generator().state_dict(), tmp_path / "net.pt")
    made = {"weights": str(tmp_path / "net.pt"), "latent_dim": 8, "channels": 4}
    recipe = {
        "generator": {"class_path": "synth.generators.dcgan.DCGAN", "init_args": made},
        "count": 12,
        "block": 4,
        "align": None,
        "workers": 0,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = CorpusSource(path=str(tmp_path / "corpus"), recipe=str(tmp_path / "recipe.yaml"))
    source.write()
    (tmp_path / "net.pt").unlink()
    source.write()
    source.prepare(Place(batch_size=4))
    assert source.size == 12
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"count": 13}))
    with pytest.raises(InputError, match="holds a corpus with count 12, and the settings say 13"):
        source.write()


def test_the_record_says_whose_identities_a_corpus_shows(tmp_path: Path) -> None:
    whose = {"file_sha256": "0" * 64, "real": None}
    source = CorpusSource(path=str(corpus(tmp_path, generator={"generator": "Diffusion", "identities_from": whose})))
    source.prepare(Place(batch_size=4))
    assert source.record()["identities_from"] == whose


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
    assert plain.fingerprint != source.fingerprint
    assert len(plain.held_out()) == 0


def test_what_another_column_or_a_killed_command_holds_is_something_else(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", one=encoded(10, 20), two=encoded(200, 210))
    (tmp_path / ".tmp-0123456789ab-b.parquet").write_bytes(b"PAR1 torn")
    columns = [ParquetSource(path=str(tmp_path), image=name, label=None, size=16) for name in ("one", "two")]
    for source, first in zip(columns, (10, 200), strict=True):
        source.prepare(Place(batch_size=2))
        assert source.total() == 2 and source.faces(torch.tensor([0]))[0, 0, 0, 0] == first
    assert columns[0].fingerprint != columns[1].fingerprint


def test_row_groups_are_read_when_they_are_wanted_and_the_latest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encoded(*range(40))
    pq.write_table(pa.table({"image": rows[:30]}), tmp_path / "a.parquet", row_group_size=5)
    pq.write_table(pa.table({"image": rows[30:]}), tmp_path / "b.parquet", row_group_size=5)
    monkeypatch.setattr(sources, "KEPT", 3 * 5 * len(rows[0]))
    source = ParquetSource(path=str(tmp_path), label=None, size=32)
    source.prepare(Place(batch_size=4))
    assert not source.encoded._kept  # nothing yet
    wanted = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(source.faces(wanted)[:, 0, 0, 0].long(), wanted)
    assert len(source.encoded._kept) <= 3
    monkeypatch.setattr(sources, "MAX_GROUP", 4 * len(rows[0]))
    with pytest.raises(InputError, match=r"\.parquet: a row group holds .*row_group_size.*or set in_memory"):
        source.prepare(Place(batch_size=4))
    kept = ParquetSource(path=str(tmp_path), label=None, size=32, in_memory=True)
    kept.prepare(Place(batch_size=4))
    assert torch.equal(kept.faces(wanted)[:, 0, 0, 0].long(), wanted)


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
    oblong = io.BytesIO()
    Image.new("RGB", (40, 30)).save(oblong, "PNG")
    source = ParquetSource(path=str(parquet(tmp_path / "o.parquet", image=[oblong.getvalue()])), label=None)
    source.prepare(Place(batch_size=1))
    with pytest.raises(InputError, match="row 0: 40 x 30 pixels are no aligned square crop"):
        source.faces(torch.tensor([0]))


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


def test_faces_of_one_identity_come_together_and_each_once_an_epoch(tmp_path: Path) -> None:
    path = folder(tmp_path, people=5, images=7)
    source = FolderSource(path=str(path), size=32, aligned=True, together=3)
    source.prepare(Place(seed=3, batch_size=8, held_out=3))
    source.label(torch.where(torch.arange(35) == 4, -1, source.labels))
    epochs = [torch.cat([source.position(step)[0] for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(32))
        labels = source.labels[rows].tolist()
        # 7 faces are groups of 3, 3 and 1; a face without an identity stands alone.
        changes = sum(a != b for a, b in pairwise(labels))
        assert changes <= 5 * 3 + 1
        lengths = [len(list(group)) for label, group in groupby(labels) if label >= 0]
        assert max(lengths) >= 3 and sum(length >= 3 for length in lengths) >= 5
    assert epochs[0].tolist() != epochs[1].tolist()
    halves = []
    for rank in range(2):
        half = FolderSource(path=str(path), size=32, aligned=True, together=3)
        half.prepare(Place(seed=3, batch_size=8, rank=rank, processes=2, held_out=3))
        half.label(source.labels)
        halves.append(half.position(1)[0])
    assert torch.cat(halves).tolist() == source.position(1)[0].tolist()
    source.labels = None
    source._orders = {}
    with pytest.raises(InputError, match="together is 3, and the faces have no labels"):
        source.position(0)
    with pytest.raises(InputError, match="together is 0"):
        FolderSource(path=str(path), together=0)


def test_half_of_the_groups_are_scattered_evenly(tmp_path: Path) -> None:
    path = folder(tmp_path, people=12, images=8)
    settings: dict[str, Any] = {"path": str(path), "size": 32, "aligned": True, "together": 4}
    source = FolderSource(**settings, scattered=0.5)
    source.prepare(Place(seed=3, batch_size=16))
    for epoch in range(2):
        rows, alone = (torch.cat(parts) for parts in zip(*(source.position(6 * epoch + i) for i in range(6))))
        assert sorted(rows.tolist()) == list(range(96))
        # In every batch half and half: groups of four of one identity, and four in any order.
        assert (alone.view(6, 16).sum(1) == 8).all()
        labels = source.labels[rows].view(24, 4)
        same = (labels == labels[:, :1]).all(1)
        assert same[~alone.view(24, 4)[:, 0]].all() and same[alone.view(24, 4)[:, 0]].sum() <= 3
    batch = source.batch(0)
    assert batch.scattered is not None and torch.equal(batch.scattered, source.position(0)[1])
    plain = FolderSource(**settings)
    plain.prepare(Place(seed=3, batch_size=16))
    assert plain.batch(0).scattered is None
    for wrong in ({"scattered": 1.0}, {"scattered": 0.0}, {"scattered": 0.5, "together": 1}):
        with pytest.raises(InputError, match="scattered is"):
            FolderSource(**settings | wrong)


def test_archives_and_pixels_are_no_labels_and_landmarks(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", a=np.zeros(3, int))
    for read in (read_labels, lambda path: read_landmarks(path, 3)):
        with pytest.raises(InputError, match=r"z.npz: not a readable .npy file of \w+, but an archive"):
            read(tmp_path / "z.npz")
    marks = np.full((3, 5, 2), 0.4, np.float32)
    marks[1] = np.nan
    np.save(tmp_path / "marks.npy", marks)
    assert read_landmarks(tmp_path / "marks.npy", 3).shape == (3, 5, 2)
    np.save(tmp_path / "marks.npy", 32 * marks)
    with pytest.raises(InputError, match=r"marks.npy: landmarks reach from 12.8 to 12.8; .* not in pixels"):
        read_landmarks(tmp_path / "marks.npy", 3)
