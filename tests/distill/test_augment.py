"""Augmentations: what each does, and that views do not depend on how a batch is split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.augment import Augment, Degrade
from faceless.degrade import low_resolution
from faceless.errors import InputError
from faceless.randomness import Rng

STRENGTHS = (
    "flip",
    "rotate",
    "scale",
    "shift",
    "gray",
    "brightness",
    "contrast",
    "light",
    "erase",
    "blur",
    "noise",
    "resample",
)
OFF = dict.fromkeys(STRENGTHS, 0.0)


def faces(n: int = 6, side: int = 24) -> torch.Tensor:
    return Rng.of(0, "faces", range(n)).integers(256, 3, side, side).byte()


def rng(n: int = 6, seed: int = 0) -> Rng:
    return Rng.of(seed, "view", range(n))


def test_nothing_on_changes_nothing() -> None:
    out = Augment(**OFF)(faces(), rng())
    torch.testing.assert_close(out, faces().float(), atol=1e-3, rtol=0)


def test_certain_flip_is_a_mirror() -> None:
    out = Augment(**OFF | {"flip": 1.0})(faces(), rng())
    torch.testing.assert_close(out, faces().float().flip(-1), atol=1e-2, rtol=0)


def test_gray_is_the_luma_of_bt601() -> None:
    out = Augment(**OFF | {"gray": 1.0})(faces(), rng())
    red, green, blue = faces().float().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    for channel in out.unbind(1):
        torch.testing.assert_close(channel, luma, atol=1e-2, rtol=0)


def test_contrast_keeps_the_mean_and_brightness_moves_it() -> None:
    # Mid-gray noise stays clear of the clamp.
    soft = (faces().float() - 127.5) / 8 + 127.5
    contrasted = Augment(**OFF | {"contrast": 0.5})(soft, rng())
    torch.testing.assert_close(contrasted.mean((1, 2, 3)), soft.mean((1, 2, 3)), atol=1e-2, rtol=0)
    ratio = contrasted.flatten(1).std(1) / soft.flatten(1).std(1)
    assert ratio.log().abs().max() <= 0.5 + 1e-4
    assert ratio.std() > 0.05
    lit = Augment(**OFF | {"brightness": 20.0})(soft, rng())
    moved = (lit - soft).flatten(1)
    assert moved.abs().max() <= 20.0 + 1e-3
    assert moved.std(1).max() < 1e-3, "brightness moves all pixels of a face alike"


def test_rotation_moves_a_point_by_the_drawn_angle() -> None:
    side, radius = 65, 24
    image = torch.zeros(64, 3, side, side)
    image[:, :, 32, 32 + radius] = 255.0
    out = Augment(**OFF | {"rotate": 30.0})(image, rng(64))
    grid = torch.arange(side, dtype=torch.float32) - 32
    weight = out[:, 0] / out[:, 0].sum((1, 2), keepdim=True)
    x, y = (weight * grid).sum((1, 2)), (weight * grid[:, None]).sum((1, 2))
    torch.testing.assert_close(torch.hypot(x, y), torch.full((64,), float(radius)), atol=0.3, rtol=0)
    degrees = torch.rad2deg(torch.atan2(y, x))
    assert degrees.abs().max() <= 30.5
    assert degrees.std() == pytest.approx(60 / math.sqrt(12), rel=0.3), "uniform over the whole range"


@given(st.integers(1, 7), st.integers(0, 5), st.sampled_from([None, 16, 32]))
@settings(max_examples=15, deadline=None)
def test_views_do_not_depend_on_the_split(cut: int, seed: int, size: int | None) -> None:
    augment, numbers = Augment(size=size, blur=0.5, noise=0.5, resample=0.5), rng(8, seed)
    whole = augment(faces(8), numbers)
    parts = [augment(faces(8)[rows], numbers.rows(rows)) for rows in (slice(0, cut), slice(cut, 8))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=0.02, rtol=0)  # of 255
    assert whole.shape[-1] == (size or 24)
    assert whole.min() >= 0 and whole.max() <= 255


def test_two_seeds_give_two_views() -> None:
    assert (Augment()(faces(), rng()) - Augment()(faces(), rng(seed=1))).abs().mean() > 1


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"rotate": -1.0}, {"size": 2}])
def test_impossible_strengths_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"augment.{next(iter(wrong))}"):
        Augment(**wrong)


def test_a_student_may_see_worse_faces_than_its_teacher() -> None:
    soft = faces(64, 32).float()
    numbers = rng(64)
    assert torch.equal(Degrade()(soft, "dlib", numbers), soft)
    low = Degrade(resolutions=[32, 16, 8])(soft, "dlib", numbers)
    kinds = [(low == low_resolution(soft, side)).flatten(1).all(1) for side in (32, 16, 8)]
    counts = torch.stack(kinds).sum(1)
    assert counts.sum() == 64 and counts.min() > 10
    covered = Degrade(mask=0.5, occlude=0.2)(soft, "dlib", numbers)
    changed = (covered != soft).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.8
    cut = torch.tensor([5, 60])
    degrade = Degrade(resolutions=[16, 8], mask=0.5, occlude=0.5)
    torch.testing.assert_close(degrade(soft[cut], "dlib", numbers.rows(cut)), degrade(soft, "dlib", numbers)[cut])


def test_resolutions_descend_over_the_run() -> None:
    soft = faces(64, 32).float()
    degrade = Degrade(resolutions=[8, 32, 16], schedule="descending")
    for done, admitted in ((0.0, 1), (0.32, 1), (0.34, 2), (0.67, 3), (1.0, 3)):
        low = degrade(soft, "dlib", rng(64), done)
        sides = [side for side in (32, 16, 8) if (low == low_resolution(soft, side)).flatten(1).all(1).any()]
        assert sides == [32, 16, 8][:admitted], done


@pytest.mark.parametrize(
    "wrong", [{"mask": 1.5}, {"blur": -1.0}, {"blur": 20.0}, {"blur": float("nan")}, {"resolutions": [2]}]
)
def test_impossible_degradations_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"degrade.{next(iter(wrong))}"):
        Degrade(**wrong)


@pytest.mark.parametrize("idle", [{"blur": 2.0}, {"method": "nearest"}, {"schedule": "descending", "mask": 0.3}])
def test_settings_of_resolutions_without_resolutions_are_named(idle: dict) -> None:
    with pytest.raises(InputError, match="method, blur and schedule are of resolutions"):
        Degrade(**idle)


def test_points_move_with_the_pixels_around_them() -> None:
    """Bright spots on black faces, found again by their center of mass, at the size of the faces and at another."""
    marks = 0.3 + 0.4 * Rng.of(5, "marks", range(24)).uniform(1, 2)
    x, y = (torch.arange(64) + 0.5) / 64, (torch.arange(64)[:, None] + 0.5) / 64
    far = (x - marks[:, :, 0, None]).square() + (y - marks[:, :, 1, None]).square()
    faces = 255 * torch.exp(-far / 0.002)[:, None].expand(-1, 3, -1, -1)
    for size in (64, 48):
        augment = Augment(size=size, rotate=20.0, scale=0.2, shift=0.1)
        rng = Rng.of(0, "view", range(24))
        seen = augment.geometry(faces, rng.child("geometry"))[:, 0]
        place = (torch.arange(size) + 0.5) / size
        weight = seen / seen.sum((1, 2), keepdim=True)
        found = torch.stack(((weight.sum(1) * place).sum(1), (weight.sum(2) * place).sum(1)), 1)
        moved = augment.points(marks, rng)[:, 0]
        assert (moved - marks[:, 0]).abs().amax() > 0.2
        torch.testing.assert_close(found, moved, atol=0.01, rtol=0)
