"""Faces per second of a training step: ours, the bare sum of its passes, and a loop as the official ones are written.

    python scripts/bench/train.py [--batch 128] [--rounds 5] [--threads N]

In one run, interleaved, on the quickstart's networks:

- cached: read, augment, student forward and backward, losses, optimizer, running average; the teacher is cached;
- online: the same with one generator and one teacher pass in every step;
- passes: generator, teacher, student forward and backward, and nothing else, of the online step;
- official: two steps as SynthDistill's published loop takes them: float32, contiguous, generator and teacher called for
  each, mean squared error, Adam.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faceless
from distill.augment import Augment
from distill.losses.contrastive import QUD
from distill.losses.embedding import CosineEmbedding
from distill.losses.relational import SimilarityToMemory
from distill.muon import Muon
from distill.objective import Objective
from distill.train import follow
from faceless.errors import command
from faceless.randomness import Rng
from faceless.recognizer import Output
from synth.generators.dcgan import DCGAN

ROOT = Path(__file__).resolve().parents[2]
STUDENT = yaml.safe_load((ROOT / "distill/recipes/quickstart.yaml").read_text())["student"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    ways = {"cached": cached(chosen.batch), "online": online(chosen.batch)}
    ways |= {"passes": passes(chosen.batch), "official": official(chosen.batch)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(chosen.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(step)
            if step:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    typical = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time_ in typical.items():
        print(f"{name:9s} {chosen.batch / time_:8.1f} faces/s per update")
    print(f"online over the bare sum of its passes: {typical['online'] / typical['passes']:.2f}")
    print(f"official over online: {typical['official'] / typical['online']:.2f}")
    print(f"official over cached: {typical['official'] / typical['cached']:.2f}")


def networks() -> tuple[DCGAN, faceless.Recognizer, faceless.Recognizer]:
    teacher = faceless.load("dlib-resnet29").requires_grad_(False)
    size, options = STUDENT["input_size"], STUDENT["options"]
    student = faceless.create(STUDENT["name"], embedding_dim=128, input_size=size, framing="dlib", **options)
    return DCGAN("digiface"), teacher, student


def faceless_step(student: faceless.Recognizer) -> Callable[[torch.Tensor, Output, Rng], None]:
    losses = {
        "cosine": CosineEmbedding(),
        "contrast": QUD(embedding_dim=128, queue_size=4096),
        "similarity": SimilarityToMemory(embedding_dim=128),
    }
    weights = {"cosine": 1.0, "contrast": 0.5, "similarity": 5.0}
    objective = Objective(losses, weights, student_dim=128, teacher_dim=128, center=True)
    optimizer, augment = Muon(student.parameters()), Augment(size=64)
    average = copy.deepcopy(student)

    def step(faces: torch.Tensor, seen: Output, rng: Rng) -> None:
        loss, _ = objective(student(augment(faces, rng)), seen)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(average, student, 0.99, 100)

    return step


def cached(batch: int) -> Callable[[int], None]:
    _, _, student = networks()
    step = faceless_step(student.to(memory_format=torch.channels_last))
    store = torch.randint(0, 256, (4096, 3, 96, 96), dtype=torch.uint8)
    known = torch.randn(4096, 128)

    def run(number: int) -> None:
        rows = Rng.of(0, "rows", range(batch), number).integers(4096, 1).squeeze(1)
        step(store[rows], Output(known[rows]), Rng.of(0, "view", rows, number))

    return run


def online(batch: int) -> Callable[[int], None]:
    generator, teacher, student = networks()
    teacher = teacher.to(memory_format=torch.channels_last)
    step = faceless_step(student.to(memory_format=torch.channels_last))

    def run(number: int) -> None:
        rng = Rng.of(0, "latents", range(batch), number)
        with torch.no_grad():
            faces = generator.synthesize(generator.sample_latents(batch, rng))
            seen = teacher(faces)
        step(faces, seen, rng.child("view"))

    return run


def passes(batch: int) -> Callable[[int], None]:
    generator, teacher, student = networks()
    teacher = teacher.to(memory_format=torch.channels_last)
    student = student.to(memory_format=torch.channels_last)
    latents = torch.randn(batch, 100)

    def run(_: int) -> None:
        with torch.no_grad():
            faces = generator.synthesize(latents)
            teacher(faces)
        student(faces).embedding.sum().backward()
        student.zero_grad()

    return run


def official(batch: int) -> Callable[[int], None]:
    """Half of one iteration, that is one update, averaged over the two that an iteration makes."""
    generator, teacher, student = networks()
    # Contiguous, as there: the recognizers' own preprocessing would ask for channels last.
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    def embed(net: faceless.Recognizer, faces: torch.Tensor) -> torch.Tensor:
        return net.backbone(net.preprocess(faces).contiguous())

    def update(latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            faces = generator.synthesize(latents)
            seen = embed(teacher, faces)
        out = embed(student, faces)
        optimizer.zero_grad()
        F.mse_loss(out, seen).backward()
        optimizer.step()
        return F.cosine_similarity(out.detach(), seen)

    state = {"latents": torch.randn(batch, 100), "scale": torch.zeros(batch)}

    def run(number: int) -> None:
        fresh = torch.randn(batch, 100)
        if number % 2 == 0:
            state["latents"] = fresh
            state["scale"] = (update(fresh) + 1) / 2
        else:
            update(state["latents"] + state["scale"][:, None] * fresh)

    return run


if __name__ == "__main__":
    command(main)()
