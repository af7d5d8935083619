"""The tutorial runs from end to end, and what it says of the ways to learn is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from faceless.settings import ROOT
from scripts import tutorial_digits


def test_the_tutorial_at_a_hundredth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        given = {"output": tmp_path, "seeds": 1, "steps": 60, "inversions": 1, "inversion-steps": 10}
        tutorial_digits.main([text for key, value in given.items() for text in (f"--{key}", str(value))])
    finally:
        torch.set_num_threads(threads)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    rates = {name: float(rate) for name, rate in re.findall(r"^\| (.+?) \| ([\d.]+) \|", table, re.M)}
    assert len(rates) == 8 and rates["teacher"] > 70 and rates["student alone"] > 50  # chance is 10
    with Image.open(tmp_path / "digits.png") as drawn:
        assert drawn.size == (400, 200)
    page = (ROOT / "docs" / "tutorial_digits.md").read_text()
    assert all(f"| {name} |" in page for name in rates)
