"""What to draw next, given where the student disagrees with its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from faceless.errors import InputError
from faceless.randomness import Rng
from mining.disagreement import neighborhood, pointwise


class Around(NamedTuple):
    """Draw around ``centers [m, *latent]`` with standard deviations ``scales [m]``."""

    centers: Tensor
    scales: Tensor


class Resampling(ABC):
    """Decides what a step draws around, and learns from how its faces were judged.

    A step asks `plan` once, then reports to `learn`. Both see the global batch, so that all processes hold the same
    state; `plan` draws from ``(seed, step)`` and the state alone.

    Attributes:
        state: everything that was learned, by name; checkpointed.
        mixes: whether it draws around points between latents, which a generator's must allow (`Generator.continuous`).
    """

    names: tuple[str, ...]
    mixes = False

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def plan(self, step: int, count: int, seed: int) -> Around | None:
        """Where the first so many of the ``count`` samples of a step are drawn around; the others are drawn afresh."""

    @abstractmethod
    def learn(self, step: int, latents: Tensor, student: Tensor, teacher: Tensor, shown: Tensor) -> None:
        """Take in a step's latents ``[B, *latent]`` and the unit embeddings ``[B, D]`` of their faces.

        Args:
            shown: ``[B]`` whether a picture shows a face, as far as is known. What two networks disagree on most is
                pictures without one, and drawing more of them teaches nothing.
        """

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self.state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state and set(state) != set(self.names):
            raise InputError(f"this checkpoint belongs to another resampling than {type(self).__name__}")
        self.state = dict(state)


class SynthDistillRule(Resampling):
    """Draw again around each latent, the further the better student and teacher agree on its face.

    Even steps draw fresh latents, odd steps those of the step before, perturbed with standard deviation
    ``coefficient * (1 + cos_i) / 2``: faces on which the student disagrees are revisited nearby, the others are left
    behind. Otroshi Shahreza, George, Marcel: SynthDistill, IJCB 2023, equation 4 and algorithm 1, which uses it in W of
    StyleGAN2 with coefficient 1.

    Args:
        coefficient: the largest standard deviation, as the generator's ``perturb`` takes it.

    >>> import torch
    >>> SynthDistillRule(coefficient=0.5).scale(torch.tensor([1.0, 0.0, -1.0]))
    tensor([0.5000, 0.2500, 0.0000])
    """

    names = ("latents", "scales", "step")

    def __init__(self, *, coefficient: float = 1.0):
        super().__init__()
        if coefficient <= 0:
            raise ValueError(f"coefficient is {coefficient}; it must be positive")
        self.coefficient = coefficient

    def scale(self, cosines: Tensor) -> Tensor:
        """Standard deviations ``[B]`` from student-teacher cosines ``[B]``."""
        return (1 + cosines) / 2 * self.coefficient

    def plan(self, step: int, count: int, seed: int) -> Around | None:
        if step % 2 == 0:
            return None
        if not self.state or int(self.state["step"]) != step - 1:
            raise InputError(f"step {step} needs the feedback of step {step - 1}, which this checkpoint lacks")
        return Around(self.state["latents"], self.state["scales"])

    def learn(self, step: int, latents: Tensor, student: Tensor, teacher: Tensor, shown: Tensor) -> None:
        # What follows an odd step is fresh. The rule as published knows nothing of pictures without a face.
        if step % 2 == 0:
            scales = self.scale((student * teacher).sum(1))
            self.state = {"latents": latents, "scales": scales, "step": torch.tensor(step)}


class HardPool(Resampling):
    """Keep the fresh latents on which the student disagrees most, and draw a share of every batch around them.

    Whom to revisit is drawn without replacement in proportion to its priority: 1 - cosine when the latent came in, and
    from then on the mean of what it was and what is measured on a face drawn around it. Priorities age, since a student
    that has moved on may have learned what it once did not know. Latents drawn around others never enter the pool:
    lines of ever farther descendants would leave the generator's domain, where everybody disagrees.

    Args:
        size: latents in the pool.
        share: of a batch that is drawn around the pool.
        scale: standard deviation of those draws, as the generator's ``perturb`` takes it.
        half_life: steps after which a priority counts half.
        by: ``pointwise``: as above. ``neighborhood``: instead of 1 - cosine, how far a face's nearest among the last
            faces differ between the two networks (`mining.disagreement.neighborhood`).
        neighbors, memory: how many nearest, of how many faces.
    """

    def __init__(
        self,
        *,
        size: int = 1024,
        share: float = 0.5,
        scale: float = 0.5,
        half_life: float = 100.0,
        by: Literal["pointwise", "neighborhood"] = "pointwise",
        neighbors: int = 10,
        memory: int = 1024,
    ):
        super().__init__()
        check_pool(min(size, neighbors, memory), share, half_life, scale)
        self.size, self.share, self.deviation = size, share, scale
        self.aging = 0.5 ** (1 / half_life)
        self.by, self.neighbors, self.memory = by, neighbors, memory
        self.names = ("latents", "priority") + (("student", "teacher") if by == "neighborhood" else ())
        self._drawn = torch.empty(0, dtype=torch.int64)

    def plan(self, step: int, count: int, seed: int) -> Around | None:
        if not self.state:
            return None
        self._drawn = chosen(self.state["priority"], int(self.share * count), seed, step)
        centers = self.state["latents"][self._drawn]
        return Around(centers, torch.full((len(centers),), self.deviation))

    def learn(self, step: int, latents: Tensor, student: Tensor, teacher: Tensor, shown: Tensor) -> None:
        drawn, memory = len(self._drawn), {}
        if self.by == "pointwise":
            disagreement = pointwise(student, teacher)
        else:
            new = {"student": student[drawn:], "teacher": teacher[drawn:]}
            old = {name: self.state.get(name, rows[:0]).to(rows) for name, rows in new.items()}
            known = old if self.state else new  # the first faces have each other only
            k = min(self.neighbors, len(known["student"]))
            disagreement = neighborhood(student, teacher, known["student"], known["teacher"], k)
            memory = {name: torch.cat((rows, old[name]))[: self.memory] for name, rows in new.items()}
        disagreement = disagreement * shown
        fresh = {"latents": latents[drawn:], "priority": disagreement[drawn:]}
        pool = {name: self.state[name].to(latents) for name in fresh} if self.state else {}
        if pool:
            revisited = self._drawn.to(latents.device)
            pool["priority"] = pool["priority"] * self.aging
            pool["priority"][revisited] = (pool["priority"][revisited] + disagreement[:drawn]) / 2
        self.state = best(pool, fresh, self.size) | memory
        self._drawn = self._drawn[:0]


class ConfusedPairs(Resampling):
    """Draw between faces that the student takes for alike and the teacher does not.

    Each fresh face is compared with the last ones: of those that the student has nearest to it, the partner is the one
    whose cosine it overrates most. A share of every batch lies on the way from one latent to the other, at a random
    point; pairs are drawn without replacement in proportion to the overrating, which ages, and is halved when a pair
    was drawn.

    Args:
        size: pairs that are kept.
        memory: faces of earlier steps that a new one is compared with.
        neighbors: how many of those count as alike to the student.
        share: of a batch that is drawn between pairs.
        scale: standard deviation around the point between the two, as the generator's ``perturb`` takes it.
        half_life: steps after which a pair's priority counts half.
        keep_norm: give the point the mean of the two norms that its distances call for; for Gaussian latents, between
            two of which everything is too close to the origin. Off for latents that are meant to be mixed linearly.
    """

    names = ("first", "second", "priority", "latents", "student", "teacher")
    mixes = True

    def __init__(
        self,
        *,
        size: int = 512,
        memory: int = 1024,
        neighbors: int = 10,
        share: float = 0.5,
        scale: float = 0.1,
        half_life: float = 100.0,
        keep_norm: bool = True,
    ):
        super().__init__()
        check_pool(min(size, memory, neighbors), share, half_life, scale)
        self.size, self.memory, self.neighbors, self.share, self.deviation = size, memory, neighbors, share, scale
        self.aging, self.keep_norm = 0.5 ** (1 / half_life), keep_norm
        self._drawn = torch.empty(0, dtype=torch.int64)

    def plan(self, step: int, count: int, seed: int) -> Around | None:
        if not self.state:
            return None
        self._drawn = chosen(self.state["priority"], int(self.share * count), seed, step)
        first, second = self.state["first"][self._drawn], self.state["second"][self._drawn]
        where = Rng.of(seed, "between pairs", range(len(first)), step=step).uniform(1).to(first)
        centers = between(first, second, where[:, 0], self.keep_norm)
        return Around(centers, torch.full((len(centers),), self.deviation))

    def learn(self, step: int, latents: Tensor, student: Tensor, teacher: Tensor, shown: Tensor) -> None:
        drawn, is_face = len(self._drawn), shown[:, None].to(student)
        # A picture without a face becomes zeros: nothing about it is overrated.
        new = {"latents": latents, "student": student * is_face, "teacher": teacher * is_face}
        new = {name: rows[drawn:] for name, rows in new.items()}
        known = {name: torch.cat((rows, self.state.get(name, rows[:0]).to(rows))) for name, rows in new.items()}
        alike = new["student"] @ known["student"].T
        alike.fill_diagonal_(-torch.inf)  # the new faces come first
        cosines, near = alike.topk(min(self.neighbors, max(1, alike.shape[1] - 1)), dim=1)
        apart = (new["teacher"] @ known["teacher"].T).gather(1, near)
        priority, place = (cosines - apart).max(1)
        partner = near.gather(1, place[:, None])[:, 0]
        mine = torch.arange(len(partner), device=partner.device)
        # Two new faces that choose each other are one pair.
        again = (partner < mine) & (partner[partner.clamp(max=len(mine) - 1)] == mine)
        priority = priority.clamp_min(0).masked_fill(again, 0)
        pairs = {"first": new["latents"], "second": known["latents"][partner], "priority": priority}
        kept = {name: self.state[name].to(latents) for name in pairs} if self.state else {}
        if kept:
            kept["priority"] = kept["priority"] * self.aging
            kept["priority"][self._drawn.to(latents.device)] *= 0.5
        self.state = best(kept, pairs, self.size) | {name: rows[: self.memory] for name, rows in known.items()}
        self._drawn = self._drawn[:0]


def check_pool(size: int, share: float, half_life: float, scale: float) -> None:
    if size < 1 or not 0 < share < 1 or half_life <= 0 or scale < 0:
        raise ValueError("size and half_life must be positive, share between 0 and 1, and scale not negative")


def chosen(priority: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Numbers of up to ``count`` rows, drawn without replacement in proportion to ``priority [P]``.

    Those of the largest log(priority) + Gumbel noise: Efraimidis, Spirakis: Weighted random sampling with a reservoir,
    Information Processing Letters 97(5), 2006.
    """
    noise = Rng.of(seed, "resampling", range(len(priority)), step=step).uniform(1)[:, 0].to(priority)
    keys = priority.clamp_min(1e-6).log() - (-(noise + 2**-25).log()).log()
    return keys.argsort(descending=True, stable=True)[:count]


def best(kept: dict[str, Tensor], new: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The ``size`` rows of highest ``priority`` of both; of equal ones those that are there already."""
    both = {name: torch.cat((kept[name], new[name])) if kept else new[name] for name in new}
    order = both["priority"].argsort(descending=True, stable=True)[:size]
    return {name: rows[order] for name, rows in both.items()}


def between(first: Tensor, second: Tensor, where: Tensor, keep_norm: bool = True) -> Tensor:
    """Points ``[m, *latent]`` at the parts ``where [m]`` of the way from ``first`` to ``second``.

    >>> ends = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> between(*ends, torch.tensor([0.5]), keep_norm=False).tolist()
    [[1.0, 2.0]]
    >>> round(between(*ends, torch.tensor([0.5])).norm().item(), 4)
    3.0
    """
    shape = first.shape
    first, second, where = first.flatten(1), second.flatten(1), where.unsqueeze(1)
    point = torch.lerp(first, second, where)
    if keep_norm:
        wanted = torch.lerp(first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True), where)
        point = point * (wanted / point.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return point.view(shape)
