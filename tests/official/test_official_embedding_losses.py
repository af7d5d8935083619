"""Embedding and relation losses against the code their authors published."""

from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill.losses.base import Loss
from distill.losses.contrastive import QUD
from distill.losses.features import AttentionTransfer, Hint
from distill.losses.relational import PKT, DarkRank, RKDAngle, RKDDistance, SimilarityPreserving
from faceless.recognizer import Output

pytestmark = pytest.mark.official

RKD = "lenscloth/RKD"
MDISTILLER = "megvii-research/mdistiller"


def embeddings(seed: int, batch: int = 32, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Student and teacher that are somewhat alike, float64."""
    random = torch.Generator().manual_seed(seed)
    T = torch.randn(batch, dim, generator=random, dtype=torch.float64)
    return 2 * T + 3 * torch.randn(batch, dim, generator=random, dtype=torch.float64), 5 * T


def of(loss: Loss, T: Tensor):
    return lambda S: loss(Output(S), Output(T))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rkd(official, monkeypatch):
    module = official(RKD, "metric/loss.py", {"metric": ModuleType("metric"), "metric.utils": "metric/utils.py"})

    class Functional:
        """The reduction's name changed in PyTorch 1.0."""

        normalize = staticmethod(F.normalize)

        @staticmethod
        def smooth_l1_loss(a: Tensor, b: Tensor, reduction: str) -> Tensor:
            assert reduction == "elementwise_mean"
            return F.smooth_l1_loss(a, b, reduction="mean")

    monkeypatch.setattr(module, "F", Functional)
    return module


def mdistiller(official, method: str) -> ModuleType:
    base = ModuleType("_base")
    base.Distiller = torch.nn.Module
    return official(MDISTILLER, f"mdistiller/distillers/{method}.py", {"._base": base})


@pytest.mark.parametrize("temperature", [0.1, 0.07])
def test_qud(official, parity, one_process, temperature):
    """Six batches, so that the ring of 128 wraps and random negatives give way to faces."""
    theirs = official("jankolf/QUD", "utils/buffer.py").BufferKD(64, 128, temperature).double()
    ours = QUD(embedding_dim=64, queue_size=128, temperature=temperature).double()
    ours.negatives.rows.copy_(theirs.queue.T)
    for step in range(6):
        S, T = embeddings(step)
        teacher = F.normalize(T)  # the class leaves normalization to its caller

        def published(student, teacher=teacher):
            logits, target = theirs(F.normalize(student), teacher)
            return F.cross_entropy(logits, target)

        parity(f"QUD, tau {temperature:g}, batch {step}", "jankolf/QUD utils/buffer.py", of(ours, T), published, S)
        torch.testing.assert_close(ours.negatives.rows, theirs.queue.T)


@pytest.mark.parametrize("update", ["simQ", "dissimQ"])
def test_qud_replacement(official, parity, one_process, update):
    """Batches of one face: with more, colliding faces are written in no fixed order there."""
    theirs = official("jankolf/QUD", "utils/buffer.py").BufferKD(16, 8, 0.1).double()
    theirs.queue_type, theirs.queue_full = update, False  # the class forgets to set the second
    ours = QUD(embedding_dim=16, queue_size=8, update=update).double()
    ours.negatives.rows.copy_(theirs.queue.T)
    for step in range(12):
        S, T = embeddings(step, 1, 16)

        def published(student, teacher=T):
            return F.cross_entropy(*theirs(F.normalize(student), F.normalize(teacher)))

        parity(f"QUD {update}, batch {step}", "jankolf/QUD utils/buffer.py", of(ours, T), published, S)
        torch.testing.assert_close(ours.negatives.rows, theirs.queue.T)


def test_rkd_distance(rkd, parity):
    S, T = embeddings(0)
    their = rkd.RkdDistance()
    parity("RKD-D", f"{RKD} metric/loss.py", of(RKDDistance(), T), lambda s: their(s, F.normalize(T)), S)


def test_rkd_angle(rkd, parity):
    S, T = embeddings(1)
    their = rkd.RKdAngle()
    parity("RKD-A", f"{RKD} metric/loss.py", of(RKDAngle(), T), lambda s: their(s, F.normalize(T)), S)


def test_rkd_weighted(official, parity):
    module = mdistiller(official, "RKD")
    S, T = embeddings(2)
    distance, angle = RKDDistance(normalized="none"), RKDAngle(normalized="none")

    def ours(student):
        return 25 * of(distance, T)(student) + 50 * of(angle, T)(student)

    parity("RKD 25:50", f"{MDISTILLER} RKD.py", ours, lambda s: module.rkd_loss(s, T), S)


@pytest.mark.parametrize(("alpha", "neighbors"), [(3, 4), (2, 4), (3, 10)])
def test_darkrank(rkd, parity, alpha, neighbors):
    S, T = embeddings(3)
    their = rkd.HardDarkRank(alpha=alpha, beta=3, permute_len=neighbors)
    parity(
        f"DarkRank alpha {alpha} L {neighbors}",
        f"{RKD} metric/loss.py",
        of(DarkRank(alpha=alpha, neighbors=neighbors), T),
        lambda s: their(F.normalize(s), F.normalize(T)),
        S,
    )


def test_pkt(official, parity):
    module = mdistiller(official, "PKT")
    S, T = embeddings(4)
    parity("PKT", f"{MDISTILLER} PKT.py", of(PKT(), T), lambda s: module.pkt_loss(s, T), S)


def test_similarity_preserving(official, parity):
    module = mdistiller(official, "SP")
    S, T = embeddings(5)
    parity("SP", f"{MDISTILLER} SP.py", of(SimilarityPreserving(), T), lambda s: module.similarity_loss(s, T), S)


def maps(seed: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(student, generator=random), torch.randn(teacher, generator=random)


def with_map(x: Tensor) -> Output:
    return Output(x.new_zeros(len(x), 4), features={"f": x})


def test_fitnets_hint(rkd, parity):
    S, T = maps(6, (8, 12, 7, 7), (8, 20, 7, 7))
    theirs, ours = rkd.FitNet(12, 20), Hint(student_layer="f", teacher_layer="f")
    ours.prepare(with_map(S), with_map(T))
    ours.adapter.weight.data.copy_(theirs.transform.weight.data)
    parity(
        "FitNets hint",
        f"{RKD} metric/loss.py",
        lambda s: ours(with_map(s), with_map(T)),
        lambda s: theirs(s, T),
        S,
        parameters=((ours.adapter.weight, theirs.transform.weight),),
    )


def test_attention_transfer(rkd, official, parity):
    S, T = maps(7, (8, 12, 7, 7), (8, 20, 7, 7))
    loss = AttentionTransfer(student_layer="f", teacher_layer="f")
    theirs = rkd.AttentionTransfer()
    parity("AT", f"{RKD} metric/loss.py", lambda s: loss(with_map(s), with_map(T)), lambda s: theirs(s, T), S)
    module = mdistiller(official, "AT")
    S, T = maps(8, (8, 12, 7, 7), (8, 20, 14, 14))
    parity(
        "AT, maps of two sizes",
        f"{MDISTILLER} AT.py",
        lambda s: loss(with_map(s), with_map(T)),
        lambda s: module.single_stage_at_loss(s, T, 2),
        S,
    )
