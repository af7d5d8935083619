"""Files of Keras: what is read, and what is refused. With Keras itself: tests/faceless/test_official.py."""

import io
import json
import zipfile

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


#: What Keras 3 calls classes of layers, and the order of their arrays.
CLASSES = {
    "kernel": ("Conv2D", "conv2d", ["kernel", "bias"]),
    "depthwise_kernel": ("DepthwiseConv2D", "depthwise_conv2d", ["depthwise_kernel", "bias"]),
    "gamma": ("BatchNormalization", "batch_normalization", ["gamma", "beta", "moving_mean", "moving_variance"]),
    "alpha": ("PReLU", "p_re_lu", ["alpha"]),
}


def of_keras_3(arrays, named):
    """The HDF5 file and the description that Keras 3 writes; its numbers are not those in the names of layers."""
    stream, made, described = io.BytesIO(), {}, [{"class_name": "InputLayer", "config": {"name": "input"}}]
    with h5py.File(stream, "w") as file:
        for name, first in reversed(arrays):
            if first not in CLASSES:
                continue
            kind, place, order = CLASSES[first]
            number = made[place] = made.get(place, -1) + 1
            group = file.create_group(f"layers/{place}_{number}/vars" if number else f"layers/{place}/vars")
            for index, key in enumerate(key for key in order if (name, key) in arrays):
                group[str(index)] = arrays[name, key]
            if named:
                group.attrs["name"] = name
            described.append({"class_name": kind, "config": {"name": name, "function": "gASVcode"}})
        file["layers/dropout/seed_generator/vars/0"] = [1, 2]
        file["optimizer/vars/0"] = 7
    return stream.getvalue(), {"config": {"layers": described}}


def archived(path, weights, description, **members):
    text = description if isinstance(description, str) else json.dumps(description)
    members = {"metadata.json": "{}", "config.json": text, "model.weights.h5": weights} | members
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_archives_and_weights_of_keras_3(tmp_path):
    net = network()
    archive = archived(tmp_path / "net.keras", *of_keras_3(layers(net), named=False))
    (tmp_path / "net.weights.h5").write_bytes(of_keras_3(layers(net), named=True)[0])
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    for file in (archive, tmp_path / "net.weights.h5"):
        found = faceless.load(file)
        assert (found.name, found.spec) == ("ghostfacenet", net.spec)
        assert torch.equal(found.embed(images), net.embed(images))
    (tmp_path / "net.weights.h5").write_bytes(of_keras_3(layers(net), named=False)[0])
    with pytest.raises(InputError, match=r"has no name; save the model as \.keras"):
        faceless.load(tmp_path / "net.weights.h5")


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


def packed(path, compression=zipfile.ZIP_STORED, leave_out=None, twice=None, **others):
    members = {"metadata.json": b"{}", "config.json": b'{"config": {"layers": []}}', "model.weights.h5": b"", **others}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if name != leave_out:
                archive.writestr(name, content)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(twice, b"other")


def hdf5(spoil):
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        spoil(file)
    return stream.getvalue()


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    file.create_virtual_dataset("layers/conv2d/vars/0", layout)


def external(file):
    file.create_dataset("layers/conv2d/vars/0", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def nested(file):
    file["layers/functional/layers/conv2d/vars/0"] = torch.ones(4).numpy()


def unnamed(file):
    file["layers/conv2d/vars/0"] = torch.ones(4).numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"../../etc/cron": b"x"}, r", '\.\./\.\./etc/cron'; Keras 3 writes metadata\.json, config\.json, model"),
        ({"model.weights.npz": b"x"}, "'model.weights.npz'; Keras 3 writes"),
        ({"leave_out": "config.json"}, "holds 'metadata.json', 'model.weights.h5'; Keras 3"),
        ({"twice": "config.json"}, "'config.json'; Keras 3 writes metadata.json, .*, each once"),
        ({"compression": zipfile.ZIP_DEFLATED, "model.weights.h5": bytes(10**7)}, "is compressed, which Keras never"),
        ({"metadata.json": bytes(1 + (1 << 20))}, "metadata.json is larger than that of any recognizer"),
        ({"config.json": b"["}, r"not readable as weights of Keras \(JSONDecodeError"),
        ({"config.json": b"[" * 200_000}, r"not readable as weights of Keras \(RecursionError"),
        ({"config.json": b"[]"}, r"not readable as weights of Keras \(TypeError"),
        ({"config.json": b'{"config": {"layers": [{"class_name": 1}]}}'}, r"not readable as .* \(TypeError"),
        (
            {"config.json": json.dumps({"config": {"layers": [{"class_name": "A", "config": {"name": "a"}}] * 2}})},
            "two layers have one name",
        ),
        ({"model.weights.h5": b"no"}, r"not readable as weights of Keras \(OSError"),
        ({"model.weights.h5": hdf5(lambda file: None)}, "holds no layers of Keras"),
        ({"model.weights.h5": hdf5(linked)}, "'elsewhere' is a link"),
        ({"model.weights.h5": hdf5(virtual)}, "'0' is not stored as it is"),
        ({"model.weights.h5": hdf5(external)}, "'0' is not stored as it is"),
        ({"model.weights.h5": hdf5(nested)}, "is of a network in a network"),
        ({"model.weights.h5": hdf5(unnamed)}, "'conv2d' has no name"),
    ],
)
def test_hostile_and_foreign_archives_are_one_line(tmp_path, change, message):
    packed(tmp_path / "x.keras", **change)
    with pytest.raises(InputError, match=message) as caught:
        faceless.load(tmp_path / "x.keras")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(("GDC_conv", "kernel")), "layers are missing"),
        (lambda a: a.pop(("batch_normalization_3", "moving_variance")), "does not fit ghostfacenet: missing"),
        (lambda a: a.update({("more", "kernel"): a["GDC_conv", "kernel"][0, 0]}), "does not fit ghostfacenet: unexp"),
        (lambda a: a["pre_embedding", "gamma"].fill(float("nan")), "holds values that are not finite"),
    ],
)
def test_wrong_layers_of_archives_are_named(tmp_path, change, message):
    arrays = {key: value.copy() for key, value in layers(network()).items()}
    change(arrays)
    with pytest.raises(InputError, match=message):
        faceless.load(archived(tmp_path / "x.keras", *of_keras_3(arrays, named=False)))


def test_torn_and_altered_archives(tmp_path):
    content = archived(tmp_path / "x.keras", *of_keras_3(layers(network()), named=False)).read_bytes()
    middle = len(content) // 2
    for spoiled in (b"", content[:middle], content[:-10], content[:middle] + b"\xff" + content[middle + 1 :]):
        (tmp_path / "x.keras").write_bytes(spoiled)
        with pytest.raises(InputError, match=r"not readable as weights of Keras \(BadZipFile"):
            faceless.load(tmp_path / "x.keras")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return written(tmp_path_factory.mktemp("keras") / "net.h5", layers(network())).read_bytes()


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_torn_files(whole, tmp_path, share):
    (tmp_path / "x.h5").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="not readable as weights of Keras"):
        faceless.load(tmp_path / "x.h5")
