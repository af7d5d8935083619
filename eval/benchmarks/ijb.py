"""IJB-B and IJB-C from their official protocol files: templates of several photographs, 1:1 and 1:N.

Whitelam et al.: IARPA Janus Benchmark-B, CVPRW 2017; Maze et al.: IARPA Janus Benchmark-C, ICB 2018. Pooling as in
deepinsight/insightface, ``recognition/arcface_torch/eval_ijbc.py``: a template is the unit vector of the sum, over its
media, of the mean over a medium's faces of (faceness x embedding). Means are not normalized, so that the norms of
embeddings weigh as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv
from torch import Tensor

from eval import metrics
from eval.benchmarks.protocol import (
    Protocol,
    Report,
    counted,
    files_digest,
    percent,
    point_figures,
    point_rows,
    read_ahead,
    unit,
)
from faceless import align
from faceless.errors import InputError
from faceless.images import read_image

FARS = {"1e-6": 1e-6, "1e-5": 1e-5, "1e-4": 1e-4, "1e-3": 1e-3, "1e-2": 1e-2, "1e-1": 1e-1}
FPIRS = {"1e-2": 1e-2, "1e-1": 1e-1}
GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
#: What faces are weighed by: faceness, and the norms of embeddings. InsightFace's, AdaFace's, CVLface's, nothing.
POOLINGS = {"": (True, True), "-norms": (False, True), "-faceness": (True, False), "-plain": (False, False)}
#: Template, medium and subject numbers; what is looked up by them stays small.
MAX_NUMBER = 1 << 24
MAX_PAIRS = 1 << 28
#: Scores of all first templates with all second ones, of which pairs are then picked.
MAX_GRID = 1 << 28
#: Errors of float32 products of unit vectors lie far below; scores this near to a threshold are computed again.
NEAR = 1e-6
#: Faces that are pooled at a time.
POOLED = 1 << 14


def read_columns(
    path: Path, names: list[str], types: list[pa.DataType], separator: str = " ", skip: int = 0
) -> pa.Table:
    """A text file of columns.

    Raises:
        InputError: no such file, or lines that do not have these columns.
    """
    try:
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=names, skip_rows=skip),
            parse_options=csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=csv.ConvertOptions(column_types=dict(zip(names, types)), null_values=[]),
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read; the benchmark needs this file of its official protocol") from error
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: its lines are not `{separator.join(names)}` ({str(error)[:160]})") from error


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    values: np.ndarray = table[name].to_numpy()
    if not len(values) or values.min() < 0 or values.max() >= MAX_NUMBER:
        raise InputError(f"{path}: {name} numbers lie in 0..{MAX_NUMBER - 1}, and there is at least one")
    return values


def pool(
    faces: np.ndarray, templates: np.ndarray, media: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of templates: the sum over media of the mean over a medium's faces.

    Args:
        faces: ``[N, D]`` float32 embeddings.
        templates, media: ``[N]`` whole numbers below 2^24.
        weights: ``[N]`` what each face is multiplied with.

    Returns:
        The templates' numbers ``[T]``, ascending, and their vectors ``[T, D]`` float64.

    >>> pool(np.eye(2, dtype=np.float32), np.array([7, 7]), np.array([0, 1]), np.array([3.0, 4.0]))
    (array([7]), array([[0.6, 0.8]]))
    """
    _, medium, size = np.unique(
        templates.astype(np.int64) * MAX_NUMBER + media, return_inverse=True, return_counts=True
    )
    order = np.argsort(templates, kind="stable")
    numbers, first = np.unique(templates[order], return_index=True)
    share = (weights / size[medium])[order, None]
    sums = np.zeros((len(numbers), faces.shape[1]))
    last = np.append(first[1:], len(order))
    row = 0
    while row < len(numbers):
        # Whole templates, about POOLED faces of them.
        stop = max(row + 1, int(np.searchsorted(last, first[row] + POOLED, side="right")))
        chosen = slice(first[row], last[stop - 1])
        sums[row:stop] = np.add.reduceat(faces[order[chosen]] * share[chosen], first[row:stop] - first[row], axis=0)
        row = stop
    return numbers, unit(sums)


