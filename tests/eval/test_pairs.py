"""Lists of pairs: files as they really occur and as no honest person writes them, and the command on them."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

import faceless
from eval import benchmarks
from eval.benchmarks import pairs, protocol
from eval.verify import main
from faceless.errors import InputError
from tests.eval.run_folder import faces, recognizer


def encoded(image: torch.Tensor, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, kind)
    return stream.getvalue()


def some_pairs(count: int = 40, noise: float = 45.0):
    """Alternately two faces of one person and faces of two; ``[2 count]`` images and booleans."""
    benchmark = faces(count, 2, noise)
    images, same = [], []
    for pair in range(count):
        genuine = pair % 2 == 0
        images += [benchmark.images[2 * pair], benchmark.images[2 * pair + 1 if genuine else 2 * pair - 1]]
        same.append(genuine)
    return images, same


def write_pairs(path: Path, noise: float = 45.0) -> None:
    """A ``.bin`` of 40 simulated pairs."""
    images, same = some_pairs(noise=noise)
    path.write_bytes(pickle.dumps(([encoded(image) for image in images], same), protocol=2))


@pytest.fixture(scope="module")
def content():
    images, same = some_pairs()
    return [encoded(image) for image in images], same


@pytest.fixture(scope="module")
def lfw(tmp_path_factory, content) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "lfw.bin"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """What Python 2 wrote: strings of 8 bits, which Python 3 has no opcode for."""
    strings = b"".join(b"T" + len(i).to_bytes(4, "little") + i for i in images)
    return b"\x80\x02](" + strings + b"e](" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e\x86."


@pytest.mark.parametrize(
    "write",
    [
        lambda c: pickle.dumps(c, protocol=2),
        lambda c: pickle.dumps(c, protocol=5),
        lambda c: pickle.dumps((c[0], np.array(c[1])), protocol=4),
        lambda c: pickle.dumps((c[0], [np.bool_(s) for s in c[1]]), protocol=2),
        lambda c: pickle.dumps(([np.frombuffer(i, np.uint8) for i in c[0]], c[1]), protocol=2),
        lambda c: python2(*c),
    ],
    ids=["protocol 2", "protocol 5", "array of booleans", "NumPy booleans", "arrays of bytes", "Python 2"],
)
def test_every_way_that_files_are_written(tmp_path, content, write):
    path = tmp_path / "x.bin"
    path.write_bytes(write(content))
    images, same = pairs.read_bin(path)
    assert images == content[0]
    assert same.tolist() == content[1]


def test_pixels_instead_of_encoded_images(tmp_path, content):
    arrays = [np.asarray(Image.open(io.BytesIO(data))) for data in content[0]]
    (tmp_path / "x.bin").write_bytes(pickle.dumps((arrays, content[1])))
    plain, coded = pairs.load(tmp_path / "x.bin", 32), None
    (tmp_path / "y.bin").write_bytes(pickle.dumps(content))
    coded = pairs.load(tmp_path / "y.bin", 32)
    assert all(torch.equal(a, b) for a, b in zip(plain.faces(), coded.faces(), strict=True))
    assert torch.equal(next(coded.faces()), torch.from_numpy(arrays[0].copy()).permute(2, 0, 1))


class Hostile:
    def __init__(self, where: Path):
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


def test_nothing_is_executed(tmp_path, content):
    for number, value in enumerate(
        [Hostile(tmp_path / "a"), ([Hostile(tmp_path / "a")] * 80, content[1]), (content[0], Hostile(tmp_path / "a"))]
    ):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(InputError, match=rf"{number}\.bin: .*mkdir.*nothing was executed"):
            pairs.read_bin(path)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "no images and booleans"),
        (([], []), "0 images and 0 booleans"),
        (([b"x"] * 3, [True]), "3 images and 1 booleans"),
        (([b"x"] * 2, ["yes"]), "else than booleans"),
        (([b"x"] * 2, [7]), "else than booleans"),
        (([b"x"] * 2, 5), "a int in the place of its booleans"),
        (([1, 2], [True]), "a int in the place of an image"),
        ((["\u1234", "x"], [True]), "text in the place of an image"),
        (([np.zeros((2, 2)), b""], [True]), r"an image is an array \[2, 2\] of float64"),
        (([np.zeros((2, 2, 4), np.uint8), b""], [True]), "an image is an array"),
    ],
)
def test_other_contents_are_one_line(tmp_path, value, message):
    path = tmp_path / "odd.bin"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=message) as caught:
        pairs.read_bin(path)
    assert "odd.bin" in str(caught.value)


def test_damaged_files_and_images_are_named(tmp_path, lfw, content):
    whole = lfw.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.bin"):
            pairs.read_bin(tmp_path / "cut.bin")
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([b"no image", *content[0][1:]], content[1])))
    with pytest.raises(InputError, match="bad: image 0: cannot be read as an image"):
        list(pairs.load(tmp_path / "bad.bin").faces())
    wide = encoded(torch.zeros(3, 20, 30, dtype=torch.uint8))
    (tmp_path / "wide.bin").write_bytes(pickle.dumps(([wide, *content[0][1:]], content[1])))
    with pytest.raises(InputError, match="wide: image 0 has 30 x 20 pixels"):
        list(pairs.load(tmp_path / "wide.bin").faces())
    (tmp_path / "few.bin").write_bytes(pickle.dumps((content[0][:10], content[1][:5])))
    with pytest.raises(InputError, match="ten folds need pairs of both kinds"):
        pairs.load(tmp_path / "few.bin")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
@example(b"\x80\x02]q\x00(r\xff\xff\xff\xff.", 0, 0)
@example(b"(" * 60, 0, 0)
def test_arbitrary_bytes_end_in_one_line_or_in_pairs(tmp_path, data, place, byte):
    path = tmp_path / "fuzz.bin"
    honest = bytearray(pickle.dumps(([b"\xff\xd8ab", b"cd"], [True]), protocol=2))
    honest[place % len(honest)] = byte
    for content in (data, bytes(honest), bytes(honest[: place % len(honest)]) + data):
        path.write_bytes(content)
        try:
            images, same = pairs.read_bin(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert len(images) == 2 * len(same)


def test_figures_are_those_of_the_pairs(lfw):
    net, listed = recognizer(24), pairs.load(lfw, 32)
    report = protocol.evaluate(net, listed, cache=False)
    images = torch.stack(list(listed.faces()))
    both = (net(images).embedding + net(images.flip(-1)).embedding).detach().numpy().astype(np.float64)
    rows = normalize(both)
    cosines = (rows[0::2] * rows[1::2]).sum(1)
    same = np.array(listed.same)
    np.testing.assert_allclose(np.sort(report.genuine), np.sort(cosines[same]), atol=1e-6)
    assert report.figures["auc"] == pytest.approx(roc_auc_score(same, cosines))
    assert report.summary()["flip"] is True
    # The fold's accuracy from its definition: the first grid threshold that is best on the other nine.
    distances = np.square(rows[0::2] - rows[1::2]).sum(1)
    folds = np.array_split(np.arange(len(same)), 10)
    grid = np.arange(0, 4, 0.01)
    right = (distances < grid[:, None]) == same
    expected = [right[right[:, np.setdiff1d(np.arange(len(same)), f)].mean(1).argmax(), f].mean() for f in folds]
    assert report.figures["accuracy"]["folds"] == pytest.approx(expected)
    assert any("published with 6000 pairs" in line for line in report.figures["cautions"])
    assert protocol.evaluate(net, listed, flip=False, cache=False).genuine.tolist() != report.genuine.tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return faceless.save(faceless.create("slimresnet", embedding_dim=16, input_size=32), folder / "m", record={})


def test_embeddings_are_cached_by_model_benchmark_and_flip(tmp_path, monkeypatch, lfw, model):
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path))
    net, listed = faceless.load(model), pairs.load(lfw, 32)
    first = protocol.embed(net, listed, flip=True)
    (stored,) = (tmp_path / "embeddings").iterdir()
    assert stored.name.startswith(f"{net.source['sha256'][:12]}-{listed.digest[:12]}-")
    np.save(stored, first + 1)
    assert np.array_equal(protocol.embed(net, listed, flip=True), first + 1)  # read, not computed
    assert not np.array_equal(protocol.embed(net, listed, flip=False), first)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
    stored.write_bytes(b"damaged")
    assert np.array_equal(protocol.embed(net, listed, flip=True), first)
    assert np.array_equal(np.load(stored), first)
    unnamed = recognizer(8)  # not from a file: nothing to know it by
    protocol.embed(unnamed, listed, flip=True)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2


def test_broken_embeddings_are_counted(lfw):
    net = recognizer(8)
    with torch.no_grad():
        net.backbone.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="embeddings of 80 of 80 faces are NaN"):
        protocol.evaluate(net, pairs.load(lfw, 32), cache=False)


def test_command_on_a_list_of_pairs(tmp_path, monkeypatch, lfw, model, capsys):
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path / "cache"))
    out = ["--json", str(tmp_path / "lfw.json"), "--figures", str(tmp_path / "plots"), "--sweep", "true"]
    main(["--model", str(model), "--benchmark", str(lfw), *out])
    printed = capsys.readouterr().out
    assert "lfw: 80 faces, 20 genuine and 20 impostor pairs" in printed
    assert "10 folds, InsightFace's grid" in printed
    written = json.loads((tmp_path / "lfw.json").read_text())
    assert len(written["accuracy"]["folds"]) == 10
    assert len(written["threshold_sweep"]["f1"]["values"]) == 9
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        *("roc.svg", "det.svg", "scores.svg"),
        *("accuracy.svg", "precision.svg", "recall.svg", "f1.svg"),
    }
    for arguments, expected in (
        (["--benchmark", str(lfw), "--people", "1-2"], "always judged as a whole"),
        (["--benchmark", f"rfw:{lfw.parent}"], "holds 1 .bin files"),
        (["--benchmark", "pairs:/nowhere.bin"], "nowhere.bin"),
    ):
        with pytest.raises(SystemExit):
            main(["--model", str(model), *arguments])
        assert expected in capsys.readouterr().err


def test_groups_share_one_threshold(tmp_path):
    for number, name in enumerate(("African", "Asian")):
        images, same = some_pairs(60, noise=(45.0, 90.0)[number])
        (tmp_path / f"{name}.bin").write_bytes(pickle.dumps(([encoded(i) for i in images], same)))
    groups = benchmarks.find(f"rfw:{tmp_path}", "arcface", 32)
    report = protocol.evaluate(recognizer(24), groups, cache=False)
    single = [protocol.evaluate(recognizer(24), group, cache=False) for group in groups.groups]
    assert report.figures["accuracy"]["groups"] == {
        name: one.figures["accuracy"]["mean"] for name, one in zip(("African", "Asian"), single, strict=True)
    }
    common = report.figures["common_threshold"]["1e-1"]
    for name, one in zip(("African", "Asian"), single, strict=True):
        entry = common["groups"][name]
        assert entry["fmr"] == (one.impostor >= common["threshold"]).mean()
        assert entry["fnmr"] == (one.genuine < common["threshold"]).mean()
        low, high = entry["fmr_interval"]
        assert low <= entry["fmr"] <= high
    pooled = np.concatenate([one.impostor for one in single])
    assert (pooled >= common["threshold"]).sum() <= 6
    rates = [entry["fnmr"] for entry in common["groups"].values()]
    assert common["fnmr_max_min_ratio"] == (max(rates) / min(rates) if min(rates) else None)
