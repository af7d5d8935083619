"""Von Mises-Fisher distributions against Bessel functions of SciPy, and attention similarity against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

from distill.losses.attention import AttentionSimilarity
from distill.losses.probabilistic import VonMisesFisher, log_normalizer, resultant_length
from faceless.recognizer import Output


def log_bessel(order: float, k: float) -> float:
    return math.log(special.ive(order, k)) + k


@pytest.mark.parametrize(("dim", "least", "close"), [(16, 1.0, 1e-3), (128, 5.0, 2e-6), (256, 20.0, 1e-6)])
def test_normalizer_and_resultant_length_are_those_of_bessel_functions(dim: int, least: float, close: float) -> None:
    for k in (least, 4 * least, 50 * least, 400.0):
        u, value = dim / 2 - 1, torch.tensor(k, dtype=torch.float64, requires_grad=True)
        ours = log_normalizer(value, dim)
        # Without the constant (dim / 2) ln 2 pi.
        assert float(ours.detach()) == pytest.approx(u * math.log(k) - log_bessel(u, k), abs=close * 10)
        ratio = special.ive(u + 1, k) / special.ive(u, k)
        assert float(resultant_length(value.detach(), dim)) == pytest.approx(ratio, abs=close)
        (slope,) = torch.autograd.grad(ours, value)
        assert -float(slope) == pytest.approx(float(resultant_length(value.detach(), dim)), rel=1e-9)


def test_the_divergence_is_that_of_the_two_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    S, T = (torch.randn(5, 64, generator=random, dtype=torch.float64) for _ in range(2))
    found = VonMisesFisher(form="kl", concentration=10.0)(Output(S), Output(T))
    terms = []
    for s, t in zip(S.numpy(), T.numpy()):
        ks, kt, u = 10 * np.linalg.norm(s), 10 * np.linalg.norm(t), 31
        cosine = s @ t / np.linalg.norm(s) / np.linalg.norm(t)
        c_s, c_t = (u * math.log(k) - log_bessel(u, k) for k in (ks, kt))
        a = special.ive(u + 1, kt) / special.ive(u, kt)
        terms.append(c_t - c_s + a * (kt - ks * cosine))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)
    log = VonMisesFisher(beta=0.3)(Output(S), Output(T))
    expected = [
        1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t) + 0.3 * math.log(np.linalg.norm(s) / np.linalg.norm(t)) ** 2
        for s, t in zip(S.numpy(), T.numpy())
    ]
    assert float(log) == pytest.approx(np.mean(expected), rel=1e-6)


def test_in_two_dimensions_there_is_no_divergence() -> None:
    with pytest.raises(ValueError, match="3 numbers or more, not 2"):
        VonMisesFisher(form="kl")(Output(torch.ones(2, 2)), Output(torch.ones(2, 2)))


@pytest.mark.parametrize("form", ["log", "kl"])
def test_direction_and_concentration_are_both_learned(form: str) -> None:
    target = torch.nn.functional.normalize(torch.randn(6, 16)) * torch.tensor(
        [[0.2], [0.5], [1.0], [1.5], [2.0], [0.0]]
    )
    student = torch.randn(6, 16, requires_grad=True)
    loss, optimizer = VonMisesFisher(form=form, concentration=20.0), torch.optim.Adam([student], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(Output(student), Output(target)).backward()
        optimizer.step()
    torch.testing.assert_close(student.detach()[:5], target[:5], atol=0.02, rtol=0)
    assert student.grad is not None and (student.grad[5] == 0).all(), "a teacher that says nothing teaches nothing"


def attention(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], **options: str) -> torch.Tensor:
    loss = AttentionSimilarity(student_layers=list(student), teacher_layers=list(teacher), **options)
    blank = torch.zeros(4, 2, dtype=torch.float64)
    return loss(Output(blank, features=student), Output(blank, features=teacher))


def test_attention_of_ordinary_maps() -> None:
    random = torch.Generator().manual_seed(0)
    Fs = torch.randn(4, 6, 4, 4, generator=random, dtype=torch.float64, requires_grad=True)
    Ft = torch.randn(4, 6, 8, 8, generator=random, dtype=torch.float64)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)]))

    s, t = Fs.detach().numpy(), Ft.numpy()
    channel = distance(s.mean((2, 3)), t.mean((2, 3)))
    pooled = t.reshape(4, 6, 4, 2, 4, 2).mean((3, 5))
    spatial = distance((s**2).mean(1).reshape(4, -1), (pooled**2).mean(1).reshape(4, -1))
    both = attention({"a": Fs}, {"b": Ft})
    assert float(both) == pytest.approx(channel + spatial)
    assert float(attention({"a": Fs}, {"b": Ft}, maps="channel")) == pytest.approx(channel)
    assert float(attention({"a": Fs}, {"b": Ft[:, :5]}, maps="spatial")) > 0
    (gradient,) = torch.autograd.grad(both, Fs)
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match="6 and 5 channels"):
        attention({"a": Fs}, {"b": Ft[:, :5]})
    with pytest.raises(ValueError, match="no spatial maps"):
        attention({"a": Fs.mean((2, 3))}, {"b": Ft.mean((2, 3))}, maps="spatial")
