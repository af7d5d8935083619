"""Corpora copied to other layouts, read back by the tools they are for; and what a teacher sees in one."""

import io
import json
import shutil
import tarfile
from math import log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import faceless
from faceless.errors import InputError
from synth.corpus import Corpus, CorpusWriter, encode, schema, table, write_manifest
from synth.export import Export, export
from synth.survey import Survey, page, spread, survey

ROWS, SIDE = 300, 16


def write(folder, identities=True) -> Path:
    """A corpus straight from the writer."""
    faces = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
    extra = [pa.field("score", pa.float32())] + ([pa.field("identity", pa.int64())] if identities else [])
    columns = schema(20, extra=extra)
    index = torch.arange(ROWS) * 3
    more = {"latent": torch.arange(ROWS)[:, None] + torch.arange(20) / 32, "score": index / 4}
    if identities:
        more["identity"] = index % 7
    with CorpusWriter(folder, columns, rows=ROWS, shard_rows=280) as writer:
        writer.append(table(columns, [encode(face, "png") for face in faces], "png", index, 7, **more))
    manifest = {
        "format": "faceless-corpus",
        "version": 1,
        "rows": ROWS,
        "image": {"height": SIDE, "width": SIDE, "format": "png"},
        "latent_shape": [20],
        "columns": columns.names,
        "shards": writer.shards,
    }
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_image_folder(corpus, tmp_path):
    folder = export(Export(str(corpus), str(tmp_path / "faces"), vectors=True), progress=False)
    original = Corpus(corpus)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == ROWS
    for row in (0, 279, 280, 299):
        assert lines[row] == {
            "file_name": f"{row * 3 % 7:06d}/{row * 3:010d}.png",
            "index": row * 3,
            "seed": 7,
            "score": row * 0.75,
            "identity": row * 3 % 7,
        }
        assert (folder / lines[row]["file_name"]).read_bytes() == original.encoded([row])[0]
    assert len(list(folder.rglob("*.png"))) == ROWS
    assert np.array_equal(np.load(folder / "latent.npy"), original.column("latent"))
    assert (folder / "manifest.json").read_bytes() == (corpus / "manifest.json").read_bytes()


def test_datasets_read_the_image_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = export(Export(str(corpus), str(tmp_path / "faces")), progress=False)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
    assert len(loaded) == ROWS
    by_index = {row["index"]: row for row in loaded}
    expected = Corpus(corpus).images([100])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(by_index[300]["image"]), expected)
    assert by_index[300]["identity"] == 300 % 7


def test_folders_without_identities_stay_small(tmp_path):
    folder = export(Export(str(write(tmp_path / "corpus", identities=False)), str(tmp_path / "faces")), progress=False)
    assert {p.parent.name for p in folder.rglob("*.png")} == {"000000"}
    assert not list(folder.glob("*.npy"))


def test_webdataset_tars(corpus, tmp_path):
    wanted = Export(str(corpus), str(tmp_path / "tars"), layout="webdataset", rows_per_tar=128, vectors=True)
    folder = export(wanted, progress=False)
    assert sorted(p.name for p in folder.glob("*.tar")) == [f"faces-00000{k}.tar" for k in range(3)]
    original, rows = Corpus(corpus), 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert all(m.mtime == 0 and m.uid == 0 and m.isfile() for m in members)
            content = {m.name: tar.extractfile(m).read() for m in members}
        keys = sorted({name.split(".")[0] for name in content})
        assert [m.name.split(".")[0] for m in members] == [key for key in keys for _ in range(3)]  # samples together
        for key in keys:
            assert content[f"{key}.png"] == original.encoded([rows])[0]
            assert json.loads(content[f"{key}.json"])["index"] == rows * 3
            assert np.array_equal(np.load(io.BytesIO(content[f"{key}.latent.npy"])), original.column("latent")[rows])
            rows += 1
    assert rows == ROWS
    again = Export(str(corpus), str(tmp_path / "again"), layout="webdataset", rows_per_tar=128, vectors=True)
    assert tree(export(again, progress=False)) == tree(folder)


