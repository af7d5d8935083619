"""Our backbones against the authors' own classes, read from checkouts in the folder ``FACELESS_OFFICIAL``."""

import importlib
import importlib.util
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch

import faceless
from faceless.align import ARCFACE
from faceless.backbones import ARCHITECTURES
from faceless.randomness import Rng
from faceless.weights import recognize

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


def in_double(monkeypatch, *nets):
    """Also where they ask for single precision: in a deep Transformer, orders of summation differ by 2e-5 in single."""
    for net in nets:
        net.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


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


def mobilefacenet_relu6(monkeypatch):
    return official("fdbtrs/PocketNet", "backbones/mobilefacenet.py").MobileFaceNet


def insightface_vit(monkeypatch):
    module = official("deepinsight/insightface", "recognition/arcface_torch/backbones/vit.py")
    return lambda width, depth, mask: module.VisionTransformer(
        img_size=112, patch_size=9, num_classes=512, embed_dim=width, depth=depth, num_heads=8, mask_ratio=mask
    )


class Attributes(dict):
    """A dictionary whose values are attributes as well, as EasyDict and OmegaConf have it."""

    def __getattr__(self, name):
        return self[name]

    def __setattr__(self, name, value):
        self[name] = value


class WithLandmarks(torch.nn.Module):
    def __init__(self, net, landmarks):
        super().__init__()
        self.net, self.landmarks = net, landmarks

    def forward(self, x):
        return self.net(x, self.landmarks[: len(x)])


#: Of four faces, nowhere near the template.
LANDMARKS = Rng.of(2, "landmarks", range(4)).uniform(5, 2)


def cvlface_vit(monkeypatch):
    models = "cvlface/research/recognition/code/run_v1/models"
    root = Path(os.environ["FACELESS_OFFICIAL"], "mk-minchul/CVLface", models)
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    stubs = {"fvcore": {}, "fvcore.nn": {"flop_count": None}, "easydict": {"EasyDict": Attributes}}
    # Their package would compile its CUDA operator and leave; without one they index in Python.
    for name in ("", ".vit", ".vit_kprpe", ".vit_kprpe.RPE.rpe_ops"):
        stubs[f"cvlface_models{name}"] = {"__path__": [str(root / name.replace(".", "/").strip("/"))]}
    stubs["cvlface_models.vit_kprpe.RPE.rpe_ops.rpe_index"] = {"RPEIndexFunction": None}
    for name, values in stubs.items():
        stub = ModuleType(name)
        vars(stub).update(values)
        monkeypatch.setitem(sys.modules, name, stub)

    def build(depth, heads, ratio, landmarks):
        options = {"patch_size": 8, "num_classes": 512, "embed_dim": 512, "depth": depth, "num_heads": heads}
        options |= {"mlp_ratio": ratio, "mask_ratio": 0.0}
        if landmarks is None:
            return importlib.import_module("cvlface_models.vit.vit").VisionTransformer(**options)
        # rpe_config of configs/v1_base_kprpe_splithead_unshared.yaml
        rpe = {"name": "KPRPE_shared", "rpe_on": "k", "shared_head": True, "mode": "ctx", "method": "product"}
        rpe |= {"ratio": 1.9, "ctx_type": "rel_keypoint_splithead_unshared", "num_keypoints": 5}
        net = importlib.import_module("cvlface_models.vit_kprpe.vit").VisionTransformerWithKPRPE(
            **options, rpe_config=Attributes(rpe)
        )
        weight = net.keypoint_linear.weight
        weight.data.copy_(0.2 * Rng.of(3, "landmarks", range(1)).normal(*weight.shape)[0])
        return WithLandmarks(net, landmarks)

    return build


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
        (mobilefacenet_relu6, (), "mobilefacenet-relu6", lambda s: s),
        (insightface_vit, (256, 12, 0.1), "vit-t", lambda s: s),
        (insightface_vit, (512, 12, 0.0), "vit-s", lambda s: {f"module.{k}": v for k, v in s.items()}),
        (insightface_vit, (512, 24, 0.05), "vit-b", lambda s: s),
        (cvlface_vit, (12, 8, 5, None), "cvlface-vit-small", lambda s: {f"model.net.{k}": v for k, v in s.items()}),
        (cvlface_vit, (24, 16, 3, None), "cvlface-vit-base", lambda s: {f"net.{k}": v for k, v in s.items()}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_same_weights_same_embeddings_of_other_families(tmp_path, monkeypatch, capsys, family, arguments, name, nest):
    theirs = as_trained(family(monkeypatch)(*arguments))
    torch.save(nest(theirs.state_dict()), tmp_path / "theirs.pth")
    ours = faceless.load(tmp_path / "theirs.pth")
    assert ours.name == name
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 112, 112).byte()
    if "vit" in name:
        in_double(monkeypatch, theirs, ours)
    with torch.no_grad():
        expected = theirs((images.float() - 127.5) / 127.5)
        found = ours(images).embedding
    difference = (found - expected).abs().max() / expected.abs().max()
    with capsys.disabled():
        print(f"{name}: {difference:.1e}")
    assert difference <= (1e-6 if "vit" in name else 1e-5)


