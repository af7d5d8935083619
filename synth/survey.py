"""What a teacher sees in a corpus: ``python synth/survey.py --corpus corpora/dcgan --teacher dlib-resnet29``.

Writes ``survey.json`` and ``SURVEY.md`` into the corpus. Faces that the teacher cannot tell apart teach a student
little, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_write
from faceless.randomness import permutation
from faceless.recognizer import same_framing
from faceless.settings import parse
from faceless.weights import load
from synth.corpus import Corpus

BINS = 20_000


@dataclass
class Survey:
    """Which corpus, and who looks at it.

    Args:
        corpus: its folder.
        teacher: source of a recognizer (see `faceless.load`); null takes the embeddings that the corpus holds.
        faces: looked at, drawn at random; all pairs of them are compared.
        threshold: cosine from which the teacher calls two faces one person, as ``eval/verify.py`` finds it for a false
            match rate; null leaves that line out.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of the choice of faces.
    """

    corpus: str
    teacher: str | None = None
    faces: int = 5000
    threshold: float | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.faces < 2:
            raise InputError(f"faces is {self.faces}; it must be at least 2")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; it is a cosine, from -1 to 1")
        self.device = str(chosen_device(self.device))


def survey(wanted: Survey) -> dict[str, Any]:
    """Look at a sample of the corpus; returns what is written to ``survey.json``."""
    corpus = Corpus(wanted.corpus)
    rows = permutation(wanted.seed, "survey", len(corpus))[: wanted.faces].sort().values
    if wanted.teacher is not None:
        network = load(wanted.teacher).to(wanted.device).eval()
        same_framing(corpus.manifest.get("framing"), network.spec.framing, str(corpus.folder), wanted.teacher)
        with torch.inference_mode():
            raw = torch.cat([network(corpus.images(part).to(wanted.device)).embedding.cpu() for part in rows.split(64)])
        who = {"teacher": wanted.teacher, "teacher_sha256": network.source["sha256"]}
    elif "embedding" in corpus.columns:
        raw = torch.from_numpy(corpus.column("embedding"))[rows]
        settings = corpus.manifest.get("settings", {})
        who = {key: settings.get(key) for key in ("teacher", "teacher_sha256")}
    else:
        raise InputError(f"{corpus.folder}: holds no embeddings; name a teacher")
    return who | {"corpus_rows": len(corpus), "seed": wanted.seed} | spread(raw.float(), wanted.threshold)


def spread(raw: Tensor, threshold: float | None = None) -> dict[str, Any]:
    """How embeddings ``[n, D]`` of any norm are spread.

    Returns:
        ``norm`` and ``cosine``: quantiles, the latter of all pairs of different rows, to 1e-4; ``variance``: mean
        squared distance of the directions from their mean, 1 for a sphere filled evenly; ``effective_rank``: the
        exponential of the entropy of the eigenvalues of their covariance (Roy and Vetterli, EUSIPCO 2007), at most D;
        ``one_person``: share of pairs at or above the threshold, and ``unique``: share of faces in no such pair.

    >>> spread(torch.eye(4))["effective_rank"]
    3.0
    """
    norms, unit = raw.norm(dim=1), F.normalize(raw, dim=1)
    centered = (unit - unit.mean(0)).double()
    eigenvalues = torch.linalg.eigvalsh(centered.T @ centered / len(unit)).clamp_min(0)
    parts = eigenvalues / eigenvalues.sum().clamp_min(1e-30)
    rank = torch.exp(-torch.special.xlogy(parts, parts).sum())
    histogram, matched = torch.zeros(BINS, dtype=torch.int64), torch.zeros(len(unit), dtype=torch.int64)
    for begin in range(0, len(unit), 1024):
        cosines = unit[begin : begin + 1024] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + begin] = -2  # a face is no pair with itself
        bins = ((cosines.flatten() + 1) * (BINS / 2)).floor().clamp(-1, BINS - 1).long()
        histogram += torch.bincount(bins[bins >= 0], minlength=BINS)
        if threshold is not None:
            matched[begin : begin + 1024] = (cosines >= threshold).sum(1)
    pairs = len(unit) * (len(unit) - 1)
    below = histogram.cumsum(0).double() / pairs
    cosine = {
        name: round((int(torch.searchsorted(below, q)) + 0.5) * 2 / BINS - 1, 4)
        for name, q in (("p1", 0.01), ("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
    }
    centers = (torch.arange(BINS).double() + 0.5) * 2 / BINS - 1
    found: dict[str, Any] = {
        "faces": len(unit),
        "dimensions": raw.shape[1],
        "norm": {name: round(float(norms.quantile(q)), 4) for name, q in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))},
        "cosine": {"mean": round(float((histogram * centers).sum() / pairs), 4)} | cosine,
        "variance": round(float(centered.square().sum(1).mean()), 4),
        "effective_rank": round(float(rank), 2),
    }
    if threshold is not None:
        found |= {
            "threshold": threshold,
            "one_person": float(matched.sum() / pairs),
            "unique": round(float((matched == 0).double().mean()), 4),
        }
    return found


def page(found: dict[str, Any]) -> str:
    """The same for people, as Markdown."""
    norm, cosine = found["norm"], found["cosine"]
    lines = [
        ("faces looked at", f"{found['faces']:,} of {found['corpus_rows']:,}"),
        ("norm of embeddings, 5 / 50 / 95 %", f"{norm['p5']} / {norm['p50']} / {norm['p95']}"),
        ("cosine of two faces, mean", cosine["mean"]),
        ("1 / 50 / 99 / 99.9 % and largest", " / ".join(str(cosine[k]) for k in ("p1", "p50", "p99", "p99.9", "max"))),
        ("variance of directions (0 to 1)", found["variance"]),
        ("effective rank", f"{found['effective_rank']} of {found['dimensions']}"),
    ]
    if "threshold" in found:
        lines += [
            (f"pairs that the teacher calls one person (cosine {found['threshold']:g})", f"{found['one_person']:.3e}"),
            ("faces like no other", f"{found['unique']:.1%}"),
        ]
    table = "\n".join(f"| {what} | {value} |" for what, value in lines)
    return f"# What the teacher sees\n\nTeacher: {found['teacher']}.\n\n| | |\n|---|---|\n{table}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    wanted = parse(Survey, arguments, program="synth/survey.py", description=(__doc__ or "").split("\n\n")[0]).build()
    found = survey(wanted)
    atomic_write(Path(wanted.corpus) / "survey.json", json.dumps(found, indent=1) + "\n")
    atomic_write(Path(wanted.corpus) / "SURVEY.md", page(found))
    print(page(found), end="")


if __name__ == "__main__":
    command(main)()
