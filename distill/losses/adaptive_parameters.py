"""Losses whose temperatures, thresholds and scales follow what student and teacher say instead of being fixed.

Each has the fixed loss beside it, of the same formula: which of the two is better is for a grid to say
(``scripts/grids/adaptive.yaml``). Weights between losses adapt in `distill.objective.Adaptive`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distill.gather import gather
from distill.losses.base import Loss, mean, one_of, positive
from distill.losses.contrastive import QUD
from distill.losses.logits import both_scores, divergence
from distill.losses.unified import ILED, RPSD
from distill.running import Running
from faceless.recognizer import Output


class AdaptiveTemperatureKD(Loss):
    """`LogitKD` with a temperature for each face's scores, or with one that learns.

    ``standardized``: scores lose their mean and are divided by their standard deviation (of each face, and of each
    network by itself) and by the temperature; what remains is the shape of the distribution, whatever the scale of
    student and teacher. Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024 (there
    with temperature 2 and weight 9).

    ``adversarial``: one temperature, lowest + span sigmoid(p), whose p ascends the loss that the student descends,
    with a force that grows from 0 to 1 as half a cosine over the first ``ramp`` steps: ever harder scores. Li et al.:
    Curriculum Temperature for Knowledge Distillation, AAAI 2023 (its global temperature; there over 10 epochs, between
    1 and 21, starting at 15.6). There the force scales p's gradient, which Adam and Muon would divide out again; here
    it scales how far p counts as moved from its start, and the gradient with it.

    Args:
        rule: one of the two.
        temperature: of ``standardized``, in standard deviations.
        lowest, span, ramp: of ``adversarial``.

    Shape:
        logits ``[B, C]`` of both; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or logits are missing or differ in shape.

    >>> scores = torch.randn(4, 10)
    >>> student, teacher = (Output(torch.randn(4, 8), logits=x) for x in (scores, 5 * scores + 1))
    >>> AdaptiveTemperatureKD()(student, teacher).round(decimals=5).abs()
    tensor(0.)
    """

    needs_logits = True

    def __init__(
        self,
        *,
        rule: str = "standardized",
        temperature: float = 2.0,
        lowest: float = 1.0,
        span: float = 20.0,
        ramp: int = 1000,
    ):
        super().__init__()
        self.rule = one_of(("standardized", "adversarial"), rule=rule)
        self.temperature = positive(temperature=temperature)
        self.lowest, self.span, self.ramp = positive(lowest=lowest), positive(span=span), int(positive(ramp=ramp))
        self.raw = nn.Parameter(torch.ones(1)) if self.rule == "adversarial" else None
        self.step = 0

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        z_s, z_t = both_scores(student, teacher)
        if self.raw is None:
            z_s, z_t = standardized(z_s), standardized(z_t)
            T: Tensor | float = self.temperature
        else:
            force = (1 - math.cos(math.pi * min(self.step / self.ramp, 1.0))) / 2
            if self.training:
                self.step += 1
            # Worth 1 + force (p - 1), with the gradient of its opposite.
            p = self.raw.detach()
            reversed_p = 1 + force * (p - 1) + force * (p - self.raw)
            T = self.lowest + self.span * reversed_p.sigmoid()
        log_s, log_t = (z_s / T).log_softmax(1), (z_t / T).log_softmax(1)
        return mean(divergence(log_t, log_s).unsqueeze(1) * T**2)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.step])

    def set_extra_state(self, state: Tensor) -> None:
        (self.step,) = (int(v) for v in state)


def standardized(scores: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1 (of n - 1); equal scores become zeros, without gradient.

    >>> standardized(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    tensor([[-1.,  0.,  1.],
            [ 0.,  0.,  0.]])
    """
    centered = scores - scores.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / (scores.shape[1] - 1)
    # Scores that differ by rounding alone count as equal.
    tiny = torch.finfo(scores.dtype).eps * scores.detach().abs().amax(1, keepdim=True)
    differ = variance > tiny.square()
    return torch.where(differ, centered, 0) / torch.where(differ, variance, 1).sqrt()


