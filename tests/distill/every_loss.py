"""Every loss under a name, and the batches that their common tests use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.losses import (
    adaptive_centers,
    adaptive_parameters,
    attention,
    contrastive,
    cross_architecture,
    embedding,
    features,
    logits,
    margin,
    mutual,
    probabilistic,
    ranking,
    relational,
    self_distillation,
    unified,
)
from distill.losses.base import Loss
from faceless.recognizer import Output

EVERY: dict[str, Callable[[int], Loss]] = {
    "cosine": lambda d: embedding.CosineEmbedding(),
    "l2-raw": lambda d: embedding.FeatureL2(form="raw"),
    "l2-unit": lambda d: embedding.FeatureL2(form="unit"),
    "l2-unit-mean": lambda d: embedding.FeatureL2(form="unit-mean"),
    "von-mises-fisher": lambda d: probabilistic.VonMisesFisher(),
    "von-mises-fisher-kl": lambda d: probabilistic.VonMisesFisher(form="kl"),
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
    "ekd": lambda d: ranking.EKD(one_in=[3, 10], temperature=0.2, genuine=2.0, impostor=1.0),
    "ekd-teacher-pairs": lambda d: ranking.EKD(
        one_in=[2, 4, 8], temperature=0.2, genuine=2.0, impostor=1.0, same_person=0.6
    ),
    "ranking": lambda d: ranking.PairwiseRanking(),
    "ranking-subset": lambda d: ranking.PairwiseRanking(form="exponent", margin="deviation", scores=20),
    "ranknet": lambda d: ranking.PairwiseRanking(form="ranknet", slope=4.0),
    "crd": lambda d: contrastive.CRD(embedding_dim=d, feature_dim=8, size=12),
    "iled": lambda d: unified.ILED(),
    "iled-unweighted": lambda d: unified.ILED(weighted=False),
    "rpsd": lambda d: unified.RPSD(embedding_dim=d, size=12),
    "unified": lambda d: unified.UnifiedKD(embedding_dim=d, size=12),
    "unified-labels": lambda d: unified.UnifiedKD(embedding_dim=d, size=12, classes=6),
    "arcface": lambda d: margin.ArcFace(embedding_dim=d, classes=6),
    "arcface-exact": lambda d: margin.ArcFace(embedding_dim=d, classes=6, gradient="exact"),
    "arcface-sampled": lambda d: margin.ArcFace(embedding_dim=d, classes=6, negatives=2),
    "cosface": lambda d: margin.CosFace(embedding_dim=d, classes=6),
    "sphereface2": lambda d: margin.SphereFace2(embedding_dim=d, classes=6),
    "sphereface2-exact": lambda d: margin.SphereFace2(embedding_dim=d, classes=6, gradient="exact"),
    "arcdistill": lambda d: frozen_centers(d, "arc"),
    "cosdistill": lambda d: frozen_centers(d, "cos"),
    "arcdistill-sampled": lambda d: frozen_centers(d, "arc", negatives=2),
    "adadistill-sampled": lambda d: adaptive_centers.AdaDistill(embedding_dim=d, classes=6, negatives=2),
    "adadistill": lambda d: adaptive_centers.AdaDistill(embedding_dim=d, classes=6),
    "adadistill-cos-alpha": lambda d: adaptive_centers.AdaDistill(
        embedding_dim=d, classes=6, kind="cos", weighted=False, renormalize=True
    ),
    "kd": lambda d: logits.LogitKD(),
    "dkd": lambda d: logits.DKD(),
    "nkd": lambda d: logits.NKD(temperature=2.0),
    "cross-entropy": lambda d: logits.CrossEntropy(),
    "kd-standardized": lambda d: adaptive_parameters.AdaptiveTemperatureKD(),
    "kd-adversarial": lambda d: adaptive_parameters.AdaptiveTemperatureKD(rule="adversarial", ramp=3),
    "qud-spread": lambda d: adaptive_parameters.AdaptiveQUD(embedding_dim=d, queue_size=12),
    "qud-learned": lambda d: adaptive_parameters.AdaptiveQUD(embedding_dim=d, queue_size=12, rule="learned", start=0.1),
    "iled-adaptive": lambda d: adaptive_parameters.AdaptiveILED(),
    "rpsd-adaptive": lambda d: adaptive_parameters.AdaptiveRPSD(embedding_dim=d, size=12),
    "hint": lambda d: prepared(features.Hint(student_layer="map", teacher_layer="map"), d, d),
    "hint-adapted": lambda d: prepared(features.Hint(student_layer="map", teacher_layer="wide"), d, d),
    "hints": lambda d: prepared(features.Hints(student_layers=["map", "map"], teacher_layers=["map", "wide"]), d, d),
    "urfm": lambda d: prepared(
        cross_architecture.URFM(student_layer="map", teacher_layer="wide", centers=4, dim=8, heads=2), d, d
    ),
    "attention": lambda d: features.AttentionTransfer(student_layer="map", teacher_layer="wide"),
    "attention-similarity": lambda d: attention.AttentionSimilarity(student_layers=["map"], teacher_layers=["map"]),
    "attention-spatial": lambda d: attention.AttentionSimilarity(
        student_layers=["map"], teacher_layers=["wide"], maps="spatial"
    ),
    "each-peer": lambda d: mutual.EachPeer(loss=contrastive.QUD(embedding_dim=d, queue_size=12)),
    "mutual": lambda d: mutual.Mutual(loss=embedding.CosineEmbedding(), peers=2),
    "deep-mutual": lambda d: mutual.DeepMutual(embedding_dim=d, classes=6, peers=2),
    "self": lambda d: prepared(self_distillation.DeepToShallow(layers=["map", "wide"]), d, d),
    "self-labels": lambda d: prepared(self_distillation.DeepToShallow(layers=["map", "wide"], classes=6), d, d),
    "prompt-guard": lambda d: cross_architecture.PromptGuard(),
}


def frozen_centers(dim: int, kind: str, negatives: int | None = None) -> Loss:
    loss = adaptive_centers.FrozenCenters(embedding_dim=dim, classes=6, kind=kind, negatives=negatives)
    loss.prime(torch.randn(6, dim, generator=torch.Generator().manual_seed(3)))
    return loss


# Losses of pairs or triplets of the batch; the others average over single samples.
OF_PAIRS = {
    "rkd-distance",
    "rkd-distance-both",
    "rkd-angle",
    "rkd-angle-subset",
    "similarity-preserving",
    "darkrank",
    "pkt",
    "ekd",
    "ekd-teacher-pairs",
    "ranking",
    "ranking-subset",
    "ranknet",
}

# Classification by labels: the teacher's embedding is at most a center.
HEADS = {name for name in EVERY if name.startswith(("arc", "cosf", "cosd", "sphere", "ada"))} | {"cross-entropy"}

# Their derivative is not that of their value, by definition.
STRAIGHT_THROUGH = {"crd", "arcface", "arcface-sampled", "sphereface2", "unified-labels", "mutual", "deep-mutual"}
STRAIGHT_THROUGH |= {"self", "self-labels"}

# Losses that accept a student of another dimension.
ANY_DIM = OF_PAIRS | {"cross-entropy", "attention", "attention-spatial", "mutual", "prompt-guard"}


def faces(
    batch: int, dim: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher embeddings ``[B, D]``, half alike, and labels ``[B]`` with duplicates."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(batch, dim, generator=random, dtype=torch.float64)
    student = 0.7 * teacher + torch.randn(batch, dim, generator=random, dtype=torch.float64)
    labels = torch.randint(0, 6, (batch,), generator=random)
    return (scale * student).to(dtype), (scale * teacher).to(dtype), labels


def value(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """The loss of two embeddings, which also serve as logits, as peers' and, spread over places, as feature maps."""
    if labels is not None and (loss.needs_logits or isinstance(loss, logits.CrossEntropy)):
        labels = labels.clamp(max=student.shape[1] - 1)
    return loss(output(student), output(teacher), labels)


def output(embedding: Tensor) -> Output:
    maps = {}
    if embedding.ndim == 2:
        dim = embedding.shape[1]
        exact = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        maps |= {"peers.0": exact, "peers.1": exact.flip(1), "prompted": exact, "unprompted": exact.flip(1)}
        for name, channels in (("map", torch.arange(dim)), ("wide", torch.arange(2 * dim) % dim)):
            phase = torch.arange(len(channels))[:, None, None] + torch.arange(3)[:, None] + 2 * torch.arange(2)
            maps[name] = exact[:, channels, None, None] * (1 + phase).to(exact.dtype).sin()
    return Output(embedding, embedding, maps)


def prepared(loss: Loss, student_dim: int, teacher_dim: int) -> Loss:
    loss.prepare(output(torch.zeros(1, student_dim)), output(torch.zeros(1, teacher_dim)))
    return loss
