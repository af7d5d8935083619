"""Our backbones against the authors' own classes, read from checkouts in the folder ``FACELESS_OFFICIAL``."""

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

import faceless
from faceless.randomness import Rng

pytestmark = [
    pytest.mark.official,
    pytest.mark.skipif("FACELESS_OFFICIAL" not in os.environ, reason="FACELESS_OFFICIAL names no official checkouts"),
]

INSIGHTFACE = ("deepinsight/insightface", "recognition/arcface_torch/backbones/iresnet.py")
ADADISTILL = ("fdbtrs/AdaDistill", "backbones/mobilefacenet.py")
QUD = ("jankolf/QUD", "backbones/mobilefacenet.py")


def official(repository, path):
    """The module of a file in a checkout, ``owner/name`` or ``owner+name``."""
    root = Path(os.environ["FACELESS_OFFICIAL"])
    file = next((f for d in (repository, repository.replace("/", "+")) if (f := root / d / path).is_file()), None)
    if file is None:
        pytest.skip(f"{root} has no {repository}")
    spec = importlib.util.spec_from_file_location(f"official_{repository.replace('/', '_')}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_trained(net, size=112):
    """Scales, shifts and slopes unlike those of a new network, and the running statistics that belong to them."""
    for i, (key, parameter) in enumerate(net.named_parameters()):
        if parameter.ndim == 1:
            parameter.data.copy_(Rng.of(i, key, range(1)).uniform(len(parameter), low=0.2, high=0.6)[0])
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(Rng.of(1, "statistics", range(4)).uniform(3, size, size, low=-1))
    return net.eval()


def adaface(monkeypatch):
    module = official("mk-minchul/AdaFace", "net.py")

    class Raw(torch.nn.Module):
        """Unit vector and norm, multiplied: what ours returns."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            unit, norm = self.net(x)
            return unit * norm

    return lambda name: Raw(module.build_model(name))


def pocketnet(monkeypatch):
    # Its files import each other as `backbones`.
    root = Path(os.environ["FACELESS_OFFICIAL"], "fdbtrs/PocketNet")
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    for name in [name for name in sys.modules if name.split(".")[0] == "backbones"]:
        monkeypatch.delitem(sys.modules, name)
    package = ModuleType("backbones")
    package.__path__ = [str(root / "backbones")]
    monkeypatch.setitem(sys.modules, "backbones", package)
    names = [f"backbones.{name}" for name in ("genotypes", "ops", "augment_cells", "augment_cnn")]
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    gt = importlib.import_module("backbones.genotypes")
    text = (root / "config/config_PocketNetS128.py").read_text()
    genotype = eval(re.search(r'"softmax_casia": "(.*?)"', text)[1], {"Genotype": gt.Genotype, "range": range})
    cnn = importlib.import_module("backbones.augment_cnn").AugmentCNN
    return lambda channels, layers, emb: cnn(C=channels, n_layers=layers, genotype=genotype, emb=emb)


def askd(monkeypatch):
    return official("gist-ailab/teaching-where-to-look", "model/backbone.py").CBAMResNet


def edgeface(monkeypatch):
    module = official("otroshi/edgeface", "backbones/timmfr.py")

    def build(model, ratio=None):
        net = module.get_timmfrv2(model)
        return net if ratio is None else module.replace_linear_with_lowrank_2(net, ratio)

    return build


def tinyfar(monkeypatch):
    module = official("otroshi/synthdistill", "src/Network.py")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options | {"pretrained": False}))
    return module.LightNetwork


def insightface_mbf(monkeypatch):
    module = official("deepinsight/insightface", "recognition/arcface_torch/backbones/mobilefacenet.py")
    # Its forward pass opens autocast for CUDA, which does nothing without a GPU but warn.
    return lambda name: getattr(module, name)(fp16=False, num_features=512)


def mixfacenet(monkeypatch):
    root = Path(os.environ["FACELESS_OFFICIAL"], "fdbtrs/mixfacenets")
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    for name in [name for name in sys.modules if name.split(".")[0] == "backbones"]:
        monkeypatch.delitem(sys.modules, name)
    package = ModuleType("backbones")
    package.__path__ = [str(root / "backbones")]
    monkeypatch.setitem(sys.modules, "backbones", package)
    module = importlib.import_module("backbones.mixnetm")
    return lambda name, width, head: getattr(module, name)(width_scale=width, gdw_size=head)


def facenet(monkeypatch):
    for name in ("requests", "requests.adapters"):  # only wanted for downloads
        stub = ModuleType(name)
        stub.HTTPAdapter = None
        monkeypatch.setitem(sys.modules, name, stub)
    root = Path(os.environ["FACELESS_OFFICIAL"], "timesler/facenet-pytorch")
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    package = ModuleType("facenet_models")
    package.__path__ = [str(root / "models")]
    monkeypatch.setitem(sys.modules, "facenet_models", package)
    return importlib.import_module("facenet_models.inception_resnet_v1").InceptionResnetV1


@pytest.mark.parametrize(
    ("family", "arguments", "name", "nest"),
    [
        (adaface, ("ir_18",), "ir18", lambda s: {k.removeprefix("net."): v for k, v in s.items()}),
        (adaface, ("ir_34",), "ir34", lambda s: {f"model.{k}": v for k, v in s.items()}),  # as CVLface saves it
        (adaface, ("ir_50",), "ir50", lambda s: s),
        (adaface, ("ir_101",), "ir101", lambda s: s),
        (askd, (50,), "cbam50", lambda s: {"iters": torch.tensor(1), "net_state_dict": s}),
        (pocketnet, (16, 18, 128), "pocketnet-s", lambda s: s),
        (pocketnet, (16, 18, 512), "pocketnet-s", lambda s: s),
        (pocketnet, (32, 9, 256), "pocketnet-m", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (edgeface, ("edgenext_xx_small",), "edgeface-xxs", lambda s: s),
        (edgeface, ("edgenext_x_small", 0.6), "edgeface-xs", lambda s: s),
        (edgeface, ("edgenext_small", 0.5), "edgeface-s", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (tinyfar, ("tinynet_a",), "tinyfar-a", lambda s: s),
        (tinyfar, ("tinynet_c",), "tinyfar-c", lambda s: s),
        (insightface_mbf, ("get_mbf",), "mbf", lambda s: s),
        (insightface_mbf, ("get_mbf_large",), "mbf-large", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (mixfacenet, ("mixnet_s", 0.5, 512), "mixfacenet-xs", lambda s: s),
        (mixfacenet, ("mixnet_s", 1.0, 1024), "mixfacenet-s", lambda s: s),
        (mixfacenet, ("mixnet_m", 1.0, 1024), "mixfacenet-m", lambda s: s),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_same_weights_same_embeddings_of_other_families(tmp_path, monkeypatch, capsys, family, arguments, name, nest):
    theirs = as_trained(family(monkeypatch)(*arguments))
    torch.save(nest(theirs.state_dict()), tmp_path / "theirs.pth")
    ours = faceless.load(tmp_path / "theirs.pth")
    assert ours.name == name
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 112, 112).byte()
    with torch.no_grad():
        expected = theirs((images.float() - 127.5) / 127.5)
        found = ours(images).embedding
    difference = (found - expected).abs().max() / expected.abs().max()
    with capsys.disabled():
        print(f"{name}: {difference:.1e}")
    assert difference <= 1e-5


def test_facenet(tmp_path, monkeypatch):
    # With the classifier that its published files still hold.
    theirs = as_trained(facenet(monkeypatch)(classify=True, num_classes=10, dropout_prob=0.0), 160)
    theirs.classify = False
    torch.save(theirs.state_dict(), tmp_path / "20180402-114759-vggface2.pt")
    ours = faceless.load(tmp_path / "20180402-114759-vggface2.pt")
    assert (ours.name, ours.spec.height) == ("inception-resnet-v1", 160)
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 160, 160).byte()
    with torch.no_grad():
        # Their fixed_image_standardization; what they return has length 1.
        expected = theirs((images.float() - 127.5) / 128.0)
        found = torch.nn.functional.normalize(ours(images).embedding)
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"inception-resnet-v1: {difference:.1e}")
    assert difference <= 1e-5


class TensorFlow(ModuleType):
    """Keras on PyTorch under the name that the authors import, with an empty class for whatever else is asked."""

    def __init__(self, keras):
        super().__init__("tensorflow")
        self.keras, self.initializers = keras, keras.initializers

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def keras_2_hard_sigmoid(x):
    return (0.2 * x + 0.5).clip(0, 1)


def ghostfacenet(monkeypatch, stride):
    """The authors' Keras model."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    module = TensorFlow(keras)
    for name, value in {
        "": module,
        ".keras": keras,
        **{f".keras.{part}": getattr(keras, part) for part in ("backend", "models", "layers")},
    }.items():
        monkeypatch.setitem(sys.modules, f"tensorflow{name}", value)
    keras.saving.register_keras_serializable(package="keras2")(keras_2_hard_sigmoid)
    functions = importlib.import_module("keras.src.activations").ALL_OBJECTS_DICT
    monkeypatch.setitem(functions, "hard_sigmoid", keras_2_hard_sigmoid)
    stem = official("HamadYA/GhostFaceNets", "backbones/ghost_model.py").GhostNet(
        input_shape=(112, 112, 3), include_top=False, width=1.3, strides=stride
    )
    builder = official("HamadYA/GhostFaceNets", "GhostFaceNets.py")
    whole = builder.buildin_models(stem, dropout=0, emb_shape=512, output_layer="GDC", bn_momentum=0.9, bn_epsilon=1e-5)
    return keras, builder.replace_ReLU_with_PReLU(whole)


@pytest.mark.parametrize(("stride", "count"), [(1, 4_088_300), (2, 4_066_388)])
def test_ghostfacenet(monkeypatch, stride, count):
    keras, theirs = ghostfacenet(monkeypatch, stride)
    assert theirs.count_params() == count
    ours = faceless.create("ghostfacenet", stride=stride).eval()

    def layers(kind, *last):
        # Keras numbers layers of a kind as they are made.
        named = [x for x in theirs.layers if type(x) is kind and not x.name.startswith(("GDC", "pre_"))]
        named.sort(key=lambda x: int((re.search(r"_(\d+)$", x.name) or [0, 0])[1]))
        return named + [theirs.get_layer(name) for name in last]

    def modules(wanted):
        return [module for module in ours.backbone.modules() if wanted(module)]

    kinds, conv = keras.layers, torch.nn.Conv2d
    pairs = [
        *zip(layers(kinds.Conv2D, "GDC_conv"), modules(lambda m: isinstance(m, conv) and m.groups == 1), strict=True),
        *zip(
            layers(kinds.DepthwiseConv2D, "GDC_dw"),
            modules(lambda m: isinstance(m, conv) and m.groups > 1),
            strict=True,
        ),
        *zip(
            layers(kinds.BatchNormalization, "GDC_batchnorm", "pre_embedding"),
            modules(lambda m: isinstance(m, torch.nn.modules.batchnorm._BatchNorm)),
            strict=True,
        ),
        *zip(layers(kinds.PReLU), modules(lambda m: isinstance(m, torch.nn.PReLU)), strict=True),
    ]
    for number, (layer, module) in enumerate(pairs):
        drawn = []
        for index, array in enumerate(layer.get_weights()):
            rng = Rng.of(number, f"weights {index}", range(1))
            normal = array.ndim == 4
            low, high = (0.5, 1.5) if isinstance(layer, kinds.BatchNormalization) else (0.1, 0.4)
            value = rng.normal(*array.shape)[0] if normal else rng.uniform(*array.shape, low=low, high=high)[0]
            drawn.append(value / array[..., 0].size ** 0.5 if normal else value)
        layer.set_weights([value.numpy() for value in drawn])
        if isinstance(module, conv):
            axes = (2, 3, 0, 1) if module.groups > 1 else (3, 2, 0, 1)
            drawn[0] = drawn[0].permute(axes)
        names = ("weight", "bias", "running_mean", "running_var")
        for name, value in zip(names, drawn):
            getattr(module, name).data.copy_(value.reshape(getattr(module, name).shape))
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 112, 112).byte()
    pixels = ((images.float() - 127.5) * 0.0078125).permute(0, 2, 3, 1)
    with torch.no_grad():
        expected = torch.as_tensor(theirs(pixels, training=False)).cpu()
        found = ours(images).embedding
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"ghostfacenet stride {stride}: {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize(
    "nest", [lambda s: s, lambda s: {"state_dict_backbone": {f"module.{k}": v for k, v in s.items()}}]
)
@pytest.mark.parametrize(
    ("where", "name", "build"),
    [
        (INSIGHTFACE, "iresnet18", lambda m: m.iresnet18()),
        (INSIGHTFACE, "iresnet34", lambda m: m.iresnet34()),
        (INSIGHTFACE, "iresnet50", lambda m: m.iresnet50(num_features=256)),
        (INSIGHTFACE, "iresnet100", lambda m: m.iresnet100()),
        (INSIGHTFACE, "iresnet200", lambda m: m.iresnet200()),
        (ADADISTILL, "mobilefacenet", lambda m: m.MobileFaceNet(input_size=(112, 112))),
        (ADADISTILL, "mobilefacenet", lambda m: m.MobileFaceNet(input_size=(112, 112), embedding_size=128)),
        (QUD, "mobilefacenet", lambda m: m.MobileFaceNet(input_size=(112, 112), embedding_size=256)),
    ],
)
def test_same_weights_same_embeddings(tmp_path, where, name, build, nest):
    theirs = as_trained(build(official(*where)))
    torch.save(nest(theirs.state_dict()), tmp_path / "theirs.pth")
    ours = faceless.load(tmp_path / "theirs.pth")
    assert ours.name == name
    images = Rng.of(0, "faces", range(3)).integers(256, 3, 112, 112).byte()
    with torch.no_grad():
        expected = theirs((images.float() - 127.5) / 127.5)
        found = ours(images).embedding
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"{where[0]} {name}: {difference:.1e}")
    assert difference <= 1e-5
