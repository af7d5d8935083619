"""Prompts: learnable tokens that let a frozen Transformer adapt to being a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.sources import Batch
from distill.teachers import FrozenTeacher
from faceless.backbones.timm_backbone import TimmBackbone
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer

SPREAD = 0.02  # of initial prompts: small, so that they turn quickly; the layer's norm gives them the size of tokens


@dataclass
class Prompts:
    """Learnable tokens in every attention layer of a frozen ViT or Swin teacher (APT).

    They join the keys and values of each layer by way of its norm, as its tokens do, and are not handed on to the next,
    which has its own; in a Swin, every window has the layer's prompts. Weights of the teacher stay. The prompts follow
    those losses of the teacher's features that let it learn (`distill.losses.cross_architecture.URFM` with
    ``teacher_learns``), and are held back by `distill.losses.cross_architecture.PromptGuard`, without which student and
    teacher could agree on nothing. The student's other losses see the teacher with its prompts. They travel in the
    checkpoints of the run.

    Zhao et al.: Cross-Architecture Distillation for Face Recognition, ACM MM 2023 (arXiv 2306.14662); no official code.
    Known: prompts in the layers of a frozen Transformer, replaced where Swin merges patches, and kept beside the tokens
    after the last layer; 5 to 50 were tried, and too many hurt. Chosen: fresh ones in each layer (deep prompts of VPT,
    Jia et al., ECCV 2022), where prompts could live on through a stage; and none among the tokens that are pooled or
    compared, so that a teacher with prompts gives features of the shape that it gave without.

    Args:
        tokens: in each layer; 5 to 50.
        seed: of their initial values; null takes the run's.
    """

    tokens: int = 10
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 200:
            raise InputError(f"prompts.tokens is {self.tokens}; use 5 to 50, at most 200")

    def into(self, teacher: Recognizer) -> nn.ParameterList:
        """Put prompts into a teacher, whose other weights are frozen; returns them, layer by layer.

        Raises:
            InputError: the teacher is no ViT or Swin of timm.
        """
        backbone = teacher.backbone
        teacher.requires_grad_(False)
        if isinstance(backbone, TimmBackbone):
            teacher.backbone = PromptedBackbone(backbone, self)
        if not isinstance(teacher.backbone, PromptedBackbone) or not teacher.backbone.layers:
            kind = getattr(backbone, "model", backbone)
            raise InputError(f"prompts need a ViT or Swin of timm as teacher, not {type(kind).__name__}")
        return nn.ParameterList(layer.prompts for layer in teacher.backbone.layers)


class PromptedBackbone(nn.Module):
    """A Transformer of timm with prompts, whose features have the names that they had without.

    Besides, its sub-modules ``prompted`` and ``unprompted`` give the embeddings with and without prompts as features;
    the latter costs a second pass, when it is asked for.

    Args:
        backbone: the network; its attention layers are replaced in place.
        settings: how many prompts.

    Shape:
        as the network.
    """

    def __init__(self, backbone: TimmBackbone, settings: Prompts):
        super().__init__()
        from timm.models.swin_transformer import WindowAttention
        from timm.models.vision_transformer import Attention

        self.embedding_dim = backbone.embedding_dim
        self.model = backbone.model
        self.prompted, self.unprompted = nn.Identity(), nn.Identity()
        kinds: dict[type, type[PromptedAttention]] = {
            Attention: PromptedAttention,
            WindowAttention: PromptedWindowAttention,
        }
        self.layers: list[PromptedAttention] = []
        module: Any
        for name, module in list(self.model.named_modules()):
            if type(module) in kinds:
                numbers = Rng.of(settings.seed or 0, f"prompts {name}", range(settings.tokens))
                parent, _, child = name.rpartition(".")
                block: Any = self.model.get_submodule(parent)
                layer = kinds[type(module)](module, SPREAD * numbers.normal(module.qkv.in_features), block.norm1)
                setattr(block, child, layer)
                self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.unprompted._forward_hooks:
            with torch.no_grad():
                self._switch(False)
                try:
                    self.unprompted(self.model(x))
                finally:
                    self._switch(True)
        # Last, so that features are those with prompts.
        embedding: Tensor = self.prompted(self.model(x))
        return embedding

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.active = on


class PromptedAttention(nn.Module):
    """Self-attention of timm's ViT with further keys and values.

    Args:
        attention: the layer of the network.
        prompts: ``[n, C]``, their initial values.
        norm: what the layer's tokens come out of; without it they are twenty times as large as fresh prompts, and
            these change next to nothing.

    Shape:
        tokens ``[B, N, C]``, as the layer.
    """

    attention: Any

    def __init__(self, attention: nn.Module, prompts: Tensor, norm: nn.Module | None = None):
        super().__init__()
        self.attention = attention
        self.prompts = nn.Parameter(prompts)
        self.norm = (norm or nn.Identity(),)  # no sub-module: it stays the block's
        self.active = True

    def normed(self, like: Tensor) -> Tensor:
        """``[n, C]``: the prompts as the layer's tokens are."""
        prompts: Tensor = self.norm[0](self.prompts)
        return prompts.to(like.dtype)

    def forward(self, x: Tensor, *arguments: Tensor | None, **named: Tensor | None) -> Tensor:
        if not self.active:
            found: Tensor = self.attention(x, *arguments, **named)
            return found
        tokens = torch.cat((x, self.normed(x).expand(len(x), -1, -1)), 1)
        out: Tensor = self.attention(tokens, *arguments, **named)
        return out[:, : x.shape[1]]


