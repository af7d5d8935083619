"""Every recipe that ships is complete, of the right types, and names things that exist."""

from __future__ import annotations

import re

import pytest

import faceless
from distill.losses.logits import ClassScores
from distill.mixtures import MixtureSource
from distill.settings import Run
from distill.sources import CorpusSource
from distill.train import make_objective
from faceless.settings import ROOT, parse, recipe
from synth.generate import read_settings

RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "distill" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def teachers() -> dict[str, faceless.Recognizer]:
    made = faceless.create("dlib-resnet29", embedding_dim=128, input_size=150)
    return {"dlib-resnet29": made, "runs/bn_teacher/student": made}


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_builds(path, teachers: dict[str, faceless.Recognizer]) -> None:
    run = parse(Run, ["--config", str(path)]).build()
    student = faceless.create(
        run.student.name, embedding_dim=128, input_size=run.student.input_size, **run.student.options
    )
    count = sum(p.numel() for p in student.parameters())
    assert count <= {"mobilefacenet": 1_100_000, "iresnet18": 13_000_000}.get(run.student.name, 3_000_000)
    assert run.output == f"runs/{path.stem}"
    sources = run.source.everyone.values() if isinstance(run.source, MixtureSource) else [run.source]
    for source in sources:
        if isinstance(source, CorpusSource):
            made = read_settings(["--config", str(recipe(source.recipe))]).build()
            assert made.output == source.path
            assert made.align is not None and made.align.size >= run.augment.size - 16

    # The losses fit both networks, and each other's identities.
    objective = make_objective(run, student, teachers[run.teacher])
    for _, loss in objective.terms():
        assert loss.classes in (None, run.pseudo_identities)
    assert isinstance(objective.scores, ClassScores) == (run.classifier is not None)
    assert not objective.needs_labels or run.pseudo_identities
    assert not objective.needs_centers or run.teacher_cache


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_says_when_to_use_it_and_is_listed(path) -> None:
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"\b{path.stem}\b", page.read_text()) for page in pages)
