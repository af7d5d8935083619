"""Several students and teachers on several benchmarks: one table, one JSON, one self-contained page.

python eval/compare.py --runs runs/a runs/b --models dlib-resnet29 --benchmark att-faces --output comparison
python eval/compare.py --runs runs/a --models r50.pth --benchmark lfw.bin cfp_fp.bin rfw:RFW --output comparison
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from markupsafe import Markup

import faceless
from eval import benchmarks, efficiency, figures, metrics, report
from eval.benchmarks import Benchmark, Protocol
from eval.figures import Accuracy, Scores
from eval.verify import crop_size, verify
from faceless import assets, settings
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_write, check_folder
from faceless.recognizer import Recognizer
from faceless.weights import PRETRAINED

FILES = ("comparison.json", "comparison.md", "comparison.html")
#: Axes of the figures of accuracy against cost.
COSTS = {"million MACs a face": "macs", "MB in float32": "megabytes", "ms for one face": "milliseconds"}
TRAINED_ON = {False: "generated only", True: "real people", None: "not recorded"}
MAX_GROUPS_FILE = 16 << 20


@dataclass(frozen=True)
class Model:
    """One that is compared.

    Attributes:
        label: what it is called on the page.
        source: what `faceless.load` read.
        real_faces: whether real faces were in its training; None where that is not recorded.
        teacher: whose student it is; empty where that is not recorded.
        note: what is known about where its weights come from.
    """

    label: str
    source: str
    recognizer: Recognizer
    real_faces: bool | None = None
    teacher: str = ""
    note: str = ""


@dataclass
class Comparison:
    """Everything that was measured.

    Attributes:
        models: in the order given.
        costs: by label, of `efficiency.measure`.
        results: by benchmark and label, the summaries of `eval.verify` and of protocols.
        scores: by benchmark and label, where the benchmark has pairs and they fit into memory.
    """

    models: list[Model]
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Ready for JSON; rates lie in 0..1."""
        accuracies = {name: headlines(found) for name, found in self.results.items()}
        return {
            "faceless": faceless.__version__,
            "models": [
                {
                    "label": model.label,
                    "source": model.source,
                    "sha256": model.recognizer.source.get("sha256"),
                    "real_faces_in_training": model.real_faces,
                    "teacher": model.teacher or None,
                    "note": model.note or None,
                    "efficiency": self.costs[model.label],
                }
                for model in self.models
            ],
            "benchmarks": {
                name: {
                    "accuracy": {"is": title, **{label: a.value for label, a in found.items()}},
                    "pareto": {
                        axis: [label for label, best in zip(found, fronts) if best]
                        for axis, fronts in (
                            (axis, metrics.pareto([cost[label] for label in found], [a.value for a in found.values()]))
                            for axis, cost in spent(self.costs).items()
                        )
                    },
                    "results": self.results[name],
                }
                for name, (title, found) in accuracies.items()
            },
        }


def headlines(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Accuracy]]:
    """The one figure by which people compare models on a benchmark, and its value for each of them."""
    found = {label: headline(figures_of) for label, figures_of in results.items()}
    return next(iter(found.values()))[0], {label: accuracy for label, (_, accuracy) in found.items()}


def headline(found: Mapping[str, Any]) -> tuple[str, Accuracy]:
    """Accuracy over folds of lists of pairs; rank-1 of a search; TAR at FAR 0.01 % of IJB; at 0.1 % of all else.

    >>> headline({"tar_at_far": {"1e-2": 0.9, "1e-3": 0.8}, "intervals": {"tar_at_far": {"1e-3": [0.7, 0.9]}}})
    ('TAR at FAR 0.1 %', Accuracy(value=0.8, interval=[0.7, 0.9]))
    """
    bounds = found.get("intervals") or {}
    if "accuracy" in found:
        pairs, mean = found["genuine"] + found["impostor"], found["accuracy"]["mean"]
        return "Accuracy", Accuracy(mean, list(metrics.wilson(round(mean * pairs), pairs)))
    tars = found.get("tar_at_far") or {}
    if "distractors" in found or not tars:
        return "Rank-1", Accuracy(found["rank1"], bounds.get("rank1"))
    wanted = "1e-4" if "templates" in found else "1e-3"
    far = wanted if wanted in tars else min(tars, key=float)
    return f"TAR at FAR {100 * float(far):g} %", Accuracy(tars[far], (bounds.get("tar_at_far") or {}).get(far))


