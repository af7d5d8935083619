"""Nearest neighbors among any number of embeddings, over FAISS; nothing here is quadratic in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.randomness import permutation

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

FLAT_UP_TO = 100_000  # rows; beyond that, all-to-all search by brute force takes longer than building lists
CHUNK = 16_384  # rows handled at a time; fixed, because the last bits of a score depend on it
TOGETHER = 1 << 17  # rows that are looked up together, list by list,
LOOKUPS = 1 << 24  # unless each of them looks into so many lists that this is more
PRODUCTS = 1 << 24  # cosines that are in memory at a time then
TUNED = 1024  # rows whose neighbors an approximate index is tuned on
GPU_MOST = 2048  # neighbors, and lists looked into, of a search on a GPU
MIN_PER_LIST = 39  # FAISS's own least number of training rows for each list


class EmbeddingIndex:
    """Embeddings numbered in the order in which they were added, and searches among them.

    The same rows and settings give the same index and the same answers: coarse clusters start from a fixed seed, HNSW
    graphs are built on one thread, and equal scores are ordered by row number.

    Args:
        dim: D of the embeddings.
        metric: ``cosine`` (rows are normalized here; larger is nearer) or ``l2`` (Euclidean distance; smaller is
            nearer).
        kind: ``flat`` is exact; ``ivf`` looks into the most promising of many lists (needs `train`); ``hnsw`` walks a
            graph, which is slow to build and the quickest to ask; ``auto`` is flat up to 100,000 rows, then ivf.
        size: rows that are expected, for ``auto`` and for the number of lists: 2 sqrt(size), half of what FAISS
            advises, because here mostly the rows themselves are looked up. Finding lists then costs as much as reading
            them, and twice as many take four times as long to find.
        links: neighbors of a node in an HNSW graph.
        gpu: search on the first CUDA device if FAISS was built for one (``faiss-gpu-cu12``) and it is there; flat and
            ivf only. Range searches stay on the CPU.

    Raises:
        InputError: an unknown metric or kind.

    >>> index = EmbeddingIndex(2, metric="l2", kind="flat")
    >>> index.add(np.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]]))
    >>> distances, rows = index.search(np.array([[0.0, 0.0]]), 2)
    >>> distances.tolist(), rows.tolist()
    ([[0.0, 1.0]], [[0, 2]])
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        kind: str = "auto",
        size: int = 0,
        links: int = 32,
        gpu: bool = True,
    ):
        if metric not in ("cosine", "l2"):
            raise InputError(f"metric is {metric!r}; use cosine or l2")
        if kind == "auto":
            kind = "flat" if size <= FLAT_UP_TO else "ivf"
        if kind == "ivf" and size < 1:
            raise InputError("an ivf index needs size, the rows that are expected: its number of lists follows from it")
        self.gpu = gpu
        measure = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        if kind == "flat":
            self.index: Any = faiss.IndexFlat(dim, measure)
        elif kind == "ivf":
            lists = max(1, min(round(2 * size**0.5), size // MIN_PER_LIST))
            self._quantizer = faiss.IndexFlat(dim, measure)  # the lists' index does not keep it alive
            self.index = faiss.IndexIVFFlat(self._quantizer, dim, lists, measure)
        elif kind == "hnsw":
            self.index = faiss.IndexHNSWFlat(dim, links, measure)
            self.index.hnsw.efConstruction = 200
        else:
            raise InputError(f"kind is {kind!r}; use auto, flat, ivf or hnsw")
        self._on_gpu: Any = None

    @classmethod
    def of(
        cls,
        rows: Floats,
        *,
        metric: str = "cosine",
        kind: str = "auto",
        recall: float = 0.99,
        k: int = 10,
        seed: int = 0,
        gpu: bool = True,
    ) -> EmbeddingIndex:
        """The index of ``rows [N, D]`` (a memory-mapped array will do), trained, filled and tuned.

        Args:
            recall: of the ``k`` nearest that an approximate index is tuned to, on 1024 of the rows; see `tune`.
            seed: of the rows that it is trained and tuned on.
        """
        kind = "flat" if len(rows) < 2 else kind  # nothing to find lists or links among
        index = cls(rows.shape[1], metric=metric, kind=kind, size=len(rows), gpu=gpu)
        order = permutation(seed, "index sample", len(rows)).numpy() if index.kind != "flat" else None
        if index.kind == "ivf":
            assert order is not None
            index.train(rows[np.sort(order[: MIN_PER_LIST * index.index.nlist])])
        for first in range(0, len(rows), CHUNK):
            index.add(rows[first : first + CHUNK])
        if order is not None and len(rows):
            # Lists fit the rows that they were found from better than others: those are not asked.
            asked = np.sort(order[-TUNED:])
            # Distances by way of products lose the last digits; cosines do not.
            index.tune(rows[asked], recall, k, own=asked, among=rows if metric == "cosine" else None)
        return index

    @property
    def dim(self) -> int:
        return int(self.index.d)

    @property
    def metric(self) -> Literal["cosine", "l2"]:
        return "cosine" if self.index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"

    @property
    def kind(self) -> Literal["flat", "ivf", "hnsw"]:
        return "ivf" if hasattr(self.index, "nprobe") else "hnsw" if hasattr(self.index, "hnsw") else "flat"

    @property
    def effort(self) -> int:
        """How far a search looks: lists visited (ivf) or candidates kept (hnsw); 0 where it is exact."""
        kind = self.kind
        return int(self.index.nprobe if kind == "ivf" else self.index.hnsw.efSearch if kind == "hnsw" else 0)

    @effort.setter
    def effort(self, value: int) -> None:
        if self.kind == "ivf":
            self.index.nprobe = min(value, self.index.nlist)
            if self._on_gpu is not None:
                self._on_gpu.nprobe = min(value, GPU_MOST)
        elif self.kind == "hnsw":
            self.index.hnsw.efSearch = value

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def train(self, rows: Floats) -> None:
        """Find the lists of an ivf index from a sample ``[n, D]``; the others need none."""
        if self.kind == "ivf":
            self.index.cp.seed = 1234
            self.index.cp.min_points_per_centroid = 1
            self.index.cp.spherical = self.metric == "cosine"
            self.index.train(self._ready(rows))

    def add(self, rows: Floats) -> None:
        """Append ``rows [n, D]``.

        Raises:
            RuntimeError: an ivf index was not trained.
            ValueError: another D, or numbers that are not finite.
        """
        if not self.index.is_trained:
            raise RuntimeError("train the ivf index first")
        threads = faiss.omp_get_max_threads()
        if self.kind == "hnsw":
            faiss.omp_set_num_threads(1)  # the graph depends on the order of its nodes
        try:
            self.index.add(self._ready(rows))
        finally:
            faiss.omp_set_num_threads(threads)
        self._on_gpu = None

    def search(self, rows: Floats, k: int) -> tuple[Floats, Ids]:
        """The ``k`` nearest of each of ``rows [n, D]``, the nearest first.

        Returns:
            Scores ``[n, k]`` (cosines or distances) and row numbers ``[n, k]``; where fewer are found, -1 with the
            worst score (-inf or inf).
        """
        scores, ids = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
        searcher = self._searcher(k)
        for first in range(0, len(rows), CHUNK):
            part = slice(first, first + CHUNK)
            found, where = searcher.search(self._ready(rows[part]), k)
            scores[part], ids[part] = self._ordered(found, where)
        return scores, ids

    def neighbors(self, rows: Floats, k: int, first: int = 0) -> tuple[Floats, Ids]:
        """The ``k`` nearest of rows that are in the index themselves, each without itself.

        Args:
            rows: ``[n, D]``, those numbered from ``first`` on.
        """
        k = max(0, min(k, len(self) - 1))
        scores, ids = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
        everything = self.kind == "ivf" and len(rows) == len(self)
        together = everything and self.metric == "cosine" and self._searcher(k + 1) is self.index
        order: Ids = self._by_list() - first if everything else np.arange(len(rows))
        step = max(CHUNK, min(TOGETHER, LOOKUPS // self.effort)) if together else CHUNK
        # Small corpora are done before a bar is worth a look.
        with tqdm(total=len(rows), desc="neighbors", unit="face", delay=10, leave=False) as bar:
            for begin in range(0, len(rows), step):
                part = order[begin : begin + step]
                found = (self._search_together if together else self.search)(rows[part], k + 1)
                scores[part], ids[part] = _without(*found, part + first)
                bar.update(len(part))
        # Rows far from all others share their lists with too few: there the search goes on into more lists.
        effort = self.effort
        while (
            k and self.kind == "ivf" and self.effort < self.index.nlist and len(few := np.flatnonzero(ids[:, -1] < 0))
        ):
            self.effort *= 2
            for begin in range(0, len(few), CHUNK):
                part = few[begin : begin + CHUNK]
                scores[part], ids[part] = _without(*self.search(rows[part], k + 1), part + first)
        self.effort = effort
        return scores, ids

    def _search_together(self, rows: Floats, k: int) -> tuple[Floats, Ids]:
        """What `search` finds, for many rows at a time: each list is compared with all that look into it at once.

        A product of two matrices takes a fraction of the time of the same products one by one, as FAISS forms them.
        Cosines only: distances by way of products lose the last digits.
        """
        ready, lists = self._ready(rows), self.index.invlists
        looks = np.concatenate(
            [self.index.quantizer.search(ready[i : i + CHUNK], self.effort)[1] for i in range(0, len(ready), CHUNK)]
        )
        best, ids = np.full((len(rows), k), -np.inf, np.float32), np.full((len(rows), k), -1, np.int64)
        # The nearest list of each first: then little in the others is near enough to be kept.
        for some in (looks[:, :1], looks[:, 1:]):
            order = np.argsort(some, axis=None, kind="stable")
            who = order // max(1, some.shape[1])
            bounds = np.searchsorted(some.ravel()[order], np.arange(lists.nlist + 1))
            for number in np.flatnonzero(np.diff(bounds)).tolist():
                if not (size := lists.list_size(number)):
                    continue
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * self.index.code_size)
                listed = codes.view(np.float32).reshape(size, self.dim)
                names = faiss.rev_swig_ptr(lists.get_ids(number), size)
                step = max(1, PRODUCTS // size)  # one list may hold most of a collapsed corpus
                for begin in range(bounds[number], bounds[number + 1], step):
                    asked = who[begin : min(begin + step, bounds[number + 1])]
                    cosines = ready[asked] @ listed.T
                    nearer = np.flatnonzero(cosines.max(1) > best[asked, -1])
                    asked, cosines = asked[nearer], cosines[nearer]
                    both = np.concatenate((best[asked], cosines), 1)
                    top = np.argpartition(-both, k - 1, axis=1)[:, :k]
                    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(both, top, 1), axis=1), 1)
                    known = np.take_along_axis(ids[asked], np.minimum(top, k - 1), 1)
                    best[asked], ids[asked] = (
                        np.take_along_axis(both, top, 1),
                        np.where(top < k, known, names[np.maximum(top - k, 0)]),
                    )
        return self._ordered(best, ids)

    def _by_list(self) -> Ids:
        """``[N]`` row numbers, list by list: rows of a list look into the same lists, which so stay in the cache."""
        lists = self.index.invlists
        sizes = [lists.list_size(number) for number in range(lists.nlist)]
        return np.concatenate([faiss.rev_swig_ptr(lists.get_ids(n), size) for n, size in enumerate(sizes) if size])

    def within(self, rows: Floats, radius: float) -> tuple[Ids, Floats, Ids]:
        """All rows at least as similar as ``radius`` (cosine), or at most as far (l2), exact only in a flat index.

        Returns:
            ``limits [n + 1]``, and scores and row numbers ``[limits[-1]]``: those of query i lie from ``limits[i]`` to
            ``limits[i + 1]``, the nearest first.
        """
        if self.metric == "l2" and radius < 0:
            raise ValueError(f"radius is {radius}; distances are not negative")
        # FAISS leaves out what lies on the radius.
        bound = (
            np.nextafter(np.float32(radius), np.float32(-np.inf))
            if self.metric == "cosine"
            else np.nextafter(np.float32(radius**2), np.float32(np.inf))
        )
        limits, scores, ids = [np.zeros(1, np.int64)], [], []
        for first in range(0, len(rows), CHUNK):
            part = self._ready(rows[first : first + CHUNK])
            ends, found, where = self.index.range_search(part, float(bound))
            ends = ends.astype(np.int64)
            query = np.repeat(np.arange(len(part)), np.diff(ends))
            order = np.lexsort((where, -found if self.metric == "cosine" else found, query))
            scores.append(self._shown(found[order]))
            ids.append(where[order])
            limits.append(ends[1:] + limits[-1][-1])
        return (
            np.concatenate(limits),
            np.concatenate([*scores, np.empty(0, np.float32)]),
            np.concatenate([*ids, np.empty(0, np.int64)]),
        )

    def pairs(self, rows: Floats, radius: float) -> tuple[Ids, Ids, Floats]:
        """All pairs i < j of the index's own ``rows [N, D]`` within ``radius``, with their scores."""
        limits, scores, second = self.within(rows, radius)
        first = np.repeat(np.arange(len(rows)), np.diff(limits))
        keep = first < second
        return first[keep], second[keep], scores[keep]

    def tune(
        self, rows: Floats, recall: float, k: int = 10, own: Ids | None = None, among: Floats | None = None
    ) -> float:
        """Raise the effort until ``recall`` of the true ``k`` nearest of ``rows [n, D]`` are found.

        Args:
            own: row numbers ``[n]`` of the queries, where they are in the index themselves and are not to count.
            among: the rows of the index ``[N, D]``, if they are at hand: comparing with them all is quicker.

        Returns:
            The recall that is reached; a row as near as the k-th counts as found.
        """
        if self.kind == "flat" or not len(rows) or not len(self):
            return 1.0

        def found() -> tuple[Floats, Ids]:
            if own is None:
                return self.search(rows, min(k, len(self)))
            return _without(*self.search(rows, min(k + 1, len(self))), own)

        worst = exact_scores(self, rows, min(k + (own is not None), len(self)), own, among)[:, -1:]
        slack = 1e-5  # scores of one pair differ in the last bits from one way of searching to another
        most = self.index.nlist if self.kind == "ivf" else len(self)

        def reached(effort: int) -> float:
            self.effort = effort
            scores, ids = found()
            near = scores >= worst - slack if self.metric == "cosine" else scores <= worst + slack
            return float((near & (ids >= 0)).mean())

        low, high = 0, 1 if self.kind == "ivf" else max(16, k)
        while (best := reached(high)) < recall and high < most:
            low, high = high, 2 * high
        while low and high - low > max(1, high // 8):  # what lies between was too little and enough
            middle = (low + high) // 2
            if (value := reached(middle)) >= recall:
                high, best = middle, value
            else:
                low = middle
        self.effort = high
        return best

    def save(self, path: str | Path) -> None:
        """Write the index, its effort included, to one file."""
        with atomic_path(path) as temporary:
            faiss.write_index(self.index, str(temporary))

    @classmethod
    def load(cls, path: str | Path, *, memory_map: bool = False, gpu: bool = True) -> EmbeddingIndex:
        """Read an index that `save` wrote here; FAISS's reader is not made for files of strangers.

        Args:
            memory_map: leave the rows on the disk until they are looked at; such an index cannot grow. One of kind ivf
                takes the memory of all rows for a moment while FAISS opens it.

        Raises:
            InputError: there is no such file, or it is damaged.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such index")
        try:
            flag = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if memory_map else 0
            index = faiss.read_index(str(path), flag)
        except RuntimeError as error:
            raise InputError(f"{path}: not readable as an index; delete it and build it again") from error
        made = cls.__new__(cls)
        made.index, made.gpu, made._on_gpu = index, gpu, None
        return made

    def _ready(self, rows: Floats) -> Floats:
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"this index holds rows of {self.dim} numbers, got {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise ValueError("embeddings hold NaN or infinite numbers")
        if self.metric == "cosine":
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows

    def _shown(self, scores: Floats) -> Floats:
        return scores if self.metric == "cosine" else np.sqrt(np.maximum(scores, 0))

    def _ordered(self, scores: Floats, ids: Ids) -> tuple[Floats, Ids]:
        """Nearest first, equal ones by row number, missing ones last."""
        worst = np.float32(-np.inf if self.metric == "cosine" else np.inf)
        scores = np.where(ids < 0, worst, self._shown(scores))
        order = np.lexsort((ids, -scores if self.metric == "cosine" else scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def _searcher(self, k: int) -> Any:
        # The CPU build knows no GPU resources; the GPU build may find no GPU, and refuses larger searches there.
        if (
            not self.gpu
            or self.kind == "hnsw"
            or max(k, self.effort) > GPU_MOST
            or not hasattr(faiss, "StandardGpuResources")
            or not faiss.get_num_gpus()
        ):
            return self.index
        if self._on_gpu is None:
            self._resources = faiss.StandardGpuResources()
            self._on_gpu = faiss.index_cpu_to_gpu(self._resources, 0, self.index)
        return self._on_gpu


def exact_scores(
    index: EmbeddingIndex, rows: Floats, k: int, own: Ids | None = None, among: Floats | None = None
) -> Floats:
    """Scores ``[n, k]`` of the true nearest, whatever the kind of the index.

    Args:
        among: the rows of the index, if they are at hand.
    """
    ready = index._ready(rows)
    if among is not None:
        found, ids = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
        for first in range(0, len(among), CHUNK):
            part = index._ready(among[first : first + CHUNK])
            more, where = faiss.knn(ready, part, min(k, len(part)), index.index.metric_type)
            found, ids = np.concatenate((found, more), 1), np.concatenate((ids, where + first), 1)
            best = np.argsort(-found if index.metric == "cosine" else found, axis=1, kind="stable")[:, :k]
            found, ids = np.take_along_axis(found, best, 1), np.take_along_axis(ids, best, 1)
    elif index.kind == "ivf":
        effort, index.effort = index.effort, index.index.nlist  # with every list visited the search is exhaustive
        found, ids = index.index.search(ready, k)
        index.effort = effort
    else:
        found, ids = (index.index.storage if index.kind == "hnsw" else index.index).search(ready, k)
    scores, ids = index._ordered(found, ids)
    return scores if own is None else _without(scores, ids, own)[0]


def _without(scores: Floats, ids: Ids, own: Ids) -> tuple[Floats, Ids]:
    """Lists of one fewer, without the queries themselves; where one is not in its list, without the farthest."""
    self_or_last = ids == own[:, None]
    self_or_last[~self_or_last.any(1), -1] = True
    keep = ~self_or_last
    shape = (len(ids), ids.shape[1] - 1)
    return scores[keep].reshape(shape), ids[keep].reshape(shape)
