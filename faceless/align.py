"""Landmarks to aligned crops: dlib's chip and ArcFace's 112 template, for whole batches.

``python -m faceless.align --photos FOLDER --output FOLDER`` aligns folders of photographs (`faceless.photographs`).

Coordinates are ``(x, y)`` with integers at pixel centers. Three landmark schemes are known:

- ``arcface5``: image-left eye, image-right eye, nose tip, image-left and image-right mouth corner;
- ``dlib5``: image-right eye's outer and inner corner, image-left eye's outer and inner corner, base of the nose;
- ``dlib68``: the 68 points of iBUG 300-W.

Sources: chip geometry davisking/dlib, ``image_transforms/interpolation.h``; ArcFace template deepinsight/insightface,
``face_align.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.geometry.transform import warp_affine
from torch import Tensor

from faceless import assets
from faceless.errors import InputError

SCHEMES = {"arcface5": 5, "dlib5": 5, "dlib68": 68}
FRAMINGS = ("dlib", "arcface")

# Detector passes (times doubled, threshold), tried in order until one finds a face. ONCE is for generated faces, where
# a face that is hard to find is a bad face; THOROUGH is for benchmarks, where every face counts.
ONCE = ((0, 0.0),)
THOROUGH = ((1, 0.0), (2, 0.0), (1, -0.3), (2, -0.3), (1, -0.6), (2, -0.6), (1, -1.0))

# Pixels of the 112 x 112 crop.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

# Parts of the unit square that dlib's chip is grown around, by `padding` on each side.
_DLIB5 = (
    (0.8595674595992, 0.2134981538014),
    (0.6460604764104, 0.2289674387677),
    (0.1205750620789, 0.2137274526848),
    (0.3340850613712, 0.2290642403242),
    (0.4901123135679, 0.6277975316475),
)
# The same for points 17 to 67 of the 68.
_DLIB68 = (
    (0.000213256, 0.106454), (0.0752622, 0.038915), (0.18113, 0.0187482), (0.29077, 0.0344891), (0.393397, 0.0773906),
    (0.586856, 0.0773906), (0.689483, 0.0344891), (0.799124, 0.0187482), (0.904991, 0.038915), (0.98004, 0.106454),
    (0.490127, 0.203352), (0.490127, 0.307009), (0.490127, 0.409805), (0.490127, 0.515625), (0.36688, 0.587326),
    (0.426036, 0.609345), (0.490127, 0.628106), (0.554217, 0.609345), (0.613373, 0.587326), (0.121737, 0.216423),
    (0.187122, 0.178758), (0.265825, 0.179852), (0.334606, 0.231733), (0.260918, 0.245099), (0.182743, 0.244077),
    (0.645647, 0.231733), (0.714428, 0.179852), (0.793132, 0.178758), (0.858516, 0.216423), (0.79751, 0.244077),
    (0.719335, 0.245099), (0.254149, 0.780233), (0.340985, 0.745405), (0.428858, 0.727388), (0.490127, 0.742578),
    (0.551395, 0.727388), (0.639268, 0.745405), (0.726104, 0.780233), (0.642159, 0.864805), (0.556721, 0.902192),
    (0.490127, 0.909281), (0.423532, 0.902192), (0.338094, 0.864805), (0.290379, 0.784792), (0.428096, 0.778746),
    (0.490127, 0.785343), (0.552157, 0.778746), (0.689874, 0.784792), (0.553364, 0.824182), (0.490127, 0.831803),
    (0.42689, 0.824182),
)  # fmt: skip
# dlib leaves out jaw, eyebrows and lower lip: they move with expression.
_CHIP68 = tuple(i for i in range(27, 68) if not (55 <= i <= 59 or 65 <= i <= 67))


def native_points(framing: str) -> int:
    """How many of dlib's landmarks a crop is made from: its own 5 for its chip; ArcFace's 5 come out of the 68."""
    return 5 if framing == "dlib" else 68


def arcface_points(points: Tensor) -> Tensor:
    """The five ArcFace points ``[N, 5, 2]`` out of dlib's 68 ``[N, 68, 2]``: eye centers, nose tip, mouth corners."""
    left, right = points[:, 36:42].mean(1), points[:, 42:48].mean(1)
    return torch.stack((left, right, points[:, 30], points[:, 48], points[:, 54]), 1)


