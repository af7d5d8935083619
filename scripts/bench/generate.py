"""What writing a corpus costs over the generator alone and over landmark detection alone, in one run on one core.

``python scripts/bench/generate.py`` prints faces per second of CPU time, so that what else runs on the machine matters
less, and the ratios, which are what counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from faceless import align
from faceless.errors import InputError, command
from faceless.randomness import Rng
from faceless.settings import ROOT
from synth.blocks import batches, draw, make_block
from synth.corpus import Corpus, encode
from synth.generate import read_settings, workers
from synth.settings import Generation

WINDOW = 4.0  # seconds in which a floor is measured
SLICE = 15.0  # seconds that a corpus is written for in between


def per_candidate(work: Callable[[], object], candidates: int, repeats: int) -> float:
    """Milliseconds of CPU time per candidate, the fastest of some repeats."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times) / candidates * 1e3


@torch.inference_mode()
def pieces(made: Generation, candidates: int, repeats: int) -> dict[str, float]:
    """Each part of a block by itself, and the block."""
    z = made.generator.sample_latents(candidates, Rng.of(made.seed, "latents", range(candidates)))

    def draw() -> Tensor:
        return torch.cat([made.generator.synthesize(part) for part in z.split(made.batch)])

    faces = draw().round().clamp(0, 255).to(torch.uint8)
    how = made.align
    assert how is not None
    sizes = {"detect_size": how.detect_size, "landmark_size": how.landmark_size}
    marks = align.detect(faces, points=how.points, **sizes)
    chosen, points = faces[marks.found], marks.points[marks.found]
    crops = align.crop(chosen, points, how.framing, how.size)
    pixels = crops.permute(0, 2, 3, 1).contiguous().numpy()
    whole = Generation(**{**vars(made), "block": candidates})
    costs = {
        "generator": per_candidate(draw, candidates, repeats),
        "detection and landmarks": per_candidate(
            lambda: [align.detect(part, points=how.points, **sizes) for part in faces.split(made.batch)],
            candidates,
            repeats,
        ),
        "crop": per_candidate(
            lambda: [
                align.crop(part, marked, how.framing, how.size)
                for part, marked in zip(chosen.split(made.batch), points.split(made.batch))
            ],
            candidates,
            repeats,
        ),
    }
    for name in ("jpeg", "png", "webp"):
        costs[f"encode {name}"] = per_candidate(
            lambda name=name: [encode(p, name) for p in pixels], candidates, repeats
        )
    costs["block"] = per_candidate(lambda: make_block(whole, 0), candidates, repeats)
    costs["whole block"] = per_candidate(
        lambda: make_block(Generation(**{**vars(whole), "align": None}), 0), candidates, repeats
    )
    costs["accepted"] = len(chosen) / candidates
    return costs


def bare(pickled: bytes, detect: bool, number: int) -> float:
    """Candidates per second of the generator, or of the detector, alone on one core, others beside it being busy."""
    torch.set_num_threads(1)
    made = pickle.loads(pickled)
    made.generator.to(made.device)
    parts = [index for block in range(3) for index in batches(made, 3 * number + block)]
    drawn = [draw(made, index, None) for index in parts[: None if detect else 1]]
    how = made.align

    def work(place: int) -> object:
        if not detect:
            return draw(made, parts[place], None)
        sizes = {"detect_size": how.detect_size, "landmark_size": how.landmark_size}
        return align.detect(drawn[place].images, points=how.points, **sizes)

    work(0)
    begin, done, place = time.perf_counter(), 0, 0
    while (passed := time.perf_counter() - begin) < WINDOW:
        work(place % len(parts))
        done += len(parts[place % len(parts)])
        place += 1
    return done / passed


def floors(pool: ProcessPoolExecutor, made: Generation, processes: int) -> tuple[float, float]:
    """Candidates per second of the bare generator and of the bare detector on everything that the machine has."""
    pickled = pickle.dumps(made)
    generators = 1 if made.device != "cpu" else processes
    generator = sum(pool.map(bare, [pickled] * generators, [False] * generators, range(generators)))
    detector = sum(pool.map(bare, [pickled] * processes, [True] * processes, range(processes)))
    return generator, detector


