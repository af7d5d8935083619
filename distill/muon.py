"""Muon: momentum whose matrices are made orthogonal, for networks that must learn from few faces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz iteration tuned to be steep at zero: after five steps singular values lie in about 0.7..1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of ``[m, n]`` by values near 1, with matrix products only.

    >>> values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 30)))
    >>> bool((values > 0.4).all() and (values < 1.4).all())
    True
    """
    a, b, c = COEFFICIENTS
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    # Every step multiplies x from the left by a polynomial of x x^T, and such polynomials commute: so the steps are
    # taken on the small square x x^T alone, and x is multiplied once.
    gram = x @ x.T
    unit = torch.eye(len(gram), device=x.device)
    product = unit
    for step in range(steps):
        square = gram @ gram
        polynomial = a * unit + b * gram + c * square
        product = polynomial @ product if step else polynomial
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    x = product @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, for every weight of two or more axes; AdamW for the others.

    AdamW serves groups marked ``table`` too: orthogonalizing would move all class centers to move those of a batch.

    A convolution kernel ``[out, in, h, w]`` is the matrix ``[out, in h w]``. Jordan et al., Muon: an optimizer for
    hidden layers in neural networks, 2024; the step is scaled by sqrt(max(1, rows / columns)).

    On dlib's teacher and a slim ResNet it reached after 200 steps the agreement that AdamW reached after 400.

    Args:
        params: parameters or groups; a group may override any of the following.
        lr: step of the matrices.
        momentum: of the matrices.
        weight_decay: decoupled, of the matrices.
        rest: AdamW's step for the other parameters, in units of ``lr``.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rest: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr {lr} must be positive and momentum {momentum} in [0, 1)")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rest": rest,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if parameter.ndim > 1 and not group.get("table"):
                    self._turn(parameter, parameter.grad, state, group)
                else:
                    self._adam(parameter, parameter.grad, state, group)
        return loss

    @staticmethod
    def _turn(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(average, group["momentum"]).reshape(len(parameter), -1)
        scale = math.sqrt(max(1.0, ahead.shape[0] / ahead.shape[1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalize(ahead).reshape(parameter.shape), alpha=-group["lr"] * scale)

    @staticmethod
    def _adam(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "step" not in state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(grad, 1 - first)
        square = state["square"].lerp_(grad.square(), 1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, root, value=-group["lr"] * group["rest"] / (1 - first ** state["step"]))
