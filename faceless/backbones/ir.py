"""IR-18, 34, 50 and 101 of AdaFace and CVLface, with their module names.

Cousins of `faceless.backbones.iresnet` that weights cannot be moved to: where a block keeps its channels, its shortcut
takes every other pixel instead of a convolution, and the last BN has no scale and shift.

Source: Kim, Jain, Liu: AdaFace, CVPR 2022; layout and initialization of mk-minchul/AdaFace, ``net.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}


def residual(inputs: int, channels: int, stride: int) -> nn.Sequential:
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN."""
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.PReLU(channels),
        nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def projection(inputs: int, channels: int, stride: int) -> nn.Sequential:
    """The shortcut of a block whose input has other channels, or another size."""
    return nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Block(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN; summed with every ``stride``-th pixel, or with a projection."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.shortcut_layer: nn.Module
        if inputs == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = projection(inputs, channels, stride)
        self.res_layer = residual(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IR(nn.Module):
    """IR of AdaFace and CVLface, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    The embedding is what AdaFace returns as unit vector and norm, multiplied.

    Args:
        depth: 18, 34, 50 or 101.
        embedding_dim: D.
        input_size: pixels; the last map has a sixteenth of it, rounded up, and the final layer's width follows.
        dropout: before the final layer.

    Raises:
        ValueError: unknown depth.

    At 112 pixels and 512 dimensions: 24,020,352, 43,585,600 and 65,150,912 parameters for 18, 50, 101.
    """

    def __init__(self, depth: int = 50, *, embedding_dim: int = 512, input_size: int = 112, dropout: float = 0.4):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth is {depth}; use one of {', '.join(map(str, BLOCKS))}")
        self.embedding_dim = embedding_dim
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, inputs = [], 64
        for width, count in zip(WIDTHS, BLOCKS[depth]):
            blocks += [Block(inputs, width, 2), *(Block(width, width, 1) for _ in range(count - 1))]
            inputs = width
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(inputs * (-(-input_size // 16)) ** 2, embedding_dim),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))
