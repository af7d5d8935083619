"""Lists of pairs: the ``.bin`` files of LFW, CFP-FP/FF, AgeDB-30, CALFW, CPLFW and XQLFW, and the groups of RFW.

A ``.bin`` is a pickle of ``(images, same)``: 2n encoded images, of which 2i and 2i+1 are pair i, and n booleans
(deepinsight/insightface, ``recognition/arcface_torch/eval/verification.py``). It is read as data (`faceless.
restricted_pickle`): nothing in it is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import metrics
from eval.benchmarks.protocol import Protocol, Report, counted, percent, point_figures, point_rows, read_ahead, unit
from faceless import restricted_pickle
from faceless.errors import InputError
from faceless.files import sha256
from faceless.images import decode_image
from faceless.recognizer import resize
from faceless.restricted_pickle import Call

#: Pairs that the files are published with.
PUBLISHED = {
    "lfw": 6_000,
    "cfp_fp": 7_000,
    "cfp_ff": 7_000,
    "agedb_30": 6_000,
    "calfw": 6_000,
    "cplfw": 6_000,
    "xqlfw": 6_000,
}
MAX_BYTES = 2 << 30
MAX_PAIRS = 1_000_000
FOLDS = 10
FARS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3}


def read_bin(path: str | Path) -> tuple[list[bytes | np.ndarray], np.ndarray]:
    """The 2n images, encoded or as ``[H, W, 3]`` uint8, and whether each of n pairs is genuine; of Python 2 or 3.

    Raises:
        InputError: damaged, of another kind, or holding code; one line that names the file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; lists of pairs have {MAX_BYTES >> 30} GiB at most")
    found = restricted_pickle.load(path, restricted_pickle.ARRAYS)
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[0], (tuple, list)):
        raise InputError(f"{path}: holds no images and booleans; give a .bin of pairs such as lfw.bin")
    encoded, truth = found
    same = _booleans(truth, path)
    if not 0 < len(same) <= MAX_PAIRS or len(encoded) != 2 * len(same):
        raise InputError(f"{path}: {len(encoded)} images and {len(same)} booleans; two images make a pair")
    return [_image(value, path) for value in encoded], same


def _booleans(value: Any, path: Path) -> np.ndarray:
    if isinstance(value, Call):
        value = restricted_pickle.array(value, str(path)).ravel().tolist()
    if not isinstance(value, (tuple, list)):
        raise InputError(f"{path}: holds a {type(value).__name__} in the place of its booleans")
    plain = [
        restricted_pickle.array(item, str(path)).item() if isinstance(item, Call) else item
        for item in value[: MAX_PAIRS + 1]
    ]
    if not all(isinstance(item, (bool, int)) and item in (0, 1) for item in plain):
        raise InputError(f"{path}: holds something else than booleans for its pairs")
    return np.array(plain, dtype=bool)


def _image(value: Any, path: Path) -> bytes | np.ndarray:
    match value:
        case bytes() | bytearray():
            return bytes(value)
        case str():  # of Python 2
            return _latin1(value, path)
        case Call():
            pixels = restricted_pickle.array(value, str(path))
            if pixels.dtype == np.uint8 and pixels.ndim == 1:
                return pixels.tobytes()
            if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
                return pixels
            raise InputError(f"{path}: an image is an array {list(pixels.shape)} of {pixels.dtype}")
    raise InputError(f"{path}: holds a {type(value).__name__} in the place of an image")


def _latin1(text: str, path: Path) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: holds text in the place of an image") from error


