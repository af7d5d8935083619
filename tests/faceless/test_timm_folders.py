"""Folders that timm wrote for the hub: equal outputs, pixels as they say, and what is not read."""

import json

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng


def saved(folder, model="vit_tiny_patch16_224", classes=12, **options):
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=classes, **options).eval()
    save_for_hf(net, folder, safe_serialization=True)
    return net


@pytest.mark.parametrize(("model", "options"), [("vit_tiny_patch16_224", {"img_size": 32}), ("resnet10t", {})])
def test_equal_outputs_and_pixels_as_the_folder_says(tmp_path, model, options):
    theirs = saved(tmp_path / "net", model, **options)
    ours = faceless.load(tmp_path / "net")
    size = theirs.pretrained_cfg["input_size"][1] if model == "resnet10t" else 32
    assert (ours.name, ours.options) == ("timm", {"model": model, "embedding_dim": 12, "input_size": size})
    images = Rng.of(0, "faces", range(2)).integers(256, 3, size, size).byte()
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs((images / 255 - mean) / std)
        assert torch.allclose(ours(images).embedding, expected, atol=1e-5)
    again = faceless.load(faceless.save(ours, tmp_path / "again"))
    assert again.spec == ours.spec
    assert torch.equal(again(images).embedding, ours(images).embedding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:somebody/net"}, "timm has no model"),
        ({"num_classes": 0}, "has no classifier"),
        ({"num_classes": 13}, "does not fit timm: model.head.weight is"),
        ({"num_classes": 10**9}, "embedding_dim is 1000000000"),
        ({"model_args": {"act_layer": "os.system"}}, "model_args hold 'act_layer', which is not read"),
        ({"global_pool": "avg"}, "global_pool is 'avg'; vit_tiny_patch16_224 with 'token' is read"),
        ({"pretrained_cfg": {}}, "has no 'input_size'"),
        ({"pretrained_cfg": {"input_size": [1, 32, 32], "mean": [0] * 3, "std": [1] * 3}}, "squares of 3 channels"),
        ({"pretrained_cfg": {"input_size": 32, "mean": [0] * 3, "std": [1] * 3}}, "config.json: "),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0] * 3, "std": [0] * 3}}, "config.json: "),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9], "mean": [0] * 3, "std": [1] * 3}}, "config.json: "),
    ],
)
def test_foreign_settings_are_one_line(tmp_path, changes, message):
    saved(tmp_path / "net", img_size=32)
    file = tmp_path / "net/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message) as error:
        faceless.load(tmp_path / "net")
    assert "\n" not in str(error.value)


def test_weights_that_do_not_belong_there(tmp_path):
    net = saved(tmp_path / "net", img_size=32)
    file = tmp_path / "net/model.safetensors"
    for change, message in (
        (lambda state: state.pop("norm.weight"), "missing model.norm.weight"),
        (lambda state: state.update(more=torch.ones(1)), "unexpected model.more"),
        (lambda state: state["norm.bias"].fill_(float("nan")), "not finite"),
    ):
        state = {key: value.clone() for key, value in net.state_dict().items()}
        change(state)
        safetensors.torch.save_file(state, file)
        with pytest.raises(InputError, match=message):
            faceless.load(tmp_path / "net")
