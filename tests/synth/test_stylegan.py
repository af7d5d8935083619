"""StyleGAN against the papers' formulas written out, files as NVIDIA and rosinality write them, and what is refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from faceless import align
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.restricted_pickle import Call
from synth.generators import stylegan_files
from synth.generators.stylegan import StyleGAN, synthdistill_box, template_grid
from synth.generators.stylegan_networks import (
    Layer3Config,
    MappingConfig,
    StyleGAN2Config,
    StyleGAN3Config,
    StyleGANNetwork,
)

ROOT = Path(__file__).resolve().parents[2]
W = 12


# --- Files as their authors' code writes them -------------------------------------------------------------------------


class Persistent:
    """Pickles as NVIDIA's decorated modules do: a call of their loader with source code and state."""

    source = "import os; os.system('touch executed')"

    def __init__(self, name, tensors=(), children=(), **facts):
        none = {key: {} for key in ("_backward_hooks", "_forward_hooks")}
        self.state = none | {"_parameters": dict(tensors), "_buffers": {"unused": None}, "_modules": dict(children)}
        self.state |= {"training": False, "_init_args": (), "_init_kwargs": {}} | facts
        self.name = name

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """The module whose loader the pickles name; it exists only while they are written, and it is not called."""
    persistence = ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def linear(inputs, outputs, **facts):
    return Persistent(
        "FullyConnectedLayer", {"weight": torch.randn(outputs, inputs), "bias": torch.randn(outputs)}, **facts
    )


def stylegan2(path, channels=(8, 6), classes=0, clamp=None, architecture="skip", activation="lrelu", source=None):
    """A pickle of a random StyleGAN2, and its tensors by name."""
    torch.manual_seed(0)
    taps = torch.tensor([1.0, 3, 3, 1])
    blur = torch.outer(taps, taps) / 64
    embed = {"embed": linear(classes, W, activation="linear", bias_gain=1)} if classes else {}
    facts = {"activation": activation, "bias_gain": 0.01}
    mapping = {"fc0": linear(10 + W * bool(classes), W, **facts), "fc1": linear(W, W, **facts)}
    for layer in mapping.values():
        layer.state["_parameters"]["weight"] *= 100
    blocks = {}
    for i, (before, after) in enumerate(zip((channels[0], *channels), channels)):
        side, convolutions = 4 << i, {}
        for name in ("conv0", "conv1")[not i :]:
            inputs = before if name == "conv0" else after
            tensors = {"weight": torch.randn(after, inputs, 3, 3), "bias": torch.randn(after) * 0.3}
            tensors |= {
                "noise_strength": torch.randn(()),
                "noise_const": torch.randn(side, side),
                "resample_filter": blur,
            }
            facts = {"activation": activation, "conv_clamp": clamp, "up": 1 + (name == "conv0")}
            affine = linear(W, inputs, activation="linear")
            convolutions[name] = Persistent("SynthesisLayer", tensors, {"affine": affine}, **facts)
        tensors = {"weight": torch.randn(3, after, 1, 1), "bias": torch.randn(3)}
        convolutions["torgb"] = Persistent("ToRGBLayer", tensors, {"affine": linear(W, after)}, conv_clamp=clamp)
        const = {"const": torch.randn(after, 4, 4)} if not i else {}
        blocks[f"b{side}"] = Persistent(
            "SynthesisBlock", const | {"resample_filter": blur}, convolutions, architecture=architecture
        )
    parts = {
        "synthesis": Persistent("SynthesisNetwork", (), blocks),
        "mapping": Persistent("MappingNetwork", {"w_avg": torch.randn(W)}, embed | mapping),
    }
    network = Persistent("Generator", (), parts)
    if source is not None:
        network.source = source
    path.write_bytes(pickle.dumps({"G": None, "D": None, "G_ema": network, "augment_pipe": None}))
    return names(network)


def names(module, prefix=""):
    found = {prefix + key: value.double() for key, value in module.state["_parameters"].items()}
    for key, child in module.state["_modules"].items():
        found |= names(child, f"{prefix}{key}.")
    return found


def dense(x, raw, name, lr=1.0, active=False):
    y = x @ raw[f"{name}.weight"].T * (lr / raw[f"{name}.weight"].shape[1] ** 0.5) + raw[f"{name}.bias"] * lr
    return F.leaky_relu(y, 0.2) * 2**0.5 if active else y


