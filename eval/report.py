"""One self-contained page about a run, made of whatever files the run's folder holds."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eval import figures
from faceless.errors import InputError
from faceless.files import atomic_write

FILES = ("verification.json", "scores.npz", "metrics.jsonl", "faces.npz", "provenance.json", "settings.yaml")
FIGURES = ("cost", "roc", "det", "scores", "loss", "validation")
TABLE_FARS = ("1e-2", "1e-3")
FACES, HARDEST, FACE_SIDE = 64, 32, 112
MAX_TEXT = 400
NONE = "–"


def write(run: str | Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Files that are missing are named on the page. Text out of the files is escaped, and the page's own policy forbids
    scripts and requests.

    Raises:
        InputError: no such folder, no file of a run in it, or one that cannot be read.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run}: no such folder")
    if not any((run / name).exists() for name in FILES):
        raise InputError(f"{run}: not the folder of a run; it holds none of {', '.join(FILES)}")
    page = run / "report.html"
    atomic_write(page, render("report.html", _context(run)))
    return page


def render(template: str, context: Mapping[str, Any]) -> str:
    """One of ``templates/`` as a page; all text of the context is escaped but `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def _context(run: Path) -> dict[str, Any]:
    # All files are read before anything is drawn: a broken one shows at once.
    provenance = read_json(run / "provenance.json")
    verification = read_json(run / "verification.json")
    scores = _scores(run / "scores.npz")
    faces = _faces(run / "faces.npz")
    subsets: dict[str, list[dict[str, Any]]] = verification.get("subsets") or {}
    # People kept for reporting first, everybody last.
    names = sorted(subsets, key=lambda name: name == "all")
    rows = subsets[names[0]] if names else []
    training, svgs = _training(run / "metrics.jsonl")
    if rows:
        svgs["cost"] = figures.accuracy_and_cost(rows)
    if scores:
        shaded = figures.bands(scores)
        svgs |= {"roc": figures.roc(scores, shaded), "det": figures.det(scores, shaded)}
        svgs["scores"] = figures.score_histograms(scores)
    sources = provenance.get("sources") or []
    real = provenance.get("real_faces_in_training")
    settings = run / "settings.yaml"
    return {
        "title": run.resolve().name,
        "version": provenance.get("faceless"),
        "lead": _lead(provenance, rows),
        # Anything but a clear "no" is not a "no".
        "real_faces": real if isinstance(real, bool) else None,
        "faces_seen": _faces_seen(sources),
        "tiles": _tiles(rows),
        "tiles_of": f"{verification.get('benchmark', 'the benchmark')}, {_people(names[0], rows)}" if names else "",
        "benchmark": verification.get("benchmark", ""),
        "fars": TABLE_FARS,
        "groups": [_group(name, subsets[name]) for name in names],
        "notes": _notes(rows),
        "cautions": _cautions(names, subsets),
        "figures": {name: Markup(svgs[name]) if name in svgs else None for name in FIGURES},
        "bands": any(s.genuine_people is not None for s in scores.values()),
        "training": training,
        "hardest": faces[:HARDEST],
        "others": faces[HARDEST:],
        "assets": [_asset(asset) for asset in provenance.get("assets") or []],
        "provenance": _provenance(provenance),
        "settings": settings.read_text(errors="replace")[:200_000] if settings.exists() else None,
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove it to report without it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; remove it to report without it")
    return content


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file; empty when there is no such file. Pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a file of arrays ({error}); remove it to report without it") from error


def _scores(path: Path) -> dict[str, figures.Scores]:
    arrays = _arrays(path)
    labels = [name.removesuffix("/genuine") for name in arrays if name.endswith("/genuine")]
    return {
        label: figures.Scores(
            arrays[f"{label}/genuine"],
            arrays[f"{label}/impostor"],
            arrays.get(f"{label}/genuine_people"),
            arrays.get(f"{label}/impostor_people"),
        )
        for label in labels
        if f"{label}/impostor" in arrays
    }


def _lead(provenance: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    teacher = (provenance.get("teacher") or {}).get("name")
    student = next((row for row in rows if row.get("label") == "student"), None)
    count = (student or {}).get("efficiency", {}).get("parameters")
    if teacher and count:
        return f"A student of {figures.short(count / 1e6)} million parameters, distilled from {teacher}."
    return f"Distilled from {teacher}." if teacher else ""


def _faces_seen(sources: Sequence[Any]) -> str:
    parts = []
    for source in sources:
        if isinstance(source, dict) and isinstance(source.get("faces"), int):
            generator = source.get("generator")
            name = generator.get("name", "") if isinstance(generator, dict) else generator
            parts.append(f"{source['faces']:,}" + (f" from {name}" if name else ""))
    return "; ".join(parts)


def _people(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    condition = rows[0].get("condition") if rows else None
    name = name.removesuffix(f" {condition}")
    count = rows[0].get("people") if rows else None
    whose = f"people {name.replace('-', '–')}" if name != "all" else f"all {count} people" if count else "all people"
    return f"{whose}, {condition}" if condition else whose


def percent(rate: Any) -> str:
    """A rate in percent; a dash where there is none."""
    return f"{100 * rate:.2f}" if isinstance(rate, int | float) and math.isfinite(rate) else NONE


def rate(value: Any, bounds: Any) -> dict[str, str]:
    """A cell of a table with a rate and its interval."""
    known = isinstance(bounds, list) and len(bounds) == 2
    return {"text": percent(value), "range": f"{percent(bounds[0])} – {percent(bounds[1])}" if known else ""}


def cost(value: Any, scale: float = 1.0, extent: str = "") -> dict[str, str]:
    """A cell of a table with a number and its spread."""
    return {"text": figures.short(value / scale) if isinstance(value, int | float) else NONE, "range": extent}


def _group(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    palette = figures.colors(str(row.get("label", "")) for row in rows)
    first = rows[0] if rows else {}
    detail = ""
    if isinstance(first.get("genuine"), int) and isinstance(first.get("impostor"), int):
        detail = f"{first['genuine']:,} genuine and {first['impostor']:,} impostor pairs"
    shown = []
    for row in rows:
        intervals, costs = row.get("intervals") or {}, row.get("efficiency") or {}
        tars, ranges = row.get("tar_at_far") or {}, intervals.get("tar_at_far") or {}
        time = (costs.get("latency_ms") or {}).get("batch1") or {}
        spread = f"{figures.short(time['p5'])} – {figures.short(time['p95'])}" if {"p5", "p95"} <= set(time) else ""
        label = str(row.get("label", ""))
        shown.append(
            {
                "label": label,
                "color": palette[label],
                "rates": [
                    rate(row.get("eer"), intervals.get("eer")),
                    *(rate(tars.get(far), ranges.get(far)) for far in TABLE_FARS),
                    rate(row.get("rank1"), intervals.get("rank1")),
                ],
                "costs": [
                    cost(costs.get("parameters"), 1e6),
                    cost(costs.get("macs"), 1e6),
                    cost((costs.get("megabytes") or {}).get("fp32")),
                    cost(time.get("median"), extent=spread),
                ],
            }
        )
    title = _people(name, rows)
    return {"title": title[0].upper() + title[1:], "detail": detail, "rows": shown}


def _tiles(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The student's figures in large, the teacher's beside them."""
    by_label = {row.get("label"): row for row in rows}
    if "student" not in by_label:
        return []
    group = {row["label"]: row for row in _group("all", rows)["rows"]}
    student, teacher = group["student"], group.get("teacher")
    tiles = []
    for name, part, index, unit in (
        ("Equal error rate", "rates", 0, " %"),
        ("TAR at FAR 0.1 %", "rates", 2, " %"),
        ("Rank-1", "rates", 3, " %"),
        ("Parameters", "costs", 0, " M"),
        ("Latency, one face", "costs", 3, " ms"),
    ):
        value = student[part][index]["text"]
        if value == NONE:
            continue
        beside = f"teacher {teacher[part][index]['text']}{unit}" if teacher else ""
        tiles.append({"name": name, "value": value + unit, "beside": beside})
    return tiles


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    costs: dict[str, Any] = next((row["efficiency"] for row in rows if row.get("efficiency")), {})
    notes = [
        "TAR: the lowest threshold at which no more than FAR × impostors are accepted, ties never split.",
        "Rank-1: each face searched among all others, ties counted against.",
    ]
    if costs.get("convention"):
        notes.append(f"Operations: {costs['convention']}.")
    if costs.get("device"):
        threads = f", {costs['threads']} threads" if costs["device"] == "cpu" and "threads" in costs else ""
        notes.append(f"Latency: median (5th to 95th percentile) in float32 on {costs['device']}{threads}.")
    return " ".join(notes)


def _cautions(names: Sequence[str], subsets: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    return [
        f"{_people(name, subsets[name])}, {row.get('label', '')}: {line}"
        for name in names
        for row in subsets[name]
        for line in row.get("cautions") or []
    ]


def _training(path: Path) -> tuple[str, dict[str, str]]:
    """A sentence about the training and its curves."""
    if not path.exists():
        return "", {}
    steps, validations = [], []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        if isinstance(entry, dict) and "loss" in entry:
            steps.append(entry)
        elif isinstance(entry, dict) and "validation" in entry:
            validations.append(entry)
    curves = {}
    sentence = ""
    if steps:
        terms = [name for name in steps[-1].get("terms") or {} if all(name in (e.get("terms") or {}) for e in steps)]
        curves["loss"] = figures.losses(
            [e["step"] for e in steps],
            [e["loss"] for e in steps],
            {name: [e["terms"][name] for e in steps] for name in terms},
        )
        sentence = (
            f"{steps[-1]['step']:,} steps; loss {steps[0]['loss']:.3f} at first, {steps[-1]['loss']:.3f} at last."
        )
        speeds = [e["faces_per_second"] for e in steps if e.get("faces_per_second")]
        if speeds:
            sentence += f" Median speed {statistics.median(speeds):,.0f} faces a second."
    if validations:
        names = [n for n in validations[-1]["validation"] if all(n in e["validation"] for e in validations)]
        series = {name: [e["validation"][name] for e in validations] for name in names}
        curves["validation"] = figures.validation([e["step"] for e in validations], series)
    return sentence, curves


def _faces(path: Path) -> list[dict[str, Any]]:
    arrays = _arrays(path)
    if not {"images", "disagreement"} <= set(arrays):
        return []
    images, values = arrays["images"], arrays["disagreement"]
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or len(images) != len(values):
        raise InputError(
            f"{path}: images are no uint8 [n, 3, H, W] with n disagreements; remove it to report without it"
        )
    shown = []
    for image, value in zip(images[:FACES], values[:FACES]):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture.thumbnail((FACE_SIDE, FACE_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        shown.append({"uri": uri, "value": f"{float(value):.3f}", "side": max(picture.size)})
    return shown


def _asset(asset: Mapping[str, Any]) -> dict[str, str]:
    package = f"{asset.get('package', '')} {asset.get('version', '')}".strip()
    keys = ("name", "licence", "note", "source", "sha256")
    return {"package": package, **{key: str(asset.get(key, "")) for key in keys}}


def _provenance(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of keys and values for the sources, the teacher, and all else that was recorded."""
    parts = []
    sources = provenance.get("sources") or []
    for number, source in enumerate(sources, 1):
        parts.append({"title": "Training faces" + (f" {number}" if len(sources) > 1 else ""), "pairs": _pairs(source)})
    for key, title in (("teacher", "Teacher"), ("benchmark", "Benchmark"), ("augment", "Augmentation")):
        if provenance.get(key):
            parts.append({"title": title, "pairs": _pairs(provenance[key])})
    known = {"sources", "teacher", "benchmark", "augment", "assets", "real_faces_in_training"}
    rest = {key: value for key, value in provenance.items() if key not in known}
    if rest:
        parts.append({"title": "Software", "pairs": _pairs(rest)})
    return parts


def _pairs(value: Any) -> list[tuple[str, str]]:
    return list(_flat(value, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Nested objects as dotted keys; long lists and texts are cut."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
        return
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        text = f"{len(value)} entries"
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    elif isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: NONE}[value]
    elif isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)
    else:
        text = str(value)
    yield name or "value", text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
