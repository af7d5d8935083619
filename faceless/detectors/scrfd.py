"""SCRFD and RetinaFace as InsightFace exports them to ONNX, with five landmarks; weights are the user's own.

Guo, Deng, Lattas, Zafeiriou: Sample and computation redistribution for efficient face detection, ICLR 2022. Layout of
the outputs: deepinsight/insightface, ``python-package/insightface/model_zoo/scrfd.py``: for each stride the scores
``[K, 1]``, then for each the distances ``[K, 4]`` of a box's edges from its anchor, then those ``[K, 10]`` of the
landmarks, in units of the stride; anchors lie at multiples of the stride, row by row, all of one place together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from faceless.align import Landmarks
from faceless.detectors.base import Detector, Faces, checked, checked_choice, chosen
from faceless.errors import InputError
from faceless.files import sha256

#: Outputs of networks with landmarks: strides, and anchors of one place.
LAYOUTS = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}
WITHOUT_LANDMARKS = (6, 10)
MAX_BYTES = 1 << 30
MAX_SIZE = 4096


class SCRFD(Detector):
    """Faces at any angle and size; needs onnxruntime (``faceless-distill[onnx]``).

    Args:
        weights: an ``.onnx`` file, or ``hf-hub:owner/name/path/to/file.onnx``.
        size: side in pixels of the square into which a photograph is fitted, a multiple of the largest stride; of a
            network with a fixed input, that.
        threshold: lowest score.
        overlap: of two boxes that overlap more (intersection over union), the better one is kept.
        choose: which of several faces counts, ``"largest"`` or ``"best"``.

    Raises:
        InputError: no such file, no such network, or a value that makes no sense.
    """

    scheme = "arcface5"

    def __init__(
        self,
        weights: str,
        *,
        size: int = 640,
        threshold: float = 0.5,
        overlap: float = 0.4,
        choose: str = "largest",
    ):
        if not 0 < threshold < 1 or not 0 < overlap < 1:
            raise InputError(f"threshold is {threshold} and overlap {overlap}; both lie between 0 and 1")
        if not 32 <= size <= MAX_SIZE:
            raise InputError(f"size is {size}; use 32 to {MAX_SIZE} pixels")
        self.weights, self.size, self.threshold, self.overlap = weights, size, threshold, overlap
        self.choose = checked_choice(choose)
        if not weights.startswith("hf-hub:") and not Path(weights).is_file():
            raise InputError(f"{weights}: no such file; give an .onnx of SCRFD or RetinaFace with landmarks")

    def __getstate__(self) -> dict[str, Any]:
        # Sessions stay in their process; each worker opens its own.
        return {key: value for key, value in vars(self).items() if key not in ("session", "layout")}

    def _file(self) -> Path:
        return _from_hub(self.weights) if self.weights.startswith("hf-hub:") else Path(self.weights)

    @cached_property
    def session(self) -> Any:
        """Of onnxruntime, on the CPU."""
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError("SCRFD needs onnxruntime: pip install 'faceless-distill[onnx]'") from error
        path = self._file()
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; detectors have {MAX_BYTES >> 30} GiB at most")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a type for each of its reasons
            raise InputError(f"{path}: onnxruntime cannot read it ({str(error)[:160]})") from error

    @cached_property
    def layout(self) -> tuple[tuple[int, ...], int, int]:
        """Strides, anchors of one place, and the side of what the network sees."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(outputs) in WITHOUT_LANDMARKS:
            raise InputError(f"{self.weights}: finds boxes without landmarks; use a network with key points (_kps)")
        if len(outputs) not in LAYOUTS or len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise InputError(
                f"{self.weights}: {len(inputs)} inputs and {len(outputs)} outputs are no SCRFD or RetinaFace"
            )
        strides, anchors = LAYOUTS[len(outputs)]
        height, width = inputs[0].shape[2:]
        side = height if isinstance(height, int) and height == width else self.size
        if (isinstance(height, int) and height != width) or side % strides[-1] or not 0 < side <= MAX_SIZE:
            raise InputError(
                f"{self.weights}: sees {width} x {height} pixels, size is {self.size}; it has to be a square with a "
                f"multiple of {strides[-1]} pixels a side"
            )
        return strides, anchors, side

    def find(self, images: Tensor) -> Landmarks:
        return chosen(self.faces(images), self.scheme, self.choose)

    def provenance(self) -> dict[str, Any]:
        return {"detected_by": "SCRFD", "weights_sha256": sha256(self._file())}

    def faces(self, images: Tensor) -> list[Faces]:
        """All faces in each of ``images [N, 3, H, W]`` uint8 RGB of one size."""
        strides, anchors, side = self.layout
        height, width = checked(images).shape[-2:]
        # The shorter side is rounded down, and one factor serves both, as in InsightFace.
        ratio = height / width
        new = (side, max(1, int(side / ratio))) if ratio > 1 else (max(1, int(side * ratio)), side)
        factor = new[0] / height
        small = images
        if new != (height, width):
            images = images.contiguous(memory_format=torch.channels_last)
            small = F.interpolate(images, new, mode="bilinear", antialias=new[0] < height)
        fitted = (F.pad(small, (0, side - new[1], 0, side - new[0])).float() - 127.5) / 128
        name = self.session.get_inputs()[0].name
        found = []
        for image in fitted.contiguous().numpy():
            outputs = self.session.run(None, {name: image[None]})
            boxes, points, scores = self._decoded(outputs, strides, anchors, side)
            boxes, points = boxes / factor, points / factor
            # InsightFace counts the last pixel of a box as part of it, in pixels of the photograph.
            kept = nms(boxes + boxes.new_tensor([0, 0, 1, 1]), scores, self.overlap)
            found.append(Faces(boxes[kept], points[kept], scores[kept]))
        return found

    def _decoded(
        self, outputs: Sequence[np.ndarray], strides: Sequence[int], anchors: int, side: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return decode(outputs, strides, anchors, side, self.threshold)
        except ValueError as error:
            raise InputError(f"{self.weights}: {error}") from error


def decode(
    outputs: Sequence[np.ndarray], strides: Sequence[int], anchors: int, side: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``[K, 4]``, landmarks ``[K, 5, 2]`` and scores ``[K]`` at or above the threshold, in pixels of the square.

    Args:
        outputs: of the network, for one image; a leading dimension of 1 is dropped.
        strides: of the feature maps.
        anchors: of each place.
        side: of the square.

    Raises:
        ValueError: outputs of other shapes, or that are not finite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    levels = len(strides)
    for level, stride in enumerate(strides):
        row = side // stride
        count = anchors * row * row
        score, edges, marks = (
            _rows(outputs[level + levels * kind], count, width) for kind, width in enumerate((1, 4, 10))
        )
        chosen_rows = (score[:, 0] >= threshold).nonzero().squeeze(1)
        place = chosen_rows // anchors
        anchor = torch.stack([place % row, place // row], 1) * float(stride)
        edges, marks = edges[chosen_rows] * stride, marks[chosen_rows] * stride
        box = torch.cat([anchor - edges[:, :2], anchor + edges[:, 2:]], 1)
        parts.append((box, anchor[:, None] + marks.view(-1, 5, 2), score[chosen_rows, 0]))
    boxes, points, scores = (torch.cat(part) for part in zip(*parts))
    return boxes, points, scores


def _rows(output: np.ndarray, count: int, width: int) -> Tensor:
    values = np.asarray(output)
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.shape != (count, width) or values.dtype != np.float32:
        raise ValueError(f"an output is {values.dtype} {list(values.shape)} in the place of [{count}, {width}]")
    if not np.isfinite(values).all():
        raise ValueError("an output is NaN or infinite")
    return torch.from_numpy(values.copy())


def _from_hub(source: str) -> Path:
    import huggingface_hub

    owner, _, rest = source.removeprefix("hf-hub:").partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file.endswith(".onnx")):
        raise InputError(f"{source}: write hf-hub:owner/name/path/to/file.onnx")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:  # of the network, of the hub, and of wrong names
        raise InputError(f"{source}: not to be had from the hub ({type(error).__name__})") from error
