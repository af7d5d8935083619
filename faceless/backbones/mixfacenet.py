"""MixFaceNet-XS, S and M, with the module names of the fdbtrs and QUD checkpoints (one of them misspelled there).

Source: Boutros, Damer, Fang, Kirchbuchner, Kuijper: MixFaceNets, IJCB 2021, on Tan, Le: MixConv, BMVC 2019; layout and
initialization of fdbtrs/mixfacenets, ``backbones/mixnetm.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Unit:
    """Output channels, kernels of expansion, depthwise and projection, expansion factor, divisor of the squeeze."""

    channels: int
    expand: int
    depthwise: int
    project: int
    factor: int
    squeeze: int = 0


#: Channels of the first block, and four stages of units.
STAGES: dict[str, tuple[int, tuple[tuple[Unit, ...], ...]]] = {
    "s": (
        16,
        (
            (Unit(24, 2, 1, 2, 6), Unit(24, 2, 1, 2, 3)),
            (Unit(40, 1, 3, 1, 6, 2), *[Unit(40, 2, 2, 2, 6, 2)] * 3),
            (Unit(80, 1, 3, 2, 6, 4), *[Unit(80, 1, 2, 2, 6, 4)] * 2),
            (
                Unit(120, 2, 3, 2, 6, 2),
                *[Unit(120, 2, 4, 2, 3, 2)] * 2,
                Unit(200, 1, 5, 1, 6, 2),
                *[Unit(200, 1, 4, 2, 6, 2)] * 2,
            ),
        ),
    ),
    "m": (
        24,
        (
            (Unit(32, 2, 3, 2, 6), Unit(32, 2, 1, 2, 3)),
            (Unit(40, 1, 4, 1, 6, 2), *[Unit(40, 2, 2, 2, 6, 2)] * 3),
            (Unit(80, 1, 3, 1, 6, 4), *[Unit(80, 2, 4, 2, 6, 4)] * 3),
            (
                Unit(120, 1, 1, 1, 6, 2),
                *[Unit(120, 2, 4, 2, 3, 2)] * 3,
                Unit(200, 1, 4, 1, 6, 2),
                *[Unit(200, 1, 4, 2, 6, 2)] * 3,
            ),
        ),
    ),
}


def rounded(channels: float) -> int:
    """To a multiple of 8, and not below nine tenths.

    >>> rounded(12.0), rounded(20.0), rounded(60.0)
    (16, 24, 64)
    """
    near = max(int(channels + 4) // 8 * 8, 8)
    return near + 8 if near < 0.9 * channels else near


class MixConv(nn.Module):
    """Convolutions of growing kernels, each for its share of the channels."""

    def __init__(self, inputs: int, outputs: int, kernels: list[int], stride: int, depthwise: bool):
        super().__init__()
        self.shares = shares(inputs, len(kernels))
        for number, (share, out, kernel) in enumerate(zip(self.shares, shares(outputs, len(kernels)), kernels)):
            groups = out if depthwise else 1
            self.add_module(str(number), nn.Conv2d(share, out, kernel, stride, kernel // 2, groups=groups, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(part) for conv, part in zip(self.children(), x.split(self.shares, 1))], 1)


def shares(channels: int, count: int) -> list[int]:
    """Equal shares, the first with what is left over.

    >>> shares(26, 4)
    [8, 6, 6, 6]
    """
    rest = [channels // count] * (count - 1)
    return [channels - sum(rest), *rest]


class ConvBlock(nn.Module):
    """Convolution (plain or mixed), BN and activation: "prelu", "swish" or none."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernels: list[int],
        stride: int,
        activation: str | None,
        depthwise: bool = False,
    ):
        super().__init__()
        self.conv: nn.Module
        if len(kernels) == 1:
            groups = outputs if depthwise else 1
            self.conv = nn.Conv2d(inputs, outputs, kernels[0], stride, kernels[0] // 2, groups=groups, bias=False)
        else:
            self.conv = MixConv(inputs, outputs, kernels, stride, depthwise)
        self.bn = nn.BatchNorm2d(outputs)
        self.activ: nn.Module | None = None
        if activation is not None:
            self.activ = nn.PReLU(outputs) if activation == "prelu" else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.activ is None else self.activ(x)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.activ = nn.SiLU()
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.activ(self.conv1(x.mean((2, 3), keepdim=True)))).sigmoid()


