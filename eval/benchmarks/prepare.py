"""Photographs on disk to aligned crops, a face in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceless import align
from faceless.images import read_image

#: Longer side of what the detector sees of large photographs.
DETECT_SIZE = 640
#: Pixels of the photographs that are aligned together.
BATCH_PIXELS = 4_000_000


def crops(paths: Sequence[Path], framing: str, size: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Aligned crops of one face per photograph; few photographs are in memory at a time.

    Landmarks are those native to the framing: dlib's 5 points for its chip, 5 of the 68 for ArcFace's. Where no face is
    found, landmarks are predicted in the middle of the photograph: the crop is kept, marked and counted.

    Returns:
        ``[N, 3, size, size]`` uint8, ``[N]`` bool whether a face was found, and the counts.
    """
    points = align.native_points(framing)
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
