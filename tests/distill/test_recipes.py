"""Every recipe that ships is complete, of the right types, and names things that exist."""

from __future__ import annotations

import copy
import re
from functools import cache

import pytest

import faceless
from distill.build import make_objective, make_student
from distill.chain import links
from distill.checks import check_teacher
from distill.cohort import alone
from distill.ensembles import Ensemble, FusedRecognizer, Fusion
from distill.losses.logits import ClassScores
from distill.mixtures import MixtureSource
from distill.settings import Run
from distill.sources import CorpusSource
from faceless.settings import ROOT, parse, recipe
from synth.generate import read_settings

RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "distill" / "recipes").glob("*.yaml"))


# Recipes whose students are teachers of others, or like their teachers, and may be large.
LARGE = {"iresnet_teacher", "bn_teacher", "refo_teacher", "vit_teacher", "cbam_teacher", "low_resolution_cbam"}


@cache
def network(source: str) -> faceless.Recognizer:
    """An untrained network like the one that a recipe loads: dlib's, or the student of another recipe."""
    if source == "dlib-resnet29":
        return faceless.create("dlib-resnet29", embedding_dim=128, input_size=150)
    _, name, kind = source.split("/")
    assert kind in ("student", "snapshots")
    run = parse(Run, ["--config", f"distill/recipes/{name}.yaml"]).build()
    assert kind == "student" or (run.snapshot_every and run.steps >= 2 * run.snapshot_every)
    return alone(make_student(run, teacher_of(run)))


def teacher_of(run: Run) -> faceless.Recognizer:
    if isinstance(run.teacher, Ensemble):
        return FusedRecognizer(Fusion([network(member) for member in run.teacher.members], run.teacher.fusion), 2)
    return network(run.teacher if isinstance(run.teacher, str) else run.teacher.stages)


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_builds(path) -> None:
    settings = parse(Run, ["--config", str(path)])
    assert len(links(settings)) == len(settings.asdict()["chain"] or [0])
    run, teacher = settings.build(), teacher_of(settings.build())
    student = make_student(run, teacher)
    count = sum(p.numel() for p in alone(student).parameters())
    assert path.stem in LARGE or count <= (1_100_000 if run.student.name == "mobilefacenet" else 3_000_000)
    assert run.output == f"runs/{path.stem}"
    sources = run.source.everyone.values() if isinstance(run.source, MixtureSource) else [run.source]
    for source in sources:
        if isinstance(source, CorpusSource):
            made = read_settings(["--config", str(recipe(source.recipe))]).build()
            assert made.output == source.path
            assert made.align is not None and made.align.size >= run.augment.size - 16

    # The losses fit both networks, and each other's identities.
    if run.prompts is not None:
        teacher = copy.deepcopy(teacher)
        run.prompts.into(teacher)
    objective = make_objective(run, student, [teacher])
    check_teacher(run, objective, teacher)
    labels = getattr(run.source, "label_file", None)
    for _, loss in objective.terms():
        assert loss.classes in (None, run.pseudo_identities) or labels
    assert isinstance(objective.scores, ClassScores) == (run.classifier is not None)
    assert not objective.needs_labels or run.pseudo_identities or labels
    assert not objective.needs_centers or run.teacher_cache


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_says_when_to_use_it_and_is_listed(path) -> None:
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"\b{path.stem}\b", page.read_text()) for page in pages)
