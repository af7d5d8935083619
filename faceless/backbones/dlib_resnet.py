"""dlib's face embedder (ResNet-29, 150 x 150, 128-d) in PyTorch, read from the original ``.dat``.

Source of the format and the layers: davisking/dlib, ``dlib/serialize.h``, ``dlib/dnn/`` (Boost licence); the weights
are CC0. The file is dlib's own serialisation of a network type that is fixed at compile time, so the reader knows which
layers to expect and checks that every byte is accounted for. Nothing in the file is executed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceless.errors import InputError

# (channels, shrinks) of the 14 residual blocks, input side first.
BLOCKS = (
    [(32, False)] * 3 + [(64, True)] + [(64, False)] * 3 + [(128, True)] + [(128, False)] * 2
    + [(256, True)] + [(256, False)] * 2 + [(256, True)]
)  # fmt: skip
MEAN = (122.782, 117.001, 104.298)
MAX_TENSOR = 16_000_000  # floats; the largest real one has 589,824


def pad_to(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Zero-pad trailing channels, rows and columns, as dlib's ``add_prev`` does with unequal operands."""
    grow = (channels - x.shape[1], height - x.shape[2], width - x.shape[3])
    return F.pad(x, (0, grow[2], 0, grow[1], 0, grow[0])) if any(grow) else x


class Block(nn.Module):
    """Two 3x3 convolutions (affine folded in) around a skip; a shrinking block pools its skip 2x2."""

    def __init__(self, inputs: int, channels: int, shrink: bool):
        super().__init__()
        self.shrink = shrink
        # The shrinking convolution is unpadded in dlib, hence the unequal sides that pad_to evens out.
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=2 if shrink else 1, padding=0 if shrink else 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        if self.shrink:
            x = F.avg_pool2d(x, 2)
            size = (y.shape[1], max(x.shape[2], y.shape[2]), max(x.shape[3], y.shape[3]))
            x, y = pad_to(x, *size), pad_to(y, *size)
        return F.relu(x + y, inplace=True)


class DlibResNet29(nn.Module):
    """dlib's ``dlib_face_recognition_resnet_model_v1``: ``[B, 3, 150, 150]`` to ``[B, 128]``.

    The input is ``(rgb - MEAN) / 256``. Embeddings have norms of 1.28 to 1.51; two faces at a Euclidean distance under
    0.6 are one person to it. The per-channel scale and shift that follow each convolution in the file carry no
    statistics; they are folded into the convolution, so the 5,614,592 numbers of the file become 5,607,488 parameters.
    """

    def __init__(self, *, embedding_dim: int = 128, input_size: int = 150) -> None:
        super().__init__()
        if (embedding_dim, input_size) != (128, 150):
            raise ValueError(f"embedding_dim is {embedding_dim} and input_size {input_size}; it has 128 and 150")
        self.embedding_dim = embedding_dim
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        inputs, blocks = 32, []
        for channels, shrink in BLOCKS:
            blocks.append(Block(inputs, channels, shrink))
            inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, stride=2)
        return self.fc(self.blocks(x).mean((2, 3)))

    def convolutions(self) -> list[nn.Conv2d]:
        """The 29 convolutions in forward order."""
        return [m for m in self.modules() if isinstance(m, nn.Conv2d)]


class DatReader:
    """dlib's portable serialisation: see ``dlib/serialize.h``."""

    def __init__(self, data: bytes, name: str):
        self.data, self.at, self.name = data, 0, name

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.name}: {what} at byte {self.at}; not dlib's face recognition ResNet, or damaged")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"file ends {count - (len(self.data) - self.at)} bytes early")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        control = self.take(1)[0]
        size = control & 0x0F
        if not 1 <= size <= 8 or control & 0x70:
            raise self.fail("bad integer")
        value = int.from_bytes(self.take(size), "little")
        return -value if control & 0x80 else value

    def expect(self, wanted: int | tuple[int, ...], what: str) -> int:
        value = self.integer()
        if value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise self.fail(f"{what} is {value}")
        return value

    def boolean(self) -> bool:
        value = self.take(1)
        if value not in (b"0", b"1"):
            raise self.fail("bad boolean")
        return value == b"1"

    def string(self) -> str:
        size = self.integer()
        if not 0 <= size <= 64:
            raise self.fail(f"a name of {size} bytes")
        return self.take(size).decode("ascii", "replace")

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if not -900 < exponent < 900:  # the mantissa has at most 64 bits: no overflow
            raise self.fail("bad float")
        return math.ldexp(mantissa, exponent)

    def tensor(self) -> np.ndarray:
        self.expect(2, "tensor version")
        shape = [self.integer() for _ in range(4)]
        count = math.prod(shape)
        if min(shape) < 0 or count > MAX_TENSOR:
            raise self.fail(f"a tensor of shape {shape}")
        return np.frombuffer(self.take(4 * count), "<f4").reshape(shape)

    def aliases(self) -> None:
        """Two views into the parameters before them: weights and biases."""
        for _ in range(2):
            self.expect(1, "alias version")
            for _ in range(4):
                self.integer()

    def layer(self, *kinds: str) -> str:
        kind = self.string()
        if kind not in kinds:
            raise self.fail(f"layer {kind!r} where {' or '.join(kinds)} belongs")
        return kind


