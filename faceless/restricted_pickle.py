"""Pickles of strangers, read as data.

`load` interprets the opcodes of a pickle itself and never calls anything: a global is an inert name, and "call this
with those arguments" becomes a `Call` that records just that. Whoever reads a format takes the calls that it knows
apart; `array` and `tensor` do so for NumPy arrays and for tensors. `load_saved` reads files of ``torch.save``, old and
new, in the same way, and leaves the numbers in the file until `tensor` asks for them.

Every size that a file states is checked against the bytes that it has, so memory stays in proportion to the file.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from faceless.errors import InputError

MAX_BYTES = 4 << 30
MAX_OPCODES = 2_000_000

# What these would have built is plain data, and is built right away.
DICTS = {"collections.OrderedDict", "builtins.dict", "__builtin__.dict"}
SETS = {"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}
BYTES = {"_codecs.encode", "builtins.bytes", "__builtin__.bytes"}  # how protocols 0 to 2 spell them
ARRAYS = {
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
}
TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_STORAGE_NAMES = {f"torch.{name}" for name in _STORAGES}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before it wrote zip files


@dataclass(frozen=True)
class Global:
    """A name in a module that was not imported."""

    name: str


@dataclass(eq=False)
class Call:
    """A call that was not made: ``name(*args, **kwargs)``, then ``state`` handed to the result."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to something outside of the pickle."""

    key: Any


class _DamagedError(Exception):
    """What is wrong with a pickle, in words."""


def load(path: str | Path, allowed: Collection[str], *, dicts: Collection[str] = ()) -> Any:
    """The data in a pickle file; nothing in it is executed.

    Args:
        path: of the file.
        allowed: globals that may be named, as ``module.name``; calls of them become `Call`.
        dicts: further globals, sub-classes of dict, whose objects are returned as dicts.

    Returns:
        Dicts, lists, tuples, sets, numbers, strings, bytes, and `Call` and `Global` of allowed names. Data may be
        shared and, in a hostile file, contain itself.

    Raises:
        InputError: no such file, too large, cut, damaged, or naming any other global; one line that names it.
    """
    path = Path(path)
    return loads(_file(path), allowed, dicts=dicts, where=str(path))


