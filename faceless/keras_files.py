"""Weights of Keras models, as GhostFaceNets publishes them; nothing in them is built or run.

A model that Keras saved as ``.h5`` holds a description, which is not read (it may hold marshalled code), and a group of
arrays for each layer. Keras 3 numbers layers and arrays, in ``.weights.h5`` and in the archive ``.keras``, of whose
description the kinds and names of layers are read as text, and nothing else.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faceless.backbones.ghostfacenet import BOTTLENECKS, LAST_OF_V2, GhostFaceNet, rounded
from faceless.errors import InputError

MAX_ENTRIES, MAX_NUMBERS = 20_000, 1 << 28
#: What Keras 3 puts into an archive, and how many bytes of it are enough for any recognizer and its optimizer.
MEMBERS = {"metadata.json": 1 << 20, "config.json": 1 << 26, "model.weights.h5": 1 << 32}
#: Keras 3's names of kinds of layers, and the arrays that it numbers.
VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("depthwise_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "p_re_lu": ("alpha",),
    "dense": ("kernel", "bias"),
}
#: What Keras calls the parameters and statistics of layers, and what PyTorch does.
NAMES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "alpha": "weight",
}
# Layers that their authors named: in both versions, in V2, and in each bottleneck of V2.
HEAD = {"head.0": "GDC_dw", "head.1": "GDC_batchnorm", "head.2": "GDC_conv", "head.4": "pre_embedding"}
ENDS = {
    "stem.0": "stem_conv",
    "stem.1": "stem_bn",
    "stem.2": "stem_prelu",
    "tail.0": "pre_conv",
    "tail.1": "pre_bn",
    "tail.2": "pre_prelu",
}
BOTTLENECK = {
    "expand.primary.0": "ghost_1_prim_conv",
    "expand.primary.1": "ghost_1_prim_bn",
    "expand.primary.2": "ghost_1_prim_prelu",
    "expand.cheap.0": "ghost_1_cheap_dw_conv",
    "expand.cheap.1": "ghost_1_cheap_bn",
    "expand.cheap.2": "ghost_1_cheap_prelu",
    "gate.layers.1": "ghost_1_short_1_conv",
    "gate.layers.2": "ghost_1_short_1_bn",
    "gate.layers.3": "ghost_1_short_2_dw_conv",
    "gate.layers.4": "ghost_1_short_2_bn",
    "gate.layers.5": "ghost_1_short_3_dw_conv",
    "gate.layers.6": "ghost_1_short_3_bn",
    "down.0": "down_dw_conv",
    "down.1": "down_bn",
    "squeeze.reduce": "se_1_conv",
    "squeeze.activation": "se_prelu",
    "squeeze.expand": "se_2_conv",
    "project.primary.0": "ghost_2_prim_conv",
    "project.primary.1": "ghost_2_prim_bn",
    "project.cheap.0": "ghost_2_cheap_dw_conv",
    "project.cheap.1": "ghost_2_cheap_bn",
    "shortcut.0.0": "short_1_dw_conv",
    "shortcut.0.1": "short_1_bn",
    "shortcut.1.0": "short_2_conv",
    "shortcut.1.1": "short_2_bn",
}
WIDTHS = tuple(step / 20 for step in range(5, 161))

Layers = dict[str, dict[str, Tensor]]


def read(path: Path) -> Layers:
    """The arrays of each layer: its name, then ``kernel``, ``gamma`` and so on.

    Raises:
        InputError: h5py is not installed, or no HDF5 file, or one that refers to other files, holds anything but plain
            arrays of floating-point numbers for weights, or promises more numbers than it has.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: weights of Keras need h5py; pip install faceless-distill[keras]") from error
    try:
        source, called = _unpacked(path) if path.suffix == ".keras" else (path, None)
        with h5py.File(source, "r") as file:
            layers = _layers(file, called, path, h5py)
    except InputError:
        raise
    except Exception as error:  # h5py and zipfile raise many types for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not readable as weights of Keras ({type(error).__name__}: {reason})") from error
    if not layers:
        raise InputError(f"{path}: holds no layers of Keras")
    return layers


