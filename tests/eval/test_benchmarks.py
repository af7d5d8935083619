"""The AT&T faces as published, and folders of faces as people really have them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import benchmarks
from eval.benchmarks import att_faces
from faceless import assets, images
from faceless.errors import InputError


def picture(path: Path, width: int = 20, height: int = 20, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for person, faces in (("anna", 3), ("bert", 2), ("p10", 1), ("p9", 2)):
        for n in range(faces):
            picture(tmp_path / "faces" / person / f"{n}.png", seed=len(person) + n)
    return tmp_path / "faces"


@pytest.fixture(scope="module")
def att() -> benchmarks.Benchmark:
    return benchmarks.load("att-faces")


def test_att_faces_have_the_published_counts(att):
    assert (len(att), len(att.names)) == (400, 40)
    assert (att.genuine_pairs, att.impostor_pairs) == (1800, 78_000)
    assert torch.bincount(att.identities).tolist() == [10] * 40
    assert att.images.shape == (400, 3, 150, 150)
    assert att.images.dtype == torch.uint8
    assert "AT&T Laboratories Cambridge" in att.record["licence"]


def test_every_att_face_is_accounted_for(att):
    alignment = att.record["alignment"]
    found = [count for key, count in alignment.items() if key.startswith("found at attempt")]
    assert alignment["faces"] == 400 == sum(found) + alignment["whole-image box"]
    assert alignment["whole-image box"] <= 4


def test_att_eyes_lie_where_the_dlib_chip_wants_them(att):
    """Eyes are dark: between the template's eye corners it is darker than on the cheeks below."""
    faces = att.images.float().mean(1)
    # The corners lie at x 37, 58, 89, 110 and y 46 (dlib's mean face, padded by 0.25, at 150 pixels).
    eyes = torch.cat([faces[:, 41:52, 37:59], faces[:, 41:52, 89:111]], 2).mean((1, 2))
    cheeks = torch.cat([faces[:, 65:76, 37:59], faces[:, 65:76, 89:111]], 2).mean((1, 2))
    assert (eyes < cheeks).float().mean() > 0.9


def test_the_second_load_reads_the_cache_and_a_damaged_cache_is_made_again(att, tmp_path, monkeypatch):
    asset = assets.fetch("att-faces")
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path))
    assets.ASSETS["att-faces"].path.parent.mkdir(parents=True)
    assets.ASSETS["att-faces"].path.symlink_to(asset)
    landmarks = assets.ASSETS["dlib-landmarks-5"].path
    monkeypatch.delenv("FACELESS_CACHE")
    real = assets.fetch("dlib-landmarks-5")
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path))
    landmarks.parent.mkdir(parents=True, exist_ok=True)
    landmarks.symlink_to(real)

    first = att_faces.load("dlib", 32)
    (cached,) = (tmp_path / "benchmarks").iterdir()
    before = cached.stat().st_mtime_ns
    second = att_faces.load("dlib", 32)
    assert torch.equal(first.images, second.images)
    assert first.record == second.record
    assert cached.stat().st_mtime_ns == before
    cached.write_bytes(cached.read_bytes()[:-100])
    third = att_faces.load("dlib", 32)
    assert torch.equal(first.images, third.images)
    assert cached.stat().st_mtime_ns != before


