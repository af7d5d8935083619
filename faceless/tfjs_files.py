"""Recognizers from TensorFlow.js graph models: ``model.json`` and the ``.bin`` files beside it, as an ONNX graph.

Without TensorFlow. A graph model lists operators of TensorFlow (after the converter has merged convolutions, biases
and activations) and says where in the ``.bin`` files its constants are; here each operator becomes one or a few of
ONNX, and the rest is `faceless.onnx_files`. Pictures inside are ``[B, H, W, C]`` there and ``[B, C, H, W]`` here:
values of four axes carry which, and are transposed only where an operator needs the other.

Nothing in such files can run code. Operators that recognizers have no need of are refused, constants are only read from
files in the same folder named without a path, no links, and their sizes are those of the files.

Source: the format is TensorFlow.js's (tfjs-converter, ``weightsManifest``), the operators' definitions are TensorFlow's
(https://www.tensorflow.org/api_docs/python/tf/raw_ops).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from faceless.errors import InputError
from faceless.files import sha256
from faceless.onnx_files import MAX_BYTES, OPSET, OnnxFile, describe, need

MAX_JSON = 64 << 20
MAX_NODES = 20_000
DTYPES = {"float32": np.float32, "int32": np.int32, "bool": np.bool_, "uint8": np.uint8}
QUANTIZED = {"uint8": np.uint8, "uint16": np.uint16, "float16": np.float16}

ELEMENTWISE = {
    "Abs": "Abs",
    "Elu": "Elu",
    "Exp": "Exp",
    "Neg": "Neg",
    "Reciprocal": "Reciprocal",
    "Relu": "Relu",
    "Sigmoid": "Sigmoid",
    "Softplus": "Softplus",
    "Sqrt": "Sqrt",
    "Tanh": "Tanh",
}
BINARY = {
    "Add": "Add",
    "AddV2": "Add",
    "Div": "Div",
    "Maximum": "Max",
    "Minimum": "Min",
    "Mul": "Mul",
    "Pow": "Pow",
    "RealDiv": "Div",
    "Sub": "Sub",
}
REDUCTIONS = {"Max": "ReduceMax", "Mean": "ReduceMean", "Sum": "ReduceSum"}
TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


class GraphError(Exception):
    """What is wrong with a graph, in a few words."""


def read(path: Path, output: str | None = None) -> OnnxFile:
    """Read and check a graph model; nothing is run.

    Args:
        path: its ``model.json`` (whatever it is called).
        output: the node that is the embedding, where that is not the first output.

    Raises:
        InputError: onnx is not installed; the file is damaged, no graph model, too large or names files elsewhere; it
            has operators that are not known here; or its input is no picture.
    """
    need(path)
    if (size := path.stat().st_size) > MAX_JSON:
        raise InputError(f"{path}: {size} bytes are more than the description of a graph has")
    try:
        model = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({type(error).__name__})") from error
    if not isinstance(model, dict) or not isinstance(model.get("modelTopology"), dict):
        raise InputError(f"{path}: no model of TensorFlow.js, which has a 'modelTopology'")
    if "node" not in model["modelTopology"]:
        raise InputError(
            f"{path}: a model of layers; tensorflowjs_converter --input_format=tfjs_layers_model "
            "--output_format=tfjs_graph_model makes it a graph"
        )
    constants, digest = _constants(model, path)
    try:
        translation = _Translation(constants)
        graph = translation.run(model, output)
    except GraphError as error:
        raise InputError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        # Attributes in numbers and kinds that the operators do not have.
        raise InputError(f"{path}: a damaged graph ({type(error).__name__}: {str(error)[:80]})") from error
    file = describe(graph, digest, path)
    if translation.normalizes:
        file.spec = replace(file.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return file


def _constants(model: Mapping[str, Any], path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The numbers of a model by name, and the SHA-256 of all its files together."""
    try:
        groups = [
            ([str(name) for name in group["paths"]], [_Entry(entry) for entry in group["weights"]])
            for group in model["weightsManifest"]
        ]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a damaged list of weights ({type(error).__name__}: {str(error)[:80]})") from error
    found: dict[str, np.ndarray] = {}
    digests = [sha256(path)]
    for names, entries in groups:
        files = [path.parent / name for name in names]
        for name, file in zip(names, files):
            if not name or Path(name).name != name or "\\" in name or file.is_symlink() or not file.is_file():
                raise InputError(f"{path}: wants numbers from {name[:80]!r}, which is no file beside it")
        has, wants = sum(file.stat().st_size for file in files), sum(entry.bytes for entry in entries)
        # A few bytes quantized, or the same file again and again, must not become any amount of memory.
        if has != wants or has > MAX_BYTES or len(set(names)) < len(names):
            raise InputError(f"{path}: {', '.join(names)[:80]} hold {has} bytes where the list of weights has {wants}")
        buffer = b"".join(file.read_bytes() for file in files)
        digests += [sha256(file) for file in files]
        start = 0
        for entry in entries:
            found[entry.name] = entry.read(buffer[start : start + entry.bytes])
            start += entry.bytes
    if wrong := [name for name, value in found.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]:
        raise InputError(f"{path}: {wrong[0][:80]} holds values that are not finite")
    return found, hashlib.sha256("".join(digests).encode()).hexdigest()


