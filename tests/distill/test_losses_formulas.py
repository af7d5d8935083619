"""Each loss against its formula, written again in float64 NumPy with loops over single faces."""

import math

import numpy as np
import pytest
import torch

from distill.losses.contrastive import QUD
from distill.losses.embedding import Centering, CosineEmbedding, FeatureL2
from distill.losses.relational import (
    PKT,
    DarkRank,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
    SimilarityToMemory,
)
from faceless.recognizer import Output
from tests.distill.every_loss import faces, value


def unit(x: np.ndarray) -> np.ndarray:
    return np.array([row / math.sqrt(sum(v * v for v in row)) for row in x])


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


@pytest.fixture
def batch():
    S, T, _ = faces(7, 5, 11, torch.float64)
    return S, T, S.numpy(), T.numpy()


def close(loss, expected):
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine(batch):
    S, T, s, t = batch
    close(value(CosineEmbedding(), S, T), np.mean([1 - a @ b for a, b in zip(unit(s), unit(t))]))


@pytest.mark.parametrize("form", ["raw", "unit", "unit-mean"])
def test_l2(batch, form):
    S, T, s, t = batch
    if form == "raw":
        expected = sum((a - b) ** 2 for a, b in zip(s.ravel(), t.ravel())) / s.size
    else:
        expected = np.mean([2 - 2 * a @ b for a, b in zip(unit(s), unit(t))]) / (5 if form == "unit-mean" else 1)
    close(value(FeatureL2(form=form), S, T), expected)


def test_qud_over_several_batches_with_and_without_the_same_person():
    loss = QUD(embedding_dim=5, queue_size=10, temperature=0.2, initial="empty")
    masked = QUD(embedding_dim=5, queue_size=10, temperature=0.2, initial="empty", same_person=0.25)
    past: list[np.ndarray] = []
    for step in range(4):
        S, T, _ = faces(6, 5, step)
        s, t = unit(S.double().numpy()), unit(T.double().numpy())
        for module, threshold in ((loss, math.inf), (masked, 0.25)):
            terms = []
            for a, b in zip(s, t):
                exponents = [a @ b / 0.2] + [a @ q / 0.2 for q in past[-10:] if b @ q <= threshold]
                terms.append(math.log(sum(math.exp(e) for e in exponents)) - exponents[0])
            assert value(module, S, T).item() == pytest.approx(np.mean(terms), rel=1e-5, abs=1e-7)
        past += list(t)


def test_qud_levels_that_the_literature_states():
    """ln(1 + K) for a student that knows nothing, and a floor above 0 at a perfect match (losses sheet)."""
    loss = QUD(embedding_dim=512, queue_size=1024).eval()
    T = torch.nn.functional.normalize(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)))
    orthogonal = QUD(embedding_dim=2048, queue_size=1024).eval()
    orthogonal.negatives.rows.copy_(torch.eye(1024, 2048))
    match = torch.eye(2048, dtype=torch.float64)[1024:1030]
    assert value(orthogonal, match, match).item() == pytest.approx(math.log(1 + 1024 * math.exp(-10)), rel=1e-9)
    assert value(loss, torch.zeros_like(T), T).item() == pytest.approx(math.log(1025), rel=1e-5)


@pytest.mark.parametrize("normalized", ["teacher", "both", "none"])
def test_rkd_distance(batch, normalized):
    S, T, s, t = batch
    s = unit(s) if normalized == "both" else s
    t = t if normalized == "none" else unit(t)

    def psi(x):
        d = [[math.dist(a, b) for b in x] for a in x]
        off = [d[i][j] for i in range(7) for j in range(7) if i != j]
        return [[v / (sum(off) / len(off)) for v in row] for row in d]

    ps, pt = psi(s), psi(t)
    expected = sum(huber(ps[i][j] - pt[i][j]) for i in range(7) for j in range(7)) / 49
    close(value(RKDDistance(normalized=normalized), S, T), expected)


