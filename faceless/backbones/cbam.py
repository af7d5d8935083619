"""CBAM-IResNets of A-SKD: IResNets whose blocks end in attention over channels and over places, with its module names.

Sources: Woo et al.: CBAM: Convolutional Block Attention Module, ECCV 2018; layout and initialization of
gist-ailab/teaching-where-to-look, ``model/backbone.py`` (Shin et al., ECCV 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from faceless.backbones.ir import projection, residual

WIDTHS = (64, 128, 256, 512)
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
REDUCTION = 16


class ChannelAttention(nn.Module):
    """How much each channel counts, ``[B, C, H, W]`` to ``[B, C, 1, 1]``, before the sigmoid."""

    def __init__(self, channels: int):
        super().__init__()
        self.shared_mlp = nn.Sequential(
            nn.Conv2d(channels, channels // REDUCTION, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // REDUCTION, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        attention: Tensor = self.shared_mlp(x.mean((2, 3), keepdim=True)) + self.shared_mlp(
            x.amax((2, 3), keepdim=True)
        )
        return attention


class SpatialAttention(nn.Module):
    """How much each place counts, ``[B, C, H, W]`` to ``[B, 1, H, W]``, before the sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attention: Tensor = self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1))
        return attention


class Block(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN; attention over channels, then over places; summed with the input."""

    def __init__(self, inputs: int, channels: int, stride: int, projected: bool):
        super().__init__()
        self.res_layer = residual(inputs, channels, stride)
        self.channel_layer = ChannelAttention(channels)
        self.spatial_layer = SpatialAttention()
        self.shortcut_layer: nn.Module | None = None
        if projected:
            self.shortcut_layer = projection(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.res_layer(x)
        y = y * self.channel_layer(y).sigmoid()
        y = y * self.spatial_layer(y).sigmoid()
        return y + (x if self.shortcut_layer is None else self.shortcut_layer(x))


class CBAM(nn.Module):
    """CBAM-IResNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Its attention maps before the sigmoid, which A-SKD compares, are the outputs of the sub-modules
    ``layer1.0.channel_layer``, ``layer1.0.spatial_layer``, and so on for every block.

    Args:
        depth: 50, 100 or 152; 18, which is ours.
        embedding_dim: D.
        input_size: pixels; the last map has a sixteenth of it, rounded up, and the final layer's width follows.
        dropout: before the final layer.

    Raises:
        ValueError: unknown depth.
    """

    def __init__(self, depth: int = 50, *, embedding_dim: int = 512, input_size: int = 112, dropout: float = 0.4):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth is {depth}; use one of {', '.join(map(str, BLOCKS))}")
        self.embedding_dim = embedding_dim
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(Block(inputs, width, 2, True), *(Block(width, width, 1, False) for _ in range(blocks - 1)))
            for inputs, width, blocks in zip((WIDTHS[0], *WIDTHS), WIDTHS, BLOCKS[depth])
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(WIDTHS[-1]),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(WIDTHS[-1] * (-(-input_size // 16)) ** 2, embedding_dim),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.input_layer(x)))))
        embedding: Tensor = self.output_layer(x)
        return embedding
