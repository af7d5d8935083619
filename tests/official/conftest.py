"""Finds official code in the folder that FACELESS_OFFICIAL names, and prints how far we are from it.

The folder holds checkouts as ``<owner>/<name>``. Nothing of them is contained here, and nothing is fetched: without the
variable, or without a checkout, the tests that need it are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

_ROWS: list[tuple[str, str, str, float, float]] = []


@pytest.fixture(autouse=True)
def double():
    """Constants that official code makes on the way are then float64 as well, and differences are not theirs."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def official(monkeypatch) -> Callable[..., ModuleType]:
    """``official("owner/name", "path/file.py", stubs)``: that file as a module.

    What it imports from its own repository is given in ``stubs``: a dotted name (a leading dot for a sibling) to a
    module, or to the path of another file of the repository.
    """
    # CPU tests of code that was written for one kind of device.
    monkeypatch.setattr(Tensor, "cuda", lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)

    def load(
        repository: str, path: str, stubs: dict[str, ModuleType | str] | None = None, name: str = ""
    ) -> ModuleType:
        root = os.environ.get("FACELESS_OFFICIAL")
        if not root:
            pytest.skip("FACELESS_OFFICIAL is not set")
        file = Path(root, repository, path)
        if not file.is_file():
            pytest.skip(f"{file} is not there")
        package = "official_" + repository.replace("/", "_").replace("-", "_")
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        sys.modules[package].__path__ = []
        for stub, module in (stubs or {}).items():
            full = package + stub if stub.startswith(".") else stub
            if isinstance(module, str):
                module = load(repository, module, name=full)
            monkeypatch.setitem(sys.modules, full, module)
        spec = importlib.util.spec_from_file_location(name or f"{package}.{file.stem}", file)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.fixture
def parity() -> Callable[..., None]:
    """Assert that two losses of the same tensors agree in value and gradient, and note by how much."""

    def compare(
        method: str,
        source: str,
        ours: Callable[..., Tensor],
        theirs: Callable[..., Tensor],
        *inputs: Tensor,
        parameters: tuple[tuple[Tensor, Tensor], ...] = (),
        tolerance: float = 1e-6,
    ) -> None:
        results = []
        for side, function in enumerate((ours, theirs)):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            value = function(*leaves).sum()
            grads = torch.autograd.grad(value, leaves + [pair[side] for pair in parameters])
            results.append((value.detach().double(), [grad.double() for grad in grads]))
        (value, grads), (wanted, expected) = results
        grads = [
            grad.reshape(other.shape) if grad.numel() == other.numel() else grad for grad, other in zip(grads, expected)
        ]
        off = (value - wanted).abs().item()
        grad_off = max((a - b).abs().max().item() for a, b in zip(grads, expected))
        shapes = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
        _ROWS.append((method, source, shapes, off, grad_off))
        assert wanted.abs() > 0 and all(grad.abs().max() > 0 for grad in expected)
        assert off <= tolerance * wanted.abs().item()
        for grad, other in zip(grads, expected):
            assert (grad - other).abs().max() <= tolerance * other.abs().max()

    return compare


def parity_table(rows: list[tuple[str, str, str, float, float]]) -> list[str]:
    """Markdown: one line for each method, source and kind of input, with the largest differences of its cases."""
    merged: dict[tuple[str, str, str], tuple[float, float, int]] = {}
    for name, source, inputs, loss, gradient in rows:
        key = (name.partition(", batch")[0], source, inputs)
        worst = merged.get(key, (0.0, 0.0, 0))
        merged[key] = (max(worst[0], loss), max(worst[1], gradient), worst[2] + 1)
    lines = ["| method | official code | inputs | cases | loss | gradient |", "|---|---|---|---:|---:|---:|"]
    for (name, source, inputs), (loss, gradient, cases) in merged.items():
        lines.append(f"| {name} | {source} | {inputs} | {cases} | {loss:.0e} | {gradient:.0e} |")
    return lines


def pytest_terminal_summary(terminalreporter) -> None:
    if not _ROWS:
        return
    terminalreporter.section("parity with official code: largest absolute difference")
    for line in parity_table(_ROWS):
        terminalreporter.write_line(line)