def written_out_mapping(raw, z, c=None):
    unit = lambda x: x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()  # noqa: E731
    x = unit(z)
    if c is not None:
        x = torch.cat((x, unit(dense(c, raw, "mapping.embed"))), 1)
    for i in range(2):
        x = dense(x, raw, f"mapping.fc{i}", 0.01, active=True)
    return x


def enlarged(x, taps):
    """Twice the size, with zeros between the pixels filled by a filter: along each axis as SciPy does it."""
    y = x.numpy()
    for axis in (-2, -1):
        y = scipy.signal.upfirdn(2 * taps / taps.sum(), y, up=2, axis=axis)
        y = np.take(y, range(1, 1 + 2 * x.shape[axis]), axis=axis)
    return torch.from_numpy(y)


def written_out2(raw, ws, noise, clamp=None, sides=(4, 8)):
    """CVPR 2020, one sample and one kernel at a time."""
    taps, images = np.array([1.0, 3, 3, 1]), []
    for b, rows in enumerate(ws):
        x, image, row = raw["synthesis.b4.const"][None], None, 0
        for side in sides:
            for conv in ("conv0", "conv1")[side == 4 :]:
                name = f"synthesis.b{side}.{conv}"
                weight = raw[f"{name}.weight"] * dense(rows[row : row + 1], raw, f"{name}.affine")[0][:, None, None]
                weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
                if conv == "conv0":
                    # Enlarging, filtering and convolving commute but for the border, where pixels beyond count as 0.
                    padded = F.pad(x, (4, 4, 4, 4))
                    x = F.conv2d(enlarged(padded, taps), weight.flip(2, 3), padding=1)[:, :, 8:-8, 8:-8]
                else:
                    x = F.conv2d(x, weight, padding=1)
                if noise is not None:
                    x = x + noise(b, name) * raw[f"{name}.noise_strength"]
                x = F.leaky_relu(x + raw[f"{name}.bias"][:, None, None], 0.2) * 2**0.5
                x = x if clamp is None else x.clamp(-clamp, clamp)
                row += 1
            name = f"synthesis.b{side}.torgb"
            style = dense(rows[row : row + 1], raw, f"{name}.affine")[0] / x.shape[1] ** 0.5
            rgb = F.conv2d(x, raw[f"{name}.weight"] * style[:, None, None]) + raw[f"{name}.bias"][:, None, None]
            rgb = rgb if clamp is None else rgb.clamp(-clamp, clamp)
            image = rgb if image is None else enlarged(image, taps) + rgb
        images.append(image)
    return torch.cat(images)


@pytest.mark.parametrize("clamp", [None, 1.0])
def test_stylegan2_is_what_the_paper_says(tmp_path, clamp):
    raw = stylegan2(tmp_path / "net.pkl", clamp=clamp)
    net = StyleGAN(tmp_path / "net.pkl", space="z")
    z = net.sample_latents(3, Rng.of(0, "test", range(3)))
    w = written_out_mapping(raw, z.double())
    ws = torch.stack((w, w * 0.5, w, -w), 1)
    torch.testing.assert_close(net.styles(z)[:, 0].double(), w, atol=1e-5, rtol=1e-5)
    for mode, noise in (("const", lambda b, name: raw[f"{name}.noise_const"]), ("none", None)):
        expected = written_out2(raw, ws, noise, clamp)
        torch.testing.assert_close(net.network.synthesis(ws.float(), mode).double(), expected, atol=1e-4, rtol=1e-4)
    if clamp is None:
        expected = written_out2(raw, w.unsqueeze(1).expand(-1, 4, -1), lambda b, name: raw[f"{name}.noise_const"])
        faces = (expected * 127.5 + 127.5).clamp(0, 255)
        torch.testing.assert_close(net.synthesize(z).double(), faces, atol=0.02, rtol=0)


