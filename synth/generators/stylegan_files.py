"""Files of StyleGAN weights, and the folders that we write from them.

Read are NVIDIA's ``.pkl`` (stylegan3, stylegan2-ada-pytorch, and the TensorFlow ones before), rosinality's ``.pt``, and
our own folders. The ``.pkl`` carry the source code of their networks, meant to be executed by whoever opens them. Here
it stays the text that it is: only tensors and the numbers beside them are taken (`faceless.restricted_pickle`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from faceless import __version__
from faceless import restricted_pickle as pickles
from faceless.errors import InputError
from faceless.files import atomic_write, sha256
from faceless.randomness import Rng
from faceless.restricted_pickle import Call
from synth.generators.stylegan_networks import (
    Layer3Config,
    MappingConfig,
    StyleGAN2Config,
    StyleGAN3Config,
    StyleGANNetwork,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PERSISTENT, _TENSORFLOW = "torch_utils.persistence._reconstruct_persistent_obj", "dnnlib.tflib.network.Network"
_ALLOWED = {_PERSISTENT, _TENSORFLOW, *pickles.TENSORS, *pickles.ARRAYS}
_DICTS = {"dnnlib.EasyDict", "dnnlib.util.EasyDict"}
_DEPTH = 8  # of modules inside of modules
MEAN_OF = 10_000  # latents that the mean w is estimated from, when a file does not have it

State = dict[str, Tensor]
Config = StyleGAN2Config | StyleGAN3Config


@dataclass
class Weights:
    """A network and where it comes from.

    Attributes:
        network: in eval mode, frozen, on the CPU.
        sha256: of the file that was read.
        source: of the file that was converted: name, sha256, format; JSON-able.
        licence: of the weights.
    """

    network: StyleGANNetwork
    sha256: str
    source: dict[str, Any]
    licence: str


def load(path: str | Path) -> Weights:
    """Weights from a file or folder, whichever format it is of.

    Raises:
        InputError: missing, damaged, hostile, or of a network that is not StyleGAN2 (skip) or StyleGAN3.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder of generator weights")
    readers = {".pkl": _read_nvidia, ".pt": _read_rosinality, ".pth": _read_rosinality}
    if path.suffix not in readers:
        raise InputError(f"{path}: StyleGAN weights are .pkl (NVIDIA), .pt (rosinality) or a converted folder")
    config, state, kind = _checked(path, lambda: readers[path.suffix](path))
    digest = sha256(path)
    network = assemble(config, state, path)
    if "mapping.w_avg" not in state:
        _estimate_mean(network)
    return Weights(network, digest, {"file": path.name, "sha256": digest, "format": kind}, "unknown")


def save(weights: Weights, folder: str | Path) -> Path:
    """Write ``model.safetensors``, which carries its own description, and ``config.json``, the copy for people.

    The same weights give the same bytes.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    config = weights.network.config
    about = {
        "family": _family(config),
        "network": asdict(config),
        "source": weights.source,
        "licence": weights.licence,
        "faceless": __version__,
    }
    text = json.dumps(about, indent=2, sort_keys=True, allow_nan=False) + "\n"
    state = {key: value.cpu().contiguous() for key, value in weights.network.state_dict().items()}
    # One key only: safetensors writes several in an order that changes from run to run.
    atomic_write(folder / WEIGHTS, safetensors.torch.save(state, {"faceless": text}))
    atomic_write(folder / CONFIG, text)
    return folder


def _family(config: Config) -> str:
    return "stylegan2" if isinstance(config, StyleGAN2Config) else "stylegan3"


def _load_folder(folder: Path) -> Weights:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder}: holds no {WEIGHTS}; give a folder that synth/convert.py wrote")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["faceless"])
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a converted generator ({type(error).__name__}: {error})") from error

    def read() -> tuple[Config, str, dict[str, Any], str]:
        family, network = about["family"], dict(about["network"])
        mapping = MappingConfig(**network.pop("mapping"))
        kinds: dict[str, Callable[..., Config]] = {"stylegan2": StyleGAN2Config, "stylegan3": StyleGAN3Config}
        return kinds[family](mapping=mapping, **network), family, dict(about["source"]), str(about["licence"])

    config, _, source, licence = _checked(path, read)
    return Weights(assemble(config, state, path), sha256(path), source, licence)


def _checked(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; whatever a foreign file makes fail in it becomes one line."""
    try:
        return read()
    except KeyError as error:
        raise InputError(f"{path}: is no StyleGAN that we know: it lacks {str(error)[:100]}") from error
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: is no StyleGAN that we know: {str(error)[:200]}") from error


