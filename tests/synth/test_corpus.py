"""Reading corpora, above all those that strangers wrote."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from faceless.errors import InputError
from faceless.files import sha256
from mining.faces import Faces
from synth.corpus import ROW_GROUP, Corpus, CorpusWriter, encode, schema, table, write_manifest

ROWS, SIDE = 600, 20


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)


def write(folder, images=None, columns=None, rows=ROWS, shard_rows=280, **changes):
    """A corpus straight from the writer, in uneven portions."""
    faces = pictures()
    columns = columns or schema(3, extra=[pa.field("identity", pa.int64())])
    images = images or [encode(face, "png") for face in faces]
    with CorpusWriter(folder, columns, rows=rows, shard_rows=shard_rows) as writer:
        for portion in torch.arange(ROWS).split(97):
            latents = portion[:, None] + torch.tensor([0.0, 0.25, 0.5])
            data = [images[i] for i in portion.tolist()]
            writer.append(table(columns, data, "png", portion, 7, latent=latents, identity=portion // 3))
    manifest = {
        "format": "faceless-corpus",
        "version": 1,
        "rows": rows,
        "image": {"height": SIDE, "width": SIDE, "format": "png"},
        "latent_shape": [3],
        "columns": columns.names,
        "shards": writer.shards,
    }
    write_manifest(folder, manifest | changes)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "corpus")


def rewrite(folder, shard=None, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= changes
    manifest["shards"][0] |= shard or {}
    path.write_text(json.dumps(manifest))


def test_rows_come_back_in_any_order(original):
    corpus, faces = Corpus(original), pictures()
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(corpus.images(rows).permute(0, 2, 3, 1).numpy(), faces[rows])
    assert torch.equal(corpus.latents(rows)[:, 1], rows + 0.25)
    assert corpus.column("identity").tolist() == [i // 3 for i in range(ROWS)]
    assert corpus.column("latent").shape == (ROWS, 3) and corpus.column("seed").tolist() == [7] * ROWS
    assert corpus.images([]).shape == (0, 3, SIDE, SIDE)
    with pytest.raises(IndexError):
        corpus.images([ROWS])
    with pytest.raises(IndexError):
        corpus.images([-1])
    with pytest.raises(InputError, match="no numeric column 'age'"):
        corpus.column("age")


def test_shards_and_row_groups_have_the_sizes_asked_for(original):
    corpus = Corpus(original)
    assert [s["rows"] for s in corpus.shards] == [280, 280, 40]
    assert [(s["first"], s["last"]) for s in corpus.shards] == [(0, 279), (280, 559), (560, 599)]
    file = pq.ParquetFile(original / corpus.shards[0]["name"])
    assert [file.metadata.row_group(g).num_rows for g in range(2)] == [ROW_GROUP, 280 - ROW_GROUP]
    assert sorted(p.name for p in (original / "data").iterdir()) == [
        f"train-0000{k}-of-00003.parquet" for k in range(3)
    ]


def test_faces_are_read_without_decoding_their_neighbors(original):
    """The fast path of every row must agree with what parquet itself says."""
    corpus = Corpus(original)
    shard = corpus._shard(0)
    column = pq.read_table(original / corpus.shards[0]["name"])["image"].to_pylist()
    for row, image in enumerate(column):
        start, size = int(shard.starts[row]), int(shard.sizes[row])
        assert shard.map[start : start + size] == image["bytes"]
        assert image["path"] == f"{row:010d}.png"


def test_shards_rewritten_by_other_software_are_read_all_the_same(copy):
    name = json.loads((copy / "manifest.json").read_text())["shards"][0]["name"]
    rows = pq.read_table(copy / name)
    pq.write_table(rows, copy / name, row_group_size=ROW_GROUP, compression="snappy", use_dictionary=True)
    rewrite(copy, {"bytes": (copy / name).stat().st_size, "sha256": sha256(copy / name)})
    corpus = Corpus(copy)
    corpus.verify()
    assert np.array_equal(corpus.images(range(280)).permute(0, 2, 3, 1).numpy(), pictures()[:280])


@pytest.mark.parametrize(
    "name", ["../x.parquet", "/etc/passwd", "data/../../x", "data\\..\\x", "a//b", "", ".hidden", 5, None]
)
def test_a_manifest_cannot_lead_out_of_its_folder(copy, name):
    rewrite(copy, {"name": name})
    with pytest.raises(InputError, match="not a plain name inside of the corpus"):
        Corpus(copy)


def test_a_link_cannot_lead_out_either(copy, tmp_path):
    shard = copy / "data/train-00000-of-00003.parquet"
    shard.rename(tmp_path / "elsewhere.parquet")
    shard.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(InputError, match="link out of the corpus"):
        Corpus(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**12},
        {"rows": "600"},
        {"rows": True},
        {"image": {"height": 10**6, "width": 20}},
        {"image": None},
        {"latent_shape": [1 << 20, 1 << 20]},
        {"columns": []},
        {"shards": None},
        {"format": "other"},
        {"version": 99},
    ],
)
def test_absurd_manifests_are_one_line(copy, changes):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=r"manifest\.json"):
        Corpus(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_manifests_that_are_none(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Corpus(copy)


def test_cut_and_foreign_shards(copy):
    shard = copy / "data/train-00000-of-00003.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(
        InputError, match=rf"train-00000.*{len(data) - 100} bytes, the manifest says {len(data)}.*--repair"
    ):
        Corpus(copy)
    shard.write_bytes(b"\0" * len(data))
    with pytest.raises(InputError, match=r"train-00000.*not a shard of this corpus.*--repair"):
        Corpus(copy).images([0])
    Corpus(copy).images([300])  # the others can still be read


def test_bytes_that_are_no_image_or_another_size(tmp_path):
    images = [encode(face, "png") for face in pictures()]
    images[1] = b"no image at all"
    images[2] = encode(np.zeros((SIDE * 2, SIDE, 3), np.uint8), "png")
    images[3] = images[0][:60]
    corpus = Corpus(write(tmp_path, images))
    for row, what in ((1, "not a readable image"), (2, "20 x 40, not 20 x 20"), (3, "not a readable image")):
        with pytest.raises(InputError, match=f"row {row} is {what}"):
            corpus.images([0, row])


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    bomb = encode(np.zeros((6000, 6000, 3), np.uint8), "png")
    images = [encode(face, "png") for face in pictures()]
    images[0] = bomb
    with pytest.raises(InputError, match="6000 x 6000"):
        Corpus(write(tmp_path, images)).images([0])


def test_lossless_formats_are_lossless():
    import io

    face = pictures()[0]
    for name in ("png", "webp"):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(face, name)))), face)


def test_writer_needs_no_more_rows_than_it_was_promised(tmp_path):
    corpus = Corpus(write(tmp_path, rows=300, shard_rows=100))
    assert len(corpus) == 300 and [s["rows"] for s in corpus.shards] == [100, 100, 100]
    assert corpus.column("index").tolist() == list(range(300))


def test_what_a_killed_writer_left_is_no_shard_and_goes_when_the_shard_is_written(tmp_path):
    for number in (0, 2):
        left = tmp_path / f"data/.tmp-0123456789ab-train-{number:05d}-of-00003.parquet"
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"PAR1 torn")
    corpus = Corpus(write(tmp_path))
    assert [p.name for p in sorted((tmp_path / "data").iterdir())] == [s["name"][5:] for s in corpus.shards]
    left.write_bytes(b"PAR1 torn")
    assert len(Faces(tmp_path)) == ROWS


def test_no_corpus(tmp_path):
    with pytest.raises(InputError, match="no finished corpus is here"):
        Corpus(tmp_path / "nowhere")
