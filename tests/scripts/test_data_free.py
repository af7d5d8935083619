"""The comparison of faces from nothing but a teacher: cells that differ in nothing else, and a table of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import faceless
from distill.settings import Run
from distill.sources import CorpusSource
from distill.synthesis import SynthesisSource
from faceless.settings import parse
from scripts import ablate, data_free
from synth.generate import read_settings
from tests.distill.test_sources import folder


def arguments(tmp_path: Path, **more: object) -> list[str]:
    given = {
        "output": tmp_path / "out",
        "teacher": tmp_path / "teacher" / "student",
        "steps": 4,
        "batch-size": 8,
        "faces": 16,
        "inversion-steps": 4,
        "cheap-faces": 16,
        "timed-rounds": 1,
        "jobs": 1,
        "student": json.dumps({"widths": [8], "depths": [1]}),
    } | more
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


def teacher(tmp_path: Path) -> None:
    options = {"widths": [8], "depths": [1], "embedding_dim": 16, "input_size": 32}
    net = faceless.create("slimresnet", framing="dlib", **options).train()
    with torch.no_grad():
        net(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255)
    faceless.save(net.eval(), tmp_path / "teacher" / "student")


def test_cells_differ_in_their_faces_alone(tmp_path: Path) -> None:
    given = data_free.options().parse_args(arguments(tmp_path))
    made = data_free.grid(given)
    plain = [parse(Run, ["--config", str(ablate.write(made, cell, 0))]).asdict() for cell in ablate.cells(made)]
    assert len(plain) == 5
    for settings in plain:
        assert {key for key in settings if settings[key] != plain[0][key]} <= {"source", "output"}
    assert plain[0]["steps"] == 4 and plain[0]["validation"]["faces"] == 0
    assert plain[0]["student"]["input_size"] == plain[0]["augment"]["size"] == given.side
    made_here = parse(Run, data_free.teacher_settings(given, str(tmp_path / "made"))).asdict()
    assert made_here["student"] | {"options": {}} == {
        "name": "iresnet18", "embedding_dim": None, "input_size": given.side, "options": {}, "start": None,
    }  # fmt: skip
    assert made_here["augment"]["size"] == given.side and made_here["steps"] == given.teacher_steps
    teacher(tmp_path)
    for kind in data_free.NAMES:
        source = data_free.run_of(made, kind).source
        assert isinstance(source, CorpusSource if kind in data_free.CORPORA else SynthesisSource)
        if kind in data_free.CORPORA:
            changes = data_free.settings_of(given, kind)
            flags = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
            recipe = f"synth/recipes/{data_free.RECIPES[kind]}.yaml"
            assert read_settings(["--config", recipe, *flags]).build().output == source.path


@pytest.mark.slow
def test_the_whole_comparison_at_a_thousandth(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher(tmp_path)
    people = folder(tmp_path / "people", people=4, images=3)
    given = arguments(tmp_path, benchmark=people, people="3-4")
    threads = torch.get_num_threads()
    try:
        data_free.main(given)
        output = tmp_path / "out"
        text = (output / "data_free.md").read_text()
        assert all(f"| {name} |" in text for name in (*data_free.NAMES.values(), "teacher", "untrained student"))
        assert sorted(path.stem for path in (output / "sheets").iterdir()) == sorted(data_free.NAMES)
        assert Image.open(output / "data_free.png").size == (112 + 8 * 96, 96 * len(data_free.NAMES))
        (output / "fast" / "seed-0" / "report.html").unlink()
        capfd.readouterr()
        data_free.main(given)  # goes on where it was
    finally:
        torch.set_num_threads(threads)
    out = capfd.readouterr().out
    assert "== fast seed 0" in out and "== dafl seed 0" not in out
    assert (output / "data_free.md").read_text() == text
