"""Files that are either complete or not there: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from faceless.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def visible(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder, by name, without the hidden ones, such as those that a killed command left unfinished."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def drop_unfinished(path: str | Path) -> None:
    """Delete what commands that were killed while they wrote ``path`` left beside it.

    For a file that only one process writes, before it does: another's unfinished file would go too.
    """
    path = Path(path)
    for left in path.parent.glob(f".tmp-{'[0-9a-f]' * 12}-{escape(path.name[-200:])}"):
        with suppress(OSError):
            left.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small file, such as one of settings; empty if there is no such file.

    Raises:
        InputError: no JSON object, or more than a megabyte.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("more than a megabyte")
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    return found


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a full disk or a refused write inside the block into one line that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(f"{path}: no space left on the disk; free some and run the same command again") from error
        if error.errno in _REFUSED:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
        if error.errno in _NO_FOLDER and (file := _file_above(Path(path))):
            raise InputError(
                f"{path}: cannot be written, since {file} is a file and no folder; choose another"
            ) from error
        if error.errno == errno.EISDIR:
            raise InputError(f"{path}: is a folder; name a file to be written") from error
        raise


def _file_above(path: Path) -> Path | None:
    """What is in the way where ``path`` is to be a folder or to lie in one."""
    return next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)


def check_folder(path: str | Path) -> None:
    """Refuse a folder that could not be written to, before the work is done whose results it is for.

    Raises:
        InputError: a file is in its place or above it, or it is closed to us.
    """
    path = Path(path)
    with writing(path):
        if file := _file_above(path):
            raise InputError(f"{path}: {file} is a file and no folder; choose another output")
        there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _sync(path: Path, flags: int = os.O_RDONLY) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well and vanishes when it does not.

    The temporary name lies in the same folder (made if need be), is hidden, and ends as ``path`` ends, since some
    writers look at the suffix.

    Raises:
        InputError: the disk is full, or the folder cannot be written.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name[-200:]}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        # The rename itself survives a power cut only once the folder is on the disk; not every system opens folders.
        with suppress(OSError):
            _sync(path.parent)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a whole file, text as UTF-8; readers see the old content or the new one, never a part.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
