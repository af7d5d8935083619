"""Folders of photographs to crops: what is cut, what is reported, and what an interruption leaves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faceless import align, assets, photographs
from faceless.errors import InputError
from faceless.settings import parse

pytest.importorskip("dlib")
ROOT = Path(__file__).parents[2]
SHOTS = [(person, k) for person in (1, 2, 3) for k in (1, 2)]


def face(person: int, k: int) -> Image.Image:
    return Image.open(assets.fetch("att-faces") / f"s{person}" / f"{k}.pgm").convert("RGB")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six faces of three people, and what else lies about in folders of photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for person, k in SHOTS:
        path = folder / f"s{person}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        face(person, k).save(path)
    turned = Image.Exif()
    turned[274] = 6  # to be turned clockwise by 90 degrees
    face(1, 1).rotate(90, expand=True).save(folder / "s1" / "phone.tiff", exif=turned)
    (folder / "s1" / "notes.txt").write_text("not a photograph")
    (folder / "s2" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    Image.new("RGB", (90, 120), "gray").save(folder / "wall.png")
    face(3, 1).save(folder / "s3" / "1.bmp")  # of the same name as a .png
    (folder / "s3" / ".hidden.png").write_bytes(b"x")
    return folder


def run(photos: Path, output: Path, *options: str) -> dict:
    settings = parse(
        photographs.Photographs, ["--photos", str(photos), "--output", str(output), "--workers", "1", *options]
    )
    return photographs.align_photographs(settings, progress=False)


@pytest.fixture(scope="module")
def aligned(photos, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("aligned") / "out"
    return output, run(photos, output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_crops_are_those_of_the_landmarks(photos, aligned):
    output, report = aligned
    rows = {row["photo"]: row for row in map(json.loads, (output / "landmarks.jsonl").read_text().splitlines())}
    assert report["aligned"] == len(rows) == 8 and report["photographs"] == 11
    for person, k in SHOTS:
        image = torch.from_numpy(np.array(face(person, k))).permute(2, 0, 1)[None]
        row = rows[f"s{person}/{k}.png"]
        found = align.detect(image, points=68, attempts=align.THOROUGH)
        assert np.abs(np.array(row["points"]) - found.points[0].numpy()).max() < 0.01
        expected = align.crop(image, found.points, "arcface", 112)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.array(Image.open(output / row["crop"])), expected)
    assert rows["s1/1.png"]["crop"] == "s1/1.png" and rows["s3/1.bmp"]["crop"] == "s3/1.bmp.png"


def test_photographs_are_turned_upright(aligned):
    output, _ = aligned
    upright, turned = (np.array(Image.open(output / "s1" / name)) for name in ("1.png", "phone.png"))
    np.testing.assert_array_equal(upright, turned)


def test_failures_are_reported(aligned):
    output, report = aligned
    reasons = {failure["photo"]: failure["failure"] for failure in report["failures"]}
    assert set(reasons) == {"s1/notes.txt", "s2/cut.jpg", "wall.png"}
    assert reasons["wall.png"] == "no face found"
    assert reasons["s1/notes.txt"].startswith("cannot be read as an image")
    assert json.loads((output / "report.json").read_text()) == report
    assert sum(report["failure_reasons"].values()) == 3
    assert report["assets"] if "assets" in report else report["settings"]["assets"][0]["name"] == "dlib-landmarks-68"
    sheet = Image.open(output / "failures.jpg")
    assert sheet.width > 3 * photographs.TILE and sheet.height > photographs.TILE


def test_any_number_of_workers_ends_with_the_same_bytes(photos, aligned, tmp_path):
    options = ["--photos", str(photos), "--output", str(tmp_path / "two"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "faceless.align", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 11 photographs aligned" in done.stdout
    assert contents(tmp_path / "two") == contents(aligned[0])


def test_a_full_disk_and_then_the_same_command_again(photos, aligned, tmp_path, monkeypatch):
    writes = iter([None] * 5)
    honest = photographs.atomic_write

    def failing(path, data):
        if next(writes, "full") == "full":
            raise InputError(f"{path}: no space left on the disk") from OSError(errno.ENOSPC, "")
        honest(path, data)

    monkeypatch.setattr(photographs, "atomic_write", failing)
    with pytest.raises(InputError, match="no space left"):
        run(photos, tmp_path / "out")
    assert 0 < len(contents(tmp_path / "out")) < len(contents(aligned[0]))
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.undo()
    (tmp_path / "out" / "s1" / ".tmp-0123456789ab-1.png").write_bytes(b"left by a command that was killed")
    run(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(aligned[0])


def test_only_what_is_new_is_done_and_what_is_gone_goes(photos, tmp_path, monkeypatch):
    mine = tmp_path / "photos"
    for person, k in SHOTS[:4]:
        (mine / f"s{person}").mkdir(parents=True, exist_ok=True)
        face(person, k).save(mine / f"s{person}" / f"{k}.png")
    run(mine, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s1").iterdir()}
    (mine / "s2" / "2.png").unlink()
    face(2, 3).save(mine / "s2" / "3.png")
    cut: list[str] = []
    honest = photographs.Cutter._cut
    monkeypatch.setattr(
        photographs.Cutter,
        "_cut",
        lambda self, names, images: cut.extend(p.name for p in names) or honest(self, names, images),
    )
    run(mine, tmp_path / "out")
    assert cut == ["s2/1.png", "s2/3.png"]
    assert sorted(path.name for path in (tmp_path / "out" / "s2").iterdir()) == ["1.png", "3.png"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "s1").iterdir()} == before
    (tmp_path / "out" / "s1" / "1.png").unlink()  # a crop that is lost is made again
    run(mine, tmp_path / "out")
    assert (tmp_path / "out" / "s1" / "1.png").is_file()


def test_records_do_not_delete_what_lies_elsewhere(photos, tmp_path):
    treasure = tmp_path / "treasure.png"
    treasure.write_text("mine")
    run(photos / "s1", tmp_path / "out")
    forged = {"files": [["a", "../treasure.png", 1, 1], ["b", str(treasure), 1, 1]], "results": []}
    (tmp_path / "out" / photographs.RECORDS / "forged.json").write_text(json.dumps(forged))
    (tmp_path / "out" / photographs.RECORDS / "torn.json").write_text("{")
    run(photos / "s1", tmp_path / "out")
    assert treasure.read_text() == "mine"


def test_names_never_collide(tmp_path):
    for name in ("a.png", "a.jpg", "a.jpg.png", "b.png", "b", "c.tar.png"):
        (tmp_path / name).write_bytes(b"")
    (photos,) = photographs.listing(tmp_path, ".png")
    crops = {photo.name: photo.crop for photo in photos}
    assert len(set(crops.values())) == len(crops) == 6
    assert crops["c.tar.png"] == "c.tar.png" and crops["a.png"] == "a.png.png"


def test_mistakes_are_one_line(photos, aligned, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("x")
    for arguments, expected in (
        ({"photos": tmp_path / "none"}, "no such folder"),
        ({"photos": tmp_path / "empty"}, "holds no files"),
        ({"output": other}, "not empty"),
        ({"output": photos / "crops"}, "lies in the other"),
        ({"output": aligned[0], "size": 96}, "another size"),
        ({"size": 5}, "16 to 1024"),
        ({"workers": 0}, "1 or more"),
        ({"framing": "ffhq"}, "framing"),
        ({"detector": "faceless.detectors.Dlib", "detector.points": 5}, "68 of dlib's points"),
        ({"detector": "faceless.detectors.SCRFD", "detector.weights": "x.onnx"}, "no such file"),
        ({"sharpness": 1}, "sharpness"),
    ):
        given = {"photos": photos, "output": tmp_path / "out"} | arguments
        with pytest.raises(SystemExit) as ended:
            photographs.main([f"--{key}={value}" for key, value in given.items()])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert expected in line
