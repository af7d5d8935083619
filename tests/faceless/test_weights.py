import inspect
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import faceless
from faceless import weights
from faceless.backbones import ARCHITECTURES
from faceless.errors import InputError
from faceless.files import sha256
from faceless.randomness import Rng
from faceless.recognizer import InputSpec


def faces(count, size=64):
    return Rng.of(0, "faces", range(count)).integers(256, 3, size, size).byte()


def shaken(recognizer):
    """Running statistics, scales and shifts unlike their initial values, so that a lost one shows."""
    for i, (key, tensor) in enumerate(recognizer.backbone.state_dict().items()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = Rng.of(i, key, range(1)).uniform(len(tensor), low=0.5, high=1.5)[0]
            tensor.copy_(noise)
    return recognizer.eval()


def small(**options):
    return shaken(faceless.create("mobilefacenet", embedding_dim=16, input_size=64, width=0.25, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilefacenet", {"embedding_dim": 16, "input_size": 64, "width": 0.25, "affine": True, "activation": "relu"}),
        ("slimresnet", {"embedding_dim": 16, "input_size": 48, "widths": (8, 16), "depths": (1, 2), "framing": "dlib"}),
        ("iresnet18", {"embedding_dim": 16, "input_size": 32}),
    ],
)
def test_saved_recognizers_come_back(tmp_path, name, options):
    net = shaken(faceless.create(name, **options))
    again = faceless.load(faceless.save(net, tmp_path / "student", {"teacher": "me"}))
    assert torch.equal(again(faces(3)).embedding, net(faces(3)).embedding)
    assert (again.name, again.spec, again.embedding_dim) == (name, net.spec, 16)
    assert not again.training
    assert again.source["record"] == {"teacher": "me"}
    assert again.source["sha256"] == sha256(tmp_path / "student" / "model.safetensors")
    trainable = [p.requires_grad for p in net.parameters()]
    assert [p.requires_grad for p in again.parameters()] == trainable
    for attempt in range(5):
        third = faceless.save(again, tmp_path / f"again{attempt}", {"teacher": "me"})
        for file in ("model.safetensors", "config.json", "README.md"):
            assert (third / file).read_bytes() == (tmp_path / "student" / file).read_bytes()


def test_saving_is_the_same_bytes_in_every_process(tmp_path):
    code = """if True:
        import sys, faceless
        net = faceless.create("slimresnet", embedding_dim=8, widths=(8, 16), depths=(1, 1), seed=3)
        faceless.save(net, sys.argv[1], {"b": 1, "a": {"d": 2, "c": [3]}})
    """
    for place in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / place)], check=True, cwd=Path(__file__).parents[2])
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_dlib_teacher_goes_through_a_folder(tmp_path):
    teacher = faceless.load("dlib-resnet29")
    again = faceless.load(faceless.save(teacher, tmp_path / "t"))
    assert torch.equal(again.embed(faces(2, 150)), teacher.embed(faces(2, 150)))
    assert (
        again.spec
        == teacher.spec
        == InputSpec(150, 150, mean=(122.782, 117.001, 104.298), std=(256, 256, 256), framing="dlib")
    )


def test_saved_files_are_plain_and_the_card_has_the_hubs_header(tmp_path):
    net = small()
    record = {"real_faces_in_training": False, "license": "cc0-1.0", "note": "```\n---\nlicense: evil"}
    folder = faceless.save(net, tmp_path / "s", record)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "mobilefacenet"
    assert config["embedding_dim"] == 16
    assert InputSpec(**config["input"]) == net.spec
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert sorted(state) == sorted(net.backbone.state_dict())
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc0-1.0"
    assert header["pipeline_tag"] == "image-feature-extraction"
    assert header["library_name"] == "faceless"
    assert "synthetic-data" in header["tags"]
    assert "No real face" in body
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in body
    plain = (faceless.save(net, tmp_path / "p") / "README.md").read_text()
    assert "synthetic-data" not in plain
    assert "No real face" not in plain


