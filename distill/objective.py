"""What a student is trained for: a weighted sum of losses against one teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from distill.losses.base import Loss
from distill.losses.embedding import Centering
from faceless.errors import InputError, suggest
from faceless.recognizer import Output, Recognizer


class Objective(nn.Module):
    """Weighted sum of losses, with the teacher centered and a student of another D projected.

    Args:
        losses: by name.
        weights: by the same names.
        student_dim, teacher_dim: D of the two networks.
        center: subtract the teacher's mean embedding (see `Centering`).
        projection: ``"linear"`` maps a student of another D to the teacher's D with a bias-free matrix that is trained
            along and dropped afterwards; ``"none"`` refuses.

    Raises:
        InputError: the dimensions differ and may not be projected, or a weight is missing.

    >>> from distill.losses.embedding import CosineEmbedding
    >>> objective = Objective({"cosine": CosineEmbedding()}, {"cosine": 2.0}, student_dim=4, teacher_dim=4)
    >>> loss, terms = objective(Output(torch.ones(1, 4)), Output(-torch.ones(1, 4)))
    >>> float(loss), float(terms["cosine"])
    (4.0, 2.0)
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        weights: Mapping[str, float],
        *,
        student_dim: int,
        teacher_dim: int,
        center: bool = False,
        projection: str = "linear",
    ):
        super().__init__()
        if set(losses) != set(weights):
            raise InputError(f"losses {sorted(losses)} and weights {sorted(weights)} do not have the same names")
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.centering = Centering(teacher_dim) if center else None
        self.projection: nn.Linear | None = None
        if student_dim != teacher_dim:
            if projection == "none":
                raise InputError(
                    f"the student's embeddings have {student_dim} numbers and the teacher's {teacher_dim}: set "
                    f"student.embedding_dim to {teacher_dim}, or projection to linear"
                )
            self.projection = nn.Linear(student_dim, teacher_dim, bias=False)

    def terms(self) -> list[tuple[str, Loss]]:
        """The losses with their names."""
        return [(name, cast(Loss, loss)) for name, loss in self.losses.items()]

    @property
    def needs_labels(self) -> list[str]:
        """Names of the losses that need labels."""
        return [name for name, loss in self.terms() if loss.needs_labels]

    @property
    def student_features(self) -> tuple[str, ...]:
        """Sub-modules of the student's backbone whose outputs the losses want."""
        return tuple(dict.fromkeys(name for _, loss in self.terms() for name in loss.student_features))

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The same of the teacher's."""
        return tuple(dict.fromkeys(name for _, loss in self.terms() for name in loss.teacher_features))

    @torch.no_grad()
    def probe(self, student: Recognizer, teacher: Recognizer) -> None:
        """Show the losses what both networks say of two blank faces: adapters are built, and misfits show here.

        Raises:
            InputError: a network lacks a feature or logits that a loss wants, or a loss refuses their shapes.
        """
        faces = torch.full((2, 3, 112, 112), 127.0)
        outputs = []
        for who, network, names in (
            ("student", student, self.student_features),
            ("teacher", teacher, self.teacher_features),
        ):
            training = network.training
            network.eval()
            try:
                outputs.append(network(faces, features=names))
            except AttributeError as error:
                layers = [name for name, _ in network.backbone.named_modules() if name]
                missing = next((name for name in names if name not in layers), str(error))
                raise InputError(f"the {who} has no layer {missing!r}; {suggest(missing, layers)}") from error
            network.train(training)
        self.eval()
        for name, loss in self.terms():
            try:
                loss.prepare(*outputs)
                s, t = self.comparable(*outputs)
                loss(s, t, torch.zeros(2, dtype=torch.long) if loss.needs_labels else None)
            except ValueError as error:
                raise InputError(f"losses.{name}: {error}") from error
        self.train()

    @torch.no_grad()
    def comparable(self, student: Output, teacher: Output) -> tuple[Output, Output]:
        """The two outputs as the losses compare them, projected and centered, without learning from them."""
        if self.projection is not None:
            student = replace(student, embedding=self.projection(student.embedding))
        if self.centering is not None:
            teacher = replace(teacher, embedding=teacher.embedding - self.centering.mean)
        return student, teacher

    def forward(
        self, student: Output, teacher: Output, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and each loss before weighting, detached."""
        if self.projection is not None:
            student = replace(student, embedding=self.projection(student.embedding))
        if self.centering is not None:
            teacher = self.centering(teacher)
        terms = {name: loss(student, teacher, labels) for name, loss in self.terms()}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}
