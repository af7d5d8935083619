"""Worse pictures of aligned faces: fewer pixels, masks, things in front. Batched, and drawn for each face by itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from faceless.align import template
from faceless.devices import moved
from faceless.randomness import Rng

OCCLUDERS = ("glasses", "rectangle", "ellipse")


def low_resolution(faces: Tensor, side: int, *, method: str = "antialias", blur: float = 0.0) -> Tensor:
    """Shrink faces to ``side`` pixels and enlarge them again, so that they hold no more than those pixels say.

    Args:
        faces: float ``[B, 3, H, W]`` in 0..255.
        side: pixels; faces that are no larger stay as they are.
        method: ``"antialias"``: low-pass filtered and bilinear, as a distant camera sees. ``"nearest"``: single pixels
            are picked and repeated, as A-SKD (gist-ailab/teaching-where-to-look) has it.
        blur: Gaussian sigma in pixels, afterwards; A-SKD's code uses up to 2, along one axis only.
    """
    height, width = faces.shape[-2:]
    if side < max(height, width):
        if method == "nearest":
            faces = F.interpolate(F.interpolate(faces, (side, side)), (height, width))
        else:
            small = F.interpolate(faces, (side, side), mode="bilinear", antialias=True)
            faces = F.interpolate(small, (height, width), mode="bilinear")
    if blur:
        kernel = 2 * math.ceil(2 * blur) + 1
        faces = gaussian_blur2d(faces, (kernel, kernel), (blur, blur))
    return faces


def face_grid(height: int, width: int, framing: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Coordinates ``[H, W]`` on an aligned face, in distances between the eyes from the point between them.

    The eyes lie at (-0.5, 0) and (0.5, 0), the tip of the nose near (0, 0.6), the mouth near (0, 1.1). The third value
    is that distance in pixels.
    """
    points = template(framing, "arcface5", height)
    middle, unit = points[:2].mean(0), (points[1] - points[0]).norm()
    y = (torch.arange(height) - middle[1]) / unit
    x = (torch.arange(width) - middle[0]) / unit
    return moved(x, device).expand(height, width), moved(y, device)[:, None].expand(height, width), float(unit)


def mask(faces: Tensor, framing: str, rng: Rng) -> Tensor:
    """Put a mask over mouth, chin and (nearly always) nose: cut, color and folds differ from face to face.

    After the shapes of NIST IR 8311 (wide and round, high and low on the nose), drawn where `faceless.align` puts the
    landmarks of a crop.

    Args:
        faces: float ``[B, 3, H, W]`` in 0..255, crops of ``framing``.
        rng: for these B faces.

    Returns:
        The same shape; every face masked.
    """
    draws = moved(rng.uniform(12), faces.device)[..., None, None]
    top, rise, bottom, half, narrow = (
        low + (high - low) * draws[:, i]
        for i, (low, high) in enumerate(((0.3, 0.75), (0.1, 0.5), (1.55, 1.9), (0.75, 1.0), (0.3, 0.6)))
    )
    x, y, unit = face_grid(faces.shape[2], faces.shape[3], framing, faces.device)
    x = x - 0.1 * (2 * draws[:, 5] - 1)
    # Higher on the nose than on the cheeks, rounded below the chin.
    edge = top + rise * x.square()
    width = half - narrow * ((y - top) / (bottom - top)).clamp(0, 1).square() * half
    inside = torch.stack((y - edge, bottom - 0.5 * x.square() - y, width - x.abs())).amin(0)
    alpha = (2 * unit * inside).sigmoid()  # an edge of about a pixel
    folds = 0.12 * torch.sin((3 + 6 * draws[:, 6]) * math.pi * y + 6 * draws[:, 7]) * (draws[:, 8] > 0.4)
    shade = 1 - 0.25 * (x / half).square() + folds
    # Two in three are pale or dark, as most are; the others have any color.
    gray = torch.where(draws[:, 9] < 0.5, 200 + 55 * draws[:, 10], 20 + 60 * draws[:, 10])
    color = 255 * moved(rng.child("color").uniform(3), faces.device)[..., None, None]
    color = torch.where(draws[:, 11, None] < 2 / 3, gray.unsqueeze(1) + 0.15 * (color - 128), color)
    cloth = (color * shade.unsqueeze(1)).clamp(0, 255)
    return faces + alpha.unsqueeze(1) * (cloth - faces)


def occlude(faces: Tensor, framing: str, rng: Rng) -> Tensor:
    """Put sunglasses, a turned rectangle or an ellipse in front of the face, each a third of the time.

    Rectangles and ellipses lie anywhere on the face, with half axes of 0.2 to 0.7 distances between the eyes, and have
    stripes of two colors.

    Args:
        faces, rng: as for `mask`.
    """
    draws = moved(rng.uniform(10), faces.device)[..., None, None]
    x, y, unit = face_grid(faces.shape[2], faces.shape[3], framing, faces.device)
    kind = (draws[:, 0] * len(OCCLUDERS)).long()
    lens = 0.28 + 0.12 * draws[:, 1]
    lenses = 1 - ((x.abs() - 0.5) / lens).square() - ((y - 0.05) / (0.75 * lens)).square()
    bridge = torch.minimum(0.06 - (y + 0.05).abs(), 1.1 - x.abs()) * 8
    glasses = torch.maximum(lenses, bridge)
    angle = math.pi * draws[:, 2]
    u, v = x - 1.6 * draws[:, 3] + 0.8, y - 1.9 * draws[:, 4] + 0.3
    u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    a, b = 0.2 + 0.5 * draws[:, 5], 0.2 + 0.5 * draws[:, 6]
    rectangle = 1 - torch.maximum((u / a).abs(), (v / b).abs())
    ellipse = 1 - (u / a).square() - (v / b).square()
    inside = torch.where(kind == 0, glasses, torch.where(kind == 1, rectangle, ellipse))
    alpha = (unit * inside).sigmoid().unsqueeze(1)
    colors = 255 * moved(rng.child("color").uniform(2, 3), faces.device)[..., None, None]
    stripes = (torch.sin((4 + 16 * draws[:, 7]) * u) > 2 * draws[:, 8] - 1).unsqueeze(1)
    cloth = torch.where(stripes, colors[:, 0], colors[:, 1])
    dark = 10 + 40 * draws[:, 9, None]
    cloth = torch.where((kind == 0).unsqueeze(1), dark + 0.1 * faces, cloth)
    return faces + alpha * (cloth - faces)
