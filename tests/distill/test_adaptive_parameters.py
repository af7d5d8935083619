"""Temperatures, targets and tolerances that follow statistics: against formulas written out, and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.losses.adaptive_parameters import AdaptiveILED, AdaptiveQUD, AdaptiveRPSD, AdaptiveTemperatureKD
from distill.losses.contrastive import QUD
from distill.losses.unified import ILED, RPSD
from distill.running import Running
from faceless.recognizer import Output
from tests.distill.every_loss import faces, value


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_running_mean_is_a_weighted_mean_from_the_first_step() -> None:
    running = Running(2, momentum=0.9)
    seen: list[np.ndarray] = []
    assert torch.equal(running.eval()(torch.tensor([7.0, 8.0])), torch.tensor([7.0, 8.0]))
    running.train()
    for step, some in enumerate((False, True, True, False, True)):
        now = torch.tensor([float(step), step**2 + 1.0])
        found = running(now, some)
        if some:
            seen.append(now.numpy())
        weights = [0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
        expected = np.average(seen, axis=0, weights=weights) if seen else now.numpy()
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    kept = running.eval()(torch.zeros(2))
    np.testing.assert_allclose(kept.numpy(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="momentum"):
        Running(momentum=1.0)


def test_iled_follows_the_cosines() -> None:
    loss = AdaptiveILED(share=0.5, steepness=3.0, momentum=0.5).double()
    targets, deviations, weights = [], [], []
    for step in range(3):
        S, T, _ = faces(8, 5, step, torch.float64)
        c = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(S.numpy(), T.numpy())]
        targets.append(sorted(c)[4])
        deviations.append(np.std(c))
        weights = [w / 2 for w in weights] + [1.0]
        target = np.average(targets, weights=weights)
        scale = 3.0 / max(np.average(deviations, weights=weights), 0.01)
        expected = np.mean([(1 - x) * softplus(scale * (target - x) + 0.1) / scale for x in c])
        assert value(loss, S, T).item() == pytest.approx(expected, rel=1e-9)


def test_rpsd_follows_the_differences() -> None:
    loss = AdaptiveRPSD(embedding_dim=5, size=6, share=0.5, momentum=0.5).double()
    bank: list[tuple[np.ndarray, np.ndarray]] = []
    tolerances, deviations, weights = [], [], []
    for step in range(4):
        S, T, _ = faces(3, 5, step, torch.float64)
        s, t = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (S, T))
        found = value(loss, S, T).item()
        if bank:
            d = [abs(a @ m - b @ n) for a, b in zip(s, t) for m, n in bank[-6:]]
            tolerances.append(sorted(d)[len(d) // 2])
            deviations.append(np.std(d))
            weights = [w / 2 for w in weights] + [1.0]
            tolerance = np.average(tolerances, weights=weights)
            scale = 3.0 / np.average(deviations, weights=weights)
            expected = np.mean([softplus(scale * (x - tolerance) + 1) / scale for x in d])
            assert found == pytest.approx(expected, rel=1e-6)  # the bank is float32
        else:
            assert found == 0
        bank += [(a.astype(np.float32), b.astype(np.float32)) for a, b in zip(s, t)]


def cone(spread: float, count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A student of a teacher whose faces lie in a cone; the narrower, the more alike they are."""
    random = torch.Generator().manual_seed(0)
    T = torch.ones(count, 16) + spread * torch.randn(count, 16, generator=random)
    return T + 0.3 * spread * torch.randn(count, 16, generator=random), T


def test_the_share_of_hard_faces_stays_while_the_fixed_target_loses_it() -> None:
    """How many faces are on the steep side, for a student that is far from its teacher and for one that is near."""
    T = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    away = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    means = []
    for distance in (2.0, 0.35):
        shares = []
        for loss in (ILED(), AdaptiveILED(share=0.75)):
            c = torch.nn.functional.cosine_similarity(T + distance * away, T)
            scale, target = loss.shape(c)
            hard = torch.sigmoid(scale * (target - c) + 0.1) > 0.5  # the slope of the softplus
            shares.append(hard.double().mean().item())
        means.append(shares)
    (fixed_far, adaptive_far), (fixed_near, adaptive_near) = means
    assert fixed_far > 0.99 and fixed_near < 0.3
    assert adaptive_far == pytest.approx(0.75, abs=0.05) and adaptive_near == pytest.approx(0.75, abs=0.05)


