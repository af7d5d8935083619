"""Losses that need labels or logits, and CRD, against the code their authors published."""

import types
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.adaptive_centers import AdaDistill, FrozenCenters
from distill.losses.contrastive import CRD
from distill.losses.logits import DKD, NKD, LogitKD
from distill.losses.margin import ArcFace, CosFace, SphereFace2
from faceless.recognizer import Output

pytestmark = pytest.mark.official

CLASSES, DIM = 50, 32
INSIGHTFACE = "recognition/arcface_torch/losses.py"
OPENSPHERE = "opensphere/module/head"
FDBTRS = "utils/losses.py"


def batch(seed: int, distinct: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    T = torch.randn(24, DIM, generator=random, dtype=torch.float64)
    S = 2 * T + 3 * torch.randn(24, DIM, generator=random, dtype=torch.float64)
    labels = torch.randperm(CLASSES, generator=random)[:24]
    return S, T, labels if distinct else labels % 9


@pytest.mark.parametrize(("head", "name", "arguments"), [(ArcFace, "ArcFace", {}), (CosFace, "CosFace", {"m": 0.35})])
def test_insightface_heads(official, parity, head, name, arguments):
    theirs = getattr(official("deepinsight/insightface", INSIGHTFACE), name)(**arguments)
    ours = head(embedding_dim=DIM, classes=CLASSES).double()
    S, T, labels = batch(0)

    def published(student):  # as partial_fc_v2 calls it
        cosines = F.linear(F.normalize(student), F.normalize(ours.centers)).clamp(-1, 1)
        return F.cross_entropy(theirs(cosines, labels), labels)

    parity(
        name,
        f"deepinsight/insightface {INSIGHTFACE.split('/')[-1]}",
        lambda s: ours(Output(s), Output(T), labels),
        published,
        S,
        parameters=((ours.centers, ours.centers),),
    )


@pytest.mark.parametrize(
    ("head", "file", "name"),
    [(ArcFace, "arcface", "ArcFace"), (CosFace, "cosface", "CosFace"), (SphereFace2, "sphereface2", "SphereFace2")],
)
def test_opensphere_heads(official, parity, head, file, name):
    module = official("ydwen/opensphere", f"{OPENSPHERE}/{file}.py", {".common": f"{OPENSPHERE}/common.py"})
    theirs = getattr(module, name)(DIM, CLASSES).double()
    ours = head(embedding_dim=DIM, classes=CLASSES).double()
    centers = theirs.w.detach()
    centers.copy_(F.normalize(centers))
    ours.centers.data.copy_(centers)
    parameters = []
    if name == "SphereFace2":
        assert ours.bias.item() == pytest.approx(theirs.b.item(), rel=1e-6)
        ours.bias.data.copy_(theirs.b[0])
        parameters = [(ours.bias, theirs.b)]
    S, T, labels = batch(1)
    parity(
        name,
        f"ydwen/opensphere {file}.py",
        lambda s: ours(Output(s), Output(T), labels),
        lambda s: theirs(s, labels),
        S,
        parameters=tuple(parameters),
    )
    # It takes w as unit where we normalize it: the gradients of the centers agree along the sphere.
    (gradient,) = torch.autograd.grad(ours(Output(S), Output(T), labels), ours.centers)
    (published,) = torch.autograd.grad(theirs(S, labels), theirs.w)
    published = published - (published * centers).sum(1, keepdim=True) * centers
    assert (gradient - published).abs().max() <= 1e-6 * published.abs().max()


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_adadistill(official, parity, kind):
    """Batches without duplicate labels, of which the published code keeps an arbitrary one."""
    module = official("fdbtrs/AdaDistill", FDBTRS)
    their_class = {"arc": module.AdaptiveAArcFace, "cos": module.AdaptiveACosFace}[kind]
    theirs = their_class(DIM, CLASSES, m=0.45).double()
    ours = AdaDistill(embedding_dim=DIM, classes=CLASSES, kind=kind).double()
    ours.centers.copy_(theirs.kernel.detach().T)
    for step in range(4):
        S, T, labels = batch(step, distinct=True)
        before, own = theirs.kernel.detach().clone(), ours.centers.clone()

        def published(student, T=T, labels=labels, before=before):
            theirs.kernel.data.copy_(before)
            return F.cross_entropy(theirs(student, T, labels)[0], labels)

        def mine(student, T=T, labels=labels, own=own):
            ours.centers.copy_(own)
            return ours(Output(student), Output(T), labels)

        parity(f"AdaDistill {kind} alpha', batch {step}", f"fdbtrs/AdaDistill {FDBTRS}", mine, published, S)
        torch.testing.assert_close(ours.centers, theirs.kernel.detach().T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kind", "name"), [("arc", "ArcFace"), ("cos", "CosFace")])
def test_frozen_centers(official, parity, kind, name):
    theirs = getattr(official("fdbtrs/AdaDistill", FDBTRS), name)(DIM, CLASSES, m=0.45).double()
    ours = FrozenCenters(embedding_dim=DIM, classes=CLASSES, kind=kind).double()
    ours.prime(theirs.kernel.detach().T)
    S, T, labels = batch(5)
    parity(
        f"{name[:3]}Distill",
        f"fdbtrs/AdaDistill {FDBTRS}",
        lambda s: ours(Output(s), Output(T), labels),
        lambda s: F.cross_entropy(theirs(s, labels), labels),
        S,
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("method", ["KD", "DKD"])
def test_mdistiller_logits(official, parity, method, temperature):
    base = ModuleType("_base")
    base.Distiller = torch.nn.Module
    module = official("megvii-research/mdistiller", f"mdistiller/distillers/{method}.py", {"._base": base})
    S, T, labels = batch(6)
    ours = LogitKD(temperature=temperature) if method == "KD" else DKD(temperature=temperature)

    def published(s):
        return (
            module.kd_loss(s, T, temperature)
            if method == "KD"
            else module.dkd_loss(s, T, labels, 1.0, 8.0, temperature)
        )

    parity(
        f"{method} T {temperature:g}",
        f"megvii-research/mdistiller {method}.py",
        lambda s: ours(Output(s, s), Output(T, T), labels),
        published,
        S,
    )


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0)])
def test_nkd(official, parity, gamma, temperature):
    registry = ModuleType("mmcls.registry")
    registry.MODELS = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stubs = {"mmcls": ModuleType("mmcls"), "mmcls.registry": registry}
    module = official("yzd-v/cls_KD", "mmcls/models/dis_losses/nkd.py", stubs)
    theirs = module.NKDLoss("nkd", True, temp=temperature, gamma=gamma)
    ours = NKD(gamma=gamma, temperature=temperature)
    S, T, labels = batch(7)
    parity(
        f"NKD gamma {gamma:g} T {temperature:g}",
        "yzd-v/cls_KD nkd.py",
        lambda s: ours(Output(s, s), Output(T, T), labels),
        lambda s: theirs(s, T, labels),
        S,
    )