@cache
def template(framing: str, scheme: str, size: int, padding: float = 0.25) -> Tensor:
    """Where the landmarks lie in a crop, ``[P, 2]`` in pixels of a ``size`` x ``size`` crop.

    Other sizes show the same part of the face as the published one (150 or 112). ``padding`` is that of dlib's chip.
    For ``dlib`` framing and five ArcFace points, the template is those points of dlib's mean face.
    """
    if framing == "arcface" and scheme == "arcface5":
        return (torch.tensor(ARCFACE) + 0.5) * (size / 112) - 0.5
    if framing == "dlib":
        mean_face = torch.full((68, 2), math.nan)
        mean_face[17:] = torch.tensor(_DLIB68)
        unit = {
            "dlib5": torch.tensor(_DLIB5),
            "dlib68": mean_face[list(_CHIP68)],
            "arcface5": arcface_points(mean_face[None])[0],
        }[scheme]
        return (unit + padding) * (size / (1 + 2 * padding)) - 0.5
    raise ValueError(f"there is no {framing!r} framing from {scheme!r} landmarks")


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares rotation, uniform scale and translation without reflection, ``source`` onto ``target``.

    In the plane, Umeyama's solution (PAMI 1991, equations 40-42) is one complex division; no SVD, differentiable.

    Args:
        source, target: ``[N, P, 2]``, or ``[P, 2]`` for one set used for all.

    Returns:
        ``[N, 2, 3]``: ``target ~= M[:, :, :2] @ source + M[:, :, 2]``.
    """
    source, target = torch.broadcast_tensors(source, target)
    source_mean, target_mean = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    s, t = source - source_mean, target - target_mean
    spread = s.square().sum((-2, -1)).clamp_min(torch.finfo(s.dtype).tiny)
    a = (s * t).sum((-2, -1)) / spread
    b = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(-1) / spread
    linear = torch.stack((a, -b, b, a), -1).unflatten(-1, (2, 2))
    shift = target_mean.transpose(-2, -1) - linear @ source_mean.transpose(-2, -1)
    return torch.cat((linear, shift), -1)


def invert(matrix: Tensor) -> Tensor:
    """Inverse of affine maps ``[N, 2, 3]``."""
    linear = torch.linalg.inv(matrix[..., :2])
    return torch.cat((linear, -linear @ matrix[..., 2:]), -1)


def scheme_of(points: Tensor, framing: str) -> str:
    """The scheme of ``[N, P, 2]`` landmarks when none is named: five points are those native to the framing."""
    if framing not in FRAMINGS:
        raise InputError(f"framing is {framing!r}; use one of {', '.join(FRAMINGS)}")
    native = {68: "dlib68", 5: "dlib5" if framing == "dlib" else "arcface5"}
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] not in native:
        raise ValueError(f"landmarks have shape [N, 5, 2] or [N, 68, 2], these have {list(points.shape)}")
    return native[points.shape[1]]


def _fitted_points(points: Tensor, framing: str, scheme: str | None) -> tuple[Tensor, str]:
    """The landmarks that the framing's template knows, and their scheme."""
    scheme = scheme or scheme_of(points, framing)
    if SCHEMES.get(scheme) != points.shape[1]:
        raise ValueError(f"{scheme!r} landmarks given as {list(points.shape)}; known: {SCHEMES}")
    if scheme == "dlib68":
        return (points[:, list(_CHIP68)], scheme) if framing == "dlib" else (arcface_points(points), "arcface5")
    return points, scheme


