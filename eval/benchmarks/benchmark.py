"""What every benchmark of faces and identities becomes: a stack of crops, whose they are, and a record."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from faceless.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """Faces of known people.

    Attributes:
        name: what figures are reported under.
        images: ``[N, 3, H, W]`` uint8 RGB crops.
        identities: ``[N]`` int64 positions in ``names``.
        names: one for each person.
        record: source, licence, framing, and how many faces each step of the alignment found.
        gallery: ``[N, 3, H, W]`` the same faces as probes are compared with, where these are not ``images`` too.
    """

    name: str
    images: Tensor
    identities: Tensor
    names: Sequence[str]
    record: dict[str, Any] = field(default_factory=dict)
    gallery: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.images) != len(self.identities):
            raise ValueError(f"{len(self.images)} images of {len(self.identities)} identities")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def genuine_pairs(self) -> int:
        counts = torch.bincount(self.identities)
        return int((counts * (counts - 1) // 2).sum())

    @property
    def impostor_pairs(self) -> int:
        return len(self) * (len(self) - 1) // 2 - self.genuine_pairs

    @property
    def digest(self) -> str:
        """SHA-256 of the crops, under which their embeddings are cached."""
        shape = str(list(self.images.shape)).encode()
        return hashlib.sha256(shape + self.images.contiguous().numpy().tobytes()).hexdigest()

    def subset(self, people: slice | Sequence[int]) -> Benchmark:
        """The faces of some people, by position in ``names`` from 0; ``slice(20, 40)`` are persons 21 to 40.

        >>> faces = Benchmark("b", torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1]), ["x", "y"])
        >>> faces.subset([1]).identities.tolist(), faces.subset(slice(1, 2)).names
        ([0, 0], ['y'])
        """
        chosen = range(len(self.names))[people] if isinstance(people, slice) else list(people)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self.names) or len(set(chosen)) < len(chosen):
            raise InputError(f"{self.name} has people 1 to {len(self.names)}; the people chosen are not among them")
        position = torch.full((len(self.names),), -1)
        position[torch.tensor(chosen)] = torch.arange(len(chosen))
        rows = (position[self.identities] >= 0).nonzero().squeeze(1)
        return replace(
            self,
            images=self.images[rows],
            identities=position[self.identities[rows]],
            names=[self.names[i] for i in chosen],
            gallery=None if self.gallery is None else self.gallery[rows],
        )


def parse_people(text: str, people: int) -> slice:
    """``"21-40"``, both ends included and counted from 1, as a slice.

    >>> parse_people("21-40", 40)
    slice(20, 40, None)
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= people:
        raise InputError(f"people {text!r}: write FIRST-LAST with numbers from 1 to {people}, for example 1-{people}")
    return slice(int(match[1]) - 1, int(match[2]))
