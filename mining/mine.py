"""Find the faces of a corpus on which a student disagrees with its teacher.

``python mining/mine.py --corpus corpora/quickstart --student runs/quickstart/student --output mined/quickstart``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import faceless
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write, check_folder
from faceless.settings import Settings, parse
from mining import figures
from mining.disagreement import (
    Neighborhoods,
    Pairs,
    Threshold,
    disagreeing_pairs,
    impostor_threshold,
    neighborhoods,
    pointwise,
)
from mining.embedding_index import CHUNK
from mining.faces import Faces, Floats, check_framing, embeddings, unit


@dataclass
class Mining:
    """What to mine.

    Args:
        corpus: folder of parquet shards.
        student: a trained recognizer, anything `faceless.load` takes.
        teacher: its teacher.
        output: folder for ``mined.parquet``, ``pairs.parquet``, ``summary.json`` and figures.
        keep: the hardest faces that are written.
        rank_by: ``pointwise`` (1 - cosine; both networks of one D), ``overlap`` (1 - shared neighbors) or ``rbo``
            (1 - rank-biased overlap).
        neighbors: k of the neighborhoods.
        gate: faces of the lowest such share by detector score or by length of the teacher's embedding are not mined:
            what two networks disagree on most is mostly broken images.
        center: take each network's mean over the corpus from its embeddings before they are compared.
        fars: false accept rates of the thresholds at which decisions about pairs are compared.
        labels: whether the teacher is right about a pair only where the corpus's column ``identity`` agrees with it;
            else the teacher is right by definition.
        cache: folder for embeddings.
        device: of the networks; ``auto`` takes a GPU when there is one. FAISS built for one uses it by itself.
        seed: of the impostor pairs.
    """

    corpus: str
    student: str
    teacher: str = "dlib-resnet29"
    output: str = "mined/hard"
    keep: int = 2000
    rank_by: Literal["pointwise", "overlap", "rbo"] = "pointwise"
    neighbors: int = 20
    gate: float = 0.02
    center: bool = True
    fars: list[float] = field(default_factory=lambda: [1e-3])
    labels: bool = False
    cache: str = "mined/cache"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.neighbors < 1:
            raise InputError("keep and neighbors must be at least 1")
        if not 0 <= self.gate < 0.5:
            raise InputError(f"gate is {self.gate}; it must be from 0 to below 0.5")
        if not self.fars or not all(0 < far < 1 for far in self.fars):
            raise InputError("fars needs rates between 0 and 1")


def mine(settings: Mining, progress: bool = True) -> dict[str, Any]:
    """Score the corpus and write the results; returns the summary."""
    faces, output = Faces(settings.corpus), Path(settings.output)
    check_folder(output)
    if len(faces) < 2:
        raise InputError(f"{settings.corpus}: 1 face; neighborhoods need at least 2")
    sources = {"t": settings.teacher, "s": settings.student}
    networks = {name: faceless.load(source) for name, source in sources.items()}
    for name, net in networks.items():
        check_framing(faces, net, sources[name])
    teacher_dim, student_dim = (networks[name].embedding_dim for name in "ts")
    if settings.rank_by == "pointwise" and student_dim != teacher_dim:
        raise InputError(
            f"rank_by pointwise compares embeddings of one D; the student has {student_dim}, the teacher "
            f"{teacher_dim}: use overlap or rbo"
        )
    labels = faces.identities() if settings.labels else None
    if settings.labels and labels is None:
        raise InputError(f"{settings.corpus}: has no column identity; set labels to false")
    T = embeddings(networks["t"], faces, settings.cache, settings.device, progress)
    passed = gated(faces, T, settings.gate)
    T = unit(T, center=settings.center)
    S = unit(embeddings(networks["s"], faces, settings.cache, settings.device, progress), center=settings.center)
    near = neighborhoods(S, T, settings.neighbors)
    scores = {"overlap": 1 - near.overlap, "rbo": 1 - near.rbo}
    if S.shape == T.shape:
        student, teacher = (torch.from_numpy(rows).split(CHUNK) for rows in (S, T))
        scores["pointwise"] = torch.cat([pointwise(s, t) for s, t in zip(student, teacher)]).numpy()
    rows = np.flatnonzero(passed)
    # Overlap has few values; among faces of one, rank-biased overlap tells who is harder.
    rows = rows[np.lexsort((-scores["rbo"][rows], -scores[settings.rank_by][rows]))][: settings.keep]
    decisions = {far: decide(S, T, far, near, labels, settings.seed) for far in settings.fars}

    judges = {
        f"{role}{suffix}": value
        for role, key, source in (("teacher", "t", settings.teacher), ("student", "s", settings.student))
        for suffix, value in (("", source), ("_sha256", networks[key].source["sha256"]))
    }
    write_rows(output / "mined.parquet", faces, rows, scores, settings.rank_by, judges)
    write_pairs(output / "pairs.parquet", {far: pairs for far, (pairs, _) in decisions.items()})
    summary = summarize(settings, faces, scores, passed, decisions)
    summary |= {"fingerprint": faces.fingerprint} | judges
    draw(output, faces, rows, scores, settings.rank_by, near, T, S)
    atomic_write(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def decide(
    S: Floats, T: Floats, far: float, near: Neighborhoods, labels: np.ndarray | None, seed: int
) -> tuple[Pairs, dict[str, Threshold]]:
    """The pairs that student and teacher decide differently at one false accept rate, and both thresholds."""
    found = {name: impostor_threshold(x, far, labels=labels, seed=seed) for name, x in (("student", S), ("teacher", T))}
    return disagreeing_pairs(S, T, found["student"], found["teacher"], near, labels=labels), found


def gated(faces: Faces, raw: Floats, share: float) -> np.ndarray:
    """``[N]`` whether neither the detector's score nor the embedding's length is among the lowest ``share``."""
    passed = np.ones(len(faces), bool)
    measures = [np.linalg.norm(raw, axis=1)] + ([faces.column("score")] if "score" in faces.columns else [])
    for values in measures:
        if values.ndim > 1:
            raise InputError(f"{faces.folder}: column score holds lists, and is to be one number for each face")
        passed &= values >= np.quantile(values, share)
    return passed


def write_rows(
    path: Path, faces: Faces, rows: np.ndarray, scores: dict[str, Floats], by: str, judges: dict[str, str]
) -> None:
    """``mined.parquet``: row, score (what it is ranked by), every score, and the latent where the corpus has it.

    Args:
        judges: teacher and student, and the SHA-256 of both: what is drawn near these faces is drawn for that student,
            and `synth/generate.py` records it.
    """
    columns: dict[str, pa.Array] = {
        "row": pa.array(rows, pa.int64()),
        "score": pa.array(scores[by][rows], pa.float32()),
    }
    columns |= {name: pa.array(values[rows], pa.float32()) for name, values in scores.items()}
    if "latent" in faces.columns:
        latents = faces.column("latent", rows).astype(np.float32)
        if latents.ndim != 2:
            raise InputError(f"{faces.folder}: column latent holds single numbers, and is to hold a list for each face")
        columns["latent"] = pa.FixedSizeListArray.from_arrays(pa.array(latents.reshape(-1)), latents.shape[1])
    notes = {"judges": json.dumps(judges)}
    if "generator" in faces.manifest:
        notes["generator"] = json.dumps(faces.manifest["generator"], sort_keys=True)
    table = pa.table(columns).replace_schema_metadata(notes)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file)


def write_pairs(path: Path, found: dict[float, Pairs], most: int = 100_000) -> None:
    """``pairs.parquet``: the worst decisions about pairs at each false accept rate."""
    names = ("first", "second", "teacher", "student", "missed", "severity")
    tables = []
    for far, pairs in found.items():
        columns = {name: getattr(pairs, name)[:most] for name in names}
        tables.append(pa.table({"far": np.full(len(columns["first"]), far)} | columns))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pq.write_table(pa.concat_tables(tables), file)


def summarize(
    settings: Mining,
    faces: Faces,
    scores: dict[str, Floats],
    passed: np.ndarray,
    decisions: dict[float, tuple[Pairs, dict[str, Threshold]]],
) -> dict[str, Any]:
    quantiles = {
        name: {f"{q:g}": float(np.quantile(values, q)) for q in (0.05, 0.5, 0.95, 0.99)}
        for name, values in scores.items()
    }
    return {
        "settings": asdict(settings),
        "faces": len(faces),
        "gated": int((~passed).sum()),
        "mean": {name: float(values.mean()) for name, values in scores.items()},
        "quantiles": quantiles,
        "pairs": {
            f"{far:g}": {
                "missed": int(pairs.missed.sum()),
                "confused": int((~pairs.missed).sum()),
                "faces_cut_at_k": pairs.cut,
                "thresholds": {name: asdict(threshold) for name, threshold in thresholds.items()},
            }
            for far, (pairs, thresholds) in decisions.items()
        },
    }


def draw(
    output: Path,
    faces: Faces,
    rows: np.ndarray,
    scores: dict[str, Floats],
    by: str,
    near: Neighborhoods,
    T: Floats,
    S: Floats,
    shown: int = 32,
) -> None:
    """Histogram of disagreement, and the hardest faces beside the nearest one in each space."""
    atomic_write(output / "disagreement.svg", figures.histograms(scores, "disagreement"))
    rows = rows[:shown]
    teacher, student = near.teacher[rows, 0], near.student[rows, 0]
    captions = [
        (f"{scores[by][row]:.2f}", f"cos {T[row] @ T[t]:.2f}", f"cos {S[row] @ S[s]:.2f}")
        for row, t, s in zip(rows, teacher, student)
    ]
    columns = {
        name: faces.images(which.tolist())
        for name, which in (("face", rows), ("teacher's", teacher), ("student's", student))
    }
    atomic_write(output / "hardest.png", figures.sheet(columns, captions))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Mining] = parse(Mining, arguments, program="mining/mine.py", description=__doc__ or "")
    made = settings.build()
    summary = mine(made)
    means = ", ".join(f"{name} {value:.3f}" for name, value in summary["mean"].items())
    print(f"{made.output}: mean disagreement {means}")
    for far, found in summary["pairs"].items():
        least = "at least " if found["faces_cut_at_k"] else ""
        print(f"pairs at FAR {far}: missed {least}{found['missed']:,}, confused {least}{found['confused']:,}")
        if least:
            faces = f"{found['faces_cut_at_k']:,} faces"
            print(f"  all {made.neighbors} neighbors of {faces} are above a threshold; raise --neighbors to see more")
        if (pairs := min(threshold["pairs"] for threshold in found["thresholds"].values())) < 30 / float(far):
            print(f"  the thresholds are a guess: {pairs:,} pairs of strangers, and {30 / float(far):,.0f} are wanted")


if __name__ == "__main__":
    command(main)()
