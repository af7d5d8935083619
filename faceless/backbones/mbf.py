"""InsightFace's MobileFaceNets, "mbf" and "mbf_large", with its module names.

Other networks than `faceless.backbones.mobilefacenet`: twice and four times its channels but with expansions of their
own, and a second convolution in 64 groups.

Source: layout and initialization of deepinsight/insightface, ``recognition/arcface_torch/backbones/mobilefacenet.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Layers(nn.Module):
    """What is in ``layers``, one after the other."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def linear(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0, groups: int = 1) -> Layers:
    """Convolution and BN."""
    return Layers(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0, groups: int = 1) -> Layers:
    """Convolution, BN and PReLU."""
    return Layers(*linear(inputs, outputs, kernel, stride, padding, groups).layers, nn.PReLU(outputs))


class Bottleneck(Layers):
    """1x1 to ``hidden`` channels, depthwise 3x3, linear 1x1; residual where it keeps the shape."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int):
        super().__init__(
            conv(inputs, hidden), conv(hidden, hidden, 3, stride, 1, groups=hidden), linear(hidden, outputs)
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class MBF(nn.Module):
    """InsightFace's MobileFaceNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        scale: of the channels of residual connections, in units of 64.
        blocks: bottlenecks that keep the shape, in each of four stages; a single one in the first is a plain
            convolution in 64 groups instead.
        embedding_dim: D.
        input_size: pixels; the depthwise head has a sixteenth of it, rounded up.

    Raises:
        ValueError: scale or blocks cannot be used.

    mbf is 2 and (1, 4, 6, 2), 2,059,520 parameters; mbf_large 4 and (2, 8, 12, 4), 6,314,880.
    """

    def __init__(
        self,
        scale: int = 2,
        blocks: Sequence[int] = (1, 4, 6, 2),
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        if not 1 <= scale <= 16 or len(blocks) != 4 or not all(1 <= count <= 100 for count in blocks):
            raise ValueError(f"scale {scale}, blocks {list(blocks)}; use 1 to 16, and four numbers from 1 to 100")
        c64, c128 = 64 * scale, 128 * scale

        def residual(channels: int, count: int, hidden: int) -> Layers:
            return Layers(*(Bottleneck(channels, channels, hidden, 1) for _ in range(count)))

        self.embedding_dim = embedding_dim
        self.layers = nn.ModuleList(
            [
                conv(3, c64, 3, 2, 1),
                conv(c64, c64, 3, 1, 1, groups=64) if blocks[0] == 1 else residual(c64, blocks[0], 128),
                Bottleneck(c64, c64, 128, 2),
                residual(c64, blocks[1], 128),
                Bottleneck(c64, c128, 256, 2),
                residual(c128, blocks[2], 256),
                Bottleneck(c128, c128, 512, 2),
                residual(c128, blocks[3], 256),
            ]
        )
        self.conv_sep = conv(c128, 512)
        self.features = Layers(
            linear(512, 512, -(-input_size // 16), groups=512),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.features(self.conv_sep(x))
