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
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from faceless import align, processes
from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from faceless.weights import load
from synth.corpus import encode, schema, table
from synth.generators.base import Generator
from synth.near import Near, near, unpack
from synth.settings import Alignment, Generation

NO_FACE, ROLLED, MISSHAPEN = "no face detected", "turned too far", "landmarks are not a face's"
FLAT, BLURRED, SHORT = "too little contrast", "too blurred", "teacher's embedding too short"


def columns(made: Generation) -> pa.Schema:
    """The schema of a corpus of these settings."""
    number = pa.float32()
    extra = [pa.field("score", number), pa.field("crop_to_image", pa.list_(number, 6))] if made.align else []
    if made.generator.identities:
        extra.append(pa.field("identity", pa.int64()))
    if made.around is not None:
        extra.append(pa.field("parent", pa.int64()))
    if made.gate is not None:
        extra += [pa.field("contrast", number), pa.field("sharpness", number)]
    if made.teacher is not None:
        width = teacher(made.teacher, made.device).embedding_dim
        extra += [pa.field("embedding", pa.list_(number, width)), pa.field("quality", number)]
    stored = made.generator.latent_shape and made.latent_dtype != "none"
    return schema(math.prod(made.generator.latent_shape) if stored else 0, made.latent_dtype, extra)


@cache
def teacher(source: str, device: str) -> Recognizer:
    """The recognizer that looks at the faces, once per process."""
    return load(source).to(device)


@dataclass
class Batch:
    """Candidates on their way to rows.

    Attributes:
        index: ``[n]`` int64.
        images: ``[n, 3, H, W]`` uint8.
        about: the other columns, each ``[n, ...]``.
        encoded: the images' bytes.
        rejected: how many there were besides, for what.
    """

    index: Tensor
    images: Tensor
    about: dict[str, Tensor]
    encoded: list[bytes] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def keep(self, which: Tensor) -> None:
        self.index, self.images = self.index[which], self.images[which]
        self.about = {name: column[which] for name, column in self.about.items()}
        self.encoded = [data for data, kept in zip(self.encoded, which.tolist()) if kept]

    def reject(self, reason: str, which: Tensor) -> None:
        if count := int(which.sum()):
            self.rejected[reason] += count
            self.keep(~which)


@torch.inference_mode()
def make_block(made: Generation, number: int, near: Near | None = None) -> tuple[pa.Table, Counter[str]]:
    """The accepted rows of a block, and how many candidates were rejected for what."""
    return rows(made, [judge(made, cut(made, draw(made, index, near))) for index in batches(made, number)])


def batches(made: Generation, number: int) -> tuple[Tensor, ...]:
    """The candidates of a block, as the generator makes them together."""
    return torch.arange(number * made.block, (number + 1) * made.block).split(made.batch)


@torch.inference_mode()
def draw(made: Generation, index: Tensor, near: Near | None) -> Batch:
    """Candidates, made on the device."""
    rng = Rng.of(made.seed, "latents", index)
    dtype = torch.float16 if made.latent_dtype == "float16" else torch.float32
    about: dict[str, Tensor] = {}
    # The fastest way of a GPU to compute some layers gives other bits each time.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        if near is None:
            latents, images = made.generator.make(rng, dtype)
        else:
            assert isinstance(made.generator, Generator)
            about["parent"], origins = near.pick(rng.child("parent"), made.generator.latent_shape)
            scale = torch.full((len(index),), made.around_scale)
            latents = made.generator.perturb(origins, scale, rng.child("step")).to(dtype)
            images = made.generator.synthesize(latents.float().to(made.generator.device))
    if latents is not None and made.latent_dtype != "none":
        about["latent"] = latents.flatten(1)
    if latents is not None and made.generator.identities:
        assert isinstance(made.generator, Generator)
        identity = made.generator.identity(latents.float())
        assert identity is not None
        about["identity"] = identity
    return Batch(index, images.round().clamp(0, 255).to(torch.uint8).cpu(), about)


@torch.inference_mode()
def cut(made: Generation, batch: Batch) -> Batch:
    """Aligned, measured, sorted out and encoded; the work of CPUs, which needs no generator."""
    if made.align is not None:
        _align(batch, made.align)
    if made.gate is not None:
        batch.about |= measure(batch.images)
        batch.reject(FLAT, batch.about["contrast"] < made.gate.min_contrast)
        batch.reject(BLURRED, batch.about["sharpness"] < made.gate.min_sharpness)
    pixels = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
    batch.encoded = [encode(face, made.image_format, made.quality) for face in pixels]
    return batch


@torch.inference_mode()
def judge(made: Generation, batch: Batch) -> Batch:
    """What the teacher sees, if there is one."""
    if made.teacher is None:
        return batch
    network = teacher(made.teacher, made.device)
    if len(batch.index):
        embedding = network(batch.images.to(made.device)).embedding.float().cpu()
    else:
        embedding = torch.empty(0, network.embedding_dim)
    batch.about |= {"embedding": embedding, "quality": embedding.norm(dim=1)}
    if made.gate is not None:
        batch.reject(SHORT, batch.about["quality"] < made.gate.min_norm)
    return batch


def rows(made: Generation, made_batches: Sequence[Batch]) -> tuple[pa.Table, Counter[str]]:
    rejected = sum((batch.rejected for batch in made_batches), Counter[str]())
    more = {name: torch.cat([batch.about[name] for batch in made_batches]) for name in made_batches[0].about}
    encoded = [data for batch in made_batches for data in batch.encoded]
    suffix = {"jpeg": "jpg"}.get(made.image_format, made.image_format)
    index = torch.cat([batch.index for batch in made_batches])
    return table(columns(made), encoded, suffix, index, made.seed, **more), rejected


