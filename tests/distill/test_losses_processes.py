"""Two processes must be one process with the concatenated batch: values, gradients and what is remembered."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from distill.gather import equal_shares, gather
from distill.losses.embedding import Centering
from distill.memory import EmbeddingMemory
from distill.objective import Adaptive, Objective
from faceless.recognizer import Output
from tests.distill.every_loss import EVERY, HEADS, OF_PAIRS, faces, value

STEPS = 4

# Exact also where processes hold different numbers of faces.
UNEVEN = sorted(OF_PAIRS | HEADS | {"dkd", "nkd"})


def run(name: str, split: list[int] | None, rank: int = 0):
    """Loss, gradient of a linear student and state after some steps; ``split`` gives each rank's share of a batch."""
    loss, rows = EVERY[name](6).double(), []
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    for step in range(STEPS):
        S, T, labels = faces(8, 6, step, torch.float64)
        if split is not None:
            start = sum(split[:rank])
            S, T, labels = (x[start : start + split[rank]] for x in (S, T, labels))
        labels[labels == 4] = -1
        result = value(loss, S @ weight, T, labels)
        grads = torch.autograd.grad(result, [weight, *loss.parameters()], allow_unused=True, materialize_grads=True)
        both = torch.cat([result.detach().view(1)] + [grad.double().flatten() for grad in grads])
        if split is not None:  # what DDP and a logger do
            dist.all_reduce(both)
            both /= len(split)
        rows.append(both)
    return torch.stack(rows), loss.state_dict()


def adapted(split: list[int] | None, rank: int = 0, rule: str = "matched") -> dict[str, float]:
    """Weights that followed the gradients of a term of single faces, one of labels and one of pairs."""
    losses = {name: EVERY[name](6).double() for name in ("cosine", "cosface", "rkd-distance")}
    weights = dict.fromkeys(losses, 1.0)
    objective = Objective(losses, weights, student_dim=6, teacher_dim=6, adaptive=Adaptive(rule, every=2)).double()
    weight = torch.nn.Parameter(torch.eye(6, dtype=torch.float64))
    objective.watch([weight])
    for step in range(STEPS):
        S, T, labels = faces(8, 6, step, torch.float64)
        if split is not None:
            start = sum(split[:rank])
            S, T, labels = (x[start : start + split[rank]] for x in (S, T, labels))
        objective(Output(S @ weight), Output(T), labels)
    return objective.weights_now()


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {name: run(name, [4, 4], rank) for name in EVERY}
    uneven = {name: run(name, [5, 3], rank) for name in UNEVEN}
    empty = {name: run(name, [8, 0], rank) for name in UNEVEN}

    memory = EmbeddingMemory(7, 2, initial="empty")
    for n in ([2, 1], [0, 3], [6, 5], [0, 0]):
        memory.push(torch.full((n[rank], 2), float(10 * rank + n[rank])))
    center = Centering(6)
    _, T, _ = faces(8, 6, 0)
    center.update(T[:5] if rank == 0 else T[5:])
    labels = gather(torch.arange(rank + 1))
    with equal_shares():
        numbers = torch.tensor([1.0, 2.0]).add(10 * rank).requires_grad_()
        together = gather(numbers)
        (together * torch.arange(1.0, 5.0)).sum().backward()
    equal = (together.detach(), numbers.grad)

    rules = [adapted([4, 4], rank, rule) for rule in ("matched", "magnitude")]
    state = (found, uneven, empty, memory.valid(), center.mean, labels, rules, equal)
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", EVERY)
def test_equals_one_process(ranks, name):
    expected, state = run(name, None)
    for rank in ranks:
        torch.testing.assert_close(rank[0][name][0], expected, rtol=1e-9, atol=1e-12)
        for key, item in rank[0][name][1].items():
            torch.testing.assert_close(item, state[key])


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("shares", [1, 2], ids=["uneven", "one-idle"])
def test_losses_of_pairs_and_of_labels_allow_uneven_and_empty_shares(ranks, name, shares):
    expected, _ = run(name, None)
    for rank in ranks:
        torch.testing.assert_close(rank[shares][name][0], expected, rtol=1e-9, atol=1e-12)


def test_memory_takes_uneven_batches_in_rank_order(ranks):
    # Two of 2 and one of 11, three of 13, six of 6 and five of 15; row i lies at i mod 7.
    pushed = [2, 2, 11, 13, 13, 13] + [6] * 6 + [15] * 5
    expected = [0.0] * 7
    for i, row in enumerate(pushed):
        expected[i % 7] = float(row)
    for rank in ranks:
        assert rank[3][:, 0].tolist() == expected


def test_centering_and_gather_see_all_processes(ranks):
    _, T, _ = faces(8, 6, 0)
    for rank in ranks:
        torch.testing.assert_close(rank[4], T.mean(0))
        assert rank[5].tolist() == [0, 0, 1]
    for number, rank in enumerate(ranks):
        together, gradient = rank[7]
        assert together.tolist() == [1, 2, 11, 12]
        assert gradient.tolist() == [2 * (2 * number + 1), 2 * (2 * number + 2)]  # each process asks the same of a row


def test_weights_follow_the_gradient_of_all_processes_together(ranks):
    for number, rule in enumerate(("matched", "magnitude")):
        expected = adapted(None, rule=rule)
        assert max(expected.values()) > 1.1 * min(expected.values())
        for rank in ranks:
            assert rank[6][number] == pytest.approx(expected, rel=1e-6)
