"""Small shards written with pyarrow alone, and small networks, for the tests of mining."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import faceless

SIDE = 32


def pictures(identities: np.ndarray, seed: int = 0) -> np.ndarray:
    """``[N, 32, 32, 3]`` uint8: smooth patterns, one for each identity, and a little noise."""
    numbers = np.random.default_rng(seed)
    coarse = np.random.default_rng(7).uniform(0, 255, (int(identities.max()) + 1, 4, 4, 3))
    faces = coarse.repeat(8, 1).repeat(8, 2)[identities]
    return np.clip(faces + numbers.normal(0, 3, faces.shape), 0, 255).astype(np.uint8)


def write(folder: Path, images: np.ndarray, shards: int = 2, **columns: np.ndarray) -> Path:
    """A folder of shards of ``images`` with further columns."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    for number, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        table: dict[str, pa.Array] = {"image": pa.array([encoded[row] for row in rows])}
        for name, values in columns.items():
            flat = pa.array(values[rows].reshape(-1))
            table[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        pq.write_table(pa.table(table), folder / f"{number}.parquet", row_group_size=7)
    return folder


def network(folder: Path, seed: int, dim: int = 16) -> str:
    """A small random recognizer on the disk."""
    options = {"widths": [8, 16], "depths": [1, 1], "head": "flat"}
    net = faceless.create("slimresnet", embedding_dim=dim, input_size=SIDE, framing="dlib", seed=seed, **options)
    faceless.save(net, folder, {})
    return str(folder)
