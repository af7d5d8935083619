"""What writing a corpus costs over the generator alone and over landmark detection alone, in one run on one core.

``python scripts/bench/generate.py`` prints faces per second of CPU time, so that what else runs on the machine matters
less, and the ratios, which are what counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from faceless import align
from faceless.randomness import Rng
from synth.blocks import make_block
from synth.corpus import Corpus, encode
from synth.generate import generate, read_settings
from synth.settings import Generation


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
    costs["accepted"] = len(chosen) / candidates
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="synth/recipes/dcgan.yaml")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--corpus", type=int, default=0, help="also write a whole corpus of so many faces, all cores")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_settings(["--config", given.config])
    costs = pieces(settings.build(), given.candidates, given.repeats)
    accepted = costs.pop("accepted")
    for name, cost in costs.items():
        print(f"{name:26s} {cost:6.3f} ms a candidate  {1e3 * accepted / cost:8.0f} accepted faces/s on one core")
    print(f"accepted {accepted:.1%}")
    print(f"block / generator {costs['block'] / costs['generator']:.2f}")
    print(f"block / (detection and landmarks) {costs['block'] / costs['detection and landmarks']:.2f}")
    parts = costs["generator"] + costs["detection and landmarks"]
    print(f"block / (generator + detection and landmarks) {costs['block'] / parts:.2f}")
    if given.corpus:
        with TemporaryDirectory() as folder:
            target = str(Path(folder) / "corpus")
            begin = time.perf_counter()
            corpus = generate(
                read_settings(["--config", given.config, "--output", target, "--count", str(given.corpus)])
            )
            seconds = time.perf_counter() - begin
            rows = torch.randperm(len(corpus))[:512]
            begin = time.process_time()
            Corpus(target).images(rows)
            reading = (time.process_time() - begin) / len(rows) * 1e3
        print(f"corpus: {given.corpus / seconds:.0f} faces/s on all cores, start of the workers included")
        print(f"random read: {reading:.3f} ms a face on one core")
    print(json.dumps(costs | {"accepted": accepted}))


if __name__ == "__main__":
    main()
