"""Margin heads and teacher centers against their formulas in loops, and what published code gets wrong."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.losses.adaptive_centers import AdaDistill, FrozenCenters, class_centers
from distill.losses.margin import ArcFace, CosFace, SphereFace2, arc, sampled_classes
from faceless.recognizer import Output
from tests.distill.every_loss import faces, frozen_centers, value


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def softmax_loss(s, centers, labels, kind, scale, margin):
    terms = []
    for row, y in zip(unit(s), labels):
        logits = []
        for c, center in enumerate(unit(centers)):
            cosine = float(row @ center)
            if c == y and kind == "arc":
                theta = math.acos(cosine)
                cosine = math.cos(theta + margin) if theta + margin < math.pi else cosine - margin * math.sin(margin)
            elif c == y:
                cosine -= margin
            logits.append(scale * cosine)
        top = max(logits)
        terms.append(top + math.log(sum(math.exp(v - top) for v in logits)) - logits[y])
    return np.mean(terms)


@pytest.mark.parametrize(("head", "kind", "margin"), [(ArcFace, "arc", 0.5), (CosFace, "cos", 0.35)])
def test_arcface_and_cosface(head, kind, margin):
    loss = head(embedding_dim=5, classes=6).double()
    S, T, labels = faces(9, 5, 0, torch.float64)
    S[0] = -3 * loss.centers[labels[0]].detach()  # theta + margin beyond pi
    expected = softmax_loss(S.numpy(), loss.centers.detach().numpy(), labels.tolist(), kind, 64, margin)
    assert value(loss, S, T, labels).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("gradient", "expected"), [("straight-through", 64.0), ("exact", 119.5)])
def test_derivative_of_the_target_logit_at_cosine_0_9(gradient, expected):
    """The two published derivatives: s, and s sin(theta + m) / sin(theta)."""
    cosine = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    (64 * arc(cosine, 0.5, gradient)).backward()
    assert cosine.grad.item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("head", [ArcFace, SphereFace2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_gradient_is_finite_on_and_opposite_the_center(head, dtype):
    """The arc cosine has an infinite slope there."""
    loss = head(embedding_dim=4, classes=3, gradient="exact").to(dtype)
    S = torch.stack((loss.centers[0], -loss.centers[1])).detach().requires_grad_()
    value(loss, S, S, torch.tensor([0, 1])).backward()
    assert S.grad.isfinite().all() and loss.centers.grad.isfinite().all()


def test_margin_never_rewards_a_larger_angle():
    """Beyond pi, cos(theta + m) rises again; the value must go on falling with the cosine."""
    cosines = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for gradient in ("straight-through", "exact"):
        assert (arc(cosines, 0.5, gradient).diff() > 0).all()


@pytest.mark.parametrize("alpha", [0.7, 0.9])
def test_sphereface2(alpha):
    loss = SphereFace2(embedding_dim=5, classes=6, balance=alpha).double()
    S, T, labels = faces(7, 5, 1, torch.float64)
    bias, total = loss.bias.item(), 0.0
    for row, y in zip(unit(S.numpy()), labels.tolist()):
        for c, center in enumerate(unit(loss.centers.detach().numpy())):
            g = 2 * ((row @ center + 1) / 2) ** 3 - 1
            logit = 40 * (g - 0.4 if c == y else g + 0.4) + bias
            total += (alpha * np.logaddexp(0, -logit)) if c == y else ((1 - alpha) * np.logaddexp(0, logit))
    assert value(loss, S, T, labels).item() == pytest.approx(50 * total / 40 / 7, rel=1e-9)


def test_sphereface2_bias_balances_target_and_others_at_cosine_0():
    loss = SphereFace2(embedding_dim=5, classes=1000).double()
    cosines = torch.zeros(1, 1000, dtype=torch.float64, requires_grad=True)
    loss.cosines = lambda student, labels: (cosines, labels)
    one = Output(torch.ones(1, 5, dtype=torch.float64))
    loss(one, one, torch.tensor([3])).backward()
    pull, push = -cosines.grad[0, 3], cosines.grad.sum() - cosines.grad[0, 3]
    assert pull.item() == pytest.approx(push.item(), rel=1e-5)


@pytest.mark.parametrize("head", [ArcFace, CosFace, SphereFace2])
def test_class_centers_may_start_where_the_teacher_sees_them(head):
    S, T, labels = faces(6, 8, 4)
    loss, fresh = head(embedding_dim=8, classes=5, start="teacher", seed=4), head(embedding_dim=8, classes=5, seed=4)
    with pytest.raises(ValueError, match="no centers to start from yet"):
        value(loss, S, T, labels)
    with pytest.raises(ValueError, match=r"\[5, 6\].*\[5, 8\]"):
        loss.prime(torch.ones(5, 6))
    loss.prime(torch.ones(5, 8))  # a check's stand-ins leave nothing behind
    # Of one class the teacher saw no face, and the last has none at all.
    centers = torch.randn(4, 8)
    centers[2] = 0
    loss.prime(centers)
    unit_rows, expected = F.normalize(loss.centers.detach()), F.normalize(fresh.centers.detach())
    expected[[0, 1, 3]] = F.normalize(centers[[0, 1, 3]])
    torch.testing.assert_close(unit_rows, expected)
    torch.testing.assert_close(loss.centers.norm(dim=1), fresh.centers.norm(dim=1))
    fresh.centers.data = loss.centers.data.clone()
    result = value(loss, S, T, labels)
    torch.testing.assert_close(result, value(fresh, S, T, labels))
    assert torch.autograd.grad(result, loss.centers)[0].abs().sum() > 0  # they learn on


@pytest.mark.parametrize("head", [ArcFace, CosFace, SphereFace2])
def test_sampled_classes_are_those_of_the_batch_and_some_others(head):
    S, T, labels = faces(6, 8, 2)
    labels = labels * 1000
    loss = head(embedding_dim=8, classes=10_000, negatives=50, seed=4)
    result = value(loss, S, T, labels)
    (gradient,) = torch.autograd.grad(result, loss.centers)
    touched = gradient.abs().sum(1).nonzero().flatten()
    assert set(labels.tolist()) <= set(touched.tolist()) and 50 <= len(touched) <= 56
    small = head(embedding_dim=8, classes=len(touched))
    small.centers.data = loss.centers.data[touched]
    if head is SphereFace2:
        small.bias.data = loss.bias.data
    places = torch.tensor([touched.tolist().index(y) for y in labels.tolist()])
    torch.testing.assert_close(value(small, S, T, places), result)
    (other,) = torch.autograd.grad(value(loss, S, T, labels), loss.centers)
    assert not torch.equal(other.abs().sum(1).nonzero().flatten(), touched)  # the next step draws others


def test_the_number_of_sampled_classes_is_known_without_looking_at_the_labels():
    """Where it is not, a GPU's host waits for the device in every step: fake tensors have no values to look at."""
    with FakeTensorMode():
        chosen, places, repeated = sampled_classes(torch.zeros(6, dtype=torch.int64), 1000, 50, 0, 3)
    assert (chosen.shape, places.shape, repeated.shape) == ((56,), (6,), (56,))