class MixUnit(nn.Module):
    """Inverted residual of mixed convolutions; the channels of its two halves may be interleaved at its end."""

    def __init__(self, inputs: int, unit: Unit, stride: int, activation: str, shuffle: bool):
        super().__init__()
        hidden = unit.factor * inputs
        self.exp_conv = (
            ConvBlock(inputs, hidden, [1] * unit.expand, 1, activation) if unit.factor > 1 else nn.Identity()
        )
        kernels = [3 + 2 * i for i in range(unit.depthwise)]
        self.conv1 = ConvBlock(hidden, hidden, kernels, stride, activation, depthwise=True)
        self.se = Squeeze(hidden, hidden // (unit.factor * unit.squeeze)) if unit.squeeze else nn.Identity()
        self.conv2 = ConvBlock(hidden, unit.channels, [1] * unit.project, 1, None)
        self.residual, self.shuffle = stride == 1 and inputs == unit.channels, shuffle

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.se(self.conv1(self.exp_conv(x))))
        y = y + x if self.residual else y
        return torch.cat([y[:, ::2], y[:, 1::2]], 1) if self.shuffle else y


class Head(nn.Module):
    """One depthwise filter over the whole map per channel, BN, and a linear layer."""

    def __init__(self, channels: int, side: int, embedding_dim: int):
        super().__init__()
        self.dw_conv = nn.Module()
        self.dw_conv.conv = nn.Conv2d(channels, channels, side, groups=channels, bias=False)
        self.dw_conv.bn = nn.BatchNorm2d(channels)
        self.pw_conv = nn.Module()
        self.pw_conv.conv = nn.Conv2d(channels, embedding_dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw_conv.conv(self.dw_conv.bn(self.dw_conv.conv(x)))  # type: ignore[operator]
        return y.flatten(1)


class MixFaceNet(nn.Module):
    """MixFaceNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        variant: ``"s"`` or ``"m"``; XS is S of half the width and 512 channels in the head.
        width: multiplies the channels (to multiples of 8).
        head: channels before the embedding.
        shuffle: interleave the two halves of the channels after every unit (ShuffleMixFaceNet, and QUD's networks).
            The weights do not tell. The first unit does it in either case, as in the authors' code.
        embedding_dim: D.
        input_size: pixels; the depthwise head has a sixteenth of it, rounded up.

    Raises:
        ValueError: unknown variant, or no width left.

    With 512 dimensions: 1,040,866, 3,073,110 and 3,953,046 parameters for XS, S and M.
    """

    def __init__(
        self,
        variant: str = "s",
        width: float = 1.0,
        head: int = 1024,
        *,
        shuffle: bool = True,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        if variant not in STAGES:
            raise ValueError(f"variant is {variant!r}; use {' or '.join(STAGES)}")
        if not 0.25 <= width <= 8 or not 1 <= head <= 8192:
            raise ValueError(f"width {width}, head {head}; use 0.25 to 8, and 1 to 8192")
        self.embedding_dim = embedding_dim
        first, stages = STAGES[variant]
        inputs = first if width == 1 else rounded(first * width)
        self.features = nn.Sequential()
        block = nn.Sequential()
        block.add_module("conv1", ConvBlock(3, inputs, [3], 2, "prelu"))
        block.add_module("conv2", MixUnit(inputs, Unit(inputs, 1, 1, 1, 1), 1, "prelu", True))
        self.features.add_module("init_block", block)
        for number, units in enumerate(stages):
            stage = nn.Sequential()
            # The last stage halves the side in its middle, where it gets wider.
            halving = {1: 0, 2: 0, 3: len(units) // 2}.get(number)
            for index, unit in enumerate(units):
                unit = unit if width == 1 else replace(unit, channels=rounded(unit.channels * width))
                stride, activation = 2 if index == halving else 1, "swish" if number else "prelu"
                stage.add_module(f"unit{index + 1}", MixUnit(inputs, unit, stride, activation, shuffle))
                inputs = unit.channels
            self.features.add_module(f"stage{number + 1}", stage)
        self.tail = ConvBlock(inputs, head, [1], 1, "prelu")
        self.feautre_layer = Head(head, -(-input_size // 16), embedding_dim)
        self.features_norm = nn.BatchNorm1d(embedding_dim)
        self.features_norm.weight.requires_grad_(False)  # stays 1: the classifier on top sets the scale
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.features_norm(self.feautre_layer(self.tail(self.features(x))))
