"""Pseudo-identities in a run: clusters of cached teacher embeddings stand in for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.sources import read_labels
from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.randomness import permutation

ROWS = 8192  # faces compared with all clusters at a time


def nearest(unit: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to, and number of, the nearest of ``centers [k, D]`` for unit rows ``[N, D]``."""
    found = [(rows @ centers.T).max(1) for rows in unit.split(ROWS)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def cluster(embeddings: Tensor, count: int, *, seed: int = 0, rounds: int = 20) -> Tensor:
    """Spherical k-means: ``[N, D]`` of any norm to ``[N]`` labels in 0..count-1, none of them unused.

    Dhillon, Modha: Concept decompositions for large sparse text data using clustering, Machine Learning 2001. A cluster
    that loses all of its faces starts again at the face that fits its own cluster worst.

    Raises:
        InputError: there are fewer faces than clusters.

    >>> people = torch.eye(3).repeat_interleave(4, 0)
    >>> labels = cluster(people + 0.01 * torch.randn(12, 3), 3)
    >>> [len(set(labels[i : i + 4].tolist())) for i in (0, 4, 8)]
    [1, 1, 1]
    """
    if count > len(embeddings):
        raise InputError(f"{count} pseudo-identities of {len(embeddings)} faces; use fewer")
    unit = F.normalize(embeddings.float())
    centers = unit[permutation(seed, "pseudo-identities", len(unit))[:count]]
    labels = torch.empty(0)
    for _ in range(rounds):
        cosines, labels = nearest(unit, centers)
        sizes = torch.bincount(labels, minlength=count)
        empty = (sizes == 0).nonzero().flatten()
        # Not out of a cluster of one, which would only move the hole.
        movable = torch.where(sizes[labels] > 1, cosines, torch.inf).argsort(stable=True)[: len(empty)]
        labels[movable] = empty
        moved = F.normalize(torch.zeros_like(centers).index_add_(0, labels, unit))
        if torch.equal(moved, centers):
            break
        centers = moved
    return labels


def stored(path: Path, embeddings: Tensor, count: int, seed: int) -> Tensor:
    """The labels in ``path``, clustered and written first if they are not there."""
    if not path.is_file():
        labels = cluster(embeddings, count, seed=seed)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, labels.numpy(), allow_pickle=False)
    return read_labels(path)
