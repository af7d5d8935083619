"""Several sources in one: every batch holds exact shares of each."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.sources import Batch, Place, Rows, Source
from faceless.devices import moved, pinned
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer, resize


@dataclass
class Part:
    """One source of a mixture.

    Args:
        source: where its faces come from; with or without labels.
        share: of every batch, relative to the shares of the other parts; with 0 it is left out.
    """

    source: Source
    share: float


@dataclass(frozen=True)
class MixedRng(Rng):
    """The random numbers of samples of several sources, each with its own purpose, step and indices.

    Row i is row ``order[i]`` of the parts' numbers laid end to end.
    """

    parts: tuple[Rng, ...] = ()
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def join(cls, parts: list[Rng], order: Tensor) -> MixedRng:
        """Numbers of ``parts``, mixed."""
        return cls(parts[0].seed, "mixture", 0, torch.cat([p.indices for p in parts])[order], tuple(parts), order)

    def child(self, purpose: str) -> MixedRng:
        return replace(self, parts=tuple(part.child(purpose) for part in self.parts))

    def rows(self, which: Tensor | slice) -> MixedRng:
        chosen, first = self.order[which], 0
        parts, places = [], []
        for part in self.parts:
            mine = ((chosen >= first) & (chosen < first + len(part))).nonzero().squeeze(1)
            parts.append(part.rows(chosen[mine] - first))
            places.append(mine)
            first += len(part)
        return replace(self, indices=self.indices[which], parts=tuple(parts), order=torch.cat(places).argsort())

    def to(self, device: torch.device) -> MixedRng:
        parts = tuple(part.to(device) for part in self.parts)
        return replace(self, indices=moved(self.indices, device), parts=parts, order=moved(self.order, device))

    def bits(self, count: int) -> Tensor:
        return torch.cat([part.bits(count) for part in self.parts])[self.order]


@dataclass
class MixedBatch(Batch):
    """A batch that remembers what it is made of.

    Attributes:
        parts: by name, the positions ``[b]`` in this batch of the faces of a part, and that part's own batch.
    """

    parts: dict[str, tuple[Tensor, Batch]] = field(default_factory=dict)


class MixtureSource(Source):
    """Corpora, online generators, real faces: each with its share of every batch, exactly.

    The parts take turns within a batch, in an order that does not depend on the number of processes. Identities of
    labelled parts are kept apart; faces of parts without labels carry -1, which losses of labels leave out. If one part
    holds real faces, so does the mixture, and its record says how many and whose.

    Args:
        parts: by name.
        held_out: the part whose faces validation compares student and teacher on; it may have a share of 0. None holds
            out of every part by its share.
        size: side to which the faces of all parts are resized; None wants one size of all.

    Raises:
        InputError: no shares, or an unknown part is to be held out.
    """

    def __init__(self, *, parts: dict[str, Part], held_out: str | None = None, size: int | None = None):
        if any(part.share < 0 for part in parts.values()) or not any(part.share > 0 for part in parts.values()):
            raise InputError("a mixture needs a part with a positive share, and none below 0")
        if any(not name or "/" in name for name in parts):
            raise InputError("parts of a mixture have names without slashes")
        if held_out is not None and held_out not in parts:
            raise InputError(f"held_out is {held_out!r}; the parts are {', '.join(parts)}")
        if any(isinstance(part.source, MixtureSource) for part in parts.values()):
            raise InputError("a part of a mixture is a mixture; list its parts instead")
        total = sum(part.share for part in parts.values())
        self.shares = {name: part.share / total for name, part in parts.items() if part.share > 0}
        self.sources = {name: parts[name].source for name in self.shares}
        self.aside = self.sources if held_out is None else {held_out: parts[held_out].source}
        self.size = size
        self.weighs = any(source.weighs for source in self.sources.values())
        self.scatters = any(source.scatters for source in self.sources.values())

    @property
    def everyone(self) -> dict[str, Source]:
        """All parts that are read from, the one that only validation reads among them."""
        return self.sources | self.aside

    def check_framing(self, wanted: str) -> str | None:
        notices = [source.check_framing(wanted) for source in self.everyone.values()]
        return "\n".join(notice for notice in notices if notice) or None

    def check(self, place: Place) -> None:
        super().check(place)
        exact_counts(self.shares, place.batch_size)
        for source in self.everyone.values():
            source.check(place)

    def may_be_labelled(self) -> bool:
        return any(source.may_be_labelled() for source in self.sources.values())

    def write(self) -> None:
        for source in self.everyone.values():
            source.write()

    def people(self) -> list[tuple[str, str | None]]:
        return [people for source in self.everyone.values() for people in source.people()]

    def prepare(self, place: Place) -> None:
        self.place = place
        counts = exact_counts(self.shares, place.batch_size)
        names = list(counts)
        # Place j of n faces of a part lies at (j + 1/2) / n of the batch: every stretch of it holds all parts alike.
        at = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in counts.values()])
        whose = torch.arange(len(names)).repeat_interleave(torch.tensor(list(counts.values())))
        whose = whose[at.argsort(stable=True)]
        share = place.share()
        aside = whole_parts({name: self.shares.get(name, 1.0) for name in self.aside}, place.held_out)
        self.where: dict[str, Tensor] = {}
        for number, name in enumerate(names):
            before = int((whose[: share.start] == number).sum())
            self.where[name] = (whose[share] == number).nonzero().squeeze(1)
            piece = slice(before, before + len(self.where[name]))
            # Looked at for all processes in each, so that none waits for one that gave up.
            if not all((own == number).any() for own in whose.split(share.stop - share.start)):
                raise InputError(
                    f"{name}: {counts[name]} faces of a batch cannot be split over {place.processes} processes; "
                    "raise batch_size or its share"
                )
            self._prepare(name, replace(place, batch_size=counts[name], held_out=aside.get(name, 0), piece=piece))
        for name in set(self.aside) - set(names):
            self._prepare(name, replace(place, batch_size=1, held_out=aside[name], piece=slice(0, 1)))
        self.counts = counts
        self.order = torch.cat(list(self.where.values())).argsort()
        self.real = any(source.real for source in self.everyone.values())
        self.count_classes()

    def _prepare(self, name: str, place: Place) -> None:
        source = self.everyone[name]
        if not isinstance(source, Rows):
            # Two parts with one generator must not draw the same latents. Corpora keep the seed of the run, so that
            # a teacher's cached answers serve mixed and unmixed runs alike.
            digest = hashlib.sha256(f"{place.seed}\x1f{name}".encode()).digest()
            place = replace(place, seed=int.from_bytes(digest[:6], "little"))
        source.prepare(place)

    def count_classes(self) -> None:
        """Give the identities of each labelled part numbers of their own."""
        self.first_class, self.classes = {}, 0
        for name, source in self.sources.items():
            self.first_class[name] = self.classes
            self.classes += source.classes
        self.labelled = self.classes > 0

    def batch(self, step: int) -> MixedBatch:
        found = {name: source.batch(step) for name, source in self.sources.items()}
        batches = list(found.values())
        labels = None
        if self.labelled:
            labels = torch.cat([self._labels(name, batch) for name, batch in found.items()])[self.order]
        landmarks = None
        if any(batch.landmarks is not None for batch in batches):
            unknown = torch.full((self.place.batch_size, 5, 2), math.nan)
            known = [unknown[: len(b.images)] if b.landmarks is None else b.landmarks for b in batches]
            landmarks = torch.cat(known)[self.order]
        weights = None
        if self.weighs:
            ones = torch.ones(self.place.batch_size, device=self.place.device)
            every = [ones[: len(b.images)] if b.weights is None else b.weights for b in batches]
            weights = torch.cat(every)[moved(self.order, self.place.device)]
        scattered = None
        if self.scatters:
            alone = torch.ones(self.place.batch_size, dtype=torch.bool)
            scattered = torch.cat([alone[: len(b.images)] if b.scattered is None else b.scattered for b in batches])
            scattered = scattered[self.order]
        return MixedBatch(
            self._images(found),
            MixedRng.join([batch.rng for batch in batches], self.order),
            labels,
            landmarks=landmarks,
            weights=weights,
            scattered=scattered,
            parts={name: (self.where[name], batch) for name, batch in found.items()},
        )

    def _labels(self, name: str, batch: Batch) -> Tensor:
        if batch.labels is None:
            return torch.full((len(batch.images),), -1)
        labels = batch.labels.cpu()
        return torch.where(labels < 0, labels, labels + self.first_class[name])

    def _images(self, found: dict[str, Batch]) -> Tensor:
        faces = {name: batch.images for name, batch in found.items()}
        if self.size is not None:
            faces = {
                name: x if x.shape[-2:] == (self.size, self.size) else resize(x.float(), self.size, self.size)
                for name, x in faces.items()
            }
        sizes = {name: f"{x.shape[-1]} x {x.shape[-2]}" for name, x in faces.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"the parts' faces differ in size ({listed}): set source.init_args.size")
        if all(x.dtype == torch.uint8 and x.device.type == "cpu" for x in faces.values()):
            return pinned(torch.cat(list(faces.values()))[self.order], self.place.device)
        device = self.place.device
        mixed = torch.cat([moved(x, device).float() for x in faces.values()])
        return mixed[moved(self.order, device)]

    def watch(self, teacher: Recognizer, student: Recognizer) -> None:
        for source in self.everyone.values():
            source.watch(teacher, student)

    def feedback(self, batch: Batch, student: Output, teacher: Output) -> None:
        assert isinstance(batch, MixedBatch)
        for name, (where, part) in batch.parts.items():
            rows = moved(where, student.embedding.device)
            self.sources[name].feedback(part, Output(student.embedding[rows]), Output(teacher.embedding[rows]))

    def held_out(self) -> Tensor:
        return self._together([source.held_out() for source in self.aside.values()])

    def sample(self, count: int) -> Tensor:
        counts = whole_parts(self.shares, count)
        return self._together([self.sources[name].sample(counts[name]) for name in counts if counts[name]])

    def generated(self, count: int) -> Tensor:
        return self._together([source.generated(count // len(self.sources)) for source in self.sources.values()])

    def _together(self, faces: list[Tensor]) -> Tensor:
        side = self.size or max(x.shape[-1] for x in faces)
        faces = [resize(x.float(), side, side).round().clamp(0, 255).byte() if len(x) else x for x in faces]
        faces = [x for x in faces if len(x)] or faces[:1]
        return torch.cat(faces)

    def records(self) -> list[dict[str, Any]]:
        return [
            {"part": name, "share": self.shares.get(name, 0.0), "faces_per_batch": self.counts.get(name, 0)}
            | {"held_out": self.aside.get(name) is source}
            | source.record()
            | {"real_faces": source.real}
            for name, source in self.everyone.items()
        ]

    def record(self) -> dict[str, Any]:
        real = sum(share for name, share in self.shares.items() if self.sources[name].real)
        return {"kind": "mixture", "parts": self.shares, "real_faces": self.real, "real_share": real}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": item for name, source in self.sources.items() for key, item in source.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        unknown = {key.partition("/")[0] for key in state} - set(self.sources)
        if unknown:
            raise InputError(f"this checkpoint has a part {sorted(unknown)[0]!r}, which the mixture lacks")
        for name, source in self.sources.items():
            mine = {key.partition("/")[2]: item for key, item in state.items() if key.partition("/")[0] == name}
            source.load_state_dict(mine)


def recurring(source: Source) -> dict[str, Rows]:
    """The sources of fixed faces in a mixture, by name; or the one that there is, under no name, if it is such."""
    sources = source.sources if isinstance(source, MixtureSource) else {"": source}
    return {name: part for name, part in sources.items() if isinstance(part, Rows)}


def exact_counts(shares: dict[str, float], batch_size: int) -> dict[str, int]:
    """Faces per batch of each part.

    Raises:
        InputError: a share of the batch is no whole number of faces; names a batch size for which all are.

    >>> exact_counts({"generated": 0.9, "real": 0.1}, 120)
    {'generated': 108, 'real': 12}
    """

    def fits(size: int) -> bool:
        return all(abs(share * size - round(share * size)) < 1e-6 * size for share in shares.values())

    if not fits(batch_size):
        near = sorted(range(1, 2 * batch_size + 1), key=lambda size: abs(size - batch_size))
        better = next((size for size in near if fits(size) and all(s * size > 0.5 for s in shares.values())), None)
        listed = ", ".join(f"{name} {share * batch_size:g}" for name, share in shares.items())
        hint = f"use batch_size {better}" if better else "use shares that are simple fractions"
        raise InputError(f"a batch of {batch_size} would hold {listed} faces of the parts, not whole numbers; {hint}")
    return {name: round(share * batch_size) for name, share in shares.items()}


def whole_parts(shares: dict[str, float], count: int) -> dict[str, int]:
    """``count`` split by shares into whole numbers that sum to it (largest remainder).

    >>> whole_parts({"a": 1.0, "b": 1.0, "c": 1.0}, 5)
    {'a': 2, 'b': 2, 'c': 1}
    """
    total = sum(shares.values())
    exact = {name: share / total * count for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in order[: count - sum(found.values())]:
        found[name] += 1
    return found
