"""Losses between networks of two kinds, such as a Transformer teacher and a convolutional student."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distill.losses.base import Loss, mean, one_of, positive
from distill.losses.features import FeatureLoss
from faceless import align
from faceless.randomness import Rng
from faceless.recognizer import Output

# Distances, in sides of a local field: told apart exactly up to the first, then ever more coarsely up to the last.
NEAR, BUCKETS, LIMIT = 1.9, 3.8, 15.2


def bucket(distance: Tensor) -> Tensor:
    """Piecewise index of a distance: rounded up to 1.9, then logarithmic up to 15.2; int64 in 0..3.

    Wu, Peng, Chen, Fu, Chao: Rethinking and Improving Relative Position Encoding for Vision Transformer, ICCV 2021,
    equation 18, with the constants of their code.

    >>> bucket(torch.tensor([0.0, 0.6, 1.9, 5.0, 50.0]))
    tensor([0, 1, 2, 3, 3])
    """
    steps = (distance.clamp(min=NEAR) / NEAR).log() / math.log(LIMIT / NEAR) * (BUCKETS - NEAR)
    return torch.where(distance <= NEAR, distance.round(), (NEAR + steps).round().clamp(max=BUCKETS)).long()


class LocalFeatures(nn.Module):
    """One network's side of `URFM`: a feature map gathered around local centers, and self-attention between these.

    Args:
        channels: of the map.
        dim: of a local feature.
        heads: of the self-attention.
        seed, name: of the initial weights.

    Shape:
        map ``[B, C, H, W]``, centers ``[L, dim]``, buckets ``[L, HW]`` or ``[B, L, HW]``; returns local features
        ``[B, L, dim]`` after self-attention and its attention ``[B, heads, L, L]``.
    """

    def __init__(self, channels: int, dim: int, heads: int, seed: int, name: str):
        super().__init__()
        self.heads = heads
        self.query = linear(dim, dim, seed, f"URFM {name} query")
        self.key = linear(channels, dim, seed, f"URFM {name} key")
        self.value = linear(channels, dim, seed, f"URFM {name} value")
        self.mix = linear(dim, 3 * dim, seed, f"URFM {name} mix")
        self.out = linear(dim, dim, seed, f"URFM {name} out")
        table = Rng.of(seed, f"URFM {name} positions", range(int(BUCKETS) + 1)).normal(dim)
        self.positions = nn.Parameter(table / math.sqrt(dim))

    def forward(self, x: Tensor, centers: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
        # Networks differ in the size of their features by orders of magnitude.
        places = F.layer_norm(x.flatten(2).transpose(1, 2), x.shape[1:2])
        keys = self.key(places)
        # (q + b) k, where b is one of few rows: b k is computed for those rows, then looked up for each center.
        lookup = (keys @ self.positions.T).transpose(1, 2)
        biases = lookup.gather(1, buckets.expand(len(x), -1, -1))
        scores = (self.query(centers) @ keys.transpose(1, 2) + biases) / math.sqrt(keys.shape[2])
        local = scores.softmax(2) @ self.value(places)
        q, k, v = self.mix(local).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
        return self.out((attention @ v).transpose(1, 2).flatten(2)), attention


def linear(inputs: int, outputs: int, seed: int, purpose: str) -> nn.Linear:
    """A linear layer without bias that keeps the variance of its input."""
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(Rng.of(seed, purpose, range(outputs)).normal(inputs) / math.sqrt(inputs))
    return layer


class URFM(FeatureLoss):
    """Compare the features of a Transformer and a convolutional network in unified receptive fields.

    The places of either map are gathered, by attention, around the same learnable local centers; self-attention between
    the local features follows, and both its attention and its output are compared by their squared differences. The
    score of a center and a place is (q W_q + b) (f W_k)^T / sqrt(d), where b is looked up by the distance of the two:
    Euclidean, plus ``gamma`` times their difference in relation to the face's landmarks. No labels.
    Zhao et al.: Cross-Architecture Distillation for Face Recognition, ACM MM 2023 (arXiv 2306.14662).

    There is no official code, and this is reconstructed. Known: learnable centers as queries, the score above, the
    bucketed sum of two distances, and the two mean squared differences. Chosen here: each center is anchored at a cell
    of a square grid, distances are in sides of its cells; two places differ in relation to the landmarks by the mean
    over five landmarks of the difference of their distances to it; the number of centers, gamma and the weights;
    features and local features are compared after layer normalization, as the mean over their numbers; attention as
    the sum over those that one center attends to, a distribution (the mean of 49 numbers near 1/49 would be a
    thousandth of the other term).

    ``teacher_layer`` should be one whose places the teacher's embedding is made of. A ViT that reads its class token
    alone leaves those of its last block without any meaning: name the block before.

    Trained on the comparison alone, both sides could agree on saying nothing. So the teacher's side does not follow the
    student: it learns to tell the teacher's embedding from its local features (1 - cos, weight ``keep``).

    Args:
        student_layer, teacher_layer: as for `distill.losses.features.Hint`.
        centers: number of local centers L, a square.
        dim, heads: of the local features and their self-attention.
        gamma: weight of the facial distance.
        framing: of the faces, ``"dlib"`` or ``"arcface"``: whose mean landmarks stand in where a face has none.
        attention, local, keep: weights of the three terms.
        teacher_learns: let the comparison reach the teacher's features; for a teacher with prompts
            (`distill.prompts`).
        seed: of the initial weights.

    Shape:
        features as for `distill.losses.features.Hint`; returns a scalar. Either output may carry the feature
        ``landmarks [B, 5, 2]``: eyes, nose tip and mouth corners in sides of the image, from its upper left corner, not
        finite for a face without.

    Raises:
        ValueError: an argument is out of range, a feature is missing, or has other channels than `prepare` saw.

    >>> loss = URFM(student_layer="stage2", teacher_layer="block10", centers=16, dim=32)
    >>> student = Output(torch.randn(2, 4), features={"stage2": torch.randn(2, 8, 6, 6)})
    >>> teacher = Output(torch.randn(2, 4), features={"block10": torch.randn(2, 50, 24)})
    >>> loss.prepare(student, teacher)
    >>> loss(student, teacher).item() > 0
    True
    """

    canonical: Tensor

    def __init__(
        self,
        *,
        student_layer: str,
        teacher_layer: str,
        centers: int = 49,
        dim: int = 128,
        heads: int = 4,
        gamma: float = 1.0,
        framing: str = "dlib",
        attention: float = 1.0,
        local: float = 1.0,
        keep: float = 1.0,
        teacher_learns: bool = False,
        seed: int | None = None,
    ):
        super().__init__(student_layer, teacher_layer)
        self.side = math.isqrt(int(positive(centers=centers)))
        if self.side**2 != centers:
            raise ValueError(f"centers is {centers}; they fill a square: use 16, 25, 36, 49, ...")
        if dim % positive(heads=heads):
            raise ValueError(f"dim {dim} cannot be split into {heads} heads")
        if gamma < 0:
            raise ValueError(f"gamma is {gamma}; it cannot be negative")
        self.dim, self.heads, self.gamma, self.seed = int(positive(dim=dim)), heads, gamma, seed or 0
        self.attention, self.local, self.keep = attention, local, positive(keep=keep)
        self.teacher_learns = teacher_learns
        # Not `centers`, under which the optimizer knows tables of classes.
        self.queries = nn.Parameter(Rng.of(self.seed, "URFM centers", range(centers)).normal(dim))
        self.framing = one_of(align.FRAMINGS, framing=framing)
        points = align.template(framing, "arcface5", 1) + 0.5
        self.register_buffer("canonical", points, persistent=False)
        self.of_student: LocalFeatures | None = None
        self.of_teacher: LocalFeatures | None = None
        self.readout: nn.Linear | None = None

    def prepare(self, student: Output, teacher: Output) -> None:
        Fs, Ft = self.maps(student, teacher)
        self.of_student = LocalFeatures(Fs.shape[1], self.dim, self.heads, self.seed, "student")
        self.of_teacher = LocalFeatures(Ft.shape[1], self.dim, self.heads, self.seed, "teacher")
        self.readout = linear(self.dim, teacher.embedding.shape[1], self.seed, "URFM readout")

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        Fs, Ft = (x.to(self.queries.dtype) for x in self.maps(student, teacher))
        if self.of_student is None or self.of_teacher is None or self.readout is None:
            raise ValueError("URFM is not built yet; prepare comes first")
        for who, x, side in (("student", Fs, self.of_student), ("teacher", Ft, self.of_teacher)):
            if x.shape[1] != side.key.in_features:
                raise ValueError(f"the {who}'s features have {x.shape[1]} channels, not {side.key.in_features}")
        fields_s, fields_t = self.fields(Fs, student), self.fields(Ft, teacher)
        local_s, attention_s = self.of_student(Fs, self.queries, fields_s)
        local_t, attention_t = self.of_teacher(Ft.detach(), self.queries, fields_t)
        kept = F.cosine_similarity(self.readout(local_t.mean(1)), teacher.embedding.to(local_t.dtype), eps=1e-12)
        if Ft.requires_grad:
            # Again, as a function of the features alone: they follow the student, the way of looking at them does not.
            weights = {name: p.detach() for name, p in self.of_teacher.named_parameters()}
            arguments = (Ft, self.queries.detach(), fields_t)
            local_t, attention_t = functional_call(self.of_teacher, weights, arguments)
        else:
            local_t, attention_t = local_t.detach(), attention_t.detach()
        looked = mean((attention_s - attention_t).square().sum(3))
        found = mean((F.layer_norm(local_s, (self.dim,)) - F.layer_norm(local_t, (self.dim,))).square())
        return self.attention * looked + self.local * found + self.keep * mean(1 - kept)

    def fields(self, x: Tensor, output: Output) -> Tensor:
        """Buckets ``[L, HW]``, or ``[B, L, HW]`` where faces have landmarks, of a map ``[B, C, H, W]``."""
        marks = self.canonical
        if "landmarks" in output.features:
            given = output.features["landmarks"].to(marks)
            missing = ~given.isfinite().all(2, keepdim=True).all(1, keepdim=True)
            marks = torch.where(missing, marks, given)
        marks = marks * self.side
        places, anchors = (_grid(height, width, marks) for height, width in (x.shape[2:], (self.side, self.side)))
        places, anchors = places * self.side, anchors * self.side
        to_marks = [(points.unsqueeze(1) - marks.unsqueeze(-3)).norm(dim=-1) for points in (anchors, places)]
        facial = (to_marks[0].unsqueeze(-2) - to_marks[1].unsqueeze(-3)).abs().mean(-1)
        return bucket((anchors.unsqueeze(1) - places).norm(dim=-1) + self.gamma * facial)


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """``[H W, 2]``: x and y of the middles of the cells of a unit square."""
    y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (height, width))
    return torch.stack((x.expand(height, width), y.unsqueeze(1).expand(height, width)), -1).flatten(0, 1)


class PromptGuard(Loss):
    """Keep a teacher with prompts near what it says without: mean of 1 - cos of its two embeddings.

    Prompts that only make the teacher easy to imitate would lead both networks to embed all faces alike. No labels.
    For `distill.prompts`, whose teachers give both embeddings as features; its gradient for the student is 0.

    Shape:
        teacher features ``prompted`` and ``unprompted``, ``[B, D]``; returns a scalar in 0..2.

    Raises:
        ValueError: the teacher has no prompts.

    >>> face = torch.randn(2, 8)
    >>> teacher = Output(face, features={"prompted": face, "unprompted": 2 * face})
    >>> PromptGuard()(Output(face), teacher).round(decimals=5).abs()
    tensor(0.)
    """

    needs_features = True
    teacher_features = ("prompted", "unprompted")

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        if not set(self.teacher_features) <= set(teacher.features):
            raise ValueError("PromptGuard is for a teacher with prompts; set prompts")
        now, before = (teacher.features[name].to(student.embedding.dtype) for name in self.teacher_features)
        return mean(1 - F.cosine_similarity(now, before.detach(), eps=1e-12)) + student.embedding.sum() * 0
