"""Readers of strangers' files: of any bytes they make data or one line of complaint, and they execute nothing.

A few examples run in CI. 100,000 of them, by hand:

    FACELESS_FUZZ=34000 pytest tests/faceless/test_fuzz.py
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from eval.benchmarks import pairs
from faceless import assets, keras_files, restricted_pickle
from faceless.backbones.dlib_resnet import read_dat
from faceless.errors import InputError
from faceless.restricted_pickle import ARRAYS, TENSORS

EXAMPLES = int(os.environ.get("FACELESS_FUZZ", "40"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: What Python reports (PEP 578) when code is run, found, or files are changed.
FORBIDDEN = (
    *("exec", "compile", "import", "code.__new__", "pickle.find_class", "ctypes.dlopen"),
    *("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"),
    *("os.remove", "os.rename", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"),
)
#: Libraries import parts of themselves, and codecs, when they first need them.
LIBRARIES = ("encodings", "PIL", "numpy", "torch")
PLACES = tuple({sys.prefix, sys.base_prefix, *(str(Path(m.__file__).parent.parent) for m in (np, torch))})
_armed = False
_seen: list[str] = []


def _listen(event: str, arguments: tuple) -> None:
    if _armed and (event in FORBIDDEN or event == "open") and not _harmless(event, arguments):
        _seen.append(f"{event} {arguments!r:.200}")


def _harmless(event: str, arguments: tuple) -> bool:
    match event:
        case "open":
            return not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        case "import":
            return arguments[0].partition(".")[0] in LIBRARIES
        case "exec":
            return arguments[0].co_filename.startswith(PLACES)
        case "compile":
            return str(arguments[1]).startswith(PLACES)
    return False


sys.addaudithook(_listen)


@contextmanager
def watched() -> Iterator[None]:
    global _armed
    _seen.clear()
    _armed = True
    try:
        yield
    finally:
        _armed = False
    assert not _seen, _seen


def judged(read: Callable[[], object]) -> bool:
    """Whether something was read; anything but data and one line of complaint fails the test."""
    with watched():
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error)
            return False
    return True


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


HOSTILE = [
    b"cos\nsystem\n(S'touch boom'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"(S'touch boom'\nios\nsystem\n",
    b"(cos\nsystem\nS'x'\no",
    short("os") + short("system") + b"\x93" + short("touch boom") + b"\x85R",
    short("pathlib") + short("Path") + b"\x93)\x81",
    b"cnumpy\ndtype\n(S'f4'\ntR",
    b"cnumpy\ndtype\n(S'O'\ntR",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x06\x00\x00\x00latin1tR",
    b"\x8e" + struct.pack("<Q", 1 << 60),
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f\x01",
    b"r\xff\xff\xff\xff",
    b"Pos.system\n",
    b"\x82\x01",
]
#: All opcodes, some with an argument.
OPCODES = [bytes([code]) for code in b"().0129NQRabdelopqtsu}]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98"]
OPCODES += [b"K\x01", b"M\x00\x01", b"J\xff\xff\xff\xff", b"q\x00", b"h\x00", b"h\x01", b"I1\n", b"F1.5\n", b"L5L\n"]
OPCODES += [b"\x80\x02", b"\x80\x04", b"\x80\x05", b"\x95" + bytes(8), b"C\x02ab", b"U\x02ab", b"S'ab'\n", b"V ab\n"]
OPCODES += [b"G" + struct.pack(">d", 2.5), b"\x8a\x01\x05", b"B\x02\x00\x00\x00ab", b"g0\n", b"p0\n", short("a")]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "drop", "repeat", "cut", "number"]),
        st.integers(0, (1 << 32) - 1),
        st.one_of(st.sampled_from(HOSTILE + OPCODES), st.binary(min_size=1, max_size=8)),
    ),
    max_size=6,
)


def mutated(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(content)
    for kind, where, payload in changes:
        at, span = where % (len(data) + 1), 1 + where // 65_537 % 40
        if kind == "flip" and at < len(data):
            data[at] ^= payload[0] or 1
        elif kind == "insert":
            data[at:at] = payload
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "cut":
            del data[at:]
        elif kind == "number":
            size = (1, 2, 4, 8)[where % 4]
            data[at : at + size] = ((1 << 8 * size) - 1 - payload[0]).to_bytes(size, "little")
    return bytes(data)


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["Conv2D", "stem"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["config", "layers", "class_name", "name"]), inner)
    ),
    max_leaves=8,
)
programs = st.lists(st.sampled_from(HOSTILE + OPCODES), max_size=25).map(lambda parts: b"".join(parts) + b".")


def use(content: bytes) -> None:
    """All that readers of formats do with a pickle."""
    found = restricted_pickle.loads(content, ARRAYS | TENSORS, where="file")
    parts = [found, *found] if isinstance(found, (list, tuple)) else [found]
    for part in parts:
        for read in (restricted_pickle.array, restricted_pickle.tensor):
            try:
                read(part, where="file")
            except InputError as error:
                assert "\n" not in str(error)


PICKLES = [
    pickle.dumps(value, protocol)
    for protocol in (0, 2, 4, 5)
    for value in (
        {"a": [1, (2.5, None)], "b": {3, "x"}, "c": b"bytes", "d": 1 << 70},
        [np.arange(6, dtype="<f4").reshape(2, 3), np.float64(2.5), np.array([True, False])],
        torch.arange(6.0).view(2, 3),
    )
]


@pytest.fixture(scope="module", autouse=True)
def libraries(shared_memory, dat) -> None:
    """What they import when they first read, and first complain."""
    Image.init()
    for name, seeds, read in (("x.bin", BINS, read_pairs), ("x.dat", dat, read_dat)):
        for content in (*seeds, seeds[0][:50], b"nothing"):
            (shared_memory / name).write_bytes(content)
            with suppress(InputError):
                read(shared_memory / name)


@many
@given(st.sampled_from(PICKLES).flatmap(lambda seed: edits.map(lambda e: mutated(seed, e))) | programs)
def test_pickles(content):
    judged(lambda: use(content))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return stream.getvalue()


BINS = [
    pickle.dumps(([png()] * 20, [True, False] * 5), 2),
    pickle.dumps(([png()] * 20, np.array([True, False] * 5)), 4),
    pickle.dumps(([np.frombuffer(png(), np.uint8)] * 20, [np.bool_(n % 2) for n in range(10)]), 2),
    pickle.dumps(([np.zeros((4, 4, 3), np.uint8)] * 20, [True, False] * 5), 5),
]


def read_pairs(path: Path) -> None:
    found = pairs.load(path, 8)
    for _ in zip(range(2), found.faces()):
        pass


@pytest.fixture(scope="module")
def shared_memory(tmp_path_factory) -> Path:
    """A folder for files that are written very often."""
    return tmp_path_factory.mktemp("fuzz")


@many
@given(seed=st.sampled_from(BINS), changes=edits)
def test_lists_of_pairs(shared_memory, seed, changes):
    path = shared_memory / "x.bin"
    path.write_bytes(mutated(seed, changes))
    judged(lambda: read_pairs(path))


@pytest.fixture(scope="module")
def dat() -> list[bytes]:
    """The header of dlib's file, and more of it: whole, it takes too long to be read often."""
    content = assets.fetch("dlib-resnet29").read_bytes()
    return [content[:size] for size in (300, 1_000, 25_000, 120_000)]


