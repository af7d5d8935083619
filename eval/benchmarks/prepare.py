"""Photographs on disk to aligned crops; whoever made the files is not trusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from faceless import align
from faceless.errors import InputError

#: Decoders that run inside Pillow; others, such as PostScript's, start programs.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_BYTES = 64 << 20
MAX_PIXELS = 40_000_000
#: Longer side of what the detector sees of large photographs.
DETECT_SIZE = 640
#: Pixels of the photographs that are aligned together.
BATCH_PIXELS = 4_000_000


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key that puts ``s2`` before ``s10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def read_image(path: Path) -> Tensor:
    """One photograph ``[3, H, W]`` uint8 RGB, turned upright as its EXIF data say.

    Raises:
        InputError: not an image, too large, or not of 8 bits per channel.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a file; a person's folder holds nothing but images")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(
            f"{path}: {path.stat().st_size / 1e6:.0f} MB are too many for an image; {MAX_BYTES >> 20} MiB at most"
        )
    return decode_image(path, str(path))


def decode_image(source: Path | bytes, where: str) -> Tensor:
    """`read_image` of a file or of its bytes; ``where`` they are from is for the error message."""
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source), formats=FORMATS) as image:
            width, height = image.size
            # Announced sizes, before a single pixel is unpacked.
            if width * height > MAX_PIXELS:
                raise InputError(f"{where}: {width} x {height} pixels; {MAX_PIXELS // 10**6} million at most")
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{where}: pixels of mode {image.mode}; save it with 8 bits per channel")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"{where}: cannot be read as an image; remove it or replace it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def crops(paths: Sequence[Path], framing: str, size: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Aligned crops of one face per photograph; few photographs are in memory at a time.

    Landmarks are those native to the framing: dlib's 5 points for its chip, 5 of the 68 for ArcFace's. Where no face is
    found, landmarks are predicted in the middle of the photograph: the crop is kept, marked and counted.

    Returns:
        ``[N, 3, size, size]`` uint8, ``[N]`` bool whether a face was found, and the counts.
    """
    points = 5 if framing == "dlib" else 68
    cut, found = [], []
    counts: Counter[str] = Counter()
    for batch in _batches(paths):
        large = max(batch.shape[2:]) > DETECT_SIZE
        landmarks = align.detect(
            batch,
            points=points,
            detect_size=DETECT_SIZE if large else None,
            attempts=align.THOROUGH,
            whole_image=True,
        )
        cut.append(align.crop(batch, landmarks.points, framing, size))
        found.append(landmarks.found)
        counts.update(landmarks.summary())
    return torch.cat(cut), torch.cat(found), {"landmarks": points, **counts}


def _batches(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Neighbors of equal size, up to ``BATCH_PIXELS`` together."""
    batch: list[Tensor] = []
    for path in paths:
        image = read_image(path)
        if batch and (image.shape != batch[0].shape or (len(batch) + 1) * image[0].numel() > BATCH_PIXELS):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)
