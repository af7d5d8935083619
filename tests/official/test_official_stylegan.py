"""Our StyleGAN2 and StyleGAN3 against the networks of their authors, in the files that their own code writes.

``FACELESS_OFFICIAL=/path/to/checkouts pytest -m slow -s tests/official/test_official_stylegan.py`` prints the table of
docs/generators.md.
"""

import argparse
import importlib
import os
import pickle
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from faceless.randomness import Rng
from synth.generators import stylegan_files
from synth.generators.stylegan import StyleGAN

TOLERANCE = 1e-5  # of the values' own range: the requirement is 1e-3 in -1..1


@pytest.fixture(autouse=True)
def double():
    """These networks are float32, unlike the losses of the other tests here."""
    torch.manual_seed(0)


@pytest.fixture
def nvidia(monkeypatch):
    """``nvidia("stylegan3")(name)``: a module of that repository, whose packages are dropped again afterwards."""
    packages = ("dnnlib", "torch_utils", "training", "legacy")

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]

    def checkout(repository):
        root = Path(os.environ.get("FACELESS_OFFICIAL", "none"), "NVlabs", repository)
        if not root.is_dir():
            pytest.skip(f"FACELESS_OFFICIAL holds no NVlabs/{repository}")
        forget()
        monkeypatch.syspath_prepend(str(root))
        # Both are gone from today's Python and setuptools.
        numbers = lambda text: tuple(int(part) for part in text.split("+")[0].split(".")[:2])  # noqa: E731
        for name, content in (("pkg_resources", {"parse_version": numbers}), ("distutils.util", {"strtobool": bool})):
            if importlib.util.find_spec(name.split(".")[0]) is None:
                stub = ModuleType(name)
                stub.__dict__.update(content)
                monkeypatch.setitem(sys.modules, name, stub)
        return importlib.import_module

    yield checkout
    forget()


