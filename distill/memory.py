"""A first-in first-out memory of embeddings that is the same on every process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import gather
from faceless.randomness import Rng


class EmbeddingMemory(nn.Module):
    """A ring of the last ``size`` embeddings seen by all processes together.

    Rows are gathered in rank order before they are stored, so that every process holds the same rows in the same order.
    Two memories of one size into which matching batches are pushed stay row-aligned: that is how a loss remembers what
    student and teacher said of the same faces.

    Args:
        size: rows kept over all processes, K.
        dim: D of a row.
        initial: ``"random"`` starts with K random unit rows, all valid, which the first K pushes replace; ``"empty"``
            starts without valid rows.
        seed: of the random rows.

    Attributes:
        rows: ``[K, D]`` float32 buffer, in ring order.
        pointer: where the next row goes.
        filled: how many of the K rows were pushed. Both are host integers (reading them never waits for a device) that
            travel with ``state_dict``.

    Raises:
        ValueError: size or dim is not positive, or initial is neither of the two.

    >>> memory = EmbeddingMemory(3, 2, initial="empty")
    >>> memory.push(torch.arange(8.0).view(4, 2))
    >>> memory.valid()
    tensor([[6., 7.],
            [2., 3.],
            [4., 5.]])
    """

    rows: Tensor

    def __init__(self, size: int, dim: int, *, initial: str = "random", seed: int = 0):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a memory needs at least one row and one column, got size {size} and dim {dim}")
        if initial not in ("random", "empty"):
            raise ValueError(f"initial is {initial!r}; use 'random' or 'empty'")
        self.size = size
        self.initial = initial
        self.pointer = 0
        self.filled = 0
        if initial == "random":
            rows = F.normalize(Rng.of(seed, "embedding memory", range(size)).normal(dim))
        else:
            rows = torch.zeros(size, dim)
        self.register_buffer("rows", rows)

    def __len__(self) -> int:
        """Number of valid rows."""
        return self.size if self.initial == "random" else self.filled

    @property
    def full(self) -> bool:
        """Whether every row was pushed."""
        return self.filled == self.size

    def valid(self) -> Tensor:
        """``[len(self), D]``: a copy, so that pushing before the backward pass changes nothing that a loss has read."""
        return self.rows[: len(self)].clone()

    def products(self, x: Tensor) -> Tensor:
        """``[B, len(self)]``: inner products of ``x [B, D]`` with the valid rows, differentiable in x."""
        self._check(x)
        return x @ self.valid().to(x.dtype).T

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Store ``rows [n, D]`` of every process over the oldest ones; of more than K the last K stay."""
        rows = self._gathered(rows)
        skipped = max(len(rows) - self.size, 0)
        start = (self.pointer + skipped) % self.size
        kept = rows[skipped:]
        before_wrap = min(len(kept), self.size - start)
        self.rows[start : start + before_wrap] = kept[:before_wrap]
        self.rows[: len(kept) - before_wrap] = kept[before_wrap:]
        self.pointer = (self.pointer + len(rows)) % self.size
        self.filled = min(self.filled + len(rows), self.size)

    @torch.no_grad()
    def replace(self, rows: Tensor, *, similar: bool) -> None:
        """Store each of ``rows [n, D]`` over the one that is most (or least) like it, once the memory is full.

        All rows choose against the memory as it was. Where several choose one place, the last in rank and batch order
        stays. Until the memory is full this is `push`.
        """
        if not self.full:
            self.push(rows)
            return
        rows = self._gathered(rows)
        cosines = F.normalize(rows) @ F.normalize(self.rows).T
        chosen = cosines.argmax(1) if similar else cosines.argmin(1)
        order = torch.arange(len(rows), device=rows.device)
        last = torch.full((self.size,), -1, device=rows.device).scatter_reduce(0, chosen, order, "amax")
        taken = (last >= 0).unsqueeze(1)
        if len(rows):
            self.rows.copy_(torch.where(taken, rows[last.clamp(min=0)], self.rows))

    def _gathered(self, rows: Tensor) -> Tensor:
        self._check(rows)
        return gather(rows.detach().to(self.rows))

    def _check(self, rows: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1]:
            raise ValueError(f"this memory holds rows of {self.rows.shape[1]} numbers, got {list(rows.shape)}")

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.pointer, self.filled])

    def set_extra_state(self, state: Tensor) -> None:
        pointer, filled = (int(v) for v in state)
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            raise ValueError(f"a memory of {self.size} rows cannot be at row {pointer} with {filled} rows pushed")
        self.pointer, self.filled = pointer, filled

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.rows.shape[1]}, initial={self.initial!r}"
