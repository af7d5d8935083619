"""Statistics, image priors and schedule of inversion against the code its authors published."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faceless
from faceless.randomness import Rng
from faceless.recognizer import Output, Recognizer
from synth.generators.adversarial import alikeness, imbalance
from synth.inversion.deep_inversion import DeepInversion, annealed
from synth.inversion.priors import total_variation
from synth.inversion.statistics import BatchStatistics, batch_norms
from synth.inversion.targets import Sphere

pytestmark = pytest.mark.official

NVLABS = "NVlabs/DeepInversion"
FAST = "zju-vipa/Fast-Datafree"


def network(name: str, **options) -> Recognizer:
    """A small recognizer whose batch normalizations have seen something."""
    net = faceless.create(name, embedding_dim=16, input_size=32, **options).double().train()
    with torch.no_grad():
        for seed in range(3):
            net(pictures(seed, 8) * 100 + 128)
    return net.eval().requires_grad_(False)


def pictures(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def nvlabs(official):
    stubs = {"utils": type(torch)("utils"), "utils.utils": "utils/utils.py"}
    return official(NVLABS, "deepinversion.py", stubs)


@pytest.mark.parametrize("name", ["iresnet18", "slimresnet"])
@pytest.mark.parametrize("first", [1.0, 10.0])
def test_batch_statistics(nvlabs, parity, name, first):
    """Theirs knows 2-d layers only; the batch normalization of the embedding is ours to add."""
    net = network(name)
    norms = [layer for layer in batch_norms(net.backbone) if isinstance(layer.module, nn.BatchNorm2d)]
    hooks = [nvlabs.DeepInversionFeatureHook(layer.module) for layer in norms]

    def theirs(x):
        net(x * 100 + 128)
        scales = [first, *[1.0] * (len(hooks) - 1)]
        return sum(hook.r_feature * scale for hook, scale in zip(hooks, scales))

    def ours(x):
        with BatchStatistics(norms, first=first) as statistics:
            net(x * 100 + 128)
            return statistics.distance()

    parity(f"BN statistics {name}, first {first:g}", f"{NVLABS} deepinversion.py", ours, theirs, pictures(5))


def test_total_variation(nvlabs, parity):
    for which, name in enumerate(("absolute", "Euclidean")):
        parity(
            f"total variation, {name}",
            f"{NVLABS} deepinversion.py",
            lambda x, k=which: total_variation(x)[k],
            lambda x, k=which: nvlabs.get_image_prior_losses(x)[k],
            pictures(1),
        )


def test_whole_loss(nvlabs, parity):
    """Their sum (deepinversion.py, lines "combining losses"), for an embedding teacher."""
    net = network("slimresnet")
    inverter = DeepInversion(teacher=net, statistics=0.05, tv_l1=0.3, tv_l2=1e-2, l2=1e-2, repulsion=0.0, main=2.0)
    targets = Sphere().sample(Rng.of(0, "targets", range(6)), net).double()
    hooks = [nvlabs.DeepInversionFeatureHook(layer.module) for layer in batch_norms(net.backbone)]

    def theirs(x):
        seen = net(x * 127.5 + 127.5).embedding
        scales = [10.0, *[1.0] * (len(hooks) - 1)]
        statistics = sum(hook.r_feature * scale for hook, scale in zip(hooks, scales))
        absolute, euclidean = nvlabs.get_image_prior_losses(x)
        norm = torch.norm(x.view(6, -1), dim=1).mean()
        main = (1 - F.cosine_similarity(seen, targets)).mean()
        return 2 * main + 1e-2 * euclidean + 0.3 * absolute + 0.05 * statistics + 1e-2 * norm

    def ours(x):
        with BatchStatistics(inverter.layers, first=inverter.first) as statistics:
            return inverter.loss(x, targets, statistics)

    parity("DeepInversion, whole loss", f"{NVLABS} deepinversion.py", ours, theirs, pictures(2).clamp(-1, 1))


def test_learning_rate(official):
    policy = official(NVLABS, "utils/utils.py").lr_cosine_policy(1.0, 100, 2000)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for step in range(2000):
        policy(optimizer, step, step)
        assert abs(optimizer.param_groups[0]["lr"] - annealed(step, 2000)) < 1e-12


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_running_average_of_fast_datafree(official, parity, momentum):
    module = official(FAST, "datafree/hooks.py")
    net = network("slimresnet")
    norms = batch_norms(net.backbone)
    hooks = [module.DeepInversionHook(layer.module, momentum) for layer in norms]
    with BatchStatistics(norms, first=1.0, momentum=momentum) as statistics:

        def theirs(x):
            net(x)
            return sum(hook.r_feature for hook in hooks)

        def ours(x):
            net(x)
            return statistics.distance()

        for batch in range(4):
            x = pictures(batch) * 60 + 128
            parity(f"BN average {momentum:g}, batch {batch}", f"{FAST} datafree/hooks.py", ours, theirs, x)
            statistics.remember()
            for hook in hooks:
                hook.update_mmt()


def test_terms_of_fast_datafree(official, parity):
    """The sum of datafree/synthesis/generative.py, whose own class wants a folder of images and CUDA."""
    criterions = official(FAST, "datafree/criterions.py")
    random = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 20, 7, generator=random, dtype=torch.float64)
    e = torch.zeros(20, 1)
    source = f"{FAST} datafree/criterions.py"
    parity("DAFL balance", source, imbalance, criterions.class_balance_loss, teacher)
    for name, ours, theirs in (
        ("adversarial KL", "kl", lambda s: -criterions.kldiv(s, teacher)),
        ("adversarial L1 (DFAD)", "l1", lambda s: -F.l1_loss(s, teacher)),
    ):
        parity(name, source, lambda s, k=ours: alikeness(Output(e, s), Output(e, teacher), k), theirs, student)
    agreed = student.argmax(1) == teacher.argmax(1)

    def masked(s):  # datafree/synthesis/fast_meta.py
        mask = (s.max(1)[1] == teacher.max(1)[1]).double()
        return -(criterions.kldiv(s, teacher, reduction="none").sum(1) * mask).mean()

    assert agreed.any()
    ours = lambda s: alikeness(Output(e, s), Output(e, teacher), "kl", agreed)  # noqa: E731
    parity("adversarial KL where both agree", f"{FAST} datafree/synthesis/fast_meta.py", ours, masked, student)