def in_turn(
    pool: ProcessPoolExecutor, made: Generation, processes: int, target: Path, arguments: list[str]
) -> tuple[float, float, float]:
    """Candidates per second of a corpus being written, of the bare generator and of the bare detector.

    A machine's speed drifts with its neighbors: the command is stopped every now and then, the floors are measured, and
    it goes on. Neither its start nor its last blocks count.
    """
    launch = [sys.executable, str(ROOT / "synth" / "generate.py"), *arguments, "--output", str(target)]
    written = subprocess.Popen(launch, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def blocks() -> int:
        return len(list(target.glob(".blocks/[0-9]*.json")))

    def wait(seconds: float, least: int = 0) -> bool:
        """Whether the command is still at work after that time, with so many blocks done."""
        stop = time.perf_counter() + seconds
        while written.poll() is None and (time.perf_counter() < stop or blocks() < least):
            time.sleep(0.02)
        return written.poll() is None

    measured, spent, done = [], 0.0, 0
    try:
        wait(0, 2 * processes)
        while True:
            before, begin = blocks(), time.perf_counter()
            if not wait(SLICE):
                break
            done, spent = done + blocks() - before, spent + time.perf_counter() - begin
            os.killpg(written.pid, signal.SIGSTOP)
            try:
                measured.append(floors(pool, made, processes))
            finally:
                os.killpg(written.pid, signal.SIGCONT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(written.pid, signal.SIGKILL)
    if written.wait() or not measured:
        raise InputError(f"{' '.join(launch)}: failed, or ended within {SLICE:.0f} seconds; take more --corpus")
    generator, detector = (sum(rates) / len(rates) for rates in zip(*measured))
    return done * made.block / spent, generator, detector


def corpora(config: str, count: int) -> None:
    """Write whole corpora, with alignment and without, beside what is the least that they could cost."""
    made = read_settings(["--config", config]).build()
    processes = workers(made)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for name, options in (("whole faces", ["--align", "null"]), ("aligned", [])):
            with TemporaryDirectory() as folder:
                target = Path(folder, "corpus")
                arguments = ["--config", config, *options, "--count", str(count)]
                rate, generator, detector = in_turn(pool, made, processes, target, arguments)
                corpus = Corpus(target)
                accepted = corpus.manifest["rows"] / corpus.manifest["counts"]["candidates"]
                print(f"bare on {processes} processes: generator {generator:.0f}, detector {detector:.0f} candidates/s")
                # Apart, the slower of the two sets the pace; on the same cores, both take their time.
                both = min(generator, detector) if made.device != "cpu" else 1 / (1 / generator + 1 / detector)
                floor = generator if options or not made.align else both
                print(
                    f"{name}: {rate:.0f} candidates/s, {rate * accepted:.0f} faces/s written; {rate / floor:.0%} of "
                    "the floor"
                )
                rows = torch.randperm(len(corpus))[:512]
                begin = time.process_time()
                corpus.images(rows)
                print(f"random read: {(time.process_time() - begin) / len(rows) * 1e3:.3f} ms a face on one core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="synth/recipes/dcgan.yaml")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--corpus", type=int, default=0, help="also write corpora of so many faces, all cores")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_settings(["--config", given.config])
    costs = pieces(settings.build(), given.candidates, given.repeats)
    accepted = costs.pop("accepted")
    for name, cost in costs.items():
        print(f"{name:26s} {cost:6.3f} ms a candidate  {1e3 * accepted / cost:8.0f} accepted faces/s on one core")
    print(f"accepted {accepted:.1%}")
    print(f"generator / block without alignment {costs['generator'] / costs['whole block']:.0%}")
    parts = costs["generator"] + costs["detection and landmarks"]
    print(f"(generator + detection and landmarks) / block {parts / costs['block']:.0%}")
    if given.corpus:
        corpora(given.config, given.corpus)
    print(json.dumps(costs | {"accepted": accepted}))


if __name__ == "__main__":
    command(main)()
