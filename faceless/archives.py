"""TorchScript and ExportedProgram files, read as data.

Both hold a program beside the weights. Programs of strangers are not run, not even parsed: TorchScript can read and
write files, and loading an ExportedProgram evaluates expressions that stand in it. What is read are the tensors and
their names; when these are of a network that we know, ours computes it.
"""

from __future__ import annotations

import io
import json
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from faceless.errors import InputError
from faceless.restricted_pickle import Call, Storages, load_saved, tensor

SCRIPT = "__torch__."
#: Lists and such that TorchScript keeps as attributes; passed over.
ATTRIBUTES = {
    "torch.jit._pickle." + name
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
}
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
MAX_DEPTH = 64
T = TypeVar("T")


def is_torchscript(path: Path) -> bool:
    """Whether ``torch.jit.save`` wrote this."""
    return _has(path, lambda name: name.endswith("/constants.pkl"))


def is_exported(path: Path) -> bool:
    """Whether ``torch.export.save`` wrote this."""
    return _has(
        path, lambda name: name.endswith("weights_config.json") or Path(name).name == "serialized_state_dict.pt"
    )


def _has(path: Path, wanted: Callable[[str], bool]) -> bool:
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(wanted(name) for name in archive.namelist())
    except Exception:  # zipfile raises many types for a damaged directory; whoever reads the file says what is wrong
        return False


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except InputError:
        raise
    except Exception as error:  # of a damaged archive, damaged JSON, or shapes that do not fit
        raise InputError(f"{path}: damaged archive ({type(error).__name__}: {str(error)[:120]})") from error


def torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript file by the names that its modules had.

    Raises:
        InputError: the file is damaged.
    """
    return _guarded(path, lambda: _torchscript_tensors(path))


def _torchscript_tensors(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        pickled = _stored(archive, name, path)
    classes = {
        text.replace(" ", ".", 1)
        for opcode, text, _ in pickletools.genops(pickled)
        if opcode.name == "GLOBAL" and isinstance(text, str) and text.startswith(SCRIPT)
    }
    found, storages = load_saved(path, classes | ATTRIBUTES)
    tensors: dict[str, Tensor] = {}
    _collect(found, "", storages, tensors, path, 0)
    return tensors


def _collect(value: Any, prefix: str, storages: Storages, into: dict[str, Tensor], path: Path, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"{path}: its modules are nested more than {MAX_DEPTH} deep")
    if not isinstance(value, Call) or not isinstance(value.state, dict):
        raise InputError(f"{path}: holds no module")
    for name, item in value.state.items():
        if not isinstance(item, Call):
            continue
        if item.name.startswith("torch._utils._rebuild"):
            into[f"{prefix}{name}"] = tensor(item, storages, str(path))
        elif item.name.startswith(SCRIPT) and item.state is not None:
            _collect(item, f"{prefix}{name}.", storages, into, path, depth + 1)


def exported_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of an ExportedProgram by name.

    Raises:
        InputError: the file is damaged.
    """
    return _guarded(path, lambda: _exported_tensors(path))


def _exported_tensors(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        config = next((name for name in names if name.endswith("weights_config.json")), None)
        if config is None:  # before PyTorch 2.8
            (saved,) = (name for name in names if Path(name).name == "serialized_state_dict.pt")
            state = torch.load(io.BytesIO(_stored(archive, saved, path)), map_location="cpu", weights_only=True)
            return dict(state)
        folder = config.rpartition("/")[0]
        entries = json.loads(_stored(archive, config, path))["config"]
        payloads: dict[str, bytes] = {}
        found = {}
        for name, entry in entries.items():
            if entry["use_pickle"]:
                raise InputError(f"{path}: {name[:80]} is pickled; save a plain state dict")
            meta, where = entry["tensor_meta"], f"{folder}/{entry['path_name']}"
            if where not in payloads:
                payloads[where] = _stored(archive, where, path)
            sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
            found[name] = _strided(
                payloads[where], DTYPES[meta["dtype"]], sizes, strides, int(meta["storage_offset"]["as_int"])
            )
        return found


def _strided(data: bytes, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    # A stride of 0 makes much out of little.
    if math.prod(sizes) > len(flat) or min([offset, *sizes, *strides]) < 0:
        raise ValueError(f"{sizes} of {len(flat)} numbers")
    return flat.as_strided(sizes, strides, offset).clone(memory_format=torch.contiguous_format)


def _stored(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
        raise InputError(f"{path}: {name[:80]} is compressed, which PyTorch never writes")
    return archive.read(name)
