"""Hints and attention transfer against their formulas, and the adapters that shapes ask for."""

import math

import numpy as np
import pytest
import torch

from distill.losses.features import AttentionTransfer, Hint, as_map
from faceless.recognizer import Output


def pair(student: tuple[int, ...], teacher: tuple[int, ...], seed: int = 0) -> tuple[Output, Output]:
    random = torch.Generator().manual_seed(seed)
    return tuple(
        Output(
            torch.zeros(shape[0], 4, dtype=torch.float64),
            features={"f": torch.randn(shape, generator=random, dtype=torch.float64)},
        )
        for shape in (student, teacher)
    )


def hint() -> Hint:
    return Hint(student_layer="f", teacher_layer="f")


def test_hint_of_equal_shapes_is_the_mean_squared_error():
    student, teacher = pair((3, 4, 5, 6), (3, 4, 5, 6))
    loss = hint()
    loss.prepare(student, teacher)
    s, t = (x.features["f"].numpy().ravel() for x in (student, teacher))
    assert loss(student, teacher).item() == pytest.approx(sum((s - t) ** 2) / len(s), rel=1e-12)
    assert not list(loss.parameters())


def test_hint_maps_channels_with_a_learned_matrix():
    student, teacher = pair((3, 4, 5, 5), (3, 7, 5, 5))
    loss = hint()
    loss.prepare(student, teacher)
    matrix = loss.adapter.weight.detach().double().numpy()[:, :, 0, 0]
    s, t = (x.features["f"].numpy() for x in (student, teacher))
    expected = np.mean((np.einsum("oc,bchw->bohw", matrix, s) - t) ** 2)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    again = hint()
    again.prepare(student, teacher)
    assert torch.equal(again.adapter.weight, loss.adapter.weight)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    first = loss(student, teacher)
    for _ in range(50):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher) < 0.9 * first


def test_hint_shrinks_the_larger_map_and_leaves_constants():
    student, teacher = pair((2, 3, 4, 14), (2, 3, 8, 7))
    student.features["f"][:], teacher.features["f"][:] = 2.0, 5.0
    loss = hint()
    loss.prepare(student, teacher)
    assert loss(student, teacher).item() == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 8), (2, 16)), ((2, 49, 8), (2, 50, 16)), ((2, 8, 7, 7), (2, 197, 16)), ((2, 8, 1, 1), (2, 16))],
    ids=["vectors", "tokens with a class token", "map and tokens", "map of one place and vector"],
)
@pytest.mark.parametrize("kind", [Hint, AttentionTransfer])
def test_maps_tokens_and_vectors_go_together(kind, student, teacher):
    outputs = pair(student, teacher)
    loss = kind(student_layer="f", teacher_layer="f")
    loss.prepare(*outputs)
    outputs[0].features["f"].requires_grad_()
    result = loss(*outputs)
    result.backward()
    assert result.isfinite() and outputs[0].features["f"].grad.isfinite().all()


def test_tokens_become_the_grid_that_patches_came_from():
    grid = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    tokens = grid.flatten(2).transpose(1, 2)
    assert torch.equal(as_map(tokens), grid)
    assert torch.equal(as_map(torch.cat((tokens[:, :1] * 0, tokens), 1)), grid)
    for bad in ((2, 12, 3), (2, 0, 3), (2,), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="square of tokens"):
            as_map(torch.zeros(bad))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_transfer(power):
    student, teacher = pair((3, 4, 2, 3), (3, 5, 4, 6))
    s, t = (x.features["f"].numpy() for x in (student, teacher))
    pooled = np.array(
        [
            [
                [[t[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(3)] for i in range(2)]
                for c in range(5)
            ]
            for b in range(3)
        ]
    )

    def attention(x):
        maps = [
            [sum(abs(v) ** power for v in x[b, :, i, j]) / x.shape[1] for i in range(2) for j in range(3)]
            for b in range(3)
        ]
        return np.array([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in maps])

    loss = AttentionTransfer(student_layer="f", teacher_layer="f", power=power)
    expected = np.mean((attention(s) - attention(pooled)) ** 2)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_missing_features_and_forgotten_preparation_are_named():
    student, teacher = pair((2, 4, 3, 3), (2, 5, 3, 3))
    with pytest.raises(ValueError, match="prepare"):
        hint()(student, teacher)
    with pytest.raises(ValueError, match="'stage9'"):
        Hint(student_layer="stage9", teacher_layer="f")(student, teacher)
    with pytest.raises(ValueError, match="power"):
        AttentionTransfer(student_layer="f", teacher_layer="f", power=0)
    loss = hint()
    assert loss.needs_features and loss.student_features == ("f",) and loss.teacher_features == ("f",)


@pytest.mark.parametrize("kind", [Hint, AttentionTransfer])
def test_half_precision_maps_are_compared_in_float32(kind):
    low = [
        Output(torch.zeros(3, 4), features={"f": x.features["f"].bfloat16()}) for x in pair((3, 4, 5, 5), (3, 4, 5, 5))
    ]
    full = [Output(x.embedding, features={"f": x.features["f"].float()}) for x in low]
    loss = kind(student_layer="f", teacher_layer="f")
    loss.prepare(*low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(*low)
    assert result.dtype == torch.float32 and torch.equal(result, loss(*full))
