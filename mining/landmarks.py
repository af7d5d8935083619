"""Where eyes, nose and mouth are in the faces of a corpus: ``python mining/landmarks.py --corpus corpora/quickstart``.

For losses that compare places of a face (`distill.losses.cross_architecture.URFM`). Needs dlib; on the CPU.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from faceless import align
from faceless.errors import InputError, command
from faceless.files import atomic_write
from faceless.settings import Settings, parse
from mining.embedding_index import Floats
from mining.faces import Faces

PART = 1024  # faces per file while the work is under way


@dataclass
class Marking:
    """What to look at.

    Args:
        corpus: folder of parquet shards with cropped faces.
        output: folder for ``landmarks.npy``: ``[faces, 5, 2]`` float32, x and y of eyes, nose tip and mouth corners in
            sides of the image from its upper left corner; NaN where no face was found. What ``CorpusSource`` takes as
            ``landmarks``; ``landmarks.json`` beside it names the faces.
        detect_size: side to which faces are enlarged for the detector, whose windows are 80 pixels wide.
    """

    corpus: str
    output: str = "mined/landmarks"
    detect_size: int = 224

    def __post_init__(self) -> None:
        if not 80 <= self.detect_size <= 2048:
            raise InputError(f"detect_size is {self.detect_size}; use 80 to 2048 pixels")


def landmarks(images: Tensor, detect_size: int) -> Tensor:
    """``[N, 5, 2]`` of ``images [N, 3, H, W]`` uint8, in sides of the image; NaN where no face is found."""
    found = align.detect(images, points=68, detect_size=detect_size)
    points = align.arcface_points(found.points)
    points[~found.found] = math.nan
    return (points + 0.5) / torch.tensor([images.shape[3], images.shape[2]])


def mark(settings: Marking, progress: bool = True) -> Floats:
    """Find and write the landmarks of a corpus; a command that was stopped goes on."""
    faces, output = Faces(settings.corpus), Path(settings.output)
    starts = range(0, len(faces), PART)
    # Parts of another corpus or size, from a command that was stopped, are not these.
    key = hashlib.sha256(f"{faces.fingerprint} {settings.detect_size}".encode()).hexdigest()[:16]
    paths = [output / f"part-{key}-{number:06d}.npy" for number in range(len(starts))]
    for first, path in zip(tqdm(starts, desc="landmarks", unit="part", disable=not progress), paths, strict=True):
        if not path.is_file():
            rows = range(first, min(first + PART, len(faces)))
            _write(path, landmarks(faces.images(rows), settings.detect_size).numpy())
    whole = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    note = {"fingerprint": faces.fingerprint, "faces": len(faces), "detect_size": settings.detect_size}
    atomic_write(output / "landmarks.json", json.dumps(note, indent=1) + "\n")
    _write(output / "landmarks.npy", whole)
    for path in paths:
        path.unlink()
    return whole


def _write(path: Path, array: Floats) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Marking] = parse(Marking, arguments, program="mining/landmarks.py", description=__doc__ or "")
    made = settings.build()
    found = mark(made)
    path = Path(made.output) / "landmarks.npy"
    print(f"{np.isfinite(found).all((1, 2)).sum()} of {len(found)} faces; source.init_args.landmarks {path}")


if __name__ == "__main__":
    command(main)()
