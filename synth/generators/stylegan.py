"""StyleGAN2 and StyleGAN3 as generators of faces: latents, truncation, mixing, noise, and the crop to a recognizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from faceless import align
from faceless.errors import InputError
from faceless.randomness import Rng
from synth.generators import stylegan_files
from synth.generators.base import Generator
from synth.generators.stylegan_networks import StyleGANNetwork

# Mean landmarks of FFHQ's 512 x 512 faces: eye centers, nose tip, mouth corners (xinntao/facexlib).
_FFHQ = ((192.98, 239.95), (318.90, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15))
SYNTHDISTILL_SIDE = 112


class StyleGAN(Generator):
    """StyleGAN2 or StyleGAN3 (T or R), read without executing anything.

    A latent is a flat vector of up to three parts, so that the face depends on the latent alone:

    - ``z``, or one ``w`` for all layers, or (``w+``) one ``w`` per layer, row after row;
    - for a conditional network in ``z``, its class, one-hot;
    - with ``noise: random``, one number that the noise of the face is drawn from.

    Args:
        weights: NVIDIA's ``.pkl``, rosinality's ``.pt``, or a folder from ``synth/convert.py``.
        space: what latents are, and so what `perturb` moves: SynthDistill's are ``w``.
        truncation: psi, towards the mean face; 1 for none, smaller for more alike and cleaner faces. Latents in ``w``
            and ``w+`` are drawn truncated.
        cutoff: truncate only so many of the first rows; needs ``z`` or ``w+``.
        mixing: part of the faces whose later rows, from a random one on, belong to a second draw; needs ``w+``.
        noise: of StyleGAN2's layers: ``const`` is the network's own, ``random`` is the face's, ``none`` is none.
            StyleGAN3 has none.
        label: class of a conditional network; None draws one for each face.
        crop: cut whole FFHQ-framed faces to a recognizer's framing, by a fixed box: ``arcface`` or ``dlib`` from FFHQ's
            mean landmarks, or ``synthdistill`` for that paper's box. None keeps them whole, for cropping by landmarks.
        crop_size: side of the crop; 112 when None.
        licence: of the weights, when the folder does not say it.

    Shape:
        latents ``[B, n]``; faces ``[B, 3, face_size, face_size]``.

    Raises:
        InputError: weights that are damaged, hostile or of another network, or settings that contradict each other.
    """

    network: StyleGANNetwork
    grid: Tensor

    def __init__(
        self,
        weights: str | Path,
        *,
        space: Literal["z", "w", "w+"] = "w",
        truncation: float = 1.0,
        cutoff: int | None = None,
        mixing: float = 0.0,
        noise: Literal["const", "random", "none"] = "const",
        label: int | None = None,
        crop: Literal["arcface", "dlib", "synthdistill"] | None = None,
        crop_size: int | None = None,
        licence: str | None = None,
    ):
        super().__init__()
        loaded = stylegan_files.load(weights)
        self.network = loaded.network
        self.weights_sha256, self.source = loaded.sha256, loaded.source
        self.licence = licence or loaded.licence
        mapping, synthesis = self.network.config.mapping, self.network.synthesis
        self.z_dim, self.c_dim, self.w_dim, self.rows = mapping.z_dim, mapping.c_dim, mapping.w_dim, synthesis.num_ws
        if space == "w" and cutoff is not None:
            raise InputError("cutoff truncates some rows of w only; it needs space z or w+")
        if space != "w+" and mixing:
            raise InputError("mixing gives the rows of w two origins; it needs space w+")
        if cutoff is not None and not 0 <= cutoff <= self.rows:
            raise InputError(f"cutoff is {cutoff}; this network has {self.rows} rows of w")
        if not 0 <= mixing <= 1:
            raise InputError(f"mixing is {mixing}; it is a part, from 0 to 1")
        if noise != "const" and not synthesis.noise_sizes:
            raise InputError(f"noise is {noise}, but StyleGAN3 has no noise; leave it out")
        if label is not None and not 0 <= label < self.c_dim:
            raise InputError(f"label is {label}; this network has {self.c_dim or 'no'} classes")
        self.space, self.truncation, self.cutoff, self.mixing = space, truncation, cutoff, mixing
        self.noise, self.label = noise, label
        code = {"z": self.z_dim + self.c_dim, "w": self.w_dim, "w+": self.rows * self.w_dim}[space]
        self.latent_shape = (code + (noise == "random"),)
        self.continuous = noise != "random" and not (space == "z" and self.c_dim)
        self.crop, self.face_size = crop, synthesis.size
        if crop is None:
            if crop_size is not None:
                raise InputError(f"crop_size is {crop_size}, but crop is none; say which crop")
        elif crop == "synthdistill":
            if crop_size not in (None, SYNTHDISTILL_SIDE):
                raise InputError(f"crop_size is {crop_size}; SynthDistill's box is {SYNTHDISTILL_SIDE} pixels wide")
            self.face_size = SYNTHDISTILL_SIDE
        else:
            self.face_size = 112 if crop_size is None else crop_size
            if not 16 <= self.face_size <= 2048:
                raise InputError(f"crop_size is {crop_size}; it must be from 16 to 2048")
            grid, self.halvings = template_grid(synthesis.size, crop, self.face_size)
            self.register_buffer("grid", grid, persistent=False)

    @torch.no_grad()
    def sample_latents(self, n: int, rng: Rng) -> Tensor:
        """``[n, *latent_shape]`` on the device of the network."""
        if len(rng) != n:
            raise ValueError(f"{n} latents from random numbers for {len(rng)} samples")
        z, c = rng.normal(self.z_dim).to(self.device), self._classes(rng)
        if self.space == "z":
            parts = [z] if c is None else [z, c]
        else:
            w = self.network.mapping(z, c)
            if self.space == "w":
                parts = [self.network.mapping.truncate(w, self.truncation)]
            else:
                parts = [self._truncated(self._mixed(w, c, rng)).flatten(1)]
        return torch.cat((*parts, *self._noise_number(rng)), 1)

    def _classes(self, rng: Rng) -> Tensor | None:
        """One-hot ``[n, c_dim]``, None for a network without classes."""
        if not self.c_dim:
            return None
        drawn = rng.child("label").integers(self.c_dim)
        labels = drawn if self.label is None else torch.full_like(drawn, self.label)
        return F.one_hot(labels, self.c_dim).float().to(self.device)

    def _mixed(self, w: Tensor, c: Tensor | None, rng: Rng) -> Tensor:
        """Rows ``[n, rows, w_dim]``, of some faces the later ones from a second draw (Karras et al., CVPR 2019)."""
        ws = w.unsqueeze(1).expand(-1, self.rows, -1)
        if not self.mixing:
            return ws
        second = self.network.mapping(rng.child("second").normal(self.z_dim).to(w), c).unsqueeze(1)
        first_rows = rng.child("mixing").integers(self.rows - 1) + 1
        mixed = rng.child("mixed").uniform() < self.mixing
        first_rows = torch.where(mixed, first_rows, self.rows).to(w.device)
        own = torch.arange(self.rows, device=w.device) < first_rows.unsqueeze(1)
        return torch.where(own.unsqueeze(2), ws, second)

    def _truncated(self, ws: Tensor) -> Tensor:
        if self.truncation == 1:
            return ws
        short: Tensor = self.network.mapping.truncate(ws, self.truncation)
        return short if self.cutoff is None else torch.cat((short[:, : self.cutoff], ws[:, self.cutoff :]), 1)

    def _noise_number(self, rng: Rng) -> list[Tensor]:
        return [rng.child("noise").uniform(1).to(self.device)] if self.noise == "random" else []

    def styles(self, latents: Tensor) -> Tensor:
        """The ``w`` of every layer, ``[B, rows, w_dim]``, that latents ``[B, n]`` stand for."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents are [B, {self.latent_shape[0]}], these are {list(latents.shape)}")
        if self.space == "w+":
            return latents[:, : self.rows * self.w_dim].unflatten(1, (self.rows, self.w_dim))
        if self.space == "w":
            return latents[:, None, : self.w_dim].expand(-1, self.rows, -1)
        classes = latents[:, self.z_dim : self.z_dim + self.c_dim] if self.c_dim else None
        w = self.network.mapping(latents[:, : self.z_dim], classes)
        return self._truncated(w.unsqueeze(1).expand(-1, self.rows, -1))

    def synthesize(self, latents: Tensor) -> Tensor:
        noise: Any = self._noise_fields(latents[:, -1]) if self.noise == "random" else self.noise
        images = self.network.synthesis(self.styles(latents), noise)
        return self.cropped((images * 127.5 + 127.5).clamp(0, 255))

    @torch.no_grad()
    def _noise_fields(self, numbers: Tensor) -> list[Tensor]:
        """``[B, 1, side, side]`` of every layer, from the numbers ``[B]`` in the latents."""
        # The bits of the number, which any rounding of it to half precision leaves to be the face's own.
        indices = numbers.detach().float().contiguous().view(torch.int32).long()
        sides = self.network.synthesis.noise_sizes
        return [Rng.of(0, f"stylegan noise {i}", indices).normal(1, side, side) for i, side in enumerate(sides)]

    def cropped(self, images: Tensor) -> Tensor:
        """Whole faces ``[B, 3, H, W]`` cut to the box of ``crop``."""
        if self.crop is None:
            return images
        if self.crop == "synthdistill":
            top, bottom, left, right = synthdistill_box(images.shape[-1])
            box = images[:, :, top:bottom, left:right]
            return F.interpolate(box, (self.face_size, self.face_size), mode="bilinear", align_corners=False)
        for _ in range(self.halvings):
            images = F.avg_pool2d(images, 2)
        grid = self.grid.expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def make(self, rng: Rng, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        latents, faces = super().make(rng, dtype)
        return latents.cpu(), faces

    def perturb(self, latents: Tensor, scale: Tensor, rng: Rng) -> Tensor:
        """Gaussian steps of standard deviation ``scale [B]`` in the units of z or w; one step for all rows of w.

        Classes stay; random noise is drawn anew.
        """
        width = self.z_dim if self.space == "z" else self.w_dim
        step = scale.to(latents).view(-1, 1) * rng.normal(width).to(latents)
        if self.space == "w+":
            step = step.repeat(1, self.rows)
        rest = latents[:, step.shape[1] :]
        if self.noise == "random":
            rest = torch.cat((rest[:, :-1], rng.child("noise").uniform(1).to(latents)), 1)
        return torch.cat((latents[:, : step.shape[1]] + step, rest), 1)

    def provenance(self) -> dict[str, Any]:
        told = {"weights_sha256": self.weights_sha256, "converted_from": self.source, "space": self.space}
        return super().provenance() | told


def synthdistill_box(side: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the box that SynthDistill cuts from FFHQ-framed faces (otroshi/synthdistill).

    The eyes are taken to lie at (380, 480) and (650, 480) of 1024 pixels, and are put where ArcFace's template has
    them; with that repository's rounding.

    >>> synthdistill_box(1024)
    (84, 942, 86, 944)
    """
    right_eye, left_eye, row = int(380 / 1024 * side), int(650 / 1024 * side), int(480 / 1024 * side)
    pixels = (left_eye - right_eye) / (73.5318 - 38.2946)
    top, left = row - 51.6 * pixels, right_eye - 38.2946 * pixels
    return int(top), int(top + 112 * pixels), int(left), int(left + 112 * pixels)


def template_grid(side: int, framing: str, size: int) -> tuple[Tensor, int]:
    """How to cut FFHQ's mean face to a framing.

    Args:
        side: of the generator's faces.
        framing: ``arcface`` or ``dlib`` (see `faceless.align`).
        size: side of the crop.

    Returns:
        A sampling grid ``[1, size, size, 2]`` for `torch.nn.functional.grid_sample`, and how often the face is halved
        before: as long as it would shrink by more than 1.5.
    """
    points = (torch.tensor(_FFHQ) + 0.5) * (side / 512) - 0.5
    matrix = align.crop_to_image(points[None], framing, size, scheme="arcface5")[0]
    shrink = float(torch.linalg.det(matrix[:, :2])) ** 0.5
    halvings = max(0, math.ceil(math.log2(shrink / 1.5)))
    pixels = torch.arange(size, dtype=torch.float32)
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    located = torch.stack((x, y), 2) @ matrix[:, :2].T + matrix[:, 2]
    return ((located + 0.5) * (2 / side) - 1).unsqueeze(0), halvings