class Pairs(Protocol):
    """Verification of listed pairs, with accuracy over ten folds as people report it.

    Args:
        name: of the benchmark.
        images: ``[2n]`` encoded, or ``[H, W, 3]`` uint8.
        same: ``[n]`` bool.
        size: pixels of the square crops; others are resized.
        digest: SHA-256 of the file.
    """

    def __init__(self, name: str, images: Sequence[bytes | np.ndarray], same: np.ndarray, size: int, digest: str):
        self.name, self.images, self.same, self.size, self.digest = name, images, same, size, digest
        if len(same) < FOLDS or same.all() or not same.any():
            raise InputError(
                f"{name}: {len(same)} pairs, {int(same.sum())} genuine; ten folds need pairs of both kinds"
            )
        self.record: dict[str, Any] = {"sha256": digest, "framing": "arcface", "intervals_of": "independent pairs"}

    def __len__(self) -> int:
        return len(self.images)

    def faces(self) -> Iterator[Tensor]:
        return read_ahead(self._face, range(len(self.images)))

    def _face(self, number: int) -> Tensor:
        value = self.images[number]
        if isinstance(value, bytes):
            image = decode_image(value, f"{self.name}: image {number}")
        else:
            image = torch.from_numpy(value.copy()).permute(2, 0, 1)
        if image.shape[1] != image.shape[2]:
            raise InputError(
                f"{self.name}: image {number} has {image.shape[2]} x {image.shape[1]} pixels; lists of pairs hold crops"
            )
        return resize(image[None].float(), self.size, self.size)[0].round().clamp(0, 255).to(torch.uint8)

    def scores(self, embeddings: np.ndarray) -> PairScores:
        """Cosines and squared distances of the pairs."""
        rows = unit(embeddings)
        left, right = rows[0::2], rows[1::2]
        # The distance as InsightFace computes it, since pairs near a threshold of its grid fall on either side of it.
        distances = np.square(left - right).sum(1)
        return PairScores((left * right).sum(1).astype(np.float32), distances, self.same)

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        scores = self.scores(embeddings)
        figures = scores.figures()
        if (published := PUBLISHED.get(self.name, len(self.same))) != len(self.same):
            figures["cautions"].append(
                f"{self.name} was published with {published} pairs, this file has another number"
            )
        heading = counted(self.name, len(self), scores.genuine, scores.impostor)
        return Report(model, self.name, heading, scores.rows(), figures, scores.genuine, scores.impostor)


@dataclass(frozen=True)
class PairScores:
    """Cosines ``[n]`` float32 and squared distances ``[n]`` float64 of pairs, and which are genuine."""

    cosines: np.ndarray
    distances: np.ndarray
    same: np.ndarray

    @property
    def genuine(self) -> np.ndarray:
        return self.cosines[self.same]

    @property
    def impostor(self) -> np.ndarray:
        return self.cosines[~self.same]

    def points(self) -> dict[str, metrics.OperatingPoint]:
        fars = [far for far in FARS.values() if metrics.allowed_errors(far, len(self.impostor))]
        return dict(zip(FARS, metrics.tar_at_fars(self.genuine, self.impostor, fars)))

    def figures(self) -> dict[str, Any]:
        customary = metrics.insightface_accuracy(self.distances, self.same, FOLDS)
        exact = metrics.accuracy(self.cosines, self.same, FOLDS)
        found: dict[str, Any] = {
            "genuine": len(self.genuine),
            "impostor": len(self.impostor),
            "accuracy": {"mean": customary.mean, "std": customary.std, "folds": customary.folds.tolist()},
            "accuracy_any_threshold": {"mean": exact.mean, "std": exact.std, "folds": exact.folds.tolist()},
            "eer": metrics.eer(self.genuine, self.impostor),
            "auc": metrics.auc(self.genuine, self.impostor),
            **point_figures(self.points(), len(self.genuine), len(self.impostor)),
        }
        if self._both_kinds_in_every_fold():
            val = metrics.insightface_val(self.distances, self.same, 1e-3, FOLDS)
            found["val_at_far_1e-3"] = {"mean": val.mean, "std": val.std, "far": val.far}
        return found

    def rows(self) -> list[tuple[str, str, str]]:
        customary = metrics.insightface_accuracy(self.distances, self.same, FOLDS)
        exact = metrics.accuracy(self.cosines, self.same, FOLDS)
        return [
            ("accuracy", "10 folds, InsightFace's grid", f"{percent(customary.mean)} +- {percent(customary.std)}"),
            ("accuracy", "10 folds, any threshold", f"{percent(exact.mean)} +- {percent(exact.std)}"),
            ("EER", "FMR = FNMR", percent(metrics.eer(self.genuine, self.impostor))),
            *point_rows(self.points(), len(self.genuine)),
            ("AUC", "", percent(metrics.auc(self.genuine, self.impostor))),
        ]

    def _both_kinds_in_every_fold(self) -> bool:
        return all(0 < fold.sum() < len(fold) for fold in np.array_split(self.same, FOLDS))


