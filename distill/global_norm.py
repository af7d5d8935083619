"""Batch normalization over the batches of all processes, on any device.

PyTorch's own SyncBatchNorm wants CUDA. This one lets a run on several CPU processes be the run on one.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.gather import processes
from faceless.errors import InputError


class _Sum(torch.autograd.Function):
    """Sum over processes; its gradient is summed too, since every process uses the result."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _normalize(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    if not layer.training or processes() == 1:
        use_batch = layer.training or layer.running_mean is None
        return F.batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            use_batch,
            layer.momentum or 0.0,
            layer.eps,
        )
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    count = values.numel() / values.shape[1] * processes()
    mean = _Sum.apply(values.sum(axes)) / count
    centered = values - mean.view(shape)
    variance = _Sum.apply(centered.square().sum(axes)) / count
    if layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None:
        with torch.no_grad():
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(variance * (count / max(count - 1, 1)), layer.momentum)
    out = centered * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.weight is not None:
        out = out * layer.weight.view(shape)
    if layer.bias is not None:
        out = out + layer.bias.view(shape)
    return out.to(x.dtype)


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the statistics of all processes; ``[B, C]`` or ``[B, C, L]``."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return _normalize(self, x)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the statistics of all processes; ``[B, C, H, W]``, equal B on each."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return _normalize(self, x)


class GlobalBatchNormAct2d(nn.BatchNorm2d):
    """The same with the activation that timm's ``BatchNormAct2d`` brings along."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        normalized: Tensor = self.act(self.drop(_normalize(self, x)))
        return normalized


GLOBAL = {
    "BatchNorm1d": GlobalBatchNorm1d,
    "BatchNorm2d": GlobalBatchNorm2d,
    "BatchNormAct2d": GlobalBatchNormAct2d,
}
Network = TypeVar("Network", bound=nn.Module)


def globalize(module: Network, device: torch.device) -> Network:
    """Give every batch norm below ``module`` the statistics of all processes; parameters and keys stay as they are.

    Raises:
        InputError: a kind of batch norm whose statistics cannot be shared.
    """
    if processes() == 1:
        return module
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        kind = type(layer)
        if device.type == "cuda" and kind in (nn.BatchNorm1d, nn.BatchNorm2d):  # PyTorch's own is faster there
            above, _, own = name.rpartition(".")
            setattr(module.get_submodule(above), own, nn.SyncBatchNorm.convert_sync_batchnorm(layer))
        elif kind.__name__ in GLOBAL:
            layer.__class__ = GLOBAL[kind.__name__]
        else:
            raise InputError(f"{name} is a {kind.__name__}, whose statistics processes cannot share: use one process")
    return module