class AdaptiveQUD(QUD):
    """`QUD` with a temperature that follows the teacher, or that learns.

    ``spread``: the running standard deviation of the teacher's cosines to the queue, times ``factor``: a teacher with
    a narrow cone of faces gets a small temperature, a well spread one about 1 / sqrt(D). ``learned``: a parameter, as
    the loss alone would have it, within 0.01 and 1 (CLIP: Radford et al., ICML 2021, section 2.5, starts at 0.07).

    Args:
        rule: one of the two.
        factor: of ``spread``.
        start: of ``learned``.
        momentum: of the running deviation.
        queue: all arguments of `QUD` but its temperature.

    Shape:
        both embeddings ``[B, D]`` of any norm; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or the two D differ.

    >>> AdaptiveQUD(embedding_dim=128)(Output(torch.randn(8, 128)), Output(torch.randn(8, 128))).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        rule: str = "spread",
        factor: float = 1.0,
        start: float = 0.07,
        momentum: float = 0.99,
        **queue: Any,
    ):
        super().__init__(temperature=start, **queue)
        self.rule = one_of(("spread", "learned"), rule=rule)
        self.factor = positive(factor=factor)
        self.log = nn.Parameter(torch.tensor([math.log(start)])) if self.rule == "learned" else None
        self.spread = Running(momentum=momentum)

    def divisor(self, t: Tensor) -> Tensor | float:
        if self.log is not None:
            if self.training:
                with torch.no_grad():  # the parameter itself: beyond a bound it would have no gradient to come back by
                    self.log.clamp_(math.log(0.01), 0.0)
            return self.log.exp()
        cosines = self.negatives.products(gather(t))
        if not cosines.numel():
            return self.temperature
        deviation = cosines.std(correction=0)
        return self.factor * self.spread(deviation).clamp(min=0.01)


class AdaptiveILED(ILED):
    """`ILED` whose target and steepness follow the cosines that the student reaches.

    The target is the running quantile of the cosines, so that the same share of faces counts as hard all the way; the
    scale is ``steepness`` divided by their running standard deviation, so that hard and easy are told apart within the
    spread that there is. The fixed loss calls all faces hard at first, and few in the end.

    Args:
        share: of faces below the target.
        steepness: scale times standard deviation; 4 is the fixed scale of 40 at a deviation of 0.1.
        bias, weighted: as for `ILED`.
        momentum: of the running statistics.

    Shape:
        both embeddings ``[B, D]`` of any norm; returns a scalar.

    Raises:
        ValueError: an argument is out of range, or the two D differ.

    >>> AdaptiveILED()(Output(torch.randn(8, 128)), Output(torch.randn(8, 128))).item() > 0
    True
    """

    def __init__(
        self,
        *,
        share: float = 0.75,
        steepness: float = 4.0,
        bias: float = 0.1,
        weighted: bool = True,
        momentum: float = 0.99,
    ):
        super().__init__(bias=bias, weighted=weighted)
        self.share = _share(share)
        self.steepness = positive(steepness=steepness)
        self.statistics = Running(2, momentum=momentum)

    def shape(self, cosines: Tensor) -> tuple[Tensor | float, Tensor | float]:
        target, deviation = self.statistics(*_quantile_and_deviation(cosines, self.share))
        return self.steepness / deviation.clamp(min=0.01), target


class AdaptiveRPSD(RPSD):
    """`RPSD` whose tolerance and steepness follow the differences that there are.

    The tolerance is the running quantile of |s.m_s - t.m_t|, so that the same share of pairs goes free all the way; the
    scale is ``steepness`` divided by their running standard deviation.

    Args:
        embedding_dim, size, student_dim: as for `RPSD`.
        share: of pairs within the tolerance.
        steepness: scale times standard deviation; 3 is the fixed scale of 60 at a deviation of 0.05.
        bias: as for `RPSD`.
        momentum: of the running statistics.

    Shape:
        embeddings ``[B, Ds]`` and ``[B, Dt]`` of any norm; returns a scalar, 0 while the bank is empty.

    Raises:
        ValueError: an argument is out of range, or a D is not what was said.

    >>> loss, face = AdaptiveRPSD(embedding_dim=4), Output(torch.randn(8, 4))
    >>> [loss(face, face).item() > 0 for _ in range(2)]
    [False, True]
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        size: int = 192,
        student_dim: int | None = None,
        share: float = 0.5,
        steepness: float = 3.0,
        bias: float = 1.0,
        momentum: float = 0.99,
    ):
        super().__init__(embedding_dim=embedding_dim, size=size, student_dim=student_dim, bias=bias)
        self.share = _share(share)
        self.steepness = positive(steepness=steepness)
        self.statistics = Running(2, momentum=momentum)

    def shape(self, difference: Tensor) -> tuple[Tensor | float, Tensor | float]:
        tolerance, deviation = self.statistics(*_quantile_and_deviation(difference, self.share))
        return self.steepness / deviation.clamp(min=0.005), tolerance


def _share(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be within 0..1")
    return share


@torch.no_grad()
def _quantile_and_deviation(values: Tensor, share: float) -> tuple[Tensor, bool]:
    """``[2]`` of the values of all processes, and whether there are any."""
    flat = gather(values.detach()).flatten()
    if not len(flat):
        return values.new_zeros(2), False
    place = min(int(share * len(flat)), len(flat) - 1)
    return torch.stack((flat.sort().values[place], flat.std(correction=0))), True
