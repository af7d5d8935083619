"""Distillation at the scale of digits: with data, with a generator, and with nothing but a teacher.

``python scripts/tutorial_digits.py`` trains a classifier on scikit-learn's 1,797 digits of 8 x 8 pixels, then small
students in every way that ``docs/tutorial_digits.md`` explains, and prints one table of accuracies. It needs no
download, and two to three minutes of one core. ``digits.png`` in the output folder shows what the students saw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from distill.losses.base import Loss
from distill.losses.features import Hint
from distill.losses.logits import CrossEntropy, LogitKD
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write
from faceless.randomness import Rng, permutation
from faceless.recognizer import InputSpec, Output, Recognizer
from synth.generators.adversarial import ConvGenerator, GeneratorTraining
from synth.inversion.deep_inversion import DeepInversion
from synth.inversion.priors import NoiseImages
from synth.inversion.targets import Classes

BATCH = 64
HELD_OUT = 500
#: What a step learns from: pictures ``[B, 3, 8, 8]`` in 0..255, and labels ``[B]`` where there are any.
Batches = Callable[[int], tuple[Tensor, Tensor | None]]
#: Losses and their weights.
Terms = Sequence[tuple[float, Loss]]


class Classifier(nn.Module):
    """Three convolutions with batch normalization, an embedding and ten logits. Digits are gray: so is what it sees."""

    def __init__(self, channels: int, embedding_dim: int):
        super().__init__()
        self.embedding_dim = embedding_dim
        layers: list[nn.Module] = []
        widths = [1, channels, 2 * channels, 2 * channels]
        for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.maps = nn.Sequential(*layers)
        self.embed = nn.Linear(2 * channels * 16, embedding_dim)
        self.head = nn.Linear(embedding_dim, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embed(self.maps(x.mean(1, keepdim=True)).flatten(1))
        return embedding, self.head(F.relu(embedding))


def network(channels: int, embedding_dim: int, seed: int) -> Recognizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Recognizer(Classifier(channels, embedding_dim), InputSpec(8, 8))


def digits() -> tuple[Tensor, Tensor]:
    """All pictures ``[1797, 3, 8, 8]`` in 0..255 and what they show, in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    order = permutation(0, "digits", len(found.target))
    images = torch.from_numpy(found.images).float()[:, None].expand(-1, 3, -1, -1) * (255 / 16)
    return images[order], torch.from_numpy(found.target)[order]


def drawn_from(images: Tensor, labels: Tensor | None, seed: int) -> Batches:
    """A random batch of a fixed set for every step."""

    def batch(step: int) -> tuple[Tensor, Tensor | None]:
        rows = Rng.of(seed, "rows", range(BATCH), step).integers(len(images), 1)[:, 0]
        return images[rows], None if labels is None else labels[rows]

    return batch


