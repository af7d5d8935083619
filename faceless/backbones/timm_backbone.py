"""Any vision network of timm with an embedding for its classifier: MobileNetV2 and V3, ViT, Swin and a thousand more.

Sources: Sandler et al.: MobileNetV2, CVPR 2018; Howard et al.: MobileNetV3, ICCV 2019; Dosovitskiy et al.: ViT, ICLR
2021; Liu et al.: Swin Transformer, ICCV 2021; layouts of huggingface/pytorch-image-models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from faceless.errors import InputError, suggest


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
