"""TinyFaR, the small student of SynthDistill.

Sources: Han et al.: Model Rubik's cube (TinyNet), NeurIPS 2020; Otroshi Shahreza, George, Marcel: SynthDistill, IJCB
2023; module names of otroshi/synthdistill, ``src/Network.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from faceless.backbones.timm_backbone import timm_network


class TinyFaR(nn.Module):
    """TinyNet-A, B or C of timm, average pooled, and a linear layer.

    Args:
        variant: ``"a"``, ``"b"`` or ``"c"``.
        embedding_dim: D.
        input_size: pixels; the network takes any.

    With 512 dimensions: 5,562,844, 3,105,434 and 1,832,106 parameters.
    """

    def __init__(self, variant: str = "a", *, embedding_dim: int = 512, input_size: int = 112):
        super().__init__()
        if variant not in ("a", "b", "c"):
            raise ValueError(f"variant is {variant!r}; use 'a', 'b' or 'c'")
        if input_size < 32:
            raise ValueError(f"input_size is {input_size}; use 32 or more")
        self.embedding_dim = embedding_dim
        self.cnn = timm_network(f"tinynet_{variant}", num_classes=0)
        width: Any = self.cnn.num_features
        self.fc = nn.Linear(int(width), embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cnn(x))
