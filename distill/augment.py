"""Augmentations of a batch of faces, drawn per sample and applied on the device the batch is on.

By default teacher and student see the same augmented face: the target of a changed face is what the teacher says about
it ("function matching", Beyer et al., CVPR 2022). Every number drawn depends only on the sample (see
`faceless.randomness`), so a view can be drawn again later, on any batch split, which is what lets teacher embeddings be
cached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import warp_affine
from torch import Tensor

from faceless import degrade
from faceless.devices import moved
from faceless.errors import InputError
from faceless.randomness import Rng

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass
class Augment:
    """How strongly faces are changed; a probability or a strength of 0 switches a change off.

    Args:
        size: side of the augmented faces in pixels; None keeps that of the source.
        flip: probability of a horizontal mirror.
        rotate: largest rotation in degrees.
        scale: largest change of size, as a natural logarithm (0.1 is about 10 %).
        shift: largest shift along each axis, as a fraction of the side.
        gray: probability of losing all color.
        brightness: largest change of brightness, in units of 0..255.
        contrast: largest change of contrast, as a natural logarithm.
        light: largest slope of a lamp to one side: how much brighter the near edge and darker the far edge get, as a
            fraction.
        erase: probability of covering a rectangle of a tenth to a third of the side with one gray.
        blur, blur_sigma: probability, and the largest Gaussian sigma in pixels of a 64-pixel face.
        noise, noise_sigma: probability, and the standard deviation in units of 0..255.
        resample: probability of shrinking to half or to a third of the side and back.
    """

    size: int | None = None
    flip: float = 0.5
    rotate: float = 8.0
    scale: float = 0.08
    shift: float = 0.03
    gray: float = 0.3
    brightness: float = 30.0
    contrast: float = 0.4
    light: float = 0.0
    erase: float = 0.0
    blur: float = 0.1
    blur_sigma: float = 1.0
    noise: float = 0.1
    noise_sigma: float = 8.0
    resample: float = 0.1

    def __post_init__(self) -> None:
        for name in ("flip", "gray", "erase", "blur", "noise", "resample"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"augment.{name} is {getattr(self, name)}; a probability lies in 0..1")
        for name in ("rotate", "scale", "shift", "brightness", "contrast", "light", "blur_sigma", "noise_sigma"):
            if getattr(self, name) < 0.0:
                raise InputError(f"augment.{name} is {getattr(self, name)}; it cannot be negative")
        if self.size is not None and self.size < 8:
            raise InputError(f"augment.size is {self.size}; use 8 pixels or more")

    def __call__(self, images: Tensor, rng: Rng) -> Tensor:
        """``[B, 3, H, W]`` uint8 or float in 0..255 to float ``[B, 3, size, size]`` in 0..255.

        Raises:
            ValueError: ``rng`` is not for exactly these B samples.
        """
        if len(rng) != len(images):
            raise ValueError(f"random numbers for {len(rng)} samples, {len(images)} images")
        faces = self.geometry(images.float(), rng.child("geometry"))
        faces = self.color(faces, rng.child("color"))
        if self.light or self.erase:
            faces = self.scene(faces, rng.child("scene"))
        faces = self.degrade(faces, rng.child("degrade"))
        return faces.clamp(0.0, 255.0)

    def geometry(self, faces: Tensor, rng: Rng) -> Tensor:
        """Mirror, rotate, scale, shift and resize in one interpolation; pixels from outside repeat the border."""
        height, width = faces.shape[-2:]
        size = self.size or height
        mirror, angle, zoom, offset = self._pose(rng)
        offset = offset * size
        if size < height:
            # Low-pass before the warp samples sparsely.
            faces = F.interpolate(faces, (size, size), mode="bilinear", align_corners=False, antialias=True)
            height = width = size
        cos, sin = zoom * torch.cos(angle) * size / width, zoom * torch.sin(angle) * size / height
        linear = torch.stack((torch.stack((mirror * cos, -sin), 1), torch.stack((mirror * sin, cos), 1)), 1)
        center = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        move = torch.full((1, 2), (size - 1) / 2) + offset - linear @ center
        matrix = moved(torch.cat((linear, move.unsqueeze(-1)), -1), faces.device)
        return warp_affine(faces, matrix, (size, size), padding_mode="border", align_corners=True)

    def points(self, points: Tensor, rng: Rng) -> Tensor:
        """Where ``points [B, P, 2]`` of square faces come to lie when the faces are augmented with the same ``rng``.

        Both are x and y in sides of the image, from its upper left corner.
        """
        mirror, angle, zoom, offset = (value[:, None].to(points) for value in self._pose(rng.child("geometry")))
        x, y = (points - 0.5).unbind(-1)
        cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
        return torch.stack((mirror * cos * x - sin * y, mirror * sin * x + cos * y), -1) + 0.5 + offset

    def _pose(self, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mirror (1 or -1), angle and zoom ``[B]``, and shift ``[B, 2]`` in sides of the image."""
        draws = rng.uniform(5)
        mirror = torch.where(draws[:, 0] < self.flip, -1.0, 1.0)
        angle = (draws[:, 1] * 2 - 1) * math.radians(self.rotate)
        zoom = torch.exp((draws[:, 2] * 2 - 1) * self.scale)
        return mirror, angle, zoom, (draws[:, 3:5] * 2 - 1) * self.shift

    def color(self, faces: Tensor, rng: Rng) -> Tensor:
        """Contrast about each face's mean, brightness, and gray, as one 3x3 matrix and offset per face."""
        draws = rng.uniform(3)
        contrast = torch.exp((draws[:, 0] * 2 - 1) * self.contrast)[:, None, None]
        brightness = ((draws[:, 1] * 2 - 1) * self.brightness)[:, None, None]
        mix = torch.where((draws[:, 2] < self.gray)[:, None, None], torch.tensor([LUMA] * 3), torch.eye(3))
        matrix, lost, added = (moved(x, faces.device) for x in (mix * contrast, 1 - contrast, brightness))
        offset = faces.mean((1, 2, 3))[:, None, None] * lost + added
        out = torch.baddbmm(offset, matrix, faces.flatten(2))
        return out.view_as(faces)

    def scene(self, faces: Tensor, rng: Rng) -> Tensor:
        """Light from a side, and something in front of the face."""
        draws, (height, width) = moved(rng.uniform(8), faces.device), faces.shape[-2:]
        y = torch.linspace(-1, 1, height, device=faces.device)[:, None]
        x = torch.linspace(-1, 1, width, device=faces.device)
        angle, slope = draws[:, 0, None, None] * (2 * math.pi), draws[:, 1, None, None] * self.light
        faces = faces * (1 + slope * (torch.cos(angle) * x + torch.sin(angle) * y)).unsqueeze(1)
        half = (0.1 + draws[:, 2:4] * 0.25)[..., None, None]
        middle = (draws[:, 4:6] * 2 - 1)[..., None, None]
        inside = ((x - middle[:, 0]).abs() < half[:, 0]) & ((y - middle[:, 1]).abs() < half[:, 1])
        inside &= (draws[:, 6] < self.erase)[:, None, None]
        return torch.where(inside.unsqueeze(1), draws[:, 7, None, None, None] * 255.0, faces)

    def degrade(self, faces: Tensor, rng: Rng) -> Tensor:
        """Blur, noise and loss of resolution, each on the faces that drew it."""
        draws, side = rng.uniform(5), faces.shape[-1]
        # The draws live on the CPU, so that choosing rows does not wait for the device.
        blurred = (draws[:, 0] < self.blur).nonzero().squeeze(1)
        if len(blurred) and self.blur_sigma:
            sigma = (0.3 + 0.7 * draws[blurred, 1:2].expand(-1, 2)) * self.blur_sigma * side / 64
            kernel = 2 * math.ceil(2 * self.blur_sigma * side / 64) + 1
            rows = moved(blurred, faces.device)
            faces = faces.index_copy(0, rows, gaussian_blur2d(faces[rows], (kernel, kernel), sigma))
        for times in (2, 3):
            low = self.resample / 2 * (times - 2)
            shrunk = ((draws[:, 2] >= low) & (draws[:, 2] < low + self.resample / 2)).nonzero().squeeze(1)
            if len(shrunk):
                rows = moved(shrunk, faces.device)
                small = F.interpolate(faces[rows], (side // times,) * 2, mode="bilinear", antialias=True)
                back = F.interpolate(small, (side, side), mode="bilinear")
                faces = faces.index_copy(0, rows, back)
        noisy = (draws[:, 3] < self.noise).nonzero().squeeze(1)
        if len(noisy) and self.noise_sigma:
            # Drawn on the device: on the host, the numbers for all these pixels would take longer than the step.
            grain = rng.child("noise").rows(noisy).to(faces.device).normal(1, side, side) * self.noise_sigma
            faces = faces.index_add(0, moved(noisy, faces.device), grain.expand(-1, 3, -1, -1))
        return faces


WIDEST = 4.0  # pixels of blur: its kernel must not be wider than a face


@dataclass
class Degrade:
    """What only the student's copy of an augmented face suffers: the teacher, which does not see it, says what was
    there. For students that will meet small, masked or covered faces.

    Args:
        resolutions: sides in pixels of the whole face; each face is shrunk to one of them, drawn at random, and
            enlarged again. A side not below that of the face leaves it alone; no sides leave all alone.
        schedule: ``all`` draws from all resolutions at any time; ``descending`` from the largest only at the start of
            the run, and admits the next ones at equal intervals.
        method, blur: see `faceless.degrade.low_resolution`.
        mask: probability of a mask over mouth and nose.
        occlude: probability of something in front of the face.
    """

    resolutions: list[int] = field(default_factory=list)
    schedule: Literal["all", "descending"] = "all"
    method: Literal["antialias", "nearest"] = "antialias"
    blur: float = 0.0
    mask: float = 0.0
    occlude: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mask", "occlude"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"degrade.{name} is {getattr(self, name)}; a probability lies in 0..1")
        if not 0.0 <= self.blur <= WIDEST:
            raise InputError(f"degrade.blur is {self.blur}; use 0 to {WIDEST:g} pixels")
        if any(side < 4 for side in self.resolutions):
            raise InputError(f"degrade.resolutions are {self.resolutions}; use 4 pixels or more")
        if not self.resolutions and (self.blur or self.method != "antialias" or self.schedule != "all"):
            raise InputError("degrade: method, blur and schedule are of resolutions; name some")

    def __call__(self, faces: Tensor, framing: str, rng: Rng, done: float = 1.0) -> Tensor:
        """The student's copy of ``faces [B, 3, H, W]``, float in 0..255; the same shape.

        Args:
            framing: of the faces, for where a mask goes.
            rng: for these B faces.
            done: share of the run that is behind, for ``descending``.
        """
        draws = rng.uniform(3)
        for column, share, cover in ((0, self.mask, degrade.mask), (1, self.occlude, degrade.occlude)):
            # The draws live on the CPU, so that choosing rows does not wait for the device.
            covered = (draws[:, column] < share).nonzero().squeeze(1)
            if len(covered):
                rows = moved(covered, faces.device)
                numbers = rng.child(cover.__name__).rows(covered)
                faces = faces.index_copy(0, rows, cover(faces[rows], framing, numbers))
        sides = sorted(self.resolutions, reverse=True)
        if self.schedule == "descending":
            sides = sides[: 1 + int(done * len(sides))]
        drawn = (draws[:, 2] * len(sides)).long()
        for number, side in enumerate(sides):
            small = (drawn == number).nonzero().squeeze(1)
            if len(small) and side < faces.shape[-1]:
                rows = moved(small, faces.device)
                shrunk = degrade.low_resolution(faces[rows], side, method=self.method, blur=self.blur)
                faces = faces.index_copy(0, rows, shrunk)
        return faces.clamp(0.0, 255.0)
