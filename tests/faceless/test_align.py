"""Alignment against dlib's own chips, numpy's SVD, and the recognizer that the chips are for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceless import align, assets
from faceless.errors import InputError

dlib = pytest.importorskip("dlib")


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991 as printed: SVD of the covariance, sign matrix, trace."""
    s, t = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / s.var(0).sum()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


def full_object(points: np.ndarray) -> "dlib.full_object_detection":
    return dlib.full_object_detection(dlib.rectangle(0, 0, 9, 9), [dlib.point(int(x), int(y)) for x, y in points])


def smooth_picture(size: int = 300) -> torch.Tensor:
    noise = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(noise, (size, size), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("points", [5, 68])
def test_similarity_is_umeyamas(points):
    rng = np.random.default_rng(points)
    source, target = rng.normal(size=(20, points, 2)) * 30, rng.normal(size=(20, points, 2)) * 50
    target[:5] *= (-1, 1)  # mirrored sets: the best proper rotation, not the reflection
    ours = align.similarity(torch.from_numpy(source), torch.from_numpy(target))
    expected = np.stack([umeyama(s, t) for s, t in zip(source, target)])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("points", [5, 68])
@pytest.mark.parametrize(("size", "padding"), [(150, 0.25), (96, 0.25), (200, 0.2)])
def test_chip_rectangle_is_dlibs(points, size, padding):
    landmarks = np.random.default_rng(1).integers(20, 400, (8, points, 2))
    matrices = align.crop_to_image(torch.from_numpy(landmarks), "dlib", size, padding=padding)
    for marks, matrix in zip(landmarks, matrices.double().numpy()):
        chip = dlib.get_face_chip_details(full_object(marks), size, padding)
        corner, middle = matrix @ (0, 0, 1), matrix @ ((size - 1) / 2, (size - 1) / 2, 1)
        assert middle == pytest.approx([chip.rect.center().x, chip.rect.center().y], abs=1.01)  # dlib rounds it
        assert middle[0] == pytest.approx((chip.rect.left() + chip.rect.right()) / 2, abs=1e-2)
        half = np.linalg.norm(corner - middle) / np.sqrt(2)
        assert half == pytest.approx((chip.rect.right() - chip.rect.left()) / 2, abs=1e-2)
        assert np.arctan2(matrix[1, 0], matrix[0, 0]) == pytest.approx(chip.angle, abs=1e-4)


@pytest.mark.parametrize(
    ("scale", "angle", "center"),
    [
        (1.2, 0.3, (150, 150)),
        (0.5, -0.5, (140, 160)),
        (0.9, 0.0, (150, 150)),
        (1.2, 0.3, (100, 60)),
        (1.45, 2.0, (150, 150)),
    ],
)
def test_chip_pixels_are_dlibs(scale, angle, center):
    picture = smooth_picture()
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    marks = ((align.template("dlib", "dlib5", 150).numpy() - 74.5) @ turn.T + center).round()
    theirs = dlib.get_face_chip(
        np.ascontiguousarray(picture[0].permute(1, 2, 0).numpy()), full_object(marks), 150, 0.25
    )
    ours = align.crop(picture, torch.from_numpy(marks)[None], "dlib", 150)[0].permute(1, 2, 0).numpy()
    inside = theirs.max(2) > 0
    difference = ours[inside].astype(int) - theirs[inside]
    # dlib cuts the fraction off where we round: zero or one, half of the time each.
    assert difference.min() >= 0 and difference.max() <= 1
    assert difference.mean() == pytest.approx(0.5, abs=0.05)
    # Outside, dlib is black; so are we, up to the pixel over which bilinear weights fade.
    assert ((ours.max(2) > 0) & ~inside).mean() < 0.02


def test_arcface_crop_puts_landmarks_on_the_template():
    face = torch.zeros(1, 3, 200, 240)
    goal = torch.tensor(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    turn = 1.3 * torch.tensor([[0.96, -0.28], [0.28, 0.96]])
    marks = goal @ turn.T + torch.tensor([60.0, 20.0])
    for x, y in marks.round().long():
        face[0, :, y, x] = 255
    crop = align.crop(F.avg_pool2d(face, 3, 1, 1) * 9, marks[None], "arcface", 112)[0, 0]
    for x, y in goal.round().long():
        assert crop[y - 1 : y + 2, x - 1 : x + 2].max() > 150
    assert crop[40:45, 52:60].max() == 0


def test_arcface_sizes_show_the_same_part_of_the_face():
    picture = smooth_picture(300)
    marks = align.template("arcface", "arcface5", 112)[None] * 1.4 + 60
    large = align.crop(picture.float(), marks, "arcface", 112)
    small = align.crop(picture.float(), marks, "arcface", 56)
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 1.5


def test_arcface_from_68_points_uses_eye_centers_nose_tip_and_mouth_corners():
    points = torch.arange(136.0).view(1, 68, 2)
    five = align.arcface_points(points)[0]
    assert five[0].tolist() == points[0, 36:42].mean(0).tolist()
    assert five[2].tolist() == points[0, 30].tolist() and five[4].tolist() == points[0, 54].tolist()


def test_dlib_framing_from_arcface_points_agrees_with_68():
    """On dlib's mean face itself, both schemes must give one and the same chip."""
    mean = torch.full((1, 68, 2), 7.0)
    mean[0, 17:] = torch.tensor(align._DLIB68) * 100 + 30
    full = align.crop_to_image(mean, "dlib", 150)
    five = align.crop_to_image(align.arcface_points(mean), "dlib", 150, scheme="arcface5")
    torch.testing.assert_close(full, five, atol=1e-3, rtol=1e-4)


def test_shrinking_does_not_alias():
    stripes = torch.zeros(1, 3, 800, 800)
    stripes[..., ::2] = 255
    marks = align.template("dlib", "dlib5", 700)[None] + 50
    assert align.crop(stripes, marks, "dlib", 100).sub(127.5).abs()[..., 5:-5, 5:-5].max() < 20


def test_gradients_reach_the_pixels():
    image = torch.rand(2, 3, 40, 40, dtype=torch.double, requires_grad=True)
    marks = align.template("dlib", "dlib5", 30)[None].repeat(2, 1, 1) + 3.2
    assert torch.autograd.gradcheck(lambda x: align.crop(x, marks, "dlib", 6), image, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(("known", "wanted"), [("dlib", "arcface"), ("arcface", "dlib")])
@pytest.mark.parametrize(("side", "size"), [(64, 112), (150, 112), (112, 150), (301, 64)])
def test_reframing_is_cropping_by_the_mean_face_whatever_the_precision(known, wanted, side, size):
    picture = smooth_picture(side).float()
    marks = align.template(known, "arcface5", side)[None]
    expected = align.crop(picture, marks, wanted, size, scheme="arcface5", border="border")
    with torch.inference_mode():
        torch.testing.assert_close(align.reframe(picture, known, wanted, size), expected, atol=2e-2, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        again = align.reframe(picture.repeat(3, 1, 1, 1).requires_grad_(), known, wanted, size)
    torch.testing.assert_close(again[1:2], expected, atol=2e-2, rtol=0)
    again.sum().backward()  # what was kept from inference serves here too


def test_crop_of_nothing_and_mismatched_counts():
    assert align.crop(torch.zeros(0, 3, 9, 9), torch.zeros(0, 5, 2)).shape == (0, 3, 150, 150)
    with pytest.raises(ValueError, match="2 images but landmarks of 1"):
        align.crop(torch.zeros(2, 3, 9, 9), torch.zeros(1, 5, 2))
    with pytest.raises(InputError, match="framing is 'ffhq'"):
        align.crop(torch.zeros(1, 3, 9, 9), torch.zeros(1, 5, 2), "ffhq")


def test_geometry_measures_roll_and_misfit():
    goal = align.template("dlib", "dlib5", 150)
    angle = np.deg2rad(20)
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
    squashed = goal * torch.tensor([0.3, 1.0])
    roll, misfit = align.geometry(torch.stack([goal @ turn.T * 3 + 9, squashed]))
    assert roll[0] == pytest.approx(20, abs=1e-3) and misfit[0] < 1e-5
    assert misfit[1] > 0.08


@pytest.fixture(scope="module")
def att():
    """The first two photographs of the first 20 people, ``[40, 3, 112, 92]``."""
    folder = assets.fetch("att-faces")
    paths = [folder / f"s{person}" / f"{k}.pgm" for person in range(1, 21) for k in (1, 2)]
    faces = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()


def test_landmarks_are_dlibs(att):
    found = align.detect(att, attempts=((1, 0.0),))
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(str(assets.fetch("dlib-landmarks-5")))
    assert found.found.float().mean() > 0.9
    for face, points, hit in zip(att, found.points, found.found):
        pixels = np.ascontiguousarray(face.permute(1, 2, 0).numpy())
        boxes = detector(pixels, 1)
        assert bool(hit) == bool(boxes)
        if boxes:
            assert points.tolist() == [[p.x, p.y] for p in predictor(pixels, boxes[0]).parts()]


def test_real_chips_mean_the_same_to_dlibs_recognizer(att):
    from faceless.backbones.dlib_resnet import MEAN, read_dat

    marks = align.detect(att, attempts=align.THOROUGH, whole_image=True).points
    ours = align.crop(att, marks, "dlib", 150)
    theirs = [
        dlib.get_face_chip(np.ascontiguousarray(face.permute(1, 2, 0).numpy()), full_object(points.round()), 150, 0.25)
        for face, points in zip(att, marks)
    ]
    net = read_dat(assets.fetch("dlib-resnet29"))
    chips = torch.cat([ours, torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)])
    with torch.inference_mode():
        embedded = F.normalize(net((chips - torch.tensor(MEAN).view(1, 3, 1, 1)) / 256))
    cosine = (embedded[:40] * embedded[40:]).sum(1)
    assert cosine.min() > 0.998 and cosine.mean() > 0.9995


def test_finer_landmarks_stay_on_the_same_points(att):
    coarse, fine = align.detect(att, attempts=((1, 0.0),)), align.detect(att, attempts=((1, 0.0),), landmark_size=336)
    both = coarse.found & fine.found
    assert (coarse.points[both] - fine.points[both]).norm(dim=2).mean() < 1.0


def test_faces_that_are_not_found_are_counted(att):
    blank = torch.full((2, 3, 112, 92), 128, dtype=torch.uint8)
    mixed = torch.cat([att[:1], att[2:3], blank])
    without = align.detect(mixed, attempts=((1, 0.0),))
    assert without.found.tolist() == [True, True, False, False]
    assert without.points[2:].isnan().all() and without.points[:2].isfinite().all()
    assert without.summary() == {"faces": 4, "found at attempt 1": 2, "not found": 2}
    boxed = align.detect(mixed, attempts=((1, 0.0), (2, 0.0)), whole_image=True)
    assert boxed.found.tolist() == [True, True, False, False] and boxed.points.isfinite().all()
    assert boxed.summary() == {"faces": 4, "found at attempt 1": 2, "whole-image box": 2}


def test_a_later_attempt_finds_small_faces(att):
    small = F.interpolate(att[:6].float(), (56, 46), mode="area").round().to(torch.uint8)
    once = align.detect(small)
    thorough = align.detect(small, attempts=((0, 0.0), (2, 0.0), (2, -0.6)))
    assert not once.found.any() and thorough.found.all()
    assert (thorough.attempt >= 1).all() and thorough.summary()["faces"] == 6


def test_no_images_and_wrong_images():
    assert len(align.detect(torch.zeros(0, 3, 64, 64, dtype=torch.uint8))) == 0
    with pytest.raises(ValueError, match="uint8"):
        align.detect(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="5 or 68"):
        align.detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), points=81)
