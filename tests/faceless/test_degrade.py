"""Worse pictures: what is lost, what is covered, and that nothing depends on how a batch is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from faceless import degrade
from faceless.align import FRAMINGS, template
from faceless.randomness import Rng


def faces(n: int = 16, side: int = 64) -> Tensor:
    return Rng.of(0, "faces", range(n)).uniform(3, side, side, low=90, high=160)


def rng(n: int = 16) -> Rng:
    return Rng.of(1, "worse", range(n))


def test_fewer_pixels_hold_no_detail_but_keep_the_means() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255.0).expand(2, 3, 32, 32)
    assert (degrade.low_resolution(board, 8) - 127.5).abs().max() < 20
    torch.testing.assert_close(degrade.low_resolution(faces(), 64), faces())
    low = degrade.low_resolution(faces(), 16)
    torch.testing.assert_close(low.mean((2, 3)), faces().mean((2, 3)), atol=1.0, rtol=0)
    assert low.std() < 0.5 * faces().std()


def test_nearest_picks_pixels_and_repeats_them() -> None:
    picked = faces()[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(degrade.low_resolution(faces(), 16, method="nearest"), picked)
    soft = degrade.low_resolution(faces(), 16, method="nearest", blur=1.0)
    assert (soft[..., 1:] - soft[..., :-1]).abs().max() < (picked[..., 1:] - picked[..., :-1]).abs().max()


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_mask_covers_mouth_and_mostly_nose_but_no_eye(framing: str) -> None:
    covered = (degrade.mask(faces(), framing, rng()) - faces()).abs().amax(1) > 3
    points = template(framing, "arcface5", 64).round().long()
    seen = covered[:, points[:, 1], points[:, 0]].float().mean(0)
    assert seen[0] == seen[1] == 0, "eyes"
    assert (seen[3:] > 0.9).all(), "corners of the mouth; a color may be that of the face"
    assert 0.3 < seen[2] <= 1, "nose"
    assert 0.1 < covered.float().mean() < 0.6


@pytest.mark.parametrize("framing", FRAMINGS)
def test_occluders_cover_some_of_the_face_and_sometimes_both_eyes(framing: str) -> None:
    many = faces(64)
    covered = (degrade.occlude(many, framing, rng(64)) - many).abs().amax(1) > 3
    shares = covered.float().mean((1, 2))
    assert shares.min() > 0.01 and shares.max() < 0.7
    eyes = template(framing, "arcface5", 64)[:2].round().long()
    both = covered[:, eyes[:, 1], eyes[:, 0]].all(1).float().mean()
    assert 0.2 < both < 0.6, "glasses, a third of the time, and large shapes"


@pytest.mark.parametrize("cover", [degrade.mask, degrade.occlude])
def test_what_is_drawn_depends_on_the_face_alone(cover) -> None:
    rows = torch.tensor([3, 11, 7])
    whole = cover(faces(), "dlib", rng())
    torch.testing.assert_close(cover(faces()[rows], "dlib", rng().rows(rows)), whole[rows])
    assert (whole.clamp(0, 255) == whole).all()
    assert (whole[0] - whole[1]).abs().max() > 10