@pytest.mark.parametrize("normalized", ["teacher", "both", "none"])
def test_rkd_angle(batch, normalized):
    S, T, s, t = batch
    s = unit(s) if normalized == "both" else s
    t = t if normalized == "none" else unit(t)

    def angle(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        length = math.sqrt(a @ a) * math.sqrt(b @ b)
        return a @ b / length if length else 0.0

    triplets = [(i, j, k) for i in range(7) for j in range(7) for k in range(7)]
    expected = sum(huber(angle(s, *ijk) - angle(t, *ijk)) for ijk in triplets) / len(triplets)
    close(value(RKDAngle(normalized=normalized), S, T), expected)


def test_rkd_angle_subsets_average_to_the_whole_and_follow_the_step():
    S, T, _ = faces(9, 5, 3, torch.float64)
    whole, part = RKDAngle(), RKDAngle(vertices=3)
    values = [value(part, S, T).item() for _ in range(400)]
    assert len(set(values)) > 60  # of C(9, 3) = 84 subsets
    assert np.mean(values) == pytest.approx(value(whole, S, T).item(), rel=0.03)
    again = RKDAngle(vertices=3)
    assert [value(again, S, T).item() for _ in range(5)] == values[:5]


def test_rkd_of_coinciding_students_has_a_bounded_gradient():
    """Official code gives more than 1e9 here: normalize(0) meets a teacher who tells the two faces apart."""
    S, T, _ = faces(6, 5, 4, torch.float64)
    S[1] = S[0]
    S.requires_grad_()
    value(RKDAngle(), S, T).backward()
    assert 0 < S.grad.abs().max() < 10
    value(RKDDistance(), S, T).backward()
    assert S.grad.abs().max() < 10


def test_similarity_to_memory_over_several_batches():
    plain = SimilarityToMemory(embedding_dim=5, size=10)
    paired = SimilarityToMemory(embedding_dim=5, size=10, paired=True)
    students: list[np.ndarray] = []
    teachers: list[np.ndarray] = []
    for step in range(4):
        S, T, _ = faces(6, 5, step)
        s, t = unit(S.double().numpy()), unit(T.double().numpy())
        kept = list(zip(students, teachers))[-10:]
        for module, own in ((plain, False), (paired, True)):
            terms = [(a @ (ms if own else mt) - b @ mt) ** 2 for a, b in zip(s, t) for ms, mt in kept]
            assert value(module, S, T).item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-4)
        students += list(s)
        teachers += list(t)


def test_similarity_preserving(batch):
    S, T, s, t = batch

    def gram(x):
        return unit(np.array([[a @ b for b in x] for a in x]))

    close(value(SimilarityPreserving(), S, T), np.sum((gram(s) - gram(t)) ** 2) / 49)


@pytest.mark.parametrize(("alpha", "beta", "neighbors"), [(3, 3, 4), (2, 3, 3), (1, 2, 50)])
def test_darkrank(batch, alpha, beta, neighbors):
    S, T, s, t = batch
    s, t = unit(s), unit(t)
    total = 0.0
    for i in range(7):
        ranking = sorted((j for j in range(7) if j != i), key=lambda j: math.dist(t[i], t[j]))[:neighbors]
        scores = [-alpha * math.dist(s[i], s[j]) ** beta for j in ranking]
        for k, score in enumerate(scores):
            total -= score - math.log(sum(math.exp(v) for v in scores[k:]))
    close(value(DarkRank(alpha=alpha, beta=beta, neighbors=neighbors), S, T), total / 7)


def test_darkrank_ranks_near_duplicates_before_none_of_a_faces_own():
    """A face is not its own neighbor even when another one is equally near."""
    T = torch.eye(5, dtype=torch.float64)
    T[1] = T[0]
    S, _, _ = faces(5, 5, 8, torch.float64)
    s = unit(S.numpy())
    first = {0: 1, 1: 0}
    terms = []
    for i in range(5):
        ranking = [first[i]] if i in first else []
        ranking += [j for j in range(5) if j != i and j not in ranking]
        scores = [-3 * math.dist(s[i], s[j]) ** 3 for j in ranking]
        terms.append(-sum(v - math.log(sum(map(math.exp, scores[k:]))) for k, v in enumerate(scores)))
    close(value(DarkRank(), S, T), np.mean(terms))


