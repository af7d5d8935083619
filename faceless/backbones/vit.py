"""ViTs of InsightFace and CVLface: no class token, ReLU6, and an embedding of all tokens at once.

The layout, not timm's, is InsightFace's; CVLface took it over with patches of 8 pixels, and added positions relative to
a face's landmarks (KP-RPE).

Sources: Dosovitskiy et al.: ViT, ICLR 2021; deepinsight/insightface, ``recognition/arcface_torch/backbones/vit.py``;
Kim, Su, Liu, Jain, Liu: KeyPoint Relative Position Encoding for Face Recognition, CVPR 2024, and mk-minchul/CVLface,
``models/vit`` and ``models/vit_kprpe``; Wu et al.: Rethinking and Improving Relative Position Encoding, ICCV 2021 (the
buckets, eq. 18).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Patch, width, depth, heads, and the hidden channels of each block's MLP over the width.
VITS = {
    "vit-t": (9, 256, 12, 8, 4),
    "vit-s": (9, 512, 12, 8, 4),
    "vit-b": (9, 512, 24, 8, 4),
    "vit-l": (9, 768, 24, 8, 4),
    "vit-h": (9, 1024, 48, 8, 4),
    "cvlface-vit-small": (8, 512, 12, 8, 5),
    "cvlface-vit-base": (8, 512, 24, 16, 3),
}
# Distances up to ALPHA have a bucket each, farther ones share up to BETA on a logarithmic scale that ends at GAMMA.
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
BUCKETS = (2 * int(BETA) + 1) ** 2


def bucket(distance: Tensor) -> Tensor:
    """Distances in patches, whole numbers, to those of -3 to 3 whose positions they share.

    >>> bucket(torch.tensor([-9, -2, -1, 0, 1, 2, 3, 4, 13])).tolist()
    [-3, -2, -1, 0, 1, 2, 2, 3, 3]
    """
    far = distance.abs().clamp(min=1)
    share = ALPHA + (far / ALPHA).log() / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    coarse = distance.sign() * share.round().clamp(max=BETA).long()
    return torch.where(distance.abs() <= ALPHA, distance, coarse)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a layer normalization and added to what came in."""

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """ViT of InsightFace or CVLface, ``[B, 3, input_size, input_size]`` to ``[B, embedding_dim]``.

    Trained here, it sees all patches: the masks and the stochastic depth of InsightFace's training are left out.

    Args:
        name: one of `VITS`.
        mask_token: keep the token for patches left out, which InsightFace's checkpoints hold and no embedding depends
            on; it stays as it is.
        keypoints: positions relative to landmarks (KP-RPE).
        embedding_dim: D.
        input_size: pixels; what is beyond a multiple of the patch is not seen.

    Raises:
        ValueError: a picture smaller than a patch.

    With 512 dimensions at 112 pixels: 19,137,792, 76,023,296, 113,833,472, 255,684,352 and 756,393,984 parameters for
    vit-t, vit-s, vit-b, vit-l and vit-h; 95,952,384 and 114,869,760 for CVLface's.
    """

    positions: Tensor
    buckets: Tensor

    def __init__(
        self,
        name: str = "vit-t",
        mask_token: bool = False,
        keypoints: bool = False,
        *,
        embedding_dim: int = 512,
        input_size: int = 112,
    ):
        super().__init__()
        patch, width, depth, heads, ratio = VITS[name]
        side = input_size // patch
        if side < 1:
            raise ValueError(f"input_size is {input_size}; use {patch} or more")
        self.embedding_dim, self.heads = embedding_dim, heads
        self.patch_embed = PatchEmbed(patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * side * side, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width).normal_(std=0.02), requires_grad=False)
        self.keypoint_linear: nn.Linear | None = None
        if keypoints:
            # Starts as a network without positions relative to landmarks.
            self.keypoint_linear = nn.Linear(10, BUCKETS * heads * depth)
            nn.init.zeros_(self.keypoint_linear.weight)
            nn.init.zeros_(self.keypoint_linear.bias)
            row, column = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
            down, right = (bucket(axis[:, None] - axis[None, :]) + int(BETA) for axis in (row, column))
            self.register_buffer("buckets", down * (2 * int(BETA) + 1) + right, persistent=False)
            centers = torch.stack([column, row], -1).add(0.5).div(side)
            self.register_buffer("positions", centers[:, None, :], persistent=False)

    def biases(self, keypoints: Tensor | None) -> list[Tensor]:
        """What landmarks add to the attention of each block, ``[B, heads, N, N]`` of N patches.

        Args:
            keypoints: ``[B, 5, 2]``, x and y of eyes, nose and corners of the mouth in shares of the picture; None for
                those of ArcFace's template, where aligned faces have them.
        """
        assert self.keypoint_linear is not None
        if keypoints is None:
            from faceless.align import ARCFACE  # here, since few need landmarks, and kornia comes with them

            keypoints = torch.tensor(ARCFACE, device=self.positions.device)[None] / 112
        apart = (self.positions - keypoints[:, None].to(self.positions.dtype)).flatten(2)
        of_buckets = self.keypoint_linear(apart.to(self.keypoint_linear.weight.dtype))
        of_buckets = of_buckets.unflatten(-1, (len(self.blocks), self.heads, BUCKETS)).permute(2, 0, 3, 1, 4)
        index = self.buckets.expand(*of_buckets.shape[1:4], -1)
        return [one.gather(-1, index) for one in of_buckets]

    def forward(self, x: Tensor, keypoints: Tensor | None = None) -> Tensor:
        tokens = self.patch_embed(x) + self.pos_embed
        biases = self.biases(keypoints) if self.keypoint_linear is not None else [None] * len(self.blocks)
        for block, bias in zip(self.blocks, biases):
            tokens = block(tokens, bias)
        return self.feature(self.norm(tokens).flatten(1))
