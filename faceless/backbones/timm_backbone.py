"""Any vision network of timm with an embedding for its classifier: MobileNetV2 and V3, ViT, Swin and a thousand more.

Sources: Sandler et al.: MobileNetV2, CVPR 2018; Howard et al.: MobileNetV3, ICCV 2019; Dosovitskiy et al.: ViT, ICLR
2021; Liu et al.: Swin Transformer, ICCV 2021; layouts of huggingface/pytorch-image-models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faceless.errors import InputError, suggest
from faceless.files import read_json
from faceless.recognizer import InputSpec

#: Arguments of a network in timm's folders that say what the rest of the folder says as well.
ARGUMENTS = {"num_classes", "in_chans", "global_pool", "img_size"}


def timm_network(model: str, **options: Any) -> nn.Module:
    """An untrained network of timm's own registry; nothing is downloaded.

    Raises:
        InputError: timm is not installed.
        ValueError: timm knows no such network, or it does not take the options.
    """
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{model} needs timm; pip install faceless-distill[timm]") from error
    # Names such as hf-hub:owner/name would download what a stranger's file says.
    if model not in timm.list_models():
        raise ValueError(f"timm has no model {model[:80]!r}; {suggest(model, timm.list_models())}")
    try:
        network: nn.Module = timm.create_model(model, pretrained=False, **options)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {model} with {options} ({error})") from error
    return network


class TimmBackbone(nn.Module):
    """A network of timm, its classifier the embedding: ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        model: name in timm's registry, ``timm.list_models()``.
        embedding_dim: D.
        input_size: pixels; those networks whose weights depend on it (ViT, Swin) are built for it.

    Raises:
        InputError: timm is not installed.
        ValueError: no such network, or one that cannot be built for this size.
    """

    def __init__(self, model: str = "mobilenetv2_100", *, embedding_dim: int = 512, input_size: int = 112):
        super().__init__()
        self.embedding_dim = embedding_dim
        sized = {"img_size": input_size} if model.startswith(("vit_", "swin_", "deit", "beit")) else {}
        self.model = timm_network(model, num_classes=embedding_dim, **sized)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.model(x)
        return embedding


def read_folder(folder: Path) -> tuple[dict[str, Any], InputSpec] | None:
    """What `TimmBackbone` takes, and the input, of a folder that timm saved; None if it did not.

    Raises:
        InputError: a damaged file, an unknown network, one without a classifier, or with arguments of its own.
    """
    config = read_json(folder / "config.json")
    model, weights = config.get("architecture"), config.get("pretrained_cfg")
    if not isinstance(model, str) or not isinstance(weights, dict):
        return None
    classes, arguments = config.get("num_classes"), config.get("model_args", {})
    if type(classes) is not int or classes < 1:
        raise InputError(f"{folder}: has no classifier, whose classes would be the embedding")
    try:
        channels, height, width = weights["input_size"]
        spec = InputSpec(height, width, tuple(weights["mean"]), tuple(weights["std"]), value_range=1.0)
        strange = sorted(set(arguments) - ARGUMENTS)
        if channels != 3 or height != width:
            raise ValueError(f"input_size is {weights['input_size']}; squares of 3 channels are read")
        if strange:
            raise ValueError(f"model_args hold {str(strange[0])[:80]!r}, which is not read")
        options = {"model": model, "embedding_dim": classes, "input_size": height}
        with torch.device("meta"):
            pool = _pooling(TimmBackbone(**options).model)
        if pool is not None and config.get("global_pool", pool) != pool:
            raise ValueError(f"global_pool is {str(config['global_pool'])[:80]!r}; {model} with {pool!r} is read")
    except (KeyError, TypeError, ValueError) as error:
        missing = "has no " if isinstance(error, KeyError) else ""
        raise InputError(f"{folder}/config.json: {missing}{error}") from error
    return options, spec


def _pooling(network: nn.Module) -> str | None:
    """What timm notes as the pooling of a network, if it has one."""
    pool: Any = getattr(network, "global_pool", None) or getattr(getattr(network, "head", None), "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return pool if isinstance(pool, str) and pool else None
