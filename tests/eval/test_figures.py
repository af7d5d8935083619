"""Figures show what they are given."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eval import figures, metrics


def scores(separation: float, seed: int = 0) -> figures.Scores:
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(10), 5)
    first, second = np.triu_indices(50, 1)
    couples = np.stack([people[first], people[second]], 1)
    same = couples[:, 0] == couples[:, 1]
    values = (rng.normal(size=len(first)) + separation * same).astype(np.float32)
    return figures.Scores(values[same], values[~same], couples[same, 0], couples[~same])


NAMED = {"teacher": scores(4), "student": scores(3), "untrained student": scores(0.2)}
ROWS = [{"label": label, "tar_at_far": {"1e-3": 0.5}} for label in NAMED]
DRAWN = {
    "roc": lambda: figures.roc(NAMED, figures.bands(NAMED, 50)),
    "det": lambda: figures.det(NAMED, figures.bands(NAMED, 50)),
    "scores": lambda: figures.score_histograms(NAMED),
    "loss": lambda: figures.losses([1, 2, 3], [3.0, 2.0, 1.0], {"a": [2.0, 1.0, 0.5], "b": [1.0, 1.0, 0.5]}),
    "validation": lambda: figures.validation([1, 2], {"cosine": [0.1, 0.2]}),
    "cost": lambda: figures.accuracy_and_cost(ROWS),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_single_well_formed_svgs_with_a_description(name):
    text = DRAWN[name]()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert root.attrib["role"] == "img"
    assert len(root.attrib["aria-label"]) > 20
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    assert all(i.startswith(f"{name}-") for i in ids)
    assert text == DRAWN[name](), "the same data give the same bytes"


def test_thinned_steps_are_the_same_function():
    points = metrics.curve(NAMED["student"].genuine, NAMED["student"].impostor)
    x, y = figures._steps(points.fmr, points.tar)
    assert len(x) < len(points.fmr)
    at = np.linspace(0, 1, 5001)
    whole = points.tar[np.searchsorted(points.fmr, at, side="right") - 1]
    thin = y[np.searchsorted(x, at, side="right") - 1]
    np.testing.assert_array_equal(thin, whole)


def test_the_band_contains_the_curve():
    student = NAMED["student"]
    nameless = figures.Scores(student.genuine, student.impostor)
    shaded = figures.bands({"student": student, "nameless": nameless}, 200)
    assert list(shaded) == ["student", "nameless"]
    band = shaded["student"]
    tar = [metrics.tar_at_far(student.genuine, student.impostor, far).tar for far in band.fmr.tolist()]
    assert (band.low <= tar).all()
    assert (tar <= band.high).all()
    assert (band.high - band.low).max() > 0.02
    assert figures.bands(NAMED, 0) == {}


def test_running_mean_is_centered_and_shrinks_at_the_ends():
    np.testing.assert_allclose(figures._smooth(np.array([0.0, 3, 6, 0, 0]), 3), [0, 3, 3, 2, 0])


def test_colors_stay_with_the_names_and_differ():
    palette = figures.colors(["student", "teacher", "x", "y"])
    assert palette["student"] == figures.BLUE
    assert palette["teacher"] == figures.ORANGE
    assert len(set(palette.values())) == 4


def test_degenerate_scores_can_be_drawn():
    constant = figures.Scores(np.float32([0.5, 0.5]), np.float32([0.5, 0.5, 0.5]))
    perfect = figures.Scores(np.float32([0.9]), np.float32([0.1, 0.2]))
    for draw in (figures.roc, figures.det, figures.score_histograms):
        ElementTree.fromstring(draw({"$constant$": constant, "perfect & <b>": perfect}))
