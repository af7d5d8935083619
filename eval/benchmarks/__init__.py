"""Real faces to judge a recognizer by; nothing here is ever trained on."""

from __future__ import annotations

from pathlib import Path

from eval.benchmarks import att_faces, folder
from eval.benchmarks.benchmark import Benchmark, parse_people
from faceless.align import FRAMINGS
from faceless.errors import InputError, suggest

__all__ = ["BENCHMARKS", "Benchmark", "load", "parse_people"]

BENCHMARKS = {att_faces.NAME: att_faces.load}
MAX_SIZE = 1024


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
    if str(source) in BENCHMARKS:
        return BENCHMARKS[str(source)](framing, size)
    if Path(source).is_dir():
        return folder.load(source, framing, size, align)
    raise InputError(f"{source}: no such benchmark or folder; {suggest(str(source), BENCHMARKS)}")
