"""MobileFaceNet, with the module names of the fdbtrs (AdaDistill, QuantFace) and QUD checkpoints.

Source: Chen, Liu, Gao, Han: MobileFaceNets, CCBR 2018, table 1; layout and initialisation as in fdbtrs/AdaDistill.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {"prelu": nn.PReLU, "relu": lambda _: nn.ReLU(inplace=True)}


class ConvBlock(nn.Module):
    """Convolution, BN and activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: str):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = ACTIVATIONS[activation](outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class LinearBlock(nn.Module):
    """Unpadded convolution and BN, without an activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 to ``hidden`` channels, depthwise 3x3, linear 1x1; residual where it keeps the shape."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int, activation: str):
        super().__init__()
        self.conv = ConvBlock(inputs, hidden, 1, 1, 1, activation)
        self.conv_dw = ConvBlock(hidden, hidden, 3, stride, hidden, activation)
        self.project = LinearBlock(hidden, outputs)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.conv_dw(self.conv(x)))
        return x + y if self.residual else y


class Residual(nn.Module):
    """A run of bottlenecks that keep the shape."""

    def __init__(self, channels: int, blocks: int, hidden: int, activation: str):
        super().__init__()
        self.model = nn.Sequential(*(Bottleneck(channels, channels, hidden, 1, activation) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class GlobalDepthwise(nn.Module):
    """One depthwise filter over the whole map per channel, then a linear layer and BN."""

    def __init__(self, channels: int, side: int, embedding_dim: int, affine: bool):
        super().__init__()
        self.conv_6_dw = LinearBlock(channels, channels, side, channels)
        self.linear = nn.Linear(channels, embedding_dim, bias=False)
        self.bn = nn.BatchNorm1d(embedding_dim, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(self.conv_6_dw(x).flatten(1)))


class MobileFaceNet(nn.Module):
    """MobileFaceNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        embedding_dim: D.
        input_size: pixels; the last map, and with it the depthwise head, has a sixteenth of it, rounded up.
        width: multiplies all channels (to multiples of 8).
        activation: ``"prelu"`` as published, or ``"relu"``, which trains several times faster on CPUs.
        affine: scale and shift in the last BN, as QuantFace has it.

    Raises:
        ValueError: unknown activation, or no width left.

    At 112 pixels: 1,199,488, 1,068,416 and 1,002,880 parameters for 512, 256 and 128 dimensions.
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
        width: float = 1.0,
        activation: str = "prelu",
        affine: bool = False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; use {' or '.join(ACTIVATIONS)}")
        if not 0.125 <= width <= 16:
            raise ValueError(f"width is {width}; use 0.125 to 16")

        def wide(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        c64, c128, c256, c512 = wide(64), wide(128), wide(256), wide(512)
        self.embedding_dim = embedding_dim
        self.conv1 = ConvBlock(3, c64, 3, 2, 1, activation)
        self.conv2_dw = ConvBlock(c64, c64, 3, 1, c64, activation)
        self.conv_23 = Bottleneck(c64, c64, c128, 2, activation)
        self.conv_3 = Residual(c64, 4, c128, activation)
        self.conv_34 = Bottleneck(c64, c128, c256, 2, activation)
        self.conv_4 = Residual(c128, 6, c256, activation)
        self.conv_45 = Bottleneck(c128, c128, c512, 2, activation)
        self.conv_5 = Residual(c128, 2, c256, activation)
        self.conv_6_sep = ConvBlock(c128, c512, 1, 1, 1, activation)
        self.output_layer = GlobalDepthwise(c512, -(-input_size // 16), embedding_dim, affine)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(x))))
        x = self.conv_5(self.conv_45(self.conv_4(self.conv_34(x))))
        return self.output_layer(self.conv_6_sep(x))
