"""Figures as SVG text that can stand in a file or inside of a page: the same data give the same bytes.

Colors are those of Okabe and Ito, which people with any color vision can tell apart; lines also differ in their dashes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from eval import metrics

INK, MUTED, GRID = "#22262b", "#5d6672", "#e3e6ea"
BLUE, ORANGE, GRAY, GREEN, PURPLE, YELLOW = "#0072b2", "#d55e00", "#8b939d", "#009e73", "#cc79a7", "#e69f00"
#: The three that every report shows keep their color in all figures.
NAMED = {"teacher": ORANGE, "student": BLUE, "untrained student": GRAY}
DASHES: dict[str, Any] = {"teacher": (0, (6, 2)), "untrained student": (0, (1.5, 1.5))}
OTHERS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, GRAY)
#: Lines of more models than there are colors repeat these in the next dashes.
MORE_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "os^Dv"
#: Pairs of unknown people that are still drawn anew for a band.
MAX_PAIRS = 1 << 15

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "faceless",
    "path.simplify": True,
    "text.parse_math": False,  # labels are names of files, which may hold dollar signs
}


@dataclass(frozen=True)
class Scores:
    """Scores of all pairs, and whose pairs they are where that is known: then curves get a band."""

    genuine: np.ndarray
    impostor: np.ndarray
    genuine_people: np.ndarray | None = None
    impostor_people: np.ndarray | None = None


def colors(labels: Iterable[str]) -> dict[str, str]:
    """One color for each label."""
    labels = list(labels)
    free = [color for color in OTHERS if color not in {NAMED.get(label) for label in labels}]
    rest = [label for label in labels if label not in NAMED]
    return {
        **{label: NAMED[label] for label in labels if label in NAMED},
        **{label: (free or OTHERS)[i % len(free or OTHERS)] for i, label in enumerate(rest)},
    }


def _repeated(labels: Iterable[str]) -> dict[str, int]:
    """How often all colors were given away before each label got its own."""
    rest = [label for label in dict.fromkeys(labels) if label not in NAMED]
    free = len(OTHERS) - len(set(NAMED) & set(labels))
    return {label: i // max(1, free) for i, label in enumerate(rest)}


def dashes(labels: Iterable[str]) -> dict[str, Any]:
    """The dashes of each label's line; with `colors` no two of up to 24 lines look the same."""
    labels = list(labels)
    more = {label: MORE_DASHES[n % len(MORE_DASHES)] for label, n in _repeated(labels).items()}
    return {label: more.get(label, DASHES.get(label, "-")) for label in labels}


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one ``<svg>`` element with ids of its own, so that several fit into one page."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def _rate(value: float, _: Any = None) -> str:
    """0.001 as 0.1 %, without digits that say nothing."""
    return f"{100 * value:.10f}".rstrip("0").rstrip(".") + " %"


def short(value: float) -> str:
    """Three digits that count, without exponents for what is large.

    >>> short(5607488 / 1e6), short(270.85), short(22.43), short(0.0046), short(12345.0)
    ('5.61', '271', '22.4', '0.0046', '12,345')
    """
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.995 else f"{value:.3g}"


def _log_rates(axis: Any, low: float, high: float = 1.0) -> None:
    """Decades labeled in percent."""
    decades = [d for d in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0) if low * 0.999 <= d <= high * 1.001]
    axis.set_major_locator(FixedLocator(decades))
    axis.set_major_formatter(FuncFormatter(_rate))
    axis.set_minor_formatter(NullFormatter())


