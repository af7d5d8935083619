"""Vision networks of transformers that classify pictures, with an embedding for their classes: ViT, DeiT, Swin, DINOv2.

Source: layouts of huggingface/transformers. Networks are built from numbers alone: nothing is downloaded, and no code
but that of the installed package is used.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from faceless.errors import InputError, suggest
from faceless.files import read_json
from faceless.recognizer import InputSpec

PROCESSOR = "preprocessor_config.json"
#: Settings that say nothing about what a network computes.
NOTES = {
    "_name_or_path",
    "architectures",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "model_type",
    "out_features",  # of networks that are part of another
    "out_indices",
    "problem_type",
    "stage_names",
    "torch_dtype",
    "transformers_version",
}


class TransformersBackbone(nn.Module):
    """A picture classifier of transformers whose classes are the embedding, ``[B, 3, H, W]`` to ``[B, embedding_dim]``.

    Args:
        model: type of model, for example ``"vit"``.
        config: numbers of its configuration, and ``hidden_act``; what is missing has the package's default.
        embedding_dim: D.
        input_size: pixels.

    Raises:
        InputError: transformers is not installed.
        ValueError: no such model, or a configuration with anything but numbers.

    >>> TransformersBackbone("vit", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...     "intermediate_size": 64}, embedding_dim=8, input_size=32).embedding_dim
    8
    """

    def __init__(
        self,
        model: str = "vit",
        config: Mapping[str, Any] | None = None,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        auto = _classes(model)
        for key, value in (config or {}).items():
            if not is_plain(key, value):
                raise ValueError(f"{key[:80]} of {model} is {str(value)[:80]!r}; only numbers are taken")
        numbers = {**(config or {}), "num_labels": embedding_dim, "image_size": input_size}
        self.embedding_dim = embedding_dim
        try:
            settings = auto.AutoConfig.for_model(model, **numbers)
            self.network = auto.AutoModelForImageClassification.from_config(settings)
        except (TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"transformers cannot build {model} with {str(numbers)[:200]} ({error})") from error

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(pixel_values=x).logits
        return embedding


def _classes(model: str) -> Any:
    """The package, if it knows the model."""
    try:
        package = importlib.import_module("transformers")
        names = importlib.import_module("transformers.models.auto.modeling_auto")
    except ImportError as error:
        raise InputError(f"{model[:80]} needs transformers; pip install faceless-distill[text]") from error
    known = sorted(names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if model not in known:
        raise ValueError(f"transformers classifies pictures with no model {model[:80]!r}; {suggest(model, known)}")
    return package


def read_folder(folder: Path) -> tuple[dict[str, Any], InputSpec] | None:
    """Options of `TransformersBackbone` and input of a folder that transformers saved; None if it did not.

    The input is that of ``preprocessor_config.json``; without one, (x - 127.5) / 127.5.

    Raises:
        InputError: a damaged file, an unknown model, or settings that are no numbers and not those of the package.
    """
    config = read_json(folder / "config.json")
    model = config.get("model_type")
    if not isinstance(model, str) or not model or "architecture" in config:
        return None
    try:
        usual = _classes(model).AutoConfig.for_model(model).to_dict()
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    settings = {}
    for key, value in config.items():
        if key in usual and key not in NOTES and is_plain(key, value):
            settings[key] = value
        elif key not in NOTES and usual.get(key) != value:
            raise InputError(f"{folder}/config.json: {key[:80]} is {str(value)[:80]!r}, which is not read")
    size = settings.pop("image_size", 224)
    for key in ("num_labels", "num_channels"):
        settings.pop(key, None)
    processor = read_json(folder / PROCESSOR)
    try:
        mean, std = (tuple(processor.get(key, [0.5] * 3)) for key in ("image_mean", "image_std"))
        spec = InputSpec(size, size, mean, std, value_range=255 * float(processor.get("rescale_factor", 1 / 255)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / PROCESSOR}: {error}") from error
    return {"model": model, "config": settings, "input_size": size}, spec


def read_weights(file: Path, backbone: TransformersBackbone, model: str) -> nn.Module:
    """The network of ``backbone``, which may be without memory, with the weights of ``file``.

    Their names differ between versions of transformers, which knows them all. It sees the weights and our numbers, and
    nothing else of the folder: adapters that lie there could name others to fetch.

    Raises:
        InputError: the weights do not fit.
    """
    auto = _classes(model)
    with safetensors.safe_open(file, "pt") as content:
        shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118
    wanted, found = sum(p.numel() for p in backbone.parameters()), sum(math.prod(shape) for shape in shapes.values())
    if not 0.9 * found <= wanted <= 1.1 * found:
        raise InputError(f"{file}: holds {found} numbers; {model} with these settings has {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        backbone.network.config.save_pretrained(folder)
        (Path(folder) / file.name).symlink_to(file.resolve())
        try:
            network, info = auto.AutoModelForImageClassification.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, local_files_only=True, dtype="float32"
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{file}: does not fit {model} ({str(error)[:200]})") from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise InputError(f"{file}: does not fit {model}: {len(wrong)} names, {str(wrong[0])[:80]} among them")
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise InputError(f"{file}: holds values that are not finite")
    loaded: nn.Module = network.eval()
    return loaded


def is_plain(key: str, value: Any) -> bool:
    """Whether a setting is made of numbers: names could be of code that transformers fetches.

    >>> is_plain("depths", [2, 2]), is_plain("hidden_act", "gelu"), is_plain("attn_implementation", "somebody/kernel")
    (True, True, False)
    """
    if key == "hidden_act":
        return isinstance(value, str) and value.replace("_", "").isalnum()
    values = value if isinstance(value, (list, tuple)) else [value]
    return not key.startswith("_") and all(
        v is None or (isinstance(v, (int, float)) and math.isfinite(v) and abs(v) < 2**31) for v in values
    )
