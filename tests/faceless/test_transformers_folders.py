"""Folders that transformers wrote: equal outputs, its own preparation of pixels, and settings that could run code."""

import json

import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng

FACES = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()


def vit(folder):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=12,
        layer_norm_eps=1e-3,
        hidden_act="relu",
    )
    net = ViTForImageClassification(config).eval()
    net.save_pretrained(folder)
    return net


def swin(folder):
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    config.num_labels = 12
    net = SwinForImageClassification(config).eval()
    net.save_pretrained(folder)
    return net


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("build", [vit, swin])
def test_equal_outputs_and_pixels_as_the_processor_says(tmp_path, build):
    theirs = build(tmp_path / "net")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = {"image_mean": mean, "image_std": std, "rescale_factor": 1 / 255}
    (tmp_path / "net/preprocessor_config.json").write_text(json.dumps(processor))
    ours = faceless.load(tmp_path / "net")
    pixels = (FACES / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels).logits
        found = ours(FACES).embedding
    assert found.shape == (2, 12)
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-5)
    again = faceless.load(faceless.save(ours, tmp_path / "again"))
    assert torch.equal(again(FACES).embedding, ours(FACES).embedding)
    assert again.spec == ours.spec


@pytest.mark.parametrize("wrap", ["{}", "module.{}"])
def test_state_dicts_alone(tmp_path, wrap):
    theirs = vit(tmp_path / "net")
    torch.save({wrap.format(key): value for key, value in theirs.state_dict().items()}, tmp_path / "theirs.pth")
    numbers = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    config = {key: getattr(theirs.config, key) for key in (*numbers, "layer_norm_eps", "hidden_act")}
    ours = faceless.load(
        tmp_path / "theirs.pth", architecture="transformers", model="vit", config=config, input_size=32
    )
    with torch.no_grad():
        expected = theirs(pixel_values=(FACES - 127.5) / 127.5).logits
        assert torch.allclose(ours(FACES).embedding, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="does not fit transformers"):
        faceless.load(tmp_path / "theirs.pth", architecture="transformers", model="vit", input_size=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForImageClassification": "evil.Model"}}, "auto_map"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"hidden_act": "os.system"}, "hidden_act"),
        ({"hidden_act": "nonsense"}, "cannot build"),
        ({"model_type": "gpt2"}, "with no model 'gpt2'"),
        ({"hidden_size": 10**9}, "net"),
        ({"hidden_size": 64}, "numbers; vit with these settings has"),
        ({"layer_norm_eps": "1e-3"}, "layer_norm_eps"),
        ({"qkv_bias": False}, "does not fit"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"image_size": 10**6}, "pixels"),
        ({"patch_size": 0}, "cannot build"),
    ],
)
def test_hostile_settings_are_one_line(tmp_path, changes, message):
    vit(tmp_path / "net")
    edit(tmp_path / "net", **changes)
    with pytest.raises(InputError, match=message) as error:
        faceless.load(tmp_path / "net")
    assert "\n" not in str(error.value)


def test_damaged_settings(tmp_path):
    vit(tmp_path / "net")
    for text in ("{half", "[]", " " * (1 << 21)):
        (tmp_path / "net/config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json: not readable as JSON"):
            faceless.load(tmp_path / "net")


def test_unknown_models_and_names_in_settings():
    with pytest.raises(InputError, match="did you mean"):
        faceless.create("transformers", model="vitt")
    with pytest.raises(InputError, match="only numbers"):
        faceless.create("transformers", model="vit", config={"attn_implementation": "somebody/kernel"})
