"""Train a grid of runs that differ in what their axes say, and put what came out of them into one table.

    python scripts/ablate.py --config scripts/grids/methods.yaml [--plan true]

Every cell of the grid (one option of each axis, one seed) is a run of ``distill/train.py`` in a folder of its own. A
grid that was stopped goes on when it is given again: finished cells are kept, a cell that was under way resumes. Then
``table.md``, ``table.json``, one figure for each rate, and one for all conditions together are written into the grid's
folder.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distill.chain import check_links, digests, finished, links
from distill.checkpoints import read_record
from distill.settings import Run
from eval import figures
from faceless.errors import InputError, command, suggest
from faceless.files import atomic_path, atomic_write, sha256
from faceless.settings import ROOT, parse, put, recipe

# What makes a method: an option that names a recipe takes these keys of it, and no others.
METHOD = ("losses", "classifier", "adaptive", "pseudo_identities", "augment")
# Name, whether more is better, and whether it is a rate.
MEASURES = {
    "EER": (False, True),
    "TAR@FAR=1e-2": (True, True),
    "TAR@FAR=1e-3": (True, True),
    "rank-1": (True, True),
    "cosine": (True, False),
    "neighborhood": (True, False),
}
# Those that are also given under each condition of ``verification.conditions``, as ``EER, 28px`` and the like.
WORSE = ("EER", "TAR@FAR=1e-2")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass
class Confirm:
    """Further seeds for the cells that matter.

    Args:
        seeds: to train those cells with too.
        within: how far from the best cell's mean they may be, in units of the measure (0.01 is a point).
        always: options that are confirmed wherever they stand, such as ``cosine``.
    """

    seeds: list[int]
    within: float = 0.01
    always: list[str] = field(default_factory=list)


@dataclass
class Grid:
    """A grid of runs.

    Args:
        base: the recipe that all cells start from.
        axes: by name; each has options by name; each option is keys of a run's settings, dotted, with their values.
            A value replaces all that stood there. ``recipe: PATH`` takes losses and whatever else makes a method from
            another recipe.
        common: keys for all cells.
        seeds: each cell is trained with each of them.
        confirm: more seeds for the best cells.
        output: folder of the grid.
        people: whose figures count, a subset of the benchmark as in ``verification.people``, or ``all``.
        measure: what cells are ranked by.
        launch: arguments for ``accelerate launch``, such as ``--num_processes 2 --cpu``.
        jobs: runs at the same time, one for each core at most, each with its share of the cores and a log of its own in
            ``logs``; small networks train faster so on CPUs. The first run goes alone: it makes what others share.
        plan: only list the cells.
    """

    base: str
    axes: dict[str, dict[str, dict[str, Any]]]
    common: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    confirm: Confirm | None = None
    output: str = "runs/ablation"
    people: str = "21-40"
    measure: str = "EER"
    launch: str = ""
    jobs: int = 1
    plan: bool = False

    def __post_init__(self) -> None:
        if not self.axes or not all(self.axes.values()) or not self.seeds:
            raise InputError("a grid needs axes, each with an option or more, and a seed")
        if self.jobs < 1:
            raise InputError(f"jobs is {self.jobs}; use 1 or more")
        if self.measure not in MEASURES:
            raise InputError(f"measure is {self.measure!r}; {suggest(self.measure, MEASURES)}")
        for kind, seeds in (("seeds", self.seeds), ("confirm.seeds", self.confirm.seeds if self.confirm else [])):
            if len(set(seeds)) < len(seeds):
                raise InputError(f"{kind} are {seeds}; name each once")
        try:
            shlex.split(self.launch)
        except ValueError as error:
            raise InputError(f"launch is {self.launch!r}: {error}") from error
        said = {f"axes.{axis}.{name}": keys for axis, options in self.axes.items() for name, keys in options.items()}
        for where, keys in ({"common": self.common} | said).items():
            if taken := {"seed", "output"} & keys.keys():
                raise InputError(f"{where} sets {min(taken)}, which follows from the grid")
        places: dict[str, str] = {}  # by key, the axis that sets it
        for axis, options in self.axes.items():
            for name, keys in options.items():
                if odd := [key for key in (axis, name, *keys) if not isinstance(key, str)]:
                    raise InputError(f"axes.{axis}.{name}: {odd[0]} is a number and no name; write it in quotes")
                for key in keys:
                    if places.setdefault(key, axis) != axis:
                        raise InputError(
                            f"axes.{axis}.{name} sets {key}, and so does axes.{places[key]}; one of them would be lost"
                        )
                if "recipe" in keys and not isinstance(keys["recipe"], str):
                    raise InputError(f"axes.{axis}.{name}: recipe is {keys['recipe']}; name a file")
                if not name or set(name) & set("/\\ ") or name.startswith("."):
                    raise InputError(f"axes.{axis}: an option's name {name!r} is no name of a folder")
        known = {name for options in self.axes.values() for name in options}
        for name in self.confirm.always if self.confirm else []:
            if name not in known:
                raise InputError(f"confirm.always: no option is called {name!r}; {suggest(name, known)}")


Cell = tuple[str, ...]  # one option of each axis


def cells(grid: Grid) -> Iterator[Cell]:
    """All of them, the last axis fastest."""
    return itertools.product(*grid.axes.values())


def read(path: str) -> dict[str, Any]:
    """The settings in a recipe."""
    try:
        found = yaml.safe_load(recipe(path).read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: no recipe")
    return found


def settings_of(grid: Grid, cell: Cell) -> dict[str, Any]:
    """What a cell is trained with, but for its seed and its folder."""
    settings = read(grid.base)
    changes = [grid.common, *(options[name] for options, name in zip(grid.axes.values(), cell))]
    for change in changes:
        for key, value in change.items():
            if key != "recipe":
                put(settings, key, value)
                continue
            method = read(value)
            for part in METHOD:
                settings.pop(part, None)
                if part in method:
                    settings[part] = method[part]
    return settings


def folder(grid: Grid, cell: Cell, seed: int) -> Path:
    """Where a cell's run is."""
    return Path(grid.output, *cell, f"seed-{seed}")


