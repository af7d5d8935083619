"""What is known of faces before any was seen: neighboring pixels are alike, and two faces are not one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from synth.inversion.base import Inverter


def neighbors(images: Tensor) -> tuple[Tensor, ...]:
    """Differences to the right, below and on both diagonals."""
    return (
        images[:, :, :, :-1] - images[:, :, :, 1:],
        images[:, :, :-1] - images[:, :, 1:],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
        images[:, :, :-1, :-1] - images[:, :, 1:, 1:],
    )


def total_variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation of ``[B, 3, H, W]`` as DeepInversion has it (its code, ``get_image_prior_losses``).

    Returns:
        The sum over four directions of mean absolute differences; and that of the Euclidean norms of all differences
        of the batch, which grows with the root of B.
    """
    differences = neighbors(images)
    norms = torch.stack([torch.linalg.vector_norm(d) for d in differences])
    return torch.stack([d.abs().mean() for d in differences]).sum(), norms.sum()


def energy(images: Tensor) -> Tensor:
    """Mean Euclidean norm of the images."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


def repulsion(embeddings: Tensor, center: Tensor | None = None, margin: float = 0.2) -> Tensor:
    """Mean squared excess of the cosines of different faces above ``margin``: no two should be one person.

    Args:
        embeddings: ``[B, D]`` of any norm.
        center: ``[D]`` to subtract first, where embeddings are not around zero.
    """
    if len(embeddings) < 2:
        return embeddings.new_zeros(())
    e = F.normalize(embeddings if center is None else embeddings - center)
    excess = F.relu(e @ e.T - margin).square()
    others = len(e) * (len(e) - 1)
    return (excess.sum() - excess.diagonal().sum()) / others


class NoiseImages(Inverter):
    """Pictures of noise: no faces, and the least that any other method has to beat.

    Args:
        teacher: gives the size; it is not asked about anything.
        kind: ``pixels``: normal and independent, standard deviation ``contrast``; ``natural``: amplitudes fall as one
            over the frequency, as in photographs (Field, JOSA A 1987), with the same standard deviation.
        contrast: in gray levels.
        face_size: side in pixels; None for the teacher's.
    """

    def __init__(
        self,
        *,
        teacher: str | Recognizer,
        kind: Literal["pixels", "natural"] = "natural",
        contrast: float = 64.0,
        face_size: int | None = None,
    ):
        super().__init__(teacher, face_size)
        if not 0 < contrast <= 255:
            raise InputError(f"contrast is {contrast}; it must be above 0 and at most 255 gray levels")
        self.kind, self.contrast = kind, contrast

    @torch.no_grad()
    def invert(self, n: int, rng: Rng) -> Tensor:
        noise = rng.child("noise").normal(3, self.face_size, self.face_size).to(self.device)
        if self.kind == "natural":
            rows = torch.fft.fftfreq(self.face_size, device=self.device)[:, None]
            columns = torch.fft.rfftfreq(self.face_size, device=self.device)
            frequency = (rows.square() + columns.square()).sqrt()
            # No amplitude at frequency 0: the mean is the same gray everywhere.
            fall = torch.where(frequency > 0, 1 / frequency.clamp(min=1e-6), 0)
            noise = torch.fft.irfft2(torch.fft.rfft2(noise) * fall, s=noise.shape[-2:])
            noise = noise / noise.std((1, 2, 3), keepdim=True)
        return (127.5 + self.contrast * noise).clamp(0, 255)
