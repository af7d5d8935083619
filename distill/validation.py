"""How well the student follows its teacher on generated faces that it is not trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objective import Objective
from distill.settings import Validation
from distill.teachers import FrozenTeacher
from faceless.recognizer import Output, Recognizer

BATCH = 128


def neighborhood_agreement(student: Tensor, teacher: Tensor, k: int) -> float:
    """Mean share of common members among the k nearest neighbors in the two spaces.

    Args:
        student, teacher: unit embeddings ``[N, D]`` of the same faces; D may differ.
        k: neighbors, fewer than N.

    >>> points = F.normalize(torch.randn(50, 8))
    >>> neighborhood_agreement(points, points @ torch.linalg.qr(torch.randn(8, 8))[0], 5) > 0.99
    True
    """
    k = min(k, len(student) - 1)
    if k < 1:
        return 1.0
    nearest = []
    for rows in (student, teacher):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(-torch.inf)
        member = torch.zeros_like(cosines, dtype=torch.bool)
        nearest.append(member.scatter_(1, cosines.topk(k).indices, True))
    return float((nearest[0] & nearest[1]).sum(1).float().mean() / k)


class Validator:
    """Compares any student with the teacher on faces whose teacher embeddings are computed once, unless it learns.

    Args:
        settings: how many neighbors count.
        faces: held-out faces ``[N, 3, H, W]``.
        teacher: asked once, here; one that learns, each time.
        objective: knows how the two networks' embeddings compare.
        device: where to compute.
    """

    def __init__(
        self, settings: Validation, faces: Tensor, teacher: FrozenTeacher, objective: Objective, device: torch.device
    ):
        self.neighbors, self.faces, self.objective, self.device = settings.neighbors, faces, objective, device
        self.learning = teacher if teacher.learns else None
        self.teacher = self.ask(teacher) if len(faces) and not teacher.learns else torch.empty(0, 1)

    def ask(self, teacher: FrozenTeacher) -> Tensor:
        """Raw embeddings ``[N, D]`` of the teacher."""
        return torch.cat([teacher.see(chunk.to(self.device)).embedding for chunk in self.faces.split(BATCH)])

    def __call__(self, student: Recognizer) -> dict[str, float]:
        """``cosine``: mean student-teacher cosine; ``neighborhood``: agreement of the nearest neighbors."""
        if self.learning is not None:
            self.teacher = self.ask(self.learning)
        embedding = student.embed(self.faces, unit=False).to(self.device)
        s, t = self.objective.comparable(Output(embedding), Output(self.teacher))
        unit_s, unit_t = F.normalize(s.embedding.float()), F.normalize(t.embedding.float())
        return {
            "cosine": float((unit_s * unit_t).sum(1).mean()),
            "neighborhood": neighborhood_agreement(unit_s, unit_t, self.neighbors),
        }
