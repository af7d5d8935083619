"""ILED, RPSD, their total, CRD and the logit losses against their formulas in float64 loops."""

import math

import numpy as np
import pytest
import torch

from distill.losses.contrastive import CRD
from distill.losses.logits import DKD, NKD, CrossEntropy, LogitKD
from distill.losses.unified import ILED, RPSD, UnifiedKD
from faceless.recognizer import Output
from tests.distill.every_loss import faces, value


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def iled(s, t, weighted=True):
    cosines = [float(a @ b) for a, b in zip(s, t)]
    return np.mean([(1 - c if weighted else 1) * softplus(40 * (0.9 - c) + 0.1) / 40 for c in cosines])


def rpsd(s, t, bank):
    differences = [abs(float(a @ ms - b @ mt)) for a, b in zip(s, t) for ms, mt in bank]
    return sum(softplus(60 * (d - 0.05) + 1) / 60 for d in differences) / max(len(differences), 1)


@pytest.mark.parametrize("weighted", [True, False])
def test_iled(weighted):
    S, T, _ = faces(9, 5, 0, torch.float64)
    expected = iled(unit(S.numpy()), unit(T.numpy()), weighted)
    assert value(ILED(weighted=weighted), S, T).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("cosine", "slope"), [(1.0, 0.0005), (0.9, 0.071), (0.5, 0.90), (0.0, 1.90), (-0.5, 2.90)])
def test_iled_slope_grows_with_hardness(cosine, slope):
    """The slopes that the losses sheet lists, here along the circle: d cos = -sin(angle) d angle."""
    angle = torch.tensor(math.acos(cosine) or 1e-4, dtype=torch.float64, requires_grad=True)
    S = torch.stack((angle.cos(), angle.sin())).unsqueeze(0)
    value(ILED(), S, torch.tensor([[1.0, 0.0]], dtype=torch.float64)).backward()
    assert angle.grad.item() / math.sin(angle.item()) == pytest.approx(slope, rel=0.02)


def test_rpsd_and_the_total_over_several_batches():
    rpsd_, total = RPSD(embedding_dim=5, size=10), UnifiedKD(embedding_dim=5, size=10)
    labeled = UnifiedKD(embedding_dim=5, size=10, classes=6, instance=10, relation=30)
    past: list[tuple[np.ndarray, np.ndarray]] = []
    for step in range(4):
        S, T, labels = faces(6, 5, step)
        s, t = unit(S.double().numpy()), unit(T.double().numpy())
        relation = rpsd(s, t, past[-10:])
        assert value(rpsd_, S, T).item() == pytest.approx(relation, rel=1e-5, abs=1e-9)
        assert value(total, S, T).item() == pytest.approx(20 * iled(s, t) + 40 * relation, rel=1e-5)
        recognition = value(labeled.recognition, S, T, labels).item()
        expected = 10 * iled(s, t) + 30 * relation + recognition
        assert value(labeled, S, T, labels).item() == pytest.approx(expected, rel=1e-5)
        past += list(zip(s, t))


def test_rpsd_floor_of_a_perfect_match():
    loss, face = RPSD(embedding_dim=5), Output(torch.randn(6, 5))
    loss(face, face)
    assert loss(face, face).item() == pytest.approx(softplus(-60 * 0.05 + 1) / 60, rel=1e-5)  # 0.0021
    assert not UnifiedKD(embedding_dim=5).needs_labels and UnifiedKD(embedding_dim=5, classes=3).needs_labels


def test_crd_over_several_batches():
    """With Pn = 1 / N and Z = N mean(e), as published, N cancels: written out here with an N."""
    loss = CRD(embedding_dim=5, student_dim=4, feature_dim=3, size=10, temperature=0.5)
    N, Z, past = 1e6, None, []
    project = {
        name: [x.detach().double().numpy() for x in layer.parameters()]
        for name, layer in (("s", loss.student_projection), ("t", loss.teacher_projection))
    }
    for step in range(4):
        S, T, _ = faces(6, 5, step)
        S = S[:, :4]
        s, t = (unit(x.double().numpy() @ project[k][0].T + project[k][1]) for k, x in (("s", S), ("t", T)))
        bank, expected = past[-10:], 0.0
        sides = [
            [(a, b, [m[1] for m in bank]) for a, b in zip(s, t)],
            [(b, a, [m[0] for m in bank]) for a, b in zip(s, t)],
        ]
        scores = [[[math.exp(a @ v / 0.5) for v in [b, *rest]] for a, b, rest in side] for side in sides]
        if bank:
            Z = Z or [N * np.mean(side) for side in scores]
            for side, z in zip(scores, Z):
                for row in side:
                    noise = len(bank) / N
                    expected -= math.log(row[0] / z / (row[0] / z + noise))
                    expected -= sum(math.log(noise / (e / z + noise)) for e in row[1:])
        assert value(loss, S, T).item() == pytest.approx(expected / 6, rel=1e-5)
        past += list(zip(s, t))


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_kd(T):
    S, Z, _ = faces(5, 7, 1, torch.float64)
    terms = []
    for s, t in zip(S.numpy(), Z.numpy()):
        p, q = softmax(t / T), softmax(s / T)
        terms.append(T * T * sum(a * math.log(a / b) for a, b in zip(p, q)))
    assert value(LogitKD(temperature=T), S, Z).item() == pytest.approx(np.mean(terms), rel=1e-9)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_dkd_and_nkd(T):
    S, Z, labels = faces(5, 7, 2, torch.float64)
    decoupled, normalized = [], []
    for s, t, y in zip(S.numpy(), Z.numpy(), labels.tolist()):
        p, q = softmax(t / T), softmax(s / T)
        rest_p, rest_q = softmax(np.delete(t, y) / T), softmax(np.delete(s, y) / T)
        target = p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        decoupled.append(T * T * (target + 8 * sum(a * math.log(a / b) for a, b in zip(rest_p, rest_q))))
        others = sum(a * math.log(b) for a, b in zip(rest_p, rest_q))
        normalized.append(-softmax(t)[y] * math.log(softmax(s)[y]) - 1.5 * T * T * others)
    assert value(DKD(temperature=T), S, Z, labels).item() == pytest.approx(np.mean(decoupled), rel=1e-9)
    assert value(NKD(temperature=T), S, Z, labels).item() == pytest.approx(np.mean(normalized), rel=1e-9)


def test_kd_is_the_sum_that_dkd_decouples():
    """KD = TCKD + (1 - p_T,y) NCKD for each face, as the DKD paper derives."""
    S, Z, labels = faces(1, 7, 3, torch.float64)
    confidence = 1 - (Z / 4).softmax(1)[0, labels[0]].item()
    whole = value(LogitKD(), S, Z).item()
    assert value(DKD(beta=confidence), S, Z, labels).item() == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("loss", [DKD(temperature=1.0), NKD(), LogitKD(temperature=1.0), CrossEntropy()])
def test_scaled_cosines_of_sure_networks_stay_finite(loss):
    """No logarithm of a probability that underflows: scale 64 at T = 1 gives inf or NaN in the usual code."""
    S = (64 * torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]])).requires_grad_()
    T = 64 * torch.tensor([[-1.0, 1.0, -1.0], [1.0, -1.0, -1.0]])
    result = loss(Output(S, S), Output(T, T), torch.tensor([0, 0]))
    result.backward()
    assert result.isfinite() and S.grad.isfinite().all()


def test_cross_entropy_is_pytorchs():
    S, T, labels = faces(9, 7, 4)
    torch.testing.assert_close(value(CrossEntropy(), S, T, labels), torch.nn.functional.cross_entropy(S, labels))
