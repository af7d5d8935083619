"""Every face against every other, of more people than fit into memory: large folders, and parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from eval import metrics
from eval.benchmarks.folder import listing, square
from eval.benchmarks.prepare import crops
from eval.benchmarks.protocol import Protocol, Report, files_digest, percent, read_ahead, unit
from faceless.errors import InputError
from faceless.images import decode_image, natural, read_image

FARS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5, "1e-6": 1e-6}
IMAGES, IDENTITIES = ("image", "img", "face"), ("identity", "person", "person_id", "subject", "label")
MAX_FACES = 10_000_000
MAX_GENUINE = 1 << 28
#: Scores in memory at a time.
BLOCK = 1 << 24
ROWS = 64


class People(Protocol):
    """Faces of known people; all pairs, streamed.

    Args:
        name: of the benchmark.
        read: the faces, ``[3, H, W]`` uint8, anew at each call.
        identities: ``[N]`` whole numbers.
        digest: SHA-256 of the faces.
        record: where they are from.
    """

    flip = False

    def __init__(
        self,
        name: str,
        read: Callable[[], Iterator[Tensor]],
        identities: np.ndarray,
        digest: str,
        record: dict[str, Any],
    ):
        self.name, self.read, self.identities, self.digest = name, read, identities, digest
        self.record = {"sha256": digest, "intervals_of": "people", **record}
        counts = np.unique(identities, return_counts=True)[1]
        self.people = len(counts)
        self.genuine_pairs = int((counts * (counts - 1) // 2).sum())
        if self.people < 2 or not self.genuine_pairs:
            raise InputError(f"{name}: needs two people or more, and two faces of at least one of them")
        if len(identities) > MAX_FACES or self.genuine_pairs > MAX_GENUINE:
            raise InputError(
                f"{name}: {len(identities)} faces with {self.genuine_pairs} genuine pairs; at most {MAX_FACES} with "
                f"{MAX_GENUINE} are compared"
            )

    def __len__(self) -> int:
        return len(self.identities)

    def faces(self) -> Iterator[Tensor]:
        return self.read()

    def judge(self, embeddings: np.ndarray, model: str) -> Report:
        rows = unit(embeddings)
        order = np.argsort(self.identities, kind="stable")
        rows, people = rows[order], self.identities[order]
        genuine = genuine_scores(rows, people)
        found = metrics.streamed(genuine, lambda: impostor_scores(rows, people), list(FARS.values()))
        points = {key: point for key, point in zip(FARS, found.points) if point.allowed}
        ranks = metrics.search(rows, people, rows, people, BLOCK, leave_one_out=True)
        bounds = {key: tar_interval(genuine, people, point.threshold) for key, point in points.items()}
        first = rank_interval(ranks, people, 1)
        cautions = []
        for key, point in points.items():
            for kind, errors, trials in (
                ("FMR", point.false_matches, found.impostor),
                ("FNMR", point.false_non_matches, found.genuine),
            ):
                if note := metrics.caution(errors, trials):
                    cautions.append(f"{kind} at FAR={key}: {note}")
        figures: dict[str, Any] = {
            "genuine": found.genuine,
            "impostor": found.impostor,
            "eer": found.eer,
            "tar_at_far": {key: point.tar for key, point in points.items()},
            "rank1": ranks.rank_k(1),
            "intervals": {"tar_at_far": bounds, "rank1": first},
            "auc": found.auc,
            "people": self.people,
            "images": len(self),
            "thresholds": {key: point.threshold for key, point in points.items()},
            "realized_fmr": {key: point.fmr for key, point in points.items()},
            "allowed_false_matches": {key: point.allowed for key, point in points.items()},
            "cautions": cautions,
        }
        table = [
            ("EER", "FMR = FNMR", percent(found.eer)),
            *((f"TAR@FAR={k}", f"1 - FNMR@FMR={k}", percent(point.tar, bounds[k])) for k, point in points.items()),
            ("rank-1", "closed set", percent(figures["rank1"], first)),
            ("AUC", "", percent(found.auc)),
        ]
        heading = (
            f"{self.name}: {len(self):,} faces of {self.people:,} people, {found.genuine:,} genuine and "
            f"{found.impostor:,} impostor pairs"
        )
        return Report(model, self.name, heading, table, figures)


def genuine_scores(rows: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Float32 cosines of all pairs of one person; ``rows [N, D]`` float64 and ``people [N]`` in order of people."""
    limits = np.flatnonzero(np.diff(people, prepend=people[0] - 1, append=people[-1] + 1))
    found = []
    for start, stop in pairwise(limits.tolist()):
        mine = rows[start:stop]
        found.append((mine @ mine.T)[np.triu_indices(stop - start, 1)].astype(np.float32))
    return np.concatenate(found)