def test_classes(tmp_path):
    raw = stylegan2(tmp_path / "net.pkl", classes=3)
    net = StyleGAN(tmp_path / "net.pkl", space="z")
    latents = net.sample_latents(40, Rng.of(0, "test", range(40)))
    z, c = latents[:, :10], latents[:, 10:]
    assert latents.shape[1] == 13 and torch.equal(c.sum(1), torch.ones(40)) and (c.sum(0) > 3).all()
    w = written_out_mapping(raw, z.double(), c.double())
    torch.testing.assert_close(net.styles(latents)[:, 1].double(), w, atol=1e-5, rtol=1e-5)
    assert (net.perturb(latents, torch.ones(40), Rng.of(1, "t", range(40)))[:, 10:] == c).all()
    fixed = StyleGAN(tmp_path / "net.pkl", label=2).sample_latents(4, Rng.of(0, "test", range(4)))
    expected = written_out_mapping(raw, z[:4].double(), torch.eye(3)[[2] * 4].double())
    torch.testing.assert_close(fixed.double(), expected, atol=1e-5, rtol=1e-5)


# --- StyleGAN3 --------------------------------------------------------------------------------------------------------


def layer3(**changes):
    plain = {"channels": 5, "in_size": 12, "out_size": 14, "kernel": 3, "up": 4, "down": 2, "up_taps": 24}
    plain |= {"down_taps": 12, "radial": False}
    plain |= changes
    total = (plain["out_size"] - 1) * plain["down"] + 1 - (plain["in_size"] + plain["kernel"] - 1) * plain["up"]
    total += plain["up_taps"] + plain["down_taps"] - 2
    low = (total + plain["up"]) // 2
    return Layer3Config(**plain, padding=(low, total - low))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kernel": 1, "radial": True}, {"up": 2, "up_taps": 12, "in_size": 20, "out_size": 16}, {"out_size": 30}],
)
def test_filters_around_the_nonlinearity_are_those_of_scipy(changes):
    """Resampling of one layer, along each axis by SciPy; the radial filter by a plain convolution."""
    from synth.generators.stylegan_networks import Layer3

    torch.manual_seed(0)
    config = layer3(**changes)
    layer = Layer3(4, W, config, None)
    layer.up_filter.copy_(torch.randn(config.up_taps))
    layer.down_filter.copy_(torch.randn_like(layer.down_filter))
    x = torch.randn(2, 5, *[config.in_size + config.kernel - 1] * 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        large, small = layer.enlarge(x), layer.shrink(layer.enlarge(x))
    low, high = config.padding
    y = np.zeros((2, 5, *[config.up * x.shape[2]] * 2))
    y[:, :, :: config.up, :: config.up] = x.numpy()  # zeros between the pixels
    y = np.pad(y, [(0, 0), (0, 0), (max(low, 0), max(high, 0)), (max(low, 0), max(high, 0))])
    cut = slice(max(-low, 0), y.shape[2] - max(-high, 0))
    y = y[:, :, cut, cut]
    for axis in (2, 3):
        y = scipy.signal.upfirdn(layer.up_filter.double().numpy(), y, axis=axis)
        y = np.take(y, range(config.up_taps - 1, y.shape[axis] - config.up_taps + 1), axis=axis)
    np.testing.assert_allclose(large.numpy(), y, atol=1e-4)
    down = layer.down_filter.double()
    down = down if config.radial else torch.outer(down, down)
    y = F.conv2d(torch.from_numpy(y).flatten(0, 1)[:, None], down.flip(0, 1)[None, None], stride=config.down)
    assert y.shape[2:] == (config.out_size, config.out_size)
    np.testing.assert_allclose(small.flatten(0, 1).numpy(), y[:, 0].numpy(), atol=1e-3)


def small3(radial=False):
    mapping = MappingConfig(10, 0, W, 0, (W, W))
    layers = [layer3(radial=radial), layer3(in_size=14, out_size=16, up=2, up_taps=12)]
    last = Layer3Config(3, 16, 12, 1, 1, 1, 1, 1, False, (-2, -2))
    return StyleGAN3Config(mapping, 6, 4.0, 1.5, (*layers, last), 256.0, 0.25)


def random_folder(folder, config, licence="CC0-1.0"):
    """A converted folder of random weights."""
    torch.manual_seed(0)
    network = StyleGANNetwork(config).eval().requires_grad_(False)
    for name, value in network.named_buffers():
        if "filter" in name:
            value.uniform_().div_(value.sum() / (3 if "up" in name else 1))
        elif name.endswith("noise"):
            value.normal_()
    for name, value in network.named_parameters():
        if name.endswith("strength"):
            value.fill_(0.5)
    source = {"file": "test.pkl", "sha256": "0" * 64, "format": "test"}
    return stylegan_files.save(stylegan_files.Weights(network, "", source, licence), folder)


def small2(channels=(8, 8, 6)):
    return StyleGAN2Config(MappingConfig(10, 0, W, 0, (W, W)), channels, None)


@pytest.fixture(params=["stylegan2", "stylegan3", "stylegan3 radial"])
def folder(request, tmp_path):
    config = small2() if request.param == "stylegan2" else small3(radial="radial" in request.param)
    return random_folder(tmp_path / "net", config)


def draw(net, count=5):
    return net.sample_latents(count, Rng.of(0, "test", range(count)))


def test_any_batch_split_and_memory_mode_gives_the_same_faces(folder):
    net = StyleGAN(folder)
    latents = draw(net)
    whole = net.synthesize(latents)
    assert whole.shape == (5, 3, net.face_size, net.face_size) and whole.min() >= 0 and whole.max() <= 255
    assert whole.std(0).mean() > 1
    parts = torch.cat([net.synthesize(part) for part in latents.split(2)])
    torch.testing.assert_close(whole, parts, atol=2e-3, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(whole, net.synthesize(latents), atol=2e-3, rtol=0)
    # Where a gradient is wanted nothing is overwritten.
    leaf = latents.clone().requires_grad_()
    faces = net.synthesize(leaf)
    torch.testing.assert_close(whole, faces.detach(), atol=2e-3, rtol=0)
    faces.sum().backward()
    assert leaf.grad.abs().sum(1).gt(0).all()
    torch.testing.assert_close(whole, net.synthesize(latents), atol=0, rtol=0)


def test_gradients_are_those_of_finite_differences(folder):
    net = StyleGAN(folder)
    ws = net.styles(draw(net)).double()[:1]
    net.double()
    weights = torch.randn(3, net.face_size, net.face_size, dtype=torch.float64)
    step = torch.randn_like(ws) * 1e-6
    leaf = ws.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net.network.synthesis(leaf) * weights).sum(), leaf)
    ends = [(net.network.synthesis(ws + sign * step) * weights).sum() for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=1e-3, abs=1e-8)


