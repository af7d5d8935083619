"""Every loss under a name, and the batches that their common tests use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.losses import contrastive, embedding, relational
from distill.losses.base import Loss
from faceless.recognizer import Output

EVERY: dict[str, Callable[[int], Loss]] = {
    "cosine": lambda d: embedding.CosineEmbedding(),
    "l2-raw": lambda d: embedding.FeatureL2(form="raw"),
    "l2-unit": lambda d: embedding.FeatureL2(form="unit"),
    "l2-unit-mean": lambda d: embedding.FeatureL2(form="unit-mean"),
    "qud": lambda d: contrastive.QUD(embedding_dim=d, queue_size=12),
    "qud-empty": lambda d: contrastive.QUD(embedding_dim=d, queue_size=12, initial="empty"),
    "qud-simQ": lambda d: contrastive.QUD(embedding_dim=d, queue_size=12, update="simQ"),
    "qud-dissimQ": lambda d: contrastive.QUD(embedding_dim=d, queue_size=12, update="dissimQ"),
    "qud-masked": lambda d: contrastive.QUD(embedding_dim=d, queue_size=12, same_person=0.8),
    "rkd-distance": lambda d: relational.RKDDistance(),
    "rkd-distance-both": lambda d: relational.RKDDistance(normalized="both"),
    "rkd-angle": lambda d: relational.RKDAngle(),
    "rkd-angle-subset": lambda d: relational.RKDAngle(vertices=3),
    "similarity": lambda d: relational.SimilarityToMemory(embedding_dim=d, size=12),
    "similarity-random": lambda d: relational.SimilarityToMemory(embedding_dim=d, size=12, initial="random"),
    "similarity-paired": lambda d: relational.SimilarityToMemory(embedding_dim=d, size=12, paired=True),
    "similarity-preserving": lambda d: relational.SimilarityPreserving(),
    "darkrank": lambda d: relational.DarkRank(),
    "pkt": lambda d: relational.PKT(),
}

# Losses of pairs or triplets of the batch; the others average over single samples.
OF_PAIRS = {
    "rkd-distance",
    "rkd-distance-both",
    "rkd-angle",
    "rkd-angle-subset",
    "similarity-preserving",
    "darkrank",
    "pkt",
}

# Losses that accept a student of another dimension.
ANY_DIM = OF_PAIRS


def faces(
    batch: int, dim: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher embeddings ``[B, D]``, half alike, and labels ``[B]`` with duplicates."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, dim, generator=random, dtype=torch.float64)
    student = 0.7 * teacher + torch.randn(batch, dim, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 5, (batch,), generator=random)
    return (scale * student).to(dtype), (scale * teacher).to(dtype), labels


def value(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    return loss(Output(student), Output(teacher), labels)
