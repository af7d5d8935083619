"""What writing a corpus costs over the generator alone and over landmark detection alone, in one run on one core.

``python scripts/bench/generate.py`` prints faces per second of CPU time, so that what else runs on the machine matters
less, and the ratios, which are what counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from faceless import align
from faceless.errors import command
from faceless.randomness import Rng
from synth.blocks import batches, draw, make_block
from synth.corpus import Corpus, encode
from synth.generate import generate, read_settings, workers
from synth.settings import Generation

WINDOW = 10.0  # seconds in which a floor is measured


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


def floors(made: Generation, processes: int) -> tuple[float, float]:
    """Candidates per second of the bare generator and of the bare detector on everything that the machine has."""
    pickled = pickle.dumps(made)
    shared = made.device != "cpu"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        generators = 1 if shared else processes
        generator = sum(pool.map(bare, [pickled] * generators, [False] * generators, range(generators)))
        detector = sum(pool.map(bare, [pickled] * processes, [True] * processes, range(processes)))
    return generator, detector


def corpora(config: str, count: int) -> None:
    """Write whole corpora, with alignment and without, beside what is the least that they could cost."""
    made = read_settings(["--config", config]).build()
    processes = workers(made)
    for name, options in (("whole faces", ["--align", "null"]), ("aligned", [])):
        before = floors(made, processes)
        with TemporaryDirectory() as folder:
            target = str(Path(folder) / "corpus")
            arguments = ["--config", config, *options, "--output", target]
            begin = time.perf_counter()
            generate(read_settings([*arguments, "--count", str(count // 10)]), progress=False)
            small = time.perf_counter() - begin
            target += "-large"
            begin = time.perf_counter()
            corpus = generate(read_settings([*arguments[:-1], target, "--count", str(count)]), progress=False)
            seconds = time.perf_counter() - begin
            candidates = corpus.manifest["counts"]["candidates"]
            # Starting the workers is paid once: the difference of two corpora does not hold it.
            rate = 0.9 * candidates / (seconds - small)
            # A machine's speed drifts with its neighbors: the floor is what it was before and afterwards.
            generator, detector = (sum(pair) / 2 for pair in zip(before, floors(made, processes)))
            print(f"bare on {processes} processes: generator {generator:.0f}, detector {detector:.0f} candidates/s")
            # Apart, the slower of the two sets the pace; on the same cores, both take their time.
            both = min(generator, detector) if made.device != "cpu" else 1 / (1 / generator + 1 / detector)
            floor = generator if options or not made.align else both
            print(
                f"{name}: {count / seconds:.0f} faces/s, {rate:.0f} candidates/s without the start of the workers; "
                f"{rate / floor:.0%} of the floor"
            )
            rows = torch.randperm(len(corpus))[:512]
            begin = time.process_time()
            Corpus(target).images(rows)
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
