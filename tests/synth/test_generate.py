"""Corpora from small real runs: same bytes whatever happens, and one line for whatever is wrong."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from faceless import align
from faceless.errors import InputError
from faceless.randomness import Rng
from synth.corpus import Corpus
from synth.generate import complete, generate, read_settings
from synth.generators.dcgan import DCGAN
from synth.near import judges

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SMALL = {
    "generator": {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"weights": None, "channels": 8}},
    "count": 700,
    "shard_rows": 300,
    "block": 64,
    "align": None,
    "image_format": "png",
    "workers": 0,
}


def settings(folder: Path, **changes):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output": str(folder)} | changes))
    return read_settings(["--config", str(path)])


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop("settings.yaml")  # names the folder
    return files


def command(folder: Path, *options: str, **how) -> subprocess.CompletedProcess:
    line = [
        sys.executable,
        str(ROOT / "synth/generate.py"),
        "--config",
        str(folder.parent / f"{folder.name}.yaml"),
        *options,
    ]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **how)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A finished corpus of whole random pictures, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("corpora") / "small"
    generate(settings(folder), progress=False)
    return folder


def test_a_folder_is_looked_at_before_anything_that_the_settings_name_is_built(small, tmp_path):
    """Settings may come with a stranger's corpus, and a finished corpus may be all that a machine has."""
    shutil.copytree(small, tmp_path / "copy")
    assert complete(settings(tmp_path / "copy")) and not complete(settings(tmp_path / "new"))
    other = {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"weights": str(tmp_path / "missing.pth")}}
    with pytest.raises(InputError, match="holds a corpus with generator"):
        generate(settings(tmp_path / "copy", generator=other, repair=True))
    (tmp_path / "copy/manifest.json").write_text(
        json.dumps(json.loads((small / "manifest.json").read_text()) | {"settings": None})
    )
    with pytest.raises(InputError, match="holds a corpus with"):
        generate(settings(tmp_path / "copy"))


def test_corpus_holds_what_the_generator_makes(small):
    corpus = Corpus(small)
    net = DCGAN(None, channels=8)
    rows = torch.tensor([0, 699, 300, 299, 5])
    z = net.sample_latents(5, Rng.of(0, "latents", rows))
    assert torch.equal(corpus.latents(rows), z)
    assert torch.equal(torch.from_numpy(corpus.column("index"))[rows], rows)
    difference = corpus.images(rows).float() - net.synthesize(z)
    assert difference.abs().max() <= 0.51  # png is lossless; what is lost is rounding
    corpus.verify()
    assert len(corpus) == 700 and [s["rows"] for s in corpus.shards] == [300, 300, 100]
    manifest = corpus.manifest
    assert manifest["real_faces"] is False
    assert manifest["counts"] == {"candidates": 704, "accepted": 704, "rejected": {}}
    assert not (small / ".blocks").exists()
    sheet = (small / "DATASHEET.md").read_text()
    assert "700 generated faces, 64 x 64 RGB, png" in sheet and "No row is a photograph" in sheet
    assert Image.open(small / "contact_sheet.png").size == (16 * 96, 8 * 96)