def test_crd(official, parity):
    """Its memory has a row for each picture of a data set: 0-23 hold this batch's views, the next 100 are negatives."""
    module = official("HobbitLong/RepDistiller", "crd/criterion.py", {".memory": "crd/memory.py"})
    module.eps = 0.0  # 1e-7 in each of the 200 logarithms, which are stable without it here: 2.6e-6 of the loss
    pictures, m = 256, 100
    options = types.SimpleNamespace(s_dim=DIM, t_dim=DIM, feat_dim=16, nce_k=m, nce_t=0.07, nce_m=0.5, n_data=pictures)
    theirs = module.CRDLoss(options).double()
    ours = CRD(embedding_dim=DIM, feature_dim=16, size=m).double()
    for mine, their in ((ours.student_projection, theirs.embed_s), (ours.teacher_projection, theirs.embed_t)):
        mine.load_state_dict(their.linear.state_dict())
    S, T, _ = batch(8)
    views = [F.normalize(torch.randn(m, 16, dtype=torch.float64)) for _ in range(2)]
    ours.students.push(views[0])
    ours.teachers.push(views[1])
    contrast = theirs.contrast
    contrast.memory_v1[24 : 24 + m], contrast.memory_v2[24 : 24 + m] = views
    present = theirs.embed_s(S).detach(), theirs.embed_t(T).detach()
    rows = torch.arange(24)
    index = torch.cat((rows.unsqueeze(1), torch.arange(24, 24 + m).expand(24, -1)), 1)

    def published(student):
        contrast.memory_v1[:24], contrast.memory_v2[:24] = present
        return theirs(student, T, rows, index)

    pairs = ((ours.student_projection, theirs.embed_s.linear), (ours.teacher_projection, theirs.embed_t.linear))
    parity(
        "CRD",
        "HobbitLong/RepDistiller crd",
        lambda s: ours(Output(s), Output(T)),
        published,
        S,
        parameters=tuple((a.weight, b.weight) for a, b in pairs),
    )
