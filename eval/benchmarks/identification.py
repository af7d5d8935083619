"""Search among distractors: MegaFace and TinyFace.

Kemelmacher-Shlizerman et al.: The MegaFace benchmark, CVPR 2016 (arXiv 1512.00596); Cheng, Zhu, Gong: Low-resolution
face recognition, ACCV 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval import metrics
from eval.benchmarks.folder import square
from eval.benchmarks.people import genuine_scores, rank_interval, tar_interval
from eval.benchmarks.protocol import Protocol, Report, files_digest, percent, read_ahead, unit
from faceless.errors import InputError
from faceless.images import natural, read_image

FARS = {"1e-6": 1e-6, "1e-5": 1e-5, "1e-4": 1e-4, "1e-3": 1e-3}
BLOCK = 1 << 24
MAX_LINES = 10_000_000


class Listed(Protocol):
    """Faces in files, aligned crops.

    Args:
        name: of the benchmark.
        files: all of them, in the order of the embeddings.
        size: pixels of the crops; others are resized.
        record: where they are from.
    """

    def __init__(self, name: str, files: list[Path], size: int, record: dict[str, Any]):
        self.name, self.files, self.size = name, files, size
        self.digest = files_digest(files)
        self.record = {"sha256": self.digest, "framing": "arcface", "intervals_of": "people", **record}

    def __len__(self) -> int:
        return len(self.files)

    def faces(self) -> Iterator[Tensor]:
        return read_ahead(lambda path: square(read_image(path), self.size, str(path)), self.files)


class MegaFace(Listed):
    """Each of two faces of a person searches the other among distractors (challenge 1).

    A folder as InsightFace distributes it: ``facescrub_lst``, ``megaface_lst`` with ``facescrub_images/`` and
    ``megaface_images/`` of aligned crops. Where ``facescrub_noises.txt`` and ``megaface_noises.txt`` are there, the
    faces they list are **left out** (the "R" of many tables). InsightFace's scripts instead put the mean of the person
    in the place of a wrong probe, which is then always found, so their figures are higher.

    Raises:
        InputError: a list or a file is missing, or names something outside of the folder.
    """

    def __init__(self, folder: str | Path, size: int):
        folder = Path(folder)
        probes, dropped_probes = _listed(folder, "facescrub", 1)
        distractors, dropped_distractors = _listed(folder, "megaface", 3)
        # In order of people, as all pairs of one person are looked for.
        probes.sort(key=lambda path: path.parent.name)
        self.people = np.unique([path.parent.name for path in probes], return_inverse=True)[1]
        self.probes = len(probes)
        if np.bincount(self.people).max() < 2:
            raise InputError(f"{folder}: nobody has two faces in facescrub_lst")
        noise = {"probes left out": dropped_probes, "distractors left out": dropped_distractors}
        super().__init__("megaface", probes + distractors, size, {"source": str(folder), "noise lists": noise})

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        rows = unit(embeddings)
        probes, distractors = rows[: self.probes], rows[self.probes :]
        # Nobody among the distractors is a probe's person: their best score decides whether a mate is found first.
        best = metrics.search(probes, np.zeros(self.probes), distractors, np.ones(len(distractors)), BLOCK).stranger
        found, searches = [], []
        for start, stop in pairwise(np.flatnonzero(np.diff(self.people, prepend=-1, append=-1)).tolist()):
            mates = (probes[start:stop] @ probes[start:stop].T).astype(np.float32)
            np.fill_diagonal(mates, -np.inf)
            found.append(int((mates > best[start:stop, None]).sum()))
            searches.append((stop - start) * (stop - start - 1))
        rank1, first = sum(found) / sum(searches), metrics.share_interval(found, searches)

        def impostors() -> Iterator[np.ndarray]:
            step = max(1, BLOCK // len(distractors))
            for start in range(0, self.probes, step):
                yield (probes[start : start + step] @ distractors.T).astype(np.float32).ravel()

        genuine = genuine_scores(probes, self.people)
        verified = metrics.streamed(genuine, impostors, list(FARS.values()))
        points = {key: point for key, point in zip(FARS, verified.points) if point.allowed}
        bounds = {key: tar_interval(genuine, self.people, point.threshold) for key, point in points.items()}
        cautions = [
            f"FMR at FAR={key}: {note}"
            for key, point in points.items()
            if (note := metrics.caution(point.false_matches, verified.impostor))
        ]
        figures = {
            "probes": self.probes,
            "distractors": len(distractors),
            "searches": sum(searches),
            "rank1": rank1,
            "intervals": {"rank1": first and list(first), "tar_at_far": bounds},
            "genuine": verified.genuine,
            "impostor": verified.impostor,
            "tar_at_far": {key: point.tar for key, point in points.items()},
            "thresholds": {key: point.threshold for key, point in points.items()},
            "realized_fmr": {key: point.fmr for key, point in points.items()},
            "allowed_false_matches": {key: point.allowed for key, point in points.items()},
            "cautions": cautions,
        }
        table = [
            ("rank-1", f"{len(distractors):,} distractors", percent(rank1, first)),
            *((f"TAR@FAR={k}", f"1 - FNMR@FMR={k}", percent(point.tar, bounds[k])) for k, point in points.items()),
        ]
        noisy = "noise lists applied" if any(self.record["noise lists"].values()) else "original lists"
        heading = (
            f"{self.name}: {self.probes:,} probes, {sum(searches):,} searches among {len(distractors):,} ({noisy})"
        )
        return Report(model, self.name, heading, table, figures)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the benchmark needs it") from error
    if len(lines) > MAX_LINES:
        raise InputError(f"{path}: {len(lines)} lines; at most {MAX_LINES} are read")
    return [line.strip() for line in lines if line.strip()]


def _listed(folder: Path, kind: str, parts: int) -> tuple[list[Path], int]:
    """The files of one of MegaFace's lists, without those of its noise list, and how many these were.

    Noise is listed by the last ``parts`` parts of a path.
    """
    listed = folder / f"{kind}_lst"
    names = _lines(listed)
    if not names or any(name.startswith(("/", "\\")) or ".." in name or "\0" in name for name in names):
        raise InputError(f"{listed}: is empty, or names a file outside of the benchmark's folder")
    noises = folder / f"{kind}_noises.txt"
    wrong = {line.split("\t")[-1] for line in _lines(noises) if not line.startswith("#")} if noises.is_file() else set()
    kept = [name for name in names if "/".join(name.split("/")[-parts:]) not in wrong]
    return [folder / f"{kind}_images" / name for name in kept], len(names) - len(kept)


class TinyFace(Listed):
    """Probes of very low resolution searched in a gallery of mates and distractors; rank-k.

    ``Testing_Set/`` with ``Probe``, ``Gallery_Match`` and ``Gallery_Distractor`` and the two ``.mat`` files of the
    protocol. The images must be square crops: align them first, and name the aligner with the figures.

    Raises:
        InputError: a file is missing, or SciPy is, which reads ``.mat`` files.
    """

    def __init__(self, folder: str | Path, size: int):
        folder = Path(folder)
        folder = folder / "Testing_Set" if (folder / "Testing_Set").is_dir() else folder
        probes, self.people = _matlab(folder / "probe_img_ID_pairs.mat", "probe", folder / "Probe")
        mates, known = _matlab(folder / "gallery_match_img_ID_pairs.mat", "gallery", folder / "Gallery_Match")
        others = sorted((p for p in (folder / "Gallery_Distractor").glob("*.*") if p.is_file()), key=natural)
        self.gallery = np.concatenate([known, np.full(len(others), -1)])
        super().__init__("tinyface", probes + mates + others, size, {"source": str(folder)})

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        rows = unit(embeddings)
        probes, gallery = rows[: len(self.people)], rows[len(self.people) :]
        found = metrics.search(probes, self.people, gallery, self.gallery, BLOCK)
        ranks = {f"rank{k}": found.rank_k(k) for k in (1, 5, 20)}
        bounds = {f"rank{k}": rank_interval(found, self.people, k) for k in (1, 5, 20)}
        figures = {"probes": len(probes), "gallery": len(gallery), **ranks, "intervals": bounds, "cautions": []}
        table = [(f"rank-{k}", "closed set", percent(ranks[f"rank{k}"], bounds[f"rank{k}"])) for k in (1, 5, 20)]
        heading = f"{self.name}: {len(probes):,} probes in a gallery of {len(gallery):,}"
        return Report(model, self.name, heading, table, figures)


def _matlab(path: Path, kind: str, images: Path) -> tuple[list[Path], np.ndarray]:
    """Files and identities ``[n]`` in ``{kind}_set`` and ``{kind}_ids`` of a ``.mat`` file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path}: reading .mat files needs SciPy; pip install scipy") from error
    if not path.is_file() or path.stat().st_size > 64 << 20:
        raise InputError(f"{path}: not there, or larger than 64 MiB; the benchmark needs this file of its protocol")
    try:
        found = loadmat(str(path), variable_names=[f"{kind}_set", f"{kind}_ids"], chars_as_strings=True)
        names = [str(np.asarray(cell).ravel()[0]) for cell in found[f"{kind}_set"].ravel()]
        people = found[f"{kind}_ids"].ravel().astype(np.int64)
    except Exception as error:  # SciPy's reader raises nearly anything for a damaged file
        raise InputError(f"{path}: not readable as the protocol's names and identities ({error})") from error
    if len(names) != len(people) or not names or any("/" in name or "\\" in name or "\0" in name for name in names):
        raise InputError(f"{path}: its {len(names)} names and {len(people)} identities do not belong together")
    return [images / name for name in names], people