def assemble(config: Config, state: State, path: Path) -> StyleGANNetwork:
    """The network around exactly these tensors; only ``mapping.w_avg`` may be missing.

    Raises:
        InputError: they do not fit it, or are not finite.
    """
    # Without memory first: what a file asks for is not allocated before it is known to match what it holds.
    with torch.device("meta"):
        network = StyleGANNetwork(config).eval().requires_grad_(False)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    problems = [f"missing {key}" for key in wanted if key not in found and key != "mapping.w_avg"]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    problems += [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in wanted.items()
        if found.get(key, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{path}: does not fit {_family(config)}: {'; '.join(problems[:3])}{more}")
    for key, value in state.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {key} holds values that are not finite numbers")
    mean = {"mapping.w_avg": torch.zeros(config.mapping.w_dim)}
    # A copy: what a file holds may share memory.
    network.load_state_dict({key: value.float().clone() for key, value in (mean | state).items()}, assign=True)
    return network.requires_grad_(False)


@torch.no_grad()
def _estimate_mean(network: StyleGANNetwork) -> None:
    mapping = network.mapping
    sums = torch.zeros_like(mapping.w_avg)
    for indices in torch.arange(MEAN_OF).split(1000):
        sums += mapping(Rng.of(0, "mean w", indices).normal(network.config.mapping.z_dim)).sum(0)
    mapping.w_avg.copy_(sums / MEAN_OF)


# --- NVIDIA -----------------------------------------------------------------------------------------------------------


def _read_nvidia(path: Path) -> tuple[Config, State, str]:
    found = pickles.load(path, _ALLOWED, dicts=_DICTS)
    if isinstance(found, tuple) and len(found) == 3 and all(_is(net, _TENSORFLOW) for net in found):
        raw, lr = _tensorflow(found[2], path)
        return *fold2(raw, lr, None), "NVIDIA pickle, TensorFlow"
    if not isinstance(found, dict) or not _is(found.get("G_ema"), _PERSISTENT):
        raise ValueError("it has no G_ema")
    modules, raw = Modules(found["G_ema"]), {}
    budget = path.stat().st_size
    for name, value in modules.tensors.items():
        raw[name] = pickles.tensor(value, where=f"{path}: {name}")
        budget -= raw[name].nbytes
        if budget < 0:
            raise ValueError("its tensors are larger than the file")
    lr = modules.number("mapping.fc0", "bias_gain")
    modules.expect(r"mapping\.fc\d+|synthesis\.b\d+\.conv\d", "activation", "lrelu")
    if "synthesis.input.freqs" in raw:
        return *fold3(raw, lr, modules), "NVIDIA pickle"
    modules.expect(r"synthesis\.b\d+", "architecture", "skip")
    return *fold2(raw, lr, modules.clamp(r"synthesis\.b\d+\.(conv\d|torgb)")), "NVIDIA pickle"


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Call) and value.name == name


class Modules:
    """The tree of modules of one of NVIDIA's networks, flattened.

    Attributes:
        tensors: parameters and buffers by full name, as they lie in the pickle.
        facts: the other attributes of each module, by its full name.
    """

    def __init__(self, root: Call):
        self.tensors: dict[str, Any] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._add("", root, _DEPTH)

    def _add(self, name: str, module: Any, depth: int) -> None:
        if not _is(module, _PERSISTENT) or depth == 0:
            raise ValueError(f"its module {name[:80]!r} is none, or nested too deeply")
        (meta,) = module.args
        facts = meta["state"]
        self.facts[name] = facts
        prefix = f"{name}." if name else ""
        for kind in ("_parameters", "_buffers"):
            self.tensors |= {prefix + key: value for key, value in facts[kind].items() if value is not None}
        for key, child in facts["_modules"].items():
            if child is not None:
                self._add(prefix + key, child, depth - 1)

    def value(self, module: str, fact: str) -> Any:
        """A fact; NumPy's numbers as Python's, its arrays as lists."""
        value = self.facts[module][fact]
        return pickles.array(value).tolist() if isinstance(value, Call) else value

    def number(self, module: str, fact: str) -> float:
        value = self.value(module, fact)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{module}.{fact} is no number")
        return float(value)

    def side(self, module: str, fact: str) -> int:
        """Of a square."""
        width, height = self.value(module, fact)
        if width != height:
            raise ValueError(f"{module}.{fact} is not square")
        return int(width)

    def expect(self, pattern: str, fact: str, wanted: str) -> None:
        for name in self.facts:
            if re.fullmatch(pattern, name) and (found := self.value(name, fact)) != wanted:
                raise ValueError(f"{name} has {fact} {str(found)[:40]!r}; only {wanted!r} is read")

    def clamp(self, pattern: str) -> float | None:
        """The one ``conv_clamp`` of all layers."""
        found = {self.value(name, "conv_clamp") for name in self.facts if re.fullmatch(pattern, name)}
        if len(found) != 1:
            raise ValueError("its layers do not clamp alike")
        return found.pop()


def _tensorflow(network: Call, path: Path) -> tuple[State, float]:
    """Weights of TensorFlow times under the names that they have had since."""
    tensors: dict[str, Any] = {}

    def collect(prefix: str, stub: Any, depth: int) -> None:
        if not _is(stub, _TENSORFLOW) or depth == 0:
            raise ValueError("a part of it is no network, or nested too deeply")
        tensors.update({prefix + key: value for key, value in stub.state["variables"]})
        for key, part in stub.state["components"].items():
            collect(f"{prefix}{key}/", part, depth - 1)

    collect("", network, _DEPTH)
    options = network.state["static_kwargs"]
    for key, wanted in (("architecture", "skip"), ("nonlinearity", "lrelu"), ("mapping_nonlinearity", "lrelu")):
        if options.get(key, wanted) != wanted:
            raise ValueError(f"{key} is {str(options[key])[:40]!r}; only {wanted!r} is read")
    found, budget = {}, path.stat().st_size
    for name, value in tensors.items():
        if not name.endswith("lod"):
            found[name] = torch.from_numpy(pickles.array(value, f"{path}: {name}").astype("float32"))
            budget -= found[name].nbytes
            if budget < 0:
                raise ValueError("its tensors are larger than the file")

    raw: State = {"mapping.w_avg": found["dlatent_avg"], "synthesis.b4.const": found["synthesis/4x4/Const/const"][0]}
    for name, value in found.items():
        if match := re.fullmatch(r"mapping/(?:Dense(\d+)|LabelEmbed)/(weight|bias)", name):
            layer = "embed" if match[1] is None else f"fc{match[1]}"
            raw[f"mapping.{layer}.{match[2]}"] = value.T if match[2] == "weight" else value
        elif match := re.fullmatch(r"synthesis/(\d+)x\1/(Conv|Conv0_up|Conv1|ToRGB)/(\w+)", name):
            layer = {"Conv": "conv1", "Conv0_up": "conv0", "Conv1": "conv1", "ToRGB": "torgb"}[match[2]]
            key = f"synthesis.b{match[1]}.{layer}."
            if match[3] == "weight":
                value = value.permute(3, 2, 0, 1)
                raw[f"{key}weight"] = value.flip(2, 3) if layer == "conv0" else value
            elif match[3] == "mod_weight":
                raw[f"{key}affine.weight"] = value.T
            elif match[3] == "mod_bias":
                raw[f"{key}affine.bias"] = value + 1
            else:
                raw[key + match[3]] = value
        elif match := re.fullmatch(r"synthesis/noise(\d+)", name):
            number = int(match[1])
            raw[f"synthesis.b{4 << (number + 1) // 2}.conv{(number + 1) % 2}.noise_const"] = value[0, 0]
    taps = torch.tensor([float(tap) for tap in options.get("resample_kernel") or (1, 3, 3, 1)])
    raw["synthesis.b4.resample_filter"] = torch.outer(taps, taps) / taps.sum() ** 2
    return raw, float(options.get("mapping_lrmul", 0.01))


# --- rosinality -------------------------------------------------------------------------------------------------------


def _read_rosinality(path: Path) -> tuple[Config, State, str]:
    found, storages = pickles.load_saved(path, {"argparse.Namespace"})
    if not isinstance(found, dict) or not isinstance(found.get("g_ema"), dict):
        raise ValueError("it has no g_ema")
    budget, given = path.stat().st_size, {}
    for name, value in {**found["g_ema"], "latent_avg": found.get("latent_avg")}.items():
        if value is not None:
            given[name] = pickles.tensor(value, storages, f"{path}: {name}")
            budget -= given[name].nbytes
            if budget < 0:
                raise ValueError("its tensors are larger than the file")
    raw: State = {"synthesis.b4.const": given["input.input"][0]}
    if "latent_avg" in given:
        raw["mapping.w_avg"] = given["latent_avg"].flatten()
    # Its kernel for enlarging holds the gain of 4 already.
    raw["synthesis.b4.resample_filter"] = given["to_rgbs.0.upsample.kernel"] / 4
    for name, value in given.items():
        if match := re.fullmatch(r"style\.(\d+)\.(weight|bias)", name):
            raw[f"mapping.fc{int(match[1]) - 1}.{match[2]}"] = value
        elif match := re.fullmatch(r"(conv1|convs\.(\d+)|to_rgb1|to_rgbs\.(\d+))\.(.+)", name):
            if match[1] in ("conv1", "to_rgb1"):
                key = f"synthesis.b4.{'conv1' if match[1] == 'conv1' else 'torgb'}."
            elif match[2] is not None:
                key = f"synthesis.b{8 << int(match[2]) // 2}.conv{int(match[2]) % 2}."
            else:
                key = f"synthesis.b{8 << int(match[3])}.torgb."
            if match[4] == "conv.weight":
                # Scaled before the demodulation, whose epsilon then has the same effect as there.
                gain = 1 if "torgb" in key else 1 / math.sqrt(value[0, 0].numel())
                raw[f"{key}weight"] = value[0] * gain
            elif match[4] in ("conv.modulation.weight", "conv.modulation.bias"):
                raw[f"{key}affine.{match[4].rpartition('.')[2]}"] = value
            elif match[4] in ("bias", "activate.bias"):
                raw[f"{key}bias"] = value.flatten()
            elif match[4] == "noise.weight":
                raw[f"{key}noise_strength"] = value[0]
        elif match := re.fullmatch(r"noises\.noise_(\d+)", name):
            number = int(match[1])
            raw[f"synthesis.b{4 << (number + 1) // 2}.conv{(number + 1) % 2}.noise_const"] = value[0, 0]
    return *fold2(raw, 0.01, None), "rosinality checkpoint"


# --- Constants folded into weights ------------------------------------------------------------------------------------


def _linear(raw: State, name: str, lr: float = 1.0, gain: float = 1.0) -> State:
    """Weight and bias of a layer with an equalized learning rate (Karras et al., Progressive GAN, section 4.1)."""
    weight, bias = raw[f"{name}.weight"], raw[f"{name}.bias"]
    return {"weight": weight * (lr * gain / math.sqrt(weight.shape[1])), "bias": bias * (lr * gain)}


def _put(state: State, name: str, values: State) -> None:
    state.update({f"{name}.{key}": value for key, value in values.items()})


def _fold_mapping(raw: State, lr: float, state: State) -> MappingConfig:
    count = sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in raw)
    for i in range(count):
        # The gain of the nonlinearity: it may as well come before.
        _put(state, f"mapping.layers.{i}", _linear(raw, f"mapping.fc{i}", lr, math.sqrt(2)))
    if "mapping.w_avg" in raw:
        state["mapping.w_avg"] = raw["mapping.w_avg"]
    c_dim, embed = 0, 0
    if "mapping.embed.weight" in raw:
        _put(state, "mapping.embed", _linear(raw, "mapping.embed"))
        embed, c_dim = raw["mapping.embed.weight"].shape
    widths = tuple(raw[f"mapping.fc{i}.weight"].shape[0] for i in range(count))
    z_dim = raw["mapping.fc0.weight"].shape[1] - embed
    return MappingConfig(z_dim, c_dim, widths[-1], embed, widths)


