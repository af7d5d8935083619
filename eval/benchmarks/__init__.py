"""Real faces to judge a recognizer by; nothing here is ever trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from eval.benchmarks import att_faces, folder, identification, ijb, pairs, people
from eval.benchmarks.benchmark import Benchmark, parse_people
from eval.benchmarks.conditions import under
from eval.benchmarks.protocol import Protocol, Report, evaluate
from faceless.align import FRAMINGS
from faceless.errors import InputError, suggest

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "Benchmark",
    "Protocol",
    "Report",
    "evaluate",
    "find",
    "load",
    "parse_people",
    "under",
]


def _templates(kind: str, pooling: str, path: str, framing: str, size: int) -> Protocol:
    return ijb.load(path, kind, pooling, framing, size)


BENCHMARKS = {att_faces.NAME: att_faces.load}
#: Benchmarks with protocols of their own, written ``kind:path``.
PROTOCOLS: dict[str, Callable[[str, str, int], Protocol]] = {
    "pairs": lambda path, framing, size: pairs.load(path, size),
    **{f"{kind}{pooling}": partial(_templates, kind, pooling) for kind in ijb.GALLERIES for pooling in ijb.POOLINGS},
    "megaface": lambda path, framing, size: identification.MegaFace(path, size),
    "rfw": lambda path, framing, size: pairs.load_groups(path, size),
    "tinyface": lambda path, framing, size: identification.TinyFace(path, size),
}
MAX_SIZE = 1024


def find(source: str | Path, framing: str = "dlib", size: int = 150, align: bool = False) -> Benchmark | Protocol:
    """Any benchmark: what `load` reads, larger folders, parquet, a ``.bin`` of pairs, or ``kind:path``.

    Args:
        framing, size, align: see `load`; protocols whose faces are crops already have the framing of those.

    Raises:
        InputError: no such benchmark, kind, file or folder.
    """
    kind, colon, path = str(source).partition(":")
    if colon and kind in PROTOCOLS and not Path(source).exists():
        return PROTOCOLS[kind](path, framing, size)
    if Path(source).is_file() and Path(source).suffix == ".bin":
        return pairs.load(source, size)
    if people.parquet_files(source):
        return people.from_parquet(source, framing, size)
    if str(source) not in BENCHMARKS and folder.is_large(Path(source)):
        return people.from_folder(source, framing, size, align)
    return load(source, framing, size, align)


def load(source: str | Path, framing: str = "dlib", size: int = 150, align: bool = False) -> Benchmark:
    """A benchmark by name, or a folder with one sub-folder of images for each person.

    Args:
        source: ``"att-faces"`` or a folder.
        framing, size: of the crops, as the recognizer wants them (`faceless.align`).
        align: of a folder: find faces and cut them out; otherwise its images are crops already.

    Raises:
        InputError: no such benchmark or folder, or images that cannot be used.
    """
    if framing not in FRAMINGS:
        raise InputError(f"framing is {framing!r}; use one of {', '.join(FRAMINGS)}")
    if not 16 <= size <= MAX_SIZE:
        raise InputError(f"size is {size}; crops have 16 to {MAX_SIZE} pixels")
    check_known(source)
    if str(source) in BENCHMARKS:
        return BENCHMARKS[str(source)](framing, size)
    return folder.load(source, framing, size, align)


def check_known(source: str | Path) -> None:
    """Raise InputError for what is neither a benchmark's name nor a folder."""
    if str(source) not in BENCHMARKS and not Path(source).is_dir():
        known = [*BENCHMARKS, *(f"{kind}:path" for kind in PROTOCOLS)]
        raise InputError(f"{source}: no such benchmark or folder; {suggest(str(source), known)}")