def test_temperature_is_the_spread_of_the_teacher() -> None:
    narrow, wide = (cone(spread)[1] for spread in (0.1, 1.0))
    for T in (narrow, wide):
        loss = AdaptiveQUD(embedding_dim=16, queue_size=128, momentum=0.0, initial="empty")
        value(loss, T, T)
        value(loss, T, T)
        t = torch.nn.functional.normalize(T)
        deviation = (t @ t[-128:].T).std(correction=0).item()
        assert loss.spread.average.item() == pytest.approx(deviation, rel=1e-4)
        plain = QUD(embedding_dim=16, queue_size=128, temperature=max(deviation, 0.01), initial="empty")
        value(plain, T, T)
        assert value(plain, T, T).item() == pytest.approx(value(loss, T, T).item(), rel=1e-4)


def test_learned_temperature_descends_and_stays_in_bounds() -> None:
    S, T = cone(1.0)
    loss = AdaptiveQUD(embedding_dim=16, queue_size=128, rule="learned", start=0.5)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(value(loss, S, T))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[3]
    for far, bound in ((-20.0, 0.01), (3.0, 1.0)):
        with torch.no_grad():
            loss.log.fill_(far)
        assert loss.divisor(T).item() == pytest.approx(bound)
        loss.zero_grad()
        value(loss, S, T).backward()
        assert loss.log.grad.item() != 0, "a temperature at its bound can come back"


def scores(batch: int = 6, classes: int = 9) -> tuple[Output, Output]:
    random = torch.Generator().manual_seed(0)
    z_s, z_t = (3 * torch.randn(batch, classes, generator=random, dtype=torch.float64) for _ in range(2))
    embedding = torch.zeros(batch, 2, dtype=torch.float64)
    return Output(embedding, z_s), Output(embedding, z_t)


def kl(z_s: torch.Tensor, z_t: torch.Tensor) -> float:
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (z_t.numpy(), z_s.numpy()))
    return float((p * np.log(p / q)).sum(1).mean())


def test_standardized_scores_ignore_scale_and_offset() -> None:
    student, teacher = scores()
    loss = AdaptiveTemperatureKD(temperature=2.0)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) / 2 for x in (student.logits, teacher.logits)]
    assert loss(student, teacher).item() == pytest.approx(4 * kl(*z), rel=1e-9)
    moved = Output(student.embedding, 7 * student.logits + 3)
    assert loss(moved, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)


def test_adversarial_temperature_climbs_with_growing_force() -> None:
    student, teacher = scores()
    loss = AdaptiveTemperatureKD(rule="adversarial", lowest=1.0, span=20.0, ramp=4).double()

    def at(raw: float) -> float:
        T = 1 + 20 / (1 + math.exp(-raw))
        return T**2 * kl(student.logits / T, teacher.logits / T)

    slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    for step in range(6):
        loss.zero_grad()
        found = loss(student, teacher)
        found.backward()
        assert found.item() == pytest.approx(at(1.0), rel=1e-9)
        force = (1 - math.cos(math.pi * min(step / 4, 1))) / 2
        assert loss.raw.grad.item() == pytest.approx(-force * slope, rel=1e-5, abs=1e-12)
    assert loss.step == 6
    # An optimizer that divides the force out of the gradient moves p at once; it counts as moved as the force grows.
    with torch.no_grad():
        loss.raw.fill_(-2.0)
    for step in range(6):
        loss.step = step
        force = (1 - math.cos(math.pi * min(step / 4, 1))) / 2
        assert loss(student, teacher).item() == pytest.approx(at(1 - 3 * force), rel=1e-9)


def test_what_cannot_be_is_refused() -> None:
    for make, wrong in (
        (AdaptiveTemperatureKD, {"rule": "none"}),
        (AdaptiveTemperatureKD, {"span": 0.0}),
        (AdaptiveILED, {"share": 1.5}),
        (AdaptiveILED, {"steepness": 0.0}),
        (lambda **k: AdaptiveRPSD(embedding_dim=4, **k), {"share": -0.1}),
        (lambda **k: AdaptiveQUD(embedding_dim=4, **k), {"rule": "none"}),
        (lambda **k: AdaptiveQUD(embedding_dim=4, **k), {"factor": 0.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(**wrong)
    assert RPSD(embedding_dim=4).shape(torch.zeros(1)) == (60.0, 0.05)
