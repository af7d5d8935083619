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
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from faceless import align
from faceless.errors import InputError
from faceless.randomness import Rng
from synth.corpus import Corpus
from synth.generate import generate, read_settings
from synth.generators.dcgan import DCGAN

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


def test_any_number_of_processes_gives_the_same_bytes(small, tmp_path):
    generate(settings(tmp_path / "two", workers=2), progress=False)
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
    run = module.Run(
        made.build(), {k: v for k, v in made.asdict().items() if k not in (*module.INCIDENTAL, "config")}, 0, 1
    )
    run.begin(made.yaml())
    with run.pool() as pool:
        for number in range(6):
            pool.advance(number)
    (tmp_path / "half" / ".blocks" / "000005.json").write_text("{")  # cut by a power failure on a poor file system
    generate(made, progress=False)
    assert contents(tmp_path / "half") == contents(small)


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
