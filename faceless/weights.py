"""Recognizers by name, from files in every format we read, and to folders that we write.

Nothing in a weight file is executed: pickles are read with ``weights_only=True``, and a network is built from the names
and shapes in the file or from a plain JSON description.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from faceless import __version__, archives, assets, keras_files, onnx_files, tfjs_files
from faceless.backbones import ARCHITECTURES, timm_backbone
from faceless.backbones.cbam import BLOCKS as CBAM_BLOCKS
from faceless.backbones.dlib_resnet import read_dat
from faceless.backbones.ir import BLOCKS as IR_BLOCKS
from faceless.backbones.iresnet import BLOCKS, WIDTHS
from faceless.backbones.transformers_backbone import PROCESSOR, TransformersBackbone, read_folder, read_weights
from faceless.backbones.vit import VITS
from faceless.errors import InputError, suggest
from faceless.files import atomic_write, read_json, sha256
from faceless.onnx_graph import UnconvertibleError
from faceless.recognizer import MAX_SIDE, InputSpec, Recognizer

PRETRAINED = {"dlib-resnet29": "dlib-resnet29", "hse-faceres": "hse-faceres"}  # name -> asset
SUPPORTED = (
    ".pth .pt (plain state dicts, TorchScript), .pt2, .ckpt (Lightning), .safetensors, .onnx, .json (TensorFlow.js), "
    ".h5 .keras (Keras), .dat (dlib)"
)
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError)
MAX_BYTES = 4 << 30
PROGRAMS = (
    ("TorchScript", archives.is_torchscript, archives.torchscript_tensors),
    ("an ExportedProgram", archives.is_exported, archives.exported_tensors),
)
MAX_STRANGE = 64  # classes in a checkpoint that are passed over
# Wrappers that other training code leaves around a backbone, longest first.
PREFIXES = ("_orig_mod.", "backbone.", "student.", "module.", "model.", "net.")
NESTS = ("state_dict_backbone", "state_dict", "model_state_dict", "net_state_dict", "model", "backbone")
EDGEFACE_WIDTHS = {24: "edgeface-xxs", 32: "edgeface-xs", 48: "edgeface-s", 80: "edgeface-base"}  # of the stem
CLASSIFIERS = ("head.", "header.", "logits.")  # belong to training; an embedder has none

State = dict[str, Tensor]


def names() -> list[str]:
    """The architectures that `create` builds; `load` also takes those that come with weights."""
    return sorted(ARCHITECTURES)


def create(
    name: str,
    *,
    embedding_dim: int | None = None,
    input_size: int | None = None,
    framing: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Recognizer:
    """An untrained recognizer.

    Args:
        name: one of `names`.
        embedding_dim: D; None for the architecture's own.
        input_size: pixels of the square input; None for the architecture's own.
        framing: of the faces it will see, ``"arcface"`` or ``"dlib"``; None for the architecture's own.
        seed: of the initial weights. The global random state is neither used nor changed.
        options: of the architecture's class.

    Raises:
        InputError: unknown name or option, or a value that does not fit.

    >>> create("mobilefacenet", embedding_dim=128, width=0.5, activation="relu").embedding_dim
    128
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return _build(name, embedding_dim, input_size, framing, options)