@many
@given(number=st.integers(0, 3), changes=edits)
def test_dlib_networks(shared_memory, dat, number, changes):
    path = shared_memory / "x.dat"
    path.write_bytes(mutated(dat[number], changes))
    assert not judged(lambda: read_dat(path))  # cut as they are, they never are whole


@pytest.fixture(scope="module")
def archive(shared_memory) -> bytes:
    """Of Keras 3, with one layer; the checksums of the archive keep what is altered away from the HDF5 library."""
    h5py = pytest.importorskip("h5py")
    path, stream = shared_memory / "x.keras", io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["layers/conv2d/vars/0"] = np.ones((1, 1, 3, 2), "f4")
    layer = b'{"config": {"layers": [{"class_name": "Conv2D", "config": {"name": "stem"}}]}}'
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (
            ("metadata.json", b"{}"),
            ("config.json", layer),
            ("model.weights.h5", stream.getvalue()),
        ):
            file.writestr(name, content)
    content = path.read_bytes()
    assert list(keras_files.read(path)) == ["stem"]
    path.write_bytes(content[:-30])
    with suppress(InputError):
        keras_files.read(path)
    return content


@many
@given(changes=edits)
def test_archives_of_keras(shared_memory, archive, changes):
    path = shared_memory / "x.keras"
    path.write_bytes(mutated(archive, changes))
    judged(lambda: keras_files.read(path))


@many
@given(description=st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()))
def test_descriptions_of_keras(shared_memory, archive, description):
    path = shared_memory / "y.keras"
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, description if name == "config.json" else old.read(name))
    judged(lambda: keras_files.read(path))


def test_seeds_are_read_and_memory_stayed_small():
    """If honest files were refused, the tests above would say little."""
    for seed in PICKLES:
        use(seed)
    for seed in BINS:
        restricted_pickle.loads(seed, ARRAYS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # KiB


def test_the_watch_sees_what_it_should(tmp_path):
    for act in (
        lambda: exec("1"),
        lambda: pickle.loads(pickle.dumps(os.getcwd)),
        lambda: os.system("true"),
        lambda: (tmp_path / "x").write_text("x"),
    ):
        with pytest.raises(AssertionError), watched():
            act()
