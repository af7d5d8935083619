import dataclasses

import pytest
import torch
from torch import nn

import faceless
from faceless.backbones.dlib_resnet import MEAN
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Recognizer, resize


class Pixels(nn.Module):
    """A backbone that returns what it was given."""

    embedding_dim = 3

    def forward(self, x):
        return x.mean((2, 3))


def faces(count, size=32):
    return Rng.of(0, "faces", range(count)).integers(256, 3, size, size).byte()


def small(**changes):
    return faceless.create("slimresnet", embedding_dim=8, input_size=32, widths=(8, 16), depths=(1, 1), **changes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalization_by_hand(dtype):
    images = faces(4).to(dtype)
    plain = Recognizer(Pixels(), InputSpec(32, 32))
    assert torch.allclose(plain.preprocess(images), (images.float() - 127.5) / 127.5, atol=1e-6)
    dlib = Recognizer(Pixels(), InputSpec(32, 32, mean=MEAN, std=(256,) * 3))
    expected = (images.float() - torch.tensor(MEAN).view(1, 3, 1, 1)) / 256
    assert torch.allclose(dlib.preprocess(images), expected, atol=1e-6)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    imagenet = Recognizer(Pixels(), InputSpec(32, 32, mean=mean, std=std, value_range=1.0, channel_order="BGR"))
    expected = (images.float().flip(1) / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.allclose(imagenet.preprocess(images), expected, atol=1e-5)


def test_resize_is_pillows_antialiased_bilinear():
    import numpy as np
    from PIL import Image

    image = faces(1, 90)
    ours = resize(image.float(), 32, 48)[0]
    for channel in range(3):
        pil = Image.fromarray(image[0, channel].numpy()).convert("F").resize((48, 32), Image.Resampling.BILINEAR)
        assert np.abs(ours[channel].numpy() - np.asarray(pil)).max() < 1e-2
    same = image.float()
    assert resize(same, 90, 90) is same


def test_a_linear_ramp_survives_resizing():
    ramp = torch.linspace(0, 255, 64).expand(1, 3, 64, 64).clone()
    inner = resize(ramp, 32, 32)[..., 2:-2]
    steps = inner.diff(dim=-1)
    assert torch.allclose(steps, steps.mean().expand_as(steps), atol=1e-3)


def test_gradients_reach_the_pixels():
    images = faces(2, 40).float().requires_grad_()
    small().eval()(images).embedding.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_features_are_the_named_outputs():
    net = small().eval()
    images = faces(3)
    out = net(images, features=("stem", "stages.1.0"))
    assert set(out.features) == {"stem", "stages.1.0"}
    assert torch.equal(out.features["stem"], net.backbone.stem(net.preprocess(images)))
    assert not net.backbone.stem._forward_hooks
    assert out.logits is None
    with pytest.raises(AttributeError):
        net(images, features=("no.such",))


def test_embed_is_unit_norm_batched_and_keeps_the_mode():
    net = small()
    images = faces(7)
    rows = net.embed(images, batch_size=3)
    assert net.training
    assert torch.allclose(rows.norm(dim=1), torch.ones(7), atol=1e-6)
    assert torch.allclose(rows, net.embed(images), atol=1e-6)
    assert net.embed(images[:0]).shape == (0, 8)
    with torch.no_grad():
        both = net.eval()(images).embedding + net(images.flip(-1)).embedding
    assert torch.allclose(net.embed(images, flip=True), nn.functional.normalize(both), atol=1e-6)
    assert torch.allclose(net.embed(images, flip=True), net.embed(images.flip(-1), flip=True), atol=1e-6)


def test_embeddings_may_be_used_in_a_loss():
    net = small()
    images = faces(4)
    target = net.embed(images)
    (net(images).embedding * target).sum().backward()  # fails on inference-mode tensors


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        small()(torch.zeros(shape))


@pytest.mark.parametrize(
    "change", [{"std": (1, 0, 1)}, {"channel_order": "GRB"}, {"height": 0}, {"mean": (1, 2)}, {"value_range": 0}]
)
def test_impossible_specs_are_refused(change):
    with pytest.raises(ValueError, match=r"InputSpec|channel_order"):
        dataclasses.replace(InputSpec(), **change)


def test_spec_goes_through_json():
    import json

    spec = InputSpec(64, 48, mean=MEAN, channel_order="BGR", framing="dlib")
    assert InputSpec(**json.loads(json.dumps(spec.asdict()))) == spec