class PromptedWindowAttention(PromptedAttention):
    """The same for the windows of timm's Swin, whose position bias is 0 for prompts.

    Shape:
        tokens ``[windows x B, N, C]`` and mask ``[windows, N, N]``, as the layer.
    """

    def forward(self, x: Tensor, *arguments: Tensor | None, **named: Tensor | None) -> Tensor:
        if not self.active:
            return super().forward(x, *arguments, **named)
        (mask,) = (*arguments, *named.values()) or (None,)
        layer, tokens = self.attention, x.shape[1]

        def split(y: Tensor) -> tuple[Tensor, ...]:
            return y.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

        q, k, v = split(layer.qkv(x))
        # Not by calling the layer: what counts its operations refuses views of parameters.
        mapped = F.linear(self.normed(x), layer.qkv.weight, layer.qkv.bias)
        _, more_k, more_v = split(mapped.unsqueeze(0))
        k, v = (torch.cat((own, more.expand(len(x), -1, -1, -1)), 2) for own, more in ((k, more_k), (v, more_v)))
        bias = layer._get_rel_pos_bias()
        if mask is not None:
            shifted = bias + mask.unsqueeze(1)
            bias = shifted.repeat(len(x) // len(mask), 1, 1, 1)
        bias = F.pad(bias, (0, len(self.prompts)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=layer.scale)
        projected: Tensor = layer.proj(out.transpose(1, 2).reshape(len(x), tokens, -1))
        return projected


class PromptedTeacher(FrozenTeacher):
    """A frozen teacher whose prompts learn: its features carry gradient in training steps.

    Args:
        recognizer: one that `Prompts.into` was applied to.
        autocast, features: as in `FrozenTeacher`.
    """

    learns = True

    def __init__(self, recognizer: Recognizer, autocast: torch.dtype | None = None, features: tuple[str, ...] = ()):
        super().__init__(recognizer, autocast, features)
        assert isinstance(recognizer.backbone, PromptedBackbone)
        for layer in recognizer.backbone.layers:
            layer.prompts.requires_grad_(True)

    def forward(self, images: Tensor, batch: Batch) -> Output:
        return self.look(images)  # where `see`, which all others use, is without gradient
