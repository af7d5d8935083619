"""Our backbones against the authors' own classes, read from checkouts in the folder ``FACELESS_OFFICIAL``."""

import importlib.util
import os
from pathlib import Path

import pytest
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


def as_trained(net):
    """Scales, shifts and slopes unlike those of a new network, and the running statistics that belong to them."""
    for i, (key, parameter) in enumerate(net.named_parameters()):
        if parameter.ndim == 1:
            parameter.data.copy_(Rng.of(i, key, range(1)).uniform(len(parameter), low=0.2, high=0.6)[0])
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(Rng.of(1, "statistics", range(4)).uniform(3, 112, 112, low=-1))
    return net.eval()


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