@pytest.mark.parametrize(("arguments", "name"), [((12, 8, 5), "cvlface-vit-small"), ((24, 16, 3), "cvlface-vit-base")])
def test_cvlface_positions_relative_to_landmarks(tmp_path, monkeypatch, capsys, arguments, name):
    theirs = as_trained(cvlface_vit(monkeypatch)(*arguments, LANDMARKS))
    safetensors.torch.save_file(theirs.net.state_dict(), tmp_path / "model.safetensors")
    ours = faceless.load(tmp_path / "model.safetensors")
    assert (ours.name, ours.options["keypoints"]) == (name, True)
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 112, 112).byte()
    template = (torch.tensor(ARCFACE) / 112).double()
    in_double(monkeypatch, theirs, ours)
    pixels, theirs.landmarks = ours.preprocess(images).double(), LANDMARKS.double()
    with torch.no_grad():
        for expected, found in (
            (theirs(pixels), ours.backbone(pixels, LANDMARKS[:2].double())),
            (theirs.net(pixels, template.expand(2, 5, 2)), ours.backbone(pixels)),
        ):
            difference = (found - expected).abs().max() / expected.abs().max()
            with capsys.disabled():
                print(f"{name} with landmarks: {difference:.1e}")
            assert difference <= 1e-9
        assert (theirs(pixels) - ours.backbone(pixels)).abs().max() > 0.01


@pytest.mark.parametrize(("width", "depth", "name"), [(768, 24, "vit-l"), (1024, 48, "vit-h")])
def test_large_vits_have_the_names_and_shapes_of_theirs(monkeypatch, width, depth, name):
    # Its constructor reads numbers out of a tensor.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        theirs = insightface_vit(monkeypatch)(width, depth, 0.0)
        ours = ARCHITECTURES[name].build()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert recognize(theirs.state_dict()) == (
        name,
        {"embedding_dim": 512, "input_size": 112, "mask_token": True, "keypoints": False},
    )


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