class Groups(Protocol):
    """Lists of pairs of several groups of people, judged at one common threshold (RFW: Wang et al., ICCV 2019).

    Thresholds chosen for each group by itself hide exactly what such a benchmark is for. Common ones here: the lowest
    that keeps the FMR of all groups together, and that of the best accuracy over all pairs.
    """

    def __init__(self, name: str, groups: Sequence[Pairs]):
        self.name, self.groups = name, groups
        self.digest = hashlib.sha256("".join(f"{g.name} {g.digest}\n" for g in groups).encode()).hexdigest()
        self.record: dict[str, Any] = {
            "groups": {group.name: group.digest for group in groups},
            "framing": "arcface",
            "intervals_of": "independent pairs",
        }

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def faces(self) -> Iterator[Tensor]:
        for group in self.groups:
            yield from group.faces()

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        limits = np.cumsum([len(group) for group in self.groups])[:-1]
        parts = [group.scores(rows) for group, rows in zip(self.groups, np.split(embeddings, limits))]
        everyone = PairScores(
            *(np.concatenate([getattr(p, key) for p in parts]) for key in ("cosines", "distances", "same"))
        )
        accuracies = [metrics.insightface_accuracy(part.distances, part.same, FOLDS).mean for part in parts]
        points = everyone.points()
        at_common = {key: self._by_group(parts, point.threshold) for key, point in points.items()}
        mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
        figures = {
            "genuine": len(everyone.genuine),
            "impostor": len(everyone.impostor),
            "accuracy": {
                "groups": {group.name: value for group, value in zip(self.groups, accuracies)},
                "mean": mean,
                "std": std,
            },
            "eer": metrics.eer(everyone.genuine, everyone.impostor),
            "auc": metrics.auc(everyone.genuine, everyone.impostor),
            **point_figures(points, len(everyone.genuine), len(everyone.impostor)),
            "common_threshold": at_common,
        }
        rows = [
            *(
                (f"accuracy {group.name}", "10 folds, own thresholds", percent(v))
                for group, v in zip(self.groups, accuracies)
            ),
            ("accuracy", "mean +- std over groups", f"{percent(mean)} +- {percent(std)}"),
        ]
        for key, found in at_common.items():
            for rate in ("fmr", "fnmr"):
                rows += [
                    (
                        f"{rate.upper()} {group}",
                        f"common threshold, FMR={key}",
                        percent(entry[rate], entry[f"{rate}_interval"]),
                    )
                    for group, entry in found["groups"].items()
                ]
                ratio = found[f"{rate}_max_min_ratio"]
                rows.append(
                    (
                        f"{rate.upper()} max/min",
                        f"common threshold, FMR={key}",
                        "-" if ratio is None else f"{ratio:.2f}",
                    )
                )
        heading = f"{counted(self.name, len(self), everyone.genuine, everyone.impostor)} in {len(self.groups)} groups"
        return Report(model, self.name, heading, rows, figures, everyone.genuine, everyone.impostor)

    def _by_group(self, parts: Sequence[PairScores], threshold: float) -> dict[str, Any]:
        groups: dict[str, dict[str, Any]] = {}
        for group, part in zip(self.groups, parts):
            matches = int((part.impostor >= threshold).sum())
            misses = int((part.genuine < threshold).sum())
            groups[group.name] = {
                "fmr": matches / len(part.impostor),
                "fmr_interval": list(metrics.wilson(matches, len(part.impostor))),
                "fnmr": misses / len(part.genuine),
                "fnmr_interval": list(metrics.wilson(misses, len(part.genuine))),
                "accuracy": float(np.mean((part.cosines >= threshold) == part.same)),
            }
        found: dict[str, Any] = {"threshold": threshold, "groups": groups}
        for rate in ("fmr", "fnmr"):
            values = [entry[rate] for entry in groups.values()]
            found[f"{rate}_max_min_ratio"] = max(values) / min(values) if min(values) else None
        return found


def load(path: str | Path, size: int = 112) -> Pairs:
    """A ``.bin`` of pairs; named after its file."""
    images, same = read_bin(path)
    return Pairs(Path(path).stem, images, same, size, sha256(path))


def load_groups(folder: str | Path, size: int = 112) -> Groups:
    """A folder with one ``.bin`` for each group, as RFW has African, Asian, Caucasian and Indian.

    Raises:
        InputError: fewer than two of them.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.bin"))
    if len(files) < 2:
        raise InputError(f"{folder}: holds {len(files)} .bin files; groups need one for each of two or more")
    return Groups(folder.name, [load(file, size) for file in files])
