"""SlimResNet: our plain residual network for CPUs.

On a CPU the architecture decides how fast training is: depthwise convolutions leave the arithmetic units waiting for
memory, and PReLU is a pass of its own in both directions. So this one is made of dense 3x3 convolutions, BN and ReLU
only, with channel counts that fill vector registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {"relu": lambda _: nn.ReLU(inplace=True), "prelu": nn.PReLU}
STEMS = {"conv3": 3, "conv5": 5, "conv7": 7, "space2depth": 3}
HEADS = ("mean", "flat")


class Block(nn.Module):
    """3x3 with the stride, BN, activation, 3x3, BN, summed with the (projected) input, activation.

    He, Zhang, Ren, Sun: Deep residual learning, CVPR 2016, figure 2. Where the map shrinks, the shortcut averages 2 x 2
    places instead of dropping three of four (He et al.: Bag of tricks, CVPR 2019, figure 2c): residual branches start
    at zero, so shortcuts are all that a young network sees through.
    """

    def __init__(self, inputs: int, channels: int, stride: int, activation: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = ACTIVATIONS[activation](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = ACTIVATIONS[activation](channels)
        self.project: nn.Module | None = None
        if stride != 1 or inputs != channels:
            project = [nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels)]
            if stride != 1:
                project.insert(0, nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
            self.project = nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + (x if self.project is None else self.project(x)))


class SlimResNet(nn.Module):
    """A plain ResNet, ``[B, 3, H, W]`` of at least 32 x 32 to ``[B, embedding_dim]``.

    Args:
        embedding_dim: D.
        input_size: pixels it will see; only the ``flat`` head depends on it.
        stem: ``"conv7"``, ``"conv5"`` or ``"conv3"``, one convolution of stride 2; or ``"space2depth"``, blocks of
            4 x 4 pixels as 48 channels and a 3x3 convolution, so that the first stage works on a quarter of the side.
        pool: a 3x3 max pool of stride 2 after the stem.
        widths: channels of the stages; each stage after the first halves the map.
        depths: residual blocks of the stages.
        width: multiplies ``widths`` (to multiples of 8).
        activation: ``"relu"`` or ``"prelu"``.
        head: ``"mean"`` averages the last map before the linear layer; ``"flat"`` keeps its places apart, which on
            aligned faces tells eyes from mouths (ArcFace, Deng et al., CVPR 2019, section 3.1, argues the same).
        zero_init: start every residual branch at zero (Goyal et al., arXiv 1706.02677, section 5.1).

    Raises:
        ValueError: unknown stem, head or activation, or widths and depths that do not fit together.

    >>> sum(p.numel() for p in SlimResNet(embedding_dim=128).parameters())
    1617376
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
        stem: str = "conv7",
        pool: bool = False,
        widths: Sequence[int] = (32, 64, 128, 160),
        depths: Sequence[int] = (2, 2, 2, 2),
        width: float = 1.0,
        activation: str = "relu",
        head: str = "mean",
        zero_init: bool = True,
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}; use {' or '.join(STEMS)}")
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; use {' or '.join(HEADS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; use {' or '.join(ACTIVATIONS)}")
        channels = [max(8, round(w * width / 8) * 8) for w in widths]
        if len(channels) != len(depths) or not channels or max(channels) > 4096:
            raise ValueError(f"widths {list(widths)} x {width} and depths {list(depths)}: one of each for every stage")
        if min(depths) < 1 or sum(depths) > 200:
            raise ValueError(f"depths are {list(depths)}; use at least 1 each and 200 in all")
        if input_size < 32:
            raise ValueError(f"input_size is {input_size}; use 32 or more")
        self.embedding_dim = embedding_dim
        first = channels[0]
        layers: list[nn.Module]
        if stem == "space2depth":
            layers = [nn.PixelUnshuffle(4), nn.Conv2d(48, first, 3, padding=1, bias=False)]
        else:
            kernel = STEMS[stem]
            layers = [nn.Conv2d(3, first, kernel, 2, kernel // 2, bias=False)]
        layers += [nn.BatchNorm2d(first), ACTIVATIONS[activation](first)]
        self.stem = nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, 1)] if pool else []))
        stages, inputs = [], first
        for index, (outputs, depth) in enumerate(zip(channels, depths)):
            blocks = [Block(inputs, outputs, 1 if index == 0 else 2, activation)]
            stages.append(nn.Sequential(*blocks, *(Block(outputs, outputs, 1, activation) for _ in range(depth - 1))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        side = -(-input_size // (4 if stem == "space2depth" else 2))
        for _ in range(len(stages) - 1 + pool):
            side = -(-side // 2)
        self.head = head
        self.fc = nn.Linear(inputs * (side**2 if head == "flat" else 1), embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and zero_init:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stages(self.stem(x))
        return self.fc(maps.flatten(1) if self.head == "flat" else maps.mean((2, 3)))
