"""Pseudo-identities: faces that a teacher finds alike, so that losses with labels can use faces without any.

``python mining/identities.py --corpus corpora/quickstart --output mined/identities``
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import faceless
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write, check_folder
from faceless.randomness import Rng
from faceless.settings import Settings, parse
from mining.disagreement import Threshold, impostor_threshold
from mining.embedding_index import EmbeddingIndex, Floats, Ids
from mining.faces import Faces, check_framing, embeddings, unit

SEEDS = range(2**31 - 1)  # of FAISS's k-means, where a negative one would be none


@dataclass
class Identities:
    """How to cluster.

    Args:
        corpus: folder of parquet shards; a column ``identity``, if there is one, is what purity is measured by.
        teacher: whose embeddings are clustered.
        output: folder for ``identities.npy`` (one label a row, -1 for none: what ``CorpusSource`` takes as
            ``labels``), ``identities.parquet`` and ``identities.json``.
        clusters: how many; None chooses by `criterion` among ``sweep`` times the number of distinct faces.
        sweep: see ``clusters``.
        far: false match rate of the cosine below which two faces count as different people, calibrated on random
            pairs; where the corpus has identities, on pairs of different ones.
        neighbors: nearest faces that are looked at in the refinement.
        margin: least lead of the nearest center over the second.
        smallest: clusters of fewer faces are given up.
        center: take the mean over the corpus from the embeddings first.
        cache, device: see ``mining/mine.py``.
        seed: of the impostor pairs and of k-means.
    """

    corpus: str
    teacher: str = "dlib-resnet29"
    output: str = "mined/identities"
    clusters: int | None = None
    sweep: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0, 1.4, 2.0])
    far: float = 1e-3
    neighbors: int = 10
    margin: float = 0.05
    smallest: int = 2
    center: bool = True
    cache: str = "mined/cache"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 2:
            raise InputError(f"clusters is {self.clusters}; it must be at least 2")
        if not 0 < self.far < 1:
            raise InputError(f"far is {self.far}; it must be between 0 and 1")
        if not self.sweep or min(self.sweep) <= 0 or self.neighbors < 1 or self.smallest < 1:
            raise InputError("sweep needs positive factors; neighbors and smallest must be at least 1")
        if self.seed not in SEEDS:
            raise InputError(f"seed is {self.seed}; it must be within 0..{SEEDS[-1]}")


def cluster(rows: Floats, count: int, *, seed: int = 0, rounds: int = 20, restarts: int = 1) -> tuple[Floats, Ids]:
    """Spherical k-means: unit ``rows [N, D]`` to unit centers ``[count, D]`` and the cluster of each row ``[N]``.

    All rows take part (FAISS's default draws 256 per center). The same rows and seed give the same bits. A cluster that
    is nobody's nearest gets the row that fits its own worst, so that every cluster has a row.

    Raises:
        InputError: there are fewer rows than clusters.
    """
    if count > len(rows):
        raise InputError(f"{count} clusters of {len(rows)} faces; use fewer")
    rows = np.ascontiguousarray(rows, np.float32)
    means = faiss.Kmeans(
        rows.shape[1],
        count,
        spherical=True,
        niter=rounds,
        nredo=restarts,
        seed=seed + 1,  # FAISS takes 0 for no seed
        min_points_per_centroid=1,
        max_points_per_centroid=10**9,
    )
    means.train(rows)
    centers = np.array(means.centroids)
    found = means.index.search(rows, 1)
    cosines, labels = found[0][:, 0], found[1][:, 0]
    while len(empty := np.flatnonzero((sizes := np.bincount(labels, minlength=count)) == 0)):
        # Not out of a cluster of one, which would only move the hole.
        moved = np.where(sizes[labels] > 1, cosines, np.inf).argsort(kind="stable")[: len(empty)]
        labels[moved], centers[empty] = empty, rows[moved]
    return centers, labels


def distinct(rows: Floats, threshold: float, k: int = 64) -> int:
    """How many faces remain when each, in order, is dropped if it is as near as ``threshold`` to one that remains.

    Only the ``k`` nearest of each face are looked at; in crowds of more the count is too high.
    """
    scores, ids = EmbeddingIndex.of(rows, k=min(k, 10)).neighbors(rows, min(k, len(rows) - 1))
    near = (scores >= threshold) & (ids >= 0)
    a, b = np.repeat(np.arange(len(rows)), near.sum(1)), ids[near]
    return int(remaining(len(rows), np.maximum(a, b), np.minimum(a, b)).sum())


def remaining(count: int, later: Ids, earlier: Ids) -> np.ndarray:
    """``[count]`` whether a number remains, if each is dropped when an ``earlier`` one that it is tied to remains.

    The greedy choice, but in as many rounds as the longest chain of ties instead of one by one.
    """
    state = np.zeros(count, np.int8)  # 0 open, 1 remains, -1 dropped
    while (state == 0).any():
        waits = np.zeros(count, bool)
        waits[later[(state[earlier] == 0)]] = True
        dropped = np.zeros(count, bool)
        dropped[later[state[earlier] == 1]] = True
        state[(state == 0) & dropped] = -1
        state[(state == 0) & ~waits] = 1
        open_ties = state[later] == 0
        later, earlier = later[open_ties], earlier[open_ties]
    return state == 1


def criterion(rows: Floats, centers: Floats, labels: Ids, threshold: Threshold, seed: int = 0) -> tuple[float, float]:
    """What a number of clusters is chosen by: the first value minus the second, both in 0..1.

    The first falls where clusters hold several people, the second rises where people are cut into several clusters.
    Among more centers, more accept one that is a stranger's by chance; that much is taken away.

    Args:
        threshold: with the rate at which strangers accept each other.

    Returns:
        The share of faces that accept another face of their cluster, drawn at random (one that is alone accepts
        nobody), and the share of centers that are an earlier one over again (`distinct`), beyond chance.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=len(centers))
    starts, own = np.cumsum(sizes) - sizes, sizes[labels[order]]
    place = np.arange(len(rows)) - starts[labels[order]]
    draws = Rng.of(seed, "another of the cluster", range(len(rows))).uniform(1)[:, 0].numpy()
    step = 1 + (draws * np.maximum(own - 1, 1)).astype(np.int64)
    partner = order[starts[labels[order]] + (place + step) % own]
    inside = (np.einsum("nd,nd->n", rows[order], rows[partner]) >= threshold.value) & (own > 1)
    # The i-th of so many strangers is taken for one of those before it with the chance 1 - (1 - far)^i.
    k, far = len(centers), threshold.far
    by_chance = 1 - (1 - (1 - far) ** k) / (k * far)
    again = 1 - distinct(centers, threshold.value) / k
    return float(inside.mean()), max(0.0, (again - by_chance) / (1 - by_chance))


