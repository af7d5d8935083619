"""Comparisons: the figures are those of the parts, the page is whole, and mistakes are one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import faceless
from eval import compare, figures, metrics
from eval.verify import benchmark_for, verify
from faceless.errors import InputError
from tests.eval.run_folder import faces
from tests.eval.test_pairs import write_pairs
from tests.eval.test_report import Links, probe

SIZES = {"small": (4, 8), "large": (16, 32)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Two runs: one of generated faces, one that says nothing about them."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, widths) in enumerate(SIZES.items()):
        student = faceless.create(
            "slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=seed, widths=widths, depths=(1, 1)
        )
        teacher = {"name": "dlib-resnet29", "embedding_dim": 128}
        faceless.save(student, folder / name / "student", record={})
        (folder / name / "provenance.json").write_text(json.dumps({"teacher": teacher}))
    (folder / "small" / "provenance.json").write_text(json.dumps({"teacher": teacher, "real_faces_in_training": False}))
    return [str(folder / name) for name in SIZES]


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    for row, image in enumerate(faces(8, 4, noise=30).images):
        target = folder / f"p{row // 4}" / f"{row % 4}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(target)
    return folder


@pytest.fixture(scope="module")
def groups(people) -> Path:
    path = people.parent / "groups.csv"
    path.write_text("".join(f"p{n}, {'even' if n % 2 == 0 else 'odd'}\n" for n in range(8)))
    return path


@pytest.fixture(scope="module")
def rfw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("RFW")
    for name, noise in (("North", 20.0), ("South", 60.0)):
        write_pairs(folder / f"{name}.bin", noise=noise)
    return folder


@pytest.fixture(scope="module")
def output(runs, people, groups, rfw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "out"
    compare.main(
        [
            *("--runs", *runs, "--models", str(Path(runs[0]) / "student")),
            *("--benchmark", str(people), f"rfw:{rfw}", str(rfw / "South.bin")),
            *("--groups", str(groups), "--bootstrap", "60", "--output", str(folder)),
        ]
    )
    return folder


@pytest.fixture(scope="module")
def content(output):
    return json.loads((output / "comparison.json").read_text())


def test_figures_are_those_of_verification(content, runs, people):
    assert [model["label"] for model in content["models"]] == ["small", "large", "student"]
    assert [model["real_faces_in_training"] for model in content["models"]] == [False, None, None]
    assert [model["teacher"] for model in content["models"]] == ["dlib-resnet29", "dlib-resnet29", None]
    found = content["benchmarks"][people.name]
    for label, run in zip(SIZES, runs):
        net = faceless.load(Path(run) / "student")
        alone = verify(net, benchmark_for(net, people), bootstrap=60)
        summary = found["results"][label]
        assert summary["tar_at_far"] == alone.summary()["tar_at_far"]
        assert summary["intervals"]["eer"] == alone.summary()["intervals"]["eer"]
        assert found["accuracy"][label] == alone.points["1e-3"].tar
    assert found["results"]["small"]["eer"] == found["results"]["student"]["eer"]  # the same weights
    assert found["accuracy"]["is"] == "TAR at FAR 0.1 %"
    assert content["benchmarks"]["South"]["accuracy"]["is"] == "Accuracy"


def test_nobody_on_the_front_is_beaten(content):
    costs = {model["label"]: model["efficiency"]["macs"] for model in content["models"]}
    assert costs["small"] == costs["student"] < costs["large"]
    for found in content["benchmarks"].values():
        accuracy = found["accuracy"]
        front = found["pareto"]["million MACs a face"]
        better = accuracy["large"] > accuracy["small"]
        assert front == (["small", "large", "student"] if better else ["small", "student"])


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_its_definition_says(points):
    costs, values = zip(*points)
    for i, found in enumerate(metrics.pareto(costs, values)):
        beaten = any(
            (c <= costs[i] and v > values[i]) or (c < costs[i] and v >= values[i]) for c, v in zip(costs, values)
        )
        assert found == (not beaten)


def test_rates_by_group_are_those_counted_one_by_one(content, people):
    for label in SIZES:
        summary = content["benchmarks"][people.name]["results"][label]
        at = summary["common_threshold"]["1e-2"]
        assert at["threshold"] == summary["thresholds"]["1e-2"]
        assert {group["genuine"] for group in at["groups"].values()} == {4 * 6}
        assert {group["impostor"] for group in at["groups"].values()} == {6 * 16}
        for group in at["groups"].values():
            for rate in ("fmr", "fnmr"):
                low, high = group[f"{rate}_interval"]
                assert 0 <= low <= group[rate] + 0.2 and group[rate] - 0.2 <= high <= 1


def counted(values, couples, groups, group, accept):
    mine = [accept(v) for v, pair in zip(values, couples) if all(groups[p] == group for p in np.atleast_1d(pair))]
    return sum(mine) / len(mine)


def test_group_rates_and_their_replicates():
    rng = np.random.default_rng(0)
    groups = ["a", "b", "a", "b", "c", "c", "a"]
    genuine_people = np.repeat(np.arange(7), 3)
    impostor_people = np.array([(i, j) for i in range(7) for j in range(i)] * 2)
    genuine, impostor = rng.normal(0.6, 0.2, 21), rng.normal(0.3, 0.2, len(impostor_people))
    weights = metrics.resamples(7, 40)
    found = metrics.group_rates(genuine, impostor, genuine_people, impostor_people, groups, 0.45, weights)
    for name, rates in found["groups"].items():
        assert rates["fnmr"] == counted(genuine, genuine_people, groups, name, lambda s: s < 0.45)
        assert rates["fmr"] == counted(impostor, impostor_people, groups, name, lambda s: s >= 0.45)
        shares = []
        for drawn in weights:  # every pair as often as the product of its people's draws
            times = [drawn[i] * drawn[j] * (groups[i] == groups[j] == name) for i, j in impostor_people]
            if sum(times):
                shares.append(sum(t * (s >= 0.45) for t, s in zip(times, impostor)) / sum(times))
        assert rates["fmr_interval"] == pytest.approx(np.quantile(shares, [0.025, 0.975]))
    assert found["fmr_max_min_ratio"] is None or found["fmr_max_min_ratio"] >= 1
    with pytest.raises(ValueError, match="group c has 0 genuine"):
        metrics.group_rates([1.0], [0.0, 0.0], [0], [[0, 1], [2, 3]], ["a", "a", "c", "c"], 0.5)


def test_pairs_of_unknown_people_are_drawn_anew():
    """The interval of a share of independent pairs is nearly the binomial one."""
    genuine = np.r_[np.full(900, 0.9), np.full(100, 0.1)]
    impostor = np.r_[np.full(50, 0.5), np.full(250, 0.2), np.zeros(700)]  # 10 % lie in the middle of the second
    again = metrics.bootstrap_pairs(genuine, impostor, 400, fars=(0.1,))
    low, high = metrics.interval(again.tar[:, 0])
    assert (low, high) == pytest.approx((0.9 - 1.96 * 0.0095, 0.9 + 1.96 * 0.0095), abs=0.004)
    scores = {"x": figures.Scores(genuine, impostor)}
    assert set(figures.bands(scores, 20)) == {"x"}
    assert not figures.bands(scores, 0)
    assert figures.bands(scores, 20)["x"].origin == "from resampling pairs"
    many = np.linspace(0, 1, figures.MAX_PAIRS)
    band = figures.bands({"x": figures.Scores(many[::8], many)}, 20)["x"]
    assert band.origin == "of independent genuine pairs"
    # TAR is FMR here; the usual approximation of a binomial's interval in the middle.
    middle = np.argmin(np.abs(band.fmr - 0.5))
    reach = 1.96 * (band.fmr[middle] * (1 - band.fmr[middle]) / len(many[::8])) ** 0.5
    assert [band.low[middle], band.high[middle]] == pytest.approx(
        [band.fmr[middle] - reach, band.fmr[middle] + reach], abs=5e-4
    )


def test_no_two_lines_look_the_same():
    labels = ["student", "teacher", *(f"model {n}" for n in range(15))]
    looks = {(figures.colors(labels)[label], str(figures.dashes(labels)[label])) for label in labels}
    assert len(looks) == len(labels)


def test_the_page_is_whole(output, content, tmp_path):
    page = (output / "comparison.html").read_text()
    parser = Links()
    parser.feed(page)
    assert "script" not in parser.tags
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for found in content["benchmarks"].values():
        for label in ("small", "large", "student"):
            assert f"{100 * found['accuracy'][label]:.2f}" in text
    assert "North" in text and "even" in text
    assert text.count("generated only") == 2 and text.count("not recorded") == 4
    for width in (1200, 500):
        folder = tmp_path / str(width)
        folder.mkdir()
        seen = probe(output / "comparison.html", folder, f"--window-size={width},3000")
        assert seen["figures"] == seen["drawn"] == 1 + 3 * 3  # bars; cost, DET and ROC of each benchmark
        assert (seen["unnamed"], seen["overflow"], seen["requests"], seen["ids"]) == (0, 0, 0, 0)


def test_the_table_in_markdown(output, content, people):
    text = (output / "comparison.md").read_text()
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")][:5]
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    for label, row in zip(("small", "large", "student"), rows):
        found = content["benchmarks"][people.name]
        low, high = found["results"][label]["intervals"]["tar_at_far"]["1e-3"]
        cell = f"{100 * found['accuracy'][label]:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        assert row.startswith(f"| {label} | {cell} |")
    assert "| model | North | South | FNMR max/min | FMR max/min |" in text


def test_names_of_strangers_are_escaped(runs, people, tmp_path):
    evil = tmp_path / "<script>alert(1)</script>|$x$"
    evil.mkdir(parents=True)
    (evil / "student").symlink_to(Path(runs[0]) / "student")
    models = compare.students([str(evil), runs[1]])
    made = compare.measure(models, [str(people)], bootstrap=0, cache=False)
    parser = Links()
    parser.feed(compare.write(made, tmp_path / "out", 0).read_text())
    assert "script" not in parser.tags
    rows = [line for line in (tmp_path / "out" / "comparison.md").read_text().splitlines() if "alert" in line]
    assert all("\\|$x$" in row for row in rows)


def test_mistakes_are_one_line(runs, people, groups, rfw, tmp_path, capsys):
    (tmp_path / "short.csv").write_text("p0,a\np1,a\np2,a\n")
    (tmp_path / "wrong.csv").write_text("p0 a\n")
    lonely = tmp_path / "lonely.csv"
    lonely.write_text("".join(f"p{n},{'a' if n else 'b'}\n" for n in range(8)))
    for arguments, expected in (
        ([], "nothing to compare"),
        (["--runs", str(tmp_path)], "holds no student/"),
        (["--runs", runs[0], runs[0]], "given twice"),
        (["--runs", runs[0], "--benchmark", str(people), str(people)], "given twice"),
        (["--runs", runs[0], "--benchmark", f"rfw:{rfw}", "--people", "1-2"], "--people"),
        (["--runs", runs[0], "--benchmark", f"rfw:{rfw}", "--groups", str(groups)], "--groups"),
        (["--runs", runs[0], "--benchmark", str(people), "--groups", str(tmp_path / "short.csv")], "p3 of"),
        (["--runs", runs[0], "--benchmark", str(people), "--groups", str(tmp_path / "wrong.csv")], "line 1"),
        (["--runs", runs[0], "--benchmark", str(people), "--groups", str(lonely)], "group b has"),
        (["--runs", runs[0], "--benchmark", str(people), "--groups", str(tmp_path)], "no such file"),
        (["--runs", runs[0], "--bootstrap", "-1"], "--bootstrap -1"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare.main([*arguments, "--output", str(tmp_path / "out")])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert expected in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no such file"):
        compare.read_groups(tmp_path / "none.csv")


def test_embeddings_are_computed_once(runs, people, tmp_path, monkeypatch):
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path))
    net = faceless.load(Path(runs[0]) / "student")
    benchmark = benchmark_for(net, people)
    first = verify(net, benchmark, bootstrap=0, cache=True)
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    monkeypatch.setattr(type(net), "embed", None)  # nothing is embedded again
    again = verify(net, benchmark, bootstrap=0, cache=True)
    np.testing.assert_array_equal(first.impostor, again.impostor)
    with pytest.raises(TypeError):
        verify(net, benchmark.subset([0, 1]), bootstrap=0, cache=True)  # other faces
