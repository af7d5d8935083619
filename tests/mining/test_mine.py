"""The mining command on shards that we did not write, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faceless
from faceless.errors import InputError
from faceless.recognizer import InputSpec, Recognizer
from mining.disagreement import impostor_threshold
from mining.faces import Faces, digest, embeddings, unit
from mining.identities import main as identify
from mining.mine import main
from synth.near import judges
from tests.mining.tiny_corpus import network, pictures, write


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(3)
    return write(
        tmp_path / "corpus",
        pictures(np.arange(60) % 20),
        latent=numbers.standard_normal((60, 5)).astype(np.float16),
        score=np.linspace(0, 1, 60).astype(np.float32),
    )


def test_faces_come_as_they_were_written(corpus: Path) -> None:
    faces = Faces(corpus)
    images = torch.from_numpy(pictures(np.arange(60) % 20)).permute(0, 3, 1, 2)
    assert torch.equal(faces.images([59, 0, 31, 0]), images[[59, 0, 31, 0]])
    assert torch.equal(torch.cat(list(faces.batches(13))), images)
    assert faces.column("latent").shape == (60, 5)
    np.testing.assert_allclose(faces.column("score"), np.linspace(0, 1, 60), atol=1e-6)


def test_embeddings_are_computed_once(corpus: Path, tmp_path: Path) -> None:
    net = faceless.load(network(tmp_path / "net", 0))
    faces = Faces(corpus)
    found = embeddings(net, faces, tmp_path / "cache", "cpu", progress=False)
    expected = net.embed(faces.images(range(60)))
    torch.testing.assert_close(torch.from_numpy(unit(found)), expected, atol=1e-5, rtol=0)
    (part,) = (tmp_path / "cache").glob("*/part-*.npy")
    np.save(part, np.full_like(found, 7))
    assert (embeddings(net, faces, tmp_path / "cache", "cpu", progress=False) == 7).all()
    with torch.no_grad():
        next(net.backbone.parameters()).mul_(1.5)
    assert not (embeddings(net, faces, tmp_path / "cache", "cpu", progress=False) == 7).any(), "other weights"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="delete it and run again"):
        embeddings(faceless.load(tmp_path / "net"), faces, tmp_path / "cache", "cpu", progress=False)


def test_the_hardest_faces_are_written_with_their_latents(corpus: Path, tmp_path: Path) -> None:
    teacher, student = (network(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    out = tmp_path / "out"
    given = ["--corpus", str(corpus), "--teacher", teacher, "--student", student, "--output", str(out)]
    given += ["--fars", "[0.01, 0.1]", "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    main([*given, "--keep", "10", "--gate", "0.1"])
    table = pq.read_table(out / "mined.parquet")
    images = Faces(corpus).images(range(60))
    raw = [faceless.load(net).eval()(images).embedding.detach() for net in (teacher, student)]
    T, S = (F.normalize(x - x.mean(0)) for x in raw)
    disagreement = (1 - (S * T).sum(1)).numpy()
    norms = raw[0].norm(dim=1).numpy()
    passed = (norms >= np.quantile(norms, 0.1)) & (np.linspace(0, 1, 60) >= 0.1)
    hardest = [row for row in np.argsort(-disagreement) if passed[row]][:10]
    assert table["row"].to_pylist() == hardest
    np.testing.assert_allclose(table["score"].to_numpy(), disagreement[hardest], atol=1e-5)
    latents = np.array(table["latent"].to_pylist())
    np.testing.assert_array_equal(latents, Faces(corpus).column("latent")[hardest])
    assert str(table.schema.field("latent").type) == "fixed_size_list<element: float>[5]"
    assert judges(out / "mined.parquet") == {
        "teacher": teacher, "teacher_sha256": faceless.load(teacher).source["sha256"],
        "student": student, "student_sha256": faceless.load(student).source["sha256"],
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["faces"] == 60
    assert summary["mean"]["pointwise"] == pytest.approx(float(disagreement.mean()), abs=1e-5)
    pairs = pq.read_table(out / "pairs.parquet")
    assert list(summary["pairs"]) == ["0.01", "0.1"]
    for far, found in summary["pairs"].items():
        rows = pairs.filter(pc.equal(pairs["far"], float(far)))
        assert rows.num_rows == found["missed"] + found["confused"]
        # A pair that student and teacher agree on at one rate may be decided differently at another.
        expected = asdict(impostor_threshold(T.numpy(), float(far)))
        assert found["thresholds"]["teacher"] == pytest.approx(expected, abs=1e-5)
    assert (out / "hardest.png").read_bytes().startswith(b"\x89PNG")
    assert "disagreement" in (out / "disagreement.svg").read_text()


def test_faces_of_one_overlap_are_told_apart_and_what_is_cut_is_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = (network(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    out = tmp_path / "out"
    given = ["--corpus", str(corpus), "--teacher", teacher, "--student", student, "--output", str(out), "--gate", "0"]
    main([*given, "--rank_by", "overlap", "--neighbors", "2", "--fars", "[0.2]", "--cache", str(tmp_path / "cache")])
    table = pq.read_table(out / "mined.parquet")
    assert len(set(table["overlap"].to_pylist())) <= 3
    order = list(zip(table["overlap"].to_pylist(), table["rbo"].to_pylist()))
    assert order == sorted(order, reverse=True)
    said = capsys.readouterr().out
    assert "missed at least" in said and "raise --neighbors" in said
    main([*given, "--neighbors", "59", "--fars", "[0.001]", "--cache", str(tmp_path / "cache")])
    said = capsys.readouterr().out
    assert "at least" not in said and "a guess: 1,770 pairs of strangers, and 30,000 are wanted" in said


def test_networks_without_parameters_are_told_apart() -> None:
    """A graph that onnxruntime computes has its weights in itself."""
    graphs = [nn.Identity() for _ in range(3)]
    for graph, model in zip(graphs, (b"one", b"two", b"one")):
        graph.model, graph.embedding_dim = model, 4
    one, two, again = (digest(Recognizer(graph, InputSpec(), name="onnx")) for graph in graphs)
    assert one == again != two


def test_scores_and_latents_that_are_none_are_one_line(tmp_path: Path) -> None:
    teacher, student = (network(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    images, scores = pictures(np.arange(20)), np.linspace(0, 1, 20).astype(np.float32)
    broken = scores.copy()
    broken[3] = np.nan
    for name, columns, line in (
        ("nan", {"score": broken}, "column 'score' holds numbers that are not finite"),
        ("lists", {"score": np.ones((20, 2), np.float32)}, "column score holds lists"),
        ("single", {"latent": scores}, "column latent holds single numbers"),
    ):
        faces = str(write(tmp_path / name, images, **columns))
        with pytest.raises(InputError, match=line):
            main(["--corpus", faces, "--teacher", teacher, "--student", student, "--cache", str(tmp_path / "cache")])


def test_with_labels_only_pairs_that_the_teacher_decides_rightly_count(tmp_path: Path) -> None:
    labels = (np.arange(60) % 20).astype(np.int64)
    faces = write(tmp_path / "corpus", pictures(labels), identity=labels)
    teacher, student = (network(tmp_path / name, seed) for seed, name in enumerate(("teacher", "student")))
    given = ["--corpus", str(faces), "--teacher", teacher, "--student", student, "--cache", str(tmp_path / "cache")]
    main([*given, "--fars", "[0.2]", "--neighbors", "59", "--labels", "true", "--output", str(tmp_path / "out")])
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet")
    same = labels[pairs["first"].to_numpy()] == labels[pairs["second"].to_numpy()]
    assert len(same) and np.array_equal(same, pairs["missed"].to_numpy())
    with pytest.raises(InputError, match="fars needs rates"):
        main([*given, "--fars", "[1.0]"])


def test_what_cannot_be_mined_is_said_in_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no parquet shards"):
        Faces(tmp_path / "empty")
    (tmp_path / "empty" / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="not readable as parquet"):
        Faces(tmp_path / "empty")
    (corpus / "manifest.json").write_text('{"shards": [{"name": "x", "rows": 3}]}')
    with pytest.raises(InputError, match="repair the corpus"):
        Faces(corpus)
    (corpus / "manifest.json").unlink()
    teacher, student = network(tmp_path / "t", 0), network(tmp_path / "s", 1, dim=8)
    with pytest.raises(InputError, match="use overlap or rbo"):
        main(["--corpus", str(corpus), "--teacher", teacher, "--student", student, "--cache", str(tmp_path / "c")])
    with pytest.raises(InputError, match=r"test_mine\.py is a file and no folder"):
        main(["--corpus", str(corpus), "--teacher", teacher, "--student", student, "--output", __file__])


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda" if not torch.cuda.is_available() else "cuda:gpu"])
def test_a_device_that_is_not_there_is_said_in_one_line(corpus: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"device is '{name}'.*use auto"):
        embeddings(faceless.load(network(tmp_path / "t", 0)), Faces(corpus), tmp_path / "c", name, progress=False)
    assert not (tmp_path / "c").exists()


def test_rows_are_found_without_looking_at_the_groups_before_them(tmp_path: Path) -> None:
    """Else finding all of a million rows would take as many looks as groups times rows."""
    table = pa.table({"image": pa.array([{"bytes": b"", "path": None}] * 20)})
    for number in range(2):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=3)
    faces = Faces(tmp_path)
    faces.files.clear()
    expected = [(row // 20, row % 20 // 3, row % 20 % 3) for row in range(40)]
    assert [faces._where(row) for row in range(40)] == expected


def test_some_rows_of_a_column(corpus: Path) -> None:
    faces = Faces(corpus)
    np.testing.assert_array_equal(faces.column("latent", [41, 3, 59, 3]), faces.column("latent")[[41, 3, 59, 3]])
    assert faces.column("score", []).shape == (0,)


def test_columns_and_networks_that_give_no_numbers_are_said_in_one_line(tmp_path: Path) -> None:
    images = pictures(np.arange(6) % 3)
    teacher, student = network(tmp_path / "t", 0), network(tmp_path / "s", 1)
    named = write(tmp_path / "named", images, identity=np.array(["a", "b", "c"] * 2))
    given = ["--teacher", teacher, "--student", student, "--cache", str(tmp_path / "c"), "--device", "cpu"]
    with pytest.raises(InputError, match="column 'identity' holds no numbers"):
        main([*given, "--corpus", str(named), "--labels", "true"])
    ragged = pa.table({"image": pa.array([{"bytes": b"x", "path": None}] * 2), "latent": [[1.0], [1.0, 2.0]]})
    (tmp_path / "ragged").mkdir()
    pq.write_table(ragged, tmp_path / "ragged" / "0.parquet")
    with pytest.raises(InputError, match="column 'latent' holds no numbers"):
        Faces(tmp_path / "ragged").column("latent")
    missing = pa.table({"image": ragged["image"], "identity": pa.array([3, None])})
    pq.write_table(missing, tmp_path / "ragged" / "0.parquet")
    with pytest.raises(InputError, match="column 'identity' lacks a number in some rows"):
        Faces(tmp_path / "ragged").column("identity")
    with pytest.raises(InputError, match=r"1 face; .*at least 2"):
        main([*given, "--corpus", str(write(tmp_path / "one", images[:1], shards=1))])
    pq.write_table(ragged.slice(0, 0), tmp_path / "ragged" / "0.parquet")
    with pytest.raises(InputError, match="no faces"):
        Faces(tmp_path / "ragged")
    broken = faceless.load(student)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(InputError, match=r"row 0.*not finite"):
        embeddings(broken, Faces(named), tmp_path / "c", "cpu", progress=False)


def test_a_network_sees_crops_as_it_knows_them_or_is_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(12) % 3))
    shards = [{"name": f"{n}.parquet", "rows": 6, "sha256": "0" * 64} for n in range(2)]
    (corpus / "manifest.json").write_text(json.dumps({"shards": shards, "framing": "arcface"}))
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "t", 0), "--cache", str(tmp_path / "c")]
    with pytest.raises(InputError, match=r"its faces are arcface crops, and .*t knows dlib crops"):
        main([*given, "--student", network(tmp_path / "s", 1)])
    with pytest.raises(InputError, match="knows dlib crops"):
        identify([*given, "--output", str(tmp_path / "i")])


def test_one_identity_and_a_manifest_without_hashes_are_one_line(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", pictures(np.arange(12) % 3), identity=np.zeros(12, np.int64))
    given = ["--corpus", str(corpus), "--teacher", network(tmp_path / "t", 0), "--student", network(tmp_path / "s", 1)]
    given += ["--cache", str(tmp_path / "c"), "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="all faces have one identity"):
        main([*given, "--labels", "true"])
    (corpus / "manifest.json").write_text(json.dumps({"shards": [{"name": f"{n}.parquet", "rows": 6} for n in (0, 1)]}))
    with pytest.raises(InputError, match="a shard has no SHA-256"):
        main(given)