def measure(images: Tensor) -> dict[str, Tensor]:
    """Contrast and sharpness of faces ``[n, 3, H, W]`` in 0..255, ``[n]`` each (see `Gate`)."""
    luma = (images.float() * images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)).sum(1)
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return {
        "contrast": luma.flatten(1).std(1, correction=0),
        "sharpness": (around - 4 * inner).flatten(1).var(1, correction=0),
    }


def _align(batch: Batch, how: Alignment) -> None:
    """Cut to the framing; records how sure the detector was and where each crop lies."""
    marks = align.detect(
        batch.images,
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
            batch.rejected[reason] += count
    accepted = marks.found & ~rolled & ~misshapen
    batch.keep(accepted)
    points = marks.points[accepted]
    batch.images = align.crop(batch.images, points, how.framing, how.size, padding=how.padding)
    matrices = align.crop_to_image(points, how.framing, how.size, padding=how.padding)
    batch.about |= {"score": marks.score[accepted], "crop_to_image": matrices.flatten(1)}


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


_worker: tuple[Generation, Blocks, Near | None] | None = None


def _start_worker(pickled: bytes, folder: Path, draws: bool) -> None:
    """Set up a worker process: one thread, and no life after its parent's."""
    global _worker
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    processes.keep_memory()
    made = pickle.loads(pickled)
    if draws:
        made.generator.to(made.device)
    _worker = made, Blocks(folder), near(made, folder) if draws else None
    processes.end_quietly()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(number: int) -> int:
    assert _worker is not None
    made, blocks, origins = _worker
    blocks.save(number, *make_block(made, number, origins))
    return number


def _cut(batch: Batch) -> Batch:
    assert _worker is not None
    return cut(_worker[0], batch)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool:
    """Makes blocks ahead of who needs them, in order, in worker processes or (workers = 0) in this one.

    On a CPU each worker makes whole blocks. A GPU is driven from this process, a batch of candidates after the other,
    and never waits: the workers cut and encode what it has drawn, while it draws on.
    """

    def __init__(self, made: Generation, blocks: Blocks, workers: int, mine: Callable[[int], bool]):
        self.made, self.blocks, self.workers, self.mine = made, blocks, workers, mine
        self.shared = torch.device(made.device).type != "cpu"
        self.ahead: dict[Future[int], int] = {}
        self.drawn: dict[int, list[Future[Future[Batch]]]] = {}
        self.executor: ProcessPoolExecutor | None = None
        self.drawer: ThreadPoolExecutor | None = None

    def __enter__(self) -> Pool:
        unpack(self.made, self.blocks.folder)
        self.near = near(self.made, self.blocks.folder)
        if self.workers:
            sent = copy(self.made)
            if self.shared:
                sent.generator = None  # type: ignore[assignment]
            self.executor = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (pickle.dumps(sent), self.blocks.folder, not self.shared),
            )
            self.drawer = ThreadPoolExecutor(1, "draw") if self.shared else None
        if self.shared or not self.workers:
            self.made.generator.to(self.made.device)
        return self

    def __exit__(self, *error: object) -> None:
        if self.drawer is not None:
            self.drawer.shutdown(wait=True, cancel_futures=True)
        if self.executor is not None:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def advance(self, first: int, stop: int | None = None) -> None:
        """Get on with the blocks from ``first`` on, and return once one has been finished."""
        try:
            if self.executor is None:
                self._advance_here(first)
            elif self.shared:
                self._advance_drawing(first, stop)
            else:
                self._advance_workers(first, stop)
        except BrokenExecutor as error:
            raise InputError(
                "a worker process died, perhaps for want of memory; run the same command again to go on, "
                "with fewer workers if it happens again"
            ) from error

    def _advance_here(self, first: int) -> None:
        if self.mine(first):
            with _one_thread():
                self.blocks.save(first, *make_block(self.made, first, self.near))
        else:
            time.sleep(0.05)

    def _advance_workers(self, first: int, stop: int | None) -> None:
        assert self.executor is not None
        under_way = set(self.ahead.values())
        candidate = first
        while len(self.ahead) <= self.workers and candidate < first + 64 * (self.workers + 1):
            if self._wanted(candidate, stop, under_way):
                with processes.starting_workers():
                    self.ahead[self.executor.submit(_work, candidate)] = candidate
            candidate += 1
        done, _ = wait(self.ahead, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            del self.ahead[future]
            future.result()

    def _advance_drawing(self, first: int, stop: int | None) -> None:
        assert self.drawer is not None
        parts = batches(self.made, first)
        # Every worker has a batch at hand and one waiting, and the device another block before it.
        most = 1 + -(-2 * self.workers // len(parts))
        candidate = first
        while len(self.drawn) < most and candidate < first + 64 * most:
            if self._wanted(candidate, stop, self.drawn):
                indices = batches(self.made, candidate)
                self.drawn[candidate] = [self.drawer.submit(self._draw, index) for index in indices]
            candidate += 1
        if not self.drawn:
            time.sleep(0.05)
            return
        number = min(self.drawn)
        made = [judge(self.made, future.result().result()) for future in self.drawn[number]]
        self.blocks.save(number, *rows(self.made, made))
        del self.drawn[number]

    def _draw(self, index: Tensor) -> Future[Batch]:
        assert self.executor is not None
        drawn = draw(self.made, index, self.near)
        with processes.starting_workers():
            return self.executor.submit(_cut, drawn)

    def _wanted(self, number: int, stop: int | None, under_way: Container[int]) -> bool:
        inside = self.mine(number) and number not in under_way and (stop is None or number < stop)
        return inside and self.blocks.counts(number) is None