def crop_to_image(
    points: Tensor, framing: str = "dlib", size: int = 150, *, padding: float = 0.25, scheme: str | None = None
) -> Tensor:
    """The maps ``[N, 2, 3]`` from pixels of the crop to pixels of the image, for landmarks ``[N, P, 2]``.

    As their sources do, ``dlib`` fits the template to the landmarks, ``arcface`` the landmarks to the template. dlib
    also lets the outermost pixel *centers* of the chip fall on those of the rectangle that it cuts, and so does this:
    the crop is closer by up to half a pixel of the image on each side.
    """
    points, scheme = _fitted_points(points.float(), framing, scheme)
    if framing == "arcface":
        return invert(similarity(points, template(framing, scheme, size).to(points)))
    matrix = similarity(template(framing, scheme, size, padding).to(points), points)
    linear = matrix[..., :2]
    scale = torch.linalg.det(linear).clamp_min(1e-12).sqrt()[:, None, None]
    # dlib cuts a rectangle of size * scale pixels around the crop's center, and samples it from center to center of
    # its outermost pixels: (size * scale - 1) pixels over (size - 1) steps.
    middle = torch.full((2, 1), (size - 1) / 2, dtype=points.dtype, device=points.device)
    center = linear @ middle + matrix[..., 2:]
    linear = linear * ((size - 1 / scale) / (size - 1))
    return torch.cat((linear, center - linear @ middle), -1)


def geometry(points: Tensor, framing: str = "dlib", *, scheme: str | None = None) -> tuple[Tensor, Tensor]:
    """How far a face is turned in the plane and how far its landmarks are from a frontal face's.

    Returns:
        ``roll [N]`` in degrees, clockwise positive, and ``misfit [N]``: the root mean square distance of the landmarks
        from the template after alignment, in parts of the crop's side.
    """
    points, scheme = _fitted_points(points.float(), framing, scheme)
    goal = template(framing, scheme, 100).to(points)
    matrix = similarity(goal, points)
    linear = matrix[..., :2]
    roll = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    fitted = goal @ linear.transpose(1, 2) + matrix[..., 2:].transpose(1, 2)
    scale = torch.linalg.det(linear).clamp_min(1e-12).sqrt()
    misfit = (fitted - points).square().sum(2).mean(1).sqrt() / (100 * scale)
    return roll, misfit


def crop(
    images: Tensor,
    points: Tensor,
    framing: str = "dlib",
    size: int = 150,
    *,
    padding: float = 0.25,
    scheme: str | None = None,
    border: str = "zeros",
) -> Tensor:
    """Aligned crops; differentiable with respect to float ``images``.

    Bilinear. An image is first halved, by averaging, as long as the crop would shrink it by more than 1.5.

    Args:
        images: ``[N, 3, H, W]`` uint8 or float in 0..255.
        points: landmarks ``[N, P, 2]``, P = 5 or 68.
        framing: ``"dlib"`` (150 x 150 in its recognizer) or ``"arcface"`` (112 x 112).
        size: height and width of the crop.
        padding: around dlib's chip, in parts of the unpadded face; 0.25 is what its recognizer was trained with.
        scheme: of the landmarks; without it, five points are dlib's for ``dlib`` and ArcFace's for ``arcface``.
        border: what lies outside of the image: ``"zeros"`` as in dlib and ArcFace, or ``"border"`` to repeat the edge.

    Returns:
        ``[N, 3, size, size]`` of the images' type (uint8 is rounded).
    """
    if len(images) != len(points):
        raise ValueError(f"{len(images)} images but landmarks of {len(points)}")
    to_image = crop_to_image(points.to(images.device), framing, size, padding=padding, scheme=scheme)
    pixels = images if images.is_floating_point() else images.float()
    if len(pixels) == 0:
        return images.new_zeros(0, 3, size, size)
    halvings = _halvings(to_image)
    crops = pixels.new_empty(len(pixels), 3, size, size)
    for level in range(int(halvings.max()) + 1):
        if level > 0:
            pixels, to_image = _halved(pixels), _in_halved(to_image)
        chosen = halvings == level
        if chosen.all():
            crops = _warp(pixels, to_image, size, border)
        elif chosen.any():
            crops = crops.index_put((chosen,), _warp(pixels[chosen], to_image[chosen], size, border))
    return crops if images.is_floating_point() else crops.round().clamp(0, 255).to(images.dtype)


def _halvings(to_image: Tensor) -> Tensor:
    """How often to halve an image before the maps ``[..., 2, 3]`` sample it, so that they shrink it by 1.5 at most."""
    shrink = torch.linalg.det(to_image[..., :2]).clamp_min(1e-12).sqrt()
    return torch.log2(shrink / 1.5).ceil().clamp(0, 16).long()


