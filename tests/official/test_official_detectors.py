"""Our detectors against deepinsight/insightface's SCRFD and timesler/facenet-pytorch's MTCNN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceless import assets
from faceless.detectors import MTCNN, SCRFD

pytestmark = pytest.mark.official
tiny_onnx = pytest.importorskip("tests.faceless.tiny_onnx")


@pytest.fixture(autouse=True)
def single(double):
    """Networks that are used as they are trained."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_scrfd_decodes_as_insightface(official, tmp_path, seed):
    pytest.importorskip("cv2", reason="InsightFace's code needs opencv-python-headless")
    theirs = official("deepinsight/insightface", "python-package/insightface/model_zoo/scrfd.py")
    rng = np.random.default_rng(seed)
    outputs = [rng.random(value.shape, dtype=np.float32) * 2 for value in tiny_onnx.nothing()]
    for level in range(3):
        outputs[level] /= 2
    path = str(tiny_onnx.write(tmp_path / "x.onnx", outputs))
    detector = theirs.SCRFD(path)
    for height, width in ((64, 64), (128, 128)):  # of which the resizing is no matter: the outputs are always the same
        boxes, points = detector.detect(np.zeros((height, width, 3), np.uint8), input_size=(64, 64))
        (ours,) = SCRFD(path).faces(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        assert len(ours.scores) == len(boxes) > 5
        np.testing.assert_allclose(torch.cat([ours.boxes, ours.scores[:, None]], 1), boxes, rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(ours.points, points, rtol=1e-6, atol=1e-4)


def test_mtcnn_is_facenet_pytorchs(official):
    utils = "models/utils/detect_face.py"
    module = official("timesler/facenet-pytorch", "models/mtcnn.py", {".utils": utils, ".utils.detect_face": utils})
    nets = [module.PNet(pretrained=False), module.RNet(pretrained=False), module.ONet(pretrained=False)]
    for net, letter in zip(nets, "pro"):
        net.load_state_dict(torch.load(assets.fetch(f"mtcnn-{letter}net"), weights_only=True))
    folder = assets.fetch("att-faces")
    photos = [np.array(Image.open(folder / f"s{n}" / "1.pgm").convert("RGB")) for n in range(1, 9)]
    faces = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    large = F.interpolate(faces[:6], scale_factor=2, mode="bilinear")
    mosaic = torch.cat([torch.cat(list(large[:3]), 2), torch.cat(list(large[3:]), 2)], 1)[None]
    worst = 0.0
    for images in (faces, large, mosaic):
        with torch.no_grad():
            boxes, points = module.detect_face(
                images.permute(0, 2, 3, 1).numpy(), 20, *nets, [0.6, 0.7, 0.7], 0.709, torch.device("cpu")
            )
        for ours, box, point in zip(MTCNN().faces(images), boxes, points):
            box, point = box.astype(np.float32), point.astype(np.float32)  # they are arrays of objects
            assert len(ours.scores) == len(box)
            worst = max(worst, float(np.abs(ours.points.numpy() - point).max()) if len(box) else 0.0)
            np.testing.assert_allclose(torch.cat([ours.boxes, ours.scores[:, None]], 1), box, atol=0.02, rtol=1e-4)
            np.testing.assert_allclose(ours.points, point, atol=0.02, rtol=1e-4)
    print(f"landmarks differ by {worst:.1e} pixels at most")