def write(grid: Grid, cell: Cell, seed: int) -> Path:
    """The recipe of a cell, checked; the same as before if there was one.

    Raises:
        InputError: it is none, or the folder holds the run of another.
    """
    run = folder(grid, cell, seed)
    path = Path(grid.output, "recipes", f"{'-'.join(cell)}-seed-{seed}.yaml")
    settings = settings_of(grid, cell) | {"seed": seed, "output": str(run)}
    text = yaml.safe_dump(settings, sort_keys=False)
    if path.exists() and path.read_text() != text and run.exists():
        raise InputError(f"{run}: holds a run of another grid; choose another output, or delete it and {path}")
    if not path.exists() or path.read_text() != text:
        atomic_write(path, text)
    try:
        for link in links(parse(Run, ["--config", str(path)])):
            verification = link.build().verification
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    judged = ["all", *verification.subsets()]
    if verification.benchmark is not None and grid.people not in judged:
        raise InputError(f"{path}: verifies on people {', '.join(judged)}, and the grid's people are {grid.people}")
    return path


def check_teachers(grid: Grid) -> None:
    """Whether all that a grid's cells name as teachers is there, and is what it was when finished cells were trained.

    Some are trained by recipes of their own.

    Raises:
        InputError: one is not.
    """
    weights = functools.cache(weights_in)  # many cells name the same
    for cell in cells(grid):
        settings = settings_of(grid, cell)
        # In a chain they teach the first link.
        taught = {run: taught_by(run / "link-1" if settings.get("chain") else run) for run in done(grid, cell)}
        for source in named_in(settings["teacher"]):
            if source.startswith("runs/") and not Path(source).exists():
                raise InputError(f"{source}: no such teacher, and {'-'.join(cell)} needs it; train it first")
            for run, before in taught.items():
                if not weights(source) <= before:
                    raise InputError(f"{run}: was taught by another {source} than the one here now; delete the run")