def spent(costs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By the axis of a figure, what each model costs; without what is unknown of one that onnxruntime computes."""
    values = {
        label: {
            "macs": cost["macs"] / 1e6,
            "megabytes": cost["megabytes"]["fp32"],
            "milliseconds": cost["latency_ms"]["batch1"]["median"],
        }
        for label, cost in costs.items()
    }
    found = {axis: {label: value[key] for label, value in values.items()} for axis, key in COSTS.items()}
    return {axis: cost for axis, cost in found.items() if min(cost.values()) > 0}


def students(runs: Sequence[str]) -> list[Model]:
    """The students of runs, named after their folders.

    Raises:
        InputError: no such folder, or one without a student.
    """
    found = []
    for run in runs:
        folder = Path(run) / "student"
        if not folder.is_dir():
            raise InputError(f"{run}: holds no student/; give the folder of a finished run, or a model with --models")
        found.append(_model(str(folder), Path(run).resolve().name, report.read_json(Path(run) / "provenance.json")))
    return found


def others(sources: Sequence[str]) -> list[Model]:
    """Whatever `faceless.load` reads, named after its last part."""
    return [_model(source, Path(source).stem if "." in source else Path(source).name, {}) for source in sources]


def _model(source: str, label: str, provenance: Mapping[str, Any]) -> Model:
    recognizer = faceless.load(source)
    record = provenance or recognizer.source.get("record") or {}
    real, teacher = record.get("real_faces_in_training"), record.get("teacher")
    asset = assets.ASSETS.get(PRETRAINED.get(source, ""))
    return Model(
        label,
        source,
        recognizer,
        real if isinstance(real, bool) else None,  # anything but a clear "no" is not a "no"
        str(teacher.get("name") or "") if isinstance(teacher, dict) else "",
        f"{asset.note}. Licence: {asset.licence}" if asset else "",
    )


def _distinct(models: list[Model]) -> list[Model]:
    """Models of one label are called by their sources."""
    labels = [model.label for model in models]
    named = [replace(model, label=model.source) if labels.count(model.label) > 1 else model for model in models]
    twice = [label for label, count in Counter(model.label for model in named).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: given twice; each model is compared once")
    return named


def read_groups(path: str | Path) -> dict[str, str]:
    """A text file with ``person,group`` in each line.

    Raises:
        InputError: no such file, too large, or lines of another kind.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_GROUPS_FILE:
        raise InputError(f"{path}: no such file, or more than {MAX_GROUPS_FILE >> 20} MiB; give lines `person,group`")
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        person, comma, group = (part.strip() for part in line.partition(","))
        if not line.strip():
            continue
        if not (comma and person and group) or person in found:
            raise InputError(f"{path}: line {number} is not `person,group` of a person not named before")
        found[person] = group
    return found


def measure(
    models: Sequence[Model],
    sources: Sequence[str],
    people: str | None = None,
    groups: Mapping[str, str] | None = None,
    align: bool = False,
    flip: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    cache: bool = True,
    device: str = "auto",
    memory: bool = False,
) -> Comparison:
    """Every model on every benchmark, and what each costs, all on one machine.

    Args:
        sources: of benchmarks, as `eval.verify` takes them.
        people: ``FIRST-LAST`` of benchmarks whose people have numbers.
        groups: the group of each person of such benchmarks, for rates by group.
        others: as the options of `eval.verify`; ``memory`` as of `efficiency.measure`.

    Raises:
        InputError: a benchmark cannot be used, or has no people who could be chosen or grouped.
    """
    made = Comparison(list(models))
    where = chosen_device(device, "--device")
    unlisted = 0
    for source in sources:
        name = ""
        for model in models:
            print(f"{model.label} on {source}", file=sys.stderr, flush=True)
            recognizer = model.recognizer.to(where)
            benchmark = benchmarks.find(source, recognizer.spec.framing, crop_size(recognizer), align)
            chosen = f" {people}" if people and isinstance(benchmark, Benchmark) else ""
            called = benchmark.name + chosen
            name = name or (called if called not in made.results else source)
            if isinstance(benchmark, Protocol):
                judged = benchmarks.evaluate(recognizer, benchmark, flip, model.label, cache)
                summary, arrays = judged.summary(), judged.arrays()
            else:
                unlisted += 1
                summary, arrays = _all_pairs(model, benchmark, people, groups, bool(flip), bootstrap, seed, cache)
            made.results.setdefault(name, {})[model.label] = summary
            if arrays:
                made.scores.setdefault(name, {})[model.label] = Scores(**arrays)
            recognizer.cpu()
    for option, given in (("--people", people), ("--groups", groups)):
        if given and not unlisted:
            raise InputError(f"{option}: none of the benchmarks has people that could be chosen by it")
    for model in models:
        print(f"what {model.label} costs", file=sys.stderr, flush=True)
        made.costs[model.label] = efficiency.measure(model.recognizer.to(where), batches=(1,), memory=memory)
        model.recognizer.cpu()
    return made


def _all_pairs(
    model: Model,
    benchmark: Benchmark,
    people: str | None,
    groups: Mapping[str, str] | None,
    flip: bool,
    bootstrap: int,
    seed: int,
    cache: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if people:
        benchmark = benchmark.subset(benchmarks.parse_people(people, len(benchmark.names)))
    result = verify(model.recognizer, benchmark, flip, bootstrap, seed, model.label, cache)
    summary, arrays = result.summary() | {"subset": people or "all"}, result.arrays()
    if groups is not None:
        missing = [name for name in benchmark.names if name not in groups]
        if missing:
            raise InputError(f"--groups: {missing[0]} of {benchmark.name} is in no group")
        weights = metrics.resamples(len(benchmark.names), bootstrap, seed) if bootstrap else None
        try:
            summary["common_threshold"] = {
                far: metrics.group_rates(
                    **arrays,
                    groups=[groups[name] for name in benchmark.names],
                    threshold=point.threshold,
                    weights=weights,
                )
                for far, point in result.points.items()
                if point.allowed
            }
        except ValueError as error:
            raise InputError(f"--groups: {error}") from error
    return summary, arrays


def write(made: Comparison, folder: str | Path, bootstrap: int = 1000) -> Path:
    """``comparison.json``, ``comparison.md`` and ``comparison.html``, each complete or not there.

    Args:
        bootstrap: replicates of the bands in the figures.

    Returns:
        The page.
    """
    folder = Path(folder)
    content = made.json()
    page = report.render("comparison.html", _context(made, bootstrap))
    atomic_write(folder / FILES[0], json.dumps(content, indent=2) + "\n")
    atomic_write(folder / FILES[1], markdown(made))
    atomic_write(folder / FILES[2], page)
    return folder / FILES[2]


def table(made: Comparison) -> tuple[list[tuple[str, str]], list[list[dict[str, str]]]]:
    """Columns behind the models' names, with their units, and a cell for each model and column."""
    shown = {name: headlines(found) for name, found in made.results.items()}
    head = [(name, f"{title}, %") for name, (title, _) in shown.items()]
    head += [("Parameters", "million"), ("MACs", "million"), ("Size", "MB, fp32"), ("Latency", "ms, one face")]
    memory = all("peak_megabytes" in cost for cost in made.costs.values())
    if memory:
        head.append(("Peak memory", "MB, one face"))
    rows = []
    for model in made.models:
        cost, time = made.costs[model.label], made.costs[model.label]["latency_ms"]["batch1"]
        accuracies = [found[model.label] for _, found in shown.values()]
        cells = [report.rate(a.value, list(a.interval) if a.interval else None) for a in accuracies]
        cells += [
            report.cost(cost["parameters"], 1e6),
            report.cost(cost["macs"], 1e6),
            report.cost(cost["megabytes"]["fp32"]),
            report.cost(time["median"], extent=f"{figures.short(time['p5'])} – {figures.short(time['p95'])}"),
        ]
        if memory:
            cells.append(report.cost(cost["peak_megabytes"]["batch1"]))
        rows.append(cells)
    return head, rows


def markdown(made: Comparison) -> str:
    """The table, details of each benchmark, and rates by group."""
    head, rows = table(made)
    labels = [model.label for model in made.models]
    parts = [
        "# Comparison",
        _markdown(["model", *map(", ".join, head)], [[label, *row] for label, row in zip(labels, rows)]),
    ]
    parts.append(notes(made))
    for name, found in made.results.items():
        figured, cells = details(found)
        parts += [f"## {name}", _markdown(["model", *figured], [[label, *row] for label, row in cells.items()])]
        if grouped := by_group(found):
            columns = ["model", *grouped["groups"], "FNMR max/min", "FMR max/min"]
            lines = [
                [label, *(f"{cell['fnmr']['text']} / {cell['fmr']['text']}" for cell in row["cells"]), *row["ratios"]]
                for label, row in grouped["rows"].items()
            ]
            parts += [f"FNMR / FMR of each group in percent, at one threshold: {grouped['title']}."]
            parts += [_markdown(columns, lines)]
    trained = [[m.label, TRAINED_ON[m.real_faces], m.teacher or report.NONE, m.source] for m in made.models]
    parts += ["## Training faces", _markdown(["model", "training faces", "teacher", "source"], trained)]
    return "\n\n".join(parts) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:
        if isinstance(cell, dict):
            cell = f"{cell['text']} [{cell['range'].replace(' – ', ', ')}]" if cell["range"] else cell["text"]
        return str(cell).replace("|", "\\|").replace("\n", " ")

    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def details(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list[dict[str, str]]]]:
    """The usual figures of one benchmark, those that it has, in percent."""
    fars = sorted({far for one in found.values() for far in one.get("tar_at_far") or {}}, key=float, reverse=True)
    plain = [key for key in ("eer", "auc", "rank1", "rank5", "rank20") if any(key in one for one in found.values())]
    rows = {}
    for label, one in found.items():
        bounds, tars = one.get("intervals") or {}, one.get("tar_at_far") or {}
        ranges = bounds.get("tar_at_far") or {}
        rows[label] = [
            *(report.rate(tars.get(far), ranges.get(far)) for far in fars),
            *(report.rate(one.get(key), bounds.get(key)) for key in plain),
        ]
    names = {"eer": "EER", "auc": "AUC"}
    heads = [names.get(key, key.replace("rank", "rank-")) for key in plain]
    return [f"TAR@FAR={far}" for far in fars] + heads, rows


def by_group(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """FMR and FNMR of each group at the strictest common threshold that still allows 30 false matches."""
    if not all(one.get("common_threshold") for one in found.values()):
        return None
    first = next(iter(found.values()))
    fars = sorted(first["common_threshold"], key=float)
    allowed = first["allowed_false_matches"]
    far = next((far for far in fars if allowed[far] >= metrics.RULE_OF_30), fars[-1])
    rows = {}
    for label, one in found.items():
        at = one["common_threshold"][far]
        rows[label] = {
            "cells": [
                {rate: report.rate(group[rate], _listed(group.get(f"{rate}_interval"))) for rate in ("fmr", "fnmr")}
                for group in at["groups"].values()
            ],
            "ratios": [
                report.NONE if ratio is None else f"{ratio:.2f}"
                for ratio in (at["fnmr_max_min_ratio"], at["fmr_max_min_ratio"])
            ],
        }
    return {
        "title": f"the lowest that keeps the FMR of all pairs to {100 * float(far):g} %",
        "groups": list(first["common_threshold"][far]["groups"]),
        "rows": rows,
    }


def _listed(bounds: Sequence[float] | None) -> list[float] | None:
    return None if bounds is None else list(bounds)


def notes(made: Comparison) -> str:
    """How to read the table."""
    cost = next(iter(made.costs.values()))
    threads = f", {cost['threads']} thread{'s' * (cost['threads'] != 1)}" if cost["device"] == "cpu" else ""
    return (
        "In brackets or below a figure: its 95 % interval (of times the 5th to 95th percentile). "
        f"Operations: {cost['convention']}. Times: median in float32 on {cost['device']}{threads}; they compare within "
        "this comparison only."
    )


def _context(made: Comparison, bootstrap: int) -> dict[str, Any]:
    labels = [model.label for model in made.models]
    palette = figures.colors(labels)
    head, rows = table(made)
    costs = spent(made.costs)
    parts, bars = [], {}
    for number, (name, found) in enumerate(made.results.items(), 1):
        title, accuracies = headlines(found)
        bars[f"{name}: {title}"] = accuracies
        columns, lines = details(found)
        scores = made.scores.get(name, {})
        shaded = figures.bands(scores, bootstrap)
        first = next(iter(found.values()))
        parts.append(
            {
                "name": name,
                "title": title,
                "counts": f"{first['genuine']:,} genuine and {first['impostor']:,} impostor pairs"
                if {"genuine", "impostor"} <= set(first)
                else "",
                "pareto": Markup(figures.pareto(accuracies, costs, f"{name}: {title}", f"pareto-{number}")),
                "columns": columns,
                "rows": lines,
                "det": Markup(figures.det(scores, shaded, f"det-{number}")) if scores else None,
                "roc": Markup(figures.roc(scores, shaded, name=f"roc-{number}")) if scores else None,
                "bands": _bands(shaded),
                "groups": by_group(found),
                "cautions": [f"{label}: {line}" for label, one in found.items() for line in one.get("cautions") or []],
            }
        )
    return {
        "title": f"{len(labels)} recognizers on {', '.join(made.results)}",
        "version": faceless.__version__,
        "head": head,
        "rows": list(zip(labels, rows)),
        "palette": palette,
        "notes": notes(made),
        "bars": Markup(figures.benchmark_bars(bars, palette)),
        "benchmarks": parts,
        "models": [
            {
                "label": model.label,
                "source": model.source,
                "sha256": str(model.recognizer.source.get("sha256") or ""),
                "trained_on": TRAINED_ON[model.real_faces],
                "real_faces": model.real_faces,
                "teacher": model.teacher or report.NONE,
                "note": model.note,
            }
            for model in made.models
        ],
    }


def _bands(shaded: Mapping[str, figures.Band]) -> str:
    origins = sorted({band.origin for band in shaded.values()})
    return f"with 95 % bands {' or '.join(origins)}" if origins else "without bands"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        prog="eval/compare.py", description="Compare recognizers: accuracy, cost, groups.", exit_on_error=False
    )
    options.add_argument(
        "--runs", nargs="*", default=[], metavar="FOLDER", help="folders of runs, whose students are compared"
    )
    options.add_argument(
        "--models", nargs="*", default=[], metavar="SOURCE", help="anything else that faceless.load reads"
    )
    options.add_argument(
        "--benchmark", nargs="+", default=["att-faces"], metavar="SOURCE", help="as eval/verify.py takes them"
    )
    options.add_argument("--output", type=str, required=True, help="write the comparison into this folder")
    options.add_argument("--people", type=str | None, help="FIRST-LAST, for example 21-40, where people have numbers")
    options.add_argument(
        "--groups", type=str | None, help="a file of lines `person,group` for rates by group of people"
    )
    options.add_argument("--align", type=bool, default=False, help="cut faces out of the folder's photographs")
    options.add_argument(
        "--flip",
        type=bool | None,
        help="add the embedding of the mirrored face; by default where the benchmark's protocol does",
    )
    options.add_argument("--cache", type=bool, default=True, help="keep embeddings in the cache folder")
    options.add_argument("--bootstrap", type=int, default=1000, help="replicates for the intervals, 0 for none")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options.add_argument("--memory", type=bool, default=False, help="also measure the peak memory of one face")
    options.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = settings.options(parser(), arguments)
    if not 0 <= options.bootstrap <= 1_000_000:
        raise InputError(f"--bootstrap {options.bootstrap}: use 0 (no intervals) to 1000000 replicates")
    if len(set(options.benchmark)) < len(options.benchmark):
        raise InputError("--benchmark: one of them is given twice")
    check_folder(options.output)
    groups = read_groups(options.groups) if options.groups else None
    models = _distinct(students(options.runs) + others(options.models))
    if not models:
        raise InputError("nothing to compare: give folders of runs with --runs, or models with --models")
    made = measure(
        models,
        options.benchmark,
        options.people,
        groups,
        options.align,
        options.flip,
        options.bootstrap,
        options.seed,
        options.cache,
        options.device,
        options.memory,
    )
    page = write(made, options.output, options.bootstrap)
    print(markdown(made))
    print(f"written to {page}")


if __name__ == "__main__":
    main()
