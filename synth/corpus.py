"""A corpus: generated faces in parquet shards, with a manifest that says where every one of them comes from.

The folder holds ``manifest.json``, ``settings.yaml``, ``DATASHEET.md``, ``contact_sheet.png`` and ``data/*.parquet``.
Image bytes lie uncompressed in the shards (they are compressed themselves), which lets `Corpus` read single faces at
random from memory-mapped files. The shards are ordinary parquet all the same:
``datasets.load_dataset("parquet", data_files="FOLDER/data/*.parquet")`` decodes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write, drop_unfinished, sha256, writing
from faceless.threads import each

FORMAT, VERSION = "faceless-corpus", 1
ROW_GROUP = 256
MAX_SIDE = 4096
MAX_MANIFEST = 64 << 20  # bytes
#: Said of a corpus that `mining/audit.py` took rows out of.
REMOVED = (
    "rows of it were removed, so its seed does not make it again; remove them anew with mining/audit.py from the whole "
    "corpus"
)
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(latent_size: int, latent_dtype: str = "float32", extra: Sequence[pa.Field] = ()) -> pa.Schema:
    """The columns of a shard: image, candidate index, seed, flattened latent (if any), and ``extra`` scalars or lists.

    The metadata lets Hugging Face ``datasets`` decode the images.
    """
    columns = [
        pa.field("image", _IMAGE),
        pa.field("size", pa.int32()),
        pa.field("index", pa.int64()),
        pa.field("seed", pa.int64()),
    ]
    if latent_size:
        kind = pa.float16() if latent_dtype == "float16" else pa.float32()
        columns.append(pa.field("latent", pa.list_(kind, latent_size)))
    columns += extra
    features = {column.name: _feature(column.type) for column in columns}
    info = json.dumps({"info": {"features": features}}, separators=(",", ":"))
    return pa.schema(columns, metadata={"huggingface": info})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "Sequence"}
    names = {pa.float16(): "float16", pa.float32(): "float32"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


def encode(face: np.ndarray, image_format: str, quality: int = 95) -> bytes:
    """``[H, W, 3]`` uint8 RGB to the bytes of a ``png``, ``jpeg`` (4:4:4) or lossless ``webp`` file."""
    options: dict[str, dict[str, Any]] = {
        "png": {"format": "PNG", "compress_level": 1},
        "jpeg": {"format": "JPEG", "quality": quality, "subsampling": 0},
        "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
    }
    file = io.BytesIO()
    Image.fromarray(face).save(file, **options[image_format])
    return file.getvalue()


def table(
    columns: pa.Schema, images: Iterable[bytes], suffix: str, index: Tensor, seed: int, **others: Tensor | np.ndarray
) -> pa.Table:
    """Rows of a shard; ``others`` are the remaining columns of the schema, ``[n]`` or ``[n, ...]``."""
    data = list(images)
    values: dict[str, pa.Array] = {
        "image": pa.array(
            [{"bytes": b, "path": f"{i:010d}.{suffix}"} for b, i in zip(data, index.tolist(), strict=True)], _IMAGE
        ),
        "size": pa.array([len(b) for b in data], pa.int32()),
        "index": pa.array(index.numpy(), pa.int64()),
        "seed": pa.array(np.full(len(data), seed), pa.int64()),
    }
    for name, column in others.items():
        kind, flat = columns.field(name).type, np.asarray(column)
        if pa.types.is_fixed_size_list(kind):
            values[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(flat.reshape(-1), kind.value_type), kind.list_size
            )
        else:
            values[name] = pa.array(flat, kind)
    return pa.Table.from_arrays([values[column.name] for column in columns], schema=columns)


class CorpusWriter:
    """Rows in, in order; complete shards out, one after the other, each of them written atomically.

    Only one row group of faces is held in memory. A writer that is given the records of the shards that an earlier one
    finished goes on behind them.

    Args:
        folder: of the corpus.
        columns: from `schema`.
        rows: of the whole corpus; further ones are ignored.
        shard_rows: of each shard but the last.
        finished: records of the shards that are there already.
    """

    def __init__(
        self, folder: Path, columns: pa.Schema, *, rows: int, shard_rows: int, finished: Sequence[dict[str, Any]] = ()
    ):
        self.folder, self.columns, self.rows, self.shard_rows = folder, columns, rows, shard_rows
        self.shards = list(finished)
        self.done = sum(shard["rows"] for shard in self.shards)
        self._waiting: list[pa.Table] = []
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._written, self._first = 0, -1

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._parquet.is_open = False  # what was begun is dropped, and not finished when it is collected
        self._stack.__exit__(kind, error, trace)

    @property
    def complete(self) -> bool:
        return self.done >= self.rows

    def append(self, rows: pa.Table) -> int:
        """Take rows; returns how many shards became complete."""
        before = len(self.shards)
        while rows.num_rows and not self.complete:
            shard_size = min(self.shard_rows, self.rows - len(self.shards) * self.shard_rows)
            in_shard = self._written + sum(t.num_rows for t in self._waiting)
            taken = rows.slice(0, min(rows.num_rows, shard_size - in_shard, ROW_GROUP - in_shard + self._written))
            rows = rows.slice(taken.num_rows)
            self._waiting.append(taken)
            self.done += taken.num_rows
            in_shard += taken.num_rows
            if in_shard == shard_size or in_shard - self._written == ROW_GROUP:
                self._flush()
            if self._written == shard_size:
                self._close()
        return len(self.shards) - before

    def _flush(self) -> None:
        group = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        if self._file is None:
            total = -(-self.rows // self.shard_rows)
            self._name = f"data/train-{len(self.shards):05d}-of-{total:05d}.parquet"
            drop_unfinished(self.folder / self._name)
            self._stack = ExitStack()
            self._path = self._stack.enter_context(atomic_path(self.folder / self._name))
            # Through a Python file: its errors carry the number that tells a full disk from others.
            self._file = self._stack.enter_context(self._path.open("wb"))
            # One uncompressed plain page per column and row group: that is what makes faces addressable in the file.
            self._parquet = pq.ParquetWriter(
                self._file,
                self.columns,
                compression="NONE",
                use_dictionary=False,
                data_page_size=1 << 30,
                write_statistics=False,
            )
            self._first = group["index"][0].as_py()
        with writing(self.folder / self._name):
            self._parquet.write_table(group, row_group_size=ROW_GROUP)
        self._written += group.num_rows
        self._last = group["index"][-1].as_py()

    def _close(self) -> None:
        assert self._file is not None
        with writing(self.folder / self._name):
            self._parquet.close()
            self._file.close()
        record = {"name": self._name, "rows": self._written, "first": self._first, "last": self._last}
        record |= {"bytes": self._path.stat().st_size, "sha256": sha256(self._path)}
        self._stack.close()
        self._file, self._written = None, 0
        self.shards.append(record)


class Corpus:
    """A finished corpus, read at random; memory holds one batch, whatever the size of the corpus.

    Opening checks that every shard is there and has its size; `verify` reads them and compares SHA-256.

    Args:
        folder: that `synth/generate.py` wrote.

    Attributes:
        manifest: the record of the corpus, a dict.
        columns: names of the columns.
        fingerprint: changes when any face does.

    Raises:
        InputError: no corpus, a missing or cut shard, or a manifest that is damaged or refers outside of the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.height, self.width = self.manifest["image"]["height"], self.manifest["image"]["width"]
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.shards = self.manifest["shards"]
        for shard in self.shards:
            if problem := self._size_problem(shard):
                raise InputError(f"{self.folder / shard['name']}: {problem}; {self.repair_hint()}")
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.shards])
        self._maps: dict[int, _Shard] = {}
        digests = "".join(shard["sha256"] for shard in self.shards)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        return list(self.manifest["columns"])

    def repair_hint(self) -> str:
        if "removed_by_audit" in self.manifest:
            return f"{self.folder}: {REMOVED}"
        settings = self.folder / "settings.yaml"
        return f"python synth/generate.py --config {settings} --output {self.folder} --repair true writes it again"

    def _size_problem(self, shard: dict[str, Any]) -> str | None:
        path = self.folder / shard["name"]
        if path.is_file() and not path.resolve().is_relative_to(self.folder.resolve()):
            return "the shard is a link out of the corpus"
        return size_problem(self.folder, shard)

    def damaged(self) -> dict[int, str]:
        """Number of each shard that is not what the manifest says, and why. Reads everything."""
        return damaged_shards(self.folder, self.shards)

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the manifest.

        Raises:
            InputError: names every damaged shard and says how to repair it.
        """
        if problems := self.damaged():
            listed = "; ".join(f"{self.folder / self.shards[k]['name']}: {what}" for k, what in problems.items())
            raise InputError(f"{listed}; {self.repair_hint()}")

    def images(self, rows: Tensor | Sequence[int]) -> Tensor:
        """``[n, 3, H, W]`` uint8 faces of these rows, in this order.

        Raises:
            InputError: the bytes of a row are not an image of the corpus's format and size.
        """
        where = self._where(rows)
        out = np.empty((len(where), self.height, self.width, 3), np.uint8)
        data = [self._shard(shard).image(row) for shard, row in where]
        each(lambda place: self._decode(*where[place], data[place], out[place]), range(len(where)))
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def encoded(self, rows: Tensor | Sequence[int]) -> list[bytes]:
        """The bytes of the image files of these rows, as they are stored."""
        return [self._shard(shard).image(row) for shard, row in self._where(rows)]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of all rows in order, a few hundred rows at a time."""
        for number, shard in enumerate(self.shards):
            file = self._shard(number)
            for group in range(-(-shard["rows"] // ROW_GROUP)):
                yield pa.table({name: file.group(group, name) for name in columns})

    def latents(self, rows: Tensor | Sequence[int]) -> Tensor:
        """``[n, *latent_shape]`` float32 latents of these rows, in this order."""
        if "latent" not in self.columns:
            raise InputError(f"{self.folder}: this corpus holds no latents")
        where = self._where(rows)
        out = torch.empty(len(where), math.prod(self.latent_shape))
        groups: dict[tuple[int, int], list[int]] = {}
        for place, (shard, row) in enumerate(where):
            groups.setdefault((shard, row // ROW_GROUP), []).append(place)
        for (shard, group), places in groups.items():
            values = torch.from_numpy(_values(self._shard(shard).group(group, "latent")).astype(np.float32))
            out[places] = values[[where[place][1] % ROW_GROUP for place in places]]
        return out.view(len(where), *self.latent_shape)

    def column(self, name: str) -> np.ndarray:
        """A whole numeric column, ``[rows]`` or ``[rows, k]``."""
        if name not in self.columns or name == "image":
            raise InputError(f"{self.folder}: there is no numeric column {name!r}; it has {', '.join(self.columns)}")
        parts = [_values(self._shard(k).whole(name)) for k in range(len(self.shards))]
        return np.concatenate(parts)

    def _where(self, rows: Tensor | Sequence[int]) -> list[tuple[int, int]]:
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a corpus of {len(self)}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        return list(zip(shards.tolist(), (wanted - self._starts[shards]).tolist()))

    def _shard(self, number: int) -> _Shard:
        if number not in self._maps:
            shard = self.shards[number]
            self._maps[number] = _Shard(self.folder / shard["name"], shard["rows"], self.columns, self.repair_hint())
        return self._maps[number]

    def _decode(self, shard: int, row: int, data: bytes, out: np.ndarray) -> None:
        what = f"{self.folder / self.shards[shard]['name']}: row {row}"
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.size != (self.width, self.height):  # known from the header, before anything is decoded
                    raise InputError(
                        f"{what} is {image.size[0]} x {image.size[1]}, not {self.width} x {self.height}; "
                        f"{self.repair_hint()}"
                    )
                out[:] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{what} is not a readable image; {self.repair_hint()}") from error


class _Shard:
    """One memory-mapped shard. Where the layout is as `CorpusWriter` asks for, faces are slices of the map."""

    def __init__(self, path: Path, rows: int, columns: Sequence[str], hint: str):
        self.path, self.hint = path, hint
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
            if self.file.metadata.num_rows != rows or self.file.schema_arrow.names != list(columns):
                raise ValueError("other rows or columns than the manifest says")
            for group in range(self.file.num_row_groups):
                expected = min(ROW_GROUP, rows - group * ROW_GROUP)
                if self.file.metadata.row_group(group).num_rows != expected:
                    raise ValueError("row groups of another size")
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.starts, self.sizes = self._offsets()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self.broken(error) from error

    def broken(self, error: Exception) -> InputError:
        return InputError(
            f"{self.path}: not a shard of this corpus ({str(error) or type(error).__name__}); {self.hint}"
        )

    def group(self, number: int, column: str) -> pa.ChunkedArray:
        try:
            return self.file.read_row_group(number, columns=[column])[column]
        except (pa.ArrowException, OSError) as error:
            raise self.broken(error) from error

    def whole(self, column: str) -> pa.ChunkedArray:
        try:
            return self.file.read(columns=[column])[column]
        except (pa.ArrowException, OSError) as error:
            raise self.broken(error) from error

    def image(self, row: int) -> bytes:
        start, size = int(self.starts[row]), int(self.sizes[row])
        # Plain parquet puts the length before the bytes; if it is not there, the file is not laid out as assumed.
        if start >= 4 and int.from_bytes(self.map[start - 4 : start], "little") == size:
            return self.map[start : start + size]
        group = self.group(row // ROW_GROUP, "image").combine_chunks()
        return bytes(group[row % ROW_GROUP]["bytes"].as_py() or b"")

    def _offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each image begins, and its length: a column's only page ends with 4-byte lengths and bytes in turn."""
        sizes = self.whole("size").to_numpy().astype(np.int64)
        if len(sizes) and sizes.min() < 0:
            raise ValueError("negative image sizes")
        starts = np.zeros_like(sizes)
        for group in range(self.file.num_row_groups):
            chunk = self.file.metadata.row_group(group).column(0)
            rows = slice(group * ROW_GROUP, group * ROW_GROUP + ROW_GROUP)
            begin = chunk.data_page_offset
            if chunk.path_in_schema == "image.bytes" and chunk.compression == "UNCOMPRESSED":
                end = begin + chunk.total_compressed_size
                ends = np.cumsum(sizes[rows] + 4)
                first = end - ends[-1] if begin < end - ends[-1] and end <= len(self.map) else -(1 << 62)
                starts[rows] = np.maximum(first + ends - sizes[rows], 0)
        return starts, sizes


def _values(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=False)


def size_problem(folder: Path, shard: dict[str, Any]) -> str | None:
    """None where a shard is there, with as many bytes as the manifest says."""
    path = folder / shard["name"]
    if not path.is_file():
        return "the shard is missing"
    size = path.stat().st_size
    return None if size == shard["bytes"] else f"the shard has {size} bytes, the manifest says {shard['bytes']}"


def damaged_shards(folder: Path, shards: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Number of each shard that is missing, cut or changed, and which of it."""
    problems = {}
    for number, shard in enumerate(shards):
        if problem := size_problem(folder, shard):
            problems[number] = problem
        elif sha256(folder / shard["name"]) != shard["sha256"]:
            problems[number] = "its SHA-256 is not the manifest's"
    return problems


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """The last file of a corpus to be written: a folder with a manifest is complete."""
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest, checked: a stranger may have written it.

    Raises:
        InputError: missing, no corpus's manifest, sizes out of bounds, or names that leave the folder.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder}: no finished corpus is here (no manifest.json); write one with synth/generate.py")
    if path.stat().st_size > MAX_MANIFEST:
        raise InputError(f"{path}: larger than {MAX_MANIFEST >> 20} MB; this is not a corpus's manifest")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise InputError(f"{path}: format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] > VERSION:
            raise InputError(f"{path}: written by a newer version of this program; update it")
        image = manifest["image"]
        whole(image["height"], 1, MAX_SIDE), whole(image["width"], 1, MAX_SIDE)
        if math.prod(whole(side, 1, 1 << 24) for side in manifest["latent_shape"]) > 1 << 24:
            raise ValueError("latents are too large")
        if not {"image", "size", "index", "seed"} <= {str(name) for name in manifest["columns"]}:
            raise ValueError("columns are missing")
        rows = 0
        for shard in manifest["shards"]:
            if not (isinstance(shard["name"], str) and all(_PART.fullmatch(p) for p in shard["name"].split("/"))):
                raise InputError(
                    f"{path}: shard {shard['name']!r} is not a plain name inside of the corpus; not opened"
                )
            rows += whole(shard["rows"], 1, 1 << 40)
            whole(shard["bytes"], 1, 1 << 50)
            if not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
                raise ValueError("a shard's sha256 is none")
        if rows != whole(manifest["rows"], 1, 1 << 40):
            raise ValueError("the shards do not add up to its rows")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return manifest


def whole(value: object, low: int, high: int) -> int:
    """``value`` if it is a whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number from {low} to {high}")
    return value
