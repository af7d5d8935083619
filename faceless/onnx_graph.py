"""ONNX graphs as PyTorch networks: differentiable, on any device, with their batch normalization intact.

Only for the operators that recognizers are made of. A graph is a list of tensor operations and nothing else here:
unknown operators, foreign domains, functions and loops are refused, and nothing that a file names is looked up anywhere
but in `OPERATORS`.

Source: the operators' definitions at https://onnx.ai/onnx/operators.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_NODES = 20_000
Attributes = dict[str, Any]


class UnconvertibleError(Exception):
    """A graph that is not made of what we know; the message says of what else."""


def _numbers(value: Tensor | Sequence[int] | None) -> list[int] | None:
    if value is None or isinstance(value, Tensor):
        return None if value is None else [int(v) for v in value.flatten().tolist()]
    return [int(v) for v in value]


def _axes(inputs: Sequence[Any], given: Attributes) -> list[int] | None:
    """Axes are an attribute in old versions of an operator and its second input in new ones."""
    return _numbers(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else _numbers(given.get("axes"))


def _padded(x: Tensor, kernel: Sequence[int], given: Attributes, fill: float) -> tuple[Tensor, list[int]]:
    """The map with whatever padding is not the same on both sides, and the padding that is left, per side."""
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    mode = given.get("auto_pad", b"NOTSET").decode()
    if mode.startswith("SAME"):
        begin, end = [], []
        for side, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations):
            total = max(0, (-(-side // stride) - 1) * stride + (k - 1) * dilation + 1 - side)
            begin.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
            end.append(total - begin[-1])
    else:
        pads = [0] * 4 if mode == "VALID" else given.get("pads", [0] * 4)
        begin, end = list(pads[:2]), list(pads[2:])
    if begin == end:
        return x, begin
    return F.pad(x, [begin[1], end[1], begin[0], end[0]], value=fill), [0, 0]


def _conv(given: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 4:
        raise UnconvertibleError("Conv that is not two-dimensional")
    x, padding = _padded(x, weight.shape[2:], given, 0.0)
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    return F.conv2d(x, weight, bias, strides, padding, dilations, given.get("group", 1))


def _max_pool(given: Attributes, x: Tensor) -> Tensor:
    kernel = given["kernel_shape"]
    x, padding = _padded(x, kernel, given, -math.inf)
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    return F.max_pool2d(x, kernel, strides, padding, dilations, bool(given.get("ceil_mode", 0)))


def _average_pool(given: Attributes, x: Tensor) -> Tensor:
    kernel = given["kernel_shape"]
    counted = bool(given.get("count_include_pad", 0))
    before = x.shape
    x, padding = _padded(x, kernel, given, 0.0)
    if x.shape != before and not counted:
        raise UnconvertibleError("AveragePool with uneven padding")
    strides = given.get("strides", [1, 1])
    return F.avg_pool2d(x, kernel, strides, padding, bool(given.get("ceil_mode", 0)), counted)


def _prelu(given: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    if slope.numel() == 1 or (slope.ndim == 3 and x.ndim == 4 and slope.shape[1:] == (1, 1)):
        return F.prelu(x, slope.flatten())
    return torch.where(x >= 0, x, slope * x)


def _gemm(given: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if given.get("transA", 0) else a
    product = a @ (b.T if given.get("transB", 0) else b) * given.get("alpha", 1.0)
    return product if c is None else product + c * given.get("beta", 1.0)


def _reshape(given: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = [int(v) for v in shape.tolist()]
    if not given.get("allowzero", 0):
        wanted = [x.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
    return torch.reshape(x, wanted)


def _flatten(given: Attributes, x: Tensor) -> Tensor:
    axis = given.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(given: Attributes, *inputs: Any) -> Tensor:
    axes = _axes(inputs, given)
    x: Tensor = inputs[0]
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(given: Attributes, *inputs: Any) -> Tensor:
    x: Tensor = inputs[0]
    axes = _axes(inputs, given) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(given: Attributes, *inputs: Any) -> Tensor:
    x: Tensor = inputs[0]
    rest = [_numbers(value) for value in inputs[1:]] + [None] * (5 - len(inputs))
    starts, ends, axes, steps = rest if rest[0] is not None else [given.get(k) for k in ("starts", "ends", "axes", "-")]
    if starts is None or ends is None:
        raise UnconvertibleError("Slice without its bounds")
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps or [1] * len(starts)):
        chosen = range(x.shape[axis])[slice(start, end if abs(end) < 2**31 else None, step)]
        x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.long, device=x.device))
    return x


def _split(given: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = given.get("axis", 0)
    parts = _numbers(sizes) or given.get("split")
    if parts is None:
        count = given.get("num_outputs") or given["outputs"]
        return x.split(-(-x.shape[axis] // count), axis)
    return x.split(list(parts), axis)


def _gather(given: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = given.get("axis", 0) % x.ndim
    flat = index.flatten().to(x.device)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return torch.reshape(x.index_select(axis, flat), (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _clip(given: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = [float(value) if value is not None else given.get(key) for key, value in (("min", low), ("max", high))]
    return x if bounds == [None, None] else x.clamp(bounds[0], bounds[1])


def _pad(given: Attributes, *inputs: Any) -> Tensor:
    x: Tensor = inputs[0]
    pads = _numbers(inputs[1]) if len(inputs) > 1 else given.get("pads")
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}[given.get("mode", b"constant")]
    fill = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else float(given.get("value", 0.0))
    if pads is None or len(pads) != 2 * x.ndim or (len(inputs) > 3 and inputs[3] is not None):
        raise UnconvertibleError("Pad of some axes")
    both = [(pads[axis], pads[axis + x.ndim]) for axis in reversed(range(x.ndim))]
    while both and both[-1] == (0, 0):
        both.pop()
    flat = [side for pair in both for side in pair]
    return F.pad(x, flat, mode, fill) if mode == "constant" else F.pad(x, flat, mode)


def _softmax(given: Attributes, x: Tensor) -> Tensor:
    if "axis" not in given and given["opset"] < 13 and x.ndim != 2:
        raise UnconvertibleError("Softmax over several axes")
    return x.softmax(given.get("axis", -1))


def _layer_norm(given: Attributes, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[given.get("axis", -1) :], scale, shift, given.get("epsilon", 1e-5))


def _norm(given: Attributes, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, given.get("p", 2), given.get("axis", -1), keepdim=True)
    return x / length.clamp_min(1e-12)


def _divide(given: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda given, a, b: function(a, b)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda given, x: function(x)


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(given: Attributes, *inputs: Any) -> Tensor:
        x: Tensor = inputs[0]
        axes = _axes(inputs, given)
        if axes is None and given.get("noop_with_empty_axes", 0):
            return x
        return function(x, list(range(x.ndim)) if axes is None else axes, bool(given.get("keepdims", 1)))

    return run


_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}


def _cast(given: Attributes, x: Tensor) -> Tensor:
    if given["to"] not in _TYPES:
        raise UnconvertibleError("Cast to a rare type")
    return x.to(_TYPES[given["to"]])


def _fill(given: Attributes, shape: Tensor) -> Tensor:
    value = given.get("value", torch.zeros(1))
    sides = [int(v) for v in shape.tolist()]
    # A few numbers of a file could ask for any amount of memory; networks make nothing but shapes in this way.
    if math.prod(sides) > 4096:
        raise UnconvertibleError("ConstantOfShape of many numbers")
    return value.reshape(()).expand(sides).clone()


OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda given, *xs: torch.cat(xs, given["axis"]),
    "ConstantOfShape": _fill,
    "Conv": _conv,
    "Div": _divide,
    "Dropout": lambda given, x, *_: x,
    "Elu": lambda given, x: F.elu(x, given.get("alpha", 1.0)),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": lambda given, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(_numbers(shape) or ()))),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda given, x: F.gelu(x, approximate=given.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda given, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda given, x: (given.get("alpha", 0.2) * x + given.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda given, x: F.hardswish(x),
    "Identity": lambda given, x: x,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda given, x: F.leaky_relu(x, given.get("alpha", 0.01)),
    "LpNormalization": _norm,
    "MatMul": _binary(torch.matmul),
    "Max": _binary(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _binary(torch.minimum),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _binary(torch.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda given, x: torch.tensor(x.shape[slice(given.get("start", 0), given.get("end"))]),
    "Sigmoid": _unary(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _unary(F.softplus),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": lambda given, *xs: sum(xs[1:], xs[0]),
    "Tanh": _unary(torch.tanh),
    "Transpose": lambda given, x: x.permute(given.get("perm") or list(reversed(range(x.ndim)))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda given, condition, a, b: torch.where(condition, a, b),
}


class Operation(nn.Module):
    """One node: a function of tensors and its attributes."""

    def __init__(self, kind: str, given: Attributes):
        super().__init__()
        self.kind, self.given = kind, given

    def forward(self, *inputs: Tensor | None) -> Any:
        return OPERATORS[self.kind](self.given, *inputs)

    def extra_repr(self) -> str:
        return self.kind


class OnnxGraph(nn.Module):
    """A graph as a network: faces ``[B, 3, H, W]``, or ``[B, H, W, 3]`` inside, to ``[B, D]``.

    Sub-modules are named ``{operator}_{number of the node}``; constants of the file are parameters, and every batch
    normalization with constant statistics is an ``nn.BatchNorm2d`` (or 1d) in eval mode.

    Args:
        graph: an ``onnx.GraphProto``, with all tensors inside.
        opset: version of the standard operators that it was written for.
        source, target: names of the input and of the output that is the embedding.
        channels_last: the graph wants ``[B, H, W, 3]``.
        embedding_dim: D.

    Raises:
        UnconvertibleError: operators that are not in `OPERATORS`.
    """

    def __init__(
        self, graph: Any, opset: int, source: str, target: str, *, channels_last: bool = False, embedding_dim: int
    ):
        super().__init__()
        known = {*OPERATORS, "BatchNormalization", "Constant"}
        foreign = Counter(f"{n.domain}.{n.op_type}" for n in graph.node if n.domain not in ("", "ai.onnx"))
        strange = foreign or Counter(node.op_type for node in graph.node if node.op_type not in known)
        if strange:
            raise UnconvertibleError(f"operators {', '.join(sorted(strange)[:3])}")
        if len(graph.node) > MAX_NODES:
            raise UnconvertibleError(f"{len(graph.node)} nodes")
        self.embedding_dim, self.channels_last = embedding_dim, channels_last
        self.source, self.target = source, target
        self.weights = nn.ParameterDict()
        self.numbers: dict[str, Tensor] = {}  # shapes, indices, bounds: Python looks at them, so they stay on the CPU
        self._named: dict[str, str] = {}
        for tensor in graph.initializer:
            self._constant(tensor.name, _tensor(tensor))
        self.steps: list[tuple[str, list[str], list[str]]] = []
        for number, node in enumerate(graph.node):
            given = {a.name: _attribute(a) for a in node.attribute}
            if node.op_type == "Constant":
                (value,) = given.values()
                self._constant(node.output[0], torch.as_tensor(value))
                continue
            name = f"{node.op_type}_{number}"
            inputs = list(node.input)
            if node.op_type == "Identity" and inputs[0] in self._named:
                self._named[node.output[0]] = self._named[inputs[0]]  # exporters write equal constants once
                continue
            if node.op_type == "BatchNormalization":
                self.add_module(name, self._batch_norm(inputs, given))
                inputs = inputs[:1]
            else:
                given |= {"opset": opset, "outputs": len(node.output)}
                self.add_module(name, Operation(node.op_type, given))
            self.steps.append((name, inputs, list(node.output)))
        used = {name for _, inputs, _ in self.steps for name in inputs}
        self._named = {name: key for name, key in self._named.items() if name in used}
        for key in [key for key in self.weights if key not in self._named.values()]:
            del self.weights[key]
        last = {name: step for step, (_, inputs, _) in enumerate(self.steps) for name in inputs}
        # What is not used any more is let go, as Python would.
        self.done = [
            [n for n in inputs if last[n] == step and n not in ("", target)]
            for step, (_, inputs, _) in enumerate(self.steps)
        ]
        self.requires_grad_(False)
        self.eval()

    def _constant(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and value.ndim:
            self._named[name] = f"w{len(self._named)}"
            self.weights[self._named[name]] = nn.Parameter(value.float())
        else:
            self.numbers[name] = value

    def _batch_norm(self, inputs: list[str], given: Attributes) -> nn.Module:
        if given.get("training_mode", 0) or not all(name in self._named for name in inputs[1:]):
            raise UnconvertibleError("BatchNormalization without constant statistics")
        scale, shift, mean, variance = (self.weights[self._named[name]] for name in inputs[1:])
        norm = AnyBatchNorm(len(scale), eps=given.get("epsilon", 1e-5))
        norm.load_state_dict(
            {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}, strict=False
        )
        return norm

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {"": None, **self.numbers}
        values |= {name: self.weights[key] for name, key in self._named.items()}
        values[self.source] = x.permute(0, 2, 3, 1) if self.channels_last else x
        for (module, inputs, outputs), done in zip(self.steps, self.done):
            result = self.get_submodule(module)(*(values[i] for i in inputs))
            values.update(zip(outputs, result if isinstance(result, tuple) else (result,)))
            for name in done:
                values.pop(name, None)
        embedding: Tensor = values[self.target]
        return embedding.flatten(1)


class AnyBatchNorm(nn.BatchNorm2d):
    """Batch normalization of ``[B, C]`` and of ``[B, C, H, W]``, as ONNX has it."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], not {list(input.shape)}")


def _tensor(proto: Any) -> Tensor:
    import onnx

    array = onnx.numpy_helper.to_array(proto)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise UnconvertibleError(f"numbers of the type {array.dtype}")
    return torch.from_numpy(array.copy())


def _attribute(proto: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(proto)
    return _tensor(value) if isinstance(value, onnx.TensorProto) else value
