"""Small networks in ONNX with the outputs of SCRFD, of which every number is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

STRIDES, ANCHORS, SIDE = (8, 16, 32), 2, 64
#: Anchors of each stride.
COUNTS = [ANCHORS * (SIDE // stride) ** 2 for stride in STRIDES]


def nothing() -> list[np.ndarray]:
    """The nine outputs of a network that sees no face: scores, edges and landmarks of each stride."""
    return [np.zeros((count, width), np.float32) for width in (1, 4, 10) for count in COUNTS]


def write(path: Path, outputs: list[np.ndarray], side: int | str = SIDE, red: int | None = None) -> Path:
    """A network that says ``outputs`` of any image; anchor ``red`` of the first also adds the mean of channel 0."""
    helper, numpy = onnx.helper, onnx.numpy_helper
    names = [f"out{n}" for n in range(len(outputs))]
    nodes = [helper.make_node("Identity", [f"c{n}"], [name]) for n, name in enumerate(names)]
    values = [numpy.from_array(value, f"c{n}") for n, value in enumerate(outputs)]
    if red is not None:
        where = np.zeros_like(outputs[0])
        where[red] = 1
        values += [numpy.from_array(where, "where"), numpy.from_array(np.array([0]), "channel")]
        values += [numpy.from_array(np.array([0, 1, 2, 3]), "axes")]
        nodes[0] = helper.make_node("Add", ["c0", "shift"], ["out0"])
        nodes[:0] = [
            helper.make_node("Gather", ["image", "channel"], ["channels"], axis=1),
            helper.make_node("ReduceMean", ["channels", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["where", "mean"], ["shift"]),
        ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", kind, [1, 3, side, side])],
        [helper.make_tensor_value_info(name, kind, list(value.shape)) for name, value in zip(names, outputs)],
        values,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path
