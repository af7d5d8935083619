"""What an inverted face should be to its teacher: a direction in embedding space, or a class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.inversion.base import answers


class Targets(ABC):
    """Draws a target for each face, and says how far what the teacher sees is from it."""

    def check(self, teacher: Recognizer, name: str) -> None:  # noqa: B027
        """Refuse a teacher that these targets do not fit."""

    @abstractmethod
    def sample(self, rng: Rng, teacher: Recognizer) -> Tensor:
        """Targets of the samples of ``rng``, ``[n, ...]`` on the CPU."""

    def loss(self, seen: Output, targets: Tensor) -> Tensor:
        """Scalar; here the mean of ``1 - cos`` between embeddings and targets ``[n, D]``."""
        return (1 - F.cosine_similarity(seen.embedding, targets)).mean()


class Sphere(Targets):
    """Directions uniform on the unit sphere. A teacher's embeddings of faces fill less of it: see `Moments`."""

    def sample(self, rng: Rng, teacher: Recognizer) -> Tensor:
        return F.normalize(rng.child("target").normal(teacher.embedding_dim))


class Moments(Targets):
    """Embeddings with the mean and variance of those the teacher had in training, which its last layer remembers.

    For a network that ends in a batch normalization of the embedding, as IResNets do: its bias is the mean and its
    weight the standard deviation of the embedding over the training faces.

    Args:
        norm: weight of the squared difference of norms, beside ``1 - cos``.
    """

    def __init__(self, *, norm: float = 0.0):
        self.norm = norm

    def check(self, teacher: Recognizer, name: str) -> None:
        if head(teacher) is None:
            raise InputError(
                f"teacher {name}: does not end in a batch normalization of its embedding, whose moments targets could "
                "have; use synth.inversion.targets.Sphere or VonMisesFisher"
            )

    def sample(self, rng: Rng, teacher: Recognizer) -> Tensor:
        last = head(teacher)
        assert last is not None
        mean, deviation = last.bias.cpu(), last.weight.abs().cpu()
        return mean + deviation * rng.child("target").normal(teacher.embedding_dim)

    def loss(self, seen: Output, targets: Tensor) -> Tensor:
        loss = super().loss(seen, targets)
        if self.norm:
            loss = loss + self.norm * (seen.embedding.norm(dim=1) - targets.norm(dim=1)).square().mean()
        return loss


class VonMisesFisher(Targets):
    """Clusters: directions around anchors, as the faces of one person lie around their mean.

    Anchors are uniform on the sphere; around each, von Mises-Fisher. Sample i has anchor i modulo ``anchors``.

    Args:
        anchors: how many.
        mean_cosine: expected cosine of a target with its anchor, R; kappa follows from R and D (Banerjee et al., JMLR
            2005, equation 4.4).
        seed: of the anchors.
    """

    def __init__(self, *, anchors: int = 1000, mean_cosine: float = 0.7, seed: int = 0):
        if anchors < 1 or not 0 < mean_cosine < 1:
            raise InputError("anchors must be at least 1, and mean_cosine between 0 and 1")
        self.anchors, self.mean_cosine, self.seed = anchors, mean_cosine, seed

    def concentration(self, dim: int) -> float:
        """Kappa.

        >>> [round(VonMisesFisher(mean_cosine=r).concentration(512)) for r in (0.3, 0.5, 0.7)]
        [169, 341, 702]
        """
        R = self.mean_cosine
        return R * (dim - R**2) / (1 - R**2)

    def sample(self, rng: Rng, teacher: Recognizer) -> Tensor:
        dim = teacher.embedding_dim
        which = rng.indices % self.anchors
        anchors = F.normalize(Rng.of(self.seed, "anchors", which).normal(dim))
        return von_mises_fisher(anchors, self.concentration(dim), rng.child("target"))


class Classes(Targets):
    """Classes of a teacher with logits, each as often as the others; the loss is cross-entropy."""

    def check(self, teacher: Recognizer, name: str) -> None:
        if answers(teacher).logits is None:
            raise InputError(f"teacher {name}: has no logits; use other targets of synth.inversion.targets")

    def sample(self, rng: Rng, teacher: Recognizer) -> Tensor:
        return rng.indices

    def loss(self, seen: Output, targets: Tensor) -> Tensor:
        assert seen.logits is not None
        return F.cross_entropy(seen.logits, targets % seen.logits.shape[1])


def head(teacher: Recognizer) -> nn.BatchNorm1d | None:
    """The batch normalization that the embedding leaves the network through."""
    last = [module for module in teacher.backbone.modules() if not any(module.children())][-1]
    fits = isinstance(last, nn.BatchNorm1d) and last.num_features == teacher.embedding_dim and last.affine
    return last if fits else None  # type: ignore[return-value]


def center(teacher: Recognizer) -> Tensor:
    """``[D]``: the mean embedding, where the network knows it, else zero."""
    last = head(teacher)
    return torch.zeros(teacher.embedding_dim, device=teacher.scale.device) if last is None else last.bias.detach()


def von_mises_fisher(means: Tensor, kappa: float, rng: Rng) -> Tensor:
    """``[n, D]`` unit vectors around unit ``means [n, D]``, of density proportional to ``exp(kappa cos)``; D from 2.

    The angle to the mean has the density ``exp(kappa cos a) sin(a)^(D-2)`` (Mardia and Jupp: Directional statistics,
    2000, section 9.3), whose distribution function is tabulated and inverted; the direction across is uniform.
    """
    dim = means.shape[1]
    angle = torch.linspace(0, math.pi, (1 << 16) + 1, dtype=torch.float64)
    middle = (angle[1:] + angle[:-1]) / 2
    density = kappa * middle.cos() + (dim - 2) * middle.sin().log()
    below = torch.cat([angle.new_zeros(1), (density - density.max()).exp().cumsum(0)])
    wanted = rng.child("angle").uniform()[:, None].double() * below[-1]
    cell = torch.searchsorted(below, wanted, right=True).clamp(1, len(middle)) - 1
    inside = (wanted - below[cell]) / (below[cell + 1] - below[cell])
    turned = ((cell + inside) * (math.pi / len(middle))).to(means.dtype)
    across = rng.child("across").normal(dim)
    across = F.normalize(across - (across * means).sum(1, keepdim=True) * means)
    return turned.cos() * means + turned.sin() * across
