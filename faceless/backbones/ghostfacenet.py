"""GhostFaceNet V1 and V2: GhostNet and GhostNetV2 with PReLU and a depthwise head.

Sources: Alansari, Hay, Javed, Shoufan, Zweiri, Werghi: GhostFaceNets, IEEE Access 11, 2023; Han et al.: GhostNet, CVPR
2020; Tang et al.: GhostNetV2, NeurIPS 2022; layout and initialization of HamadYA/GhostFaceNets,
``backbones/ghost_model.py`` and ``backbones/ghostv2.py``, which are of Keras: V1 pads at stride 2 as TensorFlow does
and has the hard sigmoid of Keras 2, V2 has PyTorch's of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Kernel, stride, expanded channels, channels, whether channels are squeezed; of each bottleneck.
BOTTLENECKS = (
    (3, 1, 16, 16, False),
    (3, 2, 48, 24, False),
    (3, 1, 72, 24, False),
    (5, 2, 72, 40, True),
    (5, 1, 120, 40, True),
    (3, 2, 240, 80, False),
    (3, 1, 200, 80, False),
    (3, 1, 184, 80, False),
    (3, 1, 184, 80, False),
    (3, 1, 480, 112, True),
    (3, 1, 672, 112, True),
    (5, 2, 672, 160, True),
    (5, 1, 960, 160, False),
    (5, 1, 960, 160, True),
    (5, 1, 960, 160, False),
    (5, 1, 512, 160, True),
)
LAST_OF_V2 = 960  # expanded channels of its last bottleneck


def rounded(channels: float) -> int:
    """To a multiple of 4, and not below nine tenths.

    >>> rounded(16 * 1.3), rounded(24 * 1.3), rounded(512 * 1.3)
    (20, 32, 664)
    """
    near = max(4, int(channels + 2) // 4 * 4)
    return near + 4 if near < 0.9 * channels else near


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow does: what an odd sum leaves over goes to the right and to the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, 0, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        rows, columns = (
            max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in (input.shape[-2], input.shape[-1])
        )
        pads = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


def conv(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activate: bool = False,
    version: int = 1,
) -> nn.Module:
    """Convolution, BN and perhaps PReLU."""
    layers: list[nn.Module] = [
        SameConv2d(inputs, outputs, kernel, stride, groups)
        if version == 1
        else nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.PReLU(outputs)] if activate else []))


class Ghost(nn.Module):
    """Half of the channels by a pointwise convolution, the other half by a depthwise 3x3 of the first."""

    def __init__(self, inputs: int, outputs: int, activate: bool):
        super().__init__()
        self.primary = conv(inputs, outputs // 2, activate=activate)
        self.cheap = conv(outputs // 2, outputs // 2, 3, groups=outputs // 2, activate=activate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)


class Gate(nn.Module):
    """Attention of V2: how much of each pixel passes, from long rows and columns of a map of half the side."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Conv2d(outputs, outputs, (1, 5), padding=(0, 2), groups=outputs, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Conv2d(outputs, outputs, (5, 1), padding=(2, 0), groups=outputs, bias=False),
            nn.BatchNorm2d(outputs),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.layers(x), x.shape[-2:], mode="bilinear", align_corners=False)


class Squeeze(nn.Module):
    """Squeeze and excitation with a hard sigmoid: that of Keras 2 for V1, that of PyTorch for V2."""

    def __init__(self, channels: int, version: int):
        super().__init__()
        hidden = rounded(channels / 4)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = nn.PReLU(hidden)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.slope = 1 / 5 if version == 1 else 1 / 6

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * (self.slope * gate + 0.5).clamp(0, 1)


class Bottleneck(nn.Module):
    """Ghost to ``hidden`` channels, depthwise where the side is halved, squeeze, ghost without activation; residual."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        kernel: int,
        stride: int,
        squeeze: bool,
        version: int = 1,
        gated: bool = False,
    ):
        super().__init__()
        self.gate = Gate(inputs, hidden) if gated else None
        self.expand = Ghost(inputs, hidden, True)
        self.down = conv(hidden, hidden, kernel, stride, hidden, version=version) if stride > 1 else nn.Identity()
        self.squeeze = Squeeze(hidden, version) if squeeze else nn.Identity()
        self.project = Ghost(hidden, outputs, False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, inputs, kernel, stride, inputs, version=version), conv(inputs, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        wide = self.expand(x) if self.gate is None else self.expand(x) * self.gate(x)
        return self.project(self.squeeze(self.down(wide))) + self.shortcut(x)


class GhostFaceNet(nn.Module):
    """GhostFaceNetV``version``-``width``-``stride``, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        version: 1, or 2: with attention from the third bottleneck on.
        width: multiplies the channels (to multiples of 4).
        stride: of the first convolution, 1 or 2.
        embedding_dim: D.
        input_size: pixels; the depthwise head has a sixteenth of it, or a thirty-second, rounded up.

    Raises:
        ValueError: width, stride or, for version 2, the size cannot be used.

    With 512 dimensions and width 1.3: 4,059,748 parameters for stride 1, 4,037,836 for stride 2; 6,795,720 for
    version 2.
    """

    def __init__(
        self,
        version: int = 1,
        width: float = 1.3,
        stride: int = 1,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        if stride not in (1, 2) or not 0.25 <= width <= 8:
            raise ValueError(f"width {width}, stride {stride}; use 0.25 to 8, and 1 or 2")
        if version == 2 and input_size <= 16 * stride:
            raise ValueError(f"input_size is {input_size}; use more than {16 * stride}")
        self.embedding_dim = embedding_dim
        channels = rounded(16 * width)
        self.stem = conv(3, channels, 3, stride, activate=True, version=version)
        self.bottlenecks = nn.Sequential()
        for number, (kernel, step, hidden, outputs, squeeze) in enumerate(BOTTLENECKS):
            if version == 2 and number == len(BOTTLENECKS) - 1:
                hidden = LAST_OF_V2
            wide, hidden = rounded(outputs * width), rounded(hidden * width)
            gated = version == 2 and number >= 2
            self.bottlenecks.append(Bottleneck(channels, wide, hidden, kernel, step, squeeze, version, gated))
            channels = wide
        last = hidden
        self.tail = conv(channels, last, activate=True)
        self.head = nn.Sequential(
            nn.Conv2d(last, last, -(-input_size // (16 * stride)), groups=last, bias=False),
            nn.BatchNorm2d(last),
            nn.Conv2d(last, embedding_dim, 1, bias=False),
            nn.Flatten(),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.bottlenecks(self.stem(x))))
