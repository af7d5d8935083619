"""Pseudo-identities in a run: clusters of cached teacher embeddings stand in for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from distill.sources import read_labels
from faceless.files import atomic_path
from mining.identities import cluster


def stored(path: Path, embeddings: Callable[[], Tensor], count: int, seed: int) -> Tensor:
    """The labels in ``path``; if they are not there, of the clusters of what ``embeddings`` returns, written there.

    Raises:
        InputError: there are fewer faces than pseudo-identities, or the file is not one of labels.
    """
    if not path.is_file():
        # An unlucky start merges people, which shows where there are few of them; with thousands it would only cost.
        restarts = 10 if count < 1000 else 1
        labels = cluster(F.normalize(embeddings().float()).numpy(), count, seed=seed, restarts=restarts)[1]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, labels, allow_pickle=False)
    return read_labels(path)
