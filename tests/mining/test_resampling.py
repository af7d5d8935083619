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
    "hard neighborhoods": lambda: HardPool(size=12, half_life=5, by="neighborhood", neighbors=3, memory=20),
    "confused pairs": lambda: ConfusedPairs(size=10, memory=20, half_life=5),
}


def judged(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    latents, S, T = (torch.randn(count, d, generator=numbers) for d in (3, 6, 6))
    return latents, F.normalize(S), F.normalize(T), torch.ones(count)


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
    wrong = next(make() for make in RULES.values() if make().names != rule.names)
    with pytest.raises(InputError, match="another resampling than"):
        wrong.load_state_dict(rule.state_dict())


def test_the_pool_keeps_the_hardest_fresh_latents() -> None:
    rule = HardPool(size=5, half_life=1e9)
    latents, S, T, shown = (torch.cat(x) for x in zip(*(judged(8, seed) for seed in range(3))))
    for step in range(3):
        part = slice(8 * step, 8 * step + 8)
        rule.learn(step, latents[part], S[part], T[part], shown[part])
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
    latents, S, T, shown = judged(8, 1)
    rule.learn(1, latents, S, T, shown)
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


def test_neighborhoods_may_decide_who_is_hard() -> None:
    rule = HardPool(size=16, half_life=1e9, by="neighborhood", neighbors=3, memory=12)
    faces = [judged(8, seed) for seed in range(3)]
    for step, face in enumerate(faces):
        rule.learn(step, *face)
    memory = [torch.cat((faces[1][role], faces[0][role]))[:12] for role in (1, 2)]
    nearest = [(faces[2][role] @ memory[role - 1].T).argsort(dim=1, descending=True)[:, :3] for role in (1, 2)]
    expected = {tuple(z.tolist()): 1 - len({*s.tolist()} & {*t.tolist()}) / 3 for z, s, t in zip(faces[2][0], *nearest)}
    found = {tuple(z.tolist()): float(p) for z, p in zip(rule.state["latents"], rule.state["priority"])}
    there = set(found) & set(expected)
    assert len(there) > 2 and all(found[z] == pytest.approx(expected[z], abs=1e-6) for z in there)
    assert len({tuple(row.tolist()) for row in rule.state["student"]}) == 12
    worst = max(expected.values())
    assert {z for z, value in expected.items() if value == worst} <= set(found)


def test_pictures_without_a_face_are_not_drawn_again() -> None:
    latents, S, T, shown = judged(32, 0)
    shown[::4] = 0
    S[::4] = -T[::4]  # nothing else is disagreed on as much
    broken = {tuple(z.tolist()) for z in latents[::4]}
    for by in ("pointwise", "neighborhood"):
        pool = HardPool(size=20, by=by)
        pool.learn(0, latents, S, T, shown)
        assert not broken & {tuple(z.tolist()) for z in pool.state["latents"]}
    pairs = ConfusedPairs(size=20)
    pairs.learn(0, latents, S, T, shown)
    drawn = pairs.state["priority"] > 0
    ends = torch.cat((pairs.state["first"][drawn], pairs.state["second"][drawn]))
    assert len(ends) > 8
    assert not broken & {tuple(z.tolist()) for z in ends}


def test_pairs_are_those_near_to_the_student_that_it_overrates_most() -> None:
    rule = ConfusedPairs(size=100, memory=100, neighbors=4, half_life=1e9)
    first = judged(6, 0)
    second = judged(6, 1)
    rule.learn(0, *first)
    before = {tuple(a.tolist()) for a in rule.state["first"]}
    rule.learn(1, *second)
    latents, S, T, _ = (torch.cat(pair) for pair in zip(second, first))
    alike = S @ S.T
    alike.fill_diagonal_(-9)
    near = alike.argsort(dim=1, descending=True)[:, :4]
    overrated = torch.full_like(alike, -9).scatter(1, near, (alike - T @ T.T).gather(1, near))
    found = {
        tuple(a.tolist()): (b, float(p))
        for a, b, p in zip(rule.state["first"], rule.state["second"], rule.state["priority"])
    }
    partners = overrated[:6].argmax(1)
    for i, partner in enumerate(partners.tolist()):  # the later faces chose among all twelve
        end, priority = found[tuple(latents[i].tolist())]
        assert torch.equal(end, latents[partner])
        once = partner < i and int(partners[partner]) == i  # the other one's pair already
        assert priority == pytest.approx(0 if once else max(0, float(overrated[i].max())), abs=1e-5)
    assert before <= set(found)
    around = rule.plan(2, 8, seed=0)
    assert around is not None
    assert len(around.centers) == 4
    rule.learn(2, *judged(8, 2))
    assert len(rule.state["latents"]) == 16, "four fresh faces of the last eight are remembered"


def test_two_faces_that_choose_each_other_are_one_pair() -> None:
    rule = ConfusedPairs(size=8, neighbors=1)
    eye = torch.eye(6)
    S = torch.stack((eye[0], eye[0], eye[1], eye[1]))
    rule.learn(0, eye[:4], S, eye[:4], torch.ones(4))
    assert sorted(rule.state["priority"].tolist()) == [0, 0, 1, 1]
    kept = rule.state["priority"] > 0
    assert rule.state["first"][kept].tolist() == eye[[0, 2]].tolist()
    assert rule.state["second"][kept].tolist() == eye[[1, 3]].tolist()


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