def test_weights_alone_are_enough_and_a_torn_save_still_loads(tmp_path):
    folder = faceless.save(small(), tmp_path / "s")
    (folder / "config.json").write_text("{half")
    assert torch.equal(faceless.load(folder).embed(faces(1)), small().embed(faces(1)))
    assert torch.equal(faceless.load(folder / "model.safetensors").embed(faces(1)), small().embed(faces(1)))


def test_loading_neither_uses_nor_changes_the_random_state(tmp_path):
    folder = faceless.save(small(), tmp_path / "s")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    faceless.load(folder)
    faceless.load("dlib-resnet29")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": True}])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()} | {"head.kernel": torch.ones(2)}},
        lambda s: {"epoch": 3, "state_dict_backbone": {f"module.{k}": v for k, v in s.items()}},
        lambda s: OrderedDict((f"module._orig_mod.{k}", v) for k, v in s.items()),
        lambda s: {f"student.backbone.net.{k}": v.half() for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
        lambda s: {"model": {"state_dict": s}},
    ],
)
def test_foreign_state_dicts(tmp_path, options, wrap):
    net = small(**options)
    state = {
        key: value.half().float() if value.is_floating_point() else value
        for key, value in net.backbone.state_dict().items()
    }
    net.backbone.load_state_dict(state)
    torch.save(wrap(state), tmp_path / "x.pth")
    found = faceless.load(tmp_path / "x.pth")
    assert torch.equal(found(faces(2)).embedding, net(faces(2)).embedding)
    assert found.spec == InputSpec(64, 64)
    assert found.source["sha256"] == sha256(tmp_path / "x.pth")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize(
    ("model", "size"), [("vit_tiny_patch16_224", 32), ("mobilenetv3_small_050", 64), ("resnet10t", 64)]
)
def test_state_dicts_of_timm(tmp_path, model, size, wrap):
    torch.manual_seed(0)
    theirs = timm.create_model(model, num_classes=24, **({"img_size": size} if model.startswith("vit") else {})).eval()
    torch.save(wrap(theirs.state_dict()), tmp_path / "theirs.pth")
    ours = faceless.load(tmp_path / "theirs.pth", architecture="timm", model=model, input_size=size)
    images = faces(2, size)
    with torch.no_grad():
        expected = theirs((images.float() - 127.5) / 127.5)
        assert torch.allclose(ours(images).embedding, expected, atol=1e-5)
    faceless.save(ours, tmp_path / "saved")
    again = faceless.load(tmp_path / "saved", architecture="timm")
    assert torch.equal(again.embed(images), ours.embed(images))
    with pytest.raises(InputError, match="takes no option 'architecture'"):
        faceless.load(tmp_path / "saved", architecture="ir18")
    with pytest.raises(InputError, match="does not fit timm: missing"):
        faceless.load(tmp_path / "theirs.pth", architecture="timm", model="resnet18", input_size=size)


@pytest.mark.parametrize(
    ("name", "options", "wrap"),
    [
        ("vit-t", {}, "module.{}"),
        ("vit-t", {"mask_token": False}, "{}"),
        ("cvlface-vit-small", {}, "model.net.{}"),
        ("cvlface-vit-base", {"keypoints": True}, "net.{}"),
    ],
)
def test_vits_are_recognized(name, options, wrap):
    with torch.device("meta"):
        state = faceless.create(name, embedding_dim=128, **options).backbone.state_dict()
    expected = {"mask_token": name == "vit-t", "keypoints": False} | options
    found = weights.recognize(weights.strip({wrap.format(key): value for key, value in state.items()}))
    assert found == (name, {"embedding_dim": 128, "input_size": 112, **expected})