def _steps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners that a line with ``steps-post`` needs; points in which it does not rise add nothing."""
    corner = np.ones(len(y), dtype=bool)
    corner[1:-1] = y[1:-1] != y[:-2]
    return x[corner], y[corner]


@dataclass(frozen=True)
class Band:
    """95 % interval ``low``, ``high`` ``[K]`` of the TAR at the false match rates ``fmr [K]``, and where it is from."""

    fmr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    origin: str


def bands(named: Mapping[str, Scores], replicates: int = 1000) -> dict[str, Band]:
    """Bands from resampling people, or pairs where nobody knows whose they are; Wilson's of very many pairs.

    Args:
        replicates: no bands of 0.
    """
    found = {}
    for label, scores in named.items():
        rates = np.geomspace(1 / len(scores.impostor), 1, 97)
        if not replicates:
            continue
        if scores.genuine_people is not None and scores.impostor_people is not None:
            people = int(max(scores.genuine_people.max(), scores.impostor_people.max())) + 1
            again = metrics.bootstrap(
                scores.genuine,
                scores.impostor,
                scores.genuine_people,
                scores.impostor_people,
                metrics.resamples(people, replicates),
                tuple(rates.tolist()),
            )
            origin = "from resampling people"
        elif len(scores.genuine) + len(scores.impostor) <= MAX_PAIRS:
            again = metrics.bootstrap_pairs(scores.genuine, scores.impostor, replicates, fars=tuple(rates.tolist()))
            origin = "from resampling pairs"
        else:
            # Of so many impostors the threshold of a rate is as good as known.
            count = len(scores.genuine)
            points = metrics.tar_at_fars(scores.genuine, scores.impostor, rates.tolist())
            low, high = np.transpose([metrics.wilson(count - point.false_non_matches, count) for point in points])
            found[label] = Band(rates, low, high, "of independent genuine pairs")
            continue
        low, high = np.nanquantile(again.tar, [0.025, 0.975], axis=0)
        found[label] = Band(rates, low, high, origin)
    return found


def roc(
    named: Mapping[str, Scores],
    shaded: Mapping[str, Band] | None = None,
    lowest: float = 1e-4,
    name: str = "roc",
) -> str:
    """ROC with a logarithmic false match rate: exact step curves, perhaps with their `bands`."""
    with _styled():
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        palette, dashed = colors(named), dashes(named)
        for label, scores in named.items():
            band = (shaded or {}).get(label)
            if band is not None:
                axes.fill_between(band.fmr, band.low, band.high, color=palette[label], alpha=0.16, linewidth=0)
            points = metrics.curve(scores.genuine, scores.impostor)
            x, y = _steps(points.fmr, points.tar)
            axes.step(x, y, where="post", color=palette[label], linestyle=dashed[label], label=label)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        # From the next lower tenth: a page on which all curves lie at the top shows nothing.
        bottom = max(0.0, np.floor(10 * min(_tar(s, lowest) for s in named.values()) - 1e-9) / 10 - 0.1)
        axes.set_ylim(bottom, 1 + 0.01 * (1 - bottom))
        _log_rates(axes.xaxis, lowest)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel("False match rate (FAR)")
        axes.set_ylabel("True accept rate (1 − FNMR)")
        axes.legend(loc="lower right")
        described = "; ".join(f"{k}: {_rate(round(_tar(v, 1e-3), 4))} at FAR 0.1 %" for k, v in named.items())
        return _svg(figure, name, f"ROC curves of {', '.join(named)}. True accept rates: {described}.")


def _tar(scores: Scores, far: float) -> float:
    return metrics.tar_at_far(scores.genuine, scores.impostor, far).tar


def det(named: Mapping[str, Scores], shaded: Mapping[str, Band] | None = None, name: str = "det") -> str:
    """DET, both error rates logarithmic; step curves that end where one error in all comparisons would be."""
    with _styled():
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        palette, dashed = colors(named), dashes(named)
        low_x = 10 ** np.floor(np.log10(min(1 / len(s.impostor) for s in named.values())))
        low_y = 10 ** np.floor(np.log10(min(1 / len(s.genuine) for s in named.values())))
        axes.plot([1e-9, 1], [1e-9, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), label="EER line")
        for label, scores in named.items():
            first = 1 / len(scores.impostor)
            band = (shaded or {}).get(label)
            if band is not None:
                axes.fill_between(band.fmr, 1 - band.high, 1 - band.low, color=palette[label], alpha=0.16, linewidth=0)
            points = metrics.curve(scores.genuine, scores.impostor)
            x, y = _steps(points.fmr, points.fnmr)
            # Nothing accepted wrongly, or nothing rejected wrongly, is no place on a logarithmic axis.
            x = np.where(x == 0, first / 2, x)
            shown = y > 0
            axes.step(x[shown], y[shown], where="post", color=palette[label], linestyle=dashed[label], label=label)
            rate = metrics.eer(scores.genuine, scores.impostor)
            if rate > 0:
                axes.plot([rate], [rate], "o", color=palette[label], markersize=5, markeredgecolor="white")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low_x, 1)
        axes.set_ylim(low_y, 1)
        _log_rates(axes.xaxis, low_x)
        _log_rates(axes.yaxis, low_y)
        axes.set_xlabel("False match rate (FMR)")
        axes.set_ylabel("False non-match rate (FNMR)")
        axes.legend(loc="lower left", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)
        described = "; ".join(f"{k} {_rate(round(metrics.eer(v.genuine, v.impostor), 4))}" for k, v in named.items())
        return _svg(figure, name, f"DET curves of {', '.join(named)}. Equal error rates: {described}.")


def score_histograms(named: Mapping[str, Scores], name: str = "scores") -> str:
    """Genuine and impostor scores of each model, one panel each, with the threshold of FAR = 0.1 %."""
    with _styled():
        figure = Figure(figsize=(max(4.6, 3.4 * len(named)), 2.9), layout="constrained")
        for number, (label, scores) in enumerate(named.items()):
            axes = figure.add_subplot(1, len(named), number + 1)
            both = np.concatenate([scores.genuine, scores.impostor])
            edges = np.linspace(both.min(), both.max() + 1e-6, 61)
            for values, kind, color in ((scores.impostor, "impostor", ORANGE), (scores.genuine, "genuine", BLUE)):
                shares = np.histogram(values, edges)[0] / len(values)
                axes.stairs(shares, edges, fill=True, color=color, alpha=0.30, linewidth=0)
                axes.stairs(shares, edges, color=color, linewidth=1.3, label=f"{kind} ({len(values):,})")
            threshold = metrics.tar_at_far(scores.genuine, scores.impostor, 1e-3).threshold
            axes.axvline(
                threshold, color=INK, linewidth=1, linestyle=(0, (3, 2)), label=f"FAR 0.1 % at {threshold:.3f}"
            )
            axes.set_title(label)
            axes.set_xlabel("cosine")
            axes.set_ylim(bottom=0)
            axes.set_ylim(top=axes.get_ylim()[1] * 1.32)  # room for the legend
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %", decimals=0))
            axes.grid(visible=False, axis="x")
            if number == 0:
                axes.set_ylabel("share of pairs")
            axes.legend(loc="upper left", fontsize=7.5, handlelength=1.4)
        return _svg(figure, name, f"Histograms of genuine and impostor cosines of {', '.join(named)}.")


def sweep(named: Mapping[str, metrics.Sweep], figure: str) -> str:
    """One figure of `metrics.SWEPT` against the threshold; a precision of no accepted pair leaves a gap."""
    with _styled():
        drawing = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = drawing.add_subplot()
        palette, dashed = colors(named), dashes(named)
        title = {"f1": "F1"}.get(figure, figure)
        for label, swept in named.items():
            values = getattr(swept, figure)
            style = dashed[label]
            axes.plot(swept.thresholds, values, color=palette[label], linestyle=style, marker="o", ms=3.5, label=label)
        axes.set_xlabel("threshold of the cosine")
        axes.set_ylabel(title)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.legend(loc="lower left")
        bests = {label: swept.summary()[figure]["best"] for label, swept in named.items()}
        described = "; ".join(f"{k} {'undefined' if v is None else _rate(round(v, 4))}" for k, v in bests.items())
        return _svg(drawing, f"sweep-{figure}", f"{title} over thresholds of {', '.join(named)}. Best: {described}.")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centered window that shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def losses(steps: Sequence[int], loss: Sequence[float], terms: Mapping[str, Sequence[float]]) -> str:
    """The loss of each recorded step, faint, and its running mean; below it the terms that it is made of."""
    with _styled():
        panels = {"loss": loss, **terms} if len(terms) > 1 else {"loss": loss}
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        palette = [INK, BLUE, ORANGE, GREEN, PURPLE, YELLOW]
        window = max(1, len(steps) // 50)
        positive = True
        for number, (label, values) in enumerate(panels.items()):
            color, series = palette[number % len(palette)], np.asarray(values, dtype=float)
            positive = positive and bool((series[np.isfinite(series)] > 0).all())
            if len(series) > 100:
                axes.plot(steps, series, color=color, alpha=0.18, linewidth=0.7)
            axes.plot(steps, _smooth(series, window), color=color, label=label, linewidth=1.9 if number == 0 else 1.3)
        if positive:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(ncols=2 if len(panels) > 3 else 1)
        return _svg(figure, "loss", f"Loss over {len(steps)} recorded steps, from {loss[0]:.4g} to {loss[-1]:.4g}.")


def validation(steps: Sequence[int], series: Mapping[str, Sequence[float]]) -> str:
    """Agreement of student and teacher on held-out generated faces."""
    with _styled():
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for color, (label, values) in zip((BLUE, GREEN, PURPLE, ORANGE, YELLOW), series.items()):
            axes.plot(steps, values, color=color, marker="o" if len(steps) <= 40 else "", markersize=3.5, label=label)
            axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (5, 0), textcoords="offset points", va="center")
        axes.set_xlabel("step")
        axes.set_ylabel("agreement with the teacher")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.09)
        axes.legend(loc="lower right")
        ends = "; ".join(f"{label} {values[-1]:.3f}" for label, values in series.items())
        return _svg(figure, "validation", f"Validation on held-out generated faces; at the end {ends}.")


def accuracy_and_cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars: what each model gets right, and what it costs.

    Args:
        rows: summaries with ``label``, ``tar_at_far``, perhaps ``intervals`` and ``efficiency``.
    """
    with _styled():
        labels = [str(row["label"]) for row in rows]
        palette = colors(labels)
        costs = [row.get("efficiency") or {} for row in rows]
        panels: list[tuple[str, list[float]]] = [
            ("TAR at FAR 0.1 %", [100 * row["tar_at_far"]["1e-3"] for row in rows])
        ]
        if all("macs" in cost for cost in costs):
            panels.append(("million MACs a face", [cost["macs"] / 1e6 for cost in costs]))
        if all("megabytes" in cost for cost in costs):
            panels.append(("MB in float32", [cost["megabytes"]["fp32"] for cost in costs]))
        if all("batch1" in cost.get("latency_ms", {}) for cost in costs):
            times = [cost["latency_ms"]["batch1"]["median"] for cost in costs]
            panels.append(("ms for one face", times))
        bounds = {str(row["label"]): row.get("intervals", {}).get("tar_at_far", {}).get("1e-3") for row in rows}
        figure = Figure(figsize=(11.2, 0.85 + 0.38 * len(rows)), layout="constrained")
        for number, (title, values) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            _bars(axes, title, dict(zip(labels, values)), {} if number else bounds, palette, percent=number == 0)
            axes.set_yticks(axes.get_yticks(), labels if number == 0 else [""] * len(labels))
        facts = "; ".join(
            f"{label}: " + ", ".join(f"{title} {short(values[i])}" for title, values in panels)
            for i, label in enumerate(labels)
        )
        return _svg(figure, "cost", f"Accuracy and cost. {facts}.")