def fold2(raw: State, lr: float, clamp: float | None) -> tuple[StyleGAN2Config, State]:
    """Configuration and weights of our StyleGAN2 from tensors with NVIDIA's names.

    Args:
        raw: tensors of the generator; one resampling filter at least.
        lr: learning rate multiplier of the mapping network.
        clamp: of what convolutions put out.
    """
    filters = [value for name, value in raw.items() if name.endswith("resample_filter")]
    blur = filters[0]
    if blur.shape != (4, 4) or not torch.allclose(blur, blur.flip(0, 1)):
        raise ValueError("its resampling filter is not 4 taps and symmetric")
    if any(other.shape != blur.shape or not torch.equal(other, blur) for other in filters):
        raise ValueError("its resampling filters differ")
    state: State = {"synthesis.const": raw["synthesis.b4.const"], "synthesis.blur": 4 * blur[None, None]}
    mapping = _fold_mapping(raw, lr, state)
    blocks = sum(re.fullmatch(r"synthesis\.b\d+\.conv1\.weight", name) is not None for name in raw)
    channels = tuple(raw[f"synthesis.b{4 << i}.conv1.weight"].shape[0] for i in range(blocks))
    for i in range(2 * blocks - 1):
        side = 4 << (i + 1) // 2
        name, ours = f"synthesis.b{side}.conv{(i + 1) % 2}", f"synthesis.layers.{i}"
        weight = raw[f"{name}.weight"]
        _put(state, f"{ours}.affine", _linear(raw, f"{name}.affine"))
        # Enlarging goes through a transposed convolution.
        state[f"{ours}.weight"] = weight.transpose(0, 1) if i % 2 else weight
        state[f"{ours}.bias"] = raw[f"{name}.bias"] * math.sqrt(2)
        strength = raw.get(f"{name}.noise_strength", torch.zeros(())) * math.sqrt(2)
        noise = raw.get(f"{name}.noise_const", torch.zeros(side, side))
        state[f"{ours}.strength"], state[f"{ours}.noise"] = strength, (noise * strength)[None, None]
    for i in range(blocks):
        _fold_rgb(raw, f"synthesis.b{4 << i}.torgb", state, f"synthesis.to_rgb.{i}")
    return StyleGAN2Config(mapping, channels, clamp), state


