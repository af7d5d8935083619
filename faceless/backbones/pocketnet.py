"""PocketNet-S and -M, with the module names of the fdbtrs checkpoints.

Source: Boutros, Siebke, Klemt, Damer, Kirchbuchner, Kuijper: PocketNet, IEEE Access 10, 2022; cells, layout and
initialization of fdbtrs/PocketNet, whose genotype ``softmax_casia`` (an evaluated string there) is data here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Of each node the two edges that are summed: operation, and the state that it takes. States 0 and 1 are the outputs of
#: the two cells before; each node adds one; the last four are concatenated.
NORMAL = (
    (("dw_conv_3x3", 0), ("dw_conv_1x1", 1)),
    (("dw_conv_3x3", 2), ("dw_conv_5x5", 0)),
    (("dw_conv_3x3", 3), ("dw_conv_3x3", 0)),
    (("dw_conv_3x3", 4), ("skip_connect", 0)),
)
REDUCE = (
    (("dw_conv_3x3", 1), ("dw_conv_7x7", 0)),
    (("skip_connect", 2), ("dw_conv_5x5", 1)),
    (("max_pool_3x3", 0), ("skip_connect", 2)),
    (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
)


class Separable(nn.Module):
    """PReLU, depthwise, pointwise, BN."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.PReLU(inputs),
            nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Pool(nn.Module):
    """3x3 max pool and BN."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pool(x))


class FactorizedReduce(nn.Module):
    """Half the side without losing half of the pixels: two pointwise branches, one of them shifted by a pixel."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.relu = nn.PReLU(inputs)
        self.conv11 = nn.Conv2d(inputs, inputs, 1, 2, groups=inputs, bias=False)
        self.conv12 = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.conv21 = nn.Conv2d(inputs, inputs, 1, 2, groups=inputs, bias=False)
        self.conv22 = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.bn(torch.cat([self.conv12(self.conv11(x)), self.conv22(self.conv21(x[:, :, 1:, 1:]))], 1))


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """An edge of a cell."""
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    if name == "max_pool_3x3":
        return Pool(channels, stride)
    return Separable(channels, channels, int(name[-1]), stride)


class Cell(nn.Module):
    """Four nodes over the outputs of the two cells before; in a reducing cell, edges from these have stride 2."""

    def __init__(self, before: int, last: int, channels: int, after_reduction: bool, reduction: bool):
        super().__init__()
        self.preproc0 = FactorizedReduce(before, channels) if after_reduction else Separable(before, channels, 1, 1)
        self.preproc1 = Separable(last, channels, 1, 1)
        self.edges = REDUCE if reduction else NORMAL
        self.dag: Any = nn.ModuleList(
            nn.ModuleList(operation(name, channels, 2 if reduction and state < 2 else 1) for name, state in node)
            for node in self.edges
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.preproc0(before), self.preproc1(last)]
        for node, edges in zip(self.dag, self.edges):
            first, second = (edge(states[state]) for edge, (_, state) in zip(node, edges))
            states.append(first + second)
        return torch.cat(states[2:], 1)


class PocketNet(nn.Module):
    """PocketNet, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        channels: of the first cells; reducing ones, at one and two thirds of the depth and at its end, double them.
        cells: how many.
        embedding_dim: D; with 512 the last map has 1,024 channels instead of 512.
        input_size: pixels, a multiple of 16; the depthwise head has a sixteenth of it.

    Raises:
        ValueError: channels, cells or input_size cannot be used.

    S is 16 channels and 18 cells, M 32 and 9. At 112 pixels: 925,632 and 991,424 parameters for S with 128 and 256
    dimensions, 1,686,656 and 1,752,448 for M.
    """

    def __init__(self, channels: int = 16, cells: int = 18, *, embedding_dim: int = 512, input_size: int = 112):
        super().__init__()
        if input_size % 16:
            raise ValueError(f"input_size is {input_size}; PocketNet halves the side four times, use a multiple of 16")
        if not 2 <= channels <= 512 or channels % 2 or not 3 <= cells <= 100:
            raise ValueError(f"channels {channels}, cells {cells}; use an even number up to 512, and 3 to 100 cells")
        self.embedding_dim = embedding_dim
        width = 4 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        before, last, after_reduction = width, width, False
        self.cells = nn.ModuleList()
        for index in range(cells):
            reduction = index in (cells // 3, 2 * cells // 3, cells - 1)
            channels *= 1 + reduction
            self.cells.append(Cell(before, last, channels, after_reduction, reduction))
            before, last, after_reduction = last, 4 * channels, reduction
        final = 1024 if embedding_dim == 512 else 512
        self.tail = nn.Sequential(
            nn.PReLU(last),
            nn.Conv2d(last, final, 1, bias=False),
            nn.BatchNorm2d(final),
            nn.PReLU(final),
            nn.Conv2d(final, final, input_size // 16, groups=final, bias=False),
            nn.BatchNorm2d(final),
            nn.Conv2d(final, embedding_dim, 1, bias=False),
            nn.BatchNorm2d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.tail(last).flatten(1)