class _Entry:
    """One line of the list of weights."""

    def __init__(self, entry: Mapping[str, Any]):
        self.name, self.shape = str(entry["name"]), [int(side) for side in entry["shape"]]
        if any(side < 0 for side in self.shape):
            raise ValueError(f"{self.name} has the shape {self.shape}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.name} is of the type {entry['dtype']!r}")
        self.dtype = np.dtype(DTYPES[entry["dtype"]])
        quantization = entry.get("quantization") or {}
        self.stored = np.dtype(QUANTIZED[quantization["dtype"]] if quantization else self.dtype)
        self.scale, self.minimum = quantization.get("scale"), float(quantization.get("min", 0.0))
        self.bytes = math.prod(self.shape) * self.stored.itemsize

    def read(self, buffer: bytes) -> np.ndarray:
        values: np.ndarray = np.frombuffer(buffer, self.stored).reshape(self.shape)
        if self.scale is not None:
            values = values.astype(np.float32) * np.float32(self.scale) + np.float32(self.minimum)
        return values.astype(self.dtype)


class _Node:
    """One operator, its attributes without the wrapping that JSON gives them."""

    def __init__(self, entry: Mapping[str, Any]):
        self.name, self.op = str(entry["name"]), str(entry["op"])
        # "name:0" is the first output, which every operator known here has alone.
        self.inputs = [str(name).removesuffix(":0") for name in entry.get("input", [])]
        self.given = {str(key): _value(value) for key, value in (entry.get("attr") or {}).items()}

    def numbers(self, key: str) -> list[int]:
        """The attribute of ``[batch, height, width, channels]`` for the two in the middle."""
        batch, height, width, channels = self.given.get(key) or [1, 1, 1, 1]
        if (batch, channels) != (1, 1):
            raise GraphError(f"{self.name}: {key} of batch and channels")
        return [int(height), int(width)]


def _value(wrapped: Mapping[str, Any]) -> Any:
    ((kind, value),) = wrapped.items()
    match kind:
        case "s":
            return _text(value)
        case "i":
            return int(value)
        case "list":
            return [_value({inner: v}) for inner, values in value.items() for v in values or []]
        case "shape":
            return [int(dim.get("size", -1)) for dim in value.get("dim", [])]
    return value


def _text(value: str | Sequence[int]) -> str:
    """Bytes in base64, or one by one."""
    try:
        return (base64.b64decode(value, validate=True) if isinstance(value, str) else bytes(value)).decode("ascii")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise GraphError(f"{str(value)[:40]!r} is no text in base64") from error


