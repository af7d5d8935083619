"""Does mining help? The online recipe with each resampling, at equal numbers of views, over some seeds.

``python scripts/mining_helps.py --output runs/mining_helps`` trains 4 x 5 students (finished ones are kept, so it can
be stopped and given again) and writes ``summary.json``, a table and ``figure.svg``: agreement with the teacher on
held-out generated faces, and TAR at FAR 1e-3 on AT&T people 21 to 40, which no setting was chosen on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from faceless.files import atomic_path, atomic_write

ARMS = {
    "none": ["--source.init_args.resampling", "null"],
    "SynthDistill": ["--source.init_args.resampling", "mining.resampling.SynthDistillRule"],
    "hard pool": ["--source.init_args.resampling", "mining.resampling.HardPool"],
    "confused pairs": ["--source.init_args.resampling", "mining.resampling.ConfusedPairs"],
}
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def train(output: Path, arm: str, seed: int, steps: int, recipe: str) -> dict[str, float]:
    """One run, or what an earlier one left; its figures."""
    folder = output / f"{arm.replace(' ', '_')}-{seed}"
    if not (folder / "verification.json").is_file():
        overrides = ["--output", str(folder), "--seed", str(seed), "--steps", str(steps)]
        subprocess.run([sys.executable, "distill/train.py", "--config", recipe, *overrides, *ARMS[arm]], check=True)
    rows = json.loads((folder / "verification.json").read_text())["subsets"]["21-40"]
    student = next(row for row in rows if row["label"] == "student")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    agreement = [line["validation"] for line in lines if "validation" in line][-1]
    return {"TAR@1e-3": student["tar_at_far"]["1e-3"], "EER": student["eer"]} | agreement


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over seeds."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def draw(path: Path, found: dict[str, list[dict[str, float]]]) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "faceless", "font.size": 9}):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        for place, measure in enumerate(("TAR@1e-3", "cosine")):
            axes = figure.add_subplot(1, 2, place + 1)
            for row, (_, runs) in enumerate(found.items()):
                values = [run[measure] for run in runs]
                mean, half = interval(values)
                axes.plot(values, [row] * len(values), "o", color="#8b939d", markersize=3)
                axes.errorbar([mean], [row], xerr=[half], fmt="D", color="#0072b2", capsize=3)
            axes.set_yticks(range(len(found)), list(found) if place == 0 else [""] * len(found))
            axes.set_title("AT&T 21-40: TAR at FAR 0.1 %" if place == 0 else "held-out generated faces: cosine")
            axes.spines[["top", "right"]].set_visible(False)
            axes.invert_yaxis()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/mining_helps")
    parser.add_argument("--recipe", default="distill/recipes/online.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=512, help="of 128 views")
    given = parser.parse_args()
    output = Path(given.output)
    found = {arm: [train(output, arm, seed, given.steps, given.recipe) for seed in range(given.seeds)] for arm in ARMS}
    atomic_write(output / "summary.json", json.dumps(found, indent=1) + "\n")
    draw(output / "figure.svg", found)
    for arm, runs in found.items():
        figures = {name: interval([run[name] for run in runs]) for name in runs[0]}
        print(f"{arm:16s}" + "  ".join(f"{name} {mean:.4f} ± {half:.4f}" for name, (mean, half) in figures.items()))


if __name__ == "__main__":
    main()
