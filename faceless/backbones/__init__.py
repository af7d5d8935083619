"""Backbones, one file for each architecture: normalised ``[B, 3, H, W]`` to an embedding ``[B, D]`` of any norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from faceless.backbones.cbam import BLOCKS as CBAM_BLOCKS
from faceless.backbones.cbam import CBAM
from faceless.backbones.dlib_resnet import MEAN, DlibResNet29
from faceless.backbones.edgeface import EdgeFace
from faceless.backbones.ghostfacenet import GhostFaceNet
from faceless.backbones.inception_resnet import InceptionResnetV1
from faceless.backbones.ir import BLOCKS as IR_BLOCKS
from faceless.backbones.ir import IR
from faceless.backbones.iresnet import BLOCKS, IResNet
from faceless.backbones.mbf import MBF
from faceless.backbones.mixfacenet import MixFaceNet
from faceless.backbones.mobilefacenet import MobileFaceNet
from faceless.backbones.mobilefacenet_relu6 import MobileFaceNetReLU6
from faceless.backbones.pocketnet import PocketNet
from faceless.backbones.slimresnet import SlimResNet
from faceless.backbones.timm_backbone import TimmBackbone
from faceless.backbones.tinyfar import TinyFaR
from faceless.backbones.transformers_backbone import TransformersBackbone
from faceless.backbones.vit import VITS, ViT
from faceless.recognizer import InputSpec


@dataclass(frozen=True)
class Architecture:
    """How to build a backbone, and the input it had in its publication."""

    build: Callable[..., nn.Module]
    embedding_dim: int = 512
    spec: InputSpec = field(default_factory=InputSpec)


ARCHITECTURES: dict[str, Architecture] = {
    **{f"iresnet{depth}": Architecture(partial(IResNet, depth)) for depth in BLOCKS},
    **{f"ir{depth}": Architecture(partial(IR, depth)) for depth in IR_BLOCKS},
    **{f"cbam{depth}": Architecture(partial(CBAM, depth)) for depth in CBAM_BLOCKS},
    "mobilefacenet": Architecture(MobileFaceNet),
    "mobilefacenet-relu6": Architecture(MobileFaceNetReLU6, 128),
    "mbf": Architecture(partial(MBF, 2, (1, 4, 6, 2))),
    "mbf-large": Architecture(partial(MBF, 4, (2, 8, 12, 4))),
    "mixfacenet-xs": Architecture(partial(MixFaceNet, "s", 0.5, 512)),
    "mixfacenet-s": Architecture(partial(MixFaceNet, "s", 1.0, 1024)),
    "mixfacenet-m": Architecture(partial(MixFaceNet, "m", 1.0, 1024)),
    "ghostfacenet": Architecture(partial(GhostFaceNet, 1), spec=InputSpec(std=(128.0, 128.0, 128.0))),
    "ghostfacenet-v2": Architecture(partial(GhostFaceNet, 2), spec=InputSpec(std=(128.0, 128.0, 128.0))),
    "pocketnet-s": Architecture(partial(PocketNet, 16, 18), 128),
    "pocketnet-m": Architecture(partial(PocketNet, 32, 9), 128),
    "edgeface-xxs": Architecture(partial(EdgeFace, "xxs")),
    "edgeface-xs": Architecture(partial(EdgeFace, "xs")),
    "edgeface-s": Architecture(partial(EdgeFace, "s")),
    "edgeface-base": Architecture(partial(EdgeFace, "base")),
    "tinyfar-a": Architecture(partial(TinyFaR, "a")),
    "tinyfar-b": Architecture(partial(TinyFaR, "b")),
    "tinyfar-c": Architecture(partial(TinyFaR, "c")),
    "mobilenetv2": Architecture(partial(TimmBackbone, "mobilenetv2_100")),
    "mobilenetv3-large": Architecture(partial(TimmBackbone, "mobilenetv3_large_100")),
    "mobilenetv3-small": Architecture(partial(TimmBackbone, "mobilenetv3_small_100")),
    "vit-s16": Architecture(partial(TimmBackbone, "vit_small_patch16_224")),
    "vit-s8": Architecture(partial(TimmBackbone, "vit_small_patch8_224")),
    "swin-s": Architecture(partial(TimmBackbone, "swin_small_patch4_window7_224")),
    # InsightFace's hold a token for patches left out in training.
    **{
        name: Architecture(partial(ViT, name, mask_token=True) if name.startswith("vit") else partial(ViT, name))
        for name in VITS
    },
    "timm": Architecture(TimmBackbone),
    "transformers": Architecture(TransformersBackbone),
    "inception-resnet-v1": Architecture(InceptionResnetV1, spec=InputSpec(160, 160, std=(128.0, 128.0, 128.0))),
    "slimresnet": Architecture(SlimResNet),
    "dlib-resnet29": Architecture(
        DlibResNet29, 128, InputSpec(150, 150, mean=MEAN, std=(256.0, 256.0, 256.0), framing="dlib")
    ),
}