class _Translation:
    """From TensorFlow's operators to ONNX's."""

    def __init__(self, constants: dict[str, np.ndarray]):
        self.constants = constants
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.ranks: dict[str, int] = {}  # of values that are computed
        self.nchw: set[str] = set()  # values that have their channels second
        self.normalizes = False  # pixels are first added to or multiplied, so they may come as they are
        self.operators: dict[str, Callable[[_Node], str]] = {
            **dict.fromkeys(ELEMENTWISE, self._elementwise),
            **dict.fromkeys(BINARY, self._binary),
            **dict.fromkeys(REDUCTIONS, self._reduction),
            **dict.fromkeys(("Conv2D", "DepthwiseConv2dNative"), self._convolution),
            **dict.fromkeys(("_FusedConv2D", "FusedDepthwiseConv2dNative"), self._convolution),
            **dict.fromkeys(("MatMul", "_FusedMatMul"), self._product),
            **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), self._batch_norm),
            **dict.fromkeys(("MaxPool", "AvgPool"), self._pool),
            **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), self._pad),
            **dict.fromkeys(("Identity", "StopGradient"), lambda node: node.inputs[0]),
            "BiasAdd": lambda node: self._with_bias(node, *node.inputs),
            "ConcatV2": self._concatenation,
            "LeakyRelu": lambda node: self._activation("LeakyRelu", node.inputs[0], node, []),
            "Prelu": lambda node: self._activation("Prelu", node.inputs[0], node, node.inputs[1:]),
            "Relu6": lambda node: self._activation("Relu6", node.inputs[0], node, []),
            "Reshape": self._reshape,
            "Rsqrt": lambda node: self._like("Reciprocal", [self._like("Sqrt", node.inputs)]),
            "Softmax": self._softmax,
            "Square": lambda node: self._like("Mul", node.inputs * 2),
            "Squeeze": self._squeeze,
        }

    def run(self, model: Mapping[str, Any], output: str | None) -> Any:
        """The whole as an ``onnx.ModelProto``."""
        import onnx
        from onnx import TensorProto, helper

        nodes = [_Node(entry) for entry in model["modelTopology"]["node"]]
        if len(nodes) > MAX_NODES:
            raise GraphError(f"{len(nodes)} nodes")
        by_name = {node.name: node for node in nodes}
        inputs = [node for node in nodes if node.op == "Placeholder"]
        if len(inputs) != 1 or len(inputs[0].given.get("shape") or []) != 4:
            names = ", ".join(node.name for node in inputs[:3])
            raise GraphError(f"takes {names or 'nothing'}; one batch of pictures [B, H, W, 3] is wanted")
        sides = [max(int(side), 0) for side in inputs[0].given["shape"]]
        if sides[3] != 3 or inputs[0].given.get("dtype") not in (None, "DT_FLOAT"):
            raise GraphError(f"takes {sides} of {inputs[0].given.get('dtype')}; [B, H, W, 3] of DT_FLOAT is wanted")
        used = {name for node in nodes for name in node.inputs}
        # Converters that trace functions write down the outputs; of the others they are what nobody reads.
        written = (model.get("signature") or model.get("userDefinedMetadata", {}).get("signature") or {}).get("outputs")
        outputs = [str(key).removesuffix(":0") for key in written or {}]
        outputs = [name for name in outputs if name in by_name] or [
            node.name for node in nodes if node.name not in used and node.op not in ("Const", "NoOp")
        ]
        if output is not None and output not in by_name:
            raise GraphError(f"has no node {output[:80]!r} for an output; it gives {', '.join(outputs[:8])[:200]}")
        if not outputs:
            raise GraphError("gives nothing")
        target = output or outputs[0]
        self.normalizes = any(inputs[0].name in node.inputs and node.op in BINARY for node in nodes)
        self.ranks[inputs[0].name] = 4
        self.nchw.add(inputs[0].name)
        values = {inputs[0].name: inputs[0].name}
        for node in _sorted(by_name, target):
            if node.op == "Const":
                if node.name not in self.constants:
                    raise GraphError(f"{node.name[:80]} has no numbers in the list of weights")
                values[node.name] = node.name
            elif node.op != "Placeholder":
                if node.op not in self.operators:
                    raise GraphError(f"{node.name[:80]} is of the kind {node.op[:40]!r}, which is not known here")
                node.inputs = [values[name] for name in node.inputs]
                values[node.name] = self.operators[node.op](node)
        result = self._nhwc(values[target])
        self._emit("Identity", [result], name="embedding")
        channels_first = [sides[0] or "batch", 3, sides[1] or "height", sides[2] or "width"]
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(inputs[0].name, TensorProto.FLOAT, channels_first)],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    # What operators are made of.

    def _emit(self, kind: str, inputs: Sequence[str], *, name: str = "", **given: Any) -> str:
        from onnx import helper

        for value in inputs:
            if value in self.constants:
                self.initializers[value] = self.constants[value]
        output = name or f"node_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **given))
        return output

    def _constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    def _fixed(self, node: _Node, position: int) -> np.ndarray:
        """An input that has to be a constant."""
        name = node.inputs[position]
        if name not in self.constants:
            raise GraphError(f"{node.name[:80]}: input {position} is computed; a constant is wanted")
        return self.constants[name]

    def _rank(self, name: str) -> int:
        return self.constants[name].ndim if name in self.constants else self.ranks[name]

    def _known(self, name: str, rank: int, nchw: bool) -> str:
        self.ranks[name] = rank
        if nchw:
            self.nchw.add(name)
        return name

    def _like(self, kind: str, inputs: Sequence[str], **given: Any) -> str:
        """An operator of each number by itself."""
        return self._known(self._emit(kind, inputs, **given), self._rank(inputs[0]), inputs[0] in self.nchw)

    def _nchw(self, name: str) -> str:
        if name in self.nchw:
            return name
        if self._rank(name) != 4:
            raise GraphError(f"{name[:80]} has {self._rank(name)} axes where a batch of maps is wanted")
        if name in self.constants:
            return self._known(self._constant(self.constants[name].transpose(TO_NCHW)), 4, True)
        return self._known(self._emit("Transpose", [name], perm=TO_NCHW), 4, True)

    def _nhwc(self, name: str) -> str:
        return self._known(self._emit("Transpose", [name], perm=TO_NHWC), 4, False) if name in self.nchw else name

    def _per_channel(self, name: str, maps: str) -> str:
        """``[C]`` so that it goes along the channels of ``maps``."""
        if maps not in self.nchw:
            return name
        return self._constant(self.constants[name].reshape(-1, 1, 1))

    # Operators.

    def _elementwise(self, node: _Node) -> str:
        return self._like(ELEMENTWISE[node.op], node.inputs[:1])

    def _binary(self, node: _Node) -> str:
        a, b = node.inputs
        if {a, b} & self.nchw:
            a, b = self._beside(a), self._beside(b)
        rank = max(self._rank(a), self._rank(b))
        return self._known(self._emit(BINARY[node.op], [a, b]), rank, bool({a, b} & self.nchw))

    def _beside(self, name: str) -> str:
        """A value so that it broadcasts against ``[B, C, H, W]``."""
        rank = self._rank(name)
        if name in self.nchw or rank == 0:
            return name
        if name not in self.constants:
            if rank != 4:
                raise GraphError(f"{name[:80]} has {rank} axes beside a batch of maps")
            return self._nchw(name)
        value = self.constants[name]
        # As TensorFlow broadcasts: missing axes are put in front.
        return self._constant(value.reshape((1,) * (4 - value.ndim) + value.shape).transpose(TO_NCHW))

    def _convolution(self, node: _Node) -> str:
        maps, kernel = self._nchw(node.inputs[0]), self._fixed(node, 1)
        if node.given.get("data_format", "NHWC") != "NHWC":
            raise GraphError(f"{node.name[:80]}: data_format {node.given['data_format']!r}")
        depthwise = "Depthwise" in node.op
        groups = kernel.shape[2] if depthwise else 1
        kernel = kernel.transpose(2, 3, 0, 1) if depthwise else kernel.transpose(3, 2, 0, 1)
        if depthwise:
            kernel = kernel.reshape(-1, 1, *kernel.shape[2:])
        given: dict[str, Any] = {
            "strides": node.numbers("strides"),
            "dilations": node.numbers("dilations"),
            "kernel_shape": list(kernel.shape[2:]),
            "group": groups,
            **self._padding(node),
        }
        name = self._constant(np.ascontiguousarray(kernel))
        fused, rest = node.given.get("fused_ops") or [], node.inputs[2:]
        biased = fused[:1] == ["BiasAdd"]
        inputs = [maps, name, *rest[:1]] if biased else [maps, name]
        found = self._known(self._emit("Conv", inputs, **given), 4, True)
        return self._fused(node, found, fused[1:] if biased else fused, rest[1:] if biased else rest)

    def _padding(self, node: _Node) -> dict[str, Any]:
        match node.given.get("padding"):
            case "SAME":
                return {"auto_pad": "SAME_UPPER"}
            case "VALID":
                return {"auto_pad": "VALID"}
            case "EXPLICIT":
                batch, after, top, bottom, left, right, channels, end = node.given["explicit_paddings"]
                if not batch == after == channels == end == 0:
                    raise GraphError(f"{node.name[:80]}: padding of batch and channels")
                return {"pads": [top, left, bottom, right]}
        raise GraphError(f"{node.name[:80]}: padding {node.given.get('padding')!r}")

    def _product(self, node: _Node) -> str:
        a, b = (self._nhwc(name) for name in node.inputs[:2])
        if self._rank(a) != 2 or self._rank(b) != 2:
            raise GraphError(f"{node.name[:80]}: a product of {self._rank(a)} and {self._rank(b)} axes")
        a, b = (
            self._emit("Transpose", [x], perm=[1, 0]) if node.given.get(key) else x
            for x, key in ((a, "transpose_a"), (b, "transpose_b"))
        )
        found = self._known(self._emit("MatMul", [a, b]), 2, False)
        return self._fused(node, found, node.given.get("fused_ops") or [], node.inputs[2:])

    def _fused(self, node: _Node, value: str, operators: Sequence[str], rest: Sequence[str]) -> str:
        rest = list(rest)
        for kind in operators:
            if kind == "BiasAdd":
                value = self._with_bias(node, value, rest.pop(0))
            else:
                value = self._activation(kind, value, node, rest)
        return value

    def _with_bias(self, node: _Node, value: str, bias: str) -> str:
        if bias not in self.constants or self.constants[bias].ndim != 1:
            raise GraphError(f"{node.name[:80]}: a bias that is no list of constants")
        return self._like("Add", [value, self._per_channel(bias, value)])

    def _activation(self, kind: str, value: str, node: _Node, rest: Sequence[str]) -> str:
        match kind:
            case "Relu6":
                bounds = [self._constant(np.array(bound, np.float32)) for bound in (0, 6)]
                return self._like("Clip", [value, *bounds])
            case "LeakyRelu":
                # Of the operator itself the key is "alpha".
                slope = node.given.get("alpha", node.given.get("leakyrelu_alpha", 0.2))
                return self._like("LeakyRelu", [value], alpha=float(slope))
            case "Prelu":
                slopes = rest[0]
                if slopes not in self.constants:
                    raise GraphError(f"{node.name[:80]}: slopes that are computed")
                flat = self._constant(self.constants[slopes].reshape(self.constants[slopes].shape[-3:]))
                return self._like("PRelu", [value, self._slopes(flat) if value in self.nchw else flat])
            case _ if kind in ELEMENTWISE:
                return self._like(ELEMENTWISE[kind], [value])
        raise GraphError(f"{node.name[:80]}: the activation {kind[:40]!r} is not known here")

    def _slopes(self, name: str) -> str:
        """``[C]`` or ``[H, W, C]`` for maps with their channels first."""
        value = self.constants[name]
        if value.ndim == 1:
            return self._constant(value.reshape(-1, 1, 1))
        return self._constant(np.ascontiguousarray(value.transpose(2, 0, 1)))

    def _batch_norm(self, node: _Node) -> str:
        if node.given.get("is_training"):
            raise GraphError(f"{node.name[:80]}: batch normalization in training")
        if any(name not in self.constants for name in node.inputs[1:5]):
            raise GraphError(f"{node.name[:80]}: batch normalization with statistics that are computed")
        maps = self._nchw(node.inputs[0])
        epsilon = float(node.given.get("epsilon", 1e-4))
        return self._known(self._emit("BatchNormalization", [maps, *node.inputs[1:5]], epsilon=epsilon), 4, True)

    def _pool(self, node: _Node) -> str:
        kind = {"MaxPool": "MaxPool", "AvgPool": "AveragePool"}[node.op]
        given = {"kernel_shape": node.numbers("ksize"), "strides": node.numbers("strides"), **self._padding(node)}
        return self._known(self._emit(kind, [self._nchw(node.inputs[0])], **given), 4, True)

    def _pad(self, node: _Node) -> str:
        value, pads = node.inputs[0], self._fixed(node, 1).astype(np.int64)
        mode = {"REFLECT": "reflect", "SYMMETRIC": ""}[node.given["mode"]] if node.op == "MirrorPad" else "constant"
        if not mode:
            raise GraphError(f"{node.name[:80]}: symmetric padding")
        if value in self.nchw:
            pads = pads[TO_NCHW]
        inputs = [value, self._constant(pads.T.reshape(-1))]
        if node.op == "PadV2":
            inputs.append(self._constant(self._fixed(node, 2).astype(np.float32).reshape(())))
        return self._like("Pad", inputs, mode=mode)

    def _reduction(self, node: _Node) -> str:
        value, keep = node.inputs[0], bool(node.given.get("keep_dims"))
        rank = self._rank(value)
        axes = sorted(int(axis) % rank for axis in self._fixed(node, 1).flatten())
        if value in self.nchw and not keep and axes != [1, 2]:
            value = self._nhwc(value)  # what is left would be in another order
        if first := value in self.nchw:
            axes = sorted(TO_NCHW.index(axis) for axis in axes)
        kind = REDUCTIONS[node.op]
        given: dict[str, Any] = {"keepdims": int(keep)}
        if kind == "ReduceSum":  # the only one that has its axes as an input in this version
            found = self._emit(kind, [value, self._constant(np.array(axes, np.int64))], **given)
        else:
            found = self._emit(kind, [value], axes=axes, **given)
        return self._known(found, rank if keep else rank - len(axes), first and keep)

    def _reshape(self, node: _Node) -> str:
        shape = self._fixed(node, 1).astype(np.int64).flatten()
        value = self._nhwc(node.inputs[0])
        return self._known(self._emit("Reshape", [value, self._constant(shape)]), len(shape), False)

    def _squeeze(self, node: _Node) -> str:
        value = node.inputs[0]
        rank = self._rank(value)
        axes = sorted(int(axis) % rank for axis in node.given.get("squeeze_dims") or [])
        if not axes:
            raise GraphError(f"{node.name[:80]}: a squeeze without its axes")
        if value in self.nchw and axes == [1, 2]:
            axes = [2, 3]
        else:
            value = self._nhwc(value)
        found = self._emit("Squeeze", [value, self._constant(np.array(axes, np.int64))])
        return self._known(found, rank - len(axes), False)

    def _concatenation(self, node: _Node) -> str:
        *parts, _ = node.inputs
        axis = int(self._fixed(node, len(parts)).reshape(()))
        rank = self._rank(parts[0])
        axis %= rank
        if first := bool(set(parts) & self.nchw):
            parts, axis = [self._nchw(part) for part in parts], TO_NCHW.index(axis)
        return self._known(self._emit("Concat", parts, axis=axis), rank, first)

    def _softmax(self, node: _Node) -> str:
        value = self._nhwc(node.inputs[0])
        return self._like("Softmax", [value], axis=-1)


def _sorted(nodes: Mapping[str, _Node], target: str) -> list[_Node]:
    """What ``target`` needs, each after what it needs itself."""
    order: list[_Node] = []
    done: set[str] = set()
    waiting: set[str] = set()
    stack = [(target, False)]
    while stack:
        name, ready = stack.pop()
        if ready:
            waiting.discard(name)
            done.add(name)
            order.append(nodes[name])
        elif name not in done:
            if name not in nodes:
                raise GraphError(f"{name[:80]} is wanted and not there")
            if name in waiting:
                raise GraphError(f"{name[:80]} needs itself")
            waiting.add(name)
            stack += [(name, True), *((inner, False) for inner in nodes[name].inputs if inner not in done)]
    return order
