"""Pickles read as data: the same values as pickle's own, and twenty that would do harm if anything were executed."""

import argparse
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faceless import restricted_pickle as pickles
from faceless.errors import InputError
from faceless.restricted_pickle import ARRAYS, TENSORS, Call, load, load_saved, loads, tensor

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
data = st.recursive(
    scalars | st.frozensets(keys) | st.sets(keys),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@settings(max_examples=50)
@given(data, st.integers(0, 5))
def test_plain_data_is_what_pickle_reads(value, protocol):
    found, expected = loads(pickle.dumps(value, protocol), ()), pickle.loads(pickle.dumps(value, protocol))
    assert repr(found) == repr(expected) or found == expected


def test_shared_and_cyclic_data_stay_so():
    cycle = [1]
    cycle.append(cycle)
    found = loads(pickle.dumps(cycle), ())
    assert found[0] == 1 and found[1] is found
    both = loads(pickle.dumps([cycle, cycle]), ())
    assert both[0] is both[1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "u1", "?", "<f2"])
def test_arrays(dtype, protocol):
    given = np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(0, 2, 1)
    for value in (given, np.asfortranarray(given), given[0, 0, 1], given[:, :0]):
        found = pickles.array(loads(pickle.dumps(value, protocol), ARRAYS))
        assert found.dtype == np.asarray(value).dtype and np.array_equal(found, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_pickled_by_themselves(dtype):
    x = torch.arange(24).view(4, 6).to(dtype)
    for value in (x, x.T, x[1:, ::2], x[0, 0], x[:0], torch.nn.Parameter(x.float())):
        assert torch.equal(tensor(loads(pickle.dumps(value), TENSORS)), value)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save(tmp_path, zipped):
    x = torch.randn(3, 4)
    content = {"net": OrderedDict(a=x, view=x[1]), "net2": torch.nn.Linear(2, 3).state_dict(), "step": 7}
    content["args"] = argparse.Namespace(size=64)
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found, storages = load_saved(tmp_path / "x.pt", {"argparse.Namespace"})
    assert found["step"] == 7 and found["args"].state == {"size": 64}
    assert torch.equal(tensor(found["net"]["a"], storages), x) and torch.equal(
        tensor(found["net"]["view"], storages), x[1]
    )
    assert torch.equal(tensor(found["net2"]["weight"], storages), content["net2"]["weight"])
    with pytest.raises(InputError, match=r"x\.pt: names argparse\.Namespace"):
        load_saved(tmp_path / "x.pt", ())


class Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


BOOM = "touch boom"
STRANGE = b"\x80\x04"  # protocol 4


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def legacy_file(obj: bytes) -> bytes:
    """What _load_from_bytes would unpickle, without restriction, inside of the pickle."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join(start) + obj + pickle.dumps([], 2)


HOSTILE = {
    "os.system": (pickle.dumps(Reduce(os.system, (BOOM,))), f"{os.name}.system"),
    "builtins.eval": (pickle.dumps(Reduce(eval, (f"__import__('os').system('{BOOM}')",))), "builtins.eval"),
    "builtins.exec, protocol 0": (pickle.dumps(Reduce(exec, ("1",)), 0), "__builtin__.exec"),
    "subprocess": (b"csubprocess\ngetoutput\n(S'touch boom'\ntR.", "subprocess.getoutput"),
    "INST": (b"(S'touch boom'\nios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\nS'touch boom'\no.", "os.system"),
    "NEWOBJ": (STRANGE + short("pathlib") + short("Path") + b"\x93)\x81.", "pathlib.Path"),
    "STACK_GLOBAL with a dotted name": (
        STRANGE + short("torch") + short("serialization.os.system") + b"\x93" + short(BOOM) + b"\x85R.",
        "torch.serialization.os.system",
    ),
    "nested reduce": (
        pickle.dumps(Reduce(OrderedDict, ([["a", Reduce(os.system, (BOOM,))]],))),
        f"{os.name}.system",
    ),
    "a pickle inside of a storage": (
        pickle.dumps(Reduce(torch.storage._load_from_bytes, (legacy_file(pickle.dumps(Reduce(os.system, (BOOM,)))),))),
        "system",
    ),
    "the result of a call is called": (
        pickle.dumps({})[:-1] + b"cnumpy\ndtype\n(S'f4'\ntR(S'x'\ntR.",
        "calls the result of numpy.dtype",
    ),
    "getattr": (pickle.dumps(Reduce(getattr, (1, "real"))), "builtins.getattr"),
    "state of a class": (b"cnumpy\ndtype\n(dS'__call__'\nI1\nsb.", "sets the state of numpy.dtype"),
    "state of a number": (b"I1\n(db.", "sets the state of a int"),
    "extension registry": (b"\x80\x02\x82\x01.", "EXT1"),
    "persistent id": (b"Pos.system\n.", "PERSID"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "memo index of 4 billion": (b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xfe.", "damaged"),
    "bytes of 2^60": (STRANGE + b"\x8e" + struct.pack("<Q", 1 << 60) + b"xx.", "damaged"),
    "text of 4 GB": (b"\x80\x02X\xff\xff\xff\x7fxx.", "damaged"),
    "long of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "damaged"),
    "unhashable key": (b"\x80\x02}]K\x01s.", "as a key"),
    "deeply nested key": (b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s.", "as a key"),
    "empty": (b"", "damaged"),
    "nothing on the stack": (b".", "damaged"),
    "more taken than there is": (b"\x80\x02K\x01\x87.", "damaged"),
    "no such opcode": (b"\xff\xfe.", "damaged"),
    "protocol 99": (b"\x80\x63N.", "protocol 99"),
    "copies of copies": (
        b"\x80\x02}q\x00("
        + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10_000))
        + b"u"
        + b"0ccollections\nOrderedDict\nh\x00\x85R" * 201
        + b".",
        "copies more than",
    ),
}


def arrays_and_tensors(data: bytes) -> None:
    """Do with a pickle all that a reader of a format may do with it."""
    found = loads(data, ARRAYS | TENSORS, where="file")
    for read in (pickles.array, tensor):
        read(found, where="file")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line_and_nothing_is_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, about = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(InputError, match=about) as caught:
        if name == "a pickle inside of a storage":
            call = loads(content, TENSORS)
            tensor(Call("torch._utils._rebuild_tensor_v2", (call, 0, (1,), (1,))), where="file")
        else:
            arrays_and_tensors(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("file: ", "pickle: "))
    assert peak < 64 << 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "stride"), [((1 << 30,), (0,)), ((5,), (1,)), ((2, 2), (3, 1)), ((1 << 62,), (1,))])
def test_tensors_beyond_their_storage_are_refused(size, stride):
    storage = loads(pickle.dumps(torch.zeros(4)), TENSORS).args[0]
    with pytest.raises(InputError, match="tensor of"):
        tensor(Call("torch._utils._rebuild_tensor_v2", (storage, 0, size, stride)))


def test_arrays_of_impossible_size_are_refused():
    call = loads(pickle.dumps(np.zeros(4), 4), ARRAYS)
    call.state = (1, (1 << 39, 1 << 39), *call.state[2:])
    with pytest.raises(InputError, match="32 bytes for an array of"):
        pickles.array(call)
    with pytest.raises(InputError, match="other elements than numbers"):
        pickles.array(loads(pickle.dumps(np.array([{}, 1], dtype=object), 4), ARRAYS))


def test_a_storage_that_claims_more_than_it_has_is_refused():
    content = pickle.dumps(torch.zeros(4))
    changed = content.replace(b"\x04\x00\x00\x00\x00\x00\x00\x00" + bytes(16), b"\x05" + bytes(7) + bytes(16))
    assert changed != content
    with pytest.raises(InputError, match="disagrees with itself"):
        tensor(loads(changed, TENSORS))


def test_cut_at_any_place_a_pickle_is_refused():
    content = pickle.dumps({"a": torch.arange(5.0), "b": [np.arange(3), ("x", 2.5)], "c": {1, 2}})
    assert loads(content, ARRAYS | TENSORS)["b"][1] == ("x", 2.5)
    for cut in range(0, len(content), max(1, len(content) // 200)):
        with pytest.raises(InputError, match="damaged"):
            loads(content[:cut], ARRAYS | TENSORS)


def test_files_that_are_missing_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.pkl: cannot be read"):
        load(tmp_path / "none.pkl", ())
    (tmp_path / "large.pkl").write_bytes(pickle.dumps(list(range(1000))))
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="pickles of up to 100 bytes"):
        load(tmp_path / "large.pkl", ())


def test_too_many_opcodes_are_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    with pytest.raises(InputError, match="more than 100 opcodes"):
        loads(b"(" + b"N" * 200 + b"l.", ())


def test_compressed_archives_are_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2) + bytes(1000))
    with pytest.raises(InputError, match="compressed"):
        load_saved(tmp_path / "x.pt", ())
    (tmp_path / "y.pt").write_bytes((tmp_path / "x.pt").read_bytes()[20:])
    with pytest.raises(InputError, match=r"y\.pt"):
        load_saved(tmp_path / "y.pt", ())
