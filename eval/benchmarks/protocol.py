"""What every benchmark with a protocol of its own is: faces in an order, and a judgement of their embeddings."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eval import metrics
from faceless import assets
from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.recognizer import Recognizer

T = TypeVar("T")
BATCH = 128
#: Images that are read and decoded ahead of the network.
READERS = 4


@dataclass(frozen=True)
class Report:
    """The figures of one model on one protocol.

    Attributes:
        model, benchmark: names.
        heading: the line above the table; the same for every model.
        rows: of the table: figure, its definition in few words, and the value as text.
        figures: all of them, ready for JSON; rates lie in 0..1.
        genuine, impostor: ``[G]`` and ``[I]`` scores for the curves, where the protocol has pairs.
    """

    model: str
    benchmark: str
    heading: str
    rows: list[tuple[str, str, str]]
    figures: dict[str, Any]
    genuine: np.ndarray | None = None
    impostor: np.ndarray | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Everything but the scores, ready for JSON."""
        return {"benchmark": self.benchmark, "model": self.model, **self.figures, **self.record}

    def arrays(self) -> dict[str, np.ndarray]:
        """``genuine`` and ``impostor`` scores, where the protocol has pairs."""
        if self.genuine is None or self.impostor is None:
            return {}
        return {"genuine": self.genuine, "impostor": self.impostor}


class Protocol(ABC):
    """Faces, and what is to be done with their embeddings.

    Attributes:
        name: what figures are reported under.
        digest: SHA-256 of what the benchmark consists of; embeddings are cached under it.
        flip: whether it is customary to add the embedding of the mirrored face.
        record: source, framing and whatever else a reader must know.
    """

    name: str
    digest: str
    flip: bool = True
    record: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """How many faces there are."""

    @abstractmethod
    def faces(self) -> Iterator[Tensor]:
        """All faces in order, ``[3, H, W]`` uint8 RGB crops of one size."""

    @abstractmethod
    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        """The figures of float32 ``embeddings [N, D]``, not normalized (IJB weighs faces by their norm)."""


def evaluate(
    recognizer: Recognizer, protocol: Protocol, flip: bool | None = None, model: str | None = None, cache: bool = True
) -> Report:
    """Embed the faces of a protocol and judge them.

    Args:
        flip: add the embedding of the mirrored face; None does as is customary for the protocol.
        model: name in the report; the recognizer's source or architecture when None.
        cache: keep embeddings in the cache folder, by SHA-256 of the model and of the benchmark.

    Raises:
        InputError: embeddings are NaN, or the protocol's files cannot be used.
    """
    model = model or str(recognizer.source.get("source") or recognizer.name or type(recognizer.backbone).__name__)
    flip = protocol.flip if flip is None else flip
    embeddings = embed(recognizer, protocol, flip, cache)
    broken = int((~np.isfinite(embeddings).all(1)).sum())
    if broken:
        raise InputError(f"{model}: embeddings of {broken} of {len(embeddings)} faces are NaN or infinite")
    report = protocol.judge(embeddings, model)
    report.record.update({"flip": flip, **protocol.record})
    if (framing := protocol.record.get("framing")) not in (None, recognizer.spec.framing):
        note = f"these faces are {framing} crops, and the model was trained on {recognizer.spec.framing} crops"
        report.figures.setdefault("cautions", []).append(note)
    return report


def embed(recognizer: Recognizer, protocol: Protocol, flip: bool, cache: bool = True) -> np.ndarray:
    """Float32 embeddings ``[N, D]``, not normalized, with ``flip`` the sum of both; from the cache if it has them."""
    if not cache:
        return _embedded(recognizer, protocol, flip)
    return cached(recognizer, protocol.digest, len(protocol), [flip], lambda: _embedded(recognizer, protocol, flip))


