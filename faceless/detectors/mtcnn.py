"""MTCNN: three small networks, each of which refines what the one before let pass.

Zhang, Zhang, Li, Qiao: Joint face detection and alignment using multi-task cascaded convolutional networks, IEEE SPL
23(10), 2016. Weights, thresholds and pixel conventions are those of timesler/facenet-pytorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from faceless import assets
from faceless.align import Landmarks
from faceless.detectors.base import Detector, Faces, checked, checked_choice, chosen, shrunk
from faceless.errors import InputError

#: Side of what the first network sees of a face, in pixels; it moves in steps of two.
CELL, STRIDE = 12, 2
#: Crops that go through a network at a time.
CROPS = 512


class Stage(nn.Module):
    """Convolutions with PReLU and pooling, perhaps a dense layer, and heads.

    Args:
        convolutions: of each its channels, kernel, and the kernel of the pooling behind it (0 for none).
        dense: inputs and outputs of the dense layer; None for a network that slides over an image.
        heads: outputs of each head; the first tells face from background.
    """

    def __init__(self, convolutions: Sequence[tuple[int, int, int]], dense: tuple[int, int] | None, heads: list[int]):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = 3
        for number, (channels, kernel, pool) in enumerate(convolutions, 1):
            layers[f"conv{number}"] = nn.Conv2d(inputs, channels, kernel)
            layers[f"prelu{number}"] = nn.PReLU(channels)
            if pool:
                layers[f"pool{number}"] = nn.MaxPool2d(pool, 2, ceil_mode=True)
            inputs = channels
        number = len(convolutions) + 1
        if dense:
            # The weights were made for images in the order of columns, rows, channels.
            layers["columns"] = _Columns()
            layers[f"dense{number}"] = nn.Linear(*dense)
            layers[f"prelu{number}"] = nn.PReLU(dense[1])
            inputs, number = dense[1], number + 1
        self.body = nn.Sequential(layers)
        self.heads = nn.ModuleDict(
            {f"dense{number}_{n}": nn.Linear(inputs, outputs) for n, outputs in enumerate(heads, 1)}
            if dense
            else {f"conv{number}_{n}": nn.Conv2d(inputs, outputs, 1) for n, outputs in enumerate(heads, 1)}
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Probability of a face, and the outputs of the other heads."""
        features = self.body((images - 127.5) / 128)
        logits, *others = (head(features) for head in self.heads.values())
        return (logits.softmax(1)[:, 1], *others)


class _Columns(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 3, 2, 1).flatten(1)


def _load(stage: Stage, asset: str) -> Stage:
    state = torch.load(assets.fetch(asset), map_location="cpu", weights_only=True)
    heads = tuple(f"{name}." for name in stage.heads)
    stage.load_state_dict(
        {f"{'heads' if name.startswith(heads) else 'body'}.{name}": value for name, value in state.items()}
    )
    return stage.eval().requires_grad_(False)