def tar_interval(genuine: np.ndarray, people: np.ndarray, threshold: float) -> list[float] | None:
    """Of the share of `genuine_scores` that reach a threshold, which stays; people are resampled."""
    faces = np.unique(people, return_counts=True)[1]
    pairs = (faces * (faces - 1) // 2)[faces > 1]
    reached = np.add.reduceat((genuine >= threshold).astype(np.int64), np.cumsum(pairs) - pairs)
    found = metrics.share_interval(reached, pairs)
    return None if found is None else list(found)


def rank_interval(search: metrics.Search, people: np.ndarray, k: int) -> list[float] | None:
    """Of the share of probes found at rank ``k`` or better; people are resampled, the gallery stays."""
    mated = search.ranks > 0
    number = np.unique(people[mated], return_inverse=True)[1]
    found = metrics.share_interval(np.bincount(number, search.ranks[mated] <= k), np.bincount(number))
    return None if found is None else list(found)


def impostor_scores(rows: np.ndarray, people: np.ndarray, block: int = BLOCK) -> Iterator[np.ndarray]:
    """Float32 cosines of all pairs of two people, in blocks; arguments as of `genuine_scores`."""
    step = max(1, block // len(rows))
    ends = np.searchsorted(people, people, side="right")  # those of later people come after all of one's own
    for start in range(0, len(rows), step):
        stop = min(len(rows), start + step)
        first = int(ends[start])
        if first == len(rows):
            return
        scores = (rows[start:stop] @ rows[first:].T).astype(np.float32)
        yield scores[np.arange(first, len(rows)) >= ends[start:stop, None]]


def from_folder(folder: str | Path, framing: str, size: int, align: bool = False) -> People:
    """``folder/<person>/<image>``, as `eval.benchmarks.folder` reads fewer of them."""
    folder = Path(folder)
    paths, identities, _ = listing(folder)

    def face(path: Path) -> Tensor:
        if align:
            return crops([path], framing, size)[0][0]
        return square(read_image(path), size, str(path))

    record = {"source": str(folder), "framing": framing, "alignment": "found anew" if align else "as given"}
    return People(folder.name, lambda: read_ahead(face, paths), np.array(identities), files_digest(paths), record)


def parquet_files(source: str | Path) -> list[Path]:
    """The parquet files that a path names: itself, or those in the folder (or in its ``data`` folder)."""
    path = Path(source)
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    found = [*path.glob("*.parquet"), *path.glob("data/*.parquet")] if path.is_dir() else []
    return sorted((file for file in found if not file.name.startswith(".")), key=natural)


def from_parquet(source: str | Path, framing: str, size: int) -> People:
    """Files with a column of encoded images and one of identities, as Hugging Face ``datasets`` writes them.

    Images are aligned crops, in a column ``image``, ``img`` or ``face`` of bytes or ``{bytes, path}``; identities are
    whole numbers or text in ``identity``, ``person``, ``person_id``, ``subject`` or ``label``.

    Raises:
        InputError: not parquet, or without such columns.
    """
    files = parquet_files(source)
    parts = [_identities(file) for file in files]
    if len({str(part.type) for part in parts}) > 1:
        raise InputError(f"{source}: its files have identities of different types")
    labels = np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts])
    identities = np.unique(labels, return_inverse=True)[1]

    def faces() -> Iterator[Tensor]:
        for file in files:
            yield from _faces(file, size)

    record = {"source": str(source), "framing": framing, "alignment": "as given"}
    return People(Path(source).stem, faces, identities, files_digest(files), record)


def _column(schema: pa.Schema, names: Sequence[str], file: Path, what: str) -> str:
    found = [name for name in names if name in schema.names]
    if not found:
        raise InputError(f"{file}: has no column of {what}; name it {' or '.join(names)}")
    return found[0]


def _identities(file: Path) -> pa.Array:
    try:
        with pq.ParquetFile(file) as table:
            _column(table.schema_arrow, IMAGES, file, "images")
            name = _column(table.schema_arrow, IDENTITIES, file, "identities")
            if table.metadata.num_rows > MAX_FACES:
                raise InputError(f"{file}: {table.metadata.num_rows} faces; at most {MAX_FACES} are compared")
            column = table.read([name])[name].combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not readable as parquet ({str(error)[:160]})") from error
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise InputError(f"{file}: column {name} of {column.type}; identities are whole numbers or text, none missing")
    return column


def _faces(file: Path, size: int) -> Iterator[Tensor]:
    with pq.ParquetFile(file) as table:
        name = _column(table.schema_arrow, IMAGES, file, "images")
        row = 0
        try:
            for batch in table.iter_batches(ROWS, columns=[name]):
                for value in batch.column(0).to_pylist():
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(data, bytes):
                        raise InputError(f"{file}: row {row} of {name} holds no bytes of an image")
                    yield square(decode_image(data, f"{file}: row {row}"), size, f"{file}: row {row}")
                    row += 1
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: damaged behind row {row} ({str(error)[:160]})") from error