def _halved(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(pixels, 2, ceil_mode=True, count_include_pad=False)


def _in_halved(to_image: Tensor) -> Tensor:
    """The same maps into pixels of the halved image."""
    half = 0.5 * to_image  # x' + 1/2 = (x + 1/2) / 2
    return torch.cat((half[..., :2], half[..., 2:] - 0.25), -1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept here may have to be saved for a gradient later
def _reframing(known: str, wanted: str, side: int, size: int, device: torch.device) -> tuple[int, Tensor]:
    """How often to halve crops of ``side`` pixels, and the places in them of the pixels of the other framing."""
    to_image = crop_to_image(template(known, "arcface5", side)[None], wanted, size, scheme="arcface5")[0]
    halvings = int(_halvings(to_image))
    for _ in range(halvings):
        to_image = _in_halved(to_image)
        side = -(-side // 2)
    y, x = torch.meshgrid(2 * [torch.arange(float(size))], indexing="ij")
    places = torch.stack((x, y), -1) @ to_image[:, :2].T + to_image[:, 2]
    return halvings, (2 / max(side - 1, 1) * places - 1)[None].to(device)


def reframe(images: Tensor, known: str, wanted: str, size: int) -> Tensor:
    """Aligned crops in another framing, by the landmarks of the mean face: `crop`, without waiting for the device.

    Args:
        images: ``[N, 3, S, S]`` uint8 or float in 0..255, in framing ``known``.
        known, wanted: ``"dlib"`` or ``"arcface"``.
        size: height and width of what is returned.

    Returns:
        ``[N, 3, size, size]`` float32; what lies outside of the crops given repeats their edge.
    """
    with torch.autocast(images.device.type, enabled=False):  # in bf16 places would be off by a third of a pixel
        halvings, grid = _reframing(known, wanted, images.shape[-1], size, images.device)
        pixels = images.float()
        for _ in range(halvings):
            pixels = _halved(pixels)
        return F.grid_sample(pixels, grid.expand(len(pixels), -1, -1, -1), padding_mode="border", align_corners=True)


def _warp(pixels: Tensor, to_image: Tensor, size: int, border: str) -> Tensor:
    return warp_affine(pixels, invert(to_image).to(pixels), (size, size), padding_mode=border, align_corners=True)


@dataclass
class Landmarks:
    """What `detect` found in N images.

    Attributes:
        points: ``[N, P, 2]`` float32, pixels of the images given.
        found: ``[N]`` bool, whether the detector saw a face; if not, ``points`` are those of the whole-image box, or
            NaN without it.
        score: ``[N]`` float32, the detector's (a linear classifier's distance), NaN where it saw nothing.
        attempt: ``[N]`` int64, which of the attempts found the face, -1 for none.
        whole_image: whether the others got the whole-image box.
        faces: ``[N]`` int64, how many faces that attempt saw.
    """

    points: Tensor
    found: Tensor
    score: Tensor
    attempt: Tensor
    whole_image: bool
    faces: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def summary(self) -> dict[str, int]:
        """How many faces each attempt found and how many none did; the counts add up to all faces."""
        counts = {"faces": len(self)}
        for i in sorted(set(self.attempt[self.found].tolist())):
            counts[f"found at attempt {i + 1}"] = int((self.attempt == i).sum())
        counts["whole-image box" if self.whole_image else "not found"] = int((~self.found).sum())
        return counts


@cache
def _dlib() -> Any:
    try:
        import dlib
    except ImportError as error:
        raise InputError(
            "landmarks need dlib, which is not installed: pip install dlib-bin, or faceless-distill[align]"
        ) from error
    return dlib


@cache
def _detector() -> Any:
    return _dlib().get_frontal_face_detector()


@cache
def _predictor(points: int) -> Any:
    return _dlib().shape_predictor(str(assets.fetch(f"dlib-landmarks-{points}")))


def _scaled(images: Tensor, longer_side: int | None) -> tuple[Tensor, float, float]:
    """``[N, H, W, 3]`` contiguous uint8 with the longer side resized, and the factors of x and y."""
    height, width = images.shape[-2:]
    # Channels last in memory: the resizing of uint8 is then vectorized, and dlib wants rows of RGB pixels anyway.
    images = images.contiguous(memory_format=torch.channels_last)
    if longer_side is not None and longer_side != max(height, width):
        factor = longer_side / max(height, width)
        new = max(1, round(height * factor)), max(1, round(width * factor))
        images = F.interpolate(images, new, mode="bilinear", antialias=factor < 1)
    out = images.permute(0, 2, 3, 1).contiguous()
    return out, out.shape[2] / width, out.shape[1] / height


def _best_box(
    pixels: np.ndarray, attempts: Sequence[tuple[int, float]]
) -> tuple[tuple[int, int, int, int] | None, float, int, int]:
    """Left, top, right and bottom of the best detection, its score, the attempt that found it, and among how many."""
    for attempt, (doublings, threshold) in enumerate(attempts):
        boxes, scores, _ = _detector().run(pixels, doublings, threshold)
        if boxes:  # best first
            box = boxes[0]
            return (box.left(), box.top(), box.right(), box.bottom()), scores[0], attempt, len(boxes)
    return None, math.nan, -1, 0


@torch.no_grad()
def detect(
    images: Tensor,
    *,
    points: int = 5,
    detect_size: int | None = None,
    landmark_size: int | None = None,
    attempts: Sequence[tuple[int, float]] = ONCE,
    whole_image: bool = False,
) -> Landmarks:
    """One face per image: dlib's HOG detector (Dalal and Triggs, CVPR 2005), then its landmark predictor.

    The detector's windows are 80 pixels wide, so small faces must be enlarged; dlib's landmarks are whole pixels, so
    a larger ``landmark_size`` makes them finer. Where there are several faces, the one with the highest score counts.

    Args:
        images: ``[N, 3, H, W]`` uint8 RGB.
        points: 5 or 68.
        detect_size: pixels of the longer side of what the detector sees; the image's own when None.
        landmark_size: the same for the landmark predictor; ``detect_size`` when None.
        attempts: (times to double the image, threshold) until a face is found.
        whole_image: where none is found, predict landmarks in the central 80 % of the image's shorter side; such faces
            stay marked as not ``found``.

    Raises:
        InputError: dlib is not installed, or the predictor cannot be fetched.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images are uint8 [N, 3, H, W], these are {images.dtype} {list(images.shape)}")
    if points not in (5, 68):
        raise InputError(f"points is {points}; dlib's predictors find 5 or 68")
    if len(images) == 0:
        nothing = torch.empty(0)
        return Landmarks(
            torch.empty(0, points, 2), nothing.bool(), nothing, nothing.long(), whole_image, nothing.long()
        )
    dlib, predictor = _dlib(), _predictor(points)
    images = images.cpu()
    small, small_x, small_y = _scaled(images, detect_size)
    large, large_x, large_y = small, small_x, small_y
    if landmark_size is not None and landmark_size != detect_size:
        large, large_x, large_y = _scaled(images, landmark_size)
    x_ratio, y_ratio = large_x / small_x, large_y / small_y
    rows, cols = large.shape[1:3]
    side = 0.8 * min(rows, cols)
    middle = dlib.rectangle(
        *(round(v) for v in ((cols - side) / 2, (rows - side) / 2, (cols + side) / 2, (rows + side) / 2))
    )

    hits = [_best_box(pixels, attempts) for pixels in small.numpy()]
    shapes = torch.full((len(images), points, 2), math.nan)
    for shape, pixels, (box, *_) in zip(shapes, large.numpy(), hits, strict=True):
        if box is not None:
            left, top, right, bottom = box
            edges = left * x_ratio, top * y_ratio, (right + 1) * x_ratio - 1, (bottom + 1) * y_ratio - 1
            marks = predictor(pixels, dlib.rectangle(*map(round, edges)))
        elif whole_image:
            marks = predictor(pixels, middle)
        else:
            continue
        shape[:] = torch.tensor([(p.x, p.y) for p in marks.parts()])
    # Pixel centers of the resized image to those of the image itself.
    factor = torch.tensor((large_x, large_y))
    shapes = (shapes + 0.5) / factor - 0.5
    attempt, score = torch.tensor([hit[2] for hit in hits]), torch.tensor([hit[1] for hit in hits])
    faces = torch.tensor([hit[3] for hit in hits])
    return Landmarks(shapes, attempt >= 0, score, attempt, whole_image, faces)


if __name__ == "__main__":
    from faceless.photographs import main

    main()
