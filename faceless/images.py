"""Photographs of strangers to pixels: decoded by Pillow alone, with sizes that are checked before memory is taken."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from faceless.errors import InputError

#: Decoders that run inside Pillow; others, such as PostScript's, start programs.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_BYTES = 64 << 20
MAX_PIXELS = 40_000_000


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key that puts ``s2`` before ``s10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def read_image(path: Path) -> Tensor:
    """One photograph ``[3, H, W]`` uint8 RGB, turned upright as its EXIF data say.

    Raises:
        InputError: not an image, too large, or not of 8 bits per channel.
        PermissionError: closed to us.
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
    except (InputError, PermissionError):
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise InputError(f"{where}: cannot be read as an image; remove it or replace it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
