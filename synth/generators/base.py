"""The seam between whatever makes faces and whoever uses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from faceless.randomness import Rng


class FaceMaker(nn.Module, ABC):
    """Whatever a corpus can be written from: a `Generator`, or a teacher turned around (`synth.inversion`).

    Attributes:
        latent_shape: shape of one latent; ``()`` where there are none.
        face_size: height and width of the faces in pixels.
        licence: of the weights, shown and recorded.
        identities: how many different people its faces show on purpose; 0 where it knows of none.
        packages: what its faces depend on besides torch; their versions are recorded.
    """

    latent_shape: tuple[int, ...] = ()
    face_size: int
    licence: str = "unknown"
    identities: int = 0
    packages: tuple[str, ...] = ()

    @abstractmethod
    def make(self, rng: Rng, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor]:
        """Latents rounded to ``dtype`` (None where there are none) and faces of the samples of ``rng``.

        Returns:
            ``[n, *latent_shape]`` on the CPU, and ``[n, 3, face_size, face_size]`` RGB float in 0..255.
        """

    def provenance(self) -> dict[str, Any]:
        """What a record of the faces needs: generator, weights' sha256, licence."""
        return {"generator": type(self).__name__, "licence": self.licence}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Generator(FaceMaker):
    """Latents to unlabeled faces. Pure in its inputs: the same latents give the same faces on any batch split.

    Attributes:
        continuous: whether a point between two latents is a latent; not where one holds the number of a class or seed.
    """

    continuous: bool = True

    def sample_latents(self, n: int, rng: Rng) -> Tensor:
        """``[n, *latent_shape]``, standard normal unless a generator says otherwise; ``len(rng) == n``."""
        if len(rng) != n:
            raise ValueError(f"{n} latents from random numbers for {len(rng)} samples")
        return rng.normal(*self.latent_shape)

    @abstractmethod
    def synthesize(self, latents: Tensor) -> Tensor:
        """``[B, *latent_shape]`` to ``[B, 3, face_size, face_size]`` RGB float in 0..255; differentiable."""

    def perturb(self, latents: Tensor, scale: Tensor, rng: Rng) -> Tensor:
        """Gaussian steps of standard deviation ``scale [B]`` around ``latents`` (SynthDistill, arXiv 2308.14852)."""
        noise = rng.normal(*self.latent_shape).to(latents)
        return latents + scale.to(latents).view(-1, *[1] * len(self.latent_shape)) * noise

    def identity(self, latents: Tensor) -> Tensor | None:
        """``[B]`` int64 in 0..identities-1, whom the faces of these latents show; None without identities."""
        return None

    def make(self, rng: Rng, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        latents = self.sample_latents(len(rng), rng).to(dtype)
        return latents, self.synthesize(latents.float().to(self.device))