def test_any_number_of_processes_gives_the_same_bytes(small, tmp_path, monkeypatch):
    """And makes no block that nobody needs: those of an inversion take minutes."""
    begun = []
    monkeypatch.setattr("shutil.rmtree", lambda folder, **_: begun.extend(Path(folder).glob("*.json")))
    generate(settings(tmp_path / "two", workers=2), progress=False)
    assert sorted(path.stem for path in begun if path.stem.isdigit()) == [f"{n:06d}" for n in range(-(-700 // 64))]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "two" / ".blocks")
    assert contents(tmp_path / "two") == contents(small)


def test_two_ranks_share_the_work(small, tmp_path):
    settings(tmp_path / "ranks")
    line = [sys.executable, str(ROOT / "synth/generate.py"), "--config", str(tmp_path / "ranks.yaml")]
    ranks = [
        subprocess.Popen(line, env=ENVIRONMENT | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"})
        for r in (0, 1)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert contents(tmp_path / "ranks") == contents(small)


@pytest.mark.parametrize("after", ["000001.json", "shards.json"])
def test_killed_and_resumed_gives_the_same_bytes(small, tmp_path, after):
    folder = tmp_path / "killed"
    settings(folder, workers=1)
    line = [sys.executable, str(ROOT / "synth/generate.py"), "--config", str(tmp_path / "killed.yaml")]
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (folder / ".blocks" / after).is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (folder / "manifest.json").exists():  # it nearly always is in the middle
        with pytest.raises(InputError, match="no finished corpus"):
            Corpus(folder)
    generate(settings(folder), progress=False)
    assert contents(folder) == contents(small)


def test_interrupted_inside_a_shard_keeps_what_was_done(tmp_path, small):
    """Stop behind a full shard, in a block that reaches into the next one, whose record is then damaged."""
    from synth import generate as module

    made = settings(tmp_path / "half")
    built = made.build()
    run = module.Run(built, module.recorded(made, built), 0, 1)
    run.begin(made.yaml())
    with run.pool() as pool:
        for number in range(6):
            pool.advance(number)
    (tmp_path / "half" / ".blocks" / "000005.json").write_text("{")  # cut by a power failure on a poor file system
    generate(made, progress=False)
    assert contents(tmp_path / "half") == contents(small)


@pytest.mark.parametrize("name", ["settings.json", "shards.json"])
@pytest.mark.parametrize("text", ["{", "7"])
def test_damaged_notes_of_a_corpus_that_was_begun_are_one_line(tmp_path, name, text):
    from synth import generate as module

    made = settings(tmp_path / "begun")
    built = made.build()
    module.Run(built, module.recorded(made, built), 0, 1).begin(made.yaml())
    (tmp_path / "begun" / ".blocks" / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: damaged; delete .*begun"):
        generate(made, progress=False)


def test_settings_that_came_later_do_not_make_another_corpus(small):
    """A corpus that was begun before there were these settings is finished, not refused."""
    recorded = set(json.loads((small / "manifest.json").read_text())["settings"])
    assert recorded == {
        "generator", "count", "seed", "align", "image_format", "quality", "latent_dtype", "shard_rows", "block",
        "batch", "device", "min_acceptance",
    }  # fmt: skip


def test_drawing_apart_from_cutting_gives_the_same_bytes(small, tmp_path):
    """As with a GPU: this process draws, the workers cut and encode."""
    from synth import generate as module
    from synth.blocks import Pool

    class Apart(Pool):
        def __init__(self, *given):
            super().__init__(*given)
            self.shared = True

    made = settings(tmp_path / "apart", workers=2)
    built = made.build()
    run = module.Run(built, module.recorded(made, built), 0, 1)
    run.pool = lambda: Apart(built, run.blocks, 2, lambda _: True)
    run.begin(made.yaml())
    run.finish(progress=False)
    assert contents(tmp_path / "apart") == contents(small)


def test_one_face_needs_no_more_memory_than_another(tmp_path):
    """What is held grows with a row group and a block, not with the corpus."""
    small = SMALL | {"generator": {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"weights": None}}}
    small["generator"]["init_args"] |= {"channels": 1, "latent_dim": 512}
    code = (
        "import sys, resource, json\n"
        "from synth.generate import generate, read_settings\n"
        "generate(read_settings(['--config', sys.argv[1]]), progress=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for count in (600, 3000):
        settings(tmp_path / str(count), **small | {"count": count, "image_format": "jpeg", "shard_rows": 10_000})
        line = [sys.executable, "-c", code, str(tmp_path / f"{count}.yaml")]
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=True)
        peaks.append(int(done.stdout) / 1024)
    # 2,400 more rows of 512 numbers and an image are about 10 MB.
    assert peaks[1] - peaks[0] < 8, peaks


class TestAround:
    def mined(self, path, latents, **columns):
        rows = pa.FixedSizeListArray.from_arrays(pa.array(latents.reshape(-1)), latents.shape[1])
        pq.write_table(pa.table({"latent": rows} | columns), path)
        return str(path)

    def test_new_faces_lie_near_the_mined_ones(self, tmp_path):
        latents = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
        path = self.mined(tmp_path / "mined.parquet", latents, score=[0.0, 1.0, 3.0, 0.0, 0.0])
        corpus = generate(settings(tmp_path / "near", count=400, around=path, around_scale=0.1), progress=False)
        parents = corpus.column("parent")
        assert set(parents) == {1, 2} and (parents == 2).mean() == pytest.approx(0.75, abs=0.07)
        steps = corpus.column("latent") - latents[parents]
        assert steps.std() == pytest.approx(0.1, rel=0.02) and abs(steps.mean()) < 0.01
        faces = DCGAN(None, channels=8).synthesize(corpus.latents(range(8)))
        assert (corpus.images(range(8)) - faces).abs().max() <= 0.51
        assert "near given ones" in (tmp_path / "near/DATASHEET.md").read_text()
        # The file is known by what it holds, not by where it lies.
        moved = str(shutil.copy(path, tmp_path / "elsewhere.parquet"))
        assert len(generate(settings(tmp_path / "near", count=400, around=moved, around_scale=0.1))) == 400
        other = self.mined(tmp_path / "other.parquet", latents)
        with pytest.raises(InputError, match="around"):
            generate(settings(tmp_path / "near", count=400, around=other, around_scale=0.1))

    def test_whose_disagreement_was_mined_is_on_record(self, tmp_path):
        latents = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
        path = self.mined(tmp_path / "mined.parquet", latents)
        note = {"teacher": "t", "teacher_sha256": "a" * 64, "student": "s", "student_sha256": "b" * 64}
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"judges": json.dumps(note)}), path)
        corpus = generate(settings(tmp_path / "near", count=64, around=path), progress=False)
        assert corpus.manifest["mined_by"] == note
        assert "the student s (SHA-256 " + "b" * 64 in (tmp_path / "near/DATASHEET.md").read_text()
        for damaged in (json.dumps(note | {"student_sha256": "../.."}), "[" * 100_000, '{"teacher": 1}', "x"):
            pq.write_table(table.replace_schema_metadata({"judges": damaged}), path)
            with pytest.raises(InputError, match="note about teacher and student is damaged"):
                judges(path)

    def test_latents_of_another_generator_are_refused(self, tmp_path):
        """As many numbers, and noise to this one."""
        latents = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
        path = self.mined(tmp_path / "mined.parquet", latents)
        own = DCGAN(None, channels=8).provenance()
        table = pq.read_table(path)
        for note, line in (
            (own | {"weights_sha256": "0" * 64}, "of another generator .weights_sha256 0000"),
            (own | {"generator": "StyleGAN2"}, "of another generator .generator StyleGAN2, and here DCGAN"),
            ([1], "note about the generator is damaged"),
        ):
            pq.write_table(table.replace_schema_metadata({"generator": json.dumps(note)}), path)
            with pytest.raises(InputError, match=line):
                generate(settings(tmp_path / "bad", count=10, around=path), progress=False)
            assert not (tmp_path / "bad").exists()
        pq.write_table(table.replace_schema_metadata({"generator": json.dumps(own)}), path)
        assert len(generate(settings(tmp_path / "near", count=10, around=path), progress=False)) == 10

    def test_without_scores_each_in_turn_and_at_scale_0_the_same(self, tmp_path):
        latents = np.random.default_rng(0).normal(size=(7, 100)).astype(np.float16)
        path = self.mined(tmp_path / "mined.parquet", latents)
        one, two = (
            generate(settings(tmp_path / name, count=100, around=path, around_scale=0, workers=workers), False)
            for name, workers in (("one", 0), ("two", 2))
        )
        assert one.column("parent").tolist() == [i % 7 for i in range(100)]
        assert np.array_equal(one.column("latent"), latents.astype(np.float32)[one.column("parent")])
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        broken = next((tmp_path / "one/data").iterdir())
        broken.unlink()
        generate(settings(tmp_path / "one", count=100, around=path, around_scale=0, repair=True), False)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        assert two.columns[-1] == "parent"

    def test_files_that_do_not_fit_are_one_line(self, tmp_path):
        latents = np.ones((3, 100), np.float32)
        nan = latents.copy()
        nan[1, 1] = np.nan
        (tmp_path / "text.parquet").write_text("x")
        pq.write_table(pa.table({"face": [1]}), tmp_path / "none.parquet")
        # As many numbers as there should be, and none of them in its place.
        uneven = tmp_path / "uneven.parquet"
        pq.write_table(pa.table({"latent": [[1.0] * 99, [1.0] * 101]}), uneven)
        for path, line in (
            (tmp_path / "missing.parquet", "no such file"),
            (tmp_path / "text.parquet", "not readable as parquet"),
            (tmp_path / "none.parquet", "its columns are face"),
            (self.mined(tmp_path / "short.parquet", latents[:, :99]), "does not hold 100 finite numbers"),
            (self.mined(tmp_path / "nan.parquet", nan), "does not hold 100 finite numbers"),
            (uneven, "does not hold 100 finite numbers"),
            (self.mined(tmp_path / "minus.parquet", latents, score=[1.0, -1.0, 0.0]), "negative"),
            (self.mined(tmp_path / "zero.parquet", latents, score=[0.0, 0.0, 0.0]), "only zeros"),
        ):
            with pytest.raises(InputError, match=line) as caught:
                generate(settings(tmp_path / "bad", count=10, around=str(path)), progress=False)
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "bad").exists(), "the same output is free for the right file"


def test_latents_need_not_be_stored(small, tmp_path):
    corpus = generate(settings(tmp_path / "none", count=20, latent_dtype="none"), progress=False)
    assert "latent" not in corpus.columns
    assert torch.equal(corpus.images(range(20)), Corpus(small).images(range(20)))
    with pytest.raises(InputError, match="holds no latents"):
        corpus.latents([0])


def test_what_the_teacher_sees_is_stored_and_sorted_out_by(tmp_path):
    import faceless

    teacher = faceless.create("slimresnet", embedding_dim=16, input_size=32)
    faceless.save(teacher, tmp_path / "teacher")
    free = generate(settings(tmp_path / "free", count=64, teacher=str(tmp_path / "teacher")), progress=False)
    teacher.eval()
    with torch.inference_mode():
        expected = teacher(free.images(range(64))).embedding
    embedding, quality = free.column("embedding"), free.column("quality")
    assert np.allclose(embedding, expected.numpy(), atol=1e-4)
    assert np.allclose(quality, np.linalg.norm(embedding, axis=1), rtol=1e-5)
    # Floors: measured by SciPy on the pictures themselves.
    ndimage = pytest.importorskip("scipy.ndimage")
    luma = free.images(range(64)).permute(0, 2, 3, 1).numpy() @ np.float64([0.299, 0.587, 0.114])
    sharp = np.array([ndimage.laplace(face)[1:-1, 1:-1].var() for face in luma])
    contrast = luma.std(axis=(1, 2))
    floors = {
        "min_contrast": float(np.quantile(contrast, 0.2)),
        "min_sharpness": float(np.quantile(sharp, 0.3)),
        "min_norm": float(np.quantile(quality, 0.25)),
    }
    passed = (contrast >= floors["min_contrast"]) & (sharp >= floors["min_sharpness"]) & (quality >= floors["min_norm"])
    gated = generate(
        settings(tmp_path / "gated", count=int(passed.sum()), teacher=str(tmp_path / "teacher"), gate=floors), False
    )
    assert gated.column("index").tolist() == np.flatnonzero(passed).tolist()
    assert np.allclose(gated.column("contrast"), contrast[passed], rtol=1e-4)
    assert np.allclose(gated.column("sharpness"), sharp[passed], rtol=1e-4)
    rejected = gated.manifest["counts"]["rejected"]
    assert sum(rejected.values()) == 64 - passed.sum() and len(rejected) == 3
    sheet = (tmp_path / "gated/DATASHEET.md").read_text()
    assert "too blurred" in sheet and gated.manifest["settings"]["teacher_sha256"] in sheet
    with pytest.raises(InputError, match=r"knows arcface crops, and align.framing is dlib"):
        generate(settings(tmp_path / "cut", teacher=str(tmp_path / "teacher"), align={"framing": "dlib"}), False)
    with pytest.raises(InputError, match="min_norm needs a teacher"):
        generate(settings(tmp_path / "bad", gate={"min_norm": 1.0}), progress=False)


def test_hugging_face_datasets_stream_it(small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "parquet", data_files=str(small / "data/*.parquet"), split="train", streaming=True
    ).skip(298)
    corpus = Corpus(small)
    for number, row in zip(range(298, 303), rows):
        assert row["index"] == number
        assert np.array_equal(np.asarray(row["image"]), corpus.images([number])[0].permute(1, 2, 0).numpy())


def test_hugging_face_datasets_read_it(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(small / "data/*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    corpus = Corpus(small)
    assert len(loaded) == 700
    for row in (0, 450, 699):
        assert np.array_equal(np.asarray(loaded[row]["image"]), corpus.images([row])[0].permute(1, 2, 0).numpy())
        assert np.array_equal(np.float32(loaded[row]["latent"]), corpus.latents([row])[0].numpy())


@pytest.mark.parametrize(("image_format", "worst"), [("webp", 0), ("jpeg", 12)])
def test_other_image_formats(small, tmp_path, image_format, worst):
    corpus = generate(settings(tmp_path / image_format, count=40, image_format=image_format), progress=False)
    difference = corpus.images(range(40)).float() - Corpus(small).images(range(40)).float()
    assert difference.abs().mean() <= worst


def test_half_precision_latents_are_those_the_faces_come_from(tmp_path):
    corpus = generate(settings(tmp_path / "half", count=8, latent_dtype="float16"), progress=False)
    faces = DCGAN(None, channels=8).synthesize(corpus.latents(range(8)))
    assert (corpus.images(range(8)) - faces).abs().max() <= 0.51
    assert pq.read_schema(tmp_path / "half" / corpus.shards[0]["name"]).field("latent").type.value_type == "halffloat"


def test_aligned_corpus_of_the_real_generator(tmp_path):
    pytest.importorskip("dlib")
    generator = {"class_path": "synth.generators.dcgan.DCGAN"}
    how = {"framing": "dlib", "size": 80}
    corpus = generate(
        settings(tmp_path / "aligned", generator=generator, align=how, count=40, image_format="png"), progress=False
    )
    counts = corpus.manifest["counts"]
    assert counts["candidates"] == counts["accepted"] + sum(counts["rejected"].values())
    assert 0.5 < counts["accepted"] / counts["candidates"] < 0.95
    assert counts["rejected"]["no face detected"] > 0
    # A row can be made again from what is recorded of it: latent and crop.
    net = DCGAN()
    faces = net.synthesize(corpus.latents(range(40))).round().clamp(0, 255).to(torch.uint8)
    marks = align.detect(faces, detect_size=100, landmark_size=192)
    assert marks.found.all()
    assert np.allclose(marks.score.numpy(), corpus.column("score"), atol=1e-4)
    again = align.crop(faces, marks.points, "dlib", 80)
    assert (again.float() - corpus.images(range(40)).float()).abs().mean() < 0.1
    # Eyes of a dlib chip lie where its template says, so the crops themselves are faces to the detector.
    assert align.detect(corpus.images(range(40)), detect_size=200).found.float().mean() > 0.5
    assert "no face detected" in (tmp_path / "aligned/DATASHEET.md").read_text()
    assert {a["name"] for a in corpus.manifest["assets"]} == {"dcgan-digiface", "dlib-landmarks-5"}


def test_a_finished_corpus_is_opened_not_written(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert len(generate(settings(folder), progress=False)) == 700
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(InputError, match="count 700, and the settings say 800"):
        generate(settings(folder, count=800), progress=False)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        generate(settings(tmp_path / "mine"), progress=False)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_damaged_shards_are_named_and_repaired(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "broken")
    missing, changed = (folder / "data" / f"train-0000{k}-of-00003.parquet" for k in (1, 2))
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(InputError, match=r"train-00002.*SHA-256.*--repair true"):
        Corpus(folder).verify()
    missing.unlink()
    with pytest.raises(InputError, match=r"train-00001.*missing.*--repair true"):
        Corpus(folder)
    generate(settings(folder, repair=True), progress=False)
    Corpus(folder).verify()
    assert contents(folder) == contents(small)


def test_repair_refuses_other_bytes(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "old")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    manifest["versions"]["torch"] = "1.0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = (folder / manifest["shards"][0]["name"]).read_bytes()
    with pytest.raises(InputError, match=r"train-00000.*same bytes.*torch 1.0, now"):
        generate(settings(folder, repair=True), progress=False)
    assert (folder / manifest["shards"][0]["name"]).read_bytes() == before


def test_two_ranks_repair(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "ranks")
    settings(folder)
    next((folder / "data").glob("*00001-of*")).unlink()
    line = [
        sys.executable,
        str(ROOT / "synth/generate.py"),
        "--config",
        str(tmp_path / "ranks.yaml"),
        "--repair",
        "true",
    ]
    ranks = [
        subprocess.Popen(line, env=ENVIRONMENT | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"})
        for r in (1, 0)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert contents(folder) == contents(small)


def test_repair_keeps_what_an_audit_wrote(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "audited")
    verdict = (folder / "DATASHEET.md").read_text() + "\n## Audit\nLEAKAGE: 3 of 700 faces.\n"
    (folder / "DATASHEET.md").write_text(verdict)
    (folder / "contact_sheet.png").unlink()
    next((folder / "data").iterdir()).unlink()
    generate(settings(folder, repair=True), progress=False)
    assert (folder / "DATASHEET.md").read_text() == verdict
    assert (folder / "contact_sheet.png").read_bytes() == (small / "contact_sheet.png").read_bytes()


def test_hardly_any_face_accepted_is_an_error(tmp_path):
    pytest.importorskip("dlib")
    noise = settings(
        tmp_path / "noise", align={"size": 32, "detect_size": 80, "landmark_size": 80, "threshold": 9.0}, block=1024
    )
    with pytest.raises(InputError, match="only 0 of 4096 candidates were accepted"):
        generate(noise, progress=False)


def test_no_space_left(tmp_path):
    settings(tmp_path / "full")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = command(tmp_path / "full", preexec_fn=limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no space left" in done.stderr.splitlines()[-1] and "full" in done.stderr.splitlines()[-1]
    assert not [p for p in (tmp_path / "full").rglob("*") if p.name.startswith(".tmp-")]
    assert not (tmp_path / "full/manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cuont": 3}, "unknown key 'cuont'.*count"),
        ({"count": "many"}, "count"),
        ({"count": 0}, "count is 0"),
        ({"image_format": "gif"}, "image_format"),
        ({"align": {"framing": "arcface"}}, "arcface framing needs 68"),
        ({"align": {"sise": 3}}, "sise.*size"),
        ({"device": "quantum"}, "device is 'quantum'"),
        (
            {"generator": {"class_path": "synth.generators.dcgan.DCGAN", "init_args": {"wieghts": None}}},
            "wieghts.*weights",
        ),
        ({"generator": {"class_path": "os.system"}}, "generator"),
        ({"repair": True}, "no finished corpus to repair"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, changes, line):
    with pytest.raises(InputError, match=line) as caught:
        generate(settings(tmp_path / "bad", **changes), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_command_ends_with_exit_code_2(tmp_path):
    settings(tmp_path / "bad", seed=0)
    done = command(tmp_path / "bad", "--counts", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "counts" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(tmp_path):
    with pytest.raises(InputError, match="no CUDA device"):
        generate(settings(tmp_path / "gpu", device="cuda"), progress=False)
