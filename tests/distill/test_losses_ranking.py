"""EKD and pairwise ranking against their formulas, in float64 with loops over pairs; where ours is not theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.losses.ranking import EKD, PairwiseRanking
from faceless.recognizer import Output
from tests.distill.every_loss import faces, value


def cosines(x: torch.Tensor) -> dict[tuple[int, int], float]:
    rows = [row / math.sqrt(sum(v * v for v in row)) for row in x.double().numpy()]
    return {(i, j): float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i + 1, len(rows))}


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("same_person", [None, 0.3])
def test_ekd_over_several_batches(corrected: bool, same_person: float | None) -> None:
    loss = EKD(
        one_in=[2, 7], temperature=0.05, hardest=5, momentum=0.8, corrected=corrected, same_person=same_person
    ).double()
    average, weight = np.zeros((2, 2)), 0.0
    for step in range(4):
        S, T, labels = faces(9, 4, step, torch.float64)
        labels[labels == 5] = -1
        s, t = cosines(S), cosines(T)
        if same_person is None:
            known = [(i, j) for i, j in s if labels[i] >= 0 and labels[j] >= 0]
            genuine = [pair for pair in known if labels[pair[0]] == labels[pair[1]]]
        else:
            known = list(s)
            genuine = [pair for pair in known if t[pair] > same_person]
        impostor = [pair for pair in known if pair not in genuine]
        assert genuine and impostor
        for row, of in enumerate((s, t)):
            descending = sorted((of[pair] for pair in impostor), reverse=True)
            average[row] = 0.8 * average[row] + 0.2 * np.array([descending[len(impostor) // k] for k in (2, 7)])
        weight = 0.8 * weight + 0.2
        q = average / weight if corrected else average

        def rank(x: float, row: int, q: np.ndarray = q) -> float:
            return sum(1 / (1 + math.exp(-(x - threshold) / 0.05)) for threshold in q[row])

        hard = sorted(impostor, key=lambda pair: -s[pair])[:5]
        expected = 0.02 * np.mean([(rank(s[p], 0) - rank(t[p], 1)) ** 2 for p in genuine])
        expected += 0.01 * np.mean([(rank(s[p], 0) - rank(t[p], 1)) ** 2 for p in hard])
        assert value(loss, S, T, labels).item() == pytest.approx(expected, rel=1e-9)


def test_ekd_thresholds_are_of_full_size_from_the_first_step() -> None:
    S, T, labels = faces(9, 4, 0)
    first = EKD(one_in=[2])
    value(first, S, T, labels)
    i, j = torch.triu_indices(9, 9, 1)
    impostor = labels[i] != labels[j]
    cos = torch.nn.functional.normalize(S) @ torch.nn.functional.normalize(S).T
    median = cos[i, j][impostor].sort(descending=True).values[impostor.sum() // 2]
    torch.testing.assert_close((first.thresholds.average / first.thresholds.weight)[0, 0], median)
    published = EKD(one_in=[2], corrected=False)
    value(published, S, T, labels)
    torch.testing.assert_close(published.thresholds.average[0, 0], median / 100)


def test_the_threshold_of_every_impostor_pair_is_the_lowest() -> None:
    loss, lowest = EKD(one_in=[1], momentum=0.0), []
    for step in range(3):
        S, T, labels = faces(9, 4, step)
        assert value(loss, S, T, labels).isfinite()
        lowest = [min(c for (i, j), c in cosines(x).items() if labels[i] != labels[j]) for x in (S, T)]
    assert loss.thresholds.average[:, 0].tolist() == pytest.approx(lowest, rel=1e-5)


def test_ekd_skips_the_term_that_has_no_pairs() -> None:
    S, T, labels = faces(6, 4, 1)
    strangers, alike = torch.arange(6), torch.zeros(6, dtype=torch.long)
    for whose in (strangers, alike):
        result = value(EKD(), S.requires_grad_(), T, whose)
        result.backward()
        assert result.isfinite() and S.grad.isfinite().all()
    assert value(EKD(), S, T, alike) == 0  # no impostor pair was ever seen, so there is no threshold
    assert value(EKD(temperature=0.2), S, T, strangers) > 0
    loss = EKD(temperature=0.2)
    value(loss, S, T, labels)
    kept = loss.thresholds.average.clone()
    value(loss, S, T, alike)
    torch.testing.assert_close(loss.thresholds.average, kept)


@pytest.mark.parametrize("form", ["power", "exponent", "ranknet"])
@pytest.mark.parametrize("margin", [0.0, 0.1, "teacher", "deviation"])
def test_pairwise_ranking(form: str, margin: float | str) -> None:
    S, T, _ = faces(6, 4, 2, torch.float64)
    s, t = cosines(S), cosines(T)
    costs = []
    for a in t:
        for b in t:
            if t[a] <= t[b]:
                continue
            x = {"teacher": t[a] - t[b], "deviation": float(np.std(list(t.values())))}.get(margin, margin)
            x -= s[a] - s[b]
            costs.append(
                {
                    "power": max(x, 0) ** 1.5,
                    "exponent": max(math.exp(3 * x) - 1, 0),
                    "ranknet": math.log1p(math.exp(-3 * (s[a] - s[b]))),
                }[form]
            )
    loss = PairwiseRanking(form=form, margin=margin, power=1.5, slope=3.0)
    assert value(loss, S, T).item() == pytest.approx(np.mean(costs), rel=1e-9)


def test_a_subset_of_scores_is_fresh_each_step_and_right_on_average() -> None:
    S, T, _ = faces(12, 4, 3, torch.float64)
    whole, some = PairwiseRanking(), PairwiseRanking(scores=40)
    found = torch.stack([value(some, S, T) for _ in range(200)])
    assert len(found.unique()) > 190
    assert found.mean().item() == pytest.approx(value(whole, S, T).item(), rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"one_in": []}, {"one_in": [0]}, {"momentum": 1.0}, {"temperature": 0.0}, {"same_person": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EKD(**wrong)
    for wrong in ({"form": "rank"}, {"margin": "student"}, {"power": 0.5}, {"slope": 0.0}, {"scores": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PairwiseRanking(**wrong)
    with pytest.raises(ValueError, match="labels"):
        EKD()(Output(torch.ones(2, 3)), Output(torch.ones(2, 3)))
