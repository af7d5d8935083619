"""Checkpoints of a run: atomic, bounded in number, and never followed when damaged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write, drop_unfinished, writing


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: where they lie, as ``step-00000500.pt``.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, then forget the oldest; a crash in between loses neither."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        drop_unfinished(path)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state | {"step": step}, file)
            except RuntimeError as error:
                # PyTorch's writer covers up the OSError of a full disk with one of its own.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None. Only plain tensors and numbers are accepted."""
        for path in reversed(self.paths()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if isinstance(state, dict) and isinstance(state.get("step"), int):
                    return state
                problem = "not a checkpoint of a run"
            except Exception as error:  # torch raises many types for a damaged file
                problem = type(error).__name__
            print(f"warning: {path} is damaged ({problem}); trying the one before", file=sys.stderr)
        return None

    @contextmanager
    def fitting(self, step: int, part: str) -> Iterator[None]:
        """Around taking over a part of a checkpoint.

        Raises:
            InputError: it is that of another network, or not there: nobody else's run goes on here.
        """
        try:
            yield
        except (InputError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            why = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{self.folder / f'step-{step:08d}.pt'}: its {part} does not fit this run ({why}); put the right one "
                "back, or delete it to go on from the one before"
            ) from error


class Metrics:
    """``metrics.jsonl``: one JSON object a line. Resuming forgets the lines after the checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the torn last line of a killed run
                if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
                    kept.append(line)
        atomic_write(path, "".join(f"{line}\n" for line in kept))

    def write(self, entry: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


# What may differ between a run and its continuation without changing its result.
FREE = {
    "output",
    "verification",
    "tensorboard",
    "keep_checkpoints",
    "log_every",
    "threads",
    "device",
    "show_real_faces",
}


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a run under settings that would have given another one.

    Raises:
        InputError: naming the first key that differs.
    """
    import yaml

    if not path.exists():
        return
    try:
        before = yaml.safe_load(path.read_text(errors="replace")) or {}
    except yaml.YAMLError:
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{path}: damaged; put it back, or choose another output, or delete that folder")
    # Seeds of the losses follow that of the run, which says it better.
    for key in sorted({*before, *settings}, key=lambda key: (key != "seed", str(key))):
        if key not in FREE and _given(before.get(key)) != _given(settings.get(key)):
            place, there, here = _first_difference(key, before.get(key), settings.get(key))
            raise InputError(
                f"{path.parent} holds a run with another {place} ({_short(there)} there, {_short(here)} here): choose "
                "another output, or delete that folder"
            )


def check_same_record(path: Path, record: dict[str, Any]) -> None:
    """Refuse to continue a run with another teacher, or on other faces, than its record names.

    Raises:
        InputError: naming the part of the record that differs.
    """
    if not path.exists():
        return
    before = read_record(path)
    now = json.loads(json.dumps(record, default=str))
    for key in ("teacher", "sources", "started_from"):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{path} names another {key.removesuffix('s')} than there is now, by its contents: put the old one "
                "back, or choose another output"
            )


def read_record(path: Path) -> dict[str, Any]:
    """The ``provenance.json`` of a run.

    Raises:
        InputError: it is missing, or damaged.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a record of a run ({error}); choose another output") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: not a record of a run; choose another output")
    return record


def _first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The dotted key that two settings differ in, as deep as both go, and its two values."""
    while isinstance(before, dict) and isinstance(now, dict):
        name = next(n for n in sorted({*before, *now}, key=str) if _given(before.get(n)) != _given(now.get(n)))
        key, before, now = f"{key}.{name}", before.get(name), now.get(name)
    return key, before, now


def _given(value: Any) -> Any:
    """Without what is null: an option that came later is off in the settings of an older run."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else text[:77] + "..."
