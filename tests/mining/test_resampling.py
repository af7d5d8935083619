"""What is drawn next, against plain sorting and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from faceless.errors import InputError
from mining.resampling import ConfusedPairs, HardPool, Resampling, SynthDistillRule, between, chosen

RULES = {
    "synthdistill": lambda: SynthDistillRule(coefficient=0.5),
    "hard pool": lambda: HardPool(size=12, half_life=5),
    "confused pairs": lambda: ConfusedPairs(size=10, memory=20, half_life=5),
}


def judged(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    latents, S, T = (torch.randn(count, d, generator=numbers) for d in (3, 6, 6))
    return latents, F.normalize(S), F.normalize(T)


@pytest.mark.parametrize("name", RULES)
def test_what_is_saved_is_all_that_is_known(name: str) -> None:
    def go(rule: Resampling, steps: range) -> list[torch.Tensor]:
        found = []
        for step in steps:
            around = rule.plan(step, 8, seed=1)
            found += [] if around is None else [around.centers, around.scales]
            rule.learn(step, *judged(8, step))
        return found

    rule = RULES[name]()
    go(rule, range(5))
    resumed = RULES[name]()
    resumed.load_state_dict({key: value.clone() for key, value in rule.state_dict().items()})
    expected, found = go(rule, range(5, 12)), go(resumed, range(5, 12))
    assert len(expected) == len(found) > 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    wrong = next(make() for other, make in RULES.items() if other != name)
    with pytest.raises(InputError, match="another resampling than"):
        wrong.load_state_dict(rule.state_dict())


def test_the_pool_keeps_the_hardest_fresh_latents() -> None:
    rule = HardPool(size=5, half_life=1e9)
    latents, S, T = (torch.cat(x) for x in zip(*(judged(8, seed) for seed in range(3))))
    for step in range(3):
        part = slice(8 * step, 8 * step + 8)
        rule.learn(step, latents[part], S[part], T[part])
    disagreement = 1 - (S * T).sum(1)
    hardest = disagreement.argsort(descending=True)[:5]
    assert torch.equal(rule.state["latents"], latents[hardest])
    torch.testing.assert_close(rule.state["priority"], disagreement[hardest])


def test_priorities_age_and_follow_what_revisits_measure() -> None:
    rule = HardPool(size=20, share=0.5, scale=0.3, half_life=2)
    rule.learn(0, *judged(8, 0))
    before = {tuple(z.tolist()): float(p) for z, p in zip(rule.state["latents"], rule.state["priority"])}
    around = rule.plan(1, 8, seed=0)
    assert around is not None
    assert around.scales.tolist() == pytest.approx([0.3] * 4)
    visited = [tuple(z.tolist()) for z in around.centers]
    assert len(set(visited)) == 4 and set(visited) <= set(before)
    latents, S, T = judged(8, 1)
    rule.learn(1, latents, S, T)
    measured = 1 - (S * T).sum(1)
    after = {tuple(z.tolist()): float(p) for z, p in zip(rule.state["latents"], rule.state["priority"])}
    for z, priority in before.items():
        aged = priority * 0.5**0.5
        expected = (aged + float(measured[visited.index(z)])) / 2 if z in visited else aged
        assert after[z] == pytest.approx(expected, abs=1e-6)
    assert {tuple(z.tolist()) for z in latents[4:]} <= set(after), "fresh ones come in"
    assert not {tuple(z.tolist()) for z in latents[:4]} & set(after), "revisits do not"


def test_draws_follow_priorities_without_repeats() -> None:
    priority = torch.tensor([1.0, 2.0, 4.0, 1.0])
    drawn = torch.stack([chosen(priority, 2, 0, step) for step in range(2000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    shares = torch.bincount(drawn[:, 0], minlength=4) / 2000
    torch.testing.assert_close(shares, priority / 8, atol=0.035, rtol=0)
    # The second one by what is left: P(j second) = sum over i of p_i p_j / (1 - p_i).
    p = priority / 8
    second = [sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j) for j in range(4)]
    torch.testing.assert_close(torch.bincount(drawn[:, 1], minlength=4) / 2000, torch.stack(second), atol=0.04, rtol=0)


def test_pairs_are_those_that_the_student_overrates_most() -> None:
    rule = ConfusedPairs(size=100, memory=100, half_life=1e9)
    first = judged(6, 0)
    second = judged(6, 1)
    rule.learn(0, *first)
    rule.learn(1, *second)
    latents, S, T = (torch.cat(pair) for pair in zip(second, first))
    overrated = S @ S.T - T @ T.T
    overrated.fill_diagonal_(-9)
    found = {
        tuple(a.tolist()): (b, float(p))
        for a, b, p in zip(rule.state["first"], rule.state["second"], rule.state["priority"])
    }
    for i in range(6):  # the later faces chose among all twelve
        partner, priority = found[tuple(latents[i].tolist())]
        assert torch.equal(partner, latents[overrated[i].argmax()])
        assert priority == pytest.approx(float(overrated[i].max()), abs=1e-5)
    around = rule.plan(2, 8, seed=0)
    assert around is not None
    assert len(around.centers) == 4
    rule.learn(2, *judged(8, 2))
    assert len(rule.state["latents"]) == 16, "four fresh faces of the last eight are remembered"


def test_points_between_keep_the_norm_of_gaussian_latents() -> None:
    a, b = torch.randn(2, 64, 4, 128, generator=torch.Generator().manual_seed(0))
    where = torch.linspace(0, 1, 64)
    points = between(a, b, where)
    norms = torch.lerp(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1), where)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), norms)
    torch.testing.assert_close(points[0], a[0])
    torch.testing.assert_close(points[-1], b[-1])
    torch.testing.assert_close(between(a, b, where, keep_norm=False), torch.lerp(a, b, where.view(-1, 1, 1)))


@pytest.mark.parametrize("make", [HardPool, ConfusedPairs])
@pytest.mark.parametrize("wrong", [{"size": 0}, {"share": 1.0}, {"half_life": 0.0}, {"scale": -1.0}])
def test_impossible_pools_are_refused(make: type, wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        make(**wrong)
