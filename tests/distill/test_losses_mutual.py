"""Students that teach each other: the formulas in loops, who gets a gradient from whom, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.losses.contrastive import QUD
from distill.losses.embedding import CosineEmbedding, FeatureL2
from distill.losses.features import AttentionTransfer
from distill.losses.margin import ArcFace
from distill.losses.mutual import DeepMutual, EachPeer, Mutual
from faceless.recognizer import Output


def three(seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 5, generator=random, dtype=torch.float64).requires_grad_() for _ in range(3)]


def output(student: Tensor, *peers: Tensor) -> Output:
    return Output(student, features={f"peers.{i}": peer for i, peer in enumerate(peers)})


def softmax(z: np.ndarray) -> np.ndarray:
    exps = np.exp(z - z.max(1, keepdims=True))
    return exps / exps.sum(1, keepdims=True)


def test_deep_mutual_learning_is_cross_entropy_and_the_mean_divergence_from_the_others() -> None:
    loss = DeepMutual(embedding_dim=5, classes=4, peers=2, scale=8.0, temperature=2.0, weight=0.7).double()
    nets, labels = three(), torch.tensor([0, 3, -1, 2, 2, 1])
    found = loss(output(*nets), Output(torch.zeros(6, 5, dtype=torch.float64)), labels)
    scores = []
    for net, classifier in zip(nets, loss.classifiers):
        x, w = net.detach().numpy(), classifier.centers.detach().numpy()
        scores.append(
            8 * (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
        )
    expected = 0.0
    for i, mine in enumerate(scores):
        chosen = [(row, int(y)) for row, y in enumerate(labels) if y >= 0]
        expected -= np.mean([np.log(softmax(mine)[row, y]) for row, y in chosen])
        for j, theirs in enumerate(scores):
            if i != j:
                p, q = softmax(theirs / 2), softmax(mine / 2)
                expected += 0.7 * 4 * np.mean((p * np.log(p / q)).sum(1)) / 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)  # the centers are float32
    # Who teaches is a constant: a student's gradient is that of its own terms.
    (gradient,) = torch.autograd.grad(found, nets[1], retain_graph=True)
    z = [8 * classifier(net) for net, classifier in zip(nets, loss.classifiers)]
    z = [own if i == 1 else own.detach() for i, own in enumerate(z)]
    known = labels >= 0
    alone = torch.nn.functional.cross_entropy(z[1][known], labels[known])
    for other in (0, 2):
        soft = (z[other] / 2).softmax(1)
        alone = alone + 0.7 * 4 * (soft * (soft.log() - (z[1] / 2).log_softmax(1))).sum(1).mean() / 2
    (wanted,) = torch.autograd.grad(alone, nets[1])
    torch.testing.assert_close(gradient, wanted)


def test_mutual_is_the_mean_over_the_others_of_any_loss() -> None:
    nets = three(1)
    found = Mutual(loss=FeatureL2(), peers=2)(output(*nets), Output(torch.zeros(6, 5)))
    expected = sum((a - b).square().mean() for i, a in enumerate(nets) for j, b in enumerate(nets) if i != j) / 2
    assert float(found.detach()) == pytest.approx(float(expected))
    for net, gradient in zip(nets, torch.autograd.grad(found, nets)):
        others = sum(x.detach() for x in nets) - net.detach()
        torch.testing.assert_close(gradient, (2 * net.detach() - others) * 2 / net.numel() / 2)


def test_each_peer_has_the_teachers_loss_and_a_memory_of_its_own() -> None:
    student, first, second = three(2)
    teacher = Output(torch.randn(6, 5, dtype=torch.float64))
    each, alone = EachPeer(loss=QUD(embedding_dim=5, queue_size=8), peers=2), QUD(embedding_dim=5, queue_size=8)
    expected = alone(Output(first), teacher) + QUD(embedding_dim=5, queue_size=8)(Output(second), teacher)
    assert float(each(output(student, first, second), teacher)) == pytest.approx(float(expected), rel=1e-6)
    assert torch.autograd.grad(each(output(student, first, second), teacher), student, allow_unused=True) == (None,)
    kept = each.state_dict()
    assert sum(key.startswith("copies.0.") for key in kept) == sum(key.startswith("copies.1.") for key in kept) > 0
    heads = EachPeer(loss=ArcFace(embedding_dim=5, classes=3), peers=2)
    assert heads.needs_labels and heads.classes == 3
    names = [name for name, _ in heads.named_parameters()]
    assert names == ["copies.0.centers", "copies.1.centers"]


def test_what_does_not_fit_is_refused() -> None:
    student, first, _ = three()
    with pytest.raises(ValueError, match=r"peers\.1"):
        Mutual(loss=CosineEmbedding(), peers=2)(output(student, first), Output(first))
    with pytest.raises(ValueError, match="peers is 0"):
        Mutual(loss=CosineEmbedding(), peers=0)
    with pytest.raises(ValueError, match="AttentionTransfer wants more"):
        EachPeer(loss=AttentionTransfer(student_layer="a", teacher_layer="b"))
    with pytest.raises(ValueError, match="labels reach"):
        DeepMutual(embedding_dim=5, classes=3)(output(student, first), Output(first), torch.full((6,), 7))
