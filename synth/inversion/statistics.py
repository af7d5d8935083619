"""What a network remembers of the pictures it was trained on: mean and variance of every channel, layer by layer.

Batch normalization keeps them as running averages. For a network that has none, whoever holds its training data can
measure them once (`measure`) and pass on the file; it holds two numbers per channel and no picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from faceless.errors import InputError, suggest
from faceless.files import atomic_write
from faceless.recognizer import Recognizer


@dataclass
class Layer:
    """A place in a network and the statistics there: of a module's input, or of its output."""

    name: str
    module: nn.Module
    mean: Tensor
    variance: Tensor
    of_input: bool


def batch_norms(network: nn.Module) -> list[Layer]:
    """Every batch normalization with running statistics, in the order of definition; 1-d ones count as well."""
    return [
        Layer(name, module, module.running_mean, module.running_var, True)
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


def layers(recognizer: Recognizer, name: str, recorded: str | None = None) -> list[Layer]:
    """Where and to what statistics are matched: those in the file ``recorded``, else those of batch normalizations.

    Args:
        name: of the recognizer, for messages.

    Raises:
        InputError: there are no statistics, or they belong to another network.
    """
    if recorded is not None:
        return _recorded(recognizer.backbone, Path(recorded), name)
    found = batch_norms(recognizer.backbone)
    if not found:
        raise InputError(
            f"teacher {name}: exposes no batch statistics (it has no BatchNorm with running averages; maybe they were "
            "folded into its convolutions). Give a checkpoint with BatchNorm; or distil it into an iresnet18 first and "
            "invert that; or give statistics measured by who has its training data (synth.inversion.statistics.measure)"
            "; or use synth.inversion.activation.ActivationMaximization, synth.inversion.priors.NoiseImages or a "
            "generator"
        )
    return found


def precise(x: Tensor) -> Tensor:
    """In float32 at least: squares and sums of half-precision numbers overflow."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Moments(torch.autograd.Function):
    """`torch.var_mean` in passes that a CPU vectorizes; with channels last it takes a seventh of the time there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        places = [0, *range(2, x.ndim)]
        mean = x.mean(places, keepdim=True)
        variance = (x - mean).square_().mean(places)
        ctx.save_for_backward(x, mean)
        return mean.flatten(), variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_mean, of_variance = (grad.view_as(mean) * (mean.numel() / x.numel()) for grad in grads)
        return torch.addcmul(of_mean - 2 * of_variance * mean, x, 2 * of_variance)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of ``[B, C, ...]``."""
    x = precise(x)
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        return mean, variance
    found: tuple[Tensor, Tensor] = _Moments.apply(x)
    return found


class BatchStatistics:
    """How far the statistics of the batches that pass a network are from those it remembers.

    The regularizer of DeepInversion (Yin et al., CVPR 2020, equation 4, with the norms not squared, as in their code):
    sum over layers of ``|mean - remembered mean| + |variance - remembered variance|``, Euclidean norms over channels.
    A context manager: hooks are there from entering to leaving, however many batches pass.

    Args:
        layers: from `layers`.
        first: weight of the first layer, which sees the pixels themselves; the others have 1.
        momentum: of a running average of the batches' statistics that is compared in their place (FastDFKD, Fang et
            al., AAAI 2022: small batches then need not match on their own); 0 compares each batch. `remember` moves it.
        keep_means: keep the mean over places of every layer, ``[B, C]``, for `features`.

    >>> net = nn.Sequential(nn.BatchNorm2d(1)).eval()
    >>> with BatchStatistics(batch_norms(net), first=10.0) as statistics:
    ...     _ = net(torch.tensor([3.0, 5.0]).view(2, 1, 1, 1))  # mean 4, variance 1; it remembers 0 and 1
    ...     float(statistics.distance())
    40.0
    """

    def __init__(
        self, layers: Sequence[Layer], *, first: float = 10.0, momentum: float = 0.0, keep_means: bool = False
    ):
        self.layers, self.momentum, self.keep_means = list(layers), momentum, keep_means
        self.weights = [first] + [1.0] * (len(self.layers) - 1)
        self.average: list[tuple[Tensor, Tensor]] = []
        self._now: dict[int, tuple[Tensor, Tensor]] = {}
        self._means: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> BatchStatistics:
        for number, layer in enumerate(self.layers):
            if layer.of_input:
                hook = layer.module.register_forward_pre_hook(lambda _, x, k=number: self._keep(k, x[0]))
            else:
                hook = layer.module.register_forward_hook(lambda _, __, y, k=number: self._keep(k, y))
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._now.clear()
        self._means.clear()

    def _keep(self, number: int, x: Tensor) -> None:
        self._now[number] = _moments(x)
        layer = self.layers[number]
        if self._now[number][0].shape != layer.mean.shape:
            raise InputError(
                f"statistics of {layer.name!r} are of {len(layer.mean)} channels, and the teacher has "
                f"{len(self._now[number][0])} there; measure its own"
            )
        if self.keep_means:
            self._means[number] = precise(x).flatten(2).mean(2) if x.ndim > 2 else precise(x)

    def distance(self) -> Tensor:
        """The scalar of the last batch; differentiable in it."""
        gaps = []
        for number, (layer, weight) in enumerate(zip(self.layers, self.weights)):
            mean, variance = self._now[number]
            if self.average:
                old_mean, old_variance = self.average[number]
                mean = torch.lerp(mean, old_mean, self.momentum)
                variance = torch.lerp(variance, old_variance, self.momentum)
            gap = torch.linalg.vector_norm(mean - layer.mean) + torch.linalg.vector_norm(variance - layer.variance)
            gaps.append(weight * gap)
        return torch.stack(gaps).sum()

    def features(self) -> Tensor:
        """``[B, sum of channels]``: means over places of every layer, of the last batch."""
        return torch.cat([self._means[number] for number in range(len(self.layers))], 1)

    @torch.no_grad()
    def remember(self) -> None:
        """Take the last batch into the running average."""
        if not self.momentum:
            return
        now = [self._now[number] for number in range(len(self.layers))]
        before = self.average or now
        self.average = [
            (torch.lerp(m, old_m, self.momentum).detach(), torch.lerp(v, old_v, self.momentum).detach())
            for (m, v), (old_m, old_v) in zip(now, before)
        ]


@torch.no_grad()
def measure(recognizer: Recognizer, batches: Iterable[Tensor], names: Sequence[str], path: str | Path) -> None:
    """Write the statistics of the outputs of modules over pictures, for a network without batch normalization.

    Args:
        recognizer: whose backbone the modules are of.
        batches: of ``[B, 3, H, W]`` RGB in 0..255.
        names: of modules of the backbone, first to last, with outputs ``[B, C, ...]``.
        path: of the safetensors file: ``NAME.mean`` and ``NAME.variance``, biased, over all pictures.

    Raises:
        InputError: no such module, or no picture.
    """
    known = dict(recognizer.backbone.named_modules())
    for name in names:
        if name not in known:
            raise InputError(f"the network has no module {name!r}; {suggest(name, known)}")
    if len({*names}) != len(names) or not names:
        raise InputError("name at least one module, and each once")
    totals: dict[str, list[Tensor]] = {}
    device = recognizer.scale.device
    for images in batches:
        seen = recognizer.eval()(images.to(device), features=names).features
        for name, x in seen.items():
            places = [0, *range(2, x.ndim)]
            values = x.double()
            sums = (values.sum(places), values.square().sum(places))
            count = values.new_tensor(values.numel() / values.shape[1])
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0, 0.0, 0.0]), (*sums, count))]
    if not totals:
        raise InputError("no pictures to measure statistics on")
    state = {}
    for name, (total, squares, count) in totals.items():
        mean = total / count
        state[f"{name}.mean"] = mean.float().cpu()
        state[f"{name}.variance"] = (squares / count - mean.square()).clamp(min=0).float().cpu()
    atomic_write(path, safetensors.torch.save(state, {"order": "\n".join(names)}))


def _recorded(backbone: nn.Module, path: Path, name: str) -> list[Layer]:
    if not path.is_file():
        raise InputError(f"{path}: no such file of statistics")
    try:
        with safetensors.safe_open(path, "pt") as file:
            order = (file.metadata() or {}).get("order", "").split("\n")
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from error
    known = dict(backbone.named_modules())
    if sorted(state) != sorted(f"{module}.{kind}" for module in order for kind in ("mean", "variance")):
        raise InputError(f"{path}: not written by synth.inversion.statistics.measure")
    found = []
    for module in order:
        if module not in known:
            raise InputError(f"{path}: teacher {name} has no module {module!r}; {suggest(module, known)}")
        mean, variance = state[f"{module}.mean"].float(), state[f"{module}.variance"].float()
        if mean.ndim != 1 or mean.shape != variance.shape or not (mean.isfinite() & (variance >= 0)).all():
            raise InputError(f"{path}: the statistics of {module!r} are damaged")
        found.append(Layer(module, known[module], mean, variance, False))
    return found