def _fold_rgb(raw: State, name: str, state: State, ours: str, gain: float = 1.0) -> None:
    weight = raw[f"{name}.weight"]
    if weight.shape[0] != 3 or weight.shape[2:] != (1, 1):
        raise ValueError(f"it makes images of {weight.shape[0]} channels; 3 are read")
    affine = _linear(raw, f"{name}.affine")
    scale = gain / math.sqrt(weight.shape[1])
    _put(state, f"{ours}.affine", {key: value * scale for key, value in affine.items()})
    state[f"{ours}.weight"], state[f"{ours}.bias"] = weight[:, :, 0, 0], raw[f"{name}.bias"]


def fold3(raw: State, lr: float, modules: Modules) -> tuple[StyleGAN3Config, State]:
    """The same for StyleGAN3, whose sizes and cutoffs stand in the attributes of its modules."""
    state: State = {}
    mapping = _fold_mapping(raw, lr, state)
    channels = raw["synthesis.input.weight"].shape[0]
    _put(state, "synthesis.input.affine", _linear(raw, "synthesis.input.affine"))
    state["synthesis.input.weight"] = raw["synthesis.input.weight"] / math.sqrt(channels)
    for key in ("freqs", "phases", "transform"):
        state[f"synthesis.input.{key}"] = raw[f"synthesis.input.{key}"]
    names = [name for name in modules.facts if re.fullmatch(r"synthesis\.L\d+_\d+_\d+", name)]
    names.sort(key=lambda name: int(name.split("_")[0].removeprefix("synthesis.L")))
    layers = []
    for i, name in enumerate(names):
        facts = modules.facts[name]
        padding = facts["padding"]
        if list(padding[:2]) != list(padding[2:]):
            raise ValueError(f"{name}.padding is not square")
        layers.append(
            Layer3Config(
                channels=raw[f"{name}.weight"].shape[0],
                in_size=modules.side(name, "in_size"),
                out_size=modules.side(name, "out_size"),
                kernel=raw[f"{name}.weight"].shape[2],
                up=facts["up_factor"],
                down=facts["down_factor"],
                up_taps=facts["up_taps"],
                down_taps=facts["down_taps"],
                radial=bool(facts["down_radial"]) and facts["down_taps"] > 1,
                padding=tuple(padding[:2]),
            )
        )
        gain = raw[f"{name}.magnitude_ema"].rsqrt()
        if i == len(names) - 1:
            _fold_rgb(raw, name, state, "synthesis.to_rgb", float(gain))
            continue
        ours, weight = f"synthesis.layers.{i}", raw[f"{name}.weight"]
        _put(state, f"{ours}.affine", _linear(raw, f"{name}.affine"))
        state[f"{ours}.weight"] = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
        state[f"{ours}.bias"], state[f"{ours}.gain"] = raw[f"{name}.bias"] * math.sqrt(2), gain
        one = torch.ones(1)
        # Zeros between the samples make them weaker, once per axis.
        state[f"{ours}.up_filter"] = raw.get(f"{name}.up_filter", one) * facts["up_factor"]
        state[f"{ours}.down_filter"] = raw.get(f"{name}.down_filter", one)
    config = StyleGAN3Config(
        mapping,
        channels,
        modules.number("synthesis.input", "sampling_rate"),
        modules.number("synthesis.input", "bandwidth"),
        tuple(layers),
        modules.clamp(r"synthesis\.L\d+_\d+_\d+"),
        modules.number("synthesis", "output_scale"),
    )
    return config, state