@pytest.mark.parametrize(
    ("settings", "order"),
    [({"color_space": "BGR"}, "BGR"), ({"color_space": "RGB"}, "RGB"), ("BGR", "RGB"), (None, "RGB")],
)
def test_folders_of_cvlface_say_how_channels_are_ordered(tmp_path, settings, order):
    net = faceless.create("ir18", embedding_dim=8, input_size=16)
    state = {f"model.net.{key}": value for key, value in net.backbone.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["CVLFaceRecognitionModel"], "model_type": "", "conf": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = faceless.load(tmp_path)
    assert (found.name, found.spec.channel_order) == ("ir18", order)
    images = faces(2, 16)
    expected = net.embed(images if order == "RGB" else images.flip(1))
    assert torch.equal(found.embed(images), expected)


@pytest.mark.parametrize(("depth", "size"), [(18, 112), (18, 64), (34, 112)])
def test_iresnets_are_recognized(tmp_path, depth, size):
    net = shaken(faceless.create(f"iresnet{depth}", embedding_dim=32, input_size=size))
    safetensors.torch.save_file(net.backbone.state_dict(), tmp_path / "x.safetensors")
    found = faceless.load(tmp_path / "x.safetensors")
    assert (found.name, found.spec.height) == (f"iresnet{depth}", size)
    assert torch.equal(found(faces(1)).embedding, net(faces(1)).embedding)


def test_checkpoints_of_a_skd_are_recognized_and_want_bgr(tmp_path):
    net = shaken(faceless.create("cbam18", embedding_dim=8, input_size=32))
    torch.save({"iters": 3, "net_state_dict": net.backbone.state_dict()}, tmp_path / "Iter_000003_net.ckpt")
    found = faceless.load(tmp_path / "Iter_000003_net.ckpt")
    assert (found.name, found.spec.height, found.spec.channel_order) == ("cbam18", 32, "BGR")
    pixels = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    assert torch.equal(found(pixels.flip(1)).embedding, net(pixels).embedding)


def test_another_spec_may_be_given(tmp_path):
    torch.save(small().backbone.state_dict(), tmp_path / "x.pt")
    spec = InputSpec(64, 64, channel_order="BGR")
    found = faceless.load(tmp_path / "x.pt", spec=spec)
    assert found.spec == spec
    assert torch.equal(found(faces(2)).embedding, small()(faces(2).flip(1)).embedding)


def test_options_that_weights_do_not_tell(tmp_path):
    net = shaken(faceless.create("mixfacenet-xs", embedding_dim=8, input_size=64, shuffle=False))
    torch.save(net.backbone.state_dict(), tmp_path / "x.pth")
    assert torch.equal(faceless.load(tmp_path / "x.pth", shuffle=False)(faces(2)).embedding, net(faces(2)).embedding)
    assert not torch.equal(faceless.load(tmp_path / "x.pth")(faces(2)).embedding, net(faces(2)).embedding)
    torch.save(small().backbone.state_dict(), tmp_path / "y.pth")
    with pytest.raises(InputError, match="no option 'shuffle'"):
        faceless.load(tmp_path / "y.pth", shuffle=False)
    with pytest.raises(InputError, match="takes no option 'shuffle'"):
        faceless.load(faceless.save(small(), tmp_path / "s"), shuffle=False)
    saved = faceless.save(faceless.load(tmp_path / "x.pth"), tmp_path / "t")
    with pytest.raises(InputError, match="takes no option 'shuffle'"):
        faceless.load(saved, shuffle=False)
    with pytest.raises(InputError, match=r"onnx files and TensorFlow\.js graphs alone"):
        faceless.load(saved, runtime=True)


def test_code_in_a_file_is_named_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(ran)!r}, 'w')",))

    torch.save({"fc.weight": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: holds (\w+\.)?exec, which is code"):
        faceless.load(tmp_path / "x.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "y.pth")
    with pytest.raises(InputError, match=r"y\.pth: holds torch\.nn\.modules\.linear\.Linear"):
        faceless.load(tmp_path / "y.pth")
    (tmp_path / "z.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"z\.pth"):
        faceless.load(tmp_path / "z.pth")
    assert not ran.exists()


def state_with(change):
    state = dict(small().backbone.state_dict())
    change(state)
    return state


def nan(state):
    state["conv1.bn.weight"] = state["conv1.bn.weight"] * float("nan")


def endless():
    loop = {}
    loop["model"] = loop
    return loop


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: state_with(lambda s: s.pop("conv_3.model.1.project.bn.bias")),
            "missing conv_3.model.1.project.bn.bias",
        ),
        (lambda: state_with(lambda s: s.update(extra=torch.ones(1))), "unexpected extra"),
        (
            lambda: state_with(lambda s: s.update({"conv_5.model.0.conv.conv.weight": torch.ones(3)})),
            r"is \[3\] instead of",
        ),
        (lambda: state_with(nan), "conv1.bn.weight holds values that are not finite"),
        (lambda: state_with(lambda s: s.update(note="hello")), "'note' is not a plain tensor"),
        (lambda: {"weight": torch.ones(3)}, "of no network we know"),
        (dict, "holds a dict, not a state dict"),
        (lambda: [torch.ones(2)], "holds a list"),
        (lambda: torch.ones(2), "holds a Tensor"),
        (endless, "'model' is not a plain tensor"),
        (lambda: {"fc.weight": torch.ones(1).expand(10**9, 10**3)}, "not a plain tensor"),
        (lambda: {"fc.weight": torch.ones(2, 2).to_sparse()}, "not a plain tensor"),
        (lambda: {"fc.weight": torch.ones(2, 2, device="meta")}, "not a plain tensor"),
    ],
)
def test_wrong_state_dicts_are_one_line(tmp_path, content, message):
    torch.save(content(), tmp_path / "x.pt")
    with pytest.raises(InputError, match=message) as caught:
        faceless.load(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path))


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(100_000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match=r"not written by torch\.save"):
        faceless.load(tmp_path / "y.pt")


