"""Every recipe that ships is complete, of the right types, and names things that exist."""

from __future__ import annotations

import pytest

import faceless
from distill.settings import Run
from distill.sources import CorpusSource
from faceless.settings import ROOT, parse, recipe
from synth.generate import read_settings

RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "distill" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_builds(path) -> None:
    run = parse(Run, ["--config", str(path)]).build()
    student = faceless.create(
        run.student.name, embedding_dim=128, input_size=run.student.input_size, **run.student.options
    )
    count = sum(p.numel() for p in student.parameters())
    assert count <= (1_100_000 if run.student.name == "mobilefacenet" else 3_000_000)
    assert run.output == f"runs/{path.stem}"
    if isinstance(run.source, CorpusSource):
        made = read_settings(["--config", str(recipe(run.source.recipe))]).build()
        assert made.output == run.source.path
        assert made.align is not None and made.align.size >= run.augment.size - 16