def test_datasets_read_the_tars(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = export(Export(str(corpus), str(tmp_path / "tars"), layout="webdataset"), progress=False)
    rows = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)
    row = next(iter(rows.skip(5)))
    assert row["json"]["index"] == 15
    assert np.array_equal(np.asarray(row["png"]), Corpus(corpus).images([5])[0].permute(1, 2, 0).numpy())


def test_what_cannot_be_exported_is_one_line(corpus, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        export(Export(str(corpus), str(tmp_path / "there")), progress=False)
    with pytest.raises(InputError, match="no finished corpus"):
        export(Export(str(tmp_path / "there"), str(tmp_path / "out")), progress=False)
    broken = shutil.copytree(corpus, tmp_path / "broken")
    shard = next((broken / "data").iterdir())
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"):
        export(Export(str(broken), str(tmp_path / "out")), progress=False)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["image"]["format"] = "/../../x"
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="unknown format"):
        export(Export(str(broken), str(tmp_path / "out"), verify=False), progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="rows_per_tar is 0"):
        Export(str(corpus), str(tmp_path / "out"), rows_per_tar=0)


def test_a_copy_that_was_stopped_begins_again(corpus, tmp_path):
    left = tmp_path / ".faces.part"
    left.mkdir()
    (left / "old.png").write_bytes(b"x")
    folder = export(Export(str(corpus), str(tmp_path / "faces")), progress=False)
    assert not left.exists() and not (folder / "old.png").exists()


def test_spread_of_embeddings_is_what_its_definitions_say():
    x = np.random.default_rng(0).normal(size=(1500, 6)) * [3, 2, 1, 1, 0.5, 0.1] + [1, 0, 0, 0, 0, 0]
    x[700] = x[3] * 2  # the same direction
    found = spread(torch.from_numpy(x).float(), threshold=0.97)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    pairs = cosines[~np.eye(len(x), dtype=bool)]
    values = np.linalg.eigvalsh(np.cov(unit.T, bias=True))
    parts = values / values.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-sum(p * log(p) for p in parts)), abs=0.006)
    assert found["variance"] == pytest.approx(values.sum(), abs=1e-4)
    assert found["cosine"]["mean"] == pytest.approx(pairs.mean(), abs=2e-4)
    for name, q in (("p1", 1), ("p50", 50), ("p99", 99), ("p99.9", 99.9), ("max", 100)):
        assert found["cosine"][name] == pytest.approx(np.percentile(pairs, q), abs=2e-4)
    assert found["one_person"] == pytest.approx((pairs >= 0.97).mean(), rel=1e-3)
    np.fill_diagonal(cosines, -1)
    assert found["unique"] == pytest.approx((cosines.max(1) < 0.97).mean(), abs=1e-3)
    assert found["norm"]["p50"] == pytest.approx(np.median(np.linalg.norm(x, axis=1)), abs=1e-4)


def test_survey_of_a_corpus(corpus, tmp_path):
    teacher = faceless.create("slimresnet", embedding_dim=16, input_size=32)
    faceless.save(teacher, tmp_path / "teacher")
    found = survey(Survey(str(corpus), str(tmp_path / "teacher"), faces=50, threshold=0.5))
    assert found["faces"] == 50 and found["dimensions"] == 16 and found["corpus_rows"] == ROWS
    text = page(found)
    assert "50 of 300" in text and "one person" in text
    with pytest.raises(InputError, match="holds no embeddings; name a teacher"):
        survey(Survey(str(corpus)))
    cut = shutil.copytree(corpus, tmp_path / "cut")
    (cut / "manifest.json").write_text(
        json.dumps(json.loads((cut / "manifest.json").read_text()) | {"framing": "dlib"})
    )
    with pytest.raises(InputError, match=r"are dlib crops, and .*teacher knows arcface crops"):
        survey(Survey(str(cut), str(tmp_path / "teacher")))
    with pytest.raises(InputError, match="faces is 1"):
        Survey(str(corpus), faces=1)
