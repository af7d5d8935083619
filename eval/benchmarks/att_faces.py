"""The AT&T (ORL) Database of Faces: 400 photographs of 40 people; 1,800 genuine and 78,000 impostor pairs.

Samaria, Harter: Parameterisation of a stochastic model for human face identification, WACV 1994. People 1 to 20 are for
tuning, 21 to 40 for reporting.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.prepare import crops
from faceless import assets
from faceless.files import atomic_path

NAME = "att-faces"
PEOPLE, FACES = 40, 10
#: Of the crops in the cache; raise it when the alignment changes.
VERSION = 1


def load(framing: str = "dlib", size: int = 150) -> Benchmark:
    """The 400 crops; cut on first use (a few seconds, needs dlib), then read from the cache folder."""
    folder = assets.fetch(NAME)
    cached = assets.cache_folder() / "benchmarks" / f"{NAME}-{framing}-{size}-v{VERSION}.npz"
    stored = _read(cached, size)
    if stored is None:
        stored = _prepare(folder, framing, size)
        with atomic_path(cached) as temporary:
            np.savez(temporary, images=stored[0], alignment=np.array(json.dumps(stored[1])))
    images, alignment = stored
    asset = assets.ASSETS[NAME].record()
    return Benchmark(
        NAME,
        torch.from_numpy(images),
        torch.arange(PEOPLE).repeat_interleave(FACES),
        [f"s{person + 1}" for person in range(PEOPLE)],
        {**asset, "framing": framing, "size": size, "alignment": alignment},
    )


def _prepare(folder: Path, framing: str, size: int) -> tuple[np.ndarray, dict[str, Any]]:
    print(f"{NAME}: aligning {PEOPLE * FACES} faces to {framing} crops of {size} pixels", file=sys.stderr, flush=True)
    paths = [folder / f"s{s}" / f"{n}.pgm" for s in range(1, PEOPLE + 1) for n in range(1, FACES + 1)]
    cut, _, alignment = crops(paths, framing, size)
    return cut.numpy(), alignment


def _read(cached: Path, size: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """What an earlier process stored; None where there is nothing, or nothing usable."""
    try:
        with np.load(cached, allow_pickle=False) as stored:
            images, alignment = stored["images"], json.loads(str(stored["alignment"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if images.shape != (PEOPLE * FACES, 3, size, size) or images.dtype != np.uint8:
        return None
    return images, alignment