@pytest.mark.parametrize("suffix", [".pb", ".pkl", ""])
def test_unsupported_kinds_list_the_supported(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=r"are not read; \.pth \.pt .*, \.safetensors, .*\.dat"):
        faceless.load(tmp_path / f"model{suffix}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dlib-resnet28", "did you mean dlib-resnet29"),
        ("iresnet50", "comes without weights"),
        ("models/none.pth", "no such file or folder"),
        ("hf-hub:no-slash", "write hf-hub:owner/name"),
        ("hf-hub:../../etc", "write hf-hub:owner/name"),
    ],
)
def test_wrong_sources(source, message):
    with pytest.raises(InputError, match=message):
        faceless.load(source)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf-hub:faceless/nothing-here: could not be fetched from the hub"):
        faceless.load("hf-hub:faceless/nothing-here")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        faceless.load(tmp_path)


def test_recognizers_of_unknown_make_are_not_saved(tmp_path):
    stranger = faceless.recognizer.Recognizer(nn.Identity(), InputSpec())
    with pytest.raises(InputError, match="can be saved"):
        faceless.save(stranger, tmp_path / "s")


def slim(**options):
    return {"architecture": "slimresnet", "options": {"embedding_dim": 1, "input_size": 64, **options}}


def resave(path, change):
    """Rewrite the description inside a saved file."""
    with safetensors.safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["faceless"])
    state = safetensors.torch.load_file(path)
    config = change(config)
    safetensors.torch.save_file(state, path, {"faceless": config if isinstance(config, str) else json.dumps(config)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"input": c["input"] | {"height": 10**9}}, "description is damaged"),
        (lambda c: c | {"input": c["input"] | {"std": [1, float("nan"), 1]}}, "description is damaged"),
        (lambda c: "{", "description is damaged"),
        (lambda c: [], "description is damaged"),
        (lambda c: "[" * 100_000, "description is damaged"),
        (lambda c: c | {"options": {}}, "description is damaged"),
        (lambda c: c | {"input": {"height": -1}}, "description is damaged"),
        (lambda c: c | {"input": c["input"] | {"std": "abc"}}, "description is damaged"),
        (lambda c: c | {"architecture": "os.system"}, "there is no architecture"),
        (lambda c: c | {"options": c["options"] | {"width": 16}}, "does not fit mobilefacenet"),
        (lambda c: c | {"options": c["options"] | {"width": "1"}}, "mobilefacenet"),
        (lambda c: c | {"options": c["options"] | {"embedding_dim": 10**12}}, "embedding_dim is"),
        (lambda c: c | {"options": c["options"] | {"seed": 1}}, "has no option 'seed'"),
        (lambda c: c | {"options": c["options"] | {"name": 1}}, "model.safetensors"),
        (
            lambda c: c | slim(widths=[1e300], depths=[1]),
            r"slimresnet: option widths is \[1e\+300\]; give Sequence\[int\]",
        ),
        (lambda c: c | slim(depths=["a"] * 4), "slimresnet: option depths"),
        (lambda c: c | slim(depths=3), "slimresnet: option depths is 3"),
        (lambda c: c | slim(pool="no"), "slimresnet: option pool is 'no'; give bool"),
        (lambda c: c | slim(width=True), "slimresnet: option width is True; give float"),
    ],
)
def test_damaged_descriptions_are_one_line(tmp_path, change, message):
    folder = faceless.save(small(), tmp_path / "s")
    resave(folder / "model.safetensors", change)
    with pytest.raises(InputError, match=message):
        faceless.load(folder)