def check_cells(grid: Grid) -> None:
    """Build what each cell that is still to train names, and show its losses its networks, before the first trains.

    Raises:
        InputError: naming the recipe of the cell that would fail.
    """
    for cell in cells(grid):
        path = write(grid, cell, grid.seeds[0])
        if finished(folder(grid, cell, grid.seeds[0])):
            continue
        try:
            check_links(links(parse(Run, ["--config", str(path)])))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def named_in(teacher: str | dict[str, Any]) -> list[str]:
    """What a recipe's ``teacher`` names: one recognizer, members or stages, or the folder of these."""
    given = teacher.get("init_args", {}) if isinstance(teacher, dict) else {"members": teacher}
    found = [given.get("members", []), given.get("stages", [])]
    return [source for named in found for source in ([named] if isinstance(named, str) else named)]


def weights_in(source: str) -> set[str]:
    """SHA-256 of the weights in a folder of a recognizer, or of snapshots; of what is no folder none."""
    files = [*Path(source).glob("model.safetensors"), *Path(source).glob("step-*/model.safetensors")]
    return {sha256(path) for path in files}


def done(grid: Grid, cell: Cell, seeds: Sequence[int] | None = None) -> list[Path]:
    """Folders of a cell's finished runs of ``seeds`` (all)."""
    if seeds is None:
        seeds = list(dict.fromkeys([*grid.seeds, *(grid.confirm.seeds if grid.confirm else [])]))
    return [run for seed in seeds if finished(run := folder(grid, cell, seed))]


def taught_by(run: Path) -> set[str]:
    """SHA-256 of the weights of all that taught a run."""
    return set(digests(read_record(run / "provenance.json").get("teacher")))


def train(grid: Grid, cell: Cell, seed: int, settings: Path) -> bool:
    """Train a cell, or what is left of it, by the recipe at ``settings``; returns whether it succeeded."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *shlex.split(grid.launch)]
    arguments = [*launch, str(ROOT / "distill" / "train.py"), "--config", str(settings)]
    name = f"{' '.join(cell)} seed {seed}"
    if grid.jobs == 1:
        print(f"\n== {name}", flush=True)
        return not subprocess.run(arguments, check=False).returncode
    log = Path(grid.output, "logs", f"{settings.stem}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"== {name}: {log}", flush=True)
    with log.open("w") as file:
        failed = subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if failed:
        print(f"== {name} failed: {last_line(log)}", flush=True)
    return not failed


def last_line(log: Path) -> str:
    """Of what a run has printed, which says why it failed."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "no output")


