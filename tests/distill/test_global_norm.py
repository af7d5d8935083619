"""Batch norm over processes equals PyTorch's on the whole batch: outputs, gradients and running statistics."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from distill.global_norm import globalize
from faceless.errors import InputError


def network() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, affine=False),
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    net = globalize(network(), torch.device("cpu"))
    x, target = (part[rank * 4 : rank * 4 + 4] for part in batch())
    out = net(x)
    (out - target).square().mean().backward()
    grads = [p.grad for p in net.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    torch.save([out.detach(), [g / 2 for g in grads], net.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    net = network()
    x, target = batch()
    out = net(x)
    (out - target).square().mean().backward()
    torch.testing.assert_close(torch.cat([found[0][0], found[1][0]]), out.detach(), atol=1e-12, rtol=1e-10)
    for rank in range(2):
        for mine, whole in zip(found[rank][1], net.parameters()):
            torch.testing.assert_close(mine, whole.grad, atol=1e-12, rtol=1e-10)
        for key, value in net.state_dict().items():
            if "num_batches" not in key:
                torch.testing.assert_close(found[rank][2][key], value, atol=1e-12, rtol=1e-10)


def test_one_process_is_untouched() -> None:
    net = network()
    assert globalize(net, torch.device("cpu")) is net
    assert type(net[1]) is nn.BatchNorm2d


class StrangeNorm(nn.BatchNorm2d):
    pass


def test_batch_norms_of_unknown_make_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.global_norm.processes", lambda: 2)
    with pytest.raises(InputError, match="0 is a StrangeNorm"):
        globalize(nn.Sequential(StrangeNorm(3)), torch.device("cpu"))


def test_activations_stay_where_pytorch_synchronizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.global_norm.processes", lambda: 2)
    net = network().eval()
    x = batch()[0]
    before = net(x)
    moved = globalize(net, torch.device("cuda"))
    assert type(moved[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(moved(x), before)
