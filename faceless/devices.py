"""The device that a setting names."""

from __future__ import annotations

import torch
from torch import Tensor

from faceless.errors import InputError


def chosen_device(name: str, key: str = "device") -> torch.device:
    """``auto`` is a GPU where there is one; ``cuda:1`` is the second.

    Args:
        name: what was asked for.
        key: the setting or option that asked, for the message.

    Raises:
        InputError: it is neither a CPU nor a CUDA device, or is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{key} is {name!r}; use auto, cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"{key} is {name!r}, but torch sees no CUDA device here; use auto or cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"{key} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Where a GPU is to read ``tensor``: memory that it can copy from while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for what the device still has to do."""
    return pinned(tensor, device).to(device, non_blocking=True)
