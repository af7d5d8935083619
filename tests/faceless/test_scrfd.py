"""SCRFD on networks of which every output is known; tests/official compares with InsightFace's own code."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from faceless.detectors import SCRFD
from faceless.errors import InputError

pytest.importorskip("onnxruntime")
tiny_onnx = pytest.importorskip("tests.faceless.tiny_onnx")


@pytest.fixture
def network(tmp_path):
    """A face at anchor (32, 16) of stride 16, a worse one that overlaps, and another at (0, 56) of stride 8."""
    outputs = tiny_onnx.nothing()
    middle = (1 * 4 + 2) * 2 + 1
    outputs[1][middle], outputs[4][middle] = 0.9, [1, 1, 1, 2]
    outputs[7][middle] = [-0.5, 0, 0.5, 0, 0, 0.5, -0.5, 1, 0.5, 1]
    outputs[1][middle - 1], outputs[4][middle - 1] = 0.8, [1, 1, 1, 1.9]
    corner = (7 * 8 + 0) * 2
    outputs[0][corner], outputs[3][corner], outputs[6][corner] = 0.6, [0, 1, 1, 0], np.arange(10) / 8
    return tiny_onnx.write(tmp_path / "scrfd.onnx", outputs)


def test_scrfd_decodes_what_is_known(network):
    (faces,) = SCRFD(str(network)).faces(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert faces.scores.tolist() == pytest.approx([0.9, 0.6])
    assert faces.boxes.tolist() == [[16, 0, 48, 48], [0, 48, 8, 56]]
    assert faces.points[0].tolist() == [[24, 16], [40, 16], [32, 24], [24, 32], [40, 32]]
    assert faces.points[1].tolist() == [[2 * i, 56 + 2 * i + 1] for i in range(5)]
    # A photograph of twice the size, and the largest face of it.
    found = SCRFD(str(network)).find(torch.zeros(2, 3, 128, 96, dtype=torch.uint8))
    assert found.points[1, 0].tolist() == [48, 32] and found.faces.tolist() == [2, 2]
    best = SCRFD(str(network), threshold=0.85).find(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert best.faces.tolist() == [1]
    loose = SCRFD(str(network), overlap=0.99).find(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert loose.faces.tolist() == [3]


def test_scrfd_sees_red_first_and_sees_it_as_trained(tmp_path):
    outputs = tiny_onnx.nothing()
    outputs[3][5] = 1
    detector = SCRFD(str(tiny_onnx.write(tmp_path / "red.onnx", outputs, side="side", red=5)), size=64)
    red = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    red[:, 0] = 255
    assert detector.find(red).score[0] == pytest.approx(127.5 / 128)
    assert not detector.find(red.flip(1)).found.any()
    again = pickle.loads(pickle.dumps(detector))
    assert again.find(red).score[0] == pytest.approx(127.5 / 128)


def test_networks_of_strangers(tmp_path):
    blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    good = tiny_onnx.nothing()
    broken = [value.copy() for value in good]
    broken[4][0, 0] = np.nan
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\x08\x09" * 50)
    for path, expected in (
        (tiny_onnx.write(tmp_path / "boxes.onnx", good[:6]), "without landmarks"),
        (tiny_onnx.write(tmp_path / "seven.onnx", good[:7]), "7 outputs are no SCRFD"),
        (tiny_onnx.write(tmp_path / "nan.onnx", broken), "NaN"),
        (tiny_onnx.write(tmp_path / "shape.onnx", [*good[:8], good[8][:-1]]), r"\[7, 10\] in the place of \[8, 10\]"),
        (tiny_onnx.write(tmp_path / "odd.onnx", good, side=60), "multiple of 32"),
        (garbage, "onnxruntime cannot read it"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            SCRFD(str(path)).find(blank)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)
