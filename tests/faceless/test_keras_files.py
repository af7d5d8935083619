"""Files of Keras: what is read, and what is refused. With Keras itself: tests/faceless/test_official.py."""

import pytest
import torch
from torch import nn

import faceless
from faceless.errors import InputError
from faceless.randomness import Rng

h5py = pytest.importorskip("h5py")
ARRAYS = {
    nn.Conv2d: {"kernel": "weight", "bias": "bias"},
    nn.BatchNorm2d: {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    },
    nn.PReLU: {"alpha": "weight"},
}
ARRAYS[nn.BatchNorm1d] = ARRAYS[nn.BatchNorm2d]


def network():
    net = faceless.create("ghostfacenet", embedding_dim=16, input_size=32, width=0.25)
    for i, (key, tensor) in enumerate(net.backbone.state_dict().items()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(Rng.of(i, key, range(1)).uniform(len(tensor), low=0.5, high=1.5)[0])
    return net.eval()


def layers(net):
    """Keras's names and arrays: layers of a kind are numbered as they are made."""
    made, found = {}, {}
    head = {"head.0": "GDC_dw", "head.1": "GDC_batchnorm", "head.2": "GDC_conv", "head.4": "pre_embedding"}
    for place, module in net.backbone.named_modules():
        if type(module) not in ARRAYS and not isinstance(module, nn.Conv2d):
            continue
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        kind = {nn.BatchNorm2d: "batch_normalization", nn.PReLU: "activation"}.get(type(module), "conv2d")
        kind = "depthwise_conv2d" if grouped else kind
        number = made[kind] = made.get(kind, -1) + (place not in head)
        name = head.get(place, f"{kind}_{number}" if number else kind)
        arrays = ARRAYS.get(type(module), ARRAYS[nn.Conv2d])
        values = {theirs: getattr(module, ours) for theirs, ours in arrays.items() if getattr(module, ours) is not None}
        for key, value in values.items():
            if value.ndim == 4:
                value = value.permute((2, 3, 0, 1) if grouped else (2, 3, 1, 0))
            found[name, "depthwise_kernel" if grouped else key] = value.detach().numpy()
    return found


def written(path, arrays, top="model_weights"):
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "never read"
        for (layer, key), value in arrays.items():
            file[f"{top}/{layer}/{layer}/{key}:0"] = value
    return path


@pytest.mark.parametrize("top", ["model_weights", ""])
def test_a_saved_model_and_saved_weights(tmp_path, top):
    net = network()
    found = faceless.load(written(tmp_path / "net.h5", layers(net), top))
    assert (found.name, found.spec) == ("ghostfacenet", net.spec)
    assert found.options == {"width": 0.25, "stride": 1, "embedding_dim": 16, "input_size": 32}
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    assert torch.equal(found.embed(images), net.embed(images))


def test_the_stride_may_be_told(tmp_path):
    net = faceless.create("ghostfacenet", embedding_dim=16, input_size=64, width=0.25, stride=2)
    found = faceless.load(written(tmp_path / "net.h5", layers(net)), stride=2)
    assert (found.options["stride"], found.options["input_size"]) == (2, 64)


def linked(file):
    file["model_weights/conv2d/elsewhere"] = h5py.ExternalLink("/etc/passwd", "/")


def circular(file):
    group = file.create_group("model_weights/conv2d")
    group["again"] = file["model_weights"]


def promised(file):
    file.create_dataset("model_weights/conv2d/kernel", (10**5, 10**5), "f4")


def compressed(file):
    file.create_dataset("model_weights/conv2d/kernel", (1000, 1000), "f4", compression="gzip")


def elsewhere(file):
    file.create_dataset("model_weights/conv2d/kernel", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def lonely(file):
    file["model_weights/conv2d/kernel"] = torch.ones(3, 3, 3, 4).numpy()


def text(file):
    file["model_weights/conv2d/kernel"] = "import os"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (linked, "'elsewhere' is a link"),
        (circular, "groups within groups without end"),
        (promised, "is no plain array of numbers"),
        (compressed, "'kernel' is not stored as it is"),
        (elsewhere, "'kernel' is not stored as it is"),
        (text, "is no plain array of numbers"),
        (
            lonely,
            "layers are missing",
        ),
        (lambda file: None, "holds no layers of Keras"),
    ],
)
def test_hostile_and_foreign_files_are_one_line(tmp_path, spoil, message):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        spoil(file)
    with pytest.raises(InputError, match=message) as caught:
        faceless.load(tmp_path / "x.h5")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(("GDC_conv", "kernel")), "layers are missing"),
        (lambda a: a.pop(("batch_normalization_3", "gamma")), "does not fit ghostfacenet"),
        (lambda a: a.update({("dense", "kernel"): a["GDC_conv", "kernel"][0, 0]}), "does not fit ghostfacenet"),
        (lambda a: a["pre_embedding", "gamma"].fill(float("nan")), "holds values that are not finite"),
    ],
)
def test_wrong_layers_are_named(tmp_path, change, message):
    arrays = {key: value.copy() for key, value in layers(network()).items()}
    change(arrays)
    with pytest.raises(InputError, match=message):
        faceless.load(written(tmp_path / "x.h5", arrays))


def test_no_hdf5(tmp_path):
    for content in (b"", b"no", b"\x89HDF\r\n\x1a\n" + bytes(100)):
        (tmp_path / "x.h5").write_bytes(content)
        with pytest.raises(InputError, match="not readable as weights of Keras"):
            faceless.load(tmp_path / "x.h5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("keras") / "net.h5", layers(network())).read_bytes()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_torn_files(whole, tmp_path, share):
    (tmp_path / "x.h5").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="not readable as weights of Keras"):
        faceless.load(tmp_path / "x.h5")
