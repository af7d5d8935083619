"""The networks of StyleGAN2 and StyleGAN3 in plain PyTorch, for inference and for gradients with respect to latents.

StyleGAN2: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020 (skip generator).
StyleGAN3: Karras et al., Alias-Free Generative Adversarial Networks, NeurIPS 2021 (T and R).

The constants of the published networks (equalized learning rates, activation gains, filter gains) are folded into the
weights when a file is read (`synth.generators.stylegan_files`), so every layer here is what it computes and no more.
Modulation scales what goes into a convolution and demodulation what comes out of it, rather than one kernel per sample:
the whole batch then shares one convolution. On a CPU everything is channels last, which the resampling filters gain
most from, and no zeros are inserted or computed pixels thrown away. Where no gradient is wanted, activations are
overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of every leaky ReLU
EPSILON = 1e-8
MAX_SIDE, MAX_CHANNELS = 4096, 16384

Noise = Literal["const", "none"] | Sequence[Tensor]


@dataclass(frozen=True)
class MappingConfig:
    """Args: z_dim, c_dim (classes; 0 for none), w_dim; embed: width of the embedded class; widths: of the layers."""

    z_dim: int
    c_dim: int
    w_dim: int
    embed: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", _whole("mapping widths", self.widths, 1, MAX_CHANNELS))
        _whole("z_dim, w_dim", (self.z_dim, self.w_dim), 1, MAX_CHANNELS)
        _whole("c_dim, embed", (self.c_dim, self.embed), 0, MAX_CHANNELS)
        if not 1 <= len(self.widths) <= 64 or self.widths[-1] != self.w_dim or bool(self.c_dim) != bool(self.embed):
            raise ValueError("the mapping network is of an unknown kind")


@dataclass(frozen=True)
class StyleGAN2Config:
    """Args: mapping; channels: of the blocks from 4 x 4 up; clamp: of what convolutions put out, None for none."""

    mapping: MappingConfig
    channels: tuple[int, ...]
    clamp: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", _whole("channels", self.channels, 1, MAX_CHANNELS))
        if not 1 <= len(self.channels) <= 11:
            raise ValueError(f"{len(self.channels)} blocks; from 1 to 11 are possible")
        _positive("clamp", self.clamp)


@dataclass(frozen=True)
class Layer3Config:
    """One layer of StyleGAN3.

    Args:
        channels: of the output.
        in_size, out_size: sides in pixels.
        kernel: of the convolution, 3 or 1.
        up, down: factors around the nonlinearity.
        up_taps, down_taps: lengths of the filters, 1 for none.
        radial: whether the filter for shrinking is two-dimensional.
        padding: zeros before and after, after enlarging; negative crops.
    """

    channels: int
    in_size: int
    out_size: int
    kernel: int
    up: int
    down: int
    up_taps: int
    down_taps: int
    radial: bool
    padding: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "padding", _whole("padding", self.padding, -MAX_SIDE, MAX_SIDE))
        _whole("channels", (self.channels,), 1, MAX_CHANNELS)
        _whole("sizes", (self.in_size, self.out_size), 1, MAX_SIDE)
        _whole("factors", (self.up, self.down), 1, 16)
        _whole("taps", (self.up_taps, self.down_taps), 1, 256)
        enlarged = (self.in_size + self.kernel - 1) * self.up + sum(self.padding)
        if (
            self.kernel not in (1, 3)
            or len(self.padding) != 2
            or (self.radial and self.down_taps == 1)
            or self.out_size != (enlarged - self.up_taps - self.down_taps + 1 + self.down) // self.down
        ):
            raise ValueError("a layer's sizes contradict each other")


@dataclass(frozen=True)
class StyleGAN3Config:
    """Args: mapping; input_channels, sampling_rate, bandwidth: of the Fourier features; layers, the last gives RGB;
    clamp: of what convolutions put out; output_scale: of the image.
    """

    mapping: MappingConfig
    input_channels: int
    sampling_rate: float
    bandwidth: float
    layers: tuple[Layer3Config, ...]
    clamp: float | None
    output_scale: float

    def __post_init__(self) -> None:
        layers = tuple(layer if isinstance(layer, Layer3Config) else Layer3Config(**layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        _whole("input_channels", (self.input_channels,), 1, MAX_CHANNELS)
        for name in ("sampling_rate", "bandwidth", "clamp", "output_scale"):
            _positive(name, getattr(self, name))
        if not 2 <= len(layers) <= 64 or layers[-1].channels != 3 or layers[-1].kernel != 1:
            raise ValueError("the layers are of an unknown kind")
        if any(after.in_size != before.out_size for before, after in pairwise(layers)):
            raise ValueError("the layers do not fit each other")


def _whole(name: str, values: Sequence[int], low: int, high: int) -> tuple[int, ...]:
    if any(type(value) is not int or not low <= value <= high for value in values):
        raise ValueError(f"{name} {str(values)[:80]} must be whole numbers from {low} to {high}")
    return tuple(values)


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} is {str(value)[:40]}; it must be positive")


class Mapping(nn.Module):
    """From ``z [B, z_dim]``, with classes ``c [B, c_dim]`` of conditional networks, to ``w [B, w_dim]``."""

    w_avg: Tensor

    def __init__(self, config: MappingConfig):
        super().__init__()
        self.embed = nn.Linear(config.c_dim, config.embed) if config.c_dim else None
        widths = (config.z_dim + config.embed, *config.widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        x = _unit_power(z)
        if self.embed is not None:
            if c is None:
                raise ValueError("this network is conditional; give classes [B, c_dim]")
            x = torch.cat((x, _unit_power(self.embed(c))), 1)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), SLOPE)
        return x

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """``w [..., w_dim]`` moved towards the mean: psi 1 leaves it, 0 gives the mean."""
        return self.w_avg.lerp(w, psi)


def _unit_power(x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """``x [B, C, H, W]`` times ``scale [B, C]``; overwrites ``x`` where no gradient is wanted."""
    scale = scale[:, :, None, None]
    return x * scale if _differentiable(x, scale) else x.mul_(scale)


def _finished(x: Tensor, gain: Tensor, bias: Tensor, noise: Tensor | None, slope: bool, clamp: float | None) -> Tensor:
    """Gain ``[B, C]``, bias ``[C]``, noise ``[B or 1, 1, H, W]``, leaky ReLU and clamp; overwrites ``x`` if it may."""
    gain, bias = gain[:, :, None, None], bias[:, None, None]
    if _differentiable(x, gain, bias, noise):
        x = torch.addcmul(bias, x, gain)
        x = x if noise is None else x + noise
        x = F.leaky_relu(x, SLOPE) if slope else x
        return x if clamp is None else x.clamp(-clamp, clamp)
    torch.addcmul(bias, x, gain, out=x)
    if noise is not None:
        x.add_(noise)
    if slope:
        F.leaky_relu_(x, SLOPE)
    return x if clamp is None else x.clamp_(-clamp, clamp)


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class ToRGB(nn.Module):
    """A modulated 1 x 1 convolution to RGB, without demodulation: one small matrix per sample."""

    def __init__(self, channels: int, w_dim: int, clamp: float | None):
        super().__init__()
        self.affine = nn.Linear(w_dim, channels)
        self.weight = nn.Parameter(torch.randn(3, channels))
        self.bias = nn.Parameter(torch.zeros(3))
        self.clamp = clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        kernels = self.weight * self.affine(w).unsqueeze(1)  # [B, 3, C]
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # channels last: no copy
        rgb = torch.baddbmm(self.bias, pixels, kernels.transpose(1, 2))
        rgb = rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)
        return rgb.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Layer2(nn.Module):
    """Modulated 3 x 3 convolution, if wished to twice the size; noise; leaky ReLU.

    The weight is ``[out, in, 3, 3]``, or ``[in, out, 3, 3]`` for enlarging. ``noise`` is that of mode ``const``, times
    the strength.
    """

    noise: Tensor

    def __init__(self, channels: tuple[int, int], w_dim: int, size: int, up: bool, clamp: float | None):
        super().__init__()
        inputs, outputs = channels
        self.affine = nn.Linear(w_dim, inputs)
        self.weight = nn.Parameter(torch.randn(*((inputs, outputs) if up else (outputs, inputs)), 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("noise", torch.zeros(1, 1, size, size))
        self.strength = nn.Parameter(torch.zeros(()))
        self.up, self.clamp = up, clamp

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | Literal["const", "none"], blur: Tensor) -> Tensor:
        style = self.affine(w)
        power = self.weight.square().sum((2, 3))  # [out, in] or [in, out]
        power = style.square() @ (power if self.up else power.T)
        x = _scaled(x, style)
        if self.up:
            x = F.conv_transpose2d(x, self.weight, stride=2)
            x = F.conv2d(x, blur.expand(x.shape[1], 1, 4, 4), padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, self.weight, padding=1)
        gain = (power + EPSILON).rsqrt() * math.sqrt(2)
        if isinstance(noise, Tensor):
            return _finished(x, gain, self.bias, noise.to(x) * self.strength, True, self.clamp)
        return _finished(x, gain, self.bias, self.noise if noise == "const" else None, True, self.clamp)


class Synthesis2(nn.Module):
    """From ``ws [B, num_ws, w_dim]`` to images ``[B, 3, R, R]``, nominally in -1..1.

    Attributes:
        noise_sizes: side of the noise of each layer.
    """

    blur: Tensor
    noise_sizes: list[int]

    def __init__(self, config: StyleGAN2Config):
        super().__init__()
        w_dim, clamp, channels = config.mapping.w_dim, config.clamp, config.channels
        self.size = 4 << (len(channels) - 1)
        self.num_ws = 2 * len(channels)
        self.const = nn.Parameter(torch.randn(channels[0], 4, 4))
        self.layers = nn.ModuleList([Layer2((channels[0], channels[0]), w_dim, 4, False, clamp)])
        for i, (before, after) in enumerate(pairwise(channels)):
            side = 8 << i
            self.layers.append(Layer2((before, after), w_dim, side, True, clamp))
            self.layers.append(Layer2((after, after), w_dim, side, False, clamp))
        self.to_rgb = nn.ModuleList(ToRGB(c, w_dim, clamp) for c in channels)
        self.noise_sizes = [4 << (i + 1) // 2 for i in range(len(self.layers))]
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("blur", torch.outer(binomial, binomial).view(1, 1, 4, 4))

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        rows = ws.unbind(1)
        each = [noise] * len(self.layers) if isinstance(noise, str) else noise
        x = self.const.repeat(len(ws), 1, 1, 1)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        rgb: Tensor | None = None
        for i, (layer, w, n) in enumerate(zip(self.layers, rows, each)):
            x = layer(x, w, n, self.blur)
            if i % 2 == 0:  # the second layer of a block; ToRGB takes the row of the layer that follows
                y = self.to_rgb[i // 2](x, rows[i + 1])
                if rgb is not None:
                    y = y + F.conv_transpose2d(rgb, self.blur.expand(3, 1, 4, 4), stride=2, padding=1, groups=3)
                rgb = y
        assert rgb is not None
        return rgb


class FourierFeatures(nn.Module):
    """The input of StyleGAN3: sines over the plane, which ``w`` rotates and shifts, mixed by one matrix."""

    freqs: Tensor
    phases: Tensor
    transform: Tensor

    def __init__(self, config: StyleGAN3Config):
        super().__init__()
        channels = config.input_channels
        self.rate, self.bandwidth, self.size = config.sampling_rate, config.bandwidth, config.layers[0].in_size
        self.affine = nn.Linear(config.mapping.w_dim, 4)
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.register_buffer("freqs", torch.randn(channels, 2))
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.register_buffer("transform", torch.eye(3))

    def forward(self, w: Tensor) -> Tensor:
        t = self.affine(w)
        cos, sin, right, down = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        rotate = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), 1).view(-1, 3, 3)
        shift = torch.stack((one, zero, -right, zero, one, -down, zero, zero, one), 1).view(-1, 3, 3)
        transform = rotate @ shift @ self.transform
        phases = self.phases + (self.freqs @ transform[:, :2, 2:]).squeeze(2)  # [B, C]
        freqs = self.freqs @ transform[:, :2, :2]  # [B, C, 2]
        # Frequencies that a transform has pushed out of the band fade.
        excess = (freqs.norm(dim=2) - self.bandwidth) / (self.rate / 2 - self.bandwidth)
        amplitudes = (1 - excess).clamp(0, 1)
        line = (torch.arange(self.size, device=w.device, dtype=w.dtype) + 0.5 - self.size / 2) / self.rate
        y, x = torch.meshgrid(line, line, indexing="ij")
        grid = torch.stack((x, y), 2).flatten(0, 1)  # [H * W, 2]
        waves = torch.sin((grid @ freqs.transpose(1, 2) + phases.unsqueeze(1)) * (2 * math.pi))
        mixed = (waves * amplitudes.unsqueeze(1)) @ self.weight.T
        return mixed.unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)


class Layer3(nn.Module):
    """Modulated convolution, then a leaky ReLU at a higher sampling rate between two low-pass filters."""

    gain: Tensor
    up_filter: Tensor
    down_filter: Tensor

    def __init__(self, inputs: int, w_dim: int, config: Layer3Config, clamp: float | None):
        super().__init__()
        self.config, self.clamp = config, clamp
        self.affine = nn.Linear(w_dim, inputs)
        self.weight = nn.Parameter(torch.randn(config.channels, inputs, config.kernel, config.kernel))
        self.bias = nn.Parameter(torch.zeros(config.channels))
        self.register_buffer("gain", torch.ones(()))  # of the input, from its average power in training
        self.register_buffer("up_filter", torch.ones(config.up_taps))
        down = (config.down_taps,) * (2 if config.radial else 1)
        self.register_buffer("down_filter", torch.ones(down))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w)
        # Only the direction matters behind the demodulation; the length is bounded for its epsilon's sake.
        style = style * style.square().mean(1, keepdim=True).rsqrt()
        gain = (style.square() @ self.weight.square().sum((2, 3)).T + EPSILON).rsqrt() * (self.gain * math.sqrt(2))
        x = F.conv2d(_scaled(x, style), self.weight, padding=self.config.kernel - 1)
        x = _finished(x, gain, self.bias, None, False, None)
        x = self.enlarge(x)
        if _differentiable(x):
            x = F.leaky_relu(x, SLOPE)
            x = x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
        else:
            F.leaky_relu_(x, SLOPE)
            x = x if self.clamp is None else x.clamp_(-self.clamp, self.clamp)
        return self.shrink(x)

    def enlarge(self, x: Tensor) -> Tensor:
        """Low-pass filtered to ``up`` times the size, then padded or cropped."""
        taps, up, channels = self.config.up_taps, self.config.up, x.shape[1]
        # What a full convolution has more than the one asked for, before and behind.
        before, behind = taps - 1 - self.config.padding[0], taps - up - self.config.padding[1]
        both = max(min(before, behind), 0)
        if taps > 1 or up > 1:
            rows = self.up_filter.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
            x = F.conv_transpose2d(x, rows, stride=(up, 1), padding=(both, 0), groups=channels)
            columns = rows.transpose(2, 3)
            x = F.conv_transpose2d(x, columns, stride=(1, up), padding=(0, both), groups=channels)
            before, behind = before - both, behind - both
        return F.pad(x, (-before, -behind, -before, -behind)) if before or behind else x

    def shrink(self, x: Tensor) -> Tensor:
        """Low-pass filtered, and every ``down``-th pixel of that."""
        down, channels = self.config.down, x.shape[1]
        if self.config.radial:
            kernel = self.down_filter.flip(0, 1).expand(channels, 1, -1, -1)
            return F.conv2d(x, kernel, stride=down, groups=channels)
        columns = self.down_filter.flip(0).view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        x = F.conv2d(x, columns, stride=(1, down), groups=channels)
        return F.conv2d(x, columns.transpose(2, 3), stride=(down, 1), groups=channels)


class Synthesis3(nn.Module):
    """From ``ws [B, num_ws, w_dim]`` to images ``[B, 3, R, R]``, nominally in -1..1. It has no noise."""

    noise_sizes: list[int] = []

    def __init__(self, config: StyleGAN3Config):
        super().__init__()
        w_dim, clamp, last = config.mapping.w_dim, config.clamp, config.layers[-1]
        self.size, self.num_ws, self.output_scale = last.out_size, len(config.layers) + 1, config.output_scale
        self.input = FourierFeatures(config)
        self.layers = nn.ModuleList()
        channels = config.input_channels
        for layer in config.layers[:-1]:
            self.layers.append(Layer3(channels, w_dim, layer, clamp))
            channels = layer.channels
        self.to_rgb = ToRGB(channels, w_dim, clamp)
        self.padding = last.padding

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        rows = ws.unbind(1)
        x = self.input(rows[0])
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        for layer, w in zip(self.layers, rows[1:]):
            x = layer(x, w)
        x = self.to_rgb(x, rows[-1])
        return F.pad(x, self.padding * 2) * self.output_scale


class StyleGANNetwork(nn.Module):
    """Mapping and synthesis, of the family that the configuration is of."""

    mapping: Mapping
    synthesis: Synthesis2 | Synthesis3

    def __init__(self, config: StyleGAN2Config | StyleGAN3Config):
        super().__init__()
        self.config = config
        self.mapping = Mapping(config.mapping)
        self.synthesis = Synthesis2(config) if isinstance(config, StyleGAN2Config) else Synthesis3(config)
