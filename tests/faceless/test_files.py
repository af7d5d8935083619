import hashlib
import os
from pathlib import Path

import pytest

from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write, check_folder, drop_unfinished, sha256, visible


def test_sha256_of_more_than_one_piece(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_atomic_write_makes_folders_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a" / "b" / "c.txt"
    atomic_write(target, "one")
    atomic_write(target, "zwei ü")
    assert target.read_text("utf-8") == "zwei ü"
    assert [p.name for p in target.parent.iterdir()] == ["c.txt"]


def test_a_failing_block_leaves_the_old_content_and_no_temporary_file(tmp_path):
    target = tmp_path / "f.bin"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_what_killed_commands_left_is_skipped_and_deleted(tmp_path):
    with atomic_path(tmp_path / "a[1].bin") as torn:
        torn.write_bytes(b"whole")
    other = torn.with_name(torn.name.replace("a[1]", "b"))
    for path in (torn, other):  # as a kill would have left them
        path.write_bytes(b"torn")
    assert visible(tmp_path, "*.bin") == [tmp_path / "a[1].bin"]
    drop_unfinished(tmp_path / "a[1].bin")
    assert not torn.exists() and other.exists() and (tmp_path / "a[1].bin").exists()


def test_temporary_name_keeps_the_suffix_in_the_same_folder(tmp_path):
    with atomic_path(tmp_path / "x.npz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        temporary.write_bytes(b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_one_line_that_names_the_file(tmp_path):
    target = tmp_path / "weights.bin"
    with pytest.raises(InputError, match=r"weights\.bin: no space left") as caught, atomic_path(target):
        Path("/dev/full").write_bytes(b"x" * 100_000)
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("below", ["f", "a/b/f"])
def test_a_folder_that_is_a_file_is_named(tmp_path, below):
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(InputError, match=rf"{below}: cannot be written, since .*taken is a file and no folder"):
        atomic_write(tmp_path / "taken" / below, b"")
    for output in (tmp_path / "taken", tmp_path / "taken" / below):
        with pytest.raises(InputError, match=rf"^{output}: .*taken is a file and no folder; choose another output"):
            check_folder(output)
    assert (tmp_path / "taken").read_bytes() == b"old"


def test_a_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match=r"/taken: is a folder; name a file"):
        atomic_write(tmp_path / "taken", b"")
    assert not list(tmp_path.glob("*tmp*"))


def test_a_folder_that_can_be_written_is_not_made(tmp_path, monkeypatch):
    check_folder(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_folder("a/b")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="needs a user who may become another")
def test_a_folder_that_is_closed_is_named(tmp_path):
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"runs/mine: .*[Pp]ermission denied"):
            check_folder(tmp_path / "runs" / "mine")
    finally:
        os.seteuid(0)
