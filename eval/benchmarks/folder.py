"""Anybody's faces: a folder with one sub-folder of images for each person."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.prepare import crops
from faceless.errors import InputError
from faceless.images import natural, read_image
from faceless.recognizer import resize

#: All pairs of more faces than this do not fit into the memory of a small machine.
MAX_FACES = 5_000


def is_large(folder: Path) -> bool:
    """Whether a folder holds more faces than `load` takes."""
    files = (file for file in folder.glob("*/*") if not file.name.startswith("."))
    return next(islice(files, MAX_FACES, None), None) is not None


def listing(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images, the position of each one's person, and the people's names.

    Raises:
        InputError: no folder, no people, or a person without images.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    people = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural)
    if len(people) < 2:
        raise InputError(
            f"{folder}: holds {len(people)} sub-folders; verification needs one for each of two or more people"
        )
    paths: list[Path] = []
    identities: list[int] = []
    for number, person in enumerate(people):
        files = sorted((p for p in person.iterdir() if not p.name.startswith(".")), key=natural)
        if not files:
            raise InputError(f"{person}: holds no images; put some there or remove the folder")
        paths += files
        identities += [number] * len(files)
    return paths, identities, [person.name for person in people]


def load(folder: str | Path, framing: str = "dlib", size: int = 150, align: bool = False) -> Benchmark:
    """Read ``folder/<person>/<image>``; hidden files, and files beside the people's folders, are left out.

    Args:
        framing: of the crops, ``"dlib"`` or ``"arcface"``.
        size: of the crops in pixels.
        align: find the face in each photograph and cut it out. Without it, the images must be such crops already.

    Raises:
        InputError: no folder, no people, a person without images, something that is not an image, or too many images.
    """
    folder = Path(folder)
    paths, identities, names = listing(folder)
    if len(paths) > MAX_FACES:
        raise InputError(f"{folder}: {len(paths)} images; all pairs of at most {MAX_FACES} can be compared")
    if len(paths) == len(names):
        raise InputError(f"{folder}: nobody has two images, so there is no genuine pair")

    record: dict[str, Any] = {"name": folder.name, "source": str(folder), "framing": framing, "size": size}
    if align:
        images, found, record["alignment"] = crops(paths, framing, size)
        missed = [str(path.relative_to(folder)) for path, seen in zip(paths, found.tolist(), strict=True) if not seen]
        record["alignment"]["not detected"] = missed
    else:
        images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
        for row, path in enumerate(paths):
            images[row] = square(read_image(path), size, str(path))
        record["alignment"] = {"faces": len(paths), "as given": len(paths)}
    return Benchmark(folder.name, images, torch.tensor(identities), names, record)


def square(
    image: Tensor, size: int, where: str, hint: str = "use --align true to cut faces out of photographs"
) -> Tensor:
    """A crop ``[3, size, size]`` of an image that is one already.

    Raises:
        InputError: it is not square; ``where`` it is from and ``hint`` are for the message.
    """
    if image.shape[1] != image.shape[2]:
        raise InputError(f"{where}: {image.shape[2]} x {image.shape[1]} pixels are no aligned square crop; {hint}")
    return resize(image[None].float(), size, size)[0].round().clamp(0, 255).to(torch.uint8)
