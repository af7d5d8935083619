"""Faces from methods that learn from teacher and student while the run goes (`synth.inversion.base.Synthesizer`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.gather import gather
from distill.sources import Batch, Place, Source
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.inversion.base import Synthesizer


class SynthesisSource(Source):
    """Data-free distillation: rounds of a method alternate with steps of the student.

    Every process computes every round in full, from the same random numbers, and takes its share of the faces: the
    networks are the same everywhere, so the faces are too, whatever the number of processes. Checkpoints hold the pool.

    Args:
        synthesizer: the method.
        every: steps of the student per round.
        faces: per round; None for the batch size.
        pool: faces of earlier rounds that are kept, the newest ones, for batches to be drawn from; 0 shows what the
            method draws afresh at each step, for methods that keep a generator.
        priority: exponent of prioritized replay (SSD-KD): a face of the pool is drawn with a probability P proportional
            to ``(1 - cos)^priority`` of student and teacher when they last saw it; 0 draws all alike.
        correction: exponents, at the start and the end of the run and linear between, of the weights that make up for
            it: the term of a face in the losses counts ``(N P)^-exponent`` times, N being the faces in the pool. With
            1, the expected loss of a batch is the mean over the pool, whatever the priorities. 0 weights nothing.

    Known of SSD-KD (Liu et al., CVPR 2024), whose code was not published: priorities from the divergence of student and
    teacher, and weights of this form. Chosen: the cosine in the divergence's place, and an exponent that grows (Schaul
    et al.: Prioritized Experience Replay, ICLR 2016, section 3.4). Left out: dividing by the largest weight, as there,
    which only makes steps smaller; and the modulating function, which is in the synthesis.
    """

    def __init__(
        self,
        *,
        synthesizer: Synthesizer,
        every: int = 1,
        faces: int | None = None,
        pool: int = 0,
        priority: float = 0.0,
        correction: tuple[float, float] = (0.0, 0.0),
    ):
        if every < 1 or pool < 0 or priority < 0 or (faces is not None and faces < 2):
            raise InputError("source: every must be at least 1, faces at least 2, pool and priority not negative")
        if priority and not pool:
            raise InputError("source: priority needs a pool to choose from")
        if not all(0 <= exponent <= 1 for exponent in correction):
            raise InputError(f"source: correction is {list(correction)}; both exponents lie in 0..1")
        if any(correction) and not priority:
            raise InputError("source: correction makes up for priority, which is 0: all faces are drawn alike")
        if not pool and not synthesizer.draws:
            raise InputError(f"source: {type(synthesizer).__name__} makes faces in rounds only: set pool to keep them")
        self.synthesizer, self.every, self.faces = synthesizer, every, faces
        self.pool, self.priority, self.correction = pool, priority, correction
        self.weighs = any(correction)
        self.begun = False
        self.rounds, self.stored = 0, 0
        self.kept = torch.empty(0, dtype=torch.uint8)
        self.worth = torch.empty(0)

    def check_framing(self, wanted: str) -> None:
        """The faces come out of the teacher, and so as it knows them."""

    def prepare(self, place: Place) -> None:
        self.place = place
        place.share()
        if place.held_out:
            raise InputError("validation.faces must be 0: the faces of this source do not exist before they are used")

    def watch(self, teacher: Recognizer, student: Recognizer) -> None:
        self.begun = True
        self.student = student.eval()
        self.synthesizer.begin(teacher, student, str(teacher.source.get("source") or teacher.name))
        side = self.synthesizer.face_size or teacher.spec.height
        self.kept = torch.zeros(self.pool, 3, side, side, dtype=torch.uint8, device=self.place.device)
        self.worth = torch.ones(self.pool, device=self.place.device)

    def batch(self, step: int) -> Batch:
        seed, size = self.place.seed, self.place.batch_size
        if step == self.rounds * self.every:
            numbers = Rng.of(seed, "synthesis", range(self.faces or size), step=self.rounds)
            self.student.eval()
            self.keep(self.synthesizer.learn(self.rounds, numbers))
            self.student.train()
            self.rounds += 1
        samples = torch.arange(step * size, (step + 1) * size)
        mine = samples[self.place.share()]
        view = Rng.of(seed, "view", mine)
        if not self.pool:
            # The whole batch, because its faces are normalized together.
            return Batch(self.draw("draw", samples)[self.place.share()], view)
        rows = self.choose(Rng.of(seed, "pool", mine))
        weights = self.weights(rows, step) if self.weighs else None
        return Batch(self.kept[rows], view, rows=rows, weights=weights)

    def draw(self, purpose: str, samples: Tensor) -> Tensor:
        return self.synthesizer.draw(Rng.of(self.place.seed, purpose, samples))

    @torch.no_grad()
    def keep(self, faces: Tensor) -> None:
        """Put faces into the pool, the oldest making way; new ones are worth as much as any."""
        if not self.pool:
            return
        faces = faces[-self.pool :]
        places = (self.stored + torch.arange(len(faces), device=self.kept.device)) % self.pool
        self.kept[places] = faces.round().clamp(0, 255).to(torch.uint8)
        self.worth[places] = 1.0
        self.stored += len(faces)

    def choose(self, rng: Rng) -> Tensor:
        """Rows of the pool, ``[len(rng)]``."""
        upto = self.chances().cumsum(0)
        wanted = rng.uniform()[:, None].to(upto)[:, 0] * upto[-1]
        return torch.searchsorted(upto, wanted, right=True).clamp(max=len(upto) - 1)

    def chances(self) -> Tensor:
        """``[N]``: how likely each face of the pool is drawn, up to a factor."""
        return self.worth[: min(self.stored, self.pool)].double().pow(self.priority)

    def weights(self, rows: Tensor, step: int) -> Tensor:
        """``[len(rows)]``: what makes up in the losses for how likely these rows of the pool are drawn."""
        first, last = self.correction
        exponent = first + (last - first) * step / max(self.place.steps, 1)
        chance = self.chances()
        return (chance[rows] / chance.mean()).pow(-exponent).float()

    def feedback(self, batch: Batch, student: Output, teacher: Output) -> None:
        if not self.priority:
            return
        assert batch.rows is not None
        distance = 1 - F.cosine_similarity(student.embedding.detach().float(), teacher.embedding.float())
        rows, values = gather(batch.rows), gather(distance.clamp(min=1e-3))
        # Of several views of a face in one batch, the one that differed most.
        self.worth.scatter_reduce_(0, rows, values, "amax", include_self=False)

    def held_out(self) -> Tensor:
        return torch.empty(0, 3, 8, 8, dtype=torch.uint8)

    def sample(self, count: int) -> Tensor:
        if not self.begun:
            raise InputError(
                "an ensemble is aligned on faces of the source, and those of SynthesisSource do not exist before the "
                "run starts: name one recognizer as teacher"
            )
        if self.pool:
            return self.kept[: min(count, self.stored, self.pool)].cpu()
        chunks = [self.draw("sample", samples) for samples in torch.arange(count).split(self.place.batch_size)]
        return torch.cat(chunks).round().clamp(0, 255).byte().cpu()

    def record(self) -> dict[str, Any]:
        return {"kind": "synthesis", "real_faces": False, "generator": type(self.synthesizer).__name__}

    def state_dict(self) -> dict[str, Tensor]:
        held = min(self.stored, self.pool)
        pool = {"kept": self.kept[:held].cpu(), "worth": self.worth[:held].cpu()} if self.pool else {}
        return self.synthesizer.state() | pool | {"rounds": torch.tensor([self.rounds, self.stored])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "rounds" not in state:
            raise InputError("this checkpoint belongs to another source than SynthesisSource")
        state = dict(state)
        self.rounds, self.stored = state.pop("rounds").tolist()
        for name, whole in (("kept", self.kept), ("worth", self.worth)):
            if name in state:
                part = state.pop(name)
                whole[: len(part)] = part.to(whole.device)
        self.synthesizer.restore(state)
