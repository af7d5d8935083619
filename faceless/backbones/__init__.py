"""Backbones, one file for each architecture: normalised ``[B, 3, H, W]`` to an embedding ``[B, D]`` of any norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from faceless.backbones.dlib_resnet import MEAN, DlibResNet29
from faceless.backbones.iresnet import BLOCKS, IResNet
from faceless.backbones.mobilefacenet import MobileFaceNet
from faceless.backbones.slimresnet import SlimResNet
from faceless.recognizer import InputSpec


@dataclass(frozen=True)
class Architecture:
    """How to build a backbone, and the input it had in its publication."""

    build: Callable[..., nn.Module]
    embedding_dim: int = 512
    spec: InputSpec = field(default_factory=InputSpec)


ARCHITECTURES: dict[str, Architecture] = {
    **{f"iresnet{depth}": Architecture(partial(IResNet, depth)) for depth in BLOCKS},
    "mobilefacenet": Architecture(MobileFaceNet),
    "slimresnet": Architecture(SlimResNet),
    "dlib-resnet29": Architecture(
        DlibResNet29, 128, InputSpec(150, 150, mean=MEAN, std=(256.0, 256.0, 256.0), framing="dlib")
    ),
}
