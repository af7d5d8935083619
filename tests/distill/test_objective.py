"""The weighted sum, the centering and the projection of the objective, and the checks before a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import faceless
from distill.losses.base import Loss
from distill.losses.contrastive import QUD
from distill.losses.embedding import CosineEmbedding, FeatureL2
from distill.losses.features import Hint
from distill.losses.logits import LogitKD
from distill.objective import Objective
from faceless.errors import InputError
from faceless.recognizer import Output


def outputs(student_dim: int = 8, teacher_dim: int = 8) -> tuple[Output, Output]:
    torch.manual_seed(0)
    return Output(torch.randn(5, student_dim)), Output(torch.randn(5, teacher_dim) + 3)


def test_weighted_sum() -> None:
    student, teacher = outputs()
    objective = Objective(
        {"a": CosineEmbedding(), "b": FeatureL2()}, {"a": 2.0, "b": 0.25}, student_dim=8, teacher_dim=8
    )
    loss, terms = objective(student, teacher)
    s, t = student.embedding.double().numpy(), teacher.embedding.double().numpy()
    cosine = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t)])
    squares = np.mean((s - t) ** 2)
    assert float(terms["a"]) == pytest.approx(cosine, rel=1e-5)
    assert float(terms["b"]) == pytest.approx(squares, rel=1e-5)
    assert float(loss) == pytest.approx(2 * cosine + 0.25 * squares, rel=1e-5)


def test_centering_moves_the_teacher_only_and_comparable_agrees_with_the_loss() -> None:
    student, teacher = outputs()
    objective = Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=8, teacher_dim=8, center=True)
    mean = teacher.embedding.mean(0)
    objective.centering.prime(mean)
    loss, _ = objective(student, teacher)
    expected = 1 - F.cosine_similarity(student.embedding, teacher.embedding - mean).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    s, t = objective.comparable(student, teacher)
    assert torch.equal(s.embedding, student.embedding)
    torch.testing.assert_close(t.embedding, teacher.embedding - mean)


def test_another_dimension_is_projected_or_refused() -> None:
    student, teacher = outputs(student_dim=4)
    objective = Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=4, teacher_dim=8)
    objective(student, teacher)[0].backward()
    assert objective.projection is not None
    assert objective.projection.weight.grad is not None
    with pytest.raises(InputError, match="have 4 numbers and the teacher's 8"):
        Objective({"a": CosineEmbedding()}, {"a": 1.0}, student_dim=4, teacher_dim=8, projection="none")


def networks() -> tuple[faceless.Recognizer, faceless.Recognizer]:
    student = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1))
    teacher = faceless.create("slimresnet", embedding_dim=8, input_size=48, widths=(8, 24), depths=(1, 1))
    return student, teacher


def test_probing_builds_adapters_and_features_reach_the_loss() -> None:
    student, teacher = networks()
    hint = Hint(student_layer="stages.1", teacher_layer="stages.1")
    objective = Objective({"hint": hint}, {"hint": 1.0}, student_dim=8, teacher_dim=8)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    objective.probe(student, teacher)
    assert hint.adapter is not None and hint.adapter.weight.shape == (24, 16, 1, 1)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    faces = torch.rand(3, 3, 40, 40) * 255
    out = student(faces, features=objective.student_features)
    with torch.no_grad():
        seen = teacher(faces, features=objective.teacher_features)
    objective(out, seen)[0].backward()
    assert hint.adapter.weight.grad is not None
    assert student.backbone.stages[1][0].conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda: Hint(student_layer="stages.7", teacher_layer="stages.1"), "student has no layer 'stages.7'"),
        (lambda: LogitKD(), "losses.x: LogitKD needs logits"),
        (lambda: QUD(embedding_dim=9), "losses.x"),
    ],
)
def test_what_a_loss_cannot_get_is_said_before_the_run(loss: Callable[[], Loss], named: str) -> None:
    objective = Objective({"x": loss()}, {"x": 1.0}, student_dim=8, teacher_dim=8)
    with pytest.raises(InputError, match=named):
        objective.probe(*networks())
