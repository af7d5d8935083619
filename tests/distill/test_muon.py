"""Muon: its orthogonalization against the SVD, its steps against PyTorch's own optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distill.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_orthogonalized_matrix_keeps_its_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ orthogonalize(matrix) @ v.T
    assert (core - core.diagonal().diag()).abs().max() < 1e-3
    assert (core.diagonal() > 0.3).all() and (core.diagonal() < 1.4).all()


def test_steps_on_the_gram_matrix_are_the_published_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 200)
    expected = (x / x.norm()).double()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalize(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_vectors_follow_adamw() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Parameter(torch.randn(7)), None
    theirs = nn.Parameter(mine.detach().clone())
    a = Muon([mine], 0.1, rest=0.5)
    b = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.0)
    for _ in range(5):
        grad = torch.randn(7)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon of its own")
def test_matrices_follow_pytorchs_muon() -> None:
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(12, 30))
    theirs = nn.Parameter(mine.detach().clone())
    a = Muon([mine], 0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(4):
        grad = torch.randn(12, 30)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    # PyTorch iterates in bfloat16, which moves singular values by about a percent.
    moved = (mine - theirs).abs().max() / (4 * 0.02)
    assert moved < 0.05


def test_resuming_continues_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(4, 3, 4, 4)

    def run(net: nn.Module, optimizer: Muon, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    whole, torn = copy.deepcopy(net), copy.deepcopy(net)
    run(whole, Muon(whole.parameters(), 0.02), 6)
    first = Muon(torn.parameters(), 0.02)
    run(torn, first, 3)
    second = Muon(torn.parameters(), 0.02)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(torn, second, 3)
    for a, b in zip(whole.parameters(), torn.parameters()):
        assert torch.equal(a, b)
