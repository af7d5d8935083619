"""The same benchmark under worse conditions: fewer pixels, masks, things in front of the face."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from eval.benchmarks.benchmark import Benchmark
from faceless import degrade
from faceless.errors import InputError
from faceless.randomness import Rng

CLEAN = "/clean"
#: What ``mixed`` draws from, one for each face.
MIXTURE = ("", "56px", "28px", "14px", "masked", "occluded")
CHUNK = 256


def check(condition: str) -> str:
    """The condition, if it is one.

    Raises:
        InputError: it is none.

    >>> check("28px/clean")
    '28px/clean'
    """
    kind = condition.removesuffix(CLEAN)
    side = re.fullmatch(r"([1-9]\d{0,3})px", kind)
    if kind not in ("masked", "occluded", "mixed") and not (side and int(side[1]) >= 4):
        raise InputError(
            f"condition {condition!r}: use masked, occluded, mixed or a number of pixels such as 28px (4 or more), "
            f"with {CLEAN} behind it to compare with faces that are as they were"
        )
    return condition


def under(benchmark: Benchmark, condition: str) -> Benchmark:
    """A benchmark whose faces are ``masked``, ``occluded``, as ``28px`` would show them, or ``mixed``.

    With ``/clean`` behind it only probes are so, and are compared with the faces as they were. What is drawn depends on
    the position of a face alone: apply it before `Benchmark.subset`.

    Raises:
        InputError: no such condition.
    """
    kind = check(condition).removesuffix(CLEAN)
    crop = benchmark.images.shape[-1]
    if kind.endswith("px") and int(kind.removesuffix("px")) > crop:
        raise InputError(f"condition {condition}: these faces have {crop} pixels; name no more")
    framing = str(benchmark.record.get("framing", "dlib"))
    rng = Rng.of(0, f"condition {kind}", range(len(benchmark)))
    rows = torch.arange(len(benchmark)).split(CHUNK)
    images = torch.cat([_changed(benchmark.images[some], kind, framing, rng.rows(some)) for some in rows])
    return replace(
        benchmark,
        name=f"{benchmark.name} {condition}",
        images=images,
        gallery=benchmark.images if condition.endswith(CLEAN) else None,
        record=benchmark.record | {"condition": condition},
    )


def _changed(faces: Tensor, kind: str, framing: str, rng: Rng) -> Tensor:
    if kind == "mixed":
        drawn, found = rng.child("kind").integers(len(MIXTURE), 1).squeeze(1), faces.clone()
        for number, one in enumerate(MIXTURE):
            some = (drawn == number).nonzero().squeeze(1)
            if one and len(some):
                found[some] = _changed(faces[some], one, framing, rng.rows(some))
        return found
    pixels = faces.float()
    if kind == "masked":
        pixels = degrade.mask(pixels, framing, rng)
    elif kind == "occluded":
        pixels = degrade.occlude(pixels, framing, rng)
    else:
        pixels = degrade.low_resolution(pixels, int(kind.removesuffix("px")))
    return pixels.round().clamp(0, 255).to(torch.uint8)
