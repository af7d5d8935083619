"""InceptionResnetV1 of FaceNet, with the module names of facenet-pytorch.

Sources: Szegedy, Ioffe, Vanhoucke, Alemi: Inception-v4, AAAI 2017; Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015;
layout of timesler/facenet-pytorch, ``models/inception_resnet_v1.py`` (after davidsandberg/facenet).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Pair = int | tuple[int, int]


class BasicConv2d(nn.Module):
    """Convolution, BN with TensorFlow's epsilon, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Pair, stride: int = 1, padding: Pair = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Branches side by side, their channels after one another."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        for number, branch in enumerate(branches):
            self.add_module(f"branch{number}", branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for name, branch in self.named_children() if name.startswith("branch")], 1)


class Residual(Branches):
    """Branches, brought back to the input's channels, scaled and added to it."""

    def __init__(self, channels: int, mixed: int, scale: float, activation: bool, *branches: nn.Module):
        super().__init__(*branches)
        self.scale = scale
        self.conv2d = nn.Conv2d(mixed, channels, 1)
        self.relu = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2d(super().forward(x)) * self.scale + x)


def block35() -> Residual:
    """For maps of 256 channels, 17 pixels of 160."""
    return Residual(
        256,
        96,
        0.17,
        True,
        BasicConv2d(256, 32, 1),
        nn.Sequential(BasicConv2d(256, 32, 1), BasicConv2d(32, 32, 3, padding=1)),
        nn.Sequential(BasicConv2d(256, 32, 1), BasicConv2d(32, 32, 3, padding=1), BasicConv2d(32, 32, 3, padding=1)),
    )


def block17() -> Residual:
    """For maps of 896 channels, 8 pixels."""
    return Residual(
        896,
        256,
        0.1,
        True,
        BasicConv2d(896, 128, 1),
        nn.Sequential(
            BasicConv2d(896, 128, 1),
            BasicConv2d(128, 128, (1, 7), padding=(0, 3)),
            BasicConv2d(128, 128, (7, 1), padding=(3, 0)),
        ),
    )


def block8(scale: float = 0.2, activation: bool = True) -> Residual:
    """For maps of 1,792 channels, 3 pixels."""
    return Residual(
        1792,
        384,
        scale,
        activation,
        BasicConv2d(1792, 192, 1),
        nn.Sequential(
            BasicConv2d(1792, 192, 1),
            BasicConv2d(192, 192, (1, 3), padding=(0, 1)),
            BasicConv2d(192, 192, (3, 1), padding=(1, 0)),
        ),
    )


class InceptionResnetV1(nn.Module):
    """InceptionResnetV1, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    facenet-pytorch returns the same divided by its length.

    Args:
        embedding_dim: D.
        input_size: pixels, from 75; the published networks saw 160.
        dropout: before the final layer.

    Raises:
        ValueError: input_size is too small for the last map.

    With 512 dimensions: 23,482,624 parameters.
    """

    def __init__(self, *, embedding_dim: int = 512, input_size: int = 160, dropout: float = 0.6):
        super().__init__()
        if input_size < 75:
            raise ValueError(f"input_size is {input_size}; use 75 or more")
        self.embedding_dim = embedding_dim
        self.conv2d_1a = BasicConv2d(3, 32, 3, 2)
        self.conv2d_2a = BasicConv2d(32, 32, 3)
        self.conv2d_2b = BasicConv2d(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = BasicConv2d(64, 80, 1)
        self.conv2d_4a = BasicConv2d(80, 192, 3)
        self.conv2d_4b = BasicConv2d(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(5)))
        self.mixed_6a = Branches(
            BasicConv2d(256, 384, 3, 2),
            nn.Sequential(BasicConv2d(256, 192, 1), BasicConv2d(192, 192, 3, padding=1), BasicConv2d(192, 256, 3, 2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(10)))
        self.mixed_7a = Branches(
            nn.Sequential(BasicConv2d(896, 256, 1), BasicConv2d(256, 384, 3, 2)),
            nn.Sequential(BasicConv2d(896, 256, 1), BasicConv2d(256, 256, 3, 2)),
            nn.Sequential(BasicConv2d(896, 256, 1), BasicConv2d(256, 256, 3, padding=1), BasicConv2d(256, 256, 3, 2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_3 = nn.Sequential(*(block8() for _ in range(5)))
        self.block8 = block8(1.0, False)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1792, embedding_dim, bias=False)
        self.last_bn = nn.BatchNorm1d(embedding_dim, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool_3a(self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x))))
        x = self.repeat_1(self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(x))))
        x = self.repeat_2(self.mixed_6a(x))
        x = self.block8(self.repeat_3(self.mixed_7a(x)))
        return self.last_bn(self.last_linear(self.dropout(x.mean((2, 3)))))