def _file(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes; pickles of up to {MAX_BYTES} bytes are read")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def loads(data: bytes, allowed: Collection[str], *, dicts: Collection[str] = (), where: str = "pickle") -> Any:
    """`load` of bytes; ``where`` they come from is for the error message.

    >>> import pickle
    >>> loads(pickle.dumps({"a": [1, (2.5, None)], "b": {3}}), ())
    {'a': [1, (2.5, None)], 'b': {3}}
    >>> loads(pickle.dumps(print), ())
    Traceback (most recent call last):
    faceless.errors.InputError: pickle: names builtins.print, which is code and not data; refused, nothing was executed
    """
    return _guarded(where, lambda: _read(BytesIO(data), allowed, DICTS | set(dicts)))


T = TypeVar("T")


def _guarded(where: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except _DamagedError as error:
        raise InputError(f"{where}: {error}") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{where}: damaged ({str(error)[:120]})") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: damaged or cut pickle ({type(error).__name__}: {str(error)[:120]})") from error
    except (MemoryError, RuntimeError) as error:
        raise InputError(f"{where}: damaged pickle, its sizes are impossible ({str(error)[:120]})") from error


def _read(stream: BytesIO, allowed: Collection[str], dicts: Collection[str], persistent: bool = False) -> Any:
    """One pickle from the stream, which is left behind its last opcode."""
    known = {*allowed, *dicts, *SETS, *BYTES}
    stack: list[Any] = []
    below: list[list[Any]] = []  # stacks under the marks
    memo: dict[int, Any] = {}
    copied, size = 0, stream.getbuffer().nbytes

    def named(module: Any, name: Any) -> Global:
        full = f"{module}.{name}"
        if full not in known:
            raise _DamagedError(
                f"names {ascii(full)[1:-1][:100]}, which is code and not data; refused, nothing was executed"
            )
        return Global(full)

    def called(function: Any, args: Any, kwargs: Any = None) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise _DamagedError(f"calls {_kind(function)} with {_kind(args)}, which no honest pickle does; refused")
        nonlocal copied
        # A copy costs more than its opcode.
        copied += len(args[0]) if args and isinstance(args[0], (dict, list, str)) else 0
        if copied > max(MAX_OPCODES, size):
            raise _DamagedError(f"copies more than {MAX_OPCODES} items; refused")
        if function.name in dicts and not kwargs and len(args) < 2:
            return _pairs(args[0]) if args else {}
        if function.name in SETS and not kwargs and len(args) == 1 and isinstance(args[0], list):
            return {_key(item) for item in args[0]}
        if function.name in BYTES:
            return _latin1(args)
        return Call(function.name, args, kwargs or {})

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below.pop()
        return items

    def put(pairs: list[Any]) -> None:
        target = stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise _DamagedError(f"sets items of {_kind(target)}; refused")
        target.update(zip(map(_key, pairs[::2]), pairs[1::2]))

    value: Any
    for count, (opcode, value, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise _DamagedError(f"has more than {MAX_OPCODES} opcodes; refused")
        match opcode.name:
            case "PROTO":
                if value > 5:
                    raise _DamagedError(f"has protocol {value}; up to 5 are read")
            case "FRAME":
                pass
            case "STOP":
                (result,) = stack
                return result
            case "MARK":
                below.append(stack)
                stack = []
            case "POP":
                # The mark itself, when nothing lies on it.
                if stack:
                    stack.pop()
                else:
                    stack = below.pop()
            case "POP_MARK":
                to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                if len(stack) < length:
                    raise _DamagedError("takes more from the stack than lies on it; damaged")
                stack[-length:] = [tuple(stack[-length:])]
            case "TUPLE":
                items = to_mark()
                stack.append(tuple(items))
            case "LIST":
                items = to_mark()
                stack.append(items)
            case "DICT":
                items = to_mark()
                stack.append({})
                put(items)
            case "FROZENSET":
                items = to_mark()
                stack.append(frozenset(map(_key, items)))
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                items = to_mark()
                _list(stack[-1]).extend(items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()]
                put(items[::-1])
            case "SETITEMS":
                put(to_mark())
            case "ADDITEMS":
                items = to_mark()
                if not isinstance(stack[-1], set):
                    raise _DamagedError(f"adds to {_kind(stack[-1])}; refused")
                stack[-1].update(map(_key, items))
            case "GLOBAL":
                stack.append(named(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise _DamagedError(f"names a global by {_kind(module)} and {_kind(name)}; refused")
                stack.append(named(module, name))
            case "INST":
                items = to_mark()
                stack.append(called(named(*value.split(" ", 1)), tuple(items)))
            case "OBJ":
                items = to_mark()
                stack.append(called(items[0], tuple(items[1:])))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(called(stack.pop(), args))
            case "NEWOBJ_EX":
                kwargs, args = stack.pop(), stack.pop()
                if not isinstance(kwargs, dict):
                    raise _DamagedError(f"calls with {_kind(kwargs)} as keywords; refused")
                stack.append(called(stack.pop(), args, kwargs))
            case "BUILD":
                state = stack.pop()
                target = stack[-1]
                if isinstance(target, Call) and target.state is None:
                    target.state = state
                elif not isinstance(target, dict):  # attributes of a dict are of no interest
                    raise _DamagedError(f"sets the state of {_kind(target)}; refused")
            case "PERSID" | "BINPERSID" if persistent:
                stack.append(Persistent(stack.pop() if opcode.name == "BINPERSID" else value))
            case name if name.startswith(("EXT", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER")):
                raise _DamagedError(f"refers by {name} to something outside of the file; refused")
            case _:  # numbers, strings and bytes, which genops has decoded
                stack.append(value)
    raise AssertionError("genops raises ValueError where a pickle ends without STOP")


def _kind(value: Any) -> str:
    if isinstance(value, Call):
        return f"the result of {value.name}"
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _DamagedError(f"appends to {_kind(value)}; refused")
    return value


def _key(value: Any) -> Any:
    """Something to be hashed. Tuples must be flat: hashing deep ones overflows the interpreter's stack."""
    plain = (str, bytes, int, float, type(None))
    if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(item, plain) for item in value)):
        return value
    raise _DamagedError(f"uses {_kind(value)} as a key; refused")


def _pairs(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return dict(value)
    return {_key(key): item for key, item in _list(value)}


def array(value: Any, where: str = "pickle") -> np.ndarray:
    """The NumPy array (or scalar, as an array of no dimensions) that a `Call` of one of `ARRAYS` describes.

    Raises:
        InputError: it describes none, or other elements than numbers.
    """
    return _guarded(where, lambda: _array(value))


def _array(value: Any) -> np.ndarray:
    match value:
        case Call(name=name, args=(dtype, content)) if name.endswith("multiarray.scalar"):
            return _elements(content, _dtype(dtype), (), "C")
        case Call(name=name, state=(_, shape, dtype, fortran, content)) if name.endswith("multiarray._reconstruct"):
            return _elements(content, _dtype(dtype), shape, "F" if fortran else "C")
        case Call(name=name, args=(content, dtype, shape, "C" | "F" as order)) if name.endswith("numeric._frombuffer"):
            return _elements(content, _dtype(dtype), shape, order)
        case Call(name=name, args=(content, dtype, shape, "K", axes)) if name.endswith("numeric._frombuffer"):
            return _elements(content, _dtype(dtype), shape, "C").transpose(_sizes(axes))
    raise _DamagedError(f"holds {_kind(value)} in the place of an array")


def _elements(content: Any, dtype: np.dtype, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    content, shape = _bytes(content), _sizes(shape)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise _DamagedError(f"has {len(content)} bytes for an array of {list(shape)[:8]} {dtype}")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _sizes(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, tuple)
        or len(value) > 16
        or any(type(n) is not int or not 0 <= n < 1 << 40 for n in value)
    ):
        raise _DamagedError("has an array or tensor of impossible shape")
    return value


def _latin1(args: tuple[Any, ...]) -> bytes:
    match args:
        case ():
            return b""
        case (str(text), "latin1"):
            return text.encode("latin1")
    raise _DamagedError("spells bytes in an unknown way; refused")


def _bytes(value: Any) -> bytes:
    match value:
        case str():  # of Python 2
            return value.encode("latin1")
        case bytes() | bytearray():
            return bytes(value)
    raise _DamagedError(f"holds {_kind(value)} in the place of bytes")


def _dtype(value: Any) -> np.dtype:
    match value:
        case Call(name="numpy.dtype", args=(str(code), *_), state=state):
            order: Any = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
            if len(code) <= 3 and code[:1] in ("b", "i", "u", "f") and order in ("<", ">", "=", "|"):
                return np.dtype(code).newbyteorder(order)
    raise _DamagedError("has an array of other elements than numbers")


class Storages:
    """The numbers of a ``torch.save`` file, by the keys that its pickle gives them; read when they are asked for."""

    def __init__(self, read: Callable[[str], bytes]):
        self._read = read

    def elements(self, value: Any) -> Tensor:
        """The flat tensor that a persistent reference or a pickled storage stands for."""
        match value:
            case Persistent(key=("storage", Global(name=name), str(key), _, int(count), *_)):
                dtype, content = _STORAGES[name.removeprefix("torch.")], self._read(key)
            case Call(name="torch.storage._load_from_bytes", args=(saved,)):
                # The bytes of a file of its own, inside of the pickle.
                inner, storages = _saved_stream(_bytes(saved), (), DICTS)
                if not isinstance(inner, Persistent):
                    raise _DamagedError(f"holds {_kind(inner)} in the place of a storage")
                return storages.elements(inner)
            case _:
                raise _DamagedError(f"holds {_kind(value)} in the place of a storage")
        if count * dtype.itemsize != len(content):
            raise _DamagedError(f"has a storage of {len(content)} bytes that should hold {count} {dtype}")
        return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _nowhere(key: str) -> bytes:
    raise _DamagedError(f"refers to a storage {ascii(key)[:40]} that is not in it")


def load_saved(path: str | Path, allowed: Collection[str], *, dicts: Collection[str] = ()) -> tuple[Any, Storages]:
    """What ``torch.save`` wrote, in its present format or that before version 1.6; nothing in it is executed.

    Args:
        path, allowed, dicts: as for `load`; `TENSORS` and the types of storages are always allowed.

    Returns:
        The data, in which tensors are `Call` (see `tensor`), and the storages that `tensor` needs.

    Raises:
        InputError: as for `load`.
    """
    path, dicts = Path(path), DICTS | set(dicts)
    data = _file(path)
    if not zipfile.is_zipfile(path):
        return _guarded(str(path), lambda: _saved_stream(data, allowed, dicts))

    def read() -> tuple[Any, Storages]:
        archive = zipfile.ZipFile(BytesIO(data))
        entries = {entry.filename: entry for entry in archive.infolist()}
        (root,) = (name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl"))
        # Only the code of TorchScript, which nobody reads, may be.
        wanted = [entry for name, entry in entries.items() if not name.startswith(f"{root}/code/")]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in wanted):
            raise _DamagedError("holds compressed data, which torch.save never writes; refused")
        if f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder") != b"little":
            raise _DamagedError("was written on a big-endian machine; convert it there")
        found = _read(BytesIO(archive.read(f"{root}/data.pkl")), {*allowed, *TENSORS, *_STORAGE_NAMES}, dicts, True)
        return found, Storages(lambda key: archive.read(f"{root}/data/{key}"))

    return _guarded(str(path), read)


def _saved_stream(data: bytes, allowed: Collection[str], dicts: Collection[str]) -> tuple[Any, Storages]:
    """The format before version 1.6: five pickles, then the storages."""
    stream = BytesIO(data)
    known = {*allowed, *TENSORS, *_STORAGE_NAMES}
    magic, protocol, _, found, keys = (_read(stream, known, dicts, True) for _ in range(5))
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(keys, list):
        raise _DamagedError("is not of torch.save's format")
    # Each storage is its number of elements and these; their size stands in the pickle alone.
    sizes = _storage_sizes(found)
    parts, begin = {}, stream.tell()
    for key in keys:
        count, size = sizes[key]
        if int.from_bytes(data[begin : begin + 8], "little") != count or begin + 8 + size > len(data):
            raise _DamagedError("has a storage that disagrees with itself about its size")
        parts[key] = (begin + 8, size)
        begin += 8 + size

    def read(key: str) -> bytes:
        start, size = parts[key]
        return data[start : start + size]

    return found, Storages(read)


def _storage_sizes(found: Any) -> dict[str, tuple[int, int]]:
    """Elements and bytes of every storage that is referred to."""
    sizes, seen, todo = {}, set(), [found]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match value:
            case Persistent(key=("storage", Global(name=name), str(key), _, int(count), *_)):
                sizes[key] = (count, max(count, 0) * _STORAGES[name.removeprefix("torch.")].itemsize)
            case Call():
                todo += [value.args, value.kwargs, value.state]
            case dict():
                todo += value.values()
            case list() | tuple():
                todo += value
    return sizes


def tensor(value: Any, storages: Storages | None = None, where: str = "pickle") -> Tensor:
    """The tensor that a `Call` of one of `TENSORS` describes, contiguous, on the CPU.

    Args:
        value: the call.
        storages: of the file, if `load_saved` read it.
        where: the file, for the error message.

    Raises:
        InputError: it describes none, or one that reaches beyond its storage.
    """
    return _guarded(where, lambda: _tensor(value, storages or Storages(_nowhere)))


def _tensor(value: Any, storages: Storages) -> Tensor:
    match value:
        case Call(name="torch._utils._rebuild_parameter", args=(Call(name=name) as inner, *_)) if name in _REBUILD:
            return _tensor(inner, storages)
        case Call(name=name, args=(storage, offset, size, stride, *_)) if name in _REBUILD:
            flat = storages.elements(storage)
            size, stride = _sizes(size), _sizes(stride)
            if len(size) != len(stride) or type(offset) is not int or offset < 0:
                raise _DamagedError("has a tensor of impossible shape")
            last = offset + sum((n - 1) * step for n, step in zip(size, stride))
            # A stride of 0 makes much out of little.
            if math.prod(size) and (last >= len(flat) or math.prod(size) > len(flat)):
                raise _DamagedError(f"has a tensor of {list(size)[:8]} on a storage of {len(flat)}")
            return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
    raise _DamagedError(f"holds {_kind(value)} in the place of a tensor")