def train_all(grid: Grid, todo: Sequence[tuple[Cell, int]]) -> list[tuple[Cell, int]]:
    """Train cells with seeds, ``grid.jobs`` at a time; returns those that failed."""
    todo = [one for one in todo if not finished(folder(grid, *one))]
    # Not in the threads below: parsing a recipe changes the working folder, which all threads share, for a moment.
    recipes = {one: write(grid, *one) for one in todo}
    failed = [one for one in todo[: 1 if grid.jobs > 1 else None] if not train(grid, one[0], one[1], recipes[one])]
    if grid.jobs == 1:
        return failed
    cores = sorted(os.sched_getaffinity(0))
    shares: SimpleQueue[list[int]] = SimpleQueue()
    jobs = min(grid.jobs, len(cores))
    for job in range(jobs):
        shares.put(cores[job::jobs])
    # A run keeps to the cores of the thread that starts it.
    with ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
        try:
            ended = list(pool.map(lambda one: train(grid, one[0], one[1], recipes[one]), todo[1:]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed + [one for one, well in zip(todo[1:], ended) if not well]


def rates(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a verification says of one network: by measure, ``value`` and its 95 % ``interval``."""
    intervals = row.get("intervals") or {}
    tars = intervals.get("tar_at_far") or {}
    return {
        "EER": {"value": row["eer"], "interval": intervals.get("eer")},
        **{f"TAR@FAR={far}": {"value": row["tar_at_far"][far], "interval": tars.get(far)} for far in ("1e-2", "1e-3")},
        "rank-1": {"value": row["rank1"], "interval": intervals.get("rank1")},
    }


def measured(grid: Grid, run: Path, label: str = "student") -> dict[str, dict[str, Any]]:
    """What a finished run's network scored: by measure, ``value`` and, where there is one, its 95 % ``interval``."""
    found: dict[str, dict[str, Any]] = {}
    verification = run / "verification.json"
    if verification.exists():
        subsets: dict[str, list[dict[str, Any]]] = json.loads(verification.read_text())["subsets"]
        if grid.people not in subsets:
            raise InputError(f"{run}: verified on people {', '.join(subsets)}; set people to one of them")
        for subset, rows in subsets.items():
            condition = subset.removeprefix(grid.people)
            row = next((row for row in rows if row["label"] == label), None)  # none of a run without a teacher
            if row is None or (condition and not condition.startswith(" ")):
                continue
            said = rates(row)
            found |= {f"{measure},{condition}": said[measure] for measure in WORSE} if condition else said
    if label == "student" and (run / "metrics.jsonl").exists():
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        agreement = [entry["validation"] for entry in entries if "validation" in entry]
        for name in ("cosine", "neighborhood"):
            if agreement and name in agreement[-1]:
                found[name] = {"value": agreement[-1][name], "interval": None}
    return found


def summarize(values: Sequence[dict[str, Any]], rate: bool = False) -> dict[str, Any]:
    """Mean, 95 % interval and n of one measure over seeds.

    Over two seeds and more, the interval is Student's, of the mean over seeds. Of one seed it is the run's own, from
    resampling people; it says nothing about other seeds. That of a ``rate`` ends at 0 and 1.

    >>> summarize([{"value": 1.0, "interval": None}, {"value": 3.0, "interval": None}])["interval"]
    [-10.706, 14.706]
    """
    numbers = [value["value"] for value in values]
    n, mean = len(numbers), statistics.fmean(numbers)
    interval = values[0]["interval"]
    if n > 1:
        half = (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * statistics.stdev(numbers) / math.sqrt(n)
        interval = [max(mean - half, 0.0), min(mean + half, 1.0)] if rate else [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "n": n, "values": numbers}


def collect(grid: Grid, seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """A row for each cell that has a finished run of ``seeds`` (all): its options, and the summary of each measure."""
    rows = []
    for cell in cells(grid):
        runs = done(grid, cell, seeds)
        found = [measured(grid, run) for run in runs]
        names = [name for name in ordered(found) if all(name in one for one in found)]
        if names:
            row = {"cell": list(cell)} | {
                name: summarize([one[name] for one in found], kind(name)[1]) for name in names
            }
            taught = [measured(grid, run, "teacher") for run in runs]
            if all(grid.measure in one for one in taught):
                mean = statistics.fmean(one[grid.measure]["value"] for one in taught)
                row["teacher"] = {"mean": mean, "interval": None}
            rows.append(row)
    return rows


def several_teachers(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the cells were taught by networks that differ: one line for all of them would be another's."""
    means = [row["teacher"]["mean"] if "teacher" in row else math.inf for row in rows]
    return not all(math.isclose(mean, means[0]) for mean in means)  # a mean of equal numbers need not be that number


def ordered(found: Sequence[dict[str, Any]]) -> list[str]:
    """The measures that occur: those of `MEASURES` first, then those under conditions."""
    present = dict.fromkeys(name for one in found for name in one)
    worse = [name for measure in MEASURES for name in present if name.startswith(f"{measure}, ")]
    return [*(name for name in MEASURES if name in present), *worse]


def kind(name: str) -> tuple[bool, bool]:
    """Whether more of a measure is better, and whether it is a rate."""
    return MEASURES[name.partition(",")[0]]


def to_confirm(grid: Grid, rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells that deserve more seeds."""
    ranked = [row for row in rows if grid.measure in row]
    if grid.confirm is None or not ranked:
        return []
    means = [row[grid.measure]["mean"] for row in ranked]
    best = max(means) if MEASURES[grid.measure][0] else min(means)
    return [
        tuple(row["cell"])
        for row, mean in zip(ranked, means)
        if abs(mean - best) <= grid.confirm.within or set(row["cell"]) & set(grid.confirm.always)
    ]


def shown(name: str, summary: dict[str, Any]) -> str:
    """``mean (low to high)``; rates in percent."""
    factor, digits = (100, 2) if kind(name)[1] else (1, 3)
    numbers = [summary["mean"], *(summary["interval"] or [])]
    mean, *interval = (f"{factor * number:.{digits}f}" for number in numbers)
    return f"{mean} ({interval[0]} to {interval[1]})" if interval else mean


def table(grid: Grid, rows: Sequence[dict[str, Any]], teacher: dict[str, dict[str, Any]]) -> str:
    """Markdown, the best cell first."""
    names = ordered(rows)
    if grid.measure in names:
        sign = -1 if MEASURES[grid.measure][0] else 1
        rows = sorted(rows, key=lambda row: sign * row[grid.measure]["mean"] if grid.measure in row else math.inf)
    several = several_teachers(rows)
    *heads, last = [f"{name}, %" if kind(name)[1] else name for name in (*names, grid.measure)]
    column = [f"teacher's {last}"] if several else []
    lines = [[*grid.axes, *heads, *column, "n"]]
    for row in rows:
        n = max(row[name]["n"] for name in names if name in row)
        own = [shown(grid.measure, row["teacher"]) if "teacher" in row else ""] if several else []
        lines.append([*row["cell"], *(shown(name, row[name]) if name in row else "" for name in names), *own, str(n)])
    if teacher:
        values = [
            shown(name, {"mean": teacher[name]["value"], "interval": teacher[name]["interval"]})
            if name in teacher
            else ""
            for name in names
        ]
        lines.append(["teacher", *[""] * (len(grid.axes) - 1), *values, ""])
    rule = ["---"] * len(grid.axes) + ["---:"] * (len(names) + len(column) + 1)
    body = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    chosen = ""
    if grid.confirm is not None and any(
        row[grid.measure]["n"] > 1 and not set(row["cell"]) & set(grid.confirm.always)
        for row in rows
        if grid.measure in row
    ):
        always = ", ".join(grid.confirm.always)
        chosen = f" Cells but {always} have more seeds where their first was near the best, and it counts among them."
    return (
        f"{body}\n\nPeople {grid.people} of the benchmark; agreement (cosine, neighborhood) with a cell's own teacher "
        "on held-out faces. In parentheses 95 % intervals: of the mean over n seeds (Student), or, for n = 1, from "
        f"resampling people.{chosen}\n"
    )


def figure(grid: Grid, rows: Sequence[dict[str, Any]], name: str, teacher: dict[str, dict[str, Any]]) -> Figure:
    """One line for each cell: its seeds, their mean and the interval."""
    factor = 100 if kind(name)[1] else 1
    rows = sorted((row for row in rows if name in row), key=lambda row: row[name]["mean"], reverse=kind(name)[0])
    made = Figure(figsize=(6.4, 1.1 + 0.26 * len(rows)), layout="constrained")
    axis = made.add_subplot()
    for place, row in enumerate(rows):
        found = row[name]
        if found["interval"]:
            axis.plot([factor * x for x in found["interval"]], [place, place], color=figures.BLUE, linewidth=1.4)
        axis.plot([factor * x for x in found["values"]], [place] * found["n"], "o", color=figures.GRAY, markersize=3)
        axis.plot(factor * found["mean"], place, "o", color=figures.BLUE, markersize=5)
    label = f"{name}, %" if kind(name)[1] else name
    if name in teacher:
        value, (low, high) = factor * teacher[name]["value"], axis.get_xlim()
        if 2 * low - high < value < 2 * high - low:
            axis.axvline(value, color=figures.ORANGE, linestyle="--")
        label += f" (teacher: {value:.3g})"  # far off, its line would press the cells together
    axis.set_yticks(range(len(rows)), [f"{' '.join(row['cell'])} (n={row[name]['n']})" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(label)
    return made


def overview(rows: Sequence[dict[str, Any]], measure: str) -> Figure:
    """A measure of `WORSE` under all conditions of the first cell, and how much better or worse all others are than it.

    Colors are as strong as a difference is beside the largest in its column. Cells without one of the conditions are
    left out.
    """
    first = next(row for row in rows if measure in row)
    names = [name for name in ordered([first]) if name == measure or name.startswith(f"{measure}, ")]
    rows = [row for row in rows if all(name in row for name in names)]
    means = 100 * np.array([[row[name]["mean"] for name in names] for row in rows])
    better = (means - means[0]) * (1 if kind(measure)[0] else -1)
    scale = np.maximum(np.abs(better).max(0), 1e-9)
    made = Figure(figsize=(2.6 + 0.62 * len(names), 1.0 + 0.24 * len(rows)), layout="constrained")
    axis = made.add_subplot()
    colors = LinearSegmentedColormap.from_list("", [figures.ORANGE, "white", figures.BLUE])
    axis.imshow(better / scale, cmap=colors, vmin=-1.4, vmax=1.4, aspect="auto")  # pale enough to write on
    for place, column in np.ndindex(means.shape):
        axis.text(column, place, f"{means[place, column]:.1f}", ha="center", va="center")
    axis.set_xticks(range(len(names)), [name.partition(", ")[2] or "as they are" for name in names], rotation=30)
    axis.set_yticks(range(len(rows)), [f"{' '.join(row['cell'])} (n={row[measure]['n']})" for row in rows])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(f"{measure}, %: blue better, orange worse than {' '.join(first['cell'])}")
    return made


def report(grid: Grid) -> None:
    """Write the table and the figures of what is finished."""
    output, rows = Path(grid.output), collect(grid)
    if not rows:
        raise InputError(f"{output}: no cell is finished")
    first = next(run for cell in cells(grid) for seed in grid.seeds if finished(run := folder(grid, cell, seed)))
    teacher = {} if several_teachers(rows) else measured(grid, first, "teacher")
    text = table(grid, rows, teacher)
    atomic_write(output / "table.md", text)
    record = {"axes": list(grid.axes), "people": grid.people, "rows": rows}
    atomic_write(output / "table.json", json.dumps(record, indent=1) + "\n")
    with matplotlib.rc_context(figures.STYLE):
        drawn = {name: figure(grid, rows, name, teacher) for name in ordered(rows)}
        conditions = [name for name in WORSE if any(other.startswith(f"{name}, ") for other in drawn)]
        drawn |= {f"{name}, conditions": overview(rows, name) for name in conditions}
        for name, made in drawn.items():
            FigureCanvasSVG(made)
            file = name.replace("@FAR=", "-").replace(", ", "-").replace("/", "-")
            with atomic_path(output / f"{file}.svg") as path:
                made.savefig(path, format="svg", metadata={"Date": None})
    print(f"\n{text}\n{output / 'table.md'}")


def read_grid(arguments: Sequence[str] | None = None) -> Grid:
    """The grid of a command line; the components that its options name stay names."""
    plain = parse(Grid, arguments, program="scripts/ablate.py", description=__doc__ or "").asdict()
    return Grid(**(plain | {"confirm": Confirm(**plain["confirm"]) if plain["confirm"] else None}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    grid = read_grid(arguments)
    # Whatever is wrong with any cell shows here, before the first is trained.
    for cell, seed in itertools.product(cells(grid), grid.seeds):
        write(grid, cell, seed)
    if grid.plan:
        for cell, seed in itertools.product(cells(grid), grid.seeds):
            run = folder(grid, cell, seed)
            print(run, "finished" if finished(run) else "begun" if run.exists() else "to do")
        return
    check_teachers(grid)
    check_cells(grid)
    failed = train_all(grid, [(cell, seed) for seed in grid.seeds for cell in cells(grid)])
    if grid.confirm is not None:
        # By the first seeds alone, so that a grid that was stopped while it confirmed chooses the same cells.
        chosen = to_confirm(grid, collect(grid, grid.seeds))
        failed += train_all(grid, [(cell, seed) for seed in grid.confirm.seeds for cell in chosen])
    report(grid)
    if failed:
        listed = ", ".join(f"{'-'.join(cell)} seed {seed}" for cell, seed in failed)
        raise InputError(f"{len(failed)} runs failed: {listed}; give the same command again once that is mended")


if __name__ == "__main__":
    command(main)()