# --- Latents ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    folder = random_folder(tmp_path / "two", small2())
    net = StyleGAN(folder)
    net.network.mapping.w_avg.normal_()
    return stylegan_files.save(
        stylegan_files.Weights(net.network, "", {"file": "t", "sha256": "0", "format": "t"}, "CC0-1.0"), folder
    )


def test_spaces_give_the_same_faces(two):
    z = draw(StyleGAN(two, space="z"))
    faces = StyleGAN(two, space="z", truncation=0.5).synthesize(z)
    for space in ("w", "w+"):
        net = StyleGAN(two, space=space, truncation=0.5)
        torch.testing.assert_close(net.synthesize(draw(net)), faces, atol=2e-3, rtol=0)
    assert StyleGAN(two, space="w+").latent_shape == (6 * W,)


def test_truncation_and_cutoff(two):
    plain = StyleGAN(two, space="w+")
    mean, w = plain.network.mapping.w_avg, draw(plain).view(5, 6, W)
    cut = StyleGAN(two, space="w+", truncation=0.3, cutoff=4)
    expected = torch.cat((mean + 0.3 * (w[:, :4] - mean), w[:, 4:]), 1)
    torch.testing.assert_close(draw(cut).view(5, 6, W), expected)
    torch.testing.assert_close(StyleGAN(two, space="z", truncation=0.3, cutoff=4).styles(
        draw(StyleGAN(two, space="z"))), expected)  # fmt: skip


def test_mixing_takes_later_rows_from_a_second_draw(two):
    rng = Rng.of(0, "test", range(300))
    plain = StyleGAN(two, space="w+").sample_latents(300, rng).view(300, 6, W)
    rows = StyleGAN(two, space="w+", mixing=0.7).sample_latents(300, rng).view(300, 6, W)
    own = (rows == plain).all(2)
    assert own[:, 0].all() and 0.6 < (~own[:, -1]).float().mean() < 0.8
    first = own.sum(1)
    assert set(first.tolist()) == {1, 2, 3, 4, 5, 6}
    assert (own == (torch.arange(6) < first[:, None])).all()  # one change at most
    one = rows[own[:, 0] & (first == 2)][0]
    assert (one[2:] == one[2]).all() and not torch.equal(one[2], one[0])


