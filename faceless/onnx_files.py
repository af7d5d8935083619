"""Recognizers from ONNX files, and to ONNX files.

    python -m faceless.onnx_files runs/mine/student student.onnx

A file of ours holds a whole recognizer: RGB faces in 0..255 go in, embeddings come out, and nobody has to know how its
backbone wants its pixels. Its weights keep their names and its batch normalizations stay apart from the convolutions
(onnxruntime merges them when it loads), so that `faceless.load` gives back the same network.

Files of strangers are graphs of tensor operations. What they hold is bounded by their size, further files are only read
from their own folder and by bare names, and loops are refused.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faceless import __version__
from faceless.errors import InputError, command
from faceless.files import atomic_write, sha256
from faceless.onnx_graph import OnnxGraph, UnconvertibleError
from faceless.randomness import Rng
from faceless.recognizer import MAX_SIDE, InputSpec, Recognizer

OPSET = 17  # the first with LayerNormalization
MAX_BYTES = (1 << 31) - 1  # of a protocol buffer
LOOPS = {"Loop", "Scan", "SequenceMap"}
PIXELS = "RGB, 0..255"
TOLERANCE = 1e-3  # relative to the largest number of an embedding; rounding is about 1e-6
#: What graphs take for pixels, and as what they are handed over.
DTYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 10: np.float16, 11: np.float64}
NEEDS = "ONNX needs onnx and onnxruntime; pip install faceless-distill[onnx]"


@dataclass
class OnnxFile:
    """A graph that maps faces to embeddings, and how it wants its pixels."""

    model: Any  # onnx.ModelProto, with all tensors inside
    source: str
    target: str
    elements: int  # type of the input
    batch: int | None  # where the graph fixes it
    channels_last: bool
    spec: InputSpec
    description: str | None  # what `export` wrote about the recognizer
    sha256: str


def need(path: Path) -> None:
    """Raise InputError about ``path`` where onnx or onnxruntime is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path}: {NEEDS}") from error


def read(path: Path) -> OnnxFile:
    """Read and check a file; nothing is run.

    Raises:
        InputError: onnx is not installed; the file is damaged, too large, holds loops, or wants files from elsewhere;
            or no input is a picture.
    """
    need(path)
    import onnx

    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes are more than an ONNX file can have")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # DecodeError of whichever protocol buffer library is there
        raise InputError(f"{path}: not readable as ONNX ({type(error).__name__})") from error
    if not model.graph.node or not model.graph.output:
        raise InputError(f"{path}: holds no graph")
    if loops := {node.op_type for node in _messages(model, "NodeProto")} & LOOPS:
        raise InputError(f"{path}: holds {', '.join(sorted(loops))}; a recognizer has no need of that")
    return describe(model, _inline(model, path), path)


def describe(model: Any, digest: str, path: Path) -> OnnxFile:
    """What a graph takes and gives.

    Args:
        model: an ``onnx.ModelProto``, with all tensors inside.
        digest: SHA-256 of the files that it is from.

    Raises:
        InputError: no input is a picture.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type not in DTYPES:
        raise InputError(
            f"{path}: takes {', '.join(v.name for v in inputs[:3]) or 'nothing'}; one batch of pictures is wanted"
        )
    sides = [d.dim_value if d.HasField("dim_value") else 0 for d in inputs[0].type.tensor_type.shape.dim]
    channels_last = len(sides) == 4 and sides[3] == 3 and sides[1] != 3
    if len(sides) != 4 or (not channels_last and sides[1] not in (0, 3)) or not all(0 <= s <= MAX_SIDE for s in sides):
        raise InputError(f"{path}: takes {sides}; [B, 3, H, W] or [B, H, W, 3] is wanted")
    height, width = sides[1:3] if channels_last else sides[2:]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    elements = inputs[0].type.tensor_type.elem_type
    spec = _spec(model.graph, height or 112, width or 112)
    if DTYPES[elements] is np.uint8:  # whole pixels, so it normalizes by itself
        spec = replace(spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return OnnxFile(
        model,
        inputs[0].name,
        model.graph.output[0].name,
        elements,
        sides[0] or None,
        channels_last,
        spec,
        notes.get("faceless"),
        digest,
    )


def _spec(graph: Any, height: int, width: int) -> InputSpec:
    """InsightFace's rule: a graph that begins with a subtraction and a product normalizes by itself."""
    names = [node.name for node in graph.node[:8]]
    subtracts = any(name.startswith(("Sub", "_minus")) for name in names)
    multiplies = any(name.startswith(("Mul", "_mul")) for name in names)
    if subtracts and multiplies:
        return InputSpec(height, width, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return InputSpec(height, width)


def _messages(message: Any, kind: str) -> Iterator[Any]:
    """All messages of a kind inside of one, at any depth (which the parser has bounded)."""
    if message.DESCRIPTOR.name == kind:
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner, kind)