def test_pkt(batch):
    S, T, s, t = batch

    def probability(x):
        k = [[(a @ b + 1) / 2 for b in unit(x)] for a in unit(x)]
        return [[v / sum(row) for v in row] for row in k]

    ps, pt = probability(s), probability(t)
    pairs = [(p, q) for row, other in zip(pt, ps) for p, q in zip(row, other)]
    close(value(PKT(), S, T), sum(p * math.log((p + 1e-7) / (q + 1e-7)) for p, q in pairs) / 49)


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), SimilarityPreserving(), DarkRank(), PKT()])
def test_a_batch_of_one_is_zero_and_connected(loss):
    S, T, _ = faces(1, 5, 0, torch.float64)
    result = value(loss, S.requires_grad_(), T)
    result.backward()
    assert result.item() == 0 and S.grad.abs().max() < 1e-15


def test_centering_is_the_bias_corrected_average_of_the_teacher():
    center, average, weight = Centering(5, momentum=0.9), np.zeros(5), 0.0
    for step in range(6):
        _, T, _ = faces(4, 5, step)
        average = 0.9 * average + 0.1 * T.double().numpy().mean(0)
        weight = 0.9 * weight + 0.1
        centered = center(Output(T)).embedding
        np.testing.assert_allclose(centered.numpy(), T.numpy() - average / weight, rtol=1e-4, atol=1e-5)
    resumed = Centering(5)
    resumed.load_state_dict(center.state_dict())
    resumed.eval()
    assert torch.equal(resumed.mean, center.mean)
    resumed(Output(T + 100))
    assert torch.equal(resumed.mean, center.mean)  # evaluation does not move it


def test_centering_is_stable_over_ten_thousand_steps_of_a_far_mean():
    center = Centering(3, momentum=0.99)
    for step in range(10_000):
        center.update(torch.tensor([[1000.0, -1.0, 0.0]]) + (step % 2))
    torch.testing.assert_close(center.mean, torch.tensor([1000.5, -0.5, 0.5]), rtol=1e-5, atol=6e-3)
    assert center.weight.item() == pytest.approx(1, abs=1e-4)


def test_primed_centering_stays_also_after_a_resume():
    center = Centering(3)
    center.update(torch.randn(4, 3))
    center.prime(torch.tensor([1.0, 2.0, 3.0]))
    resumed = Centering(3)
    resumed.load_state_dict(center.state_dict())
    for _ in range(5):
        assert torch.equal(resumed(Output(torch.zeros(2, 3))).embedding, -torch.tensor([[1.0, 2.0, 3.0]] * 2))


def test_centering_of_no_face_and_of_half_precision():
    center = Centering(3)
    center.update(torch.ones(2, 3))
    center(Output(torch.zeros(0, 3)))
    torch.testing.assert_close(center.mean, torch.ones(3))
    logits = torch.randn(6, 3)
    out = center.eval()(Output(torch.ones(2, 3, dtype=torch.bfloat16), logits, {"stage": logits}))
    assert out.embedding.dtype == torch.float32 and out.embedding.abs().max() < 1e-6
    assert out.logits is logits and out.features["stage"] is logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QUD(embedding_dim=4, temperature=0), "temperature"),
        (lambda: QUD(embedding_dim=4, update="lifo"), "'simQ'"),
        (lambda: QUD(embedding_dim=4, same_person=2), "cosine"),
        (lambda: QUD(embedding_dim=4, queue_size=0), "size 0"),
        (lambda: FeatureL2(form="mean"), "'unit-mean'"),
        (lambda: RKDDistance(normalized="student"), "'both'"),
        (lambda: RKDAngle(vertices=0), "vertices"),
        (lambda: DarkRank(neighbors=0), "neighbors"),
        (lambda: PKT(epsilon=-1), "epsilon"),
        (lambda: SimilarityToMemory(embedding_dim=4, student_dim=3), "paired"),
        (lambda: SimilarityToMemory(embedding_dim=4, paired=True, initial="random"), "'empty'"),
        (lambda: Centering(4, momentum=1), "momentum"),
        (lambda: Centering(4).prime(torch.zeros(3)), "mean"),
        (lambda: Centering(4)(Output(torch.zeros(2, 3))), "of 4"),
    ],
)
def test_refuses_arguments_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