def _build(name: str, embedding_dim: Any, input_size: Any, framing: Any, options: Mapping[str, Any]) -> Recognizer:
    if name not in ARCHITECTURES:
        raise InputError(f"there is no architecture {name!r}; {suggest(name, ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    dim = architecture.embedding_dim if embedding_dim is None else embedding_dim
    size = architecture.spec.height if input_size is None else input_size
    for key, value, most in (("embedding_dim", dim, 65536), ("input_size", size, MAX_SIDE)):
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{name}: {key} is {value!r}; use a whole number from 1 to {most}")
    if framing not in (None, "arcface", "dlib"):
        raise InputError(f"{name}: framing is {framing!r}; use 'arcface' or 'dlib'")
    known = inspect.signature(architecture.build).parameters
    kinds = get_type_hints(getattr(architecture.build, "func", architecture.build).__init__)
    for key, value in options.items():
        if key not in known:
            raise InputError(f"{name} has no option {key!r}; {suggest(key, known)}")
        if not _fits(value, kinds[key]):
            raise InputError(f"{name}: option {key} is {reprlib.repr(value)}; give {known[key].annotation}")
    try:
        backbone = architecture.build(embedding_dim=dim, input_size=size, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error
    spec = replace(architecture.spec, height=size, width=size, framing=framing or architecture.spec.framing)
    return Recognizer(backbone, spec, name=name, options={"embedding_dim": dim, "input_size": size, **options})


def _fits(value: Any, kind: Any) -> bool:
    """Whether an option is of the type that the architecture's class declares; a whole number is a real one too."""
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(one, parts[0]) for one in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def load(source: str | Path, spec: InputSpec | None = None, *, runtime: bool = False, **options: Any) -> Recognizer:
    """A trained recognizer, in eval mode on the CPU.

    Args:
        source: a name (``"dlib-resnet29"``, ``"hse-faceres"``), a folder written by `save`, transformers or timm, a
            file (a state dict of a network we know, see docs/backbones.md, in ``.pth``, ``.pt`` or ``.safetensors``;
            AdaFace's ``.ckpt``; ``.safetensors`` of ours; ``.onnx``; TensorFlow.js's ``model.json``; GhostFaceNet's
            ``.h5`` and ``.keras``; dlib's ``.dat``), or ``hf-hub:owner/name`` of such a folder.
        spec: how the backbone wants its pixels, where the file does not say and its authors did not do the usual.
        runtime: leave an ``.onnx`` file to onnxruntime, without gradients, even where it could become a network here.
        options: of a foreign state dict's architecture, where names and shapes do not tell (MixFaceNet's ``shuffle``);
            ``architecture`` is its name here, where they do not tell that either (``"timm"`` with timm's ``model``,
            ``"transformers"`` with ``model`` and ``config``); ``output`` names the embedding among the nodes of a
            TensorFlow.js graph, where it is not the first output.

    Returns:
        The recognizer; ``.source`` tells the source and the SHA-256 of the weights, and of graphs the ``engine``:
        ``"torch"`` or ``"onnxruntime"``, and why.

    Raises:
        InputError: no such name or file, a file that is damaged or holds anything but weights, or weights that do not
            fit any network we know.
    """
    text = str(source)
    if runtime and Path(source).suffix not in (".onnx", ".json"):
        raise InputError(f"{text}: onnxruntime computes .onnx files and TensorFlow.js graphs alone")
    if text.startswith("hf-hub:"):
        recognizer, file = _load_folder(_from_hub(text))
    elif text in PRETRAINED:
        file = assets.fetch(PRETRAINED[text])
        if text == "hse-faceres":
            file /= "faceres.json"
            recognizer = _load_faceres(file)
        else:
            recognizer = _load_dat(file)
    elif Path(source).is_dir():
        recognizer, file = _load_folder(Path(source))
    elif Path(source).is_file():
        file = Path(source)
        recognizer = _load_file(file, options, runtime)
    elif text in ARCHITECTURES:
        raise InputError(f"{text} comes without weights: give a file or a folder, or create it untrained")
    elif re.search(r"[/\\.]", text):
        raise InputError(f"{text}: no such file or folder")
    else:
        raise InputError(f"{text}: no such recognizer, file or folder; {suggest(text, PRETRAINED)}")
    if spec is not None:
        recognizer = Recognizer(
            recognizer.backbone, spec, name=recognizer.name, options=recognizer.options, source=recognizer.source
        )
    for key, value in options.items():
        # A file that describes itself, or one of another kind, takes none.
        found = recognizer.name if key == "architecture" else recognizer.options.get(key)
        if found is None or found != value:
            raise InputError(f"{text}: takes no option {key!r}")
    # An ONNX file may have more files beside it, and has the SHA-256 of them all.
    recognizer.source = {"sha256": sha256(file)} | recognizer.source | {"source": text}
    return recognizer.eval()


def _load_dat(path: Path) -> Recognizer:
    return Recognizer(
        read_dat(path),
        ARCHITECTURES["dlib-resnet29"].spec,
        name="dlib-resnet29",
        options={"embedding_dim": 128, "input_size": 150},
    )


def _load_file(path: Path, options: Mapping[str, Any], runtime: bool) -> Recognizer:
    if path.suffix == ".dat":
        return _load_dat(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, options)
    if path.suffix == ".onnx":
        return _load_graph(onnx_files.read(path), path, options, runtime)
    if path.suffix == ".json":
        output = options.get("output")
        found = _load_graph(tfjs_files.read(path, output), path, {}, runtime)
        found.options |= {} if output is None else {"output": output}
        return found
    if path.suffix in (".h5", ".keras"):
        name, known, state = keras_files.ghostfacenet(path, options)
        return _assemble(name, known.pop("embedding_dim"), known.pop("input_size"), known, state, path)
    if path.suffix in (".pth", ".pt", ".pt2", ".ckpt"):
        for kind, is_kind, read in PROGRAMS:
            if is_kind(path):
                return _load_program(kind, read(path), path, options)
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return _load_foreign(_read_pickle(path), path, options)
    raise InputError(f"{path}: weights of the kind {path.suffix or 'without a suffix'} are not read; {SUPPORTED} are")


def _load_program(kind: str, state: State, path: Path, options: Mapping[str, Any]) -> Recognizer:
    """A network of ours around the tensors of a program that is not run."""
    try:
        return _load_foreign(state, path, options)
    except InputError as error:
        raise InputError(
            f"{error}. {kind} holds a program, which is never run; if you trust whoever wrote it, load it yourself and "
            "write ONNX with torch.onnx.export, or save its state dict"
        ) from error


def _load_folder(folder: Path) -> tuple[Recognizer, Path]:
    file = folder / WEIGHTS
    if not file.is_file():
        run = (folder / "student" / WEIGHTS).is_file()
        cure = f"{folder / 'student'}, the student of this run" if run else "a folder that faceless.save wrote"
        raise InputError(f"{folder}: holds no {WEIGHTS}; give {cure}")
    # Where the weights describe themselves, that counts.
    if "faceless" in _metadata(file):
        return _load_safetensors(file), file
    if (saved := timm_backbone.read_folder(folder)) is not None:
        options, spec = saved
        state = {f"model.{key}": value for key, value in _tensors(file).items()}
        found = _assemble("timm", options.pop("embedding_dim"), options.pop("input_size"), options, state, file)
        return Recognizer(found.backbone, spec, name=found.name, options=found.options), file
    known = read_folder(folder)
    if known is None:
        recognizer = _load_safetensors(file)
        settings = read_json(folder / CONFIG).get("conf")  # CVLface's
        if isinstance(settings, dict) and settings.get("color_space") == "BGR":
            recognizer.spec = replace(recognizer.spec, channel_order="BGR")
        return recognizer, file
    options, spec = known
    head = next((value for key, value in _tensors(file).items() if key.endswith("classifier.weight")), None)
    if head is None:
        raise InputError(f"{file}: has no classifier, whose classes would be the embedding")
    try:
        with torch.device("meta"):
            found = _build("transformers", len(head), options.pop("input_size"), None, options)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    backbone = cast(TransformersBackbone, found.backbone)
    backbone.network = read_weights(file, backbone, options["model"])
    return Recognizer(found.backbone, spec, name=found.name, options=found.options), file


def _load_safetensors(path: Path, given: Mapping[str, Any] = {}) -> Recognizer:
    metadata, state = _metadata(path), _tensors(path)
    if "faceless" not in metadata:
        return _load_foreign(state, path, given)
    return _load_described(metadata["faceless"], state, path)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except UNREADABLE as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error


def _tensors(path: Path) -> State:
    try:
        return dict(safetensors.torch.load_file(path))
    except UNREADABLE as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error


def _load_described(description: str, state: State, path: Path) -> Recognizer:
    """The recognizer that `describe` spoke of."""
    try:
        config = json.loads(description)
        options = dict(config["options"])
        spec = InputSpec(**config["input"])
        name, record = str(config["architecture"]), dict(config["record"])
        dim, size = options.pop("embedding_dim"), options.pop("input_size")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: its description is damaged ({type(error).__name__}: {error})") from error
    recognizer = _assemble(name, dim, size, options, state, path)
    return Recognizer(recognizer.backbone, spec, name=name, options=recognizer.options, source={"record": record})


def _load_faceres(path: Path) -> Recognizer:
    """HSE-FaceRes's embedding (its other outputs are age and gender), with pixels as its authors' code has them."""
    found = _load_graph(tfjs_files.read(path, "global_pooling/Mean"), path, {}, runtime=False)
    spec = InputSpec(224, 224, mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0), channel_order="BGR")
    return Recognizer(found.backbone, spec, source=found.source)


def _load_graph(file: onnx_files.OnnxFile, path: Path, options: Mapping[str, Any], runtime: bool) -> Recognizer:
    """A network of ours if the graph is one and kept its names, else the graph as a network, else onnxruntime's."""
    computed = onnx_files.compute(file, path)

    def same() -> Recognizer:
        state = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
        return _load_described(file.description or "", state, path)

    def known() -> Recognizer:
        return _load_foreign({key: value for key, value in tensors.items() if "." in key}, path, options)

    def converted() -> Recognizer:
        return onnx_files.convert(file, computed.embedding_dim)

    why = "as asked"
    tensors = onnx_files.initializers(file, path)
    if not runtime:
        for attempt in (same, known, converted):
            try:
                found = attempt()
                onnx_files.check_equal(found, computed)
            except (InputError, UnconvertibleError) as error:
                why = str(error)
            else:
                found.source |= {"sha256": file.sha256, "engine": "torch"}
                return found
    computed.source |= {"sha256": file.sha256, "engine": f"onnxruntime, without gradients: {why}"}
    return computed


def _from_hub(source: str) -> Path:
    import huggingface_hub

    match = re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match is None:
        raise InputError(f"{source}: write hf-hub:owner/name, or hf-hub:owner/name@revision")
    try:
        folder = huggingface_hub.snapshot_download(
            match[1], revision=match[2], allow_patterns=[WEIGHTS, CONFIG, PROCESSOR]
        )
    except Exception as error:  # its own errors, those of the HTTP library below it, OSError, ValueError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source}: could not be fetched from the hub ({lines[0]})") from error
    return Path(folder)


def _read_pickle(path: Path) -> State:
    """The tensors of a ``torch.save`` file, wherever it nests them."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes are more than any recognizer has")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses; a file that does might unfold to any size.
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise InputError(f"{path}: not written by torch.save")
        found = _load_lightning(path) if path.suffix == ".ckpt" else _load_plain(path)
    except InputError:
        raise
    except Exception as error:  # torch raises many types for a damaged or hostile file
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"{path}: holds {refused[1]}, which is code and not weights; ask its authors for the plain state dict"
            ) from error
        raise InputError(f"{path}: not readable as PyTorch weights ({type(error).__name__})") from error
    for _ in range(4):  # a pickle can nest a dict in itself
        if isinstance(found, Mapping):
            found = next((found[key] for key in NESTS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{path}: holds a {type(found).__name__}, not a state dict")
    for key, value in found.items():
        if not isinstance(key, str) or not is_plain(value):
            raise InputError(f"{path}: {reprlib.repr(key)} is not a plain tensor; give a plain state dict")
    return dict(found)


def _load_plain(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


class _Ignored:
    """Stands in for whatever a checkpoint holds besides its tensors."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None: ...


def _load_lightning(path: Path) -> Any:
    """A checkpoint of PyTorch Lightning, whose callbacks and settings are of classes that we neither have nor run."""
    strange: list[str] = []
    while True:
        try:
            with torch.serialization.safe_globals([(_Ignored, name) for name in strange]):
                return _load_plain(path)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is None or refused[1] in strange or len(strange) >= MAX_STRANGE:
                raise
            strange.append(refused[1])


def is_plain(value: Any) -> bool:
    """Whether this is a dense tensor all of whose elements the file holds (a stride of 0 makes much out of little)."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def strip(state: State) -> State:
    """Drop classifiers and the prefixes that wrappers add to all keys.

    >>> sorted(strip({"module.net.fc.weight": torch.ones(1), "module.head.weight": torch.ones(1)}))
    ['fc.weight']
    """
    return list(_stripped(state))[-1]


def _stripped(state: State) -> Iterator[State]:
    """The state dict without classifiers, and again after each prefix that all keys share is gone."""
    while True:
        state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIERS)}
        yield state
        shorter = _unwrapped(state)
        if shorter is None:
            return
        state = shorter


def _unwrapped(state: State) -> State | None:
    """The state dict without the prefix that all its keys share; None if they share none."""
    common = next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None)
    return None if common is None else {key[len(common) :]: value for key, value in state.items()}


def _load_foreign(state: State, path: Path, given: Mapping[str, Any]) -> Recognizer:
    if "architecture" in given:
        return _load_named(state, path, dict(given))
    # Some networks have a prefix of a wrapper for one of their own, and a head that is no classifier.
    known = [(plain, network) for plain in _stripped(state) if (network := recognize(plain)) is not None]
    if not known:
        few = ", ".join(list(strip(state))[:3])
        raise InputError(f"{path}: its keys ({few}, ...) are of no network we know: {', '.join(names())}")
    state, (name, options) = known[0]
    options |= given
    found = _assemble(name, options.pop("embedding_dim"), options.pop("input_size"), options, state, path)
    if path.suffix == ".ckpt" and name.rstrip("0123456789") in ("ir", "cbam"):
        # AdaFace and A-SKD read images with OpenCV and leave their channels as they come.
        found = Recognizer(found.backbone, replace(found.spec, channel_order="BGR"), name=name, options=found.options)
    return found


def _load_named(state: State, path: Path, given: dict[str, Any]) -> Recognizer:
    """A network whose architecture was given: the names decide about wrappers, the shapes about the embedding."""
    name, options = given.pop("architecture"), dict(given)
    dim, size = options.pop("embedding_dim", None), options.pop("input_size", None)
    with torch.device("meta"):
        usual = _build(name, dim, size, None, options)
    wanted = {key: tuple(value.shape) for key, value in usual.backbone.state_dict().items()}
    outer = {key.partition(".")[0] for key in wanted}
    found: State | None = state
    candidates: list[State] = []
    while found is not None:
        candidates.append(found)
        if len(outer) == 1:  # networks of timm and transformers are a part of ours
            candidates.append({f"{next(iter(outer))}.{key}": value for key, value in found.items()})
        found = _unwrapped(found)
    best = max(candidates, key=lambda candidate: len(wanted.keys() & candidate.keys()))
    if dim is None:
        rows = [
            len(best[key])
            for key, shape in wanted.items()
            if key in best and best[key].ndim and shape[:1] == (usual.embedding_dim,) != best[key].shape[:1]
        ]
        dim = rows[-1] if rows else usual.embedding_dim
    return _assemble(name, dim, usual.spec.height, options, best, path)


def recognize(state: State) -> tuple[str, dict[str, Any]] | None:
    """Architecture and options that the keys and shapes of a state dict speak of, or None."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}

    def size(side: int) -> int:
        return 16 * side  # the networks divide the side by 16

    def stages() -> tuple[int, ...]:
        names = {(key.split(".")[0], key.split(".")[1]) for key in shapes if key.startswith("layer")}
        return tuple(sum(stage == f"layer{number}" for stage, _ in names) for number in (1, 2, 3, 4))

    match shapes:
        case {"fc.weight": (dim, inputs), "features.running_mean": _, "layer1.0.prelu.weight": _}:
            depth = next((depth for depth, blocks in BLOCKS.items() if blocks == stages()), None)
            side = math.isqrt(inputs // WIDTHS[-1])
            return (f"iresnet{depth}", {"embedding_dim": dim, "input_size": size(side)}) if depth else None
        case {"output_layer.3.weight": (dim, inputs), "layer1.0.channel_layer.shared_mlp.0.weight": _}:
            depth = next((depth for depth, blocks in CBAM_BLOCKS.items() if blocks == stages()), None)
            side = math.isqrt(inputs // WIDTHS[-1])
            return (f"cbam{depth}", {"embedding_dim": dim, "input_size": size(side)}) if depth else None
        case {
            "conv1.conv.weight": (channels, *_),
            "output_layer.linear.weight": (dim, _),
            "output_layer.conv_6_dw.conv.weight": (*_, side),
        }:
            options = {
                "width": channels / 64,
                "activation": "prelu" if "conv1.prelu.weight" in shapes else "relu",
                "affine": "output_layer.bn.weight" in shapes,
            }
            return "mobilefacenet", {"embedding_dim": dim, "input_size": size(side), **options}
        case {"dw_conv.pointwise.weight": _, "gdconv.depthwise.weight": (*_, side), "conv3.weight": (dim, *_)}:
            return "mobilefacenet-relu6", {"embedding_dim": dim, "input_size": size(side)}
        case {"input_layer.0.weight": _, "output_layer.3.weight": (dim, inputs), "body.0.res_layer.0.weight": _}:
            blocks = len({key.split(".")[1] for key in shapes if key.startswith("body.")})
            depth = next((depth for depth, counts in IR_BLOCKS.items() if sum(counts) == blocks), None)
            side = math.isqrt(inputs // WIDTHS[-1])
            return (f"ir{depth}", {"embedding_dim": dim, "input_size": size(side)}) if depth else None
        case {"stem.0.weight": (width, *_), "tail.4.weight": (*_, side), "tail.6.weight": (dim, *_)}:
            cells = len({key.split(".")[1] for key in shapes if key.startswith("cells.")})
            name = {(64, 18): "pocketnet-s", (128, 9): "pocketnet-m"}.get((width, cells))
            return (name, {"embedding_dim": dim, "input_size": size(side)}) if name else None
        case {
            "layers.0.layers.0.weight": (channels, *_),
            "features.layers.2.weight": (dim, _),
            "features.layers.0.layers.0.weight": (*_, side),
        }:
            name = {128: "mbf", 256: "mbf-large"}.get(channels)
            return (name, {"embedding_dim": dim, "input_size": size(side)}) if name else None
        case {
            "features.init_block.conv1.conv.weight": (width, *_),
            "feautre_layer.dw_conv.conv.weight": (head, _, _, side),
            "feautre_layer.pw_conv.conv.weight": (dim, *_),
        }:
            sizes = {(8, 512): "mixfacenet-xs", (16, 1024): "mixfacenet-s", (24, 1024): "mixfacenet-m"}
            name = sizes.get((width, head))
            return (name, {"embedding_dim": dim, "input_size": size(side)}) if name else None
        case {"last_linear.weight": (dim, 1792), "block8.conv2d.weight": _}:
            return "inception-resnet-v1", {"embedding_dim": dim, "input_size": 160}
        case {"cnn.conv_head.weight": (_, inputs, *_), "fc.weight": (dim, *_)}:
            name = {320: "tinyfar-a", 240: "tinyfar-b", 176: "tinyfar-c"}.get(inputs)
            return (name, {"embedding_dim": dim, "input_size": 112}) if name else None
        case {
            "patch_embed.proj.weight": (width, _, patch, _),
            "pos_embed": (_, tokens, _),
            "blocks.0.mlp.fc1.weight": (hidden, _),
            "feature.2.weight": (dim, _),
        }:
            depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
            key = (patch, width, depth, hidden)
            name = next((name for name, (p, w, d, _, r) in VITS.items() if (p, w, d, r * w) == key), None)
            # A side of 112 is no multiple of InsightFace's patches.
            side = 112 if math.isqrt(tokens) == 112 // patch else math.isqrt(tokens) * patch
            options = {"mask_token": "mask_token" in shapes, "keypoints": "keypoint_linear.weight" in shapes}
            return (name, {"embedding_dim": dim, "input_size": side, **options}) if name else None
        case {"model.stem.0.weight": (width, *_), "model.head.fc.weight": (dim, *_)}:
            name = EDGEFACE_WIDTHS.get(width)
            return (name, {"embedding_dim": dim, "input_size": 112}) if name else None
        case {
            "model.stem.0.weight": (width, *_),
            "model.head.fc.linear1.weight": (rank, inputs),
            "model.head.fc.linear2.weight": (dim, _),
        }:
            name, ratio = EDGEFACE_WIDTHS.get(width), _rank_ratio(rank, min(inputs, dim))
            return (name, {"embedding_dim": dim, "input_size": 112, "rank_ratio": ratio}) if name and ratio else None
    return None


def _rank_ratio(rank: int, side: int) -> float | None:
    """The roundest ratio that gives this rank: of 115 of 192 it is 0.6, and other layers tell whether that is right.

    >>> _rank_ratio(115, 192), _rank_ratio(152, 304)
    (0.6, 0.5)
    """
    ratios = [step / parts for parts in (10, 20, 100) for step in range(1, parts + 1)]
    return next((ratio for ratio in ratios if max(2, int(side * ratio)) == rank), None)


def _assemble(
    name: str, embedding_dim: Any, input_size: Any, options: Mapping[str, Any], state: State, path: Path
) -> Recognizer:
    """Build ``name`` around the tensors of ``state``, which must fit exactly."""
    try:
        # Without memory first: what a file asks for is not allocated before it is known to match what it holds.
        with torch.device("meta"):
            recognizer = _build(name, embedding_dim, input_size, None, options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    backbone = recognizer.backbone
    wanted = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    # Nothing in eval mode reads a count of training batches, which older files lack, or the token for patches left out,
    # which ONNX leaves out.
    optional = {key for key in wanted if key.endswith("num_batches_tracked") or key == "mask_token"}
    problems = [f"missing {key}" for key in wanted if key not in found and key not in optional]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    problems += [
        f"{key} is {list(found[key])} instead of {list(wanted[key])}"
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{path}: does not fit {name}: {'; '.join(problems[:3])}{more}")
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {key} holds values that are not finite")
    if set(dict(backbone.named_buffers())) - set(wanted):
        # Tables that are computed and not saved (Swin's): only a network that was built in earnest has them.
        recognizer = create(name, embedding_dim=embedding_dim, input_size=input_size, **options)
        recognizer.backbone.load_state_dict(state, strict=False)
        return recognizer
    backbone.to_empty(device="cpu")
    with torch.no_grad():
        for key, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
            tensor.copy_(state[key]) if key in state else tensor.zero_()
    return Recognizer(backbone, recognizer.spec, name=name, options=recognizer.options)


def save(recognizer: Recognizer, folder: str | Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write ``model.safetensors``, ``config.json`` and a model card; `load` reads the folder back.

    The same recognizer and record give the same bytes. The weights carry their own description, so whatever moment a
    save is interrupted at, ``model.safetensors`` is whole and loads; ``config.json`` is the copy for people and hubs.

    Args:
        folder: made if need be; files of an earlier save are replaced.
        record: JSON-able; where the recognizer comes from. ``license``, ``teacher``, ``sources``, ``assets`` and
            ``real_faces_in_training`` are shown on the card.

    Raises:
        InputError: the recognizer was not built by `create` or `load`, or the disk is full.
    """
    folder = Path(folder)
    text = describe(recognizer, folder, record)
    state = {key: value.detach().cpu().contiguous() for key, value in recognizer.backbone.state_dict().items()}
    # One key only: safetensors writes several in an order that changes from run to run.
    atomic_write(folder / WEIGHTS, safetensors.torch.save(state, {"faceless": text}))
    atomic_write(folder / CONFIG, text)
    atomic_write(folder / CARD, card(json.loads(text), parameters(recognizer.backbone)))
    return folder


def describe(recognizer: Recognizer, target: Path, record: Mapping[str, Any] | None) -> str:
    """JSON that says how to build a recognizer, what it wants and where it comes from.

    Raises:
        InputError: it was not built by `create` or `load`, or is a graph from an ONNX file.
    """
    if recognizer.name not in ARCHITECTURES:
        raise InputError(
            f"{target}: only recognizers made by faceless.create or faceless.load can be saved, and no graphs of ONNX"
        )
    config = {
        "architecture": recognizer.name,
        "options": recognizer.options,
        "embedding_dim": recognizer.embedding_dim,
        "input": recognizer.spec.asdict(),
        "record": dict(record or {}),
        "faceless": __version__,
    }
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"


def export_onnx(recognizer: Recognizer, path: str | Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write an ONNX file: RGB faces ``[batch, 3, height, width]`` in 0..255, float32, to embeddings ``[batch, D]``.

    Sides are those of the recognizer's `InputSpec`; nothing is resized. `load` gives the recognizer back with its
    convention; InsightFace's own loader understands the file as well.

    Args:
        path: ends in ``.onnx``.
        record: JSON-able, as for `save`; it travels in the file.

    Raises:
        InputError: the extra ``onnx`` is not installed, the recognizer was not built by `create` or `load`, or the disk
            is full.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise InputError(f"{path}: give a name that ends in .onnx")
    onnx_files.write(recognizer, path, describe(recognizer, path, record))
    return path


def parameters(network: nn.Module) -> int:
    """How many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def card(config: Mapping[str, Any], count: int) -> str:
    """The model card of a recognizer, with the hub's YAML header."""
    record, spec = config["record"], config["input"]
    synthetic = record.get("real_faces_in_training") is False
    tags = ["face-recognition", "knowledge-distillation", *(["synthetic-data"] if synthetic else [])]
    faces = {False: "No real face was used in training.", True: "Real faces were used in training."}.get(
        record.get("real_faces_in_training"), "Not recorded."
    )
    lines = [
        "---",
        f"license: {json.dumps(str(record.get('license', 'other')))}",
        "library_name: faceless",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {config['architecture']}, {config['embedding_dim']} dimensions",
        "",
        f"A face recognizer of {count:,} parameters, written by faceless {config['faceless']}.",
        "",
        "## Use",
        "",
        "```python",
        "import faceless",
        "",
        'recognizer = faceless.load("path/to/this/folder")',
        "embeddings = recognizer.embed(faces)  # faces [B, 3, H, W] uint8 RGB, aligned; unit-norm [B, D]",
        "```",
        "",
        f"Input: {spec['height']} x {spec['width']} pixels, {spec['channel_order']}, mean {spec['mean']}, std "
        f"{spec['std']} of 0..{spec['value_range']:g}; aligned as `faceless.align` does with framing "
        f"`{spec['framing']}`. The recognizer resizes and normalizes by itself.",
        "",
        "## Training faces",
        "",
        faces,
        "",
        "## Limits",
        "",
        "A recognizer inherits the errors of its teacher and of its training faces, and they differ between groups of "
        "people. Measure it on the people and cameras it is meant for, choose the threshold there, and look at every "
        "group by itself. The licences of the teacher's weights and of the training faces bind those of this model.",
        "",
        "## Record",
        "",
        "```json",
        json.dumps(record, indent=2, sort_keys=True).replace("```", "'''"),
        "```",
        "",
    ]
    return "\n".join(lines)
