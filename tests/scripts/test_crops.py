"""The comparison of crops, on a small random StyleGAN and a small random teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import faceless
from faceless.randomness import Rng
from scripts import crops
from synth.generators.stylegan import StyleGAN
from synth.survey import spread
from tests.mining.tiny_corpus import network
from tests.synth.test_stylegan import random_folder, small2


def test_each_crop_has_the_spread_of_faces_cut_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, teacher = random_folder(tmp_path / "weights", small2()), network(tmp_path / "teacher", 0)
    given = ["--weights", str(weights), "--teacher", teacher, "--faces", "12", "--batch", "5", "--threshold", "0.9"]
    crops.main([*given, "--crops", "synthdistill", "arcface", "--output", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines and len(lines) == 4
    for line, crop in zip(lines[2:], ("synthdistill", "arcface")):
        cut = StyleGAN(weights, crop=crop)
        with torch.inference_mode():
            faces = cut.synthesize(cut.sample_latents(12, Rng.of(0, "latents", range(12))))
            expected = spread(faceless.load(teacher)(faces).embedding, 0.9)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:2] == [crop, "12 of 12"]
        assert float(cells[2]) == pytest.approx(expected["cosine"]["mean"], abs=2e-3)
        assert float(cells[5].split(" of ")[0]) == pytest.approx(expected["effective_rank"], abs=0.05)


def test_a_crop_without_faces_says_so() -> None:
    assert "| landmarks | 0 of 12 |  |" in crops.table({"landmarks": {"faces": 0}}, 12)
