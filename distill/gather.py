"""Rows of every process, in rank order, with the exact gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_equal: ContextVar[bool] = ContextVar("equal", default=False)


@contextmanager
def equal_shares() -> Iterator[None]:
    """Here every process gives `gather` as many rows as any other, so that nobody has to be asked."""
    before = _equal.set(True)
    try:
        yield
    finally:
        _equal.reset(before)


def processes() -> int:
    """How many processes train together; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """Concatenate ``[n, ...]`` of every process in rank order; ``n`` may differ between them, and may be 0.

    The backward pass sums over the processes what each of them asks of a row. A loss that every process computes from
    gathered rows, in a model whose gradients are then averaged (DDP), thus has the gradient of one process that saw the
    whole batch.

    Shape:
        rows ``[n, ...]``; returns ``[sum of n, ...]``, or ``rows`` itself when there is one process. All processes must
        call it, with the same trailing shape and dtype. It exchanges ``n`` first, which waits for the device, but for
        `equal_shares`.

    >>> gather(torch.arange(3))
    tensor([0, 1, 2])
    """
    if processes() == 1:
        return rows
    counts = [len(rows)] * processes()
    if not _equal.get():
        mine = torch.tensor([len(rows)], device=rows.device)
        theirs = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(theirs, mine)
        counts = torch.cat(theirs).tolist()
    gathered: Tensor = _Gather.apply(rows, counts)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.first = sum(counts[: dist.get_rank()])
        ctx.count = len(rows)
        padding = [0, 0] * (rows.ndim - 1) + [0, max(counts) - len(rows)]
        padded = F.pad(rows, padding).contiguous()  # collectives want equal shapes
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.count], None
