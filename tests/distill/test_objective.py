"""The weighted sum, the centering and the projection of the objective, and the checks before a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.losses.embedding import CosineEmbedding, FeatureL2
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
