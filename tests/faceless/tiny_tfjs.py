"""Small TensorFlow.js graph models, and what TensorFlow.js makes of them.

``tfjs_expected.json`` holds the outputs of TensorFlow.js itself, for numbers that both sides compute from a formula:

    npm install @tensorflow/tfjs && python tests/faceless/tiny_tfjs.py node_modules tests/faceless/tfjs_expected.json
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RUN = """
const fs = require("fs"), path = require("path");
const [modules, file, output] = process.argv.slice(1);
const tf = require(path.resolve(modules, "@tensorflow/tfjs"));
(async () => {
  await tf.setBackend("cpu");
  const model = JSON.parse(fs.readFileSync(file));
  const shards = model.weightsManifest.flatMap((group) => group.paths);
  const data = Buffer.concat(shards.map((name) => fs.readFileSync(path.join(path.dirname(file), name))));
  const artifacts = {
    modelTopology: model.modelTopology,
    signature: model.signature,
    weightSpecs: model.weightsManifest.flatMap((group) => group.weights),
    weightData: data.buffer.slice(data.byteOffset, data.byteOffset + data.length),
  };
  const graph = await tf.loadGraphModel(tf.io.fromMemory(artifacts));
  const { shape, values } = JSON.parse(fs.readFileSync(0));
  const found = graph.execute(tf.tensor(values, shape), output);
  console.log(JSON.stringify({ shape: found.shape, values: Array.from(found.dataSync()) }));
})();
"""


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """The same for everybody: a sine of the position."""
    count = int(np.prod(shape))
    return np.sin(np.arange(count, dtype=np.float64) * 0.7 + seed).astype(np.float32).reshape(shape)


def pictures(side: int = 9) -> np.ndarray:
    """``[2, side, side, 3]``"""
    return numbers(2, side, side, 3, seed=5)


class Graph:
    """A graph model under construction; every method returns the name of what it adds."""

    def __init__(self, side: int = 9):
        self.nodes: list[dict] = []
        self.weights: list[tuple[str, np.ndarray, dict]] = []
        sizes = [{"size": str(v)} for v in (-1, side, side, 3)]
        self.add("Placeholder", [], name="faces", dtype={"type": "DT_FLOAT"}, shape={"shape": {"dim": sizes}})

    def add(self, op: str, inputs: list[str], name: str = "", **given) -> str:
        name = name or f"{op}/{len(self.nodes)}"
        if "Conv2" in op:
            given = {"data_format": "NHWC", "dilations": [1, 1, 1, 1], **given}
        self.nodes.append(
            {"name": name, "op": op, "input": inputs, "attr": {k: attribute(v) for k, v in given.items()}}
        )
        return name

    def constant(self, value, kind=np.float32, quantization=None) -> str:
        name = self.add("Const", [])
        self.weights.append((name, np.asarray(value, kind), quantization or {}))
        return name

    def write(self, folder: Path, output: str, signature: bool = True) -> Path:
        entries, data = [], b""
        for name, value, quantization in self.weights:
            entry = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype)}
            stored = value
            if quantization:
                entry["quantization"] = quantization
                stored = value.astype(quantization["dtype"])
                entry["dtype"] = quantization.get("original_dtype", "float32")
            entries.append(entry)
            data += stored.tobytes()
        half = len(data) // 2
        (folder / "one.bin").write_bytes(data[:half])
        (folder / "two.bin").write_bytes(data[half:])
        model = {
            "format": "graph-model",
            "modelTopology": {"node": self.nodes, "library": {}, "versions": {"producer": 1, "minConsumer": 1}},
            "weightsManifest": [{"paths": ["one.bin", "two.bin"], "weights": entries}],
        }
        if signature:
            model["signature"] = {"outputs": {f"{output}:0": {"name": f"{output}:0"}}}
        file = folder / "model.json"
        file.write_text(json.dumps(model))
        return file


def attribute(value):
    """As protocol buffers become JSON: bytes in base64, whole numbers as text."""
    match value:
        case dict():
            return value
        case bool():
            return {"b": value}
        case int():
            return {"i": str(value)}
        case float():
            return {"f": value}
        case str():
            return {"s": base64.b64encode(value.encode()).decode()}
        case [str(), *_]:
            return {"list": {"s": [base64.b64encode(v.encode()).decode() for v in value]}}
    return {"list": {"i": [str(v) for v in value]}}


def convolutional() -> tuple[Graph, str]:
    """Convolutions with all that the converter merges into them, and a linear layer on a flattened map."""
    g = Graph()
    one = [1, 1, 1, 1]
    x = g.add("Sub", ["faces", g.constant(0.25)])
    x = g.add("Mul", [x, g.constant(1.5)])
    x = g.add(
        "_FusedConv2D",
        [x, g.constant(numbers(3, 3, 3, 4)), g.constant(numbers(4, seed=1)), g.constant(numbers(4, seed=2))],
        strides=[1, 2, 2, 1],
        padding="SAME",
        fused_ops=["BiasAdd", "Prelu"],
        num_args=2,
        epsilon=0.0,
    )
    x = g.add(
        "FusedDepthwiseConv2dNative",
        [x, g.constant(numbers(3, 3, 4, 2, seed=3)), g.constant(numbers(8, seed=4))],
        strides=one,
        padding="SAME",
        fused_ops=["BiasAdd", "Relu6"],
        num_args=1,
    )
    pads = [[0, 0], [0, 1], [1, 0], [0, 0]]
    x = g.add("Pad", [x, g.constant(pads, np.int32)])
    x = g.add(
        "DepthwiseConv2dNative", [x, g.constant(numbers(2, 2, 8, 1, seed=6))], strides=[1, 2, 2, 1], padding="VALID"
    )
    x = g.add("BiasAdd", [x, g.constant(numbers(8, seed=7))])
    statistics = [g.constant(numbers(8, seed=s) ** 2 + 0.5) for s in (8, 9, 10, 11)]
    x = g.add("FusedBatchNormV3", [x, *statistics], epsilon=0.001, is_training=False)
    x = g.add("Conv2D", [x, g.constant(numbers(1, 1, 8, 6, seed=12))], strides=one, padding="VALID")
    x = g.add("LeakyRelu", [x], alpha=0.1)
    x = g.add("Reshape", [x, g.constant([-1, 54], np.int32)])
    x = g.add(
        "_FusedMatMul",
        [x, g.constant(numbers(54, 10, seed=13)), g.constant(numbers(10, seed=14))],
        fused_ops=["BiasAdd", "Elu"],
        num_args=1,
        transpose_a=False,
        transpose_b=False,
    )
    return g, g.add("Identity", [x])


def elementary() -> tuple[Graph, str]:
    """A PReLU in pieces, numbers that broadcast in each way, pools, and the length of an embedding in pieces."""
    g = Graph()
    pads = [[0, 0], [1, 1], [1, 1], [0, 0]]
    x = g.add("MirrorPad", ["faces", g.constant(pads, np.int32)], mode="REFLECT")
    x = g.add(
        "Conv2D",
        [x, g.constant(numbers(3, 3, 3, 4))],
        strides=[1, 1, 1, 1],
        padding="EXPLICIT",
        explicit_paddings=[0, 0, 1, 0, 0, 1, 0, 0],
    )
    absolute = g.add("Abs", [x])
    negative = g.add("Mul", [g.add("Sub", [x, absolute]), g.constant(numbers(4, seed=1) * 0.5)])
    x = g.add("AddV2", [g.add("Relu", [x]), negative])
    x = g.add("Maximum", [x, g.constant(-0.5)])
    x = g.add("Minimum", [g.constant(numbers(1, 1, 1, 4, seed=2) + 1.5), x])
    peak = g.add("MaxPool", [x], ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], padding="SAME")
    mean = g.add("AvgPool", [x], ksize=[1, 2, 2, 1], strides=[1, 2, 2, 1], padding="VALID")
    x = g.add("AddV2", [peak, mean])
    gate = g.add("Mean", [x, g.constant([1, 2], np.int32)], keep_dims=True)
    gate = g.add("Sigmoid", [g.add("Softplus", [gate])])
    x = g.add("ConcatV2", [g.add("Mul", [x, gate]), g.add("Tanh", [x]), g.constant(-1, np.int32)])
    x = g.add("PadV2", [x, g.constant([[0, 0], [1, 0], [0, 1], [1, 0]], np.int32), g.constant(0.5)])
    slopes = g.constant(numbers(6, 6, 9, seed=4))
    x = g.add("Prelu", [x, slopes])
    x = g.add("Sub", [x, g.add("Max", [x, g.constant([3], np.int32)], keep_dims=True)])
    rows = g.add("Sum", [x, g.constant([1], np.int32)], keep_dims=False)
    rows = g.add("Mean", [rows, g.constant([1], np.int32)], keep_dims=False)
    x = g.add("Squeeze", [g.add("Mean", [x, g.constant([1, 2], np.int32)], keep_dims=True)], squeeze_dims=[1, 2])
    x = g.add("AddV2", [x, g.add("Softmax", [rows])])
    length = g.add("Sum", [g.add("Square", [x]), g.constant([1], np.int32)], keep_dims=True)
    return g, g.add("Mul", [x, g.add("Rsqrt", [g.add("Maximum", [length, g.constant(1e-10)])])])


def quantized() -> tuple[Graph, str]:
    """Numbers in one and two bytes and in half precision."""
    g = Graph()
    kernel = np.arange(81) % 7
    x = g.add(
        "Conv2D",
        ["faces", g.constant(kernel.reshape(3, 3, 3, 3), np.uint8, {"dtype": "uint8", "scale": 0.25, "min": -0.75})],
        strides=[1, 2, 2, 1],
        padding="SAME",
    )
    x = g.add("Mean", [x, g.constant([1, 2], np.int32)])
    x = g.add("Mul", [x, g.constant([100, 2000, 30000], np.uint16, {"dtype": "uint16", "scale": 1e-4, "min": 0.5})])
    return g, g.add(
        "AddV2", [x, g.constant([0.1, 0.2, 0.3], quantization={"dtype": "float16", "original_dtype": "float32"})]
    )


GRAPHS = {"convolutional": convolutional, "elementary": elementary, "quantized": quantized}


def reference(modules: Path, file: Path, output: str, faces: np.ndarray) -> np.ndarray:
    """What TensorFlow.js gives for ``[B, H, W, 3]``."""
    given = json.dumps({"shape": list(faces.shape), "values": faces.flatten().tolist()})
    command = ["node", "-e", RUN, str(modules), str(file), output]
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    return np.array(found["values"], np.float32).reshape(found["shape"])


def main() -> None:
    expected = {}
    for name, build in GRAPHS.items():
        with tempfile.TemporaryDirectory() as folder:
            graph, output = build()
            file = graph.write(Path(folder), output)
            expected[name] = [
                [round(float(v), 6) for v in row] for row in reference(Path(sys.argv[1]), file, output, pictures())
            ]
    Path(sys.argv[2]).write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
