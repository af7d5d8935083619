"""A recognizer: a network that maps a face to an embedding, together with how it wants its pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceless.errors import InputError

MAX_SIDE = 2048  # pixels; what a stranger's file may ask for


@dataclass(frozen=True)
class InputSpec:
    """How a backbone wants its pixels.

    Args:
        height, width: pixels.
        mean, std: per channel, in units of ``value_range`` and in the backbone's own channel order.
        channel_order: ``"RGB"`` or ``"BGR"``.
        value_range: what 255 becomes before ``mean`` and ``std`` apply: 255.0 or 1.0.
        framing: how the training faces were cropped, ``"arcface"`` or ``"dlib"`` (see `faceless.align`).
    """

    height: int = 112
    width: int = 112
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    channel_order: str = "RGB"
    value_range: float = 255.0
    framing: str = "arcface"

    def __post_init__(self) -> None:
        # YAML and JSON give lists; tuples keep the spec hashable and comparable.
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if self.channel_order not in ("RGB", "BGR"):
            raise ValueError(f"channel_order is {self.channel_order!r}; use 'RGB' or 'BGR'")
        if any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in (self.height, self.width)):
            raise ValueError(f"InputSpec needs whole pixels from 1 to {MAX_SIDE}, not {self.height} x {self.width}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("InputSpec needs three values each for mean and std")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.value_range)):
            raise ValueError("InputSpec needs finite mean, std and value_range")
        if self.value_range <= 0 or min(self.std) <= 0:
            raise ValueError("InputSpec needs positive std and value_range")

    def asdict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}


@dataclass
class Output:
    """What a recognizer says about a batch: ``embedding [B, D]`` (any norm), ``logits [B, C]``, ``features``."""

    embedding: Tensor
    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize ``[B, 3, H, W]`` float images bilinearly, low-pass filtered when shrinking; differentiable."""
    if images.shape[-2:] == (height, width):
        return images
    shrinking = images.shape[-2] > height or images.shape[-1] > width
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=shrinking)


def same_framing(found: object, wanted: str | None, where: str, network: str) -> None:
    """Compare how faces are cut with what a network knows.

    Args:
        found: the framing of the faces (see `faceless.align`); None where nobody says.
        wanted: that of the network.
        where: the corpus or source, for the message.
        network: its name, for the message.

    Raises:
        InputError: the faces are cut otherwise.
    """
    if found is not None and found != wanted:
        raise InputError(
            f"{where}: its faces are {str(found)[:40]} crops, and {network} knows {wanted} crops; "
            "use faces of that framing, or another network"
        )


class Recognizer(nn.Module):
    """A backbone plus its `InputSpec`: RGB faces in 0..255 in, un-normalised embeddings out.

    Args:
        backbone: maps normalised ``[B, 3, height, width]`` to ``[B, D]``, or to ``(embedding, logits)``.
        spec: how the backbone wants its pixels.
        name, options: what `faceless.create` needs to build the backbone again; saved with the weights.

    Shape:
        images ``[B, 3, H, W]``, uint8 or float in 0..255, RGB, any size; ``embedding`` is ``[B, D]``.

    >>> from faceless.backbones.slimresnet import SlimResNet
    >>> net = Recognizer(SlimResNet(embedding_dim=8), InputSpec(64, 64))
    >>> net(torch.zeros(2, 3, 50, 50, dtype=torch.uint8)).embedding.shape
    torch.Size([2, 8])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        spec: InputSpec,
        *,
        name: str = "",
        options: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.name = name
        self.options = dict(options or {})
        self.source = dict(source or {})
        scale = spec.value_range / 255.0
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.register_buffer("scale", (scale / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    @property
    def embedding_dim(self) -> int:
        dim: Any = self.backbone.embedding_dim
        return int(dim)

    def preprocess(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` RGB in 0..255 to what the backbone was trained on; differentiable."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"faces have shape [B, 3, H, W], these have {list(images.shape)}")
        # Reordered while they are bytes, where it is cheapest; resized in full precision whatever the weights have.
        images = images.contiguous(memory_format=torch.channels_last)
        pixels = resize(images if images.is_floating_point() else images.float(), self.spec.height, self.spec.width)
        if self.spec.channel_order == "BGR":
            pixels = pixels.flip(1)
        return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> Output:
        """Embed a batch; ``features`` names sub-modules of the backbone whose outputs are wanted too."""
        found: dict[str, Tensor] = {}
        hooks = []
        for wanted in features:
            module = self.backbone.get_submodule(wanted)
            # A copy: the next layer may be one that works in place.
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, key=wanted: found.__setitem__(key, out.clone()))
            )
        try:
            result = self.backbone(self.preprocess(images))
        finally:
            for hook in hooks:
                hook.remove()
        embedding, logits = result if isinstance(result, tuple) else (result, None)
        return Output(embedding, logits, found)

    def embed(self, images: Tensor, batch_size: int = 128, flip: bool = False, unit: bool = True) -> Tensor:
        """Unit-norm float32 embeddings ``[B, D]`` on the CPU of any number of faces, in eval mode.

        Args:
            flip: add the embedding of the mirrored face before normalising (InsightFace's evaluation).
            unit: normalise; without, norms stay, which some networks make a quality score of.
        """
        device, training = self.scale.device, self.training
        self.eval()
        rows = []
        try:
            with torch.inference_mode():
                for chunk in images.split(batch_size):
                    chunk = chunk.to(device, non_blocking=True)
                    row = self(chunk).embedding.float()
                    if flip:
                        row = row + self(chunk.flip(-1)).embedding.float()
                    rows.append((F.normalize(row) if unit else row).cpu())
        finally:
            if training:
                self.train()
        # Outside inference mode, so that losses may use the result.
        return torch.cat(rows)