def refine(
    rows: Floats,
    centers: Floats,
    labels: Ids,
    threshold: float,
    *,
    neighbors: int = 10,
    margin: float = 0.05,
    smallest: int = 2,
) -> tuple[Ids, Floats, Floats]:
    """Keep what is dense: centers of cores only, and only faces that are clearly theirs.

    A face is of the core of its cluster when at least half of its ``neighbors`` nearest faces (of as many as the
    cluster can offer) are in the same cluster. Centers are moved to the mean of their core, clusters without one are
    given up, and each face goes to the nearest center if its cosine reaches ``threshold`` and leads by ``margin``.

    Returns:
        Labels ``[N]``, consecutive from 0 and -1 for none; cosine to the nearest center and lead over the second, both
        ``[N]``.
    """
    ids = EmbeddingIndex.of(rows).neighbors(rows, min(neighbors, len(rows) - 1))[1]
    sizes = np.bincount(labels, minlength=len(centers))
    together = (labels[ids] == labels[:, None]).sum(1)
    core = 2 * together >= np.minimum(ids.shape[1], np.maximum(sizes[labels] - 1, 1))
    sums = np.zeros_like(centers)
    np.add.at(sums, labels[core], rows[core])
    left = np.bincount(labels[core], minlength=len(centers)) > 0
    sums = sums[left]
    moved = unit(sums)
    if not len(moved):
        return np.full(len(rows), -1), np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
    scores, nearest = EmbeddingIndex.of(moved).search(rows, min(2, len(moved)))
    cosines = scores[:, 0]
    # A face makes the mean of its core, and any mean of a few accepts them: only the others of the core may judge.
    own = np.flatnonzero(core & (nearest[:, 0] == (np.cumsum(left) - 1)[labels]))
    others = unit(sums[nearest[own, 0]] - rows[own])
    cosines[own] = np.einsum("nd,nd->n", rows[own], others)
    lead = cosines - scores[:, 1] if len(moved) > 1 else np.full(len(rows), np.float32(2))
    found = np.where((cosines >= threshold) & (lead >= margin), nearest[:, 0], -1)
    sizes = np.bincount(found[found >= 0], minlength=len(moved))
    numbers = np.where(sizes >= smallest, np.cumsum(sizes >= smallest) - 1, -1)
    return np.where(found >= 0, numbers[found], -1).astype(np.int64), cosines, lead


