"""Latents to draw new faces near: those that mining found worth it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.randomness import Rng
from synth.generators.base import Generator
from synth.settings import Generation

LATENTS, SHARES = "around.npy", "around_shares.npy"


@dataclass
class Near:
    """Latents in a memory-mapped file, so that all workers share them and memory holds one batch.

    Attributes:
        latents: ``[n, D]`` float32.
        shares: ``[n]`` float64, rising to 1: the part of the draws that goes to each latent and those before it. None
            takes each in turn.
    """

    latents: np.ndarray
    shares: np.ndarray | None

    def pick(self, rng: Rng, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Rows ``[b]`` for the samples of ``rng``, and their latents ``[b, *shape]``."""
        if self.shares is None:
            rows = rng.indices.numpy() % len(self.latents)
        else:
            rows = np.searchsorted(self.shares, rng.uniform(1)[:, 0].double().numpy(), side="right")
        return torch.from_numpy(rows), torch.from_numpy(self.latents[rows]).view(-1, *shape)


def near(made: Generation, folder: Path) -> Near | None:
    """What `unpack` left in a folder."""
    if made.around is None:
        return None
    shares = folder / SHARES
    return Near(np.load(folder / LATENTS, mmap_mode="r"), np.load(shares, mmap_mode="r") if shares.is_file() else None)


def judges(path: str | Path) -> dict[str, Any]:
    """Whose disagreement the latents of a file were mined by, as ``mining/mine.py`` notes in it; empty in other files.

    Raises:
        InputError: the note is damaged.
    """
    note = (pq.read_schema(path).metadata or {}).get(b"judges")
    if note is None:
        return {}
    try:
        found = json.loads(note)
        whole = {f"{role}{suffix}" for role in ("teacher", "student") for suffix in ("", "_sha256")}
        if set(found) != whole or not all(isinstance(value, str) and len(value) < 4096 for value in found.values()):
            raise ValueError
        if not all(re.fullmatch("[0-9a-f]{64}", found[f"{role}_sha256"]) for role in ("teacher", "student")):
            raise ValueError
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its note about teacher and student is damaged; mine it again") from error
    return dict(found)


def check_generator(path: Path, made: Generation) -> None:
    """Compare the generator whose latents a file holds, where ``mining/mine.py`` noted it, with that of the settings.

    Raises:
        InputError: it is another; its latents would be noise to this one.
    """
    note = (pq.read_schema(path).metadata or {}).get(b"generator")
    if note is None:
        return
    here = json.loads(json.dumps(made.generator.provenance(), default=str))
    try:
        there = dict(json.loads(note))
        known = [key for key in ("generator", "weights_sha256", "space") if key in there]
        other = next((key for key in known if there[key] != here.get(key)), None)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its note about the generator is damaged; mine it again") from error
    if other is not None:
        said, wanted = (str(found.get(other))[:80] for found in (there, here))
        raise InputError(f"{path}: its latents are of another generator ({other} {said}, and here {wanted})")


def unpack(made: Generation, folder: Path) -> None:
    """Copy the latents of ``made.around`` to a folder, row by row, as plain numbers.

    Raises:
        InputError: no such file, or it does not hold latents of this generator.
    """
    if made.around is None or (folder / LATENTS).is_file():
        return
    path, size = Path(made.around), math.prod(made.generator.latent_shape)
    try:
        file = pq.ParquetFile(path, memory_map=True)
        names, count = file.schema_arrow.names, file.metadata.num_rows
        if "latent" not in names or not count:
            raise InputError(f"{path}: no latents to draw near; its columns are {', '.join(names)}, its rows {count}")
        judges(path)  # a damaged note shows now, and not when the corpus is finished
        check_generator(path, made)
        scores: list[np.ndarray] = []
        with atomic_path(folder / LATENTS) as target:
            out = np.lib.format.open_memmap(target, "w+", np.float32, (count, size))
            done = 0
            for batch in file.iter_batches(1024, columns=[name for name in ("latent", "score") if name in names]):
                lists = batch.column("latent")
                values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                even = (pc.list_value_length(lists).to_numpy(zero_copy_only=False) == size).all()
                if lists.null_count or not even or not np.isfinite(values).all():
                    raise InputError(
                        f"{path}: column latent does not hold {size} finite numbers in each row, as "
                        f"{type(made.generator).__name__} takes"
                    )
                out[done : done + len(lists)] = values.reshape(len(lists), size)
                assert isinstance(made.generator, Generator)
                who = made.generator.identity(torch.from_numpy(values).view(-1, *made.generator.latent_shape))
                if who is not None and not (who.min() >= 0 and who.max() < made.generator.identities):
                    raise InputError(
                        f"{path}: column latent is of identities up to {int(who.max())}, and the generator knows 0 to "
                        f"{made.generator.identities - 1}"
                    )
                done += len(lists)
                if "score" in names:
                    scores.append(batch.column("score").to_numpy(zero_copy_only=False).astype(np.float64))
            out.flush()
            # Before the latents take their place: they say that all is there.
            if scores:
                score = np.concatenate(scores)
                # One minus a cosine of 1 may come out a little below 0.
                score[(score < 0) & (score > -1e-5)] = 0
                if not np.isfinite(score).all() or score.min() < 0 or not score.sum() > 0:
                    raise InputError(f"{path}: column score holds negative or missing numbers, or only zeros")
                shares = np.cumsum(score)
                with atomic_path(folder / SHARES) as beside:
                    np.save(beside, shares / shares[-1])
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file of latents to draw near") from error
    except (pa.ArrowException, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not readable as parquet with a column latent of lists of numbers") from error
