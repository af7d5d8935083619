"""Embeddings as distributions on the sphere: the direction is the face, the norm says how sure the network is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import FaceLoss, one_of, positive, same_dim
from faceless.recognizer import Output

LEAST = 1e-4  # of a norm, so that its logarithm stays finite


def log_normalizer(k: Tensor, dim: int) -> Tensor:
    """Logarithm of the von Mises-Fisher normalizer C(k) in ``dim`` dimensions, without its constant.

    ln C(k) = u ln k - ln I_u(k) - (dim / 2) ln 2 pi with u = dim / 2 - 1. The Bessel function is its uniform asymptotic
    expansion with the first correction (DLMF 10.41.3): at 16 dimensions it is off by less than 1e-3, at 128 by 1e-6.

    Args:
        k: positive, any shape.
        dim: 3 or more.
    """
    u = dim / 2 - 1
    q = (u * u + k.square()).sqrt()
    p = u / q
    bessel = q + u * (k / (u + q)).log() - 0.5 * (2 * math.pi * q).log() + torch.log1p((3 * p - 5 * p**3) / (24 * u))
    return u * k.log() - bessel


def resultant_length(k: Tensor, dim: int) -> Tensor:
    """A(k) = I_(u+1)(k) / I_u(k): how long the mean of draws is; minus the derivative of `log_normalizer`."""
    u = dim / 2 - 1
    q = (u * u + k.square()).sqrt()
    p = u / q
    correction = (3 - 15 * p.square()) / 24 * (-k * p / q.square()) / u / (1 + (3 * p - 5 * p**3) / (24 * u))
    return k / (q + u) - 0.5 * k / q.square() + correction


class VonMisesFisher(FaceLoss):
    """Match a teacher's distribution on the sphere: its direction, and how concentrated it is.

    Both embeddings are natural parameters: direction mu and concentration k = ``concentration`` times the norm. The
    student's norm thus becomes its own quality score of a face, at no cost, while cosines are what they were. With an
    ensemble's von Mises-Fisher fusion the teacher is less concentrated where its members disagree; a single teacher's
    (centered) norm serves too. The teacher must see the faces as bad as the student sees them (``teacher_sees: view``).

    After probabilistic ensemble distillation (BEA-KD, CVPR 2023), whose code is not public: the divergence of two von
    Mises-Fisher distributions is a fact; that the student's concentration is its norm, and the ``log`` form with its
    ``beta``, are chosen here.

    Args:
        form: ``"log"``: mean of 1 - cos + beta (ln k_S - ln k_T)^2, which does not depend on ``concentration``.
            ``"kl"``: mean of KL(T || S) = ln C(k_T) - ln C(k_S) + A(k_T) (k_T - k_S cos).
        beta: see above.
        concentration: of an embedding of norm 1, for ``"kl"``.

    Shape:
        both embeddings ``[B, D]``, with ``"kl"`` D of 3 or more; returns a scalar. A face of which the teacher says 0
        adds nothing.

    Raises:
        ValueError: an argument is out of range, or the two D differ.

    >>> face = Output(torch.randn(4, 16))
    >>> VonMisesFisher(form="kl")(face, face).round(decimals=4).abs()
    tensor(0.)
    """

    def __init__(self, *, form: str = "log", beta: float = 0.1, concentration: float = 128.0):
        super().__init__()
        self.form = one_of(("log", "kl"), form=form)
        self.beta = positive(beta=beta)
        self.concentration = positive(concentration=concentration)

    def each(self, student: Output, teacher: Output) -> Tensor:
        S, T = same_dim(student, teacher)
        dim = S.shape[1]
        if self.form == "kl" and dim < 3:
            raise ValueError(f"form 'kl' needs embeddings of 3 numbers or more, not {dim}")
        # The root has no gradient at 0.
        k_s = (S.square().sum(1) + LEAST**2).sqrt()
        known = T.norm(dim=1) > 0
        k_t = T.norm(dim=1).clamp(min=LEAST)
        cosine = (F.normalize(S) * F.normalize(T)).sum(1)
        if self.form == "log":
            terms = 1 - cosine + self.beta * (k_s.log() - k_t.log()).square()
        else:
            k_s, k_t = self.concentration * k_s, self.concentration * k_t
            terms = log_normalizer(k_t, dim) - log_normalizer(k_s, dim)
            terms = terms + resultant_length(k_t, dim) * (k_t - k_s * cosine)
        return torch.where(known, terms, 0)
