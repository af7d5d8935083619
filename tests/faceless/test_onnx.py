"""ONNX: round trips of every backbone, graphs of strangers, operators against onnxruntime, hostile files."""

import copy
import pickle
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import faceless
from faceless import onnx_files
from faceless.backbones import ARCHITECTURES
from faceless.errors import InputError
from faceless.onnx_files import main
from faceless.onnx_graph import OPERATORS, OnnxGraph, UnconvertibleError
from faceless.randomness import Rng
from faceless.recognizer import InputSpec, Recognizer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
#: Each backbone in a small size. What takes seconds even so is run by hand.
SMALL = {
    "iresnet18": {"input_size": 32},
    "ir18": {"input_size": 32},
    "cbam18": {"input_size": 32},
    "mobilefacenet": {"input_size": 48, "width": 0.25},
    "mbf": {"input_size": 48},
    "mixfacenet-xs": {"input_size": 64},
    "ghostfacenet": {"input_size": 48, "width": 0.5},
    "pocketnet-s": {"input_size": 32},
    "edgeface-xxs": {"input_size": 64},
    "tinyfar-c": {"input_size": 64},
    "mobilenetv3-small": {"input_size": 64},
    "timm": {"model": "vit_tiny_patch16_224", "input_size": 32},
    "transformers": {"model": "vit", "config": TINY, "input_size": 32},
    "slimresnet": {"input_size": 48, "widths": [8, 16], "depths": [1, 2]},
    "dlib-resnet29": {},
}
TOO_LARGE = "vit-h"
SLOW = {name: {} for name in ARCHITECTURES if name not in {*SMALL, TOO_LARGE}} | {
    "iresnet100": {"input_size": 48},
    "iresnet200": {"input_size": 48},
    "ir101": {"input_size": 48},
    "cbam100": {"input_size": 48},
    "cbam152": {"input_size": 48},
    "mobilefacenet-relu6": {"input_size": 48},
    "ghostfacenet-v2": {"input_size": 48, "width": 0.5},
    "vit-t": {"input_size": 18},
    "vit-l": {"input_size": 48},
}
LANDMARKS = [(name, {"keypoints": True, "input_size": 48}) for name in ("cvlface-vit-small", "cvlface-vit-base")]


def shaken(recognizer):
    """Scales and shifts unlike their initial values, so that a lost one shows, and the statistics that go with them."""
    for i, (key, parameter) in enumerate(recognizer.backbone.named_parameters()):
        if parameter.ndim == 1:
            parameter.data.copy_(Rng.of(i, key, range(1)).uniform(len(parameter), low=0.2, high=0.6)[0])
    for module in recognizer.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        recognizer.train()(faces(16, recognizer.spec.height))
    return recognizer.eval()


def faces(count, size):
    return Rng.of(0, "faces", range(count)).integers(256, 3, size, size).byte()


def distance(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def batch_norms(network):
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [*SMALL.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in (*SLOW.items(), *LANDMARKS))],
)
def test_every_backbone_goes_through_a_file(tmp_path, name, options):
    net = shaken(faceless.create(name, **options))
    file = faceless.export_onnx(net, tmp_path / "net.onnx", {"teacher": "me"})
    again, computed = faceless.load(file), faceless.load(file, runtime=True)
    assert (again.name, again.spec, again.options) == (name, net.spec, net.options)
    assert again.source["engine"] == "torch"
    assert again.source["record"] == {"teacher": "me"}
    assert batch_norms(again) == batch_norms(net)
    assert computed.source["engine"].startswith("onnxruntime")
    for batch in (1, 3):
        images = faces(batch, net.spec.height)
        with torch.no_grad():
            expected = net(images).embedding
            assert torch.equal(again(images).embedding, expected)
            assert distance(computed(images).embedding, expected) < 2e-5


def small(**options):
    return shaken(faceless.create("mobilefacenet", embedding_dim=16, input_size=32, width=0.25, **options))


def foreign(net, path, names=("data", "out"), **options):
    """The backbone alone, as others export it: BN merged into convolutions, no word about its pixels."""
    size = net.spec.height
    with pytest.warns(DeprecationWarning):
        torch.onnx.export(
            net.backbone,
            (torch.zeros(2, 3, size, size),),
            str(path),
            dynamo=False,
            opset_version=13,
            input_names=[names[0]],
            output_names=[names[1]],
            **({"dynamic_axes": {names[0]: {0: "n"}, names[1]: {0: "n"}}} | options),
        )
    return path