@pytest.mark.parametrize("name", faceless.names())
def test_options_of_another_type_are_named(name):
    for option in inspect.signature(ARCHITECTURES[name].build).parameters:
        if option not in ("embedding_dim", "input_size"):
            with pytest.raises(InputError, match=f"{name}: option {option} is b''; give "):
                faceless.create(name, **{option: b""})


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_input_errors_or_the_network(tmp_path, data):
    kind = data.draw(st.sampled_from([".pth", ".safetensors"]))
    original, file = tmp_path / f"original{kind}", tmp_path / f"damaged{kind}"
    if not original.exists():
        if kind == ".pth":
            torch.save(small().backbone.state_dict(), original)
        else:
            (faceless.save(small(), tmp_path / "s") / "model.safetensors").rename(original)
    content = bytearray(original.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            # Structure sits at both ends and the values between; most damage goes to the ends.
            at = data.draw(st.one_of(st.integers(0, 9000), st.integers(-9000, -1), st.integers(0, len(content) - 1)))
            content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        net = faceless.load(file)
    except InputError as error:
        assert str(error).startswith(str(file))
    else:
        assert net(faces(1)).embedding.shape == (1, net.embedding_dim)


def test_a_safetensors_header_cannot_ask_for_memory(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="not readable as safetensors"):
        faceless.load(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**62) + header)
    with pytest.raises(InputError, match="not readable as safetensors"):
        faceless.load(tmp_path / "x.safetensors")


def test_names_are_all_buildable():
    assert faceless.names() == sorted(weights.ARCHITECTURES)
    with torch.device("meta"):
        assert all(weights.ARCHITECTURES[name].build() for name in faceless.names())


class Callback:
    """What a trainer leaves in its checkpoints."""

    def __init__(self, folder: str):
        self.folder = folder


class Bomb:
    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return tempfile.mkdtemp, ("", "bomb", str(self.where))


def test_lightning_checkpoints_hold_more_than_weights_and_none_of_it_runs(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    net = faceless.create("ir18", embedding_dim=8, input_size=32)
    state = {f"model.{key}": value for key, value in net.backbone.state_dict().items()}
    extras = {"head.kernel": torch.zeros(8, 5), "head.t": torch.zeros(1)}
    content = {
        "state_dict": state | extras,
        "callbacks": {"best": Callback("runs")},
        "hyper_parameters": Bomb(made),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "adaface.ckpt")
    found = faceless.load(tmp_path / "adaface.ckpt")
    assert not list(made.iterdir())
    assert (found.name, found.spec.channel_order) == ("ir18", "BGR")
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    assert torch.equal(found(images.flip(1)).embedding, net.eval()(images).embedding)
    # Elsewhere, what is no weight is refused by its name.
    torch.save(content, tmp_path / "adaface.pt")
    with pytest.raises(InputError, match="which is code and not weights"):
        faceless.load(tmp_path / "adaface.pt")
    torch.save({"state_dict": {"model.x": Bomb(made)}}, tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match="not a plain tensor"):
        faceless.load(tmp_path / "odd.ckpt")
    assert not list(made.iterdir())
