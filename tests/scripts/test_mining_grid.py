"""The comparison of resampling rules: runs that differ in the rule alone, of the length that they are compared at."""

from __future__ import annotations

from pathlib import Path

from distill.settings import Run
from distill.sources import OnlineSource
from faceless.settings import parse
from mining.resampling import ConfusedPairs, HardPool, SynthDistillRule
from scripts import ablate


def test_runs_differ_in_the_rule_alone(tmp_path: Path) -> None:
    made = ablate.read_grid(["--config", "scripts/grids/mining.yaml", "--output", str(tmp_path)])
    plain, rules = [], []
    for cell in ablate.cells(made):
        parsed = parse(Run, ["--config", str(ablate.write(made, cell, 3))])
        plain.append(parsed.asdict())
        run = parsed.build()
        assert isinstance(run.source, OnlineSource) and run.source.landmarks
        assert run.steps * run.batch_size >= 60_000 and run.seed == 3 and run.validation.faces
        rules.append(run.source.resampling)
    assert rules[0] is None and [type(rule) for rule in rules[1:]] == [SynthDistillRule, HardPool, ConfusedPairs]
    assert len(made.seeds) == 5
    for settings in plain:
        settings["source"]["init_args"].pop("resampling")
        settings.pop("output")
        assert settings == plain[0]
