"""The seams of everything that makes faces out of nothing but a teacher (and a student)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
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
        return named(self.teacher)

    def against(self) -> Recognizer | None:
        """The student that the faces are made against, where there is one."""
        return None

    def provenance(self) -> dict[str, Any]:
        """The faces come from the teacher's weights, so those are the generator's weights; and from the student's."""
        found, student = super().provenance(), self.against()
        found |= {"teacher": self.teacher_name, "weights_sha256": self.teacher.source.get("sha256")}
        if student is not None:
            found |= {"student": named(student), "student_sha256": student.source.get("sha256")}
        return found


class Synthesizer(nn.Module, ABC):
    """A method that makes faces for a student, and learns from teacher and student while it does.

    Constructed from settings; ready after `begin`. What a round makes depends on its number, its random numbers, the
    state and the two networks alone. Networks are in eval mode whenever a method looks at them; its caller sees to it.

    Attributes:
        face_size: side of its faces; None for that of the teacher's input.
        seed: of initial weights.
        draws: whether `draw` has faces at any time, besides those that rounds make.
        competes: whether it looks at a student, as it is set.
    """

    face_size: int | None = None
    seed: int = 0
    draws = False
    competes = True

    @abstractmethod
    def begin(self, teacher: Recognizer, student: Recognizer | None, name: str) -> None:
        """Meet the networks, once. The student goes on learning meanwhile; it is only looked at.

        Args:
            name: of the teacher, for messages.

        Raises:
            InputError: the teacher lacks what the method needs, or there is no fitting student and it needs one.
        """

    @abstractmethod
    def learn(self, number: int, rng: Rng) -> Tensor:
        """Round ``number``: learn from the networks; returns ``[len(rng), 3, S, S]`` faces in 0..255."""

    def draw(self, rng: Rng) -> Tensor:
        """Faces as the method makes them now; only where it ``draws``."""
        raise InputError(f"{type(self).__name__} makes faces in rounds only: set pool, to keep them in")

    def state(self) -> dict[str, Tensor]:
        """Everything that later rounds depend on."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave, after `begin`."""


def named(network: Recognizer) -> str:
    """Where a recognizer came from, or else what it is."""
    return str(network.source.get("source") or network.name or type(network.backbone).__name__)


def frozen(network: str | Recognizer) -> Recognizer:
    """A recognizer that is only looked through: in eval mode, with gradients for its input alone."""
    loaded = network if isinstance(network, Recognizer) else faceless.load(network)
    # On a CPU convolutions are faster with channels last, which the recognizer's input has anyway.
    return loaded.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """From the -1..1 that is optimized in to 0..255; differentiable."""
    return images * 127.5 + 127.5


@torch.no_grad()
def answers(network: Recognizer) -> Output:
    """What a network, in eval mode, says to two gray pictures: which outputs it has, and of what shape."""
    height, width = network.spec.height, network.spec.width
    return network(torch.full((2, 3, height, width), 127.0, device=network.scale.device))


def check_comparable(student: Recognizer, teacher: Recognizer, *, by_logits: bool = True) -> None:
    """Refuse a student whose answers cannot be compared with the teacher's: logits where both have them, or embeddings.

    Args:
        by_logits: False compares embeddings in any case.

    Raises:
        InputError: other classes, or another dimension.
    """
    mine, theirs = answers(student), answers(teacher)
    if by_logits and mine.logits is not None and theirs.logits is not None:
        if mine.logits.shape != theirs.logits.shape:
            raise InputError(
                f"student: it has {mine.logits.shape[1]} classes and the teacher {theirs.logits.shape[1]}; "
                "to be compared they need the same"
            )
    elif student.embedding_dim != teacher.embedding_dim:
        raise InputError(
            f"student: its embeddings have {student.embedding_dim} numbers and the teacher's "
            f"{teacher.embedding_dim}; their cosine needs as many"
        )