def _unpacked(path: Path) -> tuple[io.BytesIO, dict[str, str]]:
    """The HDF5 file in an archive of Keras 3, and the names of the layers that it numbers; nothing is extracted."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(MEMBERS):
            held = ", ".join(repr(name[:40]) for name in names[:5]) or "nothing"
            raise InputError(f"{path}: holds {held}; Keras 3 writes {', '.join(MEMBERS)}, each once")
        for entry in archive.infolist():
            # Compressed, little could unfold to much; what is stored is no larger than the file.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise InputError(f"{path}: {entry.filename} is compressed, which Keras never does")
            if entry.file_size > MEMBERS[entry.filename]:
                raise InputError(f"{path}: {entry.filename} is larger than that of any recognizer")
        description = json.loads(archive.read("config.json"))
        return io.BytesIO(archive.read("model.weights.h5")), _called(description)


def _called(description: Any) -> dict[str, str]:
    """Names of layers by where Keras 3 keeps them: after their class, numbered in the order of the network.

    >>> kinds = [("Conv2D", "stem"), ("PReLU", "act"), ("Conv2D", "last")]
    >>> _called({"config": {"layers": [{"class_name": kind, "config": {"name": name}} for kind, name in kinds]}})
    {'conv2d': 'stem', 'p_re_lu': 'act', 'conv2d_1': 'last'}
    """
    found: dict[str, str] = {}
    made: Counter[str] = Counter()
    for layer in description["config"]["layers"]:
        kind = re.sub(r"\W+", "", layer["class_name"])
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
        found[f"{kind}_{made[kind]}" if made[kind] else kind] = str(layer["config"]["name"])
        made[kind] += 1
    if len(set(found.values())) != len(found):
        raise ValueError("two layers have one name")
    return found


def _layers(file: Any, called: Mapping[str, str] | None, path: Path, h5py: Any) -> Layers:
    """The arrays of a file by layer; ``called`` names those that Keras 3 numbers, else the file itself does."""
    top = file
    if "model_weights" in file and isinstance(file.get("model_weights", getlink=True), h5py.HardLink):
        top = file["model_weights"]
    numbered = called is not None or "layers" in top
    layers: Layers = {}
    total = 0
    for names, array in _arrays(top, h5py):
        # States of optimizers, metrics and random generators.
        if len(names) < 2 or {"optimizer_weights", "seed_generator"} & set(names):
            continue
        if numbered and names[0] != "layers":
            continue
        layer, key = names[0], names[-1].partition(":")[0]
        if numbered:
            if names[2:-1] != ["vars"]:
                raise ValueError(f"{'/'.join(names)[:80]!r} is of a network in a network")
            place = names[1]
            name = array.parent.attrs.get("name") if called is None else called.get(place)
            if not isinstance(name, str):
                raise ValueError(f"{place[:80]!r} has no name; save the model as .keras")
            layer = name
            key = dict(zip("0123", VARIABLES.get(re.sub(r"_\d+$", "", place), ()))).get(key, key)
        total += array.size
        # A file could name numbers that it does not hold, or that unfold to any amount.
        if array.dtype.kind != "f" or array.size * array.dtype.itemsize != array.id.get_storage_size():
            raise InputError(f"{path}: {'/'.join(names)[:80]} is no plain array of numbers")
        if total > MAX_NUMBERS:
            raise InputError(f"{path}: holds more numbers than any recognizer has")
        arrays = layers.setdefault(layer, {})
        if key in arrays:
            raise ValueError(f"{layer[:80]!r} has {key[:80]!r} twice")
        arrays[key] = torch.from_numpy(array[()].astype("float32"))
    return layers


def _arrays(top: Any, h5py: Any) -> Iterator[tuple[list[str], Any]]:
    """Names on the way to each array, and the array; links to other places and files are refused."""
    groups: list[tuple[list[str], Any]] = [([], top)]
    count = 0
    while groups:
        names, group = groups.pop()
        for name in group:
            count += 1
            if count > MAX_ENTRIES:
                raise ValueError("groups within groups without end")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name[:80]!r} is a link")
            found = group[name]
            if isinstance(found, h5py.Group):
                groups.append(([*names, name], found))
            elif isinstance(found, h5py.Dataset):
                if found.external or found.is_virtual or found.compression or found.chunks:
                    raise ValueError(f"{name[:80]!r} is not stored as it is")
                yield [*names, name], found


def ghostfacenet(path: Path, given: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, options and PyTorch state dict of a GhostFaceNet.

    The width is that of the first and last layer. A head of 4 pixels is of stride 2 at 112, others are of stride 1,
    unless ``given`` says otherwise.

    Raises:
        InputError: see `read`; or layers that are not those of a GhostFaceNet.
    """
    layers = read(path)
    version = 2 if "stem_conv" in layers else 1
    try:
        convolutions = ["stem_conv", "pre_conv"] if version == 2 else _of_kind(layers, "conv")
        ends = convolutions[0], convolutions[-1]
        stem, tail = (layers[name]["kernel"].shape[-1] for name in ends)
        side, dim = next(iter(layers["GDC_dw"].values())).shape[0], layers["GDC_conv"]["kernel"].shape[-1]
    except (KeyError, IndexError) as error:
        raise InputError(f"{path}: layers are missing ({error}); of Keras, GhostFaceNets are read") from error
    base = LAST_OF_V2 if version == 2 else BOTTLENECKS[-1][2]
    fits = [width for width in WIDTHS if (rounded(16 * width), rounded(base * width)) == (stem, tail)]
    if not fits:
        raise InputError(f"{path}: {stem} and {tail} channels are of no width of a GhostFaceNet")
    stride = given.get("stride", 2 if side == 4 else 1)
    if stride not in (1, 2):
        raise InputError(f"{path}: stride is {stride!r}; use 1 or 2")
    size = 112 if side == -(-112 // (16 * stride)) else 16 * stride * side
    # Of the widths that give these channels, the roundest.
    options: dict[str, Any] = {"width": min(fits, key=lambda width: len(str(width))), "stride": stride}
    with torch.device("meta"):
        network = GhostFaceNet(version, **options, embedding_dim=dim, input_size=size)
    state: dict[str, Tensor] = {}
    for place, name in _places(network, layers, version):
        module = network.get_submodule(place)
        for key, value in layers.pop(name, {}).items():
            if value.ndim == 4:
                grouped = isinstance(module, nn.Conv2d) and module.groups > 1
                value = value.permute((2, 3, 0, 1) if grouped else (3, 2, 0, 1))
            elif key == "alpha":
                value = value.flatten()
            state[f"{place}.{NAMES.get(key, key)}"] = value.contiguous()
    state |= {f"{name}.{key}": value for name, arrays in layers.items() for key, value in arrays.items()}
    options |= {"embedding_dim": dim, "input_size": size}
    return ("ghostfacenet-v2" if version == 2 else "ghostfacenet"), options, state


def _places(network: GhostFaceNet, layers: Layers, version: int) -> Iterator[tuple[str, str]]:
    """Modules of ours and the layers of Keras that belong there."""
    yield from HEAD.items()
    if version == 2:
        yield from ENDS.items()
        there = {place for place, _ in network.named_modules()}
        for number in range(len(network.bottlenecks)):
            for place, name in BOTTLENECK.items():
                if f"bottlenecks.{number}.{place}" in there:
                    yield f"bottlenecks.{number}.{place}", f"stack{number + 1}_{name}"
        return
    # V1's layers have the names that Keras numbers in the order they are made in, which is that of our modules.
    modules = [(place, module) for place, module in network.named_modules() if place not in HEAD]
    for kind, is_kind in (
        ("conv", lambda m: isinstance(m, nn.Conv2d) and m.groups == 1),
        ("depthwise", lambda m: isinstance(m, nn.Conv2d) and m.groups > 1),
        ("norm", lambda m: isinstance(m, nn.BatchNorm2d)),
        ("prelu", lambda m: isinstance(m, nn.PReLU)),
    ):
        yield from zip([place for place, module in modules if is_kind(module)], _of_kind(layers, kind))


def _of_kind(layers: Layers, kind: str) -> list[str]:
    """Names of all layers of a kind but those of the head, by their numbers.

    >>> kernel = torch.zeros(1, 1, 1, 1)
    >>> layers = {"conv2d_10": {"kernel": kernel}, "conv2d": {"kernel": kernel}, "dense": {"kernel": kernel[0, 0]}}
    >>> _of_kind(layers, "conv")
    ['conv2d', 'conv2d_10']
    """
    found = []
    for name, arrays in layers.items():
        if "gamma" in arrays:
            this = "norm"
        elif "alpha" in arrays:
            this = "prelu"
        elif any(array.ndim == 4 for array in arrays.values()):
            this = "depthwise" if name.startswith("depthwise") else "conv"
        else:
            continue
        if this == kind and name not in HEAD.values():
            found.append(name)
    return sorted(found, key=lambda name: int((re.findall(r"_(\d{1,9})$", name) or ["0"])[0]))