class MTCNN(Detector):
    """Faces at any angle up to profile, down to ``min_face`` pixels. Weights are fetched on first use.

    Args:
        min_face: side of the smallest face in pixels.
        thresholds: of the three networks' probabilities.
        factor: between the sizes in which a photograph is searched.
        detect_size: the longer side of larger photographs is shrunk to so many pixels before faces are searched.
        choose: which of several faces counts, ``"largest"`` or ``"best"``.

    Raises:
        InputError: a value that makes no sense.
    """

    scheme = "arcface5"

    def __init__(
        self,
        *,
        min_face: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
        detect_size: int = 640,
        choose: str = "largest",
    ):
        if min_face < CELL or detect_size < CELL:
            raise InputError(f"min_face is {min_face} and detect_size {detect_size}; both are {CELL} pixels at least")
        if not 0.1 <= factor <= 0.95 or not all(0 < t < 1 for t in thresholds):
            raise InputError(f"factor is {factor} (0.1 to 0.95), thresholds are {thresholds} (between 0 and 1)")
        self.min_face, self.thresholds, self.factor = min_face, tuple(thresholds), factor
        self.detect_size, self.choose = detect_size, checked_choice(choose)
        self._stages: tuple[Stage, Stage, Stage] | None = None

    def _networks(self) -> tuple[Stage, Stage, Stage]:
        if self._stages is None:
            self._stages = (
                _load(Stage([(10, 3, 2), (16, 3, 0), (32, 3, 0)], None, [2, 4]), "mtcnn-pnet"),
                _load(Stage([(28, 3, 3), (48, 3, 3), (64, 2, 0)], (576, 128), [2, 4]), "mtcnn-rnet"),
                _load(Stage([(32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)], (1152, 256), [2, 4, 10]), "mtcnn-onet"),
            )
        return self._stages

    def find(self, images: Tensor) -> Landmarks:
        small, factors = shrunk(checked(images), self.detect_size)
        found = self.faces(small)
        scaled = [Faces(faces.boxes / factors.repeat(2), faces.points / factors, faces.scores) for faces in found]
        return chosen(scaled, self.scheme, self.choose)

    def provenance(self) -> dict[str, Any]:
        return {"detected_by": "MTCNN", "assets": [assets.ASSETS[f"mtcnn-{n}net"].record() for n in "pro"]}

    @torch.inference_mode()
    def faces(self, images: Tensor) -> list[Faces]:
        """All faces in each of ``images [N, 3, H, W]`` uint8 RGB of one size."""
        first, second, third = self._networks()
        pixels = checked(images).float()
        boxes, whose = self._proposals(first, pixels)
        table = integral(pixels)

        boxes, whose, crops = _crops(table, boxes, whose, 24)
        score, move = _run(second, crops)
        passed = score > self.thresholds[1]
        boxes, whose, score, move = boxes[passed], whose[passed], score[passed], move[passed]
        kept = batched_nms(boxes, score, whose, 0.7)
        boxes, whose = square(moved(boxes[kept], move[kept], 1)), whose[kept]

        boxes, whose, crops = _crops(table, boxes, whose, 48)
        score, move, marks = _run(third, crops)
        passed = score > self.thresholds[2]
        boxes, whose, score, move, marks = (t[passed] for t in (boxes, whose, score, move, marks))
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        # All x come before all y.
        points = marks.view(-1, 2, 5).transpose(1, 2) * sides[:, None] + boxes[:, None, :2] - 1
        boxes = moved(boxes, move, 1)
        found = []
        for number in range(len(images)):
            mine = (whose == number).nonzero().squeeze(1)
            mine = mine[score[mine].argsort(descending=True, stable=True)]
            mine = mine[not_inside(boxes[mine], 0.7)]
            found.append(Faces(boxes[mine].clone(), points[mine].clone(), score[mine].clone()))
        return found

    def _proposals(self, network: Stage, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Square boxes ``[K, 4]``, with pixels counted from 1, that may hold faces, and whose ``[K]``."""
        height, width = pixels.shape[-2:]
        scale = CELL / self.min_face
        found = []
        while min(height, width) * scale >= CELL:
            small = F.interpolate(pixels, (int(height * scale + 1), int(width * scale + 1)), mode="area")
            score, move = network(small)
            whose, row, column = (score >= self.thresholds[0]).nonzero().unbind(1)
            corner = torch.stack([column, row], 1) * STRIDE
            box = torch.cat([((corner + 1) / scale).floor(), ((corner + CELL) / scale).floor()], 1)
            value = score[whose, row, column]
            kept = batched_nms(box, value, whose, 0.5)
            found.append([t[kept] for t in (box, value, whose, move[whose, :, row, column])])
            scale *= self.factor
        if not found:
            return pixels.new_zeros(0, 4), torch.zeros(0, dtype=torch.long)
        box, value, whose, move = (torch.cat(parts) for parts in zip(*found))
        kept = batched_nms(box, value, whose, 0.7)
        return square(moved(box[kept], move[kept], 0)), whose[kept]


def moved(boxes: Tensor, move: Tensor, extra: int) -> Tensor:
    """Boxes whose four edges are moved by shares ``[K, 4]`` of their sides, which are ``extra`` pixels longer."""
    return boxes + move * (boxes[:, 2:] - boxes[:, :2] + extra).repeat(1, 2)


def square(boxes: Tensor) -> Tensor:
    """Squares of the longer side about the same centers."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.amax(1, keepdim=True)
    corner = boxes[:, :2] + sides * 0.5 - longer * 0.5
    return torch.cat([corner, corner + longer], 1)


def not_inside(boxes: Tensor, overlap: float) -> list[int]:
    """Which boxes, from the first on, do not share more than ``overlap`` of the smaller one with one kept before."""
    kept: list[int] = []
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    area = sides.prod(1)
    for i, box in enumerate(boxes):
        common = torch.minimum(boxes[kept, 2:], box[2:]) - torch.maximum(boxes[kept, :2], box[:2]) + 1
        share = common.clamp_min(0).prod(1) / torch.minimum(area[kept], area[i])
        if not (share > overlap).any():
            kept.append(i)
    return kept


def integral(pixels: Tensor) -> Tensor:
    """``[N, 3, H + 1, W + 1]`` float64 sums of all that is above and to the left; exact for whole numbers."""
    return F.pad(pixels.double().cumsum(2).cumsum(3), (1, 0, 1, 0))


def area_crops(table: Tensor, which: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Parts of images resized by averaging, all at once (what ``interpolate(mode="area")`` does one by one).

    Args:
        table: of `integral`.
        which: ``[K]`` images.
        boxes: ``[K, 4]`` int64 left, top, right, bottom; the last two are behind the part.
        size: pixels of each side.

    Returns:
        ``[K, 3, size, size]`` float32.
    """
    step = torch.arange(size + 1)
    length = boxes[:, 2:] - boxes[:, :2]

    def edges(axis: int) -> tuple[Tensor, Tensor]:
        low = boxes[:, axis, None] + step[:-1] * length[:, axis, None] // size
        high = boxes[:, axis, None] - (-step[1:] * length[:, axis, None] // size)
        return low, high

    (left, right), (top, bottom) = edges(0), edges(1)
    image = which[:, None, None]

    def sums(rows: Tensor, columns: Tensor) -> Tensor:
        return table[image, :, rows[:, :, None], columns[:, None, :]]

    total = sums(bottom, right) - sums(top, right) - sums(bottom, left) + sums(top, left)
    area = ((bottom - top)[:, :, None] * (right - left)[:, None, :]).unsqueeze(3)
    return (total / area).permute(0, 3, 1, 2).float()


def _crops(table: Tensor, boxes: Tensor, whose: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of which something lies inside of the image, whose they are, and what they show."""
    height, width = table.shape[2] - 1, table.shape[3] - 1
    edges = boxes.trunc().long()
    corner = edges[:, :2].clamp_min(1) - 1
    end = torch.minimum(edges[:, 2:], torch.tensor([width, height]))
    some = (end > corner).all(1)
    parts = torch.cat([corner, end], 1)[some]
    crops = [area_crops(table, image, part, size) for image, part in zip(whose[some].split(CROPS), parts.split(CROPS))]
    return boxes[some], whose[some], torch.cat(crops) if crops else torch.zeros(0, 3, size, size)


def _run(network: Stage, crops: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*(network(part) for part in crops.split(CROPS))))