def test_random_noise_belongs_to_the_latent(two):
    net = StyleGAN(two, noise="random")
    latents = draw(net)
    assert latents.shape == (5, W + 1)
    faces = net.synthesize(latents)
    torch.testing.assert_close(net.synthesize(latents.flip(0)).flip(0), faces, atol=2e-3, rtol=0)
    torch.testing.assert_close(net.synthesize(latents[2:3]), faces[2:3], atol=2e-3, rtol=0)
    same = latents[:1].repeat(2, 1)
    same[1, -1] = latents[1, -1]
    assert (net.synthesize(same)[0] - net.synthesize(same)[1]).abs().mean() > 1
    fields = net._noise_fields(Rng.of(0, "n", range(64)).uniform())
    assert [tuple(field.shape[2:]) for field in fields] == [(4, 4), (8, 8), (8, 8), (16, 16), (16, 16)]
    every = torch.cat([field.flatten() for field in fields])
    assert every.mean().abs() < 0.02 and abs(every.std() - 1) < 0.02
    halves = net.synthesize(latents.half().float())  # a corpus may store latents in half precision
    torch.testing.assert_close(halves, net.synthesize(latents.half().float()), atol=0, rtol=0)


@pytest.mark.parametrize("space", ["z", "w", "w+"])
def test_perturbation_has_the_scale_asked_for(two, space):
    net = StyleGAN(two, space=space, noise="random")
    latents = draw(net, 200)
    scale = torch.linspace(0, 2, 200)
    moved = net.perturb(latents, scale, Rng.of(1, "test", range(200)))
    step = (moved - latents)[:, :-1]
    assert torch.equal(step[0], torch.zeros_like(step[0]))
    assert (step[100:] / scale[100:, None]).std() == pytest.approx(1, rel=0.1)
    assert (moved[:, -1] != latents[:, -1]).float().mean() > 0.95
    if space == "w+":
        rows = step.view(200, 6, W)
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), atol=1e-6, rtol=0)


def test_latents_do_not_depend_on_the_batch(two):
    net = StyleGAN(two, space="w+", mixing=0.5, noise="random")
    whole = draw(net, 6)
    alone = net.sample_latents(1, Rng.of(0, "test", [4]))
    torch.testing.assert_close(whole[4:5], alone, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="3 latents from random numbers for 2"):
        net.sample_latents(3, Rng.of(0, "test", range(2)))
    with pytest.raises(ValueError, match=r"latents are \[B, 73\]"):
        net.synthesize(whole[:, 1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff": 3}, "cutoff truncates some rows"),
        ({"mixing": 0.5}, r"needs space w\+"),
        ({"space": "w+", "mixing": 1.5}, "mixing is 1.5"),
        ({"space": "z", "cutoff": 7}, "cutoff is 7; this network has 6 rows"),
        ({"label": 0}, "has no classes"),
        ({"crop_size": 96}, "crop is none"),
        ({"crop": "synthdistill", "crop_size": 96}, "SynthDistill's box is 112"),
        ({"crop": "dlib", "crop_size": 4}, "from 16 to 2048"),
    ],
)
def test_contradicting_settings_are_refused(two, settings, message):
    with pytest.raises(InputError, match=message):
        StyleGAN(two, **settings)


def test_stylegan3_has_no_noise(tmp_path):
    with pytest.raises(InputError, match="StyleGAN3 has no noise"):
        StyleGAN(random_folder(tmp_path / "net", small3()), noise="random")


# --- Crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "box"), [(256, (21, 234, 22, 235)), (512, (42, 471, 43, 472)), (1024, (84, 942, 86, 944))]
)
def test_box_of_synthdistill(side, box):
    """The slices that its code takes."""
    assert synthdistill_box(side) == box


