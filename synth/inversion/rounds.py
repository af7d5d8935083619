"""Inversion in rounds, for a student that learns meanwhile."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from synth.inversion.base import Synthesizer
from synth.inversion.deep_inversion import DeepInversion


class InversionRounds(Synthesizer):
    """In every round a batch of faces by `DeepInversion`, if wished against the student as it is by then.

    Args:
        adaptive: weight of the competition with the student (Adaptive DeepInversion): see `DeepInversion`.
        **options: of `DeepInversion`, but for its networks.
    """

    def __init__(self, *, adaptive: float = 0.0, **options: Any):
        super().__init__()
        self.adaptive, self.face_size = adaptive, options.get("face_size")
        self.competes = bool(adaptive)
        self._options = options

    def begin(self, teacher: Recognizer, student: Recognizer | None, name: str) -> None:
        self.inverter = DeepInversion(teacher=teacher, adaptive=0.0, student=None, **self._options)
        if self.adaptive:
            if student is None:
                raise InputError("adaptive is not 0, which needs a student")
            self.inverter.compete(student, self.adaptive)

    def learn(self, number: int, rng: Rng) -> Tensor:
        return self.inverter.invert(len(rng), rng)
