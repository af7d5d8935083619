"""Weights out of TorchScript and ExportedProgram files, whose programs are not run."""

import json
import warnings
import zipfile

import pytest
import torch
from torch import Tensor, nn

import faceless
from faceless import archives
from faceless.errors import InputError
from faceless.randomness import Rng


def small():
    net = faceless.create("mobilefacenet", embedding_dim=16, input_size=32, width=0.25).eval()
    for i, (key, value) in enumerate(net.backbone.state_dict().items()):
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(Rng.of(i, key, range(1)).uniform(len(value), low=0.5, high=1.5)[0])
    return net


def scripted(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), str(path))


def traced(net, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 3, 32, 32)), str(path))


def exported(net, path):
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 32, 32),)), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for write, name in ((scripted, "scripted.pt"), (traced, "traced.pth"), (exported, "exported.pt2")):
        write(small().backbone, folder / name)
    return folder


@pytest.mark.parametrize("name", ["scripted.pt", "traced.pth", "exported.pt2"])
def test_known_networks_come_out_of_programs(files, name):
    images = Rng.of(0, "faces", range(2)).integers(256, 3, 32, 32).byte()
    found = faceless.load(files / name)
    assert (found.name, found.spec.height) == ("mobilefacenet", 32)
    assert torch.equal(found(images).embedding, small()(images).embedding)


class Leaky(nn.Module):
    """What TorchScript can do to whoever runs it: this one makes a file."""

    def __init__(self, path):
        super().__init__()
        self.path: str = path
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file(self.path, shared=True, size=4).sum() * self.weight.sum()


def test_programs_of_strangers_are_refused_and_not_run(tmp_path):
    target = tmp_path / "made"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Leaky(str(target))), str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match=r"x\.pt: .*no network we know.*never run") as error:
        faceless.load(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert not target.exists()


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of an archive, its entries passed through ``change(name, content)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content, compression)
    return target


def weights_config(change):
    def edit(name, content):
        if not name.endswith("weights_config.json"):
            return content
        config = json.loads(content)
        change(config["config"]["conv1.bn.weight"])
        return json.dumps(config)

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights_config(lambda e: e.update(path_name="../../etc/passwd")), "damaged archive"),
        (weights_config(lambda e: e.update(use_pickle=True)), "is pickled"),
        (weights_config(lambda e: e["tensor_meta"].update(dtype=99)), "damaged archive"),
        (weights_config(lambda e: e["tensor_meta"].update(sizes=[{"as_int": 10**12}])), "damaged archive"),
        (weights_config(lambda e: e["tensor_meta"].update(strides=[{"as_int": 10**6}])), "damaged archive"),
        (weights_config(lambda e: e["tensor_meta"].update(storage_offset={"as_int": -1})), "damaged archive"),
        (weights_config(lambda e: e["tensor_meta"].update(sizes=[{"as_expr": "__import__('os')"}])), "damaged archive"),
        (lambda name, content: b"{" if name.endswith("weights_config.json") else content, "damaged archive"),
        (lambda name, content: None if name.endswith("weight_3") else content, "damaged archive"),
        (lambda name, content: content[:5] if name.endswith("weight_3") else content, "damaged archive"),
    ],
)
def test_damaged_exported_programs(files, tmp_path, change, message):
    file = rewritten(files / "exported.pt2", tmp_path / "x.pt2", change)
    with pytest.raises(InputError, match=rf"x\.pt2: .*{message}") as error:
        faceless.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, content: content[: len(content) // 2] if name.endswith("/data.pkl") else content,
        lambda name, content: None if name.endswith("/data/3") else content,
        lambda name, content: content[:4] if name.endswith("/data/3") else content,
        lambda name, content: (
            content.replace(b"torch._utils\n_rebuild_tensor_v2", b"os\nsystem")
            if name.endswith("/data.pkl")
            else content
        ),
        lambda name, content: b"\x80\x02]." if name.endswith("/data.pkl") else content,
    ],
)
def test_damaged_torchscript(files, tmp_path, change):
    file = rewritten(files / "scripted.pt", tmp_path / "x.pt", change)
    with pytest.raises(InputError, match=r"x\.pt: ") as error:
        faceless.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["scripted.pt", "exported.pt2"])
def test_compressed_programs_are_refused(files, tmp_path, name):
    file = rewritten(files / name, tmp_path / name, lambda _, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        faceless.load(file)


def test_truncated_programs(files, tmp_path):
    for name in ("scripted.pt", "exported.pt2"):
        data = (files / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(InputError, match=name):
            faceless.load(tmp_path / name)


def test_modules_in_modules_without_end_are_refused(files):
    loop = archives.Call("__torch__.A", (), {}, {})
    loop.state["inner"] = loop
    with pytest.raises(InputError, match="nested"):
        archives._collect(loop, "", None, {}, files, 0)