def test_subset_keeps_whole_people_and_numbers_them_again(att):
    half = att.subset(benchmarks.parse_people("21-40", 40))
    assert (half.genuine_pairs, half.impostor_pairs) == (900, 19_000)
    assert half.names == [f"s{n}" for n in range(21, 41)]
    assert torch.equal(half.images, att.images[200:])
    assert half.identities.tolist() == [i // 10 for i in range(200)]
    two = att.subset([39, 0])
    assert two.names == ["s40", "s1"]
    assert two.identities.tolist() == [1] * 10 + [0] * 10


@pytest.mark.parametrize("text", ["0-5", "5", "40-21", "1-41", "a-b", "1-", "", "-1-4", "999999999999-1"])
def test_people_out_of_range(text):
    with pytest.raises(InputError, match="FIRST-LAST with numbers from 1 to 40"):
        benchmarks.parse_people(text, 40)


def test_subset_of_nobody(att):
    for chosen in ([], [40], [-1], [3, 3]):
        with pytest.raises(InputError, match="people 1 to 40"):
            att.subset(chosen)


def test_folder_reads_people_and_faces_in_natural_order(people):
    (people / "notes.txt").write_text("beside the folders of people")
    (people / ".git").mkdir()
    (people / "anna" / ".DS_Store").write_bytes(b"x")
    faces = benchmarks.load(people, size=20)
    assert faces.names == ["anna", "bert", "p9", "p10"]
    assert faces.identities.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert (faces.genuine_pairs, faces.impostor_pairs) == (3 + 1 + 1, 28 - 5)
    expected = np.asarray(Image.open(people / "bert" / "1.png"))
    assert np.array_equal(faces.images[4].permute(1, 2, 0).numpy(), expected)


def test_folder_resizes_crops_of_another_size(people):
    assert benchmarks.load(people, size=16).images.shape == (8, 3, 16, 16)


def test_folder_aligns_photographs_and_names_those_without_a_face(tmp_path):
    source = assets.fetch("att-faces")
    for person in ("s1", "s2"):
        for n in (1, 2):
            target = tmp_path / person / f"{n}.png"
            target.parent.mkdir(exist_ok=True)
            Image.open(source / person / f"{n}.pgm").save(target)
    picture(tmp_path / "s2" / "noise.png", 92, 112)
    faces = benchmarks.load(tmp_path, align=True)
    rows = torch.tensor([0, 1, 10, 11])
    assert torch.equal(faces.images[:4], benchmarks.load("att-faces").images[rows])
    assert faces.record["alignment"]["not detected"] == ["s2/noise.png"]
    assert faces.record["alignment"]["whole-image box"] == 1


def test_folder_mistakes_are_one_line_that_names_the_file(people, tmp_path):
    def mistake(match: str, **options):
        with pytest.raises(InputError, match=match) as caught:
            benchmarks.load(people, **options)
        assert "\n" not in str(caught.value)

    mistake("framing is 'oval'", framing="oval")
    mistake("size is 3", size=3)
    (people / "empty").mkdir()
    mistake("empty: holds no images")
    (people / "empty").rmdir()
    (people / "bert" / "x.jpg").write_text("not an image")
    mistake(r"bert/x\.jpg: cannot be read as an image")
    (people / "bert" / "x.jpg").write_bytes((people / "bert" / "0.png").read_bytes()[:200])
    mistake(r"bert/x\.jpg: cannot be read as an image")
    (people / "bert" / "x.jpg").unlink()
    (people / "bert" / "more").mkdir()
    mistake("bert/more: not a file")
    (people / "bert" / "more").rmdir()
    wide = picture(people / "bert" / "wide.png", 30, 20)
    mistake(r"wide\.png: 30 x 20 pixels are no aligned square crop")
    wide.unlink()
    deep = people / "bert" / "deep.png"
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(deep)
    mistake(r"deep\.png: pixels of mode I")
    deep.unlink()
    benchmarks.load(people)


def test_folders_without_people_or_pairs(tmp_path):
    with pytest.raises(InputError, match="did you mean att-faces"):
        benchmarks.load("att-face")
    with pytest.raises(InputError, match="holds 0 sub-folders"):
        benchmarks.load(tmp_path)
    picture(tmp_path / "a" / "1.png")
    with pytest.raises(InputError, match="holds 1 sub-folders"):
        benchmarks.load(tmp_path)
    picture(tmp_path / "b" / "1.png")
    with pytest.raises(InputError, match="nobody has two images"):
        benchmarks.load(tmp_path)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 1000)))
    with pytest.raises(InputError, match=r"bomb\.png"):
        images.read_image(bomb)
    header = struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 1000)))
    with pytest.raises(InputError, match="8000 x 8000 pixels; 40 million at most"):
        images.read_image(bomb)
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="too many for an image"):
        images.read_image(huge)


def test_postscript_is_not_opened(tmp_path):
    script = tmp_path / "face.png"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="cannot be read as an image"):
        images.read_image(script)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert images.read_image(tmp_path / "phone.jpg").shape == (3, 30, 20)