def purity(labels: Ids, truth: Ids) -> float:
    """Share of labeled faces that belong to the most frequent true identity of their cluster.

    >>> purity(np.array([0, 0, 0, 1, -1]), np.array([5, 5, 6, 6, 7]))
    0.75
    """
    known = (labels >= 0) & (truth >= 0)
    if not known.any():
        raise ValueError("no face has both a label and a true identity")
    pairs, counts = np.unique(np.stack((labels[known], truth[known])), axis=1, return_counts=True)
    best = np.zeros(labels.max() + 1, np.int64)
    np.maximum.at(best, pairs[0], counts)
    return float(best.sum() / known.sum())


def identify(settings: Identities, progress: bool = True) -> dict[str, Any]:
    """Cluster, refine, write; returns the summary."""
    faces, output = Faces(settings.corpus), Path(settings.output)
    check_folder(output)
    if len(faces) < 2:
        raise InputError(f"{settings.corpus}: 1 face; clusters need at least 2")
    truth = faces.identities()
    teacher = faceless.load(settings.teacher)
    check_framing(faces, teacher, settings.teacher)
    raw = embeddings(teacher, faces, settings.cache, settings.device, progress)
    rows = unit(raw, center=settings.center)
    # A generator of few people shows one of them twice in many a random pair.
    threshold = impostor_threshold(rows, settings.far, labels=truth, seed=settings.seed)
    tried: list[dict[str, Any]] = []
    count, unique = settings.clusters, None
    if count is None:
        unique = distinct(rows, threshold.value)
        for k in sorted({min(max(2, round(factor * unique)), len(rows)) for factor in settings.sweep}):
            inside, between = criterion(
                rows, *cluster(rows, k, seed=settings.seed, rounds=10), threshold, settings.seed
            )
            tried.append({"clusters": k, "faces that accept another": inside, "centers over again": between})
        count = max(tried, key=lambda row: row["faces that accept another"] - row["centers over again"])["clusters"]
        if len(tried) > 1 and count in (tried[0]["clusters"], tried[-1]["clusters"]):
            print(f"{count} clusters are at the edge of the sweep; widen --sweep, or name --clusters yourself")
    centers, labels = cluster(rows, count, seed=settings.seed, restarts=3)
    refined, cosines, lead = refine(
        rows,
        centers,
        labels,
        threshold.value,
        neighbors=settings.neighbors,
        margin=settings.margin,
        smallest=settings.smallest,
    )
    if refined.max() < 0:
        raise InputError(f"{settings.corpus}: no cluster is left after refinement; lower margin or raise far")
    summary: dict[str, Any] = {
        "settings": asdict(settings),
        "faces": len(faces),
        "fingerprint": faces.fingerprint,
        "threshold": asdict(threshold),
        "distinct": unique,
        "sweep": tried,
        "clusters": count,
        "identities": int(refined.max()) + 1,
        "labeled": int((refined >= 0).sum()),
    }
    if truth is not None and ((refined >= 0) & (truth >= 0)).any():
        summary["purity"] = {"clusters": purity(labels, truth), "identities": purity(refined, truth)}
    buffer = io.BytesIO()
    np.save(buffer, refined, allow_pickle=False)
    # First what faces the labels are of: without it, labels that a killed command left would fit any.
    atomic_write(output / "identities.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(output / "identities.npy", buffer.getvalue())
    columns = {"row": np.arange(len(faces)), "identity": refined, "cosine": cosines, "lead": lead}
    with atomic_path(output / "identities.parquet") as temporary, temporary.open("wb") as file:
        pq.write_table(pa.table(columns), file)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Identities] = parse(
        Identities, arguments, program="mining/identities.py", description=__doc__ or ""
    )
    made = settings.build()
    found = identify(made)
    print(
        f"{made.output}: {found['identities']} identities for {found['labeled']} of {found['faces']} faces; "
        f"source.init_args.labels {Path(made.output) / 'identities.npy'}"
    )


if __name__ == "__main__":
    command(main)()