def keras_on_torch(monkeypatch):
    """Keras, under the name that the authors import."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    module = TensorFlow(keras)
    module.shape = keras.ops.shape
    module.math = SimpleNamespace(ceil=math.ceil)
    module.image = SimpleNamespace(
        resize=lambda x, size, antialias, method: keras.ops.image.resize(x, size, method, antialias)
    )
    for name, value in {
        "": module,
        ".keras": keras,
        **{f".keras.{part}": getattr(keras, part) for part in ("backend", "models", "layers")},
    }.items():
        monkeypatch.setitem(sys.modules, f"tensorflow{name}", value)
    return keras


def ghostnet(monkeypatch, keras, stride):
    keras.saving.register_keras_serializable(package="keras2")(keras_2_hard_sigmoid)
    functions = importlib.import_module("keras.src.activations").ALL_OBJECTS_DICT
    monkeypatch.setitem(functions, "hard_sigmoid", keras_2_hard_sigmoid)
    return official("HamadYA/GhostFaceNets", "backbones/ghost_model.py").GhostNet(
        input_shape=(112, 112, 3), include_top=False, width=1.3, strides=stride
    )


def ghostnet_v2(monkeypatch, keras, stride):
    """With the layers of leondgarse/keras_cv_attention_models that it is made of, and none of its other models."""
    package = "keras_cv_attention_models"
    functional = SimpleNamespace(
        clip_by_value=keras.ops.clip,
        reduce_mean=lambda x, axes, keepdims: keras.ops.mean(x, axes, keepdims=keepdims),
    )
    backend = {name: getattr(keras, name) for name in ("layers", "models", "initializers")}
    backend |= {"functional": functional, "image_data_format": keras.backend.image_data_format}
    backend |= {"register_keras_serializable": keras.saving.register_keras_serializable, "is_torch_backend": False}
    for name, values in {
        package: {},
        f"{package}.backend": backend,
        f"{package}.download_and_load": {"reload_model_weights": lambda *args: None},
    }.items():
        stub = ModuleType(name)
        vars(stub).update(values)
        monkeypatch.setitem(sys.modules, name, stub)
    sys.modules[package].backend = sys.modules[f"{package}.backend"]
    layers = official(f"leondgarse/{package}", f"{package}/common_layers.py")
    layers.add_pre_post_process = lambda *args, **options: None
    monkeypatch.setitem(sys.modules, f"{package}.attention_layers", layers)
    # As GhostFaceNets.py builds "ghostnetv2".
    return official("HamadYA/GhostFaceNets", "backbones/ghostv2.py").GhostNetV2(
        stem_strides=stride, width_mul=1.3, input_shape=(112, 112, 3), num_classes=0, activation="prelu"
    )


@pytest.mark.parametrize(
    ("build", "name", "stride", "count"),
    [
        (ghostnet, "ghostfacenet", 1, 4_088_300),
        (ghostnet, "ghostfacenet", 2, 4_066_388),
        (ghostnet_v2, "ghostfacenet-v2", 1, 6_880_288),
    ],
)
def test_ghostfacenet(tmp_path, monkeypatch, capsys, build, name, stride, count):
    """A model of the authors' code, saved by Keras as they save theirs."""
    pytest.importorskip("h5py")
    keras = keras_on_torch(monkeypatch)
    stem = build(monkeypatch, keras, stride)
    builder = official("HamadYA/GhostFaceNets", "GhostFaceNets.py")
    whole = builder.buildin_models(stem, dropout=0, emb_shape=512, output_layer="GDC", bn_momentum=0.9, bn_epsilon=1e-5)
    theirs = builder.replace_ReLU_with_PReLU(whole)
    assert theirs.count_params() == count
    for number, layer in enumerate(theirs.layers):
        drawn = []
        for index, array in enumerate(layer.get_weights()):
            rng = Rng.of(number, f"weights {index}", range(1))
            low, high = (0.5, 1.5) if isinstance(layer, keras.layers.BatchNormalization) else (0.1, 0.4)
            normal = array.ndim == 4
            value = rng.normal(*array.shape)[0] if normal else rng.uniform(*array.shape, low=low, high=high)[0]
            drawn.append(value / array[..., 0].size ** 0.5 if normal else value)
        layer.set_weights([value.numpy() for value in drawn])
    theirs.save(tmp_path / "theirs.h5")
    theirs.compile("sgd", "mse", metrics=["mae"])
    theirs.save(tmp_path / "theirs.keras")
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours = faceless.load(tmp_path / "theirs.h5")
    assert (ours.name, ours.options["stride"], ours.options["width"]) == (name, stride, 1.3)
    for file in ("theirs.keras", "theirs.weights.h5"):
        again = faceless.load(tmp_path / file)
        assert (again.name, again.options) == (ours.name, ours.options)
        for (key, expected), found in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(found, expected), key
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 112, 112).byte()
    pixels = ((images.float() - 127.5) * 0.0078125).permute(0, 2, 3, 1)
    with torch.no_grad():
        expected = torch.as_tensor(theirs(pixels, training=False)).cpu()
        found = ours(images).embedding
    difference = (found - expected).abs().max() / expected.abs().max()
    with capsys.disabled():
        print(f"{name} stride {stride}: {difference:.1e}")
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