def _inline(model: Any, path: Path) -> str:
    """Bring tensors of further files into the model; the SHA-256 of all files together."""
    import onnx

    outside = [t for t in _messages(model, "TensorProto") if t.data_location == onnx.TensorProto.EXTERNAL]
    files: dict[str, int] = {}
    wanted = 0
    for tensor in outside:
        notes = {entry.key: entry.value for entry in tensor.external_data}
        name = notes.get("location", "")
        file = path.parent / name
        if not name or Path(name).name != name or "\\" in name or file.is_symlink() or not file.is_file():
            raise InputError(f"{path}: wants numbers from {name[:80]!r}, which is no file beside it")
        files[name] = file.stat().st_size
        length = notes.get("length", "")
        wanted += int(length) if length.isdecimal() else files[name]
    if len(outside) > sum(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise InputError(f"{path}: wants numbers from another file in a place where that is unusual")
    own = sha256(path)
    if not files:
        return own
    # Many tensors on the same bytes would make much out of little.
    if wanted > sum(files.values()) or sum(files.values()) + path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: wants {wanted} bytes from files of {sum(files.values())}; {MAX_BYTES} are the most")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of several kinds, for lengths and offsets that do not fit
        raise InputError(f"{path}: the files beside it do not fit ({type(error).__name__})") from error
    together = [own, *(sha256(path.parent / name) for name in sorted(files))]
    return hashlib.sha256("".join(together).encode()).hexdigest()


def initializers(file: OnnxFile, path: Path) -> dict[str, Tensor]:
    """The constants of a graph by name, for graphs that keep the names of a state dict."""
    import onnx

    try:
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in file.model.graph.initializer}
    except Exception as error:  # of several kinds, for numbers that do not fit their shape
        raise InputError(f"{path}: holds damaged numbers ({type(error).__name__})") from error
    found = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array.dtype.kind in "fiub"}
    if wrong := [name for name, value in found.items() if bool(value.isnan().any())]:
        raise InputError(f"{path}: {wrong[0][:80]} holds values that are not finite")
    # The exporter writes equal tensors once, and the others as nodes that repeat it.
    for node in file.model.graph.node:
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


class OnnxRuntime(nn.Module):
    """A graph that onnxruntime computes on the CPU; no gradients.

    Args:
        file: from `read`.

    Raises:
        InputError: onnxruntime does not take the graph, or its output is no embedding.
    """

    def __init__(self, file: OnnxFile, path: Path):
        super().__init__()
        self.model: bytes = file.model.SerializeToString()
        self.source, self.target = file.source, file.target
        self.elements, self.batch, self.channels_last = file.elements, file.batch, file.channels_last
        self._session: Any = None
        try:
            out = self(torch.zeros(1, 3, file.spec.height, file.spec.width))
        except InputError:
            raise
        except Exception as error:  # onnxruntime has a dozen
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{path}: onnxruntime does not run it ({lines[0][:200]})") from error
        if out.ndim != 2:
            raise InputError(f"{path}: gives {list(out.shape)}; [B, D] is wanted")
        self.embedding_dim = out.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        # Sessions neither copy nor travel to another process; each makes its own.
        return {**self.__dict__, "_session": None}

    def session(self) -> Any:
        """Made at its first use in a process."""
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        return self._session

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "this ONNX teacher has no gradients, onnxruntime computes it; inversion needs operators that we know"
            )
        faces = (x.permute(0, 2, 3, 1) if self.channels_last else x).detach().float().cpu()
        kind = DTYPES[self.elements]
        array = (faces.round() if kind is np.uint8 else faces).contiguous().numpy().astype(kind)
        size = self.batch or len(array)
        rows = []
        for start in range(0, len(array), max(size, 1)):
            chunk = array[start : start + size]
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), 0)])
            (found,) = self.session().run([self.target], {self.source: filled})
            rows.append(found[: len(chunk)])
        return torch.from_numpy(np.concatenate(rows)).float().flatten(1).to(x.device)


def compute(file: OnnxFile, path: Path) -> Recognizer:
    """The recognizer that onnxruntime computes."""
    return Recognizer(OnnxRuntime(file, path), file.spec)


