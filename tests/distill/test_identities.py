"""Pseudo-identities of a run are those of the mining room, and are read again rather than made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from distill.identities import stored
from faceless.errors import InputError


def people(count: int = 12, faces: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(count, 16, generator=random))
    truth = torch.arange(count).repeat(faces)
    return 3 * (centers[truth] + 0.05 * torch.randn(len(truth), 16, generator=random)), truth


def test_people_are_found(tmp_path: Path) -> None:
    embeddings, truth = people()
    labels = stored(tmp_path / "a.npy", lambda: embeddings, 12, seed=0)
    assert adjusted_rand_score(truth, labels) > 0.8
    assert labels.unique().tolist() == list(range(12))
    assert torch.equal(stored(tmp_path / "b.npy", lambda: embeddings, 12, seed=0), labels)


def test_every_label_is_used_even_where_faces_coincide(tmp_path: Path) -> None:
    embeddings = torch.cat((torch.ones(30, 4), torch.eye(4), -torch.eye(4)))
    assert stored(tmp_path / "x.npy", lambda: embeddings, 12, seed=0).unique().tolist() == list(range(12))
    with pytest.raises(InputError, match="use fewer"):
        stored(tmp_path / "y.npy", lambda: embeddings, 39, seed=0)


def test_labels_are_kept(tmp_path: Path) -> None:
    embeddings, _ = people()
    first = stored(tmp_path / "x.npy", lambda: embeddings, 5, seed=0)
    assert torch.equal(stored(tmp_path / "x.npy", lambda: embeddings.flip(0), 5, seed=0), first)
    (tmp_path / "x.npy").write_bytes(b"x")
    with pytest.raises(InputError, match="not a readable"):
        stored(tmp_path / "x.npy", lambda: embeddings, 5, seed=0)
