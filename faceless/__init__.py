"""Faceless: distil a face recogniser into a small one without a single real face in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faceless.weights import create, export_onnx, load, names, save

__version__ = "0.1.0"
__all__ = ["__version__", "create", "export_onnx", "load", "names", "save"]


def __getattr__(name: str) -> Any:
    # On demand, so that `import faceless` alone does not import torch.
    if name not in __all__:
        raise AttributeError(f"module 'faceless' has no attribute {name!r}")
    from faceless import weights

    return getattr(weights, name)
