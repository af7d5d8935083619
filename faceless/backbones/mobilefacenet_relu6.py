"""The MobileFaceNet of PocketNet's authors: ReLU6 for PReLU, one more pointwise convolution, a bias before the last BN.

Another network than `faceless.backbones.mobilefacenet`: weights cannot be moved between the two.

Sources: Chen, Liu, Gao, Han: MobileFaceNets, CCBR 2018; layout and initialization of fdbtrs/PocketNet,
``backbones/mobilefacenet.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

#: Expansion, channels, blocks, and stride of the first of them.
STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BN and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with BN and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.pointwise(self.bn1(self.depthwise(x)).relu())).relu()


class Bottleneck(nn.Module):
    """Inverted residual: 1x1 to more channels, depthwise 3x3, linear 1x1; residual where it keeps the shape."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * inputs
        self.conv = nn.Sequential(
            conv(inputs, hidden),
            conv(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class Whole(nn.Module):
    """One depthwise filter over the whole map of each channel, and BN."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.depthwise(x))


class MobileFaceNetReLU6(nn.Module):
    """MobileFaceNet with ReLU6, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        embedding_dim: D.
        input_size: pixels; the last map, and with it the depthwise head, has a sixteenth of it, rounded up.

    At 112 pixels: 999,936 parameters for 128 dimensions.
    """

    def __init__(self, *, embedding_dim: int = 128, input_size: int = 112):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.conv1 = conv(3, 64, 3, 2)
        self.dw_conv = Separable(64)
        self.features = nn.Sequential()
        inputs = 64
        for expansion, channels, blocks, stride in STAGES:
            for block in range(blocks):
                self.features.append(Bottleneck(inputs, channels, expansion, 1 if block else stride))
                inputs = channels
        self.conv2 = conv(inputs, 512)
        self.gdconv = Whole(512, -(-input_size // 16))
        self.conv3 = nn.Conv2d(512, embedding_dim, 1)
        self.bn = nn.BatchNorm2d(embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.features(self.dw_conv(self.conv1(x))))
        return self.bn(self.conv3(self.gdconv(x))).flatten(1)
