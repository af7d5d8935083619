"""How many dimensions the embeddings of a corpus really fill, network by network.

``python mining/intrinsic.py --corpus corpora/quickstart --models '[dlib-resnet29, runs/quickstart/student]'``

Strong networks fill fewer dimensions than weak ones. A student that imitates embeddings only has to bridge that gap,
and reverse distillation makes teachers that leave less of it (Li et al.: Rethinking Feature-based Knowledge
Distillation for Face Recognition, CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import faceless
from faceless.errors import InputError, command
from faceless.settings import Settings, parse
from mining.embedding_index import EmbeddingIndex, Floats
from mining.faces import Faces, check_framing, embeddings, unit


@dataclass
class Intrinsic:
    """What to measure.

    Args:
        corpus: folder of parquet shards, whose faces are embedded.
        models: anything `faceless.load` takes.
        center: take the mean over the corpus from the embeddings first.
        cache, device: see ``mining/mine.py``.
    """

    corpus: str
    models: list[str] = field(default_factory=lambda: ["dlib-resnet29"])
    center: bool = True
    cache: str = "mined/cache"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("models is empty; name at least one network")


def two_nn(rows: Floats, discard: float = 0.1) -> float:
    """Intrinsic dimension of ``rows [N, D]`` from the ratios of each row's two nearest distances.

    Where the density is even over the two nearest neighbors, the ratio r2 / r1 of a d-dimensional set has the
    distribution 1 - mu^-d: d is the slope through the origin of -ln(1 - F(mu)) over ln mu. Rows that coincide count
    once.
    Facco, d'Errico, Rodriguez, Laio: Estimating the intrinsic dimension of datasets by a minimal neighborhood
    information, Scientific Reports 7, 2017.

    Args:
        rows: float32.
        discard: part of the largest ratios to leave out, which are the noisiest.

    Raises:
        ValueError: fewer than 3 different rows, or discard is not in [0, 1).

    >>> line = np.random.default_rng(0).random((500, 1)) * np.ones((1, 3))
    >>> round(two_nn(line.astype(np.float32)))
    1
    """
    if not 0 <= discard < 1:
        raise ValueError(f"discard is {discard}; it must be at least 0 and below 1")
    different = np.unique(rows, axis=0)
    if len(different) < 3:
        raise ValueError(f"{len(different)} different rows; nearest neighbors need at least 3")
    _, nearest = EmbeddingIndex.of(different, metric="l2").neighbors(different, 2)
    exact = different.astype(np.float64)
    # Again in float64: the index's float32 distances between close rows have few digits.
    first, second = (np.linalg.norm(exact - exact[nearest[:, k]], axis=1) for k in range(2))
    logs = np.sort(np.log(np.maximum(second, first) / np.minimum(second, first)))
    kept = max(int(len(logs) * (1 - discard)), 1)
    rarity = -np.log1p(-np.arange(1, kept + 1) / (len(logs) + 1))
    x = logs[:kept]
    return float((x @ rarity) / (x @ x))


def measure(settings: Intrinsic, progress: bool = True) -> dict[str, float]:
    """Intrinsic dimension of each model's unit embeddings."""
    faces = Faces(settings.corpus)
    if len(faces) < 3:
        raise InputError(f"{settings.corpus}: {len(faces)} faces; nearest neighbors need at least 3")
    found = {}
    for model in settings.models:
        network = faceless.load(model)
        check_framing(faces, network, model)
        raw = embeddings(network, faces, settings.cache, settings.device, progress)
        try:
            found[model] = two_nn(unit(raw, center=settings.center))
        except ValueError as error:
            raise InputError(f"{model}: {error}; it takes nearly all faces for the same") from error
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Intrinsic] = parse(
        Intrinsic, arguments, program="mining/intrinsic.py", description=__doc__ or ""
    )
    for model, dimension in measure(settings.build()).items():
        print(f"{model}: {dimension:.1f} dimensions")


if __name__ == "__main__":
    command(main)()
