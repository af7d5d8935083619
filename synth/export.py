"""Copy a corpus into another layout: ``python synth/export.py --corpus corpora/dcgan --output faces``.

Image files are the bytes of the corpus, not encoded anew. The output takes its name when it is complete; a command that
was stopped begins again.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from faceless.errors import InputError, command
from faceless.files import writing
from faceless.settings import parse
from synth.corpus import Corpus

SUFFIX = {"png": "png", "jpeg": "jpg", "webp": "webp"}
PER_FOLDER = 10_000


@dataclass
class Export:
    """What to copy, and how.

    Args:
        corpus: folder of the corpus.
        output: folder to be made; it must not be there.
        layout: ``imagefolder``, image files and ``metadata.jsonl``, or ``webdataset``, tar files of which each sample
            is an image and a ``json``.
        rows_per_tar: samples in each tar.
        vectors: also copy latents and embeddings: a ``.npy`` per column, or per sample in tars.
        verify: compare the SHA-256 of every shard with the manifest first.
    """

    corpus: str
    output: str
    layout: Literal["imagefolder", "webdataset"] = "imagefolder"
    rows_per_tar: int = 10_000
    vectors: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        if self.rows_per_tar < 1:
            raise InputError(f"rows_per_tar is {self.rows_per_tar}; it must be at least 1")


def export(wanted: Export, progress: bool = True) -> Path:
    """Write the copy; returns its folder.

    Raises:
        InputError: no corpus, a damaged one, the output is there already, or the disk is full.
    """
    corpus, target = Corpus(wanted.corpus), Path(wanted.output)
    if target.exists():
        raise InputError(f"{target}: is there already; choose another output or delete it")
    if corpus.manifest["image"].get("format") not in SUFFIX:
        raise InputError(f"{corpus.folder}: images of an unknown format; known are {', '.join(SUFFIX)}")
    if wanted.verify:
        corpus.verify()
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with writing(target), tqdm(total=len(corpus), desc="export", unit="face", disable=not progress) as bar:
        part.mkdir(parents=True)
        write = image_folder if wanted.layout == "imagefolder" else tars
        for done in write(corpus, part, wanted):
            bar.update(done)
        for name in ("manifest.json", "DATASHEET.md"):
            if (corpus.folder / name).is_file():
                shutil.copyfile(corpus.folder / name, part / name)
        part.replace(target)
    return target


def portions(
    corpus: Corpus, vectors: bool
) -> Iterator[tuple[list[bytes], dict[str, list[Any]], dict[str, np.ndarray]]]:
    """Images, plain columns and long ones (``[n, k]``) of a few hundred rows at a time."""
    names = [name for name in corpus.columns if re.fullmatch(r"\w+", name) and name not in ("image", "size")]
    first = 0
    for rows in corpus.tables(names):
        long = [name for name in names if is_long(rows.schema.field(name).type)]
        plain = {name: rows[name].to_pylist() for name in names if name not in long}
        arrays = {
            name: np.asarray(rows[name].combine_chunks().flatten()).reshape(len(rows), -1)
            for name in (long if vectors else ())
        }
        yield corpus.encoded(range(first, first + len(rows))), plain, arrays
        first += len(rows)


def is_long(kind: pa.DataType) -> bool:
    """Whether a column is an embedding or a latent rather than a few numbers."""
    return pa.types.is_fixed_size_list(kind) and kind.list_size > 16


def image_folder(corpus: Corpus, folder: Path, wanted: Export) -> Iterator[int]:
    """``IDENTITY/INDEX.png`` if the corpus has identities, else ``NUMBER/INDEX.png`` with 10,000 files a folder."""
    suffix = SUFFIX[corpus.manifest["image"]["format"]]
    columns: dict[str, Any] = {}
    row, made = 0, set()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for images, plain, arrays in portions(corpus, wanted.vectors):
            for i, data in enumerate(images):
                within = int(plain["identity"][i]) if "identity" in plain else (row + i) // PER_FOLDER
                name = f"{within:06d}/{int(plain['index'][i]):010d}.{suffix}"
                if within not in made:
                    (folder / f"{within:06d}").mkdir(exist_ok=True)
                    made.add(within)
                (folder / name).write_bytes(data)
                record = {"file_name": name} | {key: column[i] for key, column in plain.items()}
                lines.write(json.dumps(record) + "\n")
            for key, values in arrays.items():
                if key not in columns:
                    shape = (len(corpus), values.shape[1])
                    columns[key] = np.lib.format.open_memmap(folder / f"{key}.npy", "w+", values.dtype, shape)
                columns[key][row : row + len(values)] = values
            row += len(images)
            yield len(images)


def tars(corpus: Corpus, folder: Path, wanted: Export) -> Iterator[int]:
    """``faces-000000.tar`` …: the files of a sample share their name up to the first dot."""
    suffix = SUFFIX[corpus.manifest["image"]["format"]]
    row, tar = 0, None
    try:
        for images, plain, arrays in portions(corpus, wanted.vectors):
            for i, data in enumerate(images):
                if row % wanted.rows_per_tar == 0:
                    if tar is not None:
                        tar.close()
                    path = folder / f"faces-{row // wanted.rows_per_tar:06d}.tar"
                    tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                assert tar is not None
                key = f"{int(plain['index'][i]):010d}"
                add(tar, f"{key}.{suffix}", data)
                add(tar, f"{key}.json", json.dumps({name: column[i] for name, column in plain.items()}).encode())
                for name, values in arrays.items():
                    file = io.BytesIO()
                    np.save(file, values[i])
                    add(tar, f"{key}.{name}.npy", file.getvalue())
                row += 1
            yield len(images)
    finally:
        if tar is not None:
            tar.close()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file with neither date nor owner, so that the same corpus gives the same tar."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    wanted = parse(Export, arguments, program="synth/export.py", description=(__doc__ or "").split("\n\n")[0]).build()
    folder = export(wanted)
    print(f"{folder}: {len(Corpus(wanted.corpus))} faces as {wanted.layout}")


if __name__ == "__main__":
    command(main)()
