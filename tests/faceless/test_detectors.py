"""Detectors: closed forms, dlib's landmarks, real photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faceless import align, assets
from faceless.detectors import MTCNN, SCRFD, Dlib, Faces, base, mtcnn
from faceless.errors import InputError

pytest.importorskip("dlib")


@pytest.fixture(scope="module")
def att() -> torch.Tensor:
    """Two photographs each of the first ten people, enlarged, ``[20, 3, 224, 184]``."""
    folder = assets.fetch("att-faces")
    paths = [folder / f"s{person}" / f"{k}.pgm" for person in range(1, 11) for k in (1, 2)]
    faces = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
    images = torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous()
    return F.interpolate(images, scale_factor=2, mode="bilinear")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_crops_by_sums_are_those_of_interpolate(data):
    size = data.draw(st.sampled_from([3, 24]))
    images = torch.randint(0, 256, (2, 3, 40, 31), generator=torch.Generator().manual_seed(size)).float()
    left, top = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 39))
    right, bottom = data.draw(st.integers(left + 1, 31)), data.draw(st.integers(top + 1, 40))
    boxes = torch.tensor([[left, top, right, bottom], [0, 0, 31, 40]])
    crops = mtcnn.area_crops(mtcnn.integral(images), torch.tensor([1, 0]), boxes, size)
    expected = F.interpolate(images[1:, :, top:bottom, left:right], (size, size), mode="area")
    torch.testing.assert_close(crops[:1], expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(crops[1:], F.interpolate(images[:1], (size, size), mode="area"), atol=1e-3, rtol=1e-5)


def test_boxes_move_grow_square_and_make_way():
    box = torch.tensor([[10.0, 10.0, 20.0, 40.0]])
    assert mtcnn.square(box).tolist() == [[0.0, 10.0, 30.0, 40.0]]
    moved = mtcnn.moved(box, torch.tensor([[0.1, 0.1, -0.1, 0.2]]), 0)
    assert moved.tolist() == [[11.0, 13.0, 19.0, 46.0]]
    boxes = torch.tensor([[0.0, 0.0, 99.0, 99.0], [10.0, 10.0, 29.0, 29.0], [90.0, 90.0, 109.0, 109.0]])
    # The second lies in the first; a quarter of the third does.
    assert mtcnn.not_inside(boxes, 0.7) == [0, 2]
    assert mtcnn.not_inside(boxes, 0.2) == [0]
    assert mtcnn.not_inside(boxes[:0], 0.7) == []


def test_mtcnn_finds_the_landmarks_that_dlib_finds(att):
    theirs = align.detect(att, points=68, attempts=align.THOROUGH)
    found = MTCNN().find(att)
    assert found.found.float().mean() >= 0.95
    both = found.found & theirs.found
    expected = align.arcface_points(theirs.points[both])
    eyes = (expected[:, 0] - expected[:, 1]).norm(dim=1)
    error = (found.points[both] - expected).norm(dim=2).mean(1) / eyes
    # Of the distance between the eyes; the two are trained on annotations that differ.
    assert error.median() < 0.1 and (error < 0.35).all()
    assert (found.score[both] > 0.7).all() and (found.faces[both] >= 1).all()


def test_mtcnn_does_not_depend_on_the_batch(att):
    detector = MTCNN()
    together = detector.find(att[:6])
    alone = [detector.find(att[n : n + 1]) for n in range(6)]
    torch.testing.assert_close(together.points, torch.cat([f.points for f in alone]), atol=1e-3, rtol=0, equal_nan=True)
    # And it finds several faces in one photograph, the largest of which counts.
    wide = torch.zeros(1, 3, 224, 500, dtype=torch.uint8)
    wide[0, :, :, :184] = att[0]
    wide[0, :, 40:152, 300:392] = F.interpolate(att[2:3], (112, 92), mode="bilinear", antialias=True)[0]
    found = detector.find(wide)
    assert found.faces.tolist() == [2]
    assert found.points[0, :, 0].max() < 184
    shrunk = MTCNN(detect_size=250).find(wide)
    torch.testing.assert_close(shrunk.points, found.points, atol=4, rtol=0)


def test_no_face_is_no_face():
    gray = torch.full((2, 3, 64, 80), 128, dtype=torch.uint8)
    for detector in (MTCNN(), Dlib(points=5)):
        found = detector.find(gray)
        assert not found.found.any() and found.points.isnan().all()
        assert found.faces.tolist() == [0, 0] and found.attempt.tolist() == [-1, -1]
        assert found.points.shape[1] == align.SCHEMES[detector.scheme]
    assert not MTCNN().find(torch.zeros(1, 3, 8, 9, dtype=torch.uint8)).found.any()


def test_which_of_several_faces_counts():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60]])
    faces = Faces(boxes, torch.arange(20.0).view(2, 5, 2), torch.tensor([0.9, 0.8]))
    none = Faces(boxes[:0], torch.zeros(0, 5, 2), torch.zeros(0))
    largest = base.chosen([faces, none], "arcface5", "largest")
    best = base.chosen([faces, none], "arcface5", "best")
    assert (
        largest.points[0].tolist() == faces.points[1].tolist() and best.points[0].tolist() == faces.points[0].tolist()
    )
    assert largest.faces.tolist() == [2, 0] and largest.found.tolist() == [True, False]
    assert largest.summary() == {"faces": 2, "found at attempt 1": 1, "not found": 1}


def test_settings_that_make_no_sense(tmp_path):
    for make in (
        lambda: SCRFD(str(tmp_path / "none.onnx")),
        lambda: SCRFD("hf-hub:owner", threshold=2),
        lambda: SCRFD("hf-hub:owner/name/x.onnx", size=8),
        lambda: SCRFD("hf-hub:owner/name/x.pth").provenance(),
        lambda: MTCNN(min_face=3),
        lambda: MTCNN(factor=1.0),
        lambda: MTCNN(choose="nearest"),
        lambda: Dlib(points=7),
        lambda: Dlib(detect_size=10),
    ):
        with pytest.raises(InputError):
            make()
    with pytest.raises(ValueError, match="uint8"):
        Dlib().find(torch.zeros(1, 3, 9, 9))
