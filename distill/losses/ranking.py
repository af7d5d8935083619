"""Losses on the order of matching scores: at the thresholds of an evaluation, or between any two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.gather import gather
from distill.losses.base import Loss, mean, one_of, positive
from distill.running import Running
from faceless.devices import moved
from faceless.randomness import Rng
from faceless.recognizer import Output


class EKD(Loss):
    """Put each pair of faces on the side of the evaluation's thresholds where the teacher has it (EKD).

    Either network has thresholds q_k of its own: the cosine that one impostor pair in ``one_in[k]`` exceeds, as a
    running mean over the steps without gradient. The rank of a pair is sum_k sigmoid((cos - q_k) / temperature), which
    counts the thresholds that it passes. The loss is 0.02 times the mean squared difference of the two ranks over all
    genuine pairs, plus 0.01 times that over the ``hardest`` impostor pairs of the student. Pairs are those of the
    batch; a face without a label (-1) is in none.
    Huang, Wu, Xu, Ding: Evaluation-oriented Knowledge Distillation for Deep Face Recognition, CVPR 2022, section 3.

    The official code (Tencent/TFace) starts its running means at zero, so that thresholds are 1 % of their value after
    the first step and half of it after 69; here they are divided by the weight that they have gathered. Its gradient
    grows with the number of processes, ours is that of one process with the whole batch. A batch without genuine pairs
    gives NaN there, one without impostor pairs an error; here such a term is 0. Its batches are half of single faces
    and half of four faces of an identity each, and the second half does not count in the softmax beside it: recipe
    ``ekd`` has that from ``together`` and ``scattered`` (`distill.sources.Rows`, `distill.settings.Term`).

    Args:
        one_in: impostor pairs per false match, for each threshold. More than there are pairs takes the hardest pair.
        temperature: of the sigmoid, in units of cosine.
        hardest: impostor pairs that count.
        genuine, impostor: weights of the two terms.
        momentum: weight of the old thresholds at each step, in [0, 1).
        corrected: divide by the gathered weight; False is the official code.
        same_person: pairs whose teacher cosine exceeds this are genuine, all others impostor, and no labels are needed;
            None takes labels. For a centered teacher, 0.5 or more.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm, labels ``[B]``; returns a scalar, 0 for a batch of one.

    Raises:
        ValueError: an argument is out of range, or labels are missing.

    >>> loss, labels = EKD(), torch.tensor([0, 0, 1, 1])
    >>> loss(Output(torch.randn(4, 8)), Output(torch.randn(4, 8)), labels).isfinite()
    tensor(True)
    """

    one_in: Tensor

    def __init__(
        self,
        *,
        one_in: Sequence[int] = (10, 100, 1_000, 10_000, 100_000, 1_000_000),
        temperature: float = 0.01,
        hardest: int = 2000,
        genuine: float = 0.02,
        impostor: float = 0.01,
        momentum: float = 0.99,
        corrected: bool = True,
        same_person: float | None = None,
    ):
        super().__init__()
        if not one_in or min(one_in) < 1:
            raise ValueError(f"one_in is {list(one_in)}; it needs whole numbers from 1")
        if same_person is not None and not -1 <= same_person <= 1:
            raise ValueError(f"same_person is {same_person}; it is a cosine, -1 to 1")
        self.temperature = positive(temperature=temperature)
        self.hardest = int(positive(hardest=hardest))
        self.genuine, self.impostor = genuine, impostor
        self.corrected = corrected
        self.same_person = same_person
        self.needs_labels = same_person is None
        self.register_buffer("one_in", torch.tensor([int(n) for n in one_in]), persistent=False)
        self.thresholds = Running(2, len(one_in), momentum=momentum)  # the student's and the teacher's

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s, t = F.normalize(gather(student.embedding)), F.normalize(gather(teacher.embedding))
        i, j = torch.triu_indices(len(s), len(s), 1, device=s.device)
        of_student, of_teacher = (s @ s.T)[i, j], (t @ t.T)[i, j]
        if self.same_person is None:
            assert labels is not None
            whose = gather(labels)
            known = (whose[i] >= 0) & (whose[j] >= 0)
            genuine = known & (whose[i] == whose[j])
            impostor = known & ~genuine
        else:
            genuine = of_teacher > self.same_person
            impostor = ~genuine
        if not len(i):
            return of_student.sum()

        # Pairs that do not count lie behind all others.
        order = of_student.detach().masked_fill(~impostor, -torch.inf).sort(descending=True, stable=True)
        by_teacher = of_teacher.masked_fill(~impostor, -torch.inf).sort(descending=True).values
        count = impostor.sum()
        q = self._thresholds(torch.stack((order.values, by_teacher)), count).unsqueeze(1)
        pairs = torch.stack((of_student, of_teacher)).unsqueeze(2)
        ranks = ((pairs - q) / self.temperature).sigmoid().sum(2)
        squares = (ranks[0] - ranks[1]).square()
        of_genuine = torch.where(genuine, squares, 0).sum() / genuine.sum().clamp(min=1)
        hardest = order.indices[: self.hardest]
        there = torch.arange(len(hardest), device=s.device) < count
        of_impostor = torch.where(there, squares[hardest], 0).sum() / there.sum().clamp(min=1)
        return self.genuine * of_genuine + self.impostor * of_impostor

    def _thresholds(self, descending: Tensor, count: Tensor) -> Tensor:
        """``[2, thresholds]`` from impostor cosines ``[2, pairs]`` of which the first ``count`` are some."""
        now = descending[:, torch.minimum(count // self.one_in, (count - 1).clamp(min=0))]
        # While none is known, no pair passes any, and the loss is 0.
        some = count > 0
        q = self.thresholds(torch.where(some, now, torch.inf), some)
        return q if self.corrected else self.thresholds.average.to(now)


class PairwiseRanking(Loss):
    """Order any two matching scores as the teacher does (pairwise ranking distillation, PWR).

    A score is the cosine of two faces of the batch. Of two scores that the teacher tells apart, a the larger one there,
    the student pays for x = margin - (s_a - s_b): mean of relu(x)^power, of relu(exp(slope x) - 1), or of
    softplus(-slope (s_a - s_b)). No labels.
    Nikitin, Konushin, Konushin: Pairwise Ranking Distillation for Deep Face Recognition, GraphiCon 2020; their code
    (MXNet) compares all scores of a batch, which is of the order of B^4, and knows these three forms and margins; the
    defaults are our choice.

    With a margin of 0, faces that all coincide are no error: then another loss must stand beside this one.

    Args:
        form: ``"power"``, ``"exponent"`` or ``"ranknet"``, in the order above.
        margin: a number; ``"teacher"`` for t_a - t_b; or ``"deviation"`` for the standard deviation of the teacher's
            scores. RankNet has none.
        power: of the first form, 1 or more.
        slope: of the two others, per unit of cosine.
        scores: how many are compared with each other; of more, every step draws others.
        seed: of the draws.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm; returns a scalar, 0 for fewer than three faces.

    Raises:
        ValueError: an argument is out of range.

    >>> faces = torch.randn(8, 16)
    >>> PairwiseRanking()(Output(2 * faces), Output(faces)).round(decimals=5).abs()
    tensor(0.)
    """

    def __init__(
        self,
        *,
        form: str = "power",
        margin: float | Literal["teacher", "deviation"] = "teacher",
        power: float = 1.0,
        slope: float = 1.0,
        scores: int = 1024,
        seed: int | None = None,
    ):
        super().__init__()
        self.form = one_of(("power", "exponent", "ranknet"), form=form)
        if isinstance(margin, str):
            one_of(("teacher", "deviation"), margin=margin)
        if power < 1:
            raise ValueError(f"power is {power}; below 1 the slope has no bound")
        self.margin = margin
        self.power = power
        self.slope = positive(slope=slope)
        self.scores = int(positive(scores=scores))
        self.seed = seed or 0
        self.step = 0

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        s, t = F.normalize(gather(student.embedding)), F.normalize(gather(teacher.embedding))
        i, j = moved(self._choose(len(s)), s.device)
        of_student, of_teacher = (s[i] * s[j]).sum(1), (t[i] * t[j]).sum(1)
        lead = of_student.unsqueeze(1) - of_student
        theirs = of_teacher.unsqueeze(1) - of_teacher
        if self.form == "ranknet":
            cost = F.softplus(-self.slope * lead)
        else:
            short = self._margin(theirs, of_teacher) - lead
            cost = short.relu().pow(self.power) if self.form == "power" else (self.slope * short).expm1().relu()
        larger = theirs > 0
        return torch.where(larger, cost, 0).sum() / larger.sum().clamp(min=1)

    def _margin(self, theirs: Tensor, scores: Tensor) -> Tensor | float:
        if isinstance(self.margin, float | int):
            return self.margin
        return theirs if self.margin == "teacher" else (scores - mean(scores)).square().mean().sqrt()

    def _choose(self, batch: int) -> Tensor:
        """``[2, scores]``: the pairs of faces whose scores are compared at this step."""
        step = self.step
        if self.training:
            self.step += 1
        pairs = torch.triu_indices(batch, batch, 1)
        if pairs.shape[1] <= self.scores:
            return pairs
        draws = Rng.of(self.seed, "ranked scores", range(self.scores), step).uniform(1).flatten()
        return pairs[:, (draws * pairs.shape[1]).long().clamp(max=pairs.shape[1] - 1)]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)
