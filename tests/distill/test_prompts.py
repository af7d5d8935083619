"""Prompts in real Transformers of timm: what they change, what they leave alone, and what learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import faceless
from distill.losses.cross_architecture import URFM, PromptGuard
from distill.losses.embedding import CosineEmbedding
from distill.objective import Objective
from distill.prompts import PromptedAttention, PromptedTeacher, PromptedWindowAttention, Prompts
from distill.settings import Validation
from distill.sources import Batch
from distill.validation import Validator
from eval.efficiency import operations
from faceless.errors import InputError
from faceless.randomness import Rng

pytest.importorskip("timm")

NAMES = {"vit": ("test_vit", "model.blocks.5"), "swin": ("swin_tiny_patch4_window7_224", "model.layers.3")}


def network(kind: str) -> faceless.Recognizer:
    model, _ = NAMES[kind]
    size = 160 if kind == "vit" else 56
    return faceless.create("timm", model=model, embedding_dim=8, input_size=size, seed=0).eval()


def images(count: int = 2) -> torch.Tensor:
    return 255 * Rng.of(0, "faces", range(count)).uniform(3, 64, 64)


@pytest.mark.parametrize("kind", NAMES)
def test_without_its_prompts_a_teacher_is_what_it_was(kind: str) -> None:
    net = network(kind)
    layer = NAMES[kind][1]
    with torch.no_grad():
        before = net(images(), features=[layer])
        prompts = Prompts(tokens=5).into(net)
        after = net(images(), features=[layer, "prompted", "unprompted"])
    torch.testing.assert_close(after.features["unprompted"], before.embedding)
    assert torch.equal(after.features["prompted"], after.embedding)
    assert after.features[layer].shape == before.features[layer].shape
    assert (after.embedding - before.embedding).abs().max() > 1e-6
    assert (after.features[layer] - before.features[layer]).abs().max() > 1e-6  # that of the pass with prompts
    assert len(prompts) == sum(isinstance(m, PromptedAttention) for m in net.modules()) > 1
    assert all(p.shape[0] == 5 for p in prompts)
    counted = [operations(x, images(1)).macs for x in (network(kind), net)]
    assert counted[1] > counted[0]
    with pytest.raises(InputError, match=r"ViT or Swin of timm as teacher"):
        Prompts().into(faceless.create("slimresnet", embedding_dim=8, input_size=32))
    with pytest.raises(InputError, match=r"ViT or Swin of timm as teacher"):
        Prompts().into(faceless.create("timm", model="mobilenetv3_small_050", embedding_dim=8))
    with pytest.raises(InputError, match="tokens"):
        Prompts(tokens=0)


def test_prompts_are_keys_and_values_of_attention() -> None:
    """One head written out, for the attention of a ViT and for the shifted windows of a Swin."""
    from timm.models.swin_transformer import WindowAttention
    from timm.models.vision_transformer import Attention

    torch.manual_seed(0)
    x, prompts = torch.randn(6, 9, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    mask = torch.where(torch.rand(3, 9, 9) < 0.3, -100.0, 0.0).double()
    for kind, layer in (
        ("vit", Attention(4, num_heads=1, qkv_bias=True)),
        ("swin", WindowAttention(4, 1, window_size=(3, 3))),
    ):
        layer = layer.double().eval()
        if kind == "swin":
            torch.nn.init.normal_(layer.relative_position_bias_table)
        wrap = PromptedAttention if kind == "vit" else PromptedWindowAttention
        ours = wrap(layer, prompts)
        weight, bias = layer.qkv.weight.detach(), layer.qkv.bias.detach()
        for given in (None, mask) if kind == "swin" else (None,):
            found = ours(x) if given is None else ours(x, mask=given)
            for window in range(6):
                q, _, _ = (x[window] @ weight.T + bias).split(4, 1)
                _, k, v = (torch.cat((x[window], prompts)) @ weight.T + bias).split(4, 1)
                scores = q @ k.T / math.sqrt(4)
                if kind == "swin":
                    scores[:, :9] += layer._get_rel_pos_bias()[0, 0]
                    if given is not None:
                        scores[:, :9] += given[window % 3]
                expected = layer.proj(scores.softmax(1) @ v)
                torch.testing.assert_close(found[window], expected)
        ours.active = False
        torch.testing.assert_close(ours(x), layer(x))


@pytest.mark.parametrize("kind", NAMES)
def test_prompts_come_through_the_norm_of_their_layer(kind: str) -> None:
    net = network(kind)
    with torch.no_grad():
        plain = net(images()).embedding
        prompts = Prompts(tokens=5).into(net)
        fresh = net(images()).embedding
        for layer in (m for m in net.modules() if isinstance(m, PromptedAttention)):
            norms = layer.normed(layer.prompts).norm(dim=1)
            torch.testing.assert_close(norms, torch.full((5,), layer.prompts.shape[1] ** 0.5), atol=0, rtol=0.02)
        for p in prompts:
            p.mul_(50.0)
        larger = net(images()).embedding
        for p in prompts:
            p.neg_()
        turned = net(images()).embedding
    # The size of a prompt says nothing, its direction does.
    torch.testing.assert_close(larger, fresh, atol=0.02 * float((fresh - plain).abs().max()), rtol=0)
    assert (turned - fresh).abs().max() > 0.5 * (fresh - plain).abs().max()


def test_validation_asks_a_teacher_that_learns_each_time() -> None:
    net = network("vit")
    prompts = Prompts(tokens=5).into(net)
    faces = images(4).byte()
    objective = Objective({"cosine": CosineEmbedding()}, {"cosine": 1.0}, student_dim=8, teacher_dim=8)
    validator = Validator(Validation(faces=4, neighbors=2), faces, PromptedTeacher(net), objective, torch.device("cpu"))
    with torch.no_grad():
        for p in prompts:
            p.neg_()
    # A student that is what the teacher has become.
    assert validator(copy.deepcopy(net))["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_only_the_prompts_of_the_teacher_learn_and_the_guard_holds_them() -> None:
    def trained(guard: float) -> tuple[float, float]:
        """Mean squared difference of local features, and how far the teacher went, after some steps."""
        student = faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1), seed=0)
        net = network("vit")
        weights = {name: p.clone() for name, p in net.named_parameters()}
        prompts = Prompts(tokens=5).into(net)
        urfm = URFM(
            student_layer="stages.1", teacher_layer="model.blocks.5", centers=4, dim=16, heads=2, teacher_learns=True
        )
        objective = Objective(
            {"urfm": urfm, "guard": PromptGuard()},
            {"urfm": 1.0, "guard": guard},
            student_dim=8,
            teacher_dim=8,
        )
        objective.probe(student, net)
        teacher = PromptedTeacher(net, features=objective.teacher_features)
        optimizer = torch.optim.Adam(prompts.parameters(), 0.3)
        faces, batch = images(6), Batch(images(6), Rng.of(0, "view", range(6)))
        for _ in range(5):
            out, seen = student(faces, features=objective.student_features), teacher(faces, batch)
            loss, terms = objective(out, seen)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for name, p in net.named_parameters() if "prompts" not in name)
        for name, p in net.named_parameters():
            plain = name.replace("attention.", "")
            if "prompts" not in name:
                assert torch.equal(p, weights[plain])
        seen = teacher.see(faces)
        assert not seen.embedding.requires_grad
        return terms["urfm"].item(), 1 - F.cosine_similarity(seen.embedding, seen.features["unprompted"]).mean().item()

    free, held = trained(1e-9), trained(20.0)
    assert held[1] < 0.5 * free[1]