@pytest.mark.parametrize("head", [ArcFace, CosFace, SphereFace2])
def test_classes_that_are_drawn_twice_count_once(head):
    S, T, labels = faces(6, 8, 2)
    labels[-1] = -1
    sampled = head(embedding_dim=8, classes=40, negatives=39, seed=4)
    chosen, places, repeated = sampled_classes(labels, 40, 39, 4, 0)
    assert len(chosen) == 45 and 5 < repeated.sum() == 45 - len(set(chosen.tolist()))
    assert torch.equal(chosen[places[:-1]], labels[:-1]) and places[-1] == -1
    small = head(embedding_dim=8, classes=int((~repeated).sum()))
    small.centers.data = sampled.centers.data[chosen.unique()]
    if head is SphereFace2:
        small.bias.data = sampled.bias.data
    expected = torch.where(labels < 0, labels, torch.searchsorted(chosen.unique(), labels))
    torch.testing.assert_close(value(sampled, S, T, labels), value(small, S, T, expected))


def test_a_million_pseudo_identities_fit_a_step():
    loss = ArcFace(embedding_dim=8, classes=1_000_000, negatives=1000)
    S, T, labels = faces(16, 8, 3)
    value(loss, S, T, labels * 150_000).backward()
    assert (loss.centers.grad.abs().sum(1) > 0).sum() <= 1016


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_frozen_centers(kind):
    loss = frozen_centers(5, kind).double()
    S, T, labels = faces(9, 5, 5, torch.float64)
    expected = softmax_loss(S.numpy(), loss.centers.numpy(), labels.tolist(), kind, 64, 0.45)
    assert value(loss, S, T, labels).item() == pytest.approx(expected, rel=1e-9)
    assert not list(loss.parameters())


