"""An online source under every resampling: the same for two processes as for one, and from any step on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from distill.sources import OnlineSource, Place
from faceless.recognizer import Output
from mining.resampling import ConfusedPairs, HardPool, Resampling, SynthDistillRule
from synth.generators.dcgan import DCGAN

STEPS = 6
RULES = {
    "synthdistill": lambda: SynthDistillRule(coefficient=0.5),
    "hard pool": lambda: HardPool(size=12, half_life=5),
    "confused pairs": lambda: ConfusedPairs(size=10, memory=20, half_life=5),
}


def online(rule: Resampling, rank: int = 0, processes: int = 1) -> OnlineSource:
    source = OnlineSource(generator=DCGAN(None, latent_dim=8, channels=4), resampling=rule)
    source.prepare(Place(seed=3, batch_size=8, rank=rank, processes=processes))
    return source


def judge(latents: Tensor) -> tuple[Output, Output]:
    """Two networks: of the latents, since pixels differ in their last bits between batch sizes."""
    weights = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    return Output((latents @ weights[0]).sin()), Output((latents @ weights[1]).cos())


def run(source: OnlineSource, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        batch = source.batch(step)
        assert batch.latents is not None
        assert len(batch.latents) == len(batch.images)
        found.append(batch.latents)
        source.feedback(batch, *judge(batch.latents))
    return found


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for name, make in RULES.items():
        source = online(make(), rank, 2)
        found[name] = run(source, range(STEPS)), source.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RULES)
def test_two_processes_draw_what_one_draws(ranks: list[dict], name: str) -> None:
    source = online(RULES[name]())
    whole = run(source, range(STEPS))
    for step in range(STEPS):
        parts = torch.cat([rank[name][0][step] for rank in ranks])
        torch.testing.assert_close(parts, whole[step], rtol=0, atol=1e-6)
    for key, value in source.state_dict().items():
        assert torch.equal(ranks[0][name][1][key], ranks[1][name][1][key])
        torch.testing.assert_close(ranks[0][name][1][key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_goes_on_with_the_same_faces(name: str, tmp_path: Path) -> None:
    first = online(RULES[name]())
    run(first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = online(RULES[name]())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(run(first, range(3, 9)), run(second, range(3, 9))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["hard pool", "confused pairs"])
def test_half_of_a_batch_is_revisited_and_half_is_fresh(name: str) -> None:
    found = run(online(RULES[name]()), range(4))
    fresh = OnlineSource(generator=DCGAN(None, latent_dim=8, channels=4))
    fresh.prepare(Place(seed=3, batch_size=8))
    for step, latents in enumerate(found):
        new = fresh.batch(step).latents
        assert new is not None
        assert torch.equal(latents[4:], new[4:])
        assert torch.equal(latents[:4], new[:4]) == (step == 0)