def cached(
    recognizer: Recognizer, digest: str, faces: int, how: Sequence[Any], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Float32 ``[faces, D]`` that ``make`` computes, kept in the cache folder.

    A recognizer that was not loaded from a file has no SHA-256, and is not cached.

    Args:
        digest: SHA-256 of the faces.
        how: whatever else the embeddings depend on.
    """
    weights = recognizer.source.get("sha256")
    if not weights:
        return make()
    key = json.dumps([weights, recognizer.spec.asdict(), digest, *how], sort_keys=True)
    name = f"{weights[:12]}-{digest[:12]}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    path = assets.cache_folder() / "embeddings" / name
    stored = _stored(path, (faces, recognizer.embedding_dim))
    if stored is not None:
        return stored
    found = make()
    with atomic_path(path) as temporary:
        np.save(temporary, found)
    return found


def _stored(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _embedded(recognizer: Recognizer, protocol: Protocol, flip: bool) -> np.ndarray:
    device, training = recognizer.scale.device, recognizer.training
    found = np.empty((len(protocol), recognizer.embedding_dim), np.float32)
    faces = protocol.faces()
    recognizer.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(protocol), BATCH):
                images = torch.stack(list(islice(faces, min(BATCH, len(protocol) - start)))).to(device)
                rows = recognizer(images).embedding.float()
                if flip:
                    rows = rows + recognizer(images.flip(-1)).embedding.float()
                found[start : start + len(rows)] = rows.cpu().numpy()
    finally:
        recognizer.train(training)
    return found


def read_ahead(read: Callable[[T], Tensor], sources: Sequence[T]) -> Iterator[Tensor]:
    """``map(read, sources)`` with some threads that read ahead, but not too far."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting = [pool.submit(read, source) for source in sources[: 2 * BATCH]]
        for number in range(len(sources)):
            yield waiting.pop(0).result()
            if number + 2 * BATCH < len(sources):
                waiting.append(pool.submit(read, sources[number + 2 * BATCH]))


def unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; a row of zeros stays."""
    rows = embeddings.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norms == 0, 1, norms)
    return rows


def files_digest(files: Sequence[Path], contents: Sequence[Path] = ()) -> str:
    """SHA-256 of the names, sizes and modification times of ``files``, and of the bytes of ``contents``.

    Raises:
        InputError: one of them is not there.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); the benchmark is incomplete") from error
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    for file in contents:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def percent(value: float, bounds: Sequence[float] | None = None) -> str:
    """A rate in percent, with its interval.

    >>> percent(0.9871, (0.98, 0.99))
    '98.71 [98.00, 99.00]'
    """
    text = f"{100 * value:.2f}"
    return text if bounds is None else f"{text} [{100 * bounds[0]:.2f}, {100 * bounds[1]:.2f}]"


def counted(name: str, faces: int, genuine: np.ndarray, impostor: np.ndarray) -> str:
    """The line above a table."""
    return f"{name}: {faces:,} faces, {len(genuine):,} genuine and {len(impostor):,} impostor pairs"


def tar_bounds(points: dict[str, metrics.OperatingPoint], genuine: int) -> dict[str, Sequence[float]]:
    """Wilson's intervals of TAR, for independent comparisons."""
    return {key: list(metrics.wilson(genuine - p.false_non_matches, genuine)) for key, p in points.items()}


def point_figures(
    points: dict[str, metrics.OperatingPoint],
    genuine: int,
    impostor: int,
    bounds: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Operating points as `eval.verify` writes them to JSON; intervals are `tar_bounds` if not given."""
    cautions = []
    for key, point in points.items():
        for kind, errors, trials in (
            ("FMR", point.false_matches, impostor),
            ("FNMR", point.false_non_matches, genuine),
        ):
            if note := metrics.caution(errors, trials):
                cautions.append(f"{kind} at FAR={key}: {note}")
    return {
        "tar_at_far": {key: point.tar for key, point in points.items()},
        "intervals": {"tar_at_far": dict(bounds or tar_bounds(points, genuine))},
        "thresholds": {key: point.threshold for key, point in points.items()},
        "realized_fmr": {key: point.fmr for key, point in points.items()},
        "allowed_false_matches": {key: point.allowed for key, point in points.items()},
        "cautions": cautions,
    }


def point_rows(
    points: dict[str, metrics.OperatingPoint], genuine: int, bounds: Mapping[str, Sequence[float]] | None = None
) -> list[tuple[str, str, str]]:
    """The rows of a table that show operating points; intervals as of `point_figures`."""
    bounds = bounds or tar_bounds(points, genuine)
    return [(f"TAR@FAR={key}", f"1 - FNMR@FMR={key}", percent(point.tar, bounds[key])) for key, point in points.items()]