def test_bgr_and_other_ranges_are_inside_of_the_file(tmp_path):
    spec = InputSpec(
        32, 32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order="BGR", value_range=1.0, framing="dlib"
    )
    net = small()
    net = faceless.recognizer.Recognizer(net.backbone, spec, name=net.name, options=net.options).eval()
    file = faceless.export_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(file))
    (out,) = session.run(None, {"faces": faces(2, 32).float().numpy()})
    assert distance(torch.from_numpy(out), net(faces(2, 32)).embedding.detach()) < 1e-4
    assert faceless.load(file).spec == spec
    # By its nodes' names, as InsightFace's loader goes about it.
    assert faceless.load(file, runtime=True).spec == InputSpec(32, 32, mean=(0, 0, 0), std=(1, 1, 1))


def test_the_same_recognizer_gives_the_same_bytes_and_no_paths(tmp_path):
    net = small()
    one, two = (faceless.export_onnx(net, tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert one == two
    assert b".py" not in one
    onnx.checker.check_model(onnx.load_model_from_string(one), full_check=True)


def test_graphs_of_strangers_become_networks_with_gradients(tmp_path):
    net = shaken(faceless.create("iresnet18", embedding_dim=32, input_size=32))
    found = faceless.load(foreign(net, tmp_path / "w600k_r18.onnx"))
    images = faces(3, 32)
    assert found.source["engine"] == "torch"
    assert isinstance(found.backbone, OnnxGraph)
    assert found.spec == InputSpec(32, 32)
    assert found.embedding_dim == 32
    assert distance(found(images).embedding, net(images).embedding.detach()) < 1e-4
    # Of 31, those behind a convolution are merged into it; left are the first of 8 blocks and the last two.
    assert batch_norms(found) == 10
    first = next(module for module in found.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.equal(first.running_mean, net.backbone.layer1[0].bn1.running_mean)
    assert not first.training
    pixels = images.float().requires_grad_()
    theirs = images.float().requires_grad_()
    (gradient,) = torch.autograd.grad(found(pixels).embedding.square().sum(), pixels)
    (expected,) = torch.autograd.grad(net(theirs).embedding.square().sum(), theirs)
    assert distance(gradient, expected) < 1e-4
    with pytest.raises(InputError, match="no graphs of ONNX"):
        faceless.save(found, tmp_path / "student")


def test_unmerged_graphs_with_their_names_become_our_networks(tmp_path):
    net = shaken(faceless.create("iresnet18", embedding_dim=32, input_size=32))
    path = foreign(net, tmp_path / "x.onnx", training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    found = faceless.load(path)
    assert found.name == "iresnet18"
    assert batch_norms(found) == 31
    assert torch.equal(found(faces(2, 32)).embedding, net(faces(2, 32)).embedding)


def test_a_description_that_the_graph_belies_is_not_believed(tmp_path):
    file = faceless.export_onnx(small(), tmp_path / "net.onnx")
    model = onnx.load(file)
    next(node for node in model.graph.node if node.op_type == "Add").op_type = "Sub"
    onnx.save(model, file)
    found = faceless.load(file)
    assert isinstance(found.backbone, OnnxGraph)
    images = faces(2, 32)
    expected = faceless.load(file, runtime=True)(images).embedding
    assert distance(found(images).embedding, expected) < 1e-4
    assert distance(small()(images).embedding, expected) > 1e-2


def test_batches_that_the_graph_fixes_are_filled(tmp_path):
    net = small()
    found = faceless.load(foreign(net, tmp_path / "x.onnx", dynamic_axes={}), runtime=True)
    for batch in (1, 2, 5):
        assert distance(found(faces(batch, 32)).embedding, net(faces(batch, 32)).embedding.detach()) < 1e-4


def test_runtime_teachers_copy_travel_and_have_no_gradients(tmp_path):
    net = faceless.load(foreign(small(), tmp_path / "x.onnx"), runtime=True)
    expected = net.embed(faces(2, 32))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.embed(faces(2, 32)), expected)
    with pytest.raises(InputError, match="no gradients"):
        net(faces(2, 32).float().requires_grad_())


def channels_last(path):
    """A pixel's channels together, as TensorFlow's converters write: a mean over the face, and a product."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    return written(path, nodes, [weight], ["n", 16, 24, 3])


def written(path, nodes, constants=(), shape=("n", 3, 16, 16), outputs=("y",), kind=TensorProto.FLOAT, opset=13):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.mark.parametrize("runtime", [False, True])
def test_channels_may_come_last(tmp_path, runtime):
    found = faceless.load(channels_last(tmp_path / "x.onnx"), runtime=runtime)
    assert found.spec == InputSpec(16, 24)
    images = Rng.of(0, "wide", range(2)).integers(256, 3, 16, 24).byte()
    weight = torch.arange(12.0).view(3, 4)
    expected = ((images.float() - 127.5) / 127.5).mean((2, 3)) @ weight
    assert distance(found(images).embedding, expected) < 1e-4


@pytest.mark.parametrize("first", [("Sub", "Mul"), ("_minusscalar0", "_mulscalar0"), ("a", "b")])
def test_normalization_inside_is_seen_by_names(tmp_path, first):
    nodes = [
        helper.make_node("Sub", ["x", "c"], ["s"], name=first[0]),
        helper.make_node("Mul", ["s", "c"], ["p"], name=first[1]),
        helper.make_node("GlobalAveragePool", ["p"], ["q"]),
        helper.make_node("Flatten", ["q"], ["y"]),
    ]
    constant = numpy_helper.from_array(np.float32(2), "c")
    found = faceless.load(written(tmp_path / "x.onnx", nodes, [constant]))
    plain = InputSpec(16, 16) if first[0] == "a" else InputSpec(16, 16, mean=(0, 0, 0), std=(1, 1, 1))
    assert found.spec == plain


def mean_of(**_):
    return [helper.make_node("GlobalAveragePool", ["x"], ["q"]), helper.make_node("Flatten", ["q"], ["y"])]


def test_numbers_beside_the_file(tmp_path):
    net = small()
    model = onnx.load(foreign(net, tmp_path / "x.onnx"))
    onnx.save(model, tmp_path / "y.onnx", save_as_external_data=True, location="y.data", size_threshold=0)
    found = faceless.load(tmp_path / "y.onnx")
    assert distance(found(faces(2, 32)).embedding, net(faces(2, 32)).embedding.detach()) < 1e-4
    before = found.source["sha256"]
    data = bytearray((tmp_path / "y.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "y.data").write_bytes(data)
    assert faceless.load(tmp_path / "y.onnx").source["sha256"] != before
    (tmp_path / "y.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"y\.onnx: (wants|the files beside it do not fit)"):
        faceless.load(tmp_path / "y.onnx")
    (tmp_path / "y.data").rename(tmp_path / "z.data")
    (tmp_path / "y.data").symlink_to(tmp_path / "z.data")
    with pytest.raises(InputError, match="no file beside it"):
        faceless.load(tmp_path / "y.onnx")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/b", "", ".", "..", "a\\b", "missing"])
def test_numbers_from_elsewhere_are_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "in").mkdir()
    weight = numpy_helper.from_array(np.zeros((3, 4), np.float32), "w")
    model = onnx.load(
        written(tmp_path / "in/x.onnx", [*mean_of(), helper.make_node("Identity", ["w"], ["z"])], [weight])
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "in/x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="no file beside it"):
        faceless.load(tmp_path / "in/x.onnx")


@pytest.mark.parametrize("times", [1, 3])
def test_numbers_that_are_used_again_and_again(tmp_path, times):
    """A file of 48 bytes may be read once, and not for several constants of 48 bytes."""
    (tmp_path / "w.data").write_bytes(np.ones(12, np.float32).tobytes())
    constants = [numpy_helper.from_array(np.zeros((3, 4), np.float32), f"w{i}") for i in range(times)]
    nodes = [
        *mean_of()[:1],
        helper.make_node("Flatten", ["q"], ["f"]),
        *(helper.make_node("MatMul", ["f", f"w{i}"], ["y" if i == 0 else f"z{i}"]) for i in range(times)),
    ]
    model = onnx.load(written(tmp_path / "x.onnx", nodes, constants))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.data")
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    if times == 1:
        assert faceless.load(tmp_path / "x.onnx").embedding_dim == 4
    else:
        with pytest.raises(InputError, match="wants 144 bytes from files of 48"):
            faceless.load(tmp_path / "x.onnx")


def test_numbers_of_nodes_and_sparse_ones_stay_inside(tmp_path):
    outside = numpy_helper.from_array(np.zeros(3, np.float32), "v")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="x.data")
    (tmp_path / "x.data").write_bytes(bytes(12))
    constant = helper.make_node("Constant", [], ["c"], value=outside)
    with pytest.raises(InputError, match="unusual"):
        faceless.load(written(tmp_path / "x.onnx", [constant, *mean_of()]))
    model = onnx.load(written(tmp_path / "y.onnx", mean_of()))
    model.graph.sparse_initializer.add().values.CopyFrom(outside)
    (tmp_path / "y.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="unusual"):
        faceless.load(tmp_path / "y.onnx")


def test_whole_pixels_are_not_normalized(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["f"], ["q"]),
        helper.make_node("Flatten", ["q"], ["y"]),
    ]
    path = written(tmp_path / "x.onnx", nodes, kind=TensorProto.UINT8)
    for runtime in (False, True):
        found = faceless.load(path, runtime=runtime)
        assert found.spec == InputSpec(16, 16, mean=(0, 0, 0), std=(1, 1, 1))
        assert distance(found(faces(2, 16)).embedding, faces(2, 16).float().mean((2, 3))) < 1e-6


def test_operators_in_an_unknown_shape_are_left_to_onnxruntime(tmp_path):
    nodes = [
        helper.make_node("Cos", ["x"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["q"]),
        helper.make_node("Flatten", ["q"], ["y"]),
    ]
    found = faceless.load(written(tmp_path / "x.onnx", nodes))
    assert found.source["engine"] == "onnxruntime, without gradients: operators Cos"
    pixels = (faces(2, 16).float() - 127.5) / 127.5
    assert distance(found(faces(2, 16)).embedding, pixels.cos().mean((2, 3))) < 1e-5


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        (mean_of(), {"shape": ["n", 3, 16]}, r"\[B, 3, H, W\]"),
        (mean_of(), {"shape": ["n", 1, 16, 16]}, r"\[B, 3, H, W\]"),
        (mean_of(), {"shape": ["n", 3, 99999, 16]}, r"\[B, 3, H, W\]"),
        (mean_of(), {"kind": TensorProto.STRING}, "one batch of pictures"),
        ([helper.make_node("Nonsense", ["x"], ["y"])], {}, "does not run it"),
        ([helper.make_node("Nonsense", ["x"], ["y"], domain="org.evil")], {}, "does not run it"),
        ([helper.make_node("Flatten", ["nowhere"], ["y"])], {}, "does not run it"),
        (
            [
                helper.make_node(
                    "If",
                    ["x"],
                    ["y"],
                    then_branch=helper.make_graph([helper.make_node("Loop", ["x"], ["y"])], "t", [], []),
                    else_branch=helper.make_graph([], "e", [], []),
                )
            ],
            {},
            "holds Loop",
        ),
        ([], {}, "no graph"),
    ],
)
def test_graphs_that_are_no_recognizers(tmp_path, nodes, options, message):
    with pytest.raises(InputError, match=rf"x\.onnx: .*{message}") as error:
        faceless.load(written(tmp_path / "x.onnx", nodes, **options))
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    data = foreign(small(), tmp_path / "x.onnx").read_bytes()
    file = tmp_path / "y.onnx"
    for content in (b"", b"not a graph", data[: len(data) // 2], data[:-3], data[100:], bytes(1000)):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"y\.onnx: "):
            faceless.load(file)
    model = onnx.load_model_from_string(data)
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] = np.nan
    tensor.raw_data = values.tobytes()
    onnx.save(model, file)
    for runtime in (False, True):
        with pytest.raises(InputError, match=r"y\.onnx: .* not finite"):
            faceless.load(file, runtime=runtime)
    tensor.raw_data = values.tobytes()[:-4]
    onnx.save(model, file)
    with pytest.raises(InputError, match=r"y\.onnx: "):
        faceless.load(file)


def test_fuzzed_files_end_in_one_line(tmp_path):
    data = faceless.export_onnx(small(), tmp_path / "x.onnx").read_bytes()
    header = next(i for i in range(len(data)) if data[i : i + 4] == b"Conv")
    file = tmp_path / "y.onnx"
    places = Rng.of(0, "fuzz", range(40)).integers(header + 4000, 4)
    for row in places.tolist():
        broken = bytearray(data)
        for place in row:
            broken[place] ^= 1 << (place % 8)
        file.write_bytes(broken)
        try:
            onnx_files.read(file)
        except InputError as error:
            assert str(error).startswith(str(file))


def test_without_the_extra_one_line_says_so(tmp_path, monkeypatch):
    path = faceless.export_onnx(small(), tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install faceless-distill\[onnx\]"):
        faceless.load(path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install faceless-distill\[onnx\]"):
        faceless.export_onnx(small(), tmp_path / "y.onnx")


def test_the_command(tmp_path, capsys):
    folder = faceless.save(small(), tmp_path / "student", {"real_faces_in_training": False})
    main([str(folder), str(tmp_path / "student.onnx")])
    assert "student.onnx" in capsys.readouterr().out
    assert faceless.load(tmp_path / "student.onnx").source["record"]["record"] == {"real_faces_in_training": False}


def node(kind, *constants, outputs=1, shape=(2, 6, 8, 8), opset=13, **attributes):
    return (kind, constants, shape, opset, attributes, outputs)


def ints(*values):
    return np.array(values, np.int64)


def floats(*shape, seed=0):
    return Rng.of(seed, "constant", range(1)).normal(*shape)[0].numpy().astype(np.float32)


CASES = [
    node("Conv", floats(4, 6, 3, 3), floats(4), strides=[2, 1], pads=[1, 0, 1, 0]),
    node("Conv", floats(4, 6, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER", shape=(2, 6, 7, 8)),
    node("Conv", floats(4, 6, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    node("Conv", floats(4, 6, 3, 3), auto_pad="VALID", dilations=[2, 2]),
    node("Conv", floats(6, 1, 3, 3), group=6, pads=[0, 1, 2, 0]),
    node("BatchNormalization", *(abs(floats(6, seed=i)) for i in range(4)), epsilon=0.001),
    node("BatchNormalization", *(abs(floats(6, seed=i)) for i in range(4)), shape=(2, 6)),
    node("PRelu", floats(6, 1, 1)),
    node("PRelu", floats(8)),
    node("PRelu", floats(1)),
    node("PRelu", floats(5), shape=(2, 5)),
    node("LeakyRelu", alpha=0.3),
    node("Clip", np.float32(-0.5), np.float32(0.5)),
    node("Clip", opset=6, min=0.0, max=0.25),
    node("HardSigmoid"),
    node("HardSigmoid", alpha=1 / 6, beta=0.5),
    node("HardSwish", opset=14),
    *(node(k) for k in ("Relu", "Sigmoid", "Tanh", "Exp", "Neg", "Erf", "Softplus", "Elu", "Identity", "Dropout")),
    node("Gelu", opset=20),
    node("Gelu", opset=20, approximate="tanh"),
    node("Reciprocal"),
    *(node(k, floats(6, 1, 1)) for k in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    node("Sum", floats(2, 6, 8, 8), floats(2, 6, 8, 8, seed=1)),
    node("Pow", np.float32(2)),
    node("Gemm", floats(6, 3), floats(3), shape=(2, 6), alpha=0.5, beta=2.0),
    node("Gemm", floats(3, 6), shape=(2, 6), transB=1),
    node("Gemm", floats(2, 4), shape=(2, 6), transA=1),
    node("MatMul", floats(8, 5)),
    node("Flatten"),
    node("Flatten", axis=2),
    node("Reshape", ints(0, -1, 4)),
    node("Transpose", perm=[0, 2, 3, 1]),
    node("Transpose"),
    node("Squeeze", ints(2, 3), shape=(2, 6, 1, 1)),
    node("Squeeze", opset=11, axes=[3], shape=(2, 6, 4, 1)),
    node("Squeeze", shape=(2, 6, 1, 1)),
    node("Unsqueeze", ints(0, -1)),
    node("Unsqueeze", opset=11, axes=[1, 3]),
    node("Concat", floats(2, 3, 8, 8), axis=1),
    node("Split", ints(2, 4), axis=1, outputs=2),
    node("Split", opset=11, axis=1, split=[1, 5], outputs=2),
    node("Split", axis=1, outputs=3),
    node("Slice", ints(1, 0), ints(-1, 2**62), ints(2, 3), ints(1, 2)),
    node("Slice", ints(-1), ints(-(2**62)), ints(1), ints(-1)),
    node("Slice", ints(2), ints(5)),
    node("Slice", opset=9, starts=[1], ends=[3], axes=[2]),
    node("Gather", ints(2, -1, 0), axis=1),
    node("Gather", np.int64(1), axis=2),
    node("Pad", ints(0, 0, 1, 2, 0, 0, 0, 3), np.float32(0.5)),
    node("Pad", ints(0, 0, 1, 2, 0, 0, 1, 3), mode="reflect"),
    node("Pad", opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1], value=2.0),
    node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    node("GlobalAveragePool"),
    node("Abs"),
    node("ReduceMax", axes=[2, 3]),
    node("ReduceMax", axes=[1], keepdims=0),
    node("ReduceMean", axes=[2, 3]),
    node("ReduceMean", ints(1), opset=18, keepdims=0),
    node("ReduceSum", ints(2)),
    node("ReduceL2", axes=[1], keepdims=1),
    node("ReduceMean"),
    node("Softmax", axis=1),
    node("Softmax"),
    node("LayerNormalization", floats(8), floats(8), opset=17, axis=-1, epsilon=1e-3),
    node("LpNormalization", axis=1, p=2, shape=(2, 6)),
    node("Expand", ints(2, 6, 8, 8), shape=(2, 6, 1, 1)),
    node("Cast", to=TensorProto.DOUBLE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_operators_agree_with_onnxruntime(case):
    kind, constants, shape, opset, attributes, outputs = case
    tensors = [numpy_helper.from_array(np.asarray(value), f"c{i}") for i, value in enumerate(constants)]
    names = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", *(t.name for t in tensors)], names, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        tensors,
    )
    if kind == "Cast":
        graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    x = floats(*shape, seed=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, expected in zip(names, session.run(names, {"x": x})):
        ours = OnnxGraph(graph, opset, "x", name, embedding_dim=1)
        found = run(ours, torch.from_numpy(x))
        assert found.shape == expected.shape
        assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def run(graph, x):
    """What the graph gives before it is flattened to rows."""
    seen = {}
    name = next(step for step, _, outputs in graph.steps if graph.target in outputs)
    _, _, outputs = next(step for step in graph.steps if step[0] == name)
    hook = graph.get_submodule(name).register_forward_hook(lambda m, i, out: seen.update(out=out))
    try:
        graph(x)
    except (IndexError, RuntimeError):
        assert "out" in seen
    hook.remove()
    out = seen["out"]
    return out[outputs.index(graph.target)] if isinstance(out, tuple) else out


def test_shapes_may_be_computed():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["b"]),
        helper.make_node("Unsqueeze", ["b", "axis"], ["b1"]),
        helper.make_node("Concat", ["b1", "minus"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.int64(0), "zero"),
        numpy_helper.from_array(ints(0), "axis"),
        numpy_helper.from_array(ints(-1), "minus"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], constants)
    found = OnnxGraph(graph, 13, "x", "y", embedding_dim=12)
    assert found(torch.zeros(5, 3, 2, 2)).shape == (5, 12)


def test_memory_bombs_and_foreign_operators_are_not_converted():
    def graph(*nodes, constants=()):
        return OnnxGraph(helper.make_graph(nodes, "g", [], [], constants), 13, "x", "y", embedding_dim=1)

    with pytest.raises(UnconvertibleError, match=r"org\.evil"):
        graph(helper.make_node("Relu", ["x"], ["y"], domain="org.evil"))
    with pytest.raises(UnconvertibleError, match="Loop"):
        graph(helper.make_node("Loop", ["x"], ["y"]))
    with pytest.raises(UnconvertibleError, match="nodes"):
        graph(*(helper.make_node("Relu", ["x"], ["y"]) for _ in range(20_001)))
    bomb = graph(
        helper.make_node("ConstantOfShape", ["s"], ["y"]),
        constants=[numpy_helper.from_array(ints(2**20, 2**20), "s")],
    )
    with pytest.raises(UnconvertibleError, match="ConstantOfShape"):
        bomb(torch.zeros(1, 3, 2, 2))


def test_every_operator_is_compared_or_used_in_a_network():
    compared = {case[0] for case in CASES}
    elsewhere = {"Shape", "ConstantOfShape", "Constant"}
    networks = {"Equal", "Where", "Sqrt"}
    assert set(OPERATORS) - compared - elsewhere - networks == set()


def test_all_backbones_are_in_the_lists():
    assert set(SMALL) | set(SLOW) | {TOO_LARGE} == set(ARCHITECTURES)
    assert not set(SMALL) & set(SLOW)


def test_what_no_file_can_hold_is_told(tmp_path):
    with torch.device("meta"):
        net = Recognizer(ARCHITECTURES[TOO_LARGE].build(), InputSpec(), name=TOO_LARGE)
    with pytest.raises(InputError, match=r"302\d{7} bytes of weights are more than an ONNX file can have"):
        faceless.export_onnx(net, tmp_path / "net.onnx")