def pair_scores(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Float32 products ``[P]`` of rows ``left`` and ``right`` of unit ``vectors [T, D]``.

    Pairs of benchmarks are most of the combinations of few first with few second templates: all of these are one
    matrix product, of which the pairs are picked. Where that is not so, pairs are gathered.
    """
    rows = torch.from_numpy(vectors.astype(np.float32))
    (first, at_first), (second, at_second) = _present(left, len(vectors)), _present(right, len(vectors))
    if len(first) * len(second) <= min(MAX_GRID, 64 * len(left) + (1 << 16)):
        grid = (rows[first] @ rows[second].T).numpy().ravel()
        place = at_first[left]
        place *= len(second)
        place += at_second[right]
        return grid[place]
    found = np.empty(len(left), np.float32)
    for start in range(0, len(left), POOLED):
        part = slice(start, start + POOLED)
        found[part] = torch.linalg.vecdot(rows[left[part]], rows[right[part]]).numpy()
    return found


def _present(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` rows occur, and the place ``[count]`` of each among them."""
    occurs = np.zeros(count, bool)
    occurs[rows] = True
    return np.flatnonzero(occurs), np.cumsum(occurs) - 1


def operating_points(
    vectors: np.ndarray, left: np.ndarray, right: np.ndarray, same: np.ndarray, fars: dict[str, float]
) -> tuple[dict[str, metrics.OperatingPoint], np.ndarray]:
    """TAR at all FARs, and the scores ``[P]`` they come from.

    Scores are products in float32, except for those within 1e-6 of a threshold: they are computed again in float64 and
    rounded once. So the points are exactly those of all products in float64, rounded to float32.
    """
    scores = pair_scores(vectors, left, right)
    rates = list(fars.values())
    near = np.zeros(len(scores), bool)
    for point in metrics.tar_at_fars(scores[same], scores[~same], rates):
        near |= np.abs(scores - np.float32(point.threshold)) < np.float32(NEAR)
    again = np.flatnonzero(near)
    for start in range(0, len(again), POOLED):
        part = again[start : start + POOLED]
        scores[part] = np.einsum("nd,nd->n", vectors[left[part]], vectors[right[part]])
    return dict(zip(fars, metrics.tar_at_fars(scores[same], scores[~same], rates))), scores


@dataclass(frozen=True)
class SearchLists:
    """1:N: template and subject numbers ``[n]`` of each gallery, by its name, and of the probes."""

    galleries: dict[str, tuple[np.ndarray, np.ndarray]]
    probes: tuple[np.ndarray, np.ndarray]


class Templates(Protocol):
    """IJB-B or IJB-C in a folder ``meta/*.txt, *.csv`` and ``loose_crop/*.jpg``, as InsightFace distributes them.

    Args:
        folder: of the benchmark.
        kind: ``"ijbb"`` or ``"ijbc"``.
        framing, size: of the crops, cut by the 5 landmarks in the protocol.
        faceness: weigh faces by the detector's score.
        norms: let the norms of embeddings weigh; otherwise they are normalized before they are pooled.

    Raises:
        InputError: a file is missing, or is not what the protocol says.
    """

    def __init__(self, folder: Path, kind: str, framing: str, size: int, faceness: bool = True, norms: bool = True):
        pooling = next(name for name, weighed in POOLINGS.items() if weighed == (faceness, norms))
        self.name, self.framing, self.size, self.faceness, self.norms = kind + pooling, framing, size, faceness, norms
        meta = folder / "meta"
        whole, text, real = pa.int64(), pa.string(), pa.float64()

        path = meta / f"{kind}_name_5pts_score.txt"
        places = [f"{axis}{n}" for n in range(1, 6) for axis in "xy"]
        table = read_columns(path, ["name", *places, "faceness"], [text, *[real] * 11])
        names = table["name"].to_pylist()
        if any(not name or name.startswith(("/", "\\")) or ".." in name or "\0" in name for name in names):
            raise InputError(f"{path}: names a file outside of the benchmark's folder")
        self.files = [folder / "loose_crop" / name for name in names]
        self.points = np.stack([table[place].to_numpy() for place in places], 1).reshape(-1, 5, 2).astype(np.float32)
        self.weights = table["faceness"].to_numpy()
        if not np.isfinite(self.points).all() or not np.isfinite(self.weights).all():
            raise InputError(f"{path}: holds landmarks or scores that are not finite")

        path = meta / f"{kind}_face_tid_mid.txt"
        table = read_columns(path, ["name", "template", "media"], [text, whole, whole])
        if table["name"].to_pylist() != names:
            raise InputError(f"{path}: its {len(table)} faces are not the {len(names)} of {kind}_name_5pts_score.txt")
        self.templates, self.media = _numbers(table, "template", path), _numbers(table, "media", path)

        path = meta / f"{kind}_template_pair_label.txt"
        table = read_columns(path, ["first", "second", "label"], [whole] * 3)
        if len(table) > MAX_PAIRS:
            raise InputError(f"{path}: {len(table)} pairs; up to {MAX_PAIRS} are compared")
        row = np.full(MAX_NUMBER, -1, np.int32)
        numbers = np.unique(self.templates)
        row[numbers] = np.arange(len(numbers))
        self.left, self.right = (row[_numbers(table, side, path)] for side in ("first", "second"))
        labels = table["label"].to_numpy()
        if min(self.left.min(), self.right.min()) < 0 or not np.isin(np.unique(labels), (0, 1)).all():
            raise InputError(f"{path}: names templates without faces, or labels other than 0 and 1")
        self.same = labels.astype(bool)
        if self.same.all() or not self.same.any():
            raise InputError(f"{path}: needs genuine and impostor pairs")
        self.search = self._search_lists(meta, kind, row)
        self.subjects = self._subjects(len(numbers))

        self.digest = files_digest(self.files, sorted(p for p in meta.iterdir() if p.is_file()))
        self.record: dict[str, Any] = {
            "sha256": self.digest,
            "framing": framing,
            "pooling": {"media": "mean", "faceness": faceness, "norms": norms},
            "intervals_of": "independent pairs" if self.subjects is None else "people",
        }

    def _search_lists(self, meta: Path, kind: str, row: np.ndarray) -> SearchLists | None:
        """The 1:N protocol, where its files are there."""

        def subjects(path: Path) -> tuple[np.ndarray, np.ndarray]:
            header = path.read_text("utf-8", errors="replace").split("\n", 1)[0].count(",") + 1
            names = ["template", "subject", *(f"column {n}" for n in range(2, header))]
            table = read_columns(path, names, [pa.int64()] * 2 + [pa.string()] * (header - 2), ",", skip=1)
            template, first = np.unique(row[_numbers(table, "template", path)], return_index=True)
            if template.min() < 0:
                raise InputError(f"{path}: names templates without faces")
            return template, _numbers(table, "subject", path)[first]

        names = [f"gallery_{gallery}" for gallery in GALLERIES[kind]]
        paths = {name: meta / f"{kind}_1N_{name}.csv" for name in (*names, "probe_mixed")}
        if not all(path.is_file() for path in paths.values()):
            return None
        found = {name: subjects(path) for name, path in paths.items()}
        return SearchLists({name: found[name] for name in names}, found["probe_mixed"])

    def _subjects(self, templates: int) -> np.ndarray | None:
        """Whose each genuine pair is, ``[G]``, where the lists of 1:N say it of all their templates."""
        if self.search is None:
            return None
        known = np.full(templates, -1)
        for rows, subjects in (*self.search.galleries.values(), self.search.probes):
            known[rows] = subjects
        first, second = known[self.left[self.same]], known[self.right[self.same]]
        return first if first.min() >= 0 and np.array_equal(first, second) else None

    def _bounds(self, genuine: np.ndarray, points: dict[str, metrics.OperatingPoint]) -> dict[str, list[float]] | None:
        """Intervals of TAR from resampling people, with the thresholds as they are."""
        if self.subjects is None:
            return None
        person = np.unique(self.subjects, return_inverse=True)[1]
        trials = np.bincount(person)
        found = {
            key: metrics.share_interval(np.bincount(person, genuine >= point.threshold), trials)
            for key, point in points.items()
        }
        return {key: list(bounds) for key, bounds in found.items() if bounds is not None} or None

    def __len__(self) -> int:
        return len(self.files)

    def faces(self) -> Iterator[Tensor]:
        return read_ahead(self._face, range(len(self.files)))

    def _face(self, number: int) -> Tensor:
        points = torch.from_numpy(self.points[number : number + 1])
        return align.crop(read_image(self.files[number])[None], points, self.framing, self.size, scheme="arcface5")[0]

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        weights = self.weights if self.faceness else np.ones(len(self.weights))
        if not self.norms:
            weights = weights / np.maximum(np.linalg.norm(embeddings, axis=1), np.finfo(np.float32).tiny)
        _, vectors = pool(embeddings, self.templates, self.media, weights)
        points, scores = operating_points(vectors, self.left, self.right, self.same, FARS)
        genuine, impostor = scores[self.same], scores[~self.same]
        bounds = self._bounds(genuine, points)
        figures: dict[str, Any] = {
            "templates": len(vectors),
            "genuine": len(genuine),
            "impostor": len(impostor),
            "eer": metrics.eer(genuine, impostor),
            "auc": metrics.auc(genuine, impostor),
            **point_figures(points, len(genuine), len(impostor), bounds),
        }
        rows = point_rows(points, len(genuine), bounds)
        rows += [("EER", "FMR = FNMR", percent(figures["eer"])), ("AUC", "", percent(figures["auc"]))]
        if self.search is not None:
            figures["search"] = search_figures(vectors, self.search)
            mean = figures["search"]["mean"]
            rows += [(f"rank-{k}", "closed set, mean of galleries", percent(mean[f"rank{k}"])) for k in (1, 5, 10)]
            rows += [(f"TPIR@FPIR={k}", f"1 - FNIR@FPIR={k}", percent(1 - mean["fnir_at_fpir"][k])) for k in FPIRS]
        setting = f"norms {'kept' if self.norms else 'removed'}, faceness {'on' if self.faceness else 'off'}"
        heading = f"{counted(self.name, len(self), genuine, impostor)} of {len(vectors):,} templates ({setting})"
        return Report(model, self.name, heading, rows, figures, genuine, impostor)


def search_figures(vectors: np.ndarray, lists: SearchLists) -> dict[str, Any]:
    """1:N in each gallery alone, as NIST does: probes whose subject it lacks are the non-mated ones."""
    found: dict[str, Any] = {}
    templates, subjects = lists.probes
    for name, (gallery, people) in lists.galleries.items():
        result = metrics.search(vectors[templates], subjects, vectors[gallery], people)
        points = {key: result.fnir_at_fpir(fpir) for key, fpir in FPIRS.items()}
        found[name] = {
            "mated": int((result.ranks > 0).sum()),
            "non_mated": int((result.ranks == 0).sum()),
            **{f"rank{k}": result.rank_k(k) for k in (1, 5, 10)},
            "fnir_at_fpir": {key: point.fnmr for key, point in points.items()},
            "thresholds": {key: point.threshold for key, point in points.items()},
        }
    galleries = list(found.values())
    found["mean"] = {key: float(np.mean([g[key] for g in galleries])) for key in ("rank1", "rank5", "rank10")}
    found["mean"]["fnir_at_fpir"] = {
        key: float(np.mean([gallery["fnir_at_fpir"][key] for gallery in galleries])) for key in FPIRS
    }
    return found


def load(folder: str | Path, kind: str, pooling: str, framing: str, size: int) -> Templates:
    """IJB-B or IJB-C as `Templates`, with one of `POOLINGS`."""
    return Templates(Path(folder), kind, framing, size, *POOLINGS[pooling])
