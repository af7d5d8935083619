"""Faces to be mined: parquet shards as `synth/generate.py` and many others write them, and their embeddings."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from faceless.devices import chosen_device
from faceless.errors import InputError
from faceless.files import atomic_path, sha256, visible
from faceless.recognizer import Recognizer, same_framing

MAX_SIDE = 4096
MAX_MANIFEST = 64 << 20  # bytes
PART = 16_384  # embeddings per file of a cache
BATCH = 128  # faces per forward pass; fixed, because the bits of embeddings depend on it

Floats = NDArray[np.float32]


class Faces:
    """A folder of parquet shards with a column ``image`` (a struct with the ``bytes`` of an image file).

    Args:
        folder: a corpus, whose shards lie in ``data/``, or any folder of ``.parquet`` files, taken by name.

    Attributes:
        manifest: of a corpus; empty elsewhere.
        columns: names of the columns.

    Raises:
        InputError: no shards, shards without images or of different columns, or files that are no parquet.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.paths = visible(self.folder, "data/*.parquet") or visible(self.folder, "*.parquet")
        if not self.paths:
            raise InputError(f"{folder}: holds no parquet shards; write a corpus with synth/generate.py first")
        try:
            self.files = [pq.ParquetFile(path, memory_map=True) for path in self.paths]
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{folder}: a shard is not readable as parquet ({error})") from error
        kind = self.files[0].schema_arrow
        for path, file in zip(self.paths, self.files):
            if file.schema_arrow.names != kind.names:
                raise InputError(f"{path}: has other columns than the shards before it")
        self.columns: list[str] = list(kind.names)
        image = kind.field("image").type if "image" in self.columns else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise InputError(f"{self.paths[0]}: has no column image with the bytes of image files")
        self.starts = np.cumsum([0] + [file.metadata.num_rows for file in self.files])
        if not len(self):
            raise InputError(f"{folder}: its shards hold no faces")
        self._groups = [(shard, group) for shard, file in enumerate(self.files) for group in range(file.num_row_groups)]
        sizes = [self.files[shard].metadata.row_group(group).num_rows for shard, group in self._groups]
        self._group_starts = np.cumsum([0, *sizes])
        self.manifest: dict[str, Any] = self._manifest()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {}
        try:
            if path.stat().st_size > MAX_MANIFEST:
                raise ValueError("too large")
            found = json.loads(path.read_text("utf-8"))
            listed = {shard["name"]: shard["rows"] for shard in found["shards"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not the manifest of a corpus ({error})") from error
        here = {str(p.relative_to(self.folder)): f.metadata.num_rows for p, f in zip(self.paths, self.files)}
        if listed != here:
            raise InputError(f"{path}: its shards are not those of the folder; repair the corpus first")
        if not all(isinstance(shard.get("sha256"), str) for shard in found["shards"]):
            raise InputError(f"{path}: not the manifest of a corpus (a shard has no SHA-256)")
        return dict(found)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all shards, which are read for it.

        Raises:
            InputError: one is not the one that the manifest names.
        """
        digests = {str(path.relative_to(self.folder)): sha256(path) for path in self.paths}
        listed = {shard["name"]: shard["sha256"] for shard in self.manifest.get("shards", [])}
        if other := [name for name in listed if listed[name] != digests[name]]:
            raise InputError(
                f"{self.folder / other[0]}: is not the shard that the manifest names; repair the corpus first"
            )
        # In the order of the manifest, as `synth.corpus.Corpus` has it.
        return hashlib.sha256("".join(digests[name] for name in listed or digests).encode()).hexdigest()

    def batches(self, size: int = BATCH, first: int = 0) -> Iterator[Tensor]:
        """Faces from row ``first`` on, ``[n, 3, H, W]`` uint8, ``size`` of them at a time."""
        for start in range(first, len(self), size):
            yield self.images(range(start, min(start + size, len(self))))

    def images(self, rows: Sequence[int] | range) -> Tensor:
        """``[n, 3, H, W]`` uint8 faces of these rows, in this order."""
        decoded = [self._decode(data, row) for data, row in zip(self.encoded(rows), rows)]
        if len({image.shape for image in decoded}) > 1:
            raise InputError(f"{self.folder}: faces have different sizes; they must be crops of one size")
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) if decoded else torch.empty(0, 3, 1, 1).byte()

    def encoded(self, rows: Sequence[int] | range) -> list[bytes]:
        """The bytes of the image files of these rows."""
        found: list[bytes] = [b""] * len(rows)
        for (shard, group), places in self._by_group(rows).items():
            column = self._group(shard, group, "image")
            for place, inside in places:
                found[place] = column[inside]["bytes"].as_py() or b""
        return found

    def column(self, name: str, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """A numeric column, ``[N]`` or ``[N, k]``: whole, or of ``rows`` in their order.

        Raises:
            InputError: there is none of this name, it holds no numbers or not in every row, or a shard is damaged.
        """
        if name not in self.columns or name == "image":
            raise InputError(f"{self.folder}: has no numeric column {name!r}; it has {', '.join(self.columns)}")
        what = f"{self.folder}: column {name!r}"
        if rows is None:
            parts = [numbers(self._read(shard, name), what) for shard in range(len(self.files))]
            places: Sequence[int] | slice = slice(None)
        else:
            wanted = self._by_group(rows)
            parts = [numbers(self._group(*self._groups[0], name), what)[:0]]
            for (shard, group), found in wanted.items():
                parts.append(numbers(self._group(shard, group, name), what)[[inside for _, inside in found]])
            places = np.argsort([place for found in wanted.values() for place, _ in found]).tolist()
        parts = [part for part in parts if len(part)] or parts[:1]
        if len({part.shape[1:] for part in parts}) > 1:
            raise InputError(f"{what} holds lists of unequal length")
        return np.concatenate(parts)[places]

    def identities(self) -> np.ndarray | None:
        """``[N]`` the column ``identity``; None where there is none.

        Raises:
            InputError: it is one and the same on all faces, so that there is no pair of strangers.
        """
        if "identity" not in self.columns:
            return None
        found = self.column("identity").astype(np.int64)
        if found.min() == found.max() >= 0:
            raise InputError(f"{self.folder}: all faces have one identity, and pairs of strangers are needed")
        return found

    def _by_group(self, rows: Sequence[int] | np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """By shard and row group: places in ``rows``, and rows in that group."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, row in enumerate(rows):
            shard, group, inside = self._where(int(row))
            wanted.setdefault((shard, group), []).append((place, inside))
        return wanted

    def _where(self, row: int) -> tuple[int, int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        return *self._groups[number], row - int(self._group_starts[number])

    def _group(self, shard: int, group: int, column: str) -> pa.Array:
        if getattr(self, "_last", (None,))[0] != (shard, group, column):
            self._last = (shard, group, column), self._read(shard, column, group)
        return self._last[1]

    def _read(self, shard: int, column: str, group: int | None = None) -> pa.Array:
        file = self.files[shard]
        try:
            read = file.read(columns=[column]) if group is None else file.read_row_group(group, columns=[column])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.paths[shard]}: damaged ({error})") from error
        chunks = read[column].chunks
        return pa.concat_arrays(chunks) if chunks else pa.array([], read.schema.field(column).type)

    def _decode(self, data: bytes, row: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if max(image.size) > MAX_SIDE:  # known from the header, before anything is decoded
                    raise InputError(f"{self.folder}: row {row} is larger than {MAX_SIDE} pixels")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.folder}: row {row} is not a readable image") from error


def numbers(array: pa.Array, what: str) -> np.ndarray:
    """Values of a numeric column, ``[n]``, or ``[n, k]`` where its entries are lists of equal length.

    Args:
        what: the column, for messages.

    Raises:
        InputError: they are not, or some are missing.
    """
    lists = any(is_list(array.type) for is_list in (pa.types.is_fixed_size_list, pa.types.is_list))
    values = array.flatten() if lists else array
    if array.null_count or values.null_count:
        raise InputError(f"{what} lacks a number in some rows")
    even = not lists or len(pc.unique(pc.list_value_length(array))) <= 1
    if not even or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise InputError(f"{what} holds no numbers, or lists of unequal length")
    found: np.ndarray = values.to_numpy(zero_copy_only=False)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError(f"{what} holds numbers that are not finite")
    return found.reshape(len(array), -1) if lists and len(array) else found


def check_framing(faces: Faces, recognizer: Recognizer, name: str) -> None:
    """Compare how the faces of a corpus are cut, where it says so, with what a network knows.

    Raises:
        InputError: they are cut otherwise.
    """
    same_framing(faces.manifest.get("framing"), recognizer.spec.framing, str(faces.folder), name)


def digest(recognizer: Recognizer) -> str:
    """SHA-256 of what a recognizer computes with: its input convention, its architecture and its weights."""
    told = [recognizer.spec.asdict(), recognizer.name, recognizer.options]
    found = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    found.update(getattr(recognizer.backbone, "model", b""))  # a graph that onnxruntime computes holds its own weights
    for name, tensor in sorted(recognizer.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def embeddings(
    recognizer: Recognizer, faces: Faces, cache: str | Path, device: str = "auto", progress: bool = True
) -> Floats:
    """Embeddings ``[N, D]`` of all faces as the network emits them (any norm), computed once and kept in ``cache``.

    The cache is keyed by weights and faces and written in parts: an interrupted run goes on.

    Raises:
        InputError: a part of the cache is damaged, or an embedding is not finite.
    """
    where = chosen_device(device)
    key = hashlib.sha256(f"{digest(recognizer)} {faces.fingerprint}".encode()).hexdigest()[:16]
    folder = Path(cache) / f"embeddings-{key}"
    recognizer = recognizer.to(where).eval()
    parts = []
    bar = tqdm(total=len(faces), desc="embed", unit="face", disable=not progress)
    for number, first in enumerate(range(0, len(faces), PART)):
        path = folder / f"part-{number:06d}.npy"
        stop = min(first + PART, len(faces))
        if not path.is_file():
            rows = []
            for start in range(first, stop, BATCH):
                images = faces.images(range(start, min(start + BATCH, stop))).to(where)
                with torch.inference_mode():
                    rows.append(recognizer(images).embedding.float().cpu().numpy())
                bar.update(len(images))
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.concatenate(rows), allow_pickle=False)
        else:
            bar.update(stop - first)
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it and run again") from error
        if part.shape != (stop - first, recognizer.embedding_dim) or part.dtype != np.float32:
            raise InputError(f"{path}: damaged; delete it and run again")
        if not (finite := np.isfinite(part).all(1)).all():
            raise InputError(
                f"{faces.folder}: row {first + int(finite.argmin())}: its embedding is not finite: the network is "
                "broken"
            )
        parts.append(part)
    bar.close()
    return np.concatenate(parts)


def unit(rows: Floats, *, center: bool = False) -> Floats:
    """Rows of length 1; with ``center`` after the mean of all rows is taken from each."""
    if center:
        rows = rows - rows.mean(0, dtype=np.float64).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
