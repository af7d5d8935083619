"""Corpora from methods that learn: `Synthesizer`, run to the end for every batch of faces."""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor

from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from synth.inversion.base import Inverter, Synthesizer, frozen


class Synthesized(Inverter):
    """Faces of a method that trains a generator against the teacher: one anew for every batch of the corpus.

    So a batch depends on its own numbers alone, and other batches come from other generators, which one generator's
    habits do not limit. Its cost is shared by the faces of a batch: make ``batch`` of the corpus large.

    Args:
        teacher: anything `faceless.load` takes.
        synthesizer: the method.
        rounds: that it learns for before its faces count.
        training_batch: faces per round.
        student: for the adversarial term: anything `faceless.load` takes; it stays as it is. (To train one along, use
            `distill.synthesis.SynthesisSource` instead.)
    """

    def __init__(
        self,
        *,
        teacher: str | Recognizer,
        synthesizer: Synthesizer,
        rounds: int = 500,
        training_batch: int = 128,
        student: str | Recognizer | None = None,
    ):
        super().__init__(teacher, synthesizer.face_size)
        if rounds < 1 or training_batch < 2:
            raise InputError("rounds must be at least 1, and training_batch at least 2")
        if student is not None and not synthesizer.competes:
            raise InputError(
                f"student: {type(synthesizer).__name__} looks at none unless adversarial (or adaptive) is set; "
                "set it or leave student out"
            )
        self.synthesizer, self.rounds, self.training_batch = synthesizer, rounds, training_batch
        self.student = None if student is None else frozen(student)
        self.begin(0)  # what the method lacks shows now and not in a worker

    def against(self) -> Recognizer | None:
        return self.student

    def begin(self, seed: int) -> Synthesizer:
        method = copy.deepcopy(self.synthesizer)
        method.seed += seed
        method.begin(self.teacher, self.student, self.teacher_name)
        return method

    @torch.inference_mode(False)
    def invert(self, n: int, rng: Rng) -> Tensor:
        method = self.begin(int(rng.rows(slice(0, 1)).child("generator").integers(1 << 31, 1)))

        def numbers(purpose: str) -> Rng:
            """Of as many samples as a round has, by the first of this batch."""
            name = f"{rng.purpose}/{purpose}/{int(rng.indices[0])}"
            return Rng.of(rng.seed, name, range(self.training_batch), rng.step)

        # Faces are normalized together: as many at a time as the generator has learned with.
        batches = -(-n // self.training_batch)
        rounds = self.rounds if method.draws else self.rounds + batches - 1
        made = deque((method.learn(number, numbers(f"round {number}")) for number in range(rounds)), maxlen=batches)
        if method.draws:
            made.extend(method.draw(numbers(f"draw {number}")) for number in range(batches))
        return torch.cat(list(made))[:n]
