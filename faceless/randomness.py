"""Randomness that depends only on what it is for: ``(seed, purpose, step, sample index)``.

A run resumed at any step, or split over another number of processes or batches, draws the same numbers, because nothing
here has a state. The bits come from Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator of TestU01
"BigCrush" quality, evaluated for a whole batch at once in plain tensor operations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from faceless.devices import moved

_MASK = 0xFFFFFFFF
_PIECE = 1 << 16  # samples of a permutation whose bits, some hundred bytes each, are in memory together


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit values held in int64 (which would overflow)."""
    low = (b & 0xFFFF) * a  # < 2^48
    mid = (b >> 16) * a + (low >> 16)  # < 2^49
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int = 10) -> Tensor:
    """Philox4x32: ``counter [..., 4]`` of 32-bit words in int64 to as many random 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011, section 4.3.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


@dataclass(frozen=True)
class Rng:
    """Random numbers for the samples ``indices`` of one step; row ``i`` depends on ``indices[i]`` and not on its place.

    Args:
        seed: of the run.
        purpose: what the numbers are for; two purposes are independent.
        step: of the run, or 0.
        indices: ``[n]`` int64, global sample indices below 2^32.

    >>> Rng(0, "doc", 3, torch.arange(4)).normal(2).shape
    torch.Size([4, 2])
    """

    seed: int
    purpose: str
    step: int
    indices: Tensor

    @classmethod
    def of(cls, seed: int, purpose: str, indices: Sequence[int] | range | Tensor, step: int = 0) -> Rng:
        if isinstance(indices, range) and len(indices):  # as a sequence, it would become a list of Python numbers first
            indices = torch.arange(indices.start, indices.stop, indices.step)
        return cls(seed, purpose, step, torch.as_tensor(indices, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def child(self, purpose: str) -> Rng:
        """Independent numbers for another purpose of the same samples."""
        return replace(self, purpose=f"{self.purpose}/{purpose}")

    def rows(self, which: Tensor | slice) -> Rng:
        """The same numbers for some of the samples."""
        return replace(self, indices=self.indices[which])

    def to(self, device: torch.device) -> Rng:
        """The same numbers, computed on ``device``; normal ones may differ there in their last bit."""
        return replace(self, indices=moved(self.indices, device))

    def bits(self, count: int) -> Tensor:
        """``[n, count]`` uniform 32-bit words in int64."""
        digest = hashlib.sha256(f"{self.seed}\x1f{self.purpose}".encode()).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        blocks = -(-count // 4)
        counter = torch.empty(len(self), blocks, 4, dtype=torch.int64, device=self.indices.device)
        counter[..., 0] = torch.arange(blocks, device=self.indices.device)
        counter[..., 1] = (self.indices & _MASK).unsqueeze(1)
        counter[..., 2] = self.step & _MASK
        counter[..., 3] = (self.step >> 32) & _MASK
        return philox4x32(counter, key).flatten(1)[:, :count]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """``[n, *shape]`` float32, uniform in [low, high)."""
        # 24 bits: every value is exact in float32 and 1.0 is never reached.
        unit = (self.bits(math.prod(shape)) >> 8).float() * 2.0**-24
        return (unit * (high - low) + low).view(len(self), *shape)

    def normal(self, *shape: int) -> Tensor:
        """``[n, *shape]`` float32 standard normal (Box-Muller)."""
        count = math.prod(shape)
        pairs = -(-count // 2)
        bits = self.bits(2 * pairs)
        # (0, 1]: the logarithm stays finite.
        radius = torch.sqrt(-2.0 * torch.log(((bits[:, :pairs] >> 8) + 1).double() * 2.0**-24))
        angle = (bits[:, pairs:] >> 8).double() * (2.0 * math.pi * 2.0**-24)
        both = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), 1)
        return both[:, :count].float().reshape(len(self), *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """``[n, *shape]`` int64, uniform in 0..high-1 (bias below high / 2^32)."""
        return ((self.bits(math.prod(shape)) * high) >> 32).view(len(self), *shape)


def permutation(seed: int, purpose: str, size: int, epoch: int = 0) -> Tensor:
    """``[size]`` int64: a random order of 0..size-1."""
    keys = torch.empty(size, dtype=torch.int64)
    for first in range(0, size, _PIECE):
        piece = keys[first : first + _PIECE]
        bits = Rng.of(seed, purpose, range(first, first + len(piece)), step=epoch).bits(2)
        torch.bitwise_xor(bits[:, 0] << 31, bits[:, 1], out=piece)
    return torch.argsort(keys, stable=True)