def layer_kinds() -> list[str]:
    """The kinds of all layers from the loss side down, as their version numbers are stored."""
    branch = ["add", "add", "add", "add", "add"]  # affine, con, relu, affine, con
    down: list[str] = ["add", "add"]  # fc, avg_pool
    for _, shrink in reversed(BLOCKS):
        skip = ["add", "skip", "tag"] if shrink else []  # avg_pool, skip1, tag2
        down += ["add", "add", *skip, *branch, "tag"]  # relu, add_prev
    return [*down, "add", "add", "add", "innermost"]  # max_pool, relu, affine, con


def read_dat(path: str | Path) -> DlibResNet29:
    """Read ``dlib_face_recognition_resnet_model_v1.dat``.

    Raises:
        InputError: not that network, truncated, with trailing bytes, or with weights that are not finite.
    """
    path = Path(path)
    if path.stat().st_size > 200_000_000:
        raise InputError(f"{path}: {path.stat().st_size} bytes; dlib's face recognition ResNet has 22,466,066")
    file = DatReader(path.read_bytes(), str(path))
    file.expect(1, "format version")
    file.layer("loss_metric_2")
    file.real(), file.real()  # margin, distance threshold
    wanted = {"add": 2, "innermost": 3}
    versions = [file.expect(wanted.get(kind, 1), f"version of a {kind} layer") for kind in layer_kinds()]
    file.layer("input_rgb_image_sized")
    mean = [file.real() for _ in range(3)]
    if any(abs(m - n) > 1e-3 for m, n in zip(mean, MEAN, strict=True)) or (file.integer(), file.integer()) != (
        150,
        150,
    ):
        raise file.fail("unexpected input layer")

    def caches(version: int = 2) -> None:
        for _ in range(3):
            file.boolean()
        for _ in range(3):
            file.tensor()
        if version == 3:
            file.integer()

    def parameterless(*kinds: str, ints: int = 0) -> None:
        file.layer(*kinds)
        for _ in range(ints):
            file.integer()
        caches()

    def convolution(into: nn.Conv2d, version: int = 2) -> None:
        kind = file.layer("con_4", "con_5", "con_6")
        params = file.tensor().reshape(-1).copy()
        filters, height, width, stride, _, pad, _ = (file.integer() for _ in range(7))
        file.aliases()
        for _ in range(4):
            file.real()
        for _ in range({"con_4": 0, "con_5": 1, "con_6": 2}[kind]):
            file.boolean()
        caches(version)
        out, _, *kernel = into.weight.shape
        found = (filters, [height, width], stride, pad, params.size)
        if found != (out, kernel, into.stride[0], into.padding[0], into.weight.numel() + out):
            raise file.fail(f"a convolution of {found}")
        file.layer("affine_", "affine_2")
        scales = file.tensor().reshape(-1).copy()
        file.aliases()
        file.integer()
        caches()
        if scales.size != 2 * out:
            raise file.fail("a scale of the wrong size")
        weight, bias = torch.from_numpy(params).split([into.weight.numel(), out])
        gamma, beta = torch.from_numpy(scales).double().split(out)
        into.weight.data = (weight.view(into.weight.shape).double() * gamma.view(-1, 1, 1, 1)).float()
        into.bias.data = (bias.double() * gamma + beta).float()  # type: ignore[union-attr]

    with torch.device("meta"):  # no random weights first: all are in the file
        net = DlibResNet29()
    net.to_empty(device="cpu")
    convolution(net.stem, versions[-1])
    parameterless("relu_")
    parameterless("max_pool_2", ints=6)
    for block in net.blocks:
        assert isinstance(block, Block)
        convolution(block.conv1)
        parameterless("relu_")
        convolution(block.conv2)
        if block.shrink:
            parameterless("avg_pool_2", ints=6)
        parameterless("add_prev_")
        parameterless("relu_")
    parameterless("avg_pool_2", ints=6)
    file.layer("fc_2")
    outputs, inputs = file.integer(), file.integer()
    params = file.tensor().copy()
    file.aliases()
    file.integer()
    for _ in range(4):
        file.real()
    caches()
    if (outputs, inputs, params.size) != (128, 256, 32768):
        raise file.fail("an embedding layer of the wrong size")
    net.fc.weight.data = torch.from_numpy(params.reshape(256, 128).T.copy())
    if file.at != len(file.data):
        raise file.fail(f"{len(file.data) - file.at} bytes too many")
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        raise InputError(f"{path}: holds weights that are not finite")
    return net.requires_grad_(True).eval()
