"""Blocks of candidates: made by worker processes, kept on the disk until their shard is complete."""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from faceless import align
from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write
from faceless.randomness import Rng
from synth.corpus import encode, schema, table
from synth.settings import Alignment, Generation

NO_FACE, ROLLED, MISSHAPEN = "no face detected", "turned too far", "landmarks are not a face's"


def columns(made: Generation) -> pa.Schema:
    """The schema of a corpus of these settings."""
    extra = (
        [pa.field("score", pa.float32()), pa.field("crop_to_image", pa.list_(pa.float32(), 6))] if made.align else []
    )
    latent_size = math.prod(made.generator.latent_shape) if made.generator.latent_shape else 0
    return schema(latent_size, made.latent_dtype, extra)


@torch.inference_mode()
def make_block(made: Generation, number: int) -> tuple[pa.Table, Counter[str]]:
    """The accepted rows of a block, and how many candidates were rejected for what."""
    rejected: Counter[str] = Counter()
    faces, kept, others = [], [], []
    for index in torch.arange(number * made.block, (number + 1) * made.block).split(made.batch):
        z, images = made.generator.make(Rng.of(made.seed, "latents", index), getattr(torch, made.latent_dtype))
        images = images.round().clamp(0, 255).to(torch.uint8).cpu()
        about = {} if z is None else {"latent": z.flatten(1)}
        if made.align is not None:
            images, accepted, crops = _aligned(images, made.align, rejected)
            index, about = index[accepted], {name: column[accepted] for name, column in about.items()} | crops
        faces.append(images.permute(0, 2, 3, 1).contiguous().numpy())
        kept.append(index)
        others.append(about)
    more = {name: torch.cat([about[name] for about in others]) for name in others[0]}
    encoded = [encode(face, made.image_format, made.quality) for batch in faces for face in batch]
    suffix = {"jpeg": "jpg"}.get(made.image_format, made.image_format)
    return table(columns(made), encoded, suffix, torch.cat(kept), made.seed, **more), rejected


def _aligned(images: Tensor, how: Alignment, rejected: Counter[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Crops of the candidates that pass, which those are, and what is recorded of them; counts the others."""
    marks = align.detect(
        images,
        points=how.points,
        detect_size=how.detect_size,
        landmark_size=how.landmark_size,
        attempts=((0, how.threshold),),
    )
    roll, misfit = align.geometry(marks.points, how.framing)
    rolled = marks.found & (roll.abs() > how.max_roll)
    misshapen = marks.found & ~rolled & (misfit > how.max_misfit)
    for reason, which in ((NO_FACE, ~marks.found), (ROLLED, rolled), (MISSHAPEN, misshapen)):
        if count := int(which.sum()):
            rejected[reason] += count
    accepted = marks.found & ~rolled & ~misshapen
    points = marks.points[accepted]
    crops = align.crop(images[accepted], points, how.framing, how.size, padding=how.padding)
    matrices = align.crop_to_image(points, how.framing, how.size, padding=how.padding)
    return crops, accepted, {"score": marks.score[accepted], "crop_to_image": matrices.flatten(1)}


class Blocks:
    """Blocks that wait for their shard: ``000123.arrow`` with the rows, then ``000123.json`` with the counts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, number: int, rows: pa.Table, rejected: Counter[str]) -> None:
        target = self.folder / f"{number:06d}.arrow"
        with atomic_path(target) as path, path.open("wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
            writer.write_table(rows)
        counts = {"accepted": rows.num_rows, "rejected": dict(rejected)}
        counts["last"] = rows["index"][-1].as_py() if rows.num_rows else -1
        atomic_write(self.folder / f"{number:06d}.json", json.dumps(counts))

    def counts(self, number: int) -> dict[str, Any] | None:
        """Of a finished block."""
        path = self.folder / f"{number:06d}.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            path.unlink(missing_ok=True)
            return None

    def rows(self, number: int) -> pa.Table:
        path = self.folder / f"{number:06d}.arrow"
        try:
            with path.open("rb") as file:
                return pa.ipc.open_file(file).read_all()
        except (OSError, pa.ArrowException) as error:
            (self.folder / f"{number:06d}.json").unlink(missing_ok=True)
            raise InputError(f"{path}: damaged; run the same command again to make this block again") from error

    def drop_rows(self, number: int) -> None:
        """Once they are in a shard. The counts stay for the manifest."""
        (self.folder / f"{number:06d}.arrow").unlink(missing_ok=True)


_worker: tuple[Generation, Blocks] | None = None


def _start_worker(pickled: bytes, folder: Path) -> None:
    """Set up a worker process: one thread, and no life after its parent's."""
    global _worker
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    made = pickle.loads(pickled)
    made.generator.to(made.device)
    _worker = made, Blocks(folder)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(number: int) -> int:
    assert _worker is not None
    made, blocks = _worker
    blocks.save(number, *make_block(made, number))
    return number


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool:
    """Makes blocks ahead of who needs them, in order, in worker processes or (workers = 0) in this one."""

    def __init__(self, made: Generation, blocks: Blocks, workers: int, mine: Callable[[int], bool]):
        self.made, self.blocks, self.workers, self.mine = made, blocks, workers, mine
        self.ahead: dict[Future[int], int] = {}
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers:
            self.executor = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (pickle.dumps(self.made), self.blocks.folder),
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def advance(self, first: int, stop: int | None = None) -> None:
        """Get on with the blocks from ``first`` on, and return once one has been finished."""
        if self.executor is None:
            if self.mine(first):
                with _one_thread():
                    self.made.generator.to(self.made.device)
                    self.blocks.save(first, *make_block(self.made, first))
            else:
                time.sleep(0.05)
            return
        under_way = set(self.ahead.values())
        candidate = first
        while len(self.ahead) <= self.workers and candidate < first + 64 * (self.workers + 1):
            wanted = self.mine(candidate) and candidate not in under_way and (stop is None or candidate < stop)
            if wanted and self.blocks.counts(candidate) is None:
                self.ahead[self.executor.submit(_work, candidate)] = candidate
            candidate += 1
        done, _ = wait(self.ahead, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            del self.ahead[future]
            try:
                future.result()
            except BrokenExecutor as error:
                raise InputError(
                    "a worker process died, perhaps for want of memory; run the same command again to go on, "
                    "with fewer workers if it happens again"
                ) from error
