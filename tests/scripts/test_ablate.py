"""Grids: every cell is trained once, is resumed, and ends in one table whose numbers are those of the runs."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import faceless
from distill.settings import Run
from faceless.errors import InputError
from faceless.settings import ROOT, parse
from tests.distill.test_sources import folder
from tests.distill.test_train import recipe, teacher  # noqa: F401

spec = importlib.util.spec_from_file_location("ablate", ROOT / "scripts" / "ablate.py")
assert spec is not None and spec.loader is not None
ablate = importlib.util.module_from_spec(spec)
sys.modules["ablate"] = ablate  # where dataclasses look up their annotations
spec.loader.exec_module(ablate)

GRIDS = sorted((ROOT / "scripts" / "grids").glob("*.yaml"))


def scores(run: Path, eer: float, cosine: float) -> None:
    """What a finished run leaves of what the table reads."""
    run.mkdir(parents=True)
    row = {"label": "student", "eer": eer, "rank1": 1 - eer, "tar_at_far": {"1e-2": 0.9, "1e-3": 0.8}}
    row["intervals"] = {"eer": [eer - 0.01, eer + 0.01], "rank1": [0.5, 1.0], "tar_at_far": {"1e-2": [0.8, 1.0]}}
    best = row | {"label": "teacher", "eer": 0.001, "intervals": {}}
    (run / "verification.json").write_text(json.dumps({"subsets": {"21-40": [best, row]}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "validation": {"cosine": cosine}}) + "\n")
    (run / "report.html").write_text("<html>")


def grid(tmp_path: Path, **changes: object) -> ablate.Grid:
    options = {"cosine": {}, "qud": {"recipe": "distill/recipes/qud.yaml"}, "iled": {"ema": 0.5}}
    axes = {"method": options, "steps": {"short": {"steps": 5}, "long": {"optimizer.lr": 0.5}}}
    settings = {"base": "distill/recipes/cosine.yaml", "axes": axes, "output": str(tmp_path / "grid")}
    return ablate.Grid(**(settings | changes))


def test_a_cell_is_the_base_with_its_options(tmp_path: Path) -> None:
    made = parse(Run, ["--config", str(ablate.write(grid(tmp_path), ("qud", "long"), 3))]).asdict()
    base = parse(Run, ["--config", "distill/recipes/cosine.yaml"]).asdict()
    qud = parse(Run, ["--config", "distill/recipes/qud.yaml"]).asdict()
    assert made["losses"] == qud["losses"]
    assert made["seed"] == 3 and made["optimizer"]["lr"] == 0.5 and made["output"].endswith("qud/long/seed-3")
    differing = {key for key in base if made[key] != base[key]}
    assert differing == {"losses", "seed", "optimizer", "output"}


def test_the_table_holds_mean_interval_and_n(tmp_path: Path) -> None:
    made = grid(tmp_path, seeds=[0, 1, 2])
    found = {"cosine": [0.10, 0.12, 0.17], "qud": [0.2], "iled": []}
    for method, rates in found.items():
        for seed, rate in enumerate(rates):
            scores(ablate.folder(made, (method, "short"), seed), rate, 0.5)
    rows = {tuple(row["cell"]): row for row in ablate.collect(made)}
    assert set(rows) == {("cosine", "short"), ("qud", "short")}
    several = rows["cosine", "short"]["EER"]
    half = stats.t.ppf(0.975, 2) * stats.sem(found["cosine"])
    assert several["n"] == 3 and several["mean"] == pytest.approx(statistics.fmean(found["cosine"]))
    assert several["interval"] == pytest.approx([several["mean"] - half, several["mean"] + half], rel=1e-3)
    # No rate is below 0 or above 1.
    assert ablate.summarize([{"value": x, "interval": None} for x in (0.05, 0.95)], rate=True)["interval"] == [0.0, 1.0]
    assert rows["qud", "short"]["EER"] == {"mean": 0.2, "interval": [0.2 - 0.01, 0.2 + 0.01], "n": 1, "values": [0.2]}
    ablate.report(made)
    text = (tmp_path / "grid" / "table.md").read_text().splitlines()
    assert text[2].startswith("| cosine | short | 13.00 (4.04 to 21.96) |") and text[3].startswith(
        "| qud | short | 20.00"
    )
    assert text[4].startswith("| teacher |  | 0.10 |")
    assert "cosine" in (tmp_path / "grid" / "EER.svg").read_text()
    assert (tmp_path / "grid" / "TAR-1e-2.svg").exists()


def test_cells_of_several_teachers_name_the_figure_of_each(tmp_path: Path) -> None:
    made = grid(tmp_path)
    for method, best in (("cosine", 0.01), ("qud", 0.02)):
        run = ablate.folder(made, (method, "short"), 0)
        scores(run, 0.1, 0.5)
        found = json.loads((run / "verification.json").read_text())
        found["subsets"]["21-40"][0]["eer"] = best
        (run / "verification.json").write_text(json.dumps(found))
    ablate.report(made)
    head, _, first, second, *rest = (tmp_path / "grid" / "table.md").read_text().splitlines()
    assert head.endswith("| teacher's EER, % | n |")
    assert first.endswith("| 1.00 | 1 |") and second.endswith("| 2.00 | 1 |")
    assert not any(line.startswith("| teacher |") for line in rest)
    almost = [{"teacher": {"mean": mean}} for mean in (0.1 + 0.2, 0.3)]
    assert not ablate.several_teachers(almost), "the mean of equal numbers need not be that number"


def test_the_table_says_how_they_do_under_each_condition(tmp_path: Path) -> None:
    made = grid(tmp_path)
    run = ablate.folder(made, ("cosine", "short"), 0)
    scores(run, 0.1, 0.5)
    found = json.loads((run / "verification.json").read_text())
    best, row = found["subsets"]["21-40"]
    worse = row | {"eer": 0.3, "tar_at_far": {"1e-2": 0.4, "1e-3": 0.2}, "intervals": {}}
    found["subsets"] |= {"21-40 14px": [best, worse], "all": [best, row], "all 14px": [best, row]}
    (run / "verification.json").write_text(json.dumps(found))
    ablate.report(made)
    head, _, line, *_ = (tmp_path / "grid" / "table.md").read_text().splitlines()
    said = dict(zip(head.split(" | "), line.split(" | ")))
    assert [name for name in said if "px" in name] == ["EER, 14px, %", "TAR@FAR=1e-2, 14px, %"]
    assert said["EER, %"].startswith("10.00") and said["EER, 14px, %"] == "30.00"
    assert said["TAR@FAR=1e-2, %"].startswith("90.00") and said["TAR@FAR=1e-2, 14px, %"] == "40.00"
    assert {"TAR-1e-2-14px.svg", "EER-conditions.svg"} <= {path.name for path in (tmp_path / "grid").iterdir()}


def test_one_picture_shows_all_conditions_and_who_is_better_under_each(tmp_path: Path) -> None:
    figures = {"EER": (0.10, 0.08, 0.20), "EER, 14px": (0.3, 0.4, 0.3), "EER, masked": (0.5, 0.2, 0.4)}
    rows: list[dict[str, Any]] = [
        {"cell": [name]} | {measure: {"mean": means[place], "n": 1} for measure, means in figures.items()}
        for place, name in enumerate(("plain", "masks", "other"))
    ]
    rows.insert(1, {"cell": ["whole faces only"], "EER": {"mean": 0.1, "n": 1}})
    (axis,) = ablate.overview(rows, "EER").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["as they are", "14px", "masked"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["plain (n=1)", "masks (n=1)", "other (n=1)"]
    assert " ".join(text.get_text() for text in axis.texts) == "10.0 30.0 50.0 8.0 40.0 20.0 20.0 30.0 40.0"
    # In parts of the largest difference of a column; less error is better.
    np.testing.assert_allclose(axis.images[0].get_array(), [[0, 0, 0], [0.2, -1, 1], [-1, 0, 1 / 3]], atol=1e-9)
    more = [{"cell": [name], "TAR@FAR=1e-2": {"mean": mean, "n": 1}} for name, mean in (("plain", 0.5), ("other", 0.6))]
    np.testing.assert_allclose(ablate.overview(more, "TAR@FAR=1e-2").axes[0].images[0].get_array(), [[0], [1]])


def test_cells_near_the_best_and_named_ones_are_confirmed(tmp_path: Path) -> None:
    confirm = ablate.Confirm(seeds=[1, 2], within=0.01, always=["cosine"])
    made = grid(tmp_path, confirm=confirm)
    for method, steps, rate in (
        ("cosine", "short", 0.3),
        ("qud", "short", 0.1),
        ("iled", "short", 0.109),
        ("iled", "long", 0.2),
    ):
        scores(ablate.folder(made, (method, steps), 0), rate, 0.5)
    expected = [("cosine", "short"), ("qud", "short"), ("iled", "short")]
    assert ablate.to_confirm(made, ablate.collect(made, made.seeds)) == expected
    # Half of it confirmed: a better mean of some does not take others out of the list.
    note = "Cells but cosine have more seeds where their first was near the best"
    assert note not in ablate.table(made, ablate.collect(made), {})
    scores(ablate.folder(made, ("qud", "short"), 1), 0.02, 0.5)
    assert ablate.to_confirm(made, ablate.collect(made, made.seeds)) == expected
    assert note in ablate.table(made, ablate.collect(made), {})


def test_a_grid_is_trained_once_and_resumed(tmp_path: Path, teacher: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    faces = folder(tmp_path / "people", people=4, images=3)
    base = recipe(
        tmp_path, teacher, steps=4, verification={"benchmark": str(faces), "people": ["3-4"], "bootstrap": 10}
    )
    axes = {"losses": {"both": {}, "one": {"losses": {"only": yaml.safe_load(base.read_text())["losses"]["cosine"]}}}}
    settings = {"base": str(base), "axes": axes, "output": str(tmp_path / "grid"), "people": "3-4"}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(settings | {"launch": "--cpu --num_processes 1"}))
    ablate.main(["--config", str(path)])
    table = (tmp_path / "grid" / "table.md").read_text()
    assert "| both |" in table and "| one |" in table
    run = tmp_path / "grid" / "one" / "seed-0"
    terms = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["terms"]
    assert list(terms) == ["only"]
    before = (run / "report.html").stat().st_mtime_ns
    (tmp_path / "grid" / "both" / "seed-0" / "report.html").unlink()
    capfd.readouterr()
    ablate.main(["--config", str(path)])
    out = capfd.readouterr().out
    assert "== both seed 0" in out and "== one seed 0" not in out
    assert (run / "report.html").stat().st_mtime_ns == before
    assert (tmp_path / "grid" / "table.md").read_text() == table
    faceless.save(faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", seed=9), teacher, {})
    with pytest.raises(InputError, match=r"both/seed-0: was taught by another .*teacher than the one here now"):
        ablate.main(["--config", str(path)])


def test_runs_at_the_same_time_end_like_runs_in_turn(
    tmp_path: Path,
    teacher: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = recipe(tmp_path, teacher, steps=2, verification={"benchmark": None})
    axes = {"cell": {"alone": {}, "beside": {}, "broken": {"optimizer.lr": 1e30, "optimizer.clip": 0}}}
    settings = {"base": str(base), "axes": axes, "output": str(tmp_path / "grid"), "measure": "cosine"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings | {"jobs": 2, "launch": "--cpu"}))
    moved: set[str] = set()
    sys.addaudithook(lambda event, _: moved.add(threading.current_thread().name) if event == "os.chdir" else None)
    with pytest.raises(InputError, match="1 runs failed: broken seed 0"):
        ablate.main(["--config", str(tmp_path / "grid.yaml")])
    # The working folder belongs to all threads; parsing a recipe changes it for a moment.
    assert moved == {threading.main_thread().name}
    assert re.search("broken seed 0 failed: .*not a finite number", capfd.readouterr().out)
    logs = {path.name for path in (tmp_path / "grid" / "logs").iterdir()}
    assert logs == {f"{name}-seed-0.log" for name in axes["cell"]}
    alone, beside = json.loads((tmp_path / "grid" / "table.json").read_text())["rows"]
    assert alone["cosine"]["mean"] == pytest.approx(beside["cosine"]["mean"], rel=1e-3)


def test_mistakes_show_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stepz"):
        ablate.write(grid(tmp_path, common={"stepz": 3}), ("cosine", "short"), 0)
    with pytest.raises(InputError, match="no name of a folder"):
        grid(tmp_path, axes={"method": {"../x": {}}})
    with pytest.raises(InputError, match="measure"):
        grid(tmp_path, measure="eer")
    with pytest.raises(InputError, match="jobs"):
        grid(tmp_path, jobs=0)
    with pytest.raises(InputError, match=r"confirm.always: no option is called 'cosin'; did you mean .*cosine"):
        grid(tmp_path, confirm=ablate.Confirm([1], always=["cosin"]))
    for wrong, named in (
        ({"axes": {"side": {28: {}}}}, "axes.side.28: 28 is a number and no name; write it in quotes"),
        ({"axes": {"side": {"a": {3: 1}}}}, "axes.side.a: 3 is a number"),
        ({"axes": {"side": {"a": {"seed": 3}}}}, "axes.side.a sets seed, which follows from the grid"),
        ({"common": {"seed": 3}}, "common sets seed, which follows from the grid"),
        ({"axes": {"a": {"x": {"ema": 0.1}}, "b": {"y": {"ema": 0.2}}}}, "axes.b.y sets ema, and so does axes.a"),
        ({"axes": {"a": {"x": {"recipe": None}}}}, "axes.a.x: recipe is None"),
        ({"seeds": [0, 1, 1]}, "seeds are .*; name each once"),
        ({"confirm": ablate.Confirm(seeds=[1, 1])}, "confirm.seeds are .*; name each once"),
        ({"launch": "--x '"}, "launch is .*: No closing quotation"),
    ):
        with pytest.raises(InputError, match=named):
            grid(tmp_path, **wrong)
    with pytest.raises(InputError, match=r"cosine-short-seed-0.yaml: .*degrade.mask is 1.5"):
        ablate.write(grid(tmp_path, common={"degrade": {"mask": 1.5}}), ("cosine", "short"), 0)
    with pytest.raises(InputError, match=r"yaml: verifies on people all, 21-40, and the grid's people are 1-2"):
        ablate.write(grid(tmp_path, people="1-2"), ("cosine", "short"), 0)
    peers = {"loss": {"class_path": "distill.losses.mutual.EachPeer", "init_args": {"loss": {}}}}
    peers["loss"]["init_args"]["loss"] = {"class_path": "distill.losses.embedding.CosineEmbedding"}
    small = faceless.create("slimresnet", embedding_dim=16, input_size=32, framing="dlib", widths=[8], depths=[1])
    alone = grid(
        tmp_path,
        axes={"method": {"good": {}, "bad": {"losses": {"each": peers}}}},
        common={"teacher": str(faceless.save(small, tmp_path / "small", {})), "verification.benchmark": None},
    )
    with pytest.raises(InputError, match=r"bad-seed-0.yaml: the student has no 'peers.0'"):
        ablate.check_cells(alone)
    with pytest.raises(InputError, match="chain: link 1 sets output"):
        ablate.write(grid(tmp_path, common={"chain": [{"output": "x"}, {}]}), ("cosine", "short"), 0)
    members = {
        "class_path": "distill.ensembles.Ensemble",
        "init_args": {"members": ["dlib-resnet29", "runs/none/student"]},
    }
    for named in ("runs/none/student", members):
        with pytest.raises(InputError, match="runs/none/student: no such teacher, and cosine-short needs it; train it"):
            ablate.check_teachers(grid(tmp_path, common={"teacher": named}))
    made = grid(tmp_path)
    ablate.check_teachers(made)
    ablate.write(made, ("cosine", "short"), 0)
    ablate.folder(made, ("cosine", "short"), 0).mkdir(parents=True)
    with pytest.raises(InputError, match="another grid"):
        ablate.write(grid(tmp_path, common={"ema": 0.5}), ("cosine", "short"), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with untrained networks in the places of the teachers that grids name."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("vit_teacher", "iresnet_teacher"):
        made = parse(Run, ["--config", f"distill/recipes/{name}.yaml"]).asdict()["student"]
        shape = {"embedding_dim": 128, "input_size": made["input_size"], "framing": "dlib"}
        net = faceless.create(made["name"], **shape, **made["options"])
        for place in ("student", "snapshots/step-1", "snapshots/step-2"):
            faceless.save(net, folder / "runs" / name / place, {})
    for name in ("refo_teacher", "refo_control"):
        faceless.save(faceless.create("dlib-resnet29"), folder / "runs" / name / "student", {})
    return folder


@pytest.mark.parametrize("path", GRIDS, ids=[p.stem for p in GRIDS])
def test_shipped_grids_are_complete(path: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell passes all that is looked at before training."""
    monkeypatch.chdir(trained)
    made = ablate.read_grid(["--config", str(path), "--output", str(tmp_path)])
    ablate.check_teachers(made)
    ablate.check_cells(made)
    if path.stem == "methods":
        named = {option["recipe"] for option in made.axes["method"].values()}

        def rest(path: Path) -> dict:
            """What the grid does not take from a recipe."""
            found = yaml.safe_load(path.read_text())
            return {key: value for key, value in found.items() if key not in (*ablate.METHOD, "output")}

        recipes = sorted((ROOT / "distill" / "recipes").glob("*.yaml"))
        base = rest(ROOT / made.base)
        assert named == {f"distill/recipes/{path.name}" for path in recipes if rest(path) == base}
