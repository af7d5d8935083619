"""Where a network looks, when the two networks see faces of different resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import Loss, mean, one_of
from distill.losses.features import as_map, smaller
from faceless.recognizer import Output


class AttentionSimilarity(Loss):
    """Look where a teacher of high resolution looks: 1 - cosine of attention maps, summed over all maps.

    Features that are attention maps already (``[B, C, 1, 1]`` over channels or ``[B, 1, H, W]`` over places, such as
    the outputs of CBAM modules before their sigmoid) are compared as they are, which is the published loss. Other
    features have two maps each: over channels their mean over places, over places their mean square over channels; that
    is our reading for networks without attention modules. No labels.
    Shin et al.: Teaching Where to Look: Attention Similarity Knowledge Distillation for Low Resolution Face
    Recognition, ECCV 2022, equation 6; there with weight 5 beside ArcFace of scale 32.

    Args:
        student_layers, teacher_layers: names of the sub-modules that give the features, stage by stage: maps
            ``[B, C, H, W]``, tokens ``[B, N, C]`` or vectors ``[B, C]``.
        maps: ``"both"``, ``"channel"`` (student and teacher have the same channels) or ``"spatial"`` (the larger map is
            average-pooled).

    Shape:
        features as above; returns a scalar, from 0 to 2 for each map.

    Raises:
        ValueError: no stages, not as many student as teacher layers, a feature is missing, or channels differ.

    >>> loss = AttentionSimilarity(student_layers=["a"], teacher_layers=["b"])
    >>> student = Output(Tensor(2, 4), features={"a": Tensor(2, 8, 7, 7).fill_(1.0)})
    >>> teacher = Output(Tensor(2, 4), features={"b": Tensor(2, 8, 14, 14).fill_(3.0)})
    >>> loss(student, teacher).round(decimals=5).abs()
    tensor(0.)
    """

    needs_features = True

    def __init__(self, *, student_layers: Sequence[str], teacher_layers: Sequence[str], maps: str = "both"):
        super().__init__()
        if len(student_layers) != len(teacher_layers) or not student_layers:
            raise ValueError(f"{len(student_layers)} student_layers and {len(teacher_layers)} teacher_layers: no pairs")
        self.student_features, self.teacher_features = tuple(student_layers), tuple(teacher_layers)
        self.maps = one_of(("both", "channel", "spatial"), maps=maps)

    def compute(self, student: Output, teacher: Output, labels: Tensor | None) -> Tensor:
        total = student.embedding.sum() * 0
        for mine, theirs in zip(self.student_features, self.teacher_features):
            for who, output, name in (("student", student, mine), ("teacher", teacher, theirs)):
                if name not in output.features:
                    raise ValueError(f"the {who} gives no feature {name!r}")
            Fs = as_map(student.features[mine].to(student.embedding.dtype))
            Ft = as_map(teacher.features[theirs].to(student.embedding.dtype)).detach()
            for a_s, a_t in self._attention(Fs, Ft.clone() if Ft.is_inference() else Ft):
                total = total + mean(1 - F.cosine_similarity(a_s, a_t))
        return total

    def _attention(self, Fs: Tensor, Ft: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = smaller(Fs, Ft)
        over_places = Fs.shape[1] == Ft.shape[1] == 1
        over_channels = size == (1, 1)
        found = []
        if self.maps != "spatial" and not over_places:
            if Fs.shape[1] != Ft.shape[1]:
                raise ValueError(f"{Fs.shape[1]} and {Ft.shape[1]} channels: take other layers, or maps 'spatial'")
            found.append((Fs.mean((2, 3)), Ft.mean((2, 3))))
        if self.maps != "channel" and not over_channels:
            places = [F.adaptive_avg_pool2d(x, size) for x in (Fs, Ft)]
            a_s, a_t = (x.flatten(1) if over_places else x.square().mean(1).flatten(1) for x in places)
            found.append((a_s, a_t))
        if not found:
            raise ValueError(f"features {list(Fs.shape)} and {list(Ft.shape)} have no {self.maps} maps")
        return found
