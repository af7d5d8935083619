"""What every detector does: photographs of one size in, one face's landmarks for each of them out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from faceless.align import SCHEMES, Landmarks
from faceless.errors import InputError

CHOICES = ("largest", "best")


@dataclass(frozen=True)
class Faces:
    """All faces in one photograph, the best first.

    Attributes:
        boxes: ``[K, 4]`` left, top, right, bottom in pixels of the photograph.
        points: ``[K, 5, 2]`` landmarks.
        scores: ``[K]``.
    """

    boxes: Tensor
    points: Tensor
    scores: Tensor


class Detector(ABC):
    """Finds faces.

    Attributes:
        scheme: of the landmarks, see `faceless.align`.
    """

    scheme: str

    @abstractmethod
    def find(self, images: Tensor) -> Landmarks:
        """One face in each of ``images [N, 3, H, W]`` uint8 RGB; pure in its input, on any batch split."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Name, weights and their licences, for the record."""


def checked(images: Tensor) -> Tensor:
    """uint8 photographs ``[N, 3, H, W]``."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"photographs are uint8 [N, 3, H, W], these are {images.dtype} {list(images.shape)}")
    return images


def checked_choice(choose: str) -> str:
    """Which of several faces in one photograph counts."""
    if choose not in CHOICES:
        raise InputError(f"choose is {choose!r}; use one of {', '.join(CHOICES)}")
    return choose


def chosen(found: Sequence[Faces], scheme: str, choose: str) -> Landmarks:
    """One face for each photograph: the largest, or that of the highest score."""
    points = torch.full((len(found), SCHEMES[scheme], 2), torch.nan)
    score = torch.full((len(found),), torch.nan)
    count = torch.tensor([len(faces.scores) for faces in found], dtype=torch.long)
    for row, faces in enumerate(found):
        if len(faces.scores):
            sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
            which = int(sides.prod(1).argmax() if choose == "largest" else faces.scores.argmax())
            points[row], score[row] = faces.points[which], faces.scores[which]
    return Landmarks(points, count > 0, score, (count > 0).long() - 1, whole_image=False, faces=count)


def shrunk(images: Tensor, longer_side: int) -> tuple[Tensor, Tensor]:
    """Photographs of which the longer side has at most so many pixels, and the factors ``[2]`` of x and y."""
    height, width = images.shape[-2:]
    factor = longer_side / max(height, width)
    if factor >= 1:
        return images, torch.ones(2)
    new = max(1, round(height * factor)), max(1, round(width * factor))
    # Channels last in memory: the resizing of uint8 is then vectorized.
    small = F.interpolate(images.contiguous(memory_format=torch.channels_last), new, mode="bilinear", antialias=True)
    return small, torch.tensor([new[1] / width, new[0] / height])
