"""Images per second of our dlib ResNet-29 against dlib's own, on the same cores in one run.

    python scripts/bench/teacher.py [--batch 64] [--rounds 5] [--threads N]

Prints, for every way of running ours, the best of the interleaved rounds (other work on the machine only ever makes one
slower), its ratio to dlib's faster way, the same ratio for processor time, and how close the embeddings are to dlib's
on the 400 aligned AT&T faces.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faceless
from distill.train import native_precision
from eval import benchmarks
from faceless import assets
from faceless.errors import InputError, command

TARGET = 10


def ours(memory_format: torch.memory_format, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    teacher = faceless.load("dlib-resnet29").to(memory_format=memory_format)

    def run(chips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
            return teacher.embed(chips, batch_size=64)

    return run


def theirs() -> dict[str, Callable[[Tensor], Tensor]]:
    try:
        import dlib
    except ImportError as error:
        raise InputError("the comparison needs dlib; pip install faceless-distill[align]") from error
    model = dlib.face_recognition_model_v1(str(assets.fetch("dlib-resnet29")))

    def arrays(chips: Tensor) -> list[np.ndarray]:
        return list(chips.permute(0, 2, 3, 1).contiguous().numpy())

    def tensor(rows: object) -> Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(np.array(rows)).float())

    return {
        "dlib, one by one": lambda chips: tensor([model.compute_face_descriptor(chip) for chip in arrays(chips)]),
        "dlib, batch": lambda chips: tensor(model.compute_face_descriptor(arrays(chips))),
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="faces in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)

    ways = theirs()
    reference = list(ways)
    ways["ours, float32, contiguous"] = ours(torch.contiguous_format, torch.float32)
    ways["ours, float32, channels-last"] = ours(torch.channels_last, torch.float32)
    if native_precision(cpu=True) == "bf16":
        ways["ours, bfloat16, channels-last"] = ours(torch.channels_last, torch.bfloat16)
    else:
        print("this CPU has no bfloat16 arithmetic: float32 only")

    faces = benchmarks.load("att-faces", framing="dlib", size=150).images
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(settings.rounds + 1):
        chips = faces[torch.arange(settings.batch) % len(faces)]
        for name, run in ways.items():
            start, busy_start = time.perf_counter(), time.process_time()
            run(chips)
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - busy_start)
    speed = {name: settings.batch / min(times) for name, times in seconds.items()}
    best = max(speed[name] for name in reference)
    frugal = min(min(busy[name]) for name in reference)

    truth = ways["dlib, batch"](faces)
    print(f"{settings.threads} threads, {settings.batch} faces a round, best of {settings.rounds} rounds")
    print(f"{'':32}{'faces/s':>10}{'ratio':>8}{'processor':>11}{'min cosine to dlib':>21}")
    for name, run in ways.items():
        cosine = "" if name in reference else f"{float((run(faces) * truth).sum(1).min()):.7f}"
        print(
            f"{name:32}{speed[name]:10.1f}{speed[name] / best:8.1f}{frugal / min(busy[name]):11.1f}{cosine:>21}",
            flush=True,
        )
    ratio = max(speed.values()) / best
    print(f"{ratio:.1f} times dlib's speed; the aim is {TARGET}: {'reached' if ratio >= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
