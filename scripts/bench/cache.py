"""Epoch time with a teacher cache over without, of an IResNet-100 that teaches a MobileFaceNet.

    python scripts/bench/cache.py [--faces 64] [--batch 16] [--epochs 2] [--threads N]

Runs ``distill/train.py`` twice on one set of made-up faces, with and without ``teacher_cache``, and prints the typical
time of an epoch of either (filling the cache apart), their ratio, and the largest relative difference of the two loss
curves. The teacher is untrained: its time does not depend on its weights.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import faceless
from distill.train import main as distil
from faceless.errors import command
from faceless.randomness import Rng

SIDE, TARGET = 112, 5


def faces(count: int) -> torch.Tensor:
    """``[count, 3, 112, 112]`` uint8: smooth pictures, no two alike."""
    small = Rng.of(0, "faces", range(count)).uniform(3, 7, 7, high=255.0)
    return F.interpolate(small, (SIDE, SIDE), mode="bicubic").clamp(0, 255).byte()


def write(folder: Path, count: int) -> dict[str, Any]:
    """The teacher and the faces on disk; returns the recipe that both runs share."""
    teacher, pictures = faceless.create("iresnet100", seed=0), faces(count)
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # statistics of its own faces, without which a hundred layers overflow
    with torch.no_grad():
        teacher.train()(pictures[:8])
    faceless.save(teacher, folder / "teacher", {})
    encoded = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
        encoded.append(file.getvalue())
    pq.write_table(pa.table({"image": encoded}), folder / "faces.parquet")
    source = {"path": str(folder / "faces.parquet"), "label": None, "framing": "arcface", "real": False, "views": 1}
    return {
        "teacher": str(folder / "teacher"),
        "student": {"name": "mobilefacenet"},
        "source": {"class_path": "distill.sources.ParquetSource", "init_args": source},
        "losses": {"cosine": {"loss": {"class_path": "distill.losses.embedding.CosineEmbedding"}}},
        "precision": "fp32",
        "log_every": 1,
        "tensorboard": False,
        "validation": {"faces": 0},
        "verification": {"benchmark": None},
    }


def run(folder: Path, name: str, recipe: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step of a run."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": str(folder / name)}))
    distil(["--config", str(path)])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    seconds = [recipe["batch_size"] / line["faces_per_second"] for line in lines]
    return [line["loss"] for line in lines], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    steps = chosen.faces // chosen.batch  # of an epoch
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = write(folder, chosen.faces)
        recipe |= {"batch_size": chosen.batch, "steps": steps * chosen.epochs, "threads": chosen.threads}
        losses, seconds = run(folder, "asked", recipe)
        cached, fewer = run(folder, "cached", recipe | {"teacher_cache": str(folder / "cache")})
    # The first step warms up.
    without, with_ = (steps * statistics.median(times[1:]) for times in (seconds, fewer))
    print(f"{chosen.faces} faces, batch {chosen.batch}, {chosen.epochs} epochs, {chosen.threads} threads")
    print(f"epoch without a cache {without:8.2f} s")
    print(f"epoch with a cache    {with_:8.2f} s")
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses, cached, strict=True))
    print(f"largest relative difference of the losses of {len(losses)} steps: {apart:.1e}")
    ratio = without / with_
    print(f"ratio {ratio:.1f}; the aim is {TARGET}: {'reached' if ratio >= TARGET else 'missed'}")


if __name__ == "__main__":
    command(main)()
