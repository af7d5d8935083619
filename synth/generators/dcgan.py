"""DCGAN (Radford, Metz, Chintala, ICLR 2016) at 64 x 64, and the one trained on rendered DigiFace-1M faces."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faceless import assets
from faceless.errors import InputError
from faceless.randomness import Rng
from synth.generators.base import Generator


class DCGAN(Generator):
    """The 64 x 64 DCGAN generator: five transposed convolutions, batch norm and ReLU between, tanh at the end.

    Args:
        weights: a checkpoint holding ``netG_state_dict`` or a bare state dict, or ``"digiface"`` for the asset
            ``gan-face-generate`` (MIT; trained on computer-rendered faces, so no real face stands behind it).
            None draws random weights (He et al., ICCV 2015), for trying things out.
        latent_dim, channels: z dimension and the width of the last hidden layer.
        seed: of random weights.

    Shape:
        latents ``[B, latent_dim]``; faces ``[B, 3, 64, 64]``.
    """

    face_size = 64

    def __init__(
        self, weights: str | Path | None = "digiface", *, latent_dim: int = 100, channels: int = 64, seed: int = 0
    ):
        super().__init__()
        self.latent_shape = (latent_dim,)
        layers: list[nn.Module] = []
        widths = [latent_dim, 8 * channels, 4 * channels, 2 * channels, channels]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())
        self.weights_sha256: str | None = None
        if weights is None:
            self.draw_weights(seed)
        else:
            self.load(weights)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def draw_weights(self, seed: int) -> None:
        """Random convolutions that keep the variance of what passes through; batch norm starts as identity."""
        for i, layer in enumerate(self.main):
            if isinstance(layer, nn.ConvTranspose2d):
                taps = layer.in_channels * (1 if i == 0 else 4)  # inputs that meet in one output pixel
                rows = Rng.of(seed, f"dcgan/{i}", range(layer.in_channels)).normal(*layer.weight.shape[1:])
                layer.weight.copy_(rows * (2 / taps) ** 0.5)

    def load(self, weights: str | Path) -> None:
        if str(weights) == "digiface":
            path = assets.fetch("dcgan-digiface")
            self.licence = assets.ASSETS["dcgan-digiface"].licence
        else:
            path = Path(weights)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such generator weights") from error
        except Exception as error:  # torch raises many types for a damaged or hostile file
            raise InputError(f"{path}: not readable as plain weights ({type(error).__name__})") from error
        if isinstance(state, dict):
            state = state.get("netG_state_dict", state)
        try:
            self.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: does not hold this DCGAN: {str(error).splitlines()[-1].strip()}") from error
        self.weights_sha256 = assets.sha256(path)

    def synthesize(self, latents: Tensor) -> Tensor:
        x = latents[:, :, None, None]
        layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        for layer in self.main:
            # On a CPU the same numbers come a fifth faster with channels last, which transposed convolutions forget.
            x = layer(x).contiguous(memory_format=layout)
        return x * 127.5 + 127.5

    def provenance(self) -> dict[str, Any]:
        return super().provenance() | {"weights_sha256": self.weights_sha256}
