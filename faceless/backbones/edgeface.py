"""EdgeFace: EdgeNeXt with an embedding, its linear layers perhaps in two factors of low rank.

Source: George, Ecabert, Otroshi Shahreza, Kotwal, Marcel: EdgeFace, IEEE T-BIOM 6(2), 2024; module names of
otroshi/edgeface, ``backbones/timmfr.py``. The last layer is factorized too: the exception for "head" there looks at a
layer's own name, which is ``fc``.
"""

from __future__ import annotations

from torch import Tensor, nn

from faceless.backbones.timm_backbone import timm_network


class LowRank(nn.Module):
    """A linear layer in two factors, the second with the bias."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool):
        super().__init__()
        self.linear1 = nn.Linear(inputs, rank, bias=False)
        self.linear2 = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


EDGEFACE = {"xxs": "edgenext_xx_small", "xs": "edgenext_x_small", "s": "edgenext_small", "base": "edgenext_base"}


class EdgeFace(nn.Module):
    """EdgeFace, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Args:
        variant: ``"xxs"``, ``"xs"``, ``"s"`` or ``"base"``.
        rank_ratio: of a factorized layer's rank to its smaller side; None keeps the layers whole.
        embedding_dim: D.
        input_size: pixels; the network takes any from 32.

    With 512 dimensions: 1,244,744 parameters for xxs, 1,770,492 for xs at 0.6, 3,652,520 for s at 0.5, 18,225,812 for
    base.
    """

    def __init__(
        self,
        variant: str = "xs",
        rank_ratio: float | None = None,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        if variant not in EDGEFACE:
            raise ValueError(f"variant is {variant!r}; use one of {', '.join(EDGEFACE)}")
        if rank_ratio is not None and not 0 < rank_ratio <= 1:
            raise ValueError(f"rank_ratio is {rank_ratio}; use more than 0 and up to 1, or none")
        if input_size < 32:
            raise ValueError(f"input_size is {input_size}; use 32 or more")
        self.embedding_dim = embedding_dim
        self.model = timm_network(EDGEFACE[variant], num_classes=embedding_dim)
        if rank_ratio is not None:
            factorize(self.model, rank_ratio)

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.model(x)
        return embedding


def factorize(network: nn.Module, ratio: float) -> None:
    """Put `LowRank` in the place of every linear layer, in place.

    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> factorize(net, 0.5)
    >>> [tuple(p.shape) for p in net.parameters()]
    [(2, 8), (4, 2), (4,)]
    """
    for name, module in network.named_children():
        if isinstance(module, nn.Linear):
            rank = max(2, int(min(module.in_features, module.out_features) * ratio))
            setattr(network, name, LowRank(module.in_features, module.out_features, rank, module.bias is not None))
        else:
            factorize(module, ratio)