def train(student: Recognizer, teacher: Recognizer | None, terms: Terms, batches: Batches, steps: int) -> Recognizer:
    """The loop that every way of learning shares."""
    mine = [name for _, loss in terms for name in loss.student_features]
    theirs = [name for _, loss in terms for name in loss.teacher_features]

    def ask(images: Tensor) -> tuple[Output, Output]:
        out = student(images, mine)
        with torch.no_grad():
            return out, out if teacher is None else teacher(images, theirs)

    student.eval()
    for _, loss in terms:
        loss.prepare(*ask(torch.zeros(2, 3, 8, 8)))
    learning = [*student.parameters(), *(p for _, loss in terms for p in loss.parameters())]
    optimizer = torch.optim.AdamW(learning, lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    for step in range(steps):
        images, labels = batches(step)
        out, seen = ask(images)
        total = torch.stack([weight * loss(out, seen, labels) for weight, loss in terms]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return student.eval()


@torch.no_grad()
def accuracy(net: Recognizer, images: Tensor, labels: Tensor) -> float:
    logits = net(images).logits
    assert logits is not None
    return float((logits.argmax(1) == labels).float().mean())


def published_generator(images: Tensor, labels: Tensor, steps: int) -> ConvGenerator:
    """A conditional generator that somebody trained who has the digits: the decoder of a variational autoencoder.

    Kingma and Welling, ICLR 2014; with labels, Sohn, Lee, Yan, NeurIPS 2015.
    """
    decoder = ConvGenerator(latent_dim=100, classes=10, channels=32, face_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(64 + 10, 256), nn.ReLU(), nn.Linear(256, 200))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    batches = drawn_from(images, labels, seed=1)
    for step in range(steps):
        pictures, whose = batches(step)
        assert whose is not None
        gray = pictures.mean(1).flatten(1) / 255
        mean, log_variance = encoder(torch.cat([gray, F.one_hot(whose, 10)], 1)).chunk(2, 1)
        noise = Rng.of(0, "encoder", range(BATCH), step).normal(100)
        made = decoder(mean + noise * (log_variance / 2).exp(), whose).mean(1).flatten(1) / 255
        error = F.binary_cross_entropy(made, gray, reduction="none").sum(1)
        surprise = (log_variance.exp() + mean.square() - 1 - log_variance).sum(1) / 2
        optimizer.zero_grad()
        # Less than 1: faithful and various digits matter more than a prior that fits.
        (error + 0.3 * surprise).mean().backward()
        optimizer.step()
    return decoder


def from_generator(generator: ConvGenerator, seed: int) -> Batches:
    """Latents and classes at random, for every step."""

    @torch.no_grad()
    def batch(step: int) -> tuple[Tensor, None]:
        rng = Rng.of(seed, "generated", range(BATCH), step)
        return generator(rng.child("z").normal(100), rng.child("class").integers(10, 1)[:, 0]), None

    return batch


def from_teacher(teacher: Recognizer, student: Recognizer, seed: int) -> tuple[GeneratorTraining, Batches]:
    """A conditional generator that learns from teacher and student while the student learns from it, in turns."""
    method = GeneratorTraining(
        latent_dim=100,
        conditional=True,
        channels=32,
        face_size=8,
        category=1.0,
        statistics=1.0,
        adversarial=1.0,
        lr=2e-3,
        seed=seed,
    )
    method.begin(teacher, student.eval(), "classifier of digits")

    def batch(step: int) -> tuple[Tensor, None]:
        if step % 2 == 0:
            student.eval()
            method.learn(step, Rng.of(seed, "learn", range(BATCH), step))
            student.train()
        return method.draw(Rng.of(seed, "draw", range(BATCH), step)), None

    return method, batch


def inverted(teacher: Recognizer, batches: int, steps: int) -> Tensor:
    """Digits out of the teacher's weights alone, 250 at a time, as many of each class."""
    inversion = DeepInversion(
        teacher=teacher,
        targets=Classes(),
        schedule=((2, steps // 2), (1, steps - steps // 2)),
        statistics=1.0,
        first=1.0,
        repulsion=0.0,
        jitter=1,
        flip=False,  # a mirrored digit is none
    )
    return torch.cat([inversion.make(Rng.of(0, "inverted", range(250 * k, 250 * (k + 1))))[1] for k in range(batches)])


def picture(rows: Sequence[Tensor], zoom: int = 4) -> Image.Image:
    """One line of ten framed digits for each ``[10, 3, 8, 8]``."""
    tiles = [F.pad(row.mean(1).round().clamp(0, 255), (1, 1, 1, 1), value=96.0).byte().numpy() for row in rows]
    drawn = Image.fromarray(np.concatenate([np.concatenate(list(line), 1) for line in tiles]))
    return drawn.resize((drawn.width * zoom, drawn.height * zoom), Image.Resampling.NEAREST)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/tutorial_digits")
    parser.add_argument("--seeds", type=int, default=2, help="students of each kind")
    parser.add_argument("--steps", type=int, default=600, help="of 64 pictures, for every network")
    parser.add_argument("--inversions", type=int, default=4, help="batches of 250 inverted digits")
    parser.add_argument("--inversion-steps", type=int, default=200)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.process_time()
    images, labels = digits()
    data, held = (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])

    alone: Terms = [(1.0, CrossEntropy())]
    response: Terms = [(0.5, CrossEntropy()), (0.5, LogitKD(temperature=3.0))]
    only: Terms = [(1.0, LogitKD(temperature=3.0))]
    teacher = train(network(16, 64, seed=0), None, alone, drawn_from(*data, seed=0), given.steps)
    teacher.requires_grad_(False)

    generator = published_generator(*data, given.steps)
    inversions = inverted(teacher, given.inversions, given.inversion_steps)
    noise = NoiseImages(teacher=teacher).make(Rng.of(0, "noise", range(len(inversions))))[1]

    found: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        feature: Terms = [(0.5, CrossEntropy()), (0.5, Hint(student_layer="maps", teacher_layer="maps"))]
        student = network(4, 16, seed)
        method, taught = from_teacher(teacher, student, seed)
        real = drawn_from(*data, seed=seed)
        ways: list[tuple[str, Recognizer, Terms, Batches]] = [
            ("student alone", network(4, 16, seed), alone, real),
            ("response KD, real digits", network(4, 16, seed), response, real),
            ("feature KD, real digits", network(4, 16, seed), feature, real),
            ("1a: no digits, a published generator", network(4, 16, seed), only, from_generator(generator, seed)),
            ("1b: no digits, a generator trained on the teacher", student, only, taught),
            ("2: neither, DeepInversion", network(4, 16, seed), only, drawn_from(inversions, None, seed)),
            ("noise", network(4, 16, seed), only, drawn_from(noise, None, seed)),
        ]
        for name, net, terms, batches in ways:
            trained = train(net, teacher, terms, batches, given.steps)
            found.setdefault(name, []).append(accuracy(trained, *held))
            print(f"{time.process_time() - began:4.0f} s  {name}: {100 * found[name][-1]:.1f} %", flush=True)

    sizes = [sum(p.numel() for p in net.parameters()) for net in (teacher, student)]
    lines = [
        "| | accuracy, % | least to most |",
        "|---|---:|---:|",
        f"| teacher | {100 * accuracy(teacher, *held):.1f} | |",
    ]
    for name, rates in found.items():
        low, high = 100 * min(rates), 100 * max(rates)
        lines.append(f"| {name} | {100 * float(np.mean(rates)):.1f} | {low:.1f} to {high:.1f} |")
    about = f"{HELD_OUT} held-out digits; {given.seeds} students; {sizes[0]:,} and {sizes[1]:,} parameters"
    table = "\n".join([*lines, "", f"{about}; {time.process_time() - began:.0f} s of one core"])

    output, ten = Path(given.output), torch.arange(10)
    with torch.no_grad():
        z, told = Rng.of(0, "shown", range(640)).normal(100), ten.repeat(64)
        shown = [torch.stack([data[0][data[1] == k][0] for k in ten])]
        shown += [made(z, told)[:10] for made in (generator, method.generator)] + [inversions[:10], noise[:10]]
    with atomic_path(output / "digits.png") as path:
        picture(shown).save(path, "PNG")
    atomic_write(output / "table.md", table + "\n")
    print(table)


if __name__ == "__main__":
    command(main)()
