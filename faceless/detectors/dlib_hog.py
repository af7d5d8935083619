"""dlib's HOG detector and landmark predictors (Dalal and Triggs, CVPR 2005; Kazemi and Sullivan, CVPR 2014)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from faceless import align, assets
from faceless.align import Landmarks
from faceless.detectors.base import Detector, checked
from faceless.errors import InputError


class Dlib(Detector):
    """Frontal faces of 80 pixels and more; small photographs are enlarged, as `align.THOROUGH` says.

    Args:
        points: 5 (for ``dlib`` framing) or 68 (for both).
        detect_size: the longer side of larger photographs is shrunk to so many pixels before faces are searched.

    Raises:
        InputError: another number of points, or a size below 80.
    """

    def __init__(self, *, points: int = 68, detect_size: int = 640):
        if points not in (5, 68):
            raise InputError(f"points is {points}; dlib's predictors find 5 or 68")
        if detect_size < 80:
            raise InputError(f"detect_size is {detect_size}; dlib's detector sees 80 pixels at a time")
        self.points, self.detect_size, self.scheme = points, detect_size, f"dlib{points}"

    def find(self, images: Tensor) -> Landmarks:
        large = max(checked(images).shape[-2:]) > self.detect_size
        return align.detect(
            images,
            points=self.points,
            detect_size=self.detect_size if large else None,
            attempts=align.THOROUGH,
        )

    def provenance(self) -> dict[str, Any]:
        return {"detected_by": "dlib", "assets": [assets.ASSETS[f"dlib-landmarks-{self.points}"].record()]}