def test_frozen_centers_must_be_given_and_survive_a_resume():
    loss, resumed = FrozenCenters(embedding_dim=5, classes=6), FrozenCenters(embedding_dim=5, classes=6)
    S, T, labels = faces(4, 5, 5)
    with pytest.raises(ValueError, match="prime"):
        value(loss, S, T, labels)
    with pytest.raises(ValueError, match=r"\[6, 5\]"):
        loss.prime(torch.zeros(5, 6))
    loss.prime(torch.randn(6, 5))
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(value(resumed, S, T, labels), value(loss, S, T, labels))


@pytest.mark.parametrize(
    ("kind", "weighted", "renormalize"), [("arc", True, False), ("cos", False, False), ("arc", True, True)]
)
def test_adadistill_moves_centers_one_face_after_the_other(kind, weighted, renormalize):
    loss = AdaDistill(embedding_dim=5, classes=6, kind=kind, weighted=weighted, renormalize=renormalize).double()
    centers = loss.centers.numpy().copy()
    for step in range(5):
        S, T, labels = faces(12, 5, step, torch.float64)  # 12 faces of 6 people: duplicates
        labels[step] = -1
        start = centers.copy()
        for s, t, y in zip(unit(S.numpy()), unit(T.numpy()), labels.tolist()):
            if y < 0:
                continue
            a = s @ t
            if weighted:
                a = a * min(max(unit(start[y]) @ t, 1e-6), 1)
            a = min(max(a, 1e-6), 1)
            centers[y] = a * centers[y] + (1 - a) * t
        if renormalize:
            for y in set(labels.tolist()) - {-1}:
                centers[y] = unit(centers[y])
        known = labels >= 0
        expected = softmax_loss(S[known].numpy(), centers, labels[known].tolist(), kind, 64, 0.45)
        assert value(loss, S, T, labels).item() == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(loss.centers.numpy(), centers, rtol=1e-9, atol=1e-12)


def test_adadistill_first_visit_all_but_replaces_the_center():
    loss = AdaDistill(embedding_dim=64, classes=3)
    T = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    value(loss, T + 0.1, T, torch.tensor([2]))
    assert F.cosine_similarity(loss.centers[2:], T).item() > 0.999


def test_class_centers_are_mean_unit_embeddings():
    S, _, labels = faces(20, 5, 6, torch.float64)
    labels[0], labels[labels == 3] = -1, 2
    centers = class_centers(S, labels, 6)
    for c in range(6):
        rows = [row for row, y in zip(unit(S.numpy()), labels.tolist()) if y == c]
        np.testing.assert_allclose(centers[c].numpy(), np.mean(rows, 0) if rows else np.zeros(5), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArcFace(embedding_dim=4, classes=1), "classes is 1"),
        (lambda: ArcFace(embedding_dim=4, classes=3, gradient="full"), "'exact'"),
        (lambda: CosFace(embedding_dim=4, classes=3, scale=0), "scale"),
        (lambda: CosFace(embedding_dim=4, classes=3, negatives=0), "negatives"),
        (lambda: SphereFace2(embedding_dim=4, classes=3, balance=1), "balance"),
        (lambda: AdaDistill(embedding_dim=4, classes=3, kind="sphere"), "'cos'"),
        (lambda: AdaDistill(embedding_dim=4, classes=1), "classes is 1"),
    ],
)
def test_refuses_arguments_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
