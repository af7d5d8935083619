"""The seam of everything that makes faces out of nothing but a teacher."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from synth.generators.base import FaceMaker


class Inverter(FaceMaker):
    """Faces without latents. Those of one call are made together: they depend on each other, and on nothing else.

    Args:
        teacher: anything `faceless.load` takes, or a recognizer; it is frozen.
        face_size: side of the faces in pixels; None for the side of the teacher's input.
    """

    def __init__(self, teacher: str | Recognizer, face_size: int | None = None):
        super().__init__()
        self.teacher = frozen(teacher)
        self.face_size = self.teacher.spec.height if face_size is None else face_size
        if not 8 <= self.face_size <= 1024:
            raise InputError(f"face_size is {self.face_size}; it must be from 8 to 1024")
        self.licence = f"that of the teacher {self.teacher_name}"

    @abstractmethod
    def invert(self, n: int, rng: Rng) -> Tensor:
        """``[n, 3, face_size, face_size]`` RGB float in 0..255; ``len(rng) == n``."""

    def make(self, rng: Rng, dtype: torch.dtype = torch.float32) -> tuple[None, Tensor]:
        return None, self.invert(len(rng), rng)

    @property
    def teacher_name(self) -> str:
        return str(self.teacher.source.get("source") or self.teacher.name or type(self.teacher.backbone).__name__)

    def provenance(self) -> dict[str, Any]:
        """The faces come from the teacher's weights, so those are the generator's weights."""
        found = self.teacher.source
        return super().provenance() | {"teacher": self.teacher_name, "weights_sha256": found.get("sha256")}


def frozen(network: str | Recognizer) -> Recognizer:
    """A recognizer that is only looked through: in eval mode, with gradients for its input alone."""
    loaded = network if isinstance(network, Recognizer) else faceless.load(network)
    # On a CPU convolutions are faster with channels last, which the recognizer's input has anyway.
    return loaded.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """From the -1..1 that is optimized in to 0..255; differentiable."""
    return images * 127.5 + 127.5