def _bars(
    axes: Any,
    title: str,
    values: Mapping[str, float],
    bounds: Mapping[str, Sequence[float] | None],
    palette: Mapping[str, str],
    percent: bool,
) -> None:
    """One horizontal bar for each label, from the top; values in percent may have intervals ``bounds`` of rates."""
    places = np.arange(len(values))[::-1]
    axes.barh(places, list(values.values()), height=0.62, color=[palette[label] for label in values])
    for place, (label, value) in zip(places, values.items()):
        end, bound = value, bounds.get(label)
        if bound:
            low, high = 100 * bound[0], 100 * bound[1]
            reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar([value], [place], xerr=reach, color=INK, linewidth=1, capsize=2.5)
            end = max(value, high)
        text = f"{value:.1f} %" if percent else short(value)
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center")
    axes.set_title(title)
    axes.set_yticks(places, list(values))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlim(0, 1.28 * max([*values.values(), 1e-9]))
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


@dataclass(frozen=True)
class Accuracy:
    """What one model gets right: a rate, and its 95 % interval where there is one."""

    value: float
    interval: Sequence[float] | None = None


def benchmark_bars(panels: Mapping[str, Mapping[str, Accuracy]], palette: Mapping[str, str]) -> str:
    """One panel of bars for each benchmark; a model that was not measured there is left out of it.

    Args:
        panels: by the panel's title, the accuracy by the model's label.
        palette: of all labels.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    with _styled():
        figure = Figure(figsize=(11.2, rows * (0.6 + 0.34 * most)), layout="constrained")
        for number, (title, found) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, number + 1)
            values = {label: 100 * accuracy.value for label, accuracy in found.items()}
            _bars(axes, title, values, {label: a.interval for label, a in found.items()}, palette, percent=True)
            if number % columns and list(found) == list(next(iter(panels.values()))):
                axes.set_yticks(axes.get_yticks(), [""] * len(found))
        facts = "; ".join(
            f"{title}: " + ", ".join(f"{label} {_rate(round(a.value, 4))}" for label, a in found.items())
            for title, found in panels.items()
        )
        return _svg(figure, "benchmarks", f"Accuracy on each benchmark. {facts}.")


def pareto(
    accuracies: Mapping[str, Accuracy], costs: Mapping[str, Mapping[str, float]], title: str, name: str = "pareto"
) -> str:
    """Accuracy against each cost, on logarithmic axes of cost, with the front of models that no other beats.

    Args:
        accuracies: by label.
        costs: by the axis' title, the cost by label.
        title: of the accuracy.
    """
    with _styled():
        palette, repeated = colors(accuracies), _repeated(accuracies)
        figure = Figure(figsize=(11.2, 3.6 + 0.16 * len(accuracies)), layout="constrained")
        values = np.array([100 * a.value for a in accuracies.values()])
        ends = [100 * end for a in accuracies.values() for end in (a.interval or [a.value])]
        low, high = min([*values, *ends]), max([*values, *ends])
        margin = max(0.08 * (high - low), 0.05)
        first = None
        fronts = []
        for number, (axis_title, cost) in enumerate(costs.items()):
            axes = figure.add_subplot(1, len(costs), number + 1, sharey=first)
            spent = np.array([cost[label] for label in accuracies])
            best = metrics.pareto(spent, values)
            order = np.argsort(spent[best], kind="stable")
            x, y = spent[best][order], values[best][order]
            axes.set_xscale("log")
            left, right = min(spent) / 1.6, max(spent) * 1.6
            axes.set_xlim(left, right)
            axes.plot([*x, right], [*y, y[-1]], color=MUTED, linewidth=1, drawstyle="steps-post", alpha=0.7, zorder=1)
            for place, (label, accuracy) in enumerate(accuracies.items()):
                if accuracy.interval:
                    bounds = [[100 * accuracy.interval[0]], [100 * accuracy.interval[1]]]
                    reach = [np.maximum(0, values[place] - bounds[0]), np.maximum(0, bounds[1] - values[place])]
                    axes.errorbar(spent[place], values[place], reach, color=palette[label], linewidth=1, capsize=2.5)
                marker, color = MARKERS[repeated.get(label, 0) % len(MARKERS)], palette[label]
                face = color if best[place] else "white"
                axes.plot([spent[place]], [values[place]], marker, ms=7, mfc=face, mec=color, mew=1.6)
                axes.plot([], [], marker, ms=7, mfc=color, mec=color, label=label)  # the legend's is always filled
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(PercentFormatter(100, symbol=" %"))
            axes.set_ylim(low - margin, high + margin)
            axes.set_xlabel(axis_title)
            if first is None:
                axes.set_ylabel(title)
                handles = axes.get_legend_handles_labels()
                first = axes
            else:
                axes.tick_params(axis="y", labelleft=False)
            front = [label for label, chosen in zip(accuracies, best) if chosen]
            fronts.append(f"{axis_title}: {', '.join(front)}")
        figure.legend(*handles, loc="outside lower center", ncols=min(4, len(accuracies)), frameon=False)
        return _svg(figure, name, f"{title} against cost. No other model beats, by {'; by '.join(fronts)}.")
