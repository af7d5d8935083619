"""How well a recognizer tells real people apart: every face against every other, or as a benchmark's protocol says.

python eval/verify.py --model dlib-resnet29 --benchmark att-faces --people 21-40 --json teacher.json
python eval/verify.py --model runs/quickstart/student dlib-resnet29 --benchmark my/people --align true --figures plots
python eval/verify.py --model runs/quickstart/student --benchmark faces_emore/lfw.bin --sweep true --json lfw.json
"""

from __future__ import annotations

import hashlib
import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser

import faceless
from eval import benchmarks, metrics
from eval.benchmarks import Benchmark, Protocol, Report
from eval.benchmarks.protocol import cached, percent
from faceless import settings
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_write, check_folder
from faceless.recognizer import Recognizer

#: False accept rates that are reported, as their keys in JSON read.
FARS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4}
#: Sizes that the framings were published with. Crops are not made smaller than that: recognizers resize on their own.
NATIVE_SIZE = {"dlib": 150, "arcface": 112}


@dataclass(frozen=True)
class Verification:
    """Scores of all pairs of a benchmark's faces, and the figures of them.

    Attributes:
        model: what the figures are reported under.
        benchmark: name of the benchmark.
        genuine, impostor: ``[G]`` and ``[I]`` float32 cosines, pairs i < j row by row.
        genuine_people, impostor_people: ``[G]`` and ``[I, 2]`` whose pairs they are.
        ranks: ``[N]`` rank of each face's best mate among all other faces; 0 for a person's only face.
        people, images: how many there are.
        points: TAR@FAR by the keys of ``FARS``.
        intervals: 95 % intervals by the figures' keys; empty without bootstrap.
        record: flip, framing, alignment, bootstrap settings.
    """

    model: str
    benchmark: str
    genuine: np.ndarray
    impostor: np.ndarray
    genuine_people: np.ndarray
    impostor_people: np.ndarray
    ranks: np.ndarray
    people: int
    images: int
    eer: float
    auc: float
    rank1: float
    points: dict[str, metrics.OperatingPoint]
    intervals: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Everything but the scores, ready for JSON; rates lie in 0..1."""
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "genuine": len(self.genuine),
            "impostor": len(self.impostor),
            "eer": self.eer,
            "tar_at_far": {key: point.tar for key, point in self.points.items()},
            "rank1": self.rank1,
            "intervals": self.intervals,
            "auc": self.auc,
            "people": self.people,
            "images": self.images,
            "thresholds": {key: point.threshold for key, point in self.points.items()},
            "realized_fmr": {key: point.fmr for key, point in self.points.items()},
            "allowed_false_matches": {key: point.allowed for key, point in self.points.items()},
            "cautions": self.cautions(),
            **self.record,
        }

    def cautions(self) -> list[str]:
        """Where so few errors were counted that a figure says little."""
        found = []
        for key, point in self.points.items():
            for kind, errors, trials in (
                ("FMR", point.false_matches, len(self.impostor)),
                ("FNMR", point.false_non_matches, len(self.genuine)),
            ):
                note = metrics.caution(errors, trials)
                if note:
                    found.append(f"{kind} at FAR={key}: {note}")
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """Scores, and whose they are, in compact types for an ``.npz``."""
        return {
            "genuine": self.genuine,
            "impostor": self.impostor,
            "genuine_people": self.genuine_people.astype(np.uint16),
            "impostor_people": self.impostor_people.astype(np.uint16),
        }


def benchmark_for(recognizer: Recognizer, source: str | Path, align: bool = False) -> Benchmark:
    """A benchmark cropped as the recognizer was trained to see faces; see `eval.benchmarks.load`."""
    return benchmarks.load(source, recognizer.spec.framing, crop_size(recognizer), align)


def crop_size(recognizer: Recognizer) -> int:
    """Pixels of the crops that a recognizer is given: those of its framing, or more where it sees more."""
    spec = recognizer.spec
    return max(NATIVE_SIZE[spec.framing], spec.height, spec.width)


def verify(
    recognizer: Recognizer,
    benchmark: Benchmark,
    flip: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    model: str | None = None,
    cache: bool = False,
    quality: bool = False,
    known: dict[bytes, np.ndarray] | None = None,
) -> Verification:
    """Compare every face with every other by the cosine of their embeddings.

    Where the benchmark has a gallery of its own, face i of the images is compared with face j > i of that.

    Args:
        flip: add the embedding of the mirrored face before normalizing.
        bootstrap: replicates of the intervals, which resample people; 0 for none.
        seed: of the bootstrap.
        model: name in the report; the recognizer's source or architecture when None.
        cache: keep embeddings in the cache folder, by SHA-256 of the model and of the crops.
        quality: take the norm of an embedding for the quality of its face, and report how FNMR@FMR=1e-2 falls as
            comparisons of low quality are rejected.
        known: what this recognizer said before, with this ``flip``, by the SHA-256 of the crop; more is added. Faces
            that several subsets or conditions share are then embedded once.

    Raises:
        InputError: embeddings are NaN, or the benchmark has no genuine or no impostor pair.
    """
    model = model or str(recognizer.source.get("source") or recognizer.name or type(recognizer.backbone).__name__)
    if not benchmark.genuine_pairs or not benchmark.impostor_pairs:
        raise InputError(f"{benchmark.name}: needs two people or more, and two faces of at least one of them")
    known = {} if known is None else known
    probes, norms = _embed(recognizer, benchmark, flip, model, cache, known)
    gallery, their_norms = probes, norms
    if benchmark.gallery is not None:
        bare = replace(benchmark, images=benchmark.gallery, gallery=None)
        gallery, their_norms = _embed(recognizer, bare, flip, model, cache, known)

    # In double precision and rounded once, so that a score depends neither on the BLAS nor on the number of threads.
    similarity = (probes @ gallery.T).astype(np.float32)
    identities = benchmark.identities.numpy().astype(np.int32)
    first, second = np.triu_indices(len(benchmark), 1)
    scores, couples = similarity[first, second], np.stack([identities[first], identities[second]], 1)
    same = couples[:, 0] == couples[:, 1]
    genuine, impostor = scores[same], scores[~same]
    ranks = metrics.mate_ranks(similarity, identities)
    hits, probes = ranks[ranks > 0] == 1, identities[ranks > 0]

    points = {key: metrics.tar_at_far(genuine, impostor, far) for key, far in FARS.items()}
    judged: dict[str, Any] = {}
    if quality:
        if norms.std() < 1e-4 * norms.mean():
            raise InputError(f"--quality true: {model} gives all faces one norm, which tells no quality")
        worse = np.minimum(norms[first], their_norms[second])[same]
        falling = metrics.error_versus_discard(genuine, worse, points["1e-2"].threshold)
        judged = {"fnmr_by_discarded": {str(share): rate for share, rate in falling.items()}}

    intervals: dict[str, Any] = {}
    if bootstrap:
        weights = metrics.resamples(len(benchmark.names), bootstrap, seed)
        again = metrics.bootstrap(genuine, impostor, couples[same, 0], couples[~same], weights, tuple(FARS.values()))
        intervals = {
            "eer": list(metrics.interval(again.eer)),
            "tar_at_far": {key: list(metrics.interval(again.tar[:, i])) for i, key in enumerate(FARS)},
            "rank1": list(metrics.interval(metrics.bootstrap_share(hits, probes, weights))),
            "auc": list(metrics.interval(again.auc)),
        }
    return Verification(
        model=model,
        benchmark=benchmark.name,
        genuine=genuine,
        impostor=impostor,
        genuine_people=couples[same, 0],
        impostor_people=couples[~same],
        ranks=ranks,
        people=len(benchmark.names),
        images=len(benchmark),
        eer=metrics.eer(genuine, impostor),
        auc=metrics.auc(genuine, impostor),
        rank1=float(hits.mean()),
        points=points,
        intervals=intervals,
        record={
            "flip": flip,
            "framing": benchmark.record.get("framing"),
            "alignment": benchmark.record.get("alignment"),
            "bootstrap": {"replicates": bootstrap, "seed": seed, "level": 0.95, "resamples": "people"},
        }
        | ({"condition": benchmark.record["condition"]} if "condition" in benchmark.record else {})
        | judged,
    )


def _embed(
    recognizer: Recognizer, benchmark: Benchmark, flip: bool, model: str, cache: bool, known: dict[bytes, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings ``[N, D]`` of the images in float64, and what their norms ``[N]`` were."""
    keys = [hashlib.sha256(image).digest() for image in benchmark.images.contiguous().numpy()]
    rows = [row for row, key in enumerate(keys) if key not in known]
    if rows:
        new = benchmark
        if len(rows) < len(keys):
            new = replace(benchmark, images=benchmark.images[rows], identities=benchmark.identities[rows], gallery=None)

        def embed() -> np.ndarray:
            return recognizer.embed(new.images, flip=flip, unit=False).numpy()

        found = cached(recognizer, new.digest, len(new), ["raw", flip], embed) if cache else embed()
        known.update(zip((keys[row] for row in rows), found))
    raw = np.stack([known[key] for key in keys])
    embeddings = F.normalize(torch.from_numpy(raw)).double().numpy()
    broken = int((~np.isfinite(embeddings).all(1)).sum())
    if broken:
        raise InputError(f"{model}: embeddings of {broken} of {len(benchmark)} faces are NaN or infinite")
    return embeddings, np.linalg.norm(raw.astype(np.float64), axis=1)