def convert(file: OnnxFile, embedding_dim: int) -> Recognizer:
    """The same as a differentiable network, if it is made of operators that we know.

    Raises:
        UnconvertibleError: it is not.
    """
    if file.model.functions:
        raise UnconvertibleError("functions")
    opset = max((o.version for o in file.model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    try:
        graph = OnnxGraph(
            file.model.graph,
            opset,
            file.source,
            file.target,
            channels_last=file.channels_last,
            embedding_dim=embedding_dim,
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Attributes and inputs in numbers and types that the operators do not have.
        raise UnconvertibleError(f"{type(error).__name__}: {error}") from error
    return Recognizer(graph, file.spec)


def check_equal(found: Recognizer, computed: Recognizer) -> None:
    """Whether a network sees what onnxruntime sees in two pictures of noise.

    Raises:
        UnconvertibleError: it does not.
    """
    sides = computed.spec.height, computed.spec.width
    pictures = Rng.of(0, "onnx", range(2)).integers(256, 3, *sides).byte()
    with torch.inference_mode():
        expected = computed(pictures).embedding
        try:
            seen = found.eval()(pictures).embedding
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # What the operators of a graph do not take; a batch of another size than the graph fixes.
            raise UnconvertibleError(f"{type(error).__name__}: {error}") from error
    if seen.shape != expected.shape or not (seen - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise UnconvertibleError("its numbers differ from onnxruntime's")


class _FromPixels(nn.Module):
    """A recognizer without resizing, its normalization as a subtraction and a product, as InsightFace likes it."""

    mean: Tensor
    scale: Tensor

    def __init__(self, recognizer: Recognizer):
        super().__init__()
        self.backbone, spec = recognizer.backbone, recognizer.spec
        self.swap = spec.channel_order == "BGR"
        to_pixels = 255.0 / spec.value_range
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1) * to_pixels)
        self.register_buffer("scale", 1.0 / (torch.tensor(spec.std).view(1, 3, 1, 1) * to_pixels))

    def forward(self, faces: Tensor) -> Tensor:
        faces = faces[:, [2, 1, 0]] if self.swap else faces
        result = self.backbone((faces - self.mean) * self.scale)
        embedding: Tensor = result[0] if isinstance(result, tuple) else result
        return embedding


def write(recognizer: Recognizer, path: Path, description: str) -> None:
    """Write the file of `faceless.export_onnx`; ``description`` is JSON about the recognizer.

    Raises:
        InputError: onnx is not installed, the network is larger than an ONNX file can be, or the disk is full.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError(f"{path}: {NEEDS}") from error
    if (size := sum(tensor.nbytes for tensor in recognizer.backbone.state_dict().values())) > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes of weights are more than an ONNX file can have; write safetensors")
    network, spec = copy.deepcopy(recognizer).cpu().float().eval(), recognizer.spec
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # About the exporter's successor, which takes ten times as long and spreads each BatchNorm over six nodes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _FromPixels(network).eval(),
            (torch.zeros(2, 3, spec.height, spec.width),),
            f"{folder}/traced.onnx",
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # it is in eval mode; else BatchNorm is merged into convolutions
            do_constant_folding=False,
            input_names=["faces"],
            output_names=["embedding"],
            dynamic_axes={"faces": {0: "batch"}, "embedding": {0: "batch"}},
        )
        model = onnx.load(f"{folder}/traced.onnx")
    _tidy(model.graph, {f"backbone.{key}" for key in network.backbone.state_dict()})
    onnx.helper.set_model_props(model, {"faceless": description, "input": PIXELS, "framing": spec.framing})
    model.producer_name, model.producer_version = "faceless", __version__
    atomic_write(path, model.SerializeToString(deterministic=True))


def _tidy(graph: Any, state: set[str]) -> None:
    """Every weight under its name, without notes of where in which file a node was traced.

    What is no weight gets a name of its own.
    """
    # The exporter writes equal tensors once, and nodes that repeat them.
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity" and node.input[0] in constants]:
        graph.initializer.add().CopyFrom(constants[node.input[0]])
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    computed = {tensor.name: f"constant.{tensor.name}" for tensor in graph.initializer if tensor.name not in state}
    for tensor in graph.initializer:
        tensor.name = computed.get(tensor.name, tensor.name)
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for position, name in enumerate(node.input):
            node.input[position] = computed.get(name, name)
    # InsightFace's loader looks for these two names to see that pixels are normalized inside.
    next(node for node in graph.node if node.op_type == "Sub").name = "Sub_mean"
    next(node for node in graph.node if node.op_type == "Mul").name = "Mul_scale"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the ONNX file of any recognizer."""
    parser = argparse.ArgumentParser(prog="python -m faceless.onnx_files", description=main.__doc__)
    parser.add_argument("model", help="whatever faceless.load takes")
    parser.add_argument("output", help="file to write, .onnx")
    given = parser.parse_args(arguments)
    from faceless.weights import export_onnx, load

    recognizer = load(given.model)
    print(export_onnx(recognizer, given.output, recognizer.source))


if __name__ == "__main__":
    command(main)()