@pytest.mark.parametrize("framing", ["arcface", "dlib"])
@pytest.mark.parametrize("side", [64, 256, 1024])
def test_template_crop_is_an_aligned_crop_of_the_mean_face(framing, side):
    points = torch.tensor([(192.98, 239.95), (318.90, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15)])
    points = ((points + 0.5) * side / 512 - 0.5).unsqueeze(0)
    image = F.interpolate(torch.rand(1, 3, 16, 16) * 255, (side, side), mode="bicubic")
    grid, halvings = template_grid(side, framing, 112)
    expected = align.crop(image, points, framing, 112, scheme="arcface5", border="border")
    for _ in range(halvings):
        image = F.avg_pool2d(image, 2)
    found = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(("crop", "size"), [("arcface", None), ("dlib", 150), ("synthdistill", None)])
def test_crops_of_a_generator(two, crop, size):
    net = StyleGAN(two, crop=crop, crop_size=size)
    assert net.face_size == (size or 112)
    faces = net.synthesize(draw(net))
    assert faces.shape == (5, 3, net.face_size, net.face_size)
    whole = StyleGAN(two).synthesize(draw(net))
    top, bottom, left, right = synthdistill_box(16)
    if crop == "synthdistill":
        box = whole[:, :, top:bottom, left:right]
        expected = F.interpolate(box, (112, 112), mode="bilinear", align_corners=False)
        torch.testing.assert_close(faces, expected, atol=2e-3, rtol=0)
    leaf = draw(net).requires_grad_()
    net.synthesize(leaf).sum().backward()
    assert leaf.grad.abs().max() > 0


# --- Conversion -------------------------------------------------------------------------------------------------------