def table(results: Sequence[Verification | Report]) -> str:
    """The figures of several models on one benchmark as plain text, in percent with their 95 % intervals."""
    columns = [_rows(result) if isinstance(result, Verification) else result.rows for result in results]
    rows = [("percent [95 % interval]", "ISO/IEC 19795-1", *(result.model for result in results))]
    rows += [(*row[:2], *(column[i][2] for column in columns)) for i, row in enumerate(columns[0])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    first = results[0]
    head = (
        f"{first.benchmark}: {first.images} faces of {first.people} people, {len(first.genuine):,} genuine and "
        f"{len(first.impostor):,} impostor pairs"
        if isinstance(first, Verification)
        else first.heading
    )
    notes = ["* fewer than 30 errors on one of the two sides: the rate is not known to within 30 % (rule of 30)"]
    if not any("*" in cell for row in rows for cell in row):
        notes = []
    return "\n".join([head, "", lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])


def _rows(result: Verification) -> list[tuple[str, str, str]]:
    bounds, tars = result.intervals, result.intervals.get("tar_at_far", {})
    return [
        ("EER", "FMR = FNMR", percent(result.eer, bounds.get("eer"))),
        *((f"TAR@FAR={k}", f"1 - FNMR@FMR={k}", percent(p.tar, tars.get(k))) for k, p in result.points.items()),
        *((f"FNMR@FMR={key}", "realized FMR", _realized(point)) for key, point in result.points.items()),
        ("rank-1", "closed set", percent(result.rank1, bounds.get("rank1"))),
        ("AUC", "", percent(result.auc, bounds.get("auc"))),
        *(
            (f"FNMR, {100 * float(share):g} % rejected", "by quality, at FMR=1e-2", percent(rate))
            for share, rate in result.record.get("fnmr_by_discarded", {}).items()
        ),
    ]


def _realized(point: metrics.OperatingPoint) -> str:
    mark = "*" if min(point.false_matches, point.false_non_matches) < metrics.RULE_OF_30 else ""
    return f"{100 * point.fnmr:.2f} at {100 * point.fmr:.4f} (k = {point.allowed}){mark}"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        prog="eval/verify.py", description="Verify recognizers on real faces.", exit_on_error=False
    )
    options.add_argument(
        "--model", nargs="+", required=True, metavar="SOURCE", help="names, folders or files that faceless.load reads"
    )
    options.add_argument(
        "--benchmark",
        default="att-faces",
        help="att-faces, a folder with a sub-folder of images for each person, a .bin of pairs, or "
        + ", ".join(f"{kind}:PATH" for kind in benchmarks.PROTOCOLS),
    )
    options.add_argument(
        "--json", type=str | None, help="write the figures here: an object, or a list for several models"
    )
    options.add_argument("--people", type=str | None, help="FIRST-LAST, for example 21-40")
    options.add_argument(
        "--condition", type=str | None, help="masked, occluded, mixed or 28px: faces as bad as that; 28px/clean: probes"
    )
    options.add_argument(
        "--quality", type=bool, default=False, help="the norm of an embedding is the quality of its face: FNMR by it"
    )
    options.add_argument("--align", type=bool, default=False, help="cut faces out of the folder's photographs")
    options.add_argument(
        "--flip",
        type=bool | None,
        help="add the embedding of the mirrored face; by default where the benchmark's protocol does",
    )
    options.add_argument("--figures", type=str | None, help="write roc.svg, det.svg and scores.svg into this folder")
    options.add_argument(
        "--sweep", type=bool, default=False, help="accuracy, precision, recall and F1 over thresholds from 0.30 to 0.70"
    )
    options.add_argument("--cache", type=bool, default=True, help="keep embeddings in the cache folder")
    options.add_argument("--bootstrap", type=int, default=1000, help="replicates for the intervals, 0 for none")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = settings.options(parser(), arguments)
    if not 0 <= options.bootstrap <= 1_000_000:
        raise InputError(f"--bootstrap {options.bootstrap}: use 0 (no intervals) to 1000000 replicates")
    device = chosen_device(options.device, "--device")
    for folder in (options.figures, options.json and Path(options.json).parent):
        if folder:
            check_folder(folder)
    results: list[Verification | Report] = []
    for source in options.model:
        recognizer = faceless.load(source).to(device)
        spec = recognizer.spec
        benchmark = benchmarks.find(options.benchmark, spec.framing, crop_size(recognizer), options.align)
        if isinstance(benchmark, Protocol):
            for name in ("people", "condition", "quality"):
                if given := getattr(options, name):
                    raise InputError(f"--{name} {given}: {options.benchmark} is always judged as a whole, as it is")
            results.append(benchmarks.evaluate(recognizer, benchmark, options.flip, source, options.cache))
            continue
        if options.condition is not None:
            benchmark = benchmarks.under(benchmark, options.condition)
        if options.people:
            benchmark = benchmark.subset(benchmarks.parse_people(options.people, len(benchmark.names)))
        results.append(
            verify(
                recognizer,
                benchmark,
                bool(options.flip),
                options.bootstrap,
                options.seed,
                source,
                options.cache,
                options.quality,
            )
        )
    print(table(results))
    scores = {result.model: found for result in results if (found := result.arrays())}
    sweeps = {}
    if options.sweep:
        if not scores:
            raise InputError(f"--sweep true: {options.benchmark} has no list of pairs to be accepted or rejected")
        sweeps = {m: metrics.threshold_sweep(s["genuine"], s["impostor"]) for m, s in scores.items()}
    if options.json:
        summaries = [result.summary() | {"subset": options.people or "all"} for result in results]
        for summary in summaries:
            if summary["model"] in sweeps:
                summary["threshold_sweep"] = sweeps[summary["model"]].summary()
        atomic_write(
            options.json, json_format.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=2) + "\n"
        )
    if options.figures and scores:
        write_figures(Path(options.figures), scores, options.bootstrap, sweeps)


def write_figures(
    folder: Path,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    bootstrap: int,
    sweeps: Mapping[str, metrics.Sweep],
) -> None:
    """``roc.svg``, ``det.svg`` and ``scores.svg``, and four figures of threshold sweeps where there are any."""
    from eval import figures  # matplotlib takes a second to import

    named = {model: figures.Scores(**arrays) for model, arrays in scores.items()}
    shaded = figures.bands(named, bootstrap)
    atomic_write(folder / "roc.svg", figures.roc(named, shaded))
    atomic_write(folder / "det.svg", figures.det(named, shaded))
    atomic_write(folder / "scores.svg", figures.score_histograms(named))
    for figure in metrics.SWEPT if sweeps else ():
        atomic_write(folder / f"{figure}.svg", figures.sweep(sweeps, figure))


if __name__ == "__main__":
    main()
