"""IResNet-18, 34, 50, 100 and 200: the residual networks of ArcFace, with InsightFace's module names.

Sources: Duta et al.: Improved residual networks, ICPR 2020 (the block's ancestor); Deng et al.: ArcFace, CVPR 2019,
section 3.1 (block BN-conv-BN-PReLU-conv-BN, embedding BN-flatten-fc-BN); layout and initialisation of
deepinsight/insightface, ``recognition/arcface_torch``.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class Block(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN; summed with the (projected) input, nothing after the sum."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """IResNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        depth: 18, 34, 50, 100 or 200.
        embedding_dim: D.
        input_size: pixels; the last map has a sixteenth of it, rounded up, and the final layer's width follows.
        dropout: before the final layer.

    Raises:
        ValueError: unknown depth.

    At 112 pixels and 512 dimensions: 24,025,600, 34,139,328, 43,590,848 and 65,156,160 parameters for 18, 34, 50, 100.
    """

    def __init__(self, depth: int = 50, *, embedding_dim: int = 512, input_size: int = 112, dropout: float = 0.0):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth is {depth}; use one of {', '.join(map(str, BLOCKS))}")
        self.embedding_dim = embedding_dim
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(Block(inputs, width, 2), *(Block(width, width, 1) for _ in range(blocks - 1)))
            for inputs, width, blocks in zip((WIDTHS[0], *WIDTHS), WIDTHS, BLOCKS[depth])
        )
        self.bn2 = nn.BatchNorm2d(WIDTHS[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(WIDTHS[-1] * (-(-input_size // 16)) ** 2, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)  # stays 1: the classifier on top sets the scale
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))