def trained(network, seed=0):
    """What training would have changed: biases, noise strengths, averages."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            drawn = torch.randn(value.shape, generator=generator)
            if name.endswith(("bias", "noise_strength", "noise.weight", "w_avg")) or "input.affine" in name:
                value.add_(drawn * 0.2)
            elif name.endswith("magnitude_ema"):
                value.copy_(drawn.square() + 0.5)
    return network.eval().requires_grad_(False)


def written(path, network):
    path.write_bytes(
        pickle.dumps({"G": network, "D": None, "G_ema": network, "training_set_kwargs": {"resolution": 1}})
    )
    return path


def close(ours, theirs):
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max().item())


def check(network, path, *, noises=("const", "none", "random")):
    """All that a network computes, in all the ways that it can be asked to."""
    count, cutoff = 3, 3
    z = torch.randn(count, network.z_dim)
    c = F.one_hot(torch.tensor([2, 0, 1]), network.c_dim).float() if network.c_dim else None
    latents = z if c is None else torch.cat((z, c), 1)
    net = StyleGAN(path, space="z")
    ws = network.mapping(z, c)
    close(net.styles(latents), ws)
    close(StyleGAN(path, space="z", truncation=0.6).styles(latents), network.mapping(z, c, truncation_psi=0.6))
    cut = StyleGAN(path, space="z", truncation=0.6, cutoff=cutoff)
    close(cut.styles(latents), network.mapping(z, c, truncation_psi=0.6, truncation_cutoff=cutoff))

    several = torch.cat((ws[:, :cutoff], ws.flip(0)[:, cutoff:]), 1)  # mixed
    for given in (ws, several):
        for noise in [noise for noise in noises if noise != "random"]:
            close(net.network.synthesis(given, noise), network.synthesis(given, noise_mode=noise))
    # Faces of one w, through the generator's own interface.
    faces = StyleGAN(path, space="w").synthesize(ws[:, 0])
    theirs = (network(z, c, noise_mode="const") * 127.5 + 127.5).clamp(0, 255)
    assert (faces - theirs).abs().max() < 0.01
    # Gradients with respect to the latents.
    pairs = []
    weights = torch.randn(network.img_resolution, network.img_resolution)
    for synthesis in (net.network.synthesis, lambda w: network.synthesis(w, noise_mode="const")):
        leaf = ws.clone().requires_grad_()
        pairs.append(torch.autograd.grad((synthesis(leaf) * weights).mean(), leaf)[0])
    assert (pairs[0] - pairs[1]).abs().max() <= 1e-3 * pairs[1].abs().max()
    if "random" in noises:
        close_random(network, path, ws)


def close_random(network, path, ws):
    """The same noise drawn by us and given to them in the place of torch.randn."""
    net = StyleGAN(path, space="w", noise="random")
    latents = net.sample_latents(len(ws), Rng.of(0, "test", range(len(ws))))
    fields = net._noise_fields(latents[:, -1])
    queue = list(fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, device=None: queue.pop(0))
        theirs = network.synthesis(net.styles(latents), noise_mode="random")
    assert not queue
    close(net.network.synthesis(net.styles(latents), fields), theirs)
    assert (theirs - network.synthesis(net.styles(latents), noise_mode="const")).abs().max() > 0.1


@pytest.mark.official
@pytest.mark.parametrize(
    ("repository", "options"),
    [
        ("stylegan3", {"img_resolution": 16, "channel_base": 512, "channel_max": 32}),
        ("stylegan3", {"img_resolution": 64, "channel_base": 1024, "channel_max": 64, "c_dim": 4, "w_dim": 32}),
        ("stylegan3", {"img_resolution": 32, "conv_clamp": 1.5, "mapping_kwargs": {"num_layers": 2}}),
        ("stylegan2-ada-pytorch", {"img_resolution": 32}),
        ("stylegan2-ada-pytorch", {"img_resolution": 64, "c_dim": 10, "mapping_kwargs": {"num_layers": 2}}),
        ("stylegan2-ada-pytorch", {"img_resolution": 16, "mapping_kwargs": {"layer_features": 40}, "noise": False}),
    ],
)
def test_stylegan2(nvidia, tmp_path, repository, options):
    module = nvidia(repository)("training.networks_stylegan2" if repository == "stylegan3" else "training.networks")
    options = {"z_dim": 48, "c_dim": 0, "w_dim": 40, "img_channels": 3} | dict(options)
    noise = options.pop("noise", True)
    inner = {key: options.pop(key) for key in ("channel_base", "channel_max", "conv_clamp") if key in options}
    inner = {"channel_base": 1024, "channel_max": 64} | inner
    if not noise:
        inner["use_noise"] = False
    options |= inner if repository == "stylegan3" else {"synthesis_kwargs": inner}
    network = trained(module.Generator(**options))
    check(network, written(tmp_path / "net.pkl", network), noises=("const", "none", "random") if noise else ("const",))


@pytest.mark.official
@pytest.mark.parametrize(
    "options",
    [
        {"img_resolution": 32},
        {"img_resolution": 64, "c_dim": 4, "channel_base": 2048},
        {"img_resolution": 32, "conv_kernel": 1, "use_radial_filters": True, "channel_base": 2048},
        {"img_resolution": 64, "conv_kernel": 1, "use_radial_filters": True, "c_dim": 3},
        {"img_resolution": 32, "num_layers": 8, "output_scale": 1, "conv_clamp": 0.8, "margin_size": 7},
    ],
)
def test_stylegan3(nvidia, tmp_path, options):
    module = nvidia("stylegan3")("training.networks_stylegan3")
    defaults = {"z_dim": 48, "c_dim": 0, "w_dim": 40, "img_channels": 3, "channel_base": 1024, "channel_max": 48}
    network = trained(module.Generator(**defaults | options))
    check(network, written(tmp_path / "net.pkl", network), noises=("const",))


@pytest.mark.official
@pytest.mark.parametrize("options", [{}, {"conditional": True}])
def test_tensorflow(nvidia, tmp_path, monkeypatch, options):
    """A pickle as TensorFlow wrote it, converted by their code and by ours."""
    load = nvidia("stylegan3")
    legacy = load("legacy")
    side, width, rng = 16, 24, np.random.RandomState(0)
    draw = lambda *shape: np.asarray(rng.randn(*shape), "float32")  # noqa: E731
    classes = 5 if options else 0
    mapping = [("Dense0/weight", draw(width * (2 if classes else 1), width)), ("Dense0/bias", draw(width))]
    mapping += [("Dense1/weight", draw(width, width)), ("Dense1/bias", draw(width))]
    if classes:
        mapping += [("LabelEmbed/weight", draw(classes, width)), ("LabelEmbed/bias", draw(width))]
    synthesis, channels, noises = [("lod", draw()), ("4x4/Const/const", draw(1, 16, 4, 4))], {4: 16, 8: 16, 16: 8}, 0
    for r in (4, 8, 16):
        layers = [("Conv0_up", channels.get(r // 2), channels[r], 3), ("Conv1", channels[r], channels[r], 3)]
        layers = layers if r > 4 else [("Conv", channels[r], channels[r], 3)]
        for name, before, after, kernel in [*layers, ("ToRGB", channels[r], 3, 1)]:
            start = f"{r}x{r}/{name}/"
            synthesis += [
                (f"{start}weight", draw(kernel, kernel, before, after)),
                (f"{start}bias", draw(after)),
                (f"{start}mod_weight", draw(width, before)),
                (f"{start}mod_bias", draw(before)),
            ]
            if kernel == 3:
                synthesis += [(f"{start}noise_strength", draw()), (f"noise{noises}", draw(1, 1, r, r))]
                noises += 1

    class Network:
        __module__, __qualname__ = "dnnlib.tflib.network", "Network"

        def __init__(self, variables=(), static=None, **components):
            self.version, self.static_kwargs, self.components = 4, static or {}, components
            self.variables, self.build_module_src = list(variables), "import os; os.system('touch boom')"

    fake = ModuleType("dnnlib.tflib.network")
    fake.Network = Network
    monkeypatch.setitem(sys.modules, "dnnlib.tflib", ModuleType("dnnlib.tflib"))
    monkeypatch.setitem(sys.modules, "dnnlib.tflib.network", fake)
    static = {"resolution": side, "latent_size": width, "dlatent_size": width, "label_size": classes}
    static |= {"mapping_layers": 2, "mapping_fmaps": width, "fmap_base": 64, "fmap_max": 16}
    static |= {"mapping_lrmul": 0.02, "label_fmaps": width}

    net = Network([("dlatent_avg", draw(width))], static, mapping=Network(mapping), synthesis=Network(synthesis))
    path = tmp_path / "tf.pkl"
    path.write_bytes(pickle.dumps((net, net, net)))
    monkeypatch.setitem(sys.modules, "dnnlib.tflib.network", ModuleType("dnnlib.tflib.network"))
    stub = legacy._LegacyUnpickler(path.open("rb")).load()[2]
    check(legacy.convert_tf_generator(stub), path, noises=("const", "none", "random"))


@pytest.mark.official
@pytest.mark.parametrize(("size", "multiplier", "average"), [(32, 2, True), (64, 1, False)])
def test_rosinality(monkeypatch, tmp_path, size, multiplier, average):
    root = Path(os.environ.get("FACELESS_OFFICIAL", "none"), "rosinality", "stylegan2-pytorch")
    if not root.is_dir():
        pytest.skip("FACELESS_OFFICIAL holds no rosinality/stylegan2-pytorch")
    import torch.utils.cpp_extension as extension

    monkeypatch.setattr(extension, "load", lambda *args, **kwargs: SimpleNamespace())  # CUDA only
    monkeypatch.syspath_prepend(str(root))
    for name in [name for name in sys.modules if name == "model" or name.split(".")[0] == "op"]:
        del sys.modules[name]
    module = importlib.import_module("model")
    network = module.Generator(size, 32, 3, channel_multiplier=multiplier)
    network = trained(network)
    content = {"g_ema": network.state_dict(), "args": argparse.Namespace(size=size), "d": {}}
    mean = torch.randn(32) * 0.1
    if average:
        content["latent_avg"] = mean
    path = tmp_path / "rosinality.pt"
    torch.save(content, path, _use_new_zipfile_serialization=average)
    net = StyleGAN(path, space="z", truncation=0.7)
    if not average:
        mean = net.network.mapping.w_avg
        assert (mean - network.style(torch.randn(20_000, 32)).mean(0)).abs().max() < 0.05
    z = torch.randn(2, 32)
    with torch.no_grad():
        theirs, ws = network([z], truncation=0.7, truncation_latent=mean, randomize_noise=False, return_latents=True)
        close(net.styles(z), ws)
        close(net.network.synthesis(ws), theirs)
        mixed, ws = network([network.style(z), network.style(z.flip(0))], inject_index=3, input_is_latent=True,
                            randomize_noise=False, return_latents=True)  # fmt: skip
        close(net.network.synthesis(ws), mixed)
    for name in [name for name in sys.modules if name == "model" or name.split(".")[0] == "op"]:
        del sys.modules[name]


@pytest.mark.official
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("family", "side", "batch", "options"),
    [
        ("2", 128, 4, {"channel_base": 16384}),
        ("2", 256, 2, {"channel_base": 16384}),
        ("2", 256, 1, {"channel_base": 16384}),
        ("3-T", 64, 2, {"channel_base": 8192, "channel_max": 256}),
        ("3-T", 128, 1, {"channel_base": 16384}),
        ("3-R", 64, 2, {"channel_base": 16384, "conv_kernel": 1, "use_radial_filters": True}),
    ],
)
def test_table_of_differences_and_times(nvidia, tmp_path, capsys, request, family, side, batch, options):
    """One thread; the better of two interleaved rounds; their reference path, as their code takes it on a CPU."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    module = nvidia("stylegan3")(f"training.networks_stylegan{family[0]}")
    network = module.Generator(512, 0, 512, side, 3, **options).eval().requires_grad_(False)
    ours = StyleGAN(written(tmp_path / "net.pkl", network)).network.synthesis
    ws = network.mapping(torch.randn(batch, 512), None)

    def theirs(ws):
        return network.synthesis(ws, noise_mode="const")

    times = {ours: [], theirs: []}
    with torch.inference_mode():
        image = theirs(ws)
        off, high = (ours(ws) - image).abs().max().item(), image.abs().max().item()
        for _ in range(2):
            for function, taken in times.items():
                begin = time.process_time()
                function(ws)
                taken.append(time.process_time() - begin)
    mine, other = (min(taken) / batch for taken in times.values())
    with capsys.disabled():
        print(f"| StyleGAN{family} | {side} | {batch} | {off:.1e} | {high:.1f} | {mine:.2f} s | {mine / other:.2f} |")
    assert off <= 1e-3 and mine < other


@pytest.mark.official
def test_conversion_keeps_every_bit(nvidia, tmp_path):
    module = nvidia("stylegan3")("training.networks_stylegan3")
    network = trained(module.Generator(16, 0, 16, 32, 3, channel_base=256, channel_max=16))
    loaded = stylegan_files.load(written(tmp_path / "net.pkl", network))
    again = stylegan_files.load(stylegan_files.save(loaded, tmp_path / "folder"))
    assert again.network.config == loaded.network.config
    for one, other in zip(again.network.state_dict().items(), loaded.network.state_dict().items()):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