def test_conversion_keeps_the_faces_and_gives_the_same_bytes(tmp_path):
    stylegan2(tmp_path / "net.pkl")
    line = [sys.executable, str(ROOT / "synth/convert.py"), "net.pkl", "folder", "--licence", "CC0-1.0"]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "StyleGAN2 at 8 x 8, from a NVIDIA pickle" in done.stdout
    net, converted = StyleGAN(tmp_path / "net.pkl"), StyleGAN(tmp_path / "folder")
    latents = draw(net)
    assert torch.equal(net.synthesize(latents), converted.synthesize(latents))
    record = converted.provenance()
    assert record["licence"] == "CC0-1.0" and record["converted_from"]["sha256"] == net.weights_sha256
    first = (tmp_path / "folder/model.safetensors").read_bytes()
    stylegan_files.save(stylegan_files.load(tmp_path / "folder"), tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == first
    assert json.loads((tmp_path / "folder/config.json").read_text())["family"] == "stylegan2"


def test_conversion_asks_for_the_licence(tmp_path):
    from synth import convert

    stylegan2(tmp_path / "net.pkl")
    with pytest.raises(InputError, match=r"net\.pkl: its licence.*--licence"):
        convert.main(["net.pkl", "folder"])
    assert not (tmp_path / "folder").exists()


def test_corpus_is_written_with_it(two, tmp_path):
    from synth.corpus import Corpus
    from synth.generate import generate, read_settings

    init = {"weights": str(two), "noise": "random", "crop": "dlib", "crop_size": 32}
    recipe = {"generator": {"class_path": "synth.generators.stylegan.StyleGAN", "init_args": init}, "align": None}
    recipe |= {"count": 6, "block": 4, "batch": 2, "workers": 0, "image_format": "png", "output": str(tmp_path / "c")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    generate(read_settings(["--config", str(tmp_path / "recipe.yaml")]), progress=False)
    corpus, net = Corpus(tmp_path / "c"), StyleGAN(**init)
    faces = net.synthesize(corpus.latents([4, 1, 5]))
    assert (corpus.images([4, 1, 5]) - faces).abs().max() <= 0.51
    assert corpus.manifest["generator"]["converted_from"]["file"] == "t"


@pytest.mark.parametrize("recipe", ["stylegan2", "stylegan3"])
def test_recipes(tmp_path, recipe):
    from synth.generate import read_settings

    folder = random_folder(tmp_path / "net", small2() if recipe == "stylegan2" else small3())
    line = ["--config", f"synth/recipes/{recipe}.yaml", "--generator.init_args.weights", str(folder)]
    made = read_settings(line).build()
    assert (made.align is None) == (made.generator.face_size == 112)
    assert made.generator.latent_shape == (W,)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_pickles_of_other_networks_are_refused(tmp_path):
    stylegan2(tmp_path / "orig.pkl", architecture="orig")
    with pytest.raises(InputError, match=r"orig\.pkl.*architecture 'orig'; only 'skip' is read"):
        StyleGAN(tmp_path / "orig.pkl")
    stylegan2(tmp_path / "relu.pkl", activation="relu")
    with pytest.raises(InputError, match="activation 'relu'"):
        StyleGAN(tmp_path / "relu.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InputError, match=r"list\.pkl.*no G_ema"):
        StyleGAN(tmp_path / "list.pkl")
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="StyleGAN weights are"):
        StyleGAN(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="no such file or folder"):
        StyleGAN(tmp_path / "none.pkl")


class Boom:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_pickles_that_call_anything_are_refused(tmp_path):
    stylegan2(tmp_path / "net.pkl", source=Boom())
    with pytest.raises(InputError, match=r"net\.pkl: names (posix|nt)\.system, which is code"):
        StyleGAN(tmp_path / "net.pkl")
    torch.save({"g_ema": Boom()}, tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"net\.pt: names (posix|nt)\.system, which is code"):
        StyleGAN(tmp_path / "net.pt")


def test_cut_pickles_are_refused_in_one_line(tmp_path):
    stylegan2(tmp_path / "net.pkl")
    content = (tmp_path / "net.pkl").read_bytes()
    for cut in torch.linspace(0, len(content) - 1, 50).long().tolist():
        (tmp_path / "cut.pkl").write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"cut\.pkl: ") as caught:
            stylegan_files.load(tmp_path / "cut.pkl")
        assert "\n" not in str(caught.value)


def nested(network, depth):
    return Persistent("Generator", (), {"inner": nested(network, depth - 1)}) if depth else network


def test_pickles_with_damaged_insides_are_refused(tmp_path):
    """A module that holds itself, facts that are none, tensors that are none or too many."""
    whole = Persistent("Generator", {"x": torch.ones(2)})
    cases = {"deep": nested(whole, 20)}
    cases["number"] = Persistent("Generator", (), {"mapping": 3})
    cases["state"] = Persistent("Generator", {"x": "y"})
    cases["empty"] = Persistent("Generator")
    shared = torch.zeros(1000)
    cases["copies"] = Persistent("Generator", {f"x{i}": shared for i in range(3000)})
    for name, network in cases.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps({"G_ema": network}))
        with pytest.raises(InputError, match=rf"{name}\.pkl.*(no StyleGAN that we know|place of a tensor)"):
            stylegan_files.load(tmp_path / f"{name}.pkl")
    itself = Call("x", ())
    itself.name, itself.args = "torch_utils.persistence._reconstruct_persistent_obj", ({"state": {}},)
    itself.args[0]["state"] = {"_parameters": {}, "_buffers": {}, "_modules": {"self": itself}}
    with pytest.raises(ValueError, match="nested too deeply"):
        stylegan_files.Modules(itself)


def test_folders_that_do_not_fit_are_refused(two, tmp_path):
    import safetensors.torch
    from safetensors import safe_open

    with safe_open(two / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["faceless"])
    state = safetensors.torch.load_file(two / "model.safetensors")

    def refused(message, changed=None, **tensors):
        text = json.dumps(about | {"network": about["network"] | (changed or {})})
        safetensors.torch.save_file(state | tensors, two / "model.safetensors", {"faceless": text})
        with pytest.raises(InputError, match=message):
            StyleGAN(two)

    refused("does not fit stylegan2", {"channels": [8, 8]})
    refused("whole numbers from 1 to", {"channels": [10**9, 8, 6]})
    refused("from 1 to 11 are possible", {"channels": [1] * 40})
    refused("clamp is -1", {"clamp": -1})
    refused("no StyleGAN that we know", {"other": 1})
    refused("not finite", **{"synthesis.const": torch.full((8, 4, 4), torch.nan)})
    refused(r"synthesis.const is \[1\]", **{"synthesis.const": torch.ones(1)})
    refused("unexpected extra", extra=torch.ones(1))
    (two / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="not a converted generator"):
        StyleGAN(two)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        StyleGAN(tmp_path)
