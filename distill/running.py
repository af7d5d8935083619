"""Running means of statistics that a loss takes of its batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Running(nn.Module):
    """An exponential average that is right from its first value on.

    It starts at zero and is divided by the weight that it has gathered. It moves in training mode only. Every process
    must give the same values: take them of gathered rows.

    Args:
        shape: of the statistic.
        momentum: weight of the old average at each step, in [0, 1).

    Raises:
        ValueError: momentum is out of range.

    >>> running = Running(momentum=0.9)
    >>> [round(running(torch.tensor(x)).item(), 4) for x in (1.0, 3.0)]
    [1.0, 2.0526]
    """

    average: Tensor
    weight: Tensor

    def __init__(self, *shape: int, momentum: float = 0.99):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def forward(self, now: Tensor, some: Tensor | bool = True) -> Tensor:
        """Take ``now`` into the average, unless not ``some``; returns the average, or ``now`` while there is none."""
        # Filled there: copied from the host, it would make the host wait.
        known = some if isinstance(some, Tensor) else torch.full((), some, device=now.device)
        if self.training:
            # No branch: it would wait for the device.
            new = known.to(self.weight.dtype) * (1 - self.momentum)
            self.average.lerp_(torch.where(known, now, 0).to(self.average), new)
            self.weight.lerp_(torch.ones_like(self.weight), new)
        mean = self.average / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)
        return torch.where(self.weight > 0, mean.to(now), now)
