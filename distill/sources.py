"""Where the faces of a training step come from.

Everything random in a batch depends only on ``(seed, purpose, step, sample index)``. A source knows the process it runs
in and hands out that process's share of the global batch.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distill.gather import gather
from eval import benchmarks
from eval.benchmarks.folder import listing, square
from eval.benchmarks.prepare import crops
from faceless import align
from faceless.devices import moved, pinned
from faceless.errors import InputError, suggest
from faceless.files import read_json, sha256, visible
from faceless.images import read_image
from faceless.randomness import Rng, permutation
from faceless.recognizer import MAX_SIDE, Output, Recognizer, same_framing
from faceless.settings import Settings, recipe
from faceless.threads import each
from mining.resampling import Around, Resampling
from synth.corpus import Corpus, read_manifest
from synth.generators.base import Generator
from synth.settings import Generation

CPU = torch.device("cpu")
KEPT = 2 << 30  # bytes of parquet row groups that stay in memory
MAX_GROUP = 32 << 20  # bytes of a row group of a column that does not fit there: each face may cost the reading of one


@dataclass
class Batch:
    """One process's share of a step's faces, not yet augmented.

    Attributes:
        images: ``[B, 3, H, W]`` uint8 or float in 0..255, RGB.
        rng: what the augmentation of these faces is drawn from.
        labels: ``[B]`` int64, where the source has identities.
        rows: ``[B]`` int64 row numbers, and ``view`` the number of the augmented view, where faces recur; a teacher's
            answer to the same row and view is the same.
        latents: ``[B, *latent]`` that the faces were made from, where a generator is at hand.
        shown: ``[B]`` whether a face was found in what the generator made; None where nobody looked.
        landmarks: ``[B, 5, 2]`` x and y of eyes, nose tip and mouth corners, in sides of the image from its upper left
            corner, where they are known; not finite for a face without.
        weights: ``[B]`` of the faces in the losses, from a source that `Source.weighs`.
        scattered: ``[B]`` whether a face came by itself, from a source that shows the others of an identity together.
    """

    images: Tensor
    rng: Rng
    labels: Tensor | None = None
    rows: Tensor | None = None
    view: int | None = None
    latents: Tensor | None = None
    shown: Tensor | None = None
    landmarks: Tensor | None = None
    weights: Tensor | None = None
    scattered: Tensor | None = None


@dataclass
class Place:
    """Where a source works: which process of how many, on what device, for which run of how many steps."""

    seed: int = 0
    batch_size: int = 128
    rank: int = 0
    processes: int = 1
    device: torch.device = CPU
    held_out: int = 0
    piece: slice | None = None
    steps: int = 0

    def share(self) -> slice:
        """The samples of a global batch that are this process's: ``piece``, or an even share."""
        if self.piece is not None:
            return self.piece
        if self.batch_size % self.processes:
            raise InputError(f"batch_size {self.batch_size} cannot be split evenly over {self.processes} processes")
        size = self.batch_size // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)


class Source(ABC):
    """Faces for the steps of a run. Constructed from settings; ready after `prepare`.

    Attributes:
        labelled: whether batches carry labels.
        classes: how many identities the labels name; known after `prepare`.
        real: whether its faces are of real people.
        weighs: whether batches carry weights of their faces.
        scatters: whether batches say which faces came by themselves.
    """

    labelled = False
    classes = 0
    real = False
    weighs = False
    scatters = False

    def people(self) -> list[tuple[str, str | None]]:
        """Whose pictures it trains on, known before `prepare`: benchmarks or folders, and which people of each."""
        return []

    def framing_known(self) -> str | None:
        """How its faces are cut (see `faceless.align`), known before `write`; None where nobody says."""
        return None

    def check_framing(self, wanted: str) -> str | None:
        """Compare how the faces are cut with what the teacher wants.

        Returns:
            A line to print when that cannot be known.

        Raises:
            InputError: they are cut otherwise.
        """
        found = self.framing_known()
        if found is None:
            return f"{self.name()}: does not say how its faces are cut; the teacher knows {wanted} crops"
        same_framing(found, wanted, self.name(), "the teacher")
        return None

    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def check(self, place: Place) -> None:
        """Refuse, before `write`, what can be known to be wrong by then.

        Raises:
            InputError: a file that is named is not there, or batches cannot be split so.
        """
        place.share()

    def may_be_labelled(self) -> bool:
        """Whether batches may carry labels, as far as that is known before `write`."""
        return self.labelled

    def write(self) -> None:  # noqa: B027
        """Make on disk what is not there yet (a corpus); called once on one process, before `prepare`."""

    @abstractmethod
    def prepare(self, place: Place) -> None:
        """Open files and move networks, once, in every process."""

    def watch(self, teacher: Recognizer, student: Recognizer) -> None:  # noqa: B027
        """Meet the two networks, once, after `prepare`, for faces that depend on them; they are only looked at."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Faces of a step for this process; the same whenever it is asked."""

    @abstractmethod
    def held_out(self) -> Tensor:
        """``[place.held_out, 3, H, W]`` faces that no batch ever contains."""

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """About ``count`` training faces, uint8, for the report."""

    def generated(self, count: int) -> Tensor:
        """The same, of its faces of nobody alone; ``[0, 3, 1, 1]`` if it has none."""
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8) if self.real else self.sample(count)

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Where the faces come from, for the provenance of the run."""

    def records(self) -> list[dict[str, Any]]:
        """The same, in full, for each place that faces come from."""
        return [self.record()]

    def feedback(self, batch: Batch, student: Output, teacher: Output) -> None:  # noqa: B027
        """Learn how student and teacher judged a batch, in comparable embeddings."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `feedback` left behind; the same on every process."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise InputError(f"this checkpoint belongs to another source than {type(self).__name__}")


class Rows(Source):
    """A source with a fixed set of faces, shuffled anew in each epoch.

    Args:
        path: where they lie.
        views: how many augmented views of each face there are; epoch e shows view e modulo ``views``. None draws a new
            view in every epoch. A teacher cache needs a number.
        in_memory: keep the decoded faces in memory.
        together: show so many faces of one identity one after the other (fewer where it has fewer), so that a batch
            has genuine pairs, which losses of pairs want; still every face once in an epoch. Needs labels if above 1.
        scattered: share of these groups whose faces come one by one instead, in any order, between the others; null
            keeps all groups. A loss may count these faces alone (`distill.settings.Term`).
    """

    def __init__(
        self,
        *,
        path: str,
        views: int | None = None,
        in_memory: bool = False,
        together: int = 1,
        scattered: float | None = None,
    ):
        if views is not None and views < 1:
            raise InputError(f"views is {views}; use 1 or more, or null for a new view in every epoch")
        if together < 1:
            raise InputError(f"together is {together}; use 1 for faces in any order, or more")
        if scattered is not None and (not 0 < scattered < 1 or together == 1):
            raise InputError(f"scattered is {scattered}; it is a share between 0 and 1 of groups, which together makes")
        self.path = path
        self.views = views
        self.in_memory = in_memory
        self.together, self.scattered, self.scatters = together, scattered or 0.0, scattered is not None
        self.labels: Tensor | None = None
        self.landmarks: Tensor | None = None
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._memory: Tensor | None = None
        self._reader: ThreadPoolExecutor | None = None

    def name(self) -> str:
        return str(self.path)

    @abstractmethod
    def total(self) -> int:
        """Faces, held-out ones included."""

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """``[n, 3, H, W]`` uint8 faces by row number."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes when any face does."""

    @property
    def size(self) -> int:
        """Training faces: the rows before the held-out ones."""
        return self.total() - self.place.held_out

    def prepare(self, place: Place) -> None:
        self.place = place
        place.share()
        if self.size < place.batch_size:
            raise InputError(
                f"{self.name()}: {self.total()} faces, of which {place.held_out} are held out, do not fill one batch "
                f"of {place.batch_size}; add faces, or lower batch_size or validation.faces"
            )
        self._reader, self._orders = ThreadPoolExecutor(1, "faces"), {}
        if self.labels is not None:
            self.label(self.labels)
        if self.in_memory:
            chunks = torch.arange(self.total()).split(1024)
            self._memory = torch.cat([self.read(rows) for rows in chunks])

    def label(self, labels: Tensor) -> None:
        """Give every row an identity: ``[total]`` int64, -1 for none.

        Raises:
            InputError: there are not as many labels as faces, or one is below -1.
        """
        if labels.shape != (self.total(),) or labels.is_floating_point() or (labels < -1).any():
            raise InputError(f"{self.name()}: labels are whole numbers from -1, one for each of {self.total()} faces")
        self.labels = labels.long()
        self.labelled, self.classes = True, int(labels.max()) + 1

    def faces(self, rows: Tensor) -> Tensor:
        return self.read(rows) if self._memory is None else self._memory[rows]

    def position(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows ``[B]`` of this process's samples of a step, and ``[B]`` whether each came by itself."""
        samples = torch.arange(step * self.place.batch_size, (step + 1) * self.place.batch_size)[self.place.share()]
        epochs = samples // self.size
        rows, alone = torch.empty_like(samples), torch.empty(len(samples), dtype=torch.bool)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            rows[chosen], alone[chosen] = (part[samples[chosen] % self.size] for part in self._order(epoch))
        return rows, alone

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        if epoch not in self._orders:
            # The two latest: around the end of an epoch, both are asked for several times.
            latest = list(self._orders.items())[-1:]
            self._orders = dict([*latest, (epoch, self._shuffled(epoch))])
        return self._orders[epoch]

    def _shuffled(self, epoch: int) -> tuple[Tensor, Tensor]:
        """``[size]``: the rows in the order of an epoch, and ``[size]`` whether each comes by itself."""
        order = permutation(self.place.seed, "order", self.size, epoch)
        if self.together == 1:
            return order, torch.ones(self.size, dtype=torch.bool)
        if self.labels is None:
            raise InputError(f"{self.name()}: together is {self.together}, and the faces have no labels")
        # Each identity's faces, in random order, are cut into groups, and the groups are shuffled.
        labels = self.labels[: self.size]
        sorted_labels, by_label = labels[order].sort(stable=True)
        order = order[by_label]
        starts = torch.cat((torch.ones(1, dtype=torch.bool), sorted_labels[1:] != sorted_labels[:-1])).nonzero()[:, 0]
        counts = torch.diff(starts, append=torch.tensor([self.size]))
        within = torch.arange(self.size) - starts.repeat_interleave(counts)
        alone = (sorted_labels < 0) | (within % self.together == 0)
        group = alone.cumsum(0) - 1
        places = permutation(self.place.seed, "groups", int(group[-1]) + 1, epoch)
        places, found = places[group].sort(stable=True)
        order = order[found]
        # Of these groups every so many, evenly spread, leave their places to each other's faces.
        open_places = ((places + 1) * self.scattered).floor() > (places * self.scattered).floor()
        loose = order[open_places]
        order[open_places] = loose[permutation(self.place.seed, "scattered", len(loose), epoch)]
        return order, open_places

    def _next(self, rows: Tensor) -> Tensor:
        return pinned(self.faces(rows), self.place.device)

    def augmentation(self, rows: Tensor, view: int) -> Rng:
        """What the augmentation of a view of these rows is drawn from."""
        return Rng.of(self.place.seed, "view", rows, step=view)

    def batch(self, step: int) -> Batch:
        if self._reader is None:
            raise RuntimeError("prepare the source first")
        rows, alone = self.position(step)
        ahead = self._ahead
        images = ahead[1].result() if ahead is not None and ahead[0] == step else self._next(rows)
        # The next batch is read while this one is computed with.
        self._ahead = (step + 1, self._reader.submit(self._next, self.position(step + 1)[0]))
        # A batch across the end of an epoch belongs to the view that the whole of it, over all processes, begins in.
        epoch = step * self.place.batch_size // self.size
        view = epoch if self.views is None else epoch % self.views
        labels = None if self.labels is None else self.labels[rows]
        landmarks = None if self.landmarks is None else self.landmarks[rows]
        scattered = alone if self.scatters else None
        return Batch(
            images, self.augmentation(rows, view), labels, rows, view, landmarks=landmarks, scattered=scattered
        )

    def held_out(self) -> Tensor:
        return self.faces(torch.arange(self.size, self.total()))

    def sample(self, count: int) -> Tensor:
        return self.faces(torch.linspace(0, self.size - 1, min(count, self.size)).long())


class CorpusSource(Rows):
    """A corpus of generated faces, written first if it is not there yet.

    Args:
        path: folder of the corpus.
        recipe: settings for ``synth/generate.py`` to write it with when it is missing or unfinished; None makes a
            missing corpus an error.
        faces: use only the first so many; None uses all.
        labels: a ``.npy`` file with an identity for each row (-1 for none), such as pseudo-identities; None takes the
            corpus's own ``identity`` column, if it has one.
        landmarks: a ``.npy`` file with the landmarks of each row, from ``mining/landmarks.py``, for losses that ask
            where in a face a place is.
        views, in_memory, together, scattered: see `Rows`.
    """

    def __init__(
        self,
        *,
        path: str,
        recipe: str | None = None,
        faces: int | None = None,
        labels: str | None = None,
        landmarks: str | None = None,
        views: int | None = None,
        in_memory: bool = False,
        together: int = 1,
        scattered: float | None = None,
    ):
        super().__init__(path=path, views=views, in_memory=in_memory, together=together, scattered=scattered)
        self.recipe, self.limit, self.label_file, self.landmark_file = recipe, faces, labels, landmarks

    def write(self) -> None:
        if self.recipe is not None:
            from synth.generate import complete, generate

            settings = self._settings()
            if not complete(settings):
                generate(settings)
        # The record of the run names these faces by the hashes in the manifest.
        Corpus(self.path).verify()

    def _settings(self) -> Settings[Generation]:
        from synth.generate import read_settings

        return read_settings(["--config", str(recipe(str(self.recipe))), "--output", self.path])

    def framing_known(self) -> str | None:
        if self.recipe is None or (Path(self.path) / "manifest.json").is_file():
            found = read_manifest(Path(self.path)).get("framing")
        else:
            found = (self._settings().asdict()["align"] or {}).get("framing")
        return None if found is None else str(found)

    def check(self, place: Place) -> None:
        super().check(place)
        for file in (self.label_file, self.landmark_file):
            if file is not None and not Path(file).is_file():
                raise InputError(f"{file}: no such file; mining/identities.py and mining/landmarks.py write them")

    def may_be_labelled(self) -> bool:
        if self.label_file is not None or self.labelled:
            return True
        if self.recipe is None or (Path(self.path) / "manifest.json").is_file():
            return "identity" in Corpus(self.path).columns
        return bool(self._settings().build().generator.identities)

    def prepare(self, place: Place) -> None:
        self.corpus = Corpus(self.path)
        self.real = bool(self.corpus.manifest.get("real_faces", True))
        if self.label_file is not None:
            labels = read_labels(Path(self.label_file))
            if len(labels) != len(self.corpus):
                raise InputError(
                    f"{self.label_file}: {len(labels)} labels, and {self.path} has {len(self.corpus)} faces; "
                    "labels of another corpus, or of this one before some of its faces were removed, fit nobody here"
                )
            self.labels = labels[: self.total()]
        elif "identity" in self.corpus.columns:
            self.labels = torch.as_tensor(self.corpus.column("identity"), dtype=torch.int64)[: self.total()]
        if self.landmark_file is not None:
            self.landmarks = read_landmarks(Path(self.landmark_file), len(self.corpus))
        for file in (self.label_file, self.landmark_file):
            if file is not None and faces_of(Path(file)) not in (None, self.corpus.fingerprint):
                raise InputError(
                    f"{file}: made of other faces than {self.path} has now; make it again with "
                    f"mining/{Path(file).stem}.py"
                )
        super().prepare(place)

    def total(self) -> int:
        return len(self.corpus) if self.limit is None else min(self.limit, len(self.corpus))

    def read(self, rows: Tensor) -> Tensor:
        return self.corpus.images(rows)

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def record(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "kind": "corpus",
            "path": str(self.path),
            "faces": self.size,
            "fingerprint": self.fingerprint,
        }
        for key, file in (("labels", self.label_file), ("landmarks", self.landmark_file)):
            if file is not None:  # by contents: other clusters under the old name would be another run
                told[key] = {"path": file, "sha256": sha256(file)}
        generator = self.corpus.manifest.get("generator")
        if isinstance(generator, dict) and "identities_from" in generator:
            told["identities_from"] = generator["identities_from"]
        return told | {"framing": self.framing_known(), "manifest": self.corpus.manifest}


def check_crops(framing: str | None, size: int) -> None:
    """Refuse crops that nobody cuts; of those that nobody says how they are cut, None, only the size can be wrong."""
    if framing not in (None, *align.FRAMINGS):
        raise InputError(f"framing is {framing!r}; use one of {', '.join(align.FRAMINGS)}")
    if not 16 <= size <= MAX_SIDE:
        raise InputError(f"size is {size}; use 16 to {MAX_SIDE} pixels")


def read_npy(path: Path, what: str) -> np.ndarray:
    """The array in a ``.npy`` file of ``what``; pickled objects are refused."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy file of {what} ({error})") from error
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path}: not a readable .npy file of {what}, but an archive of several")
    return found


def read_labels(path: Path) -> Tensor:
    """``[rows]`` whole numbers from a ``.npy`` file."""
    found = read_npy(path, "labels")
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"{path}: labels are one whole number for each face, these are {found.dtype} {found.shape}")
    return torch.from_numpy(found.astype(np.int64))


def faces_of(path: Path) -> str | None:
    """Fingerprint of the faces that an ``identities.npy`` or ``landmarks.npy`` is of, where mining noted it."""
    if path.name not in ("identities.npy", "landmarks.npy"):
        return None
    return read_json(path.with_suffix(".json")).get("fingerprint")


def read_landmarks(path: Path, faces: int) -> Tensor:
    """``[faces, 5, 2]`` float32 from a ``.npy`` file."""
    found = read_npy(path, "landmarks")
    if found.shape != (faces, 5, 2) or found.dtype != np.float32:
        raise InputError(
            f"{path}: holds {found.dtype} {found.shape}, not float32 landmarks (5, 2) of each of {faces} faces; write "
            "them with mining/landmarks.py"
        )
    known = found[np.isfinite(found)]
    if len(known) and not -2 < known.min() <= known.max() < 3:
        raise InputError(
            f"{path}: landmarks reach from {known.min():.3g} to {known.max():.3g}; they are counted in sides of the "
            "image, not in pixels: 0 to 1, or a little outside"
        )
    return torch.from_numpy(found)


class FolderSource(Rows):
    """Real faces: a folder with one sub-folder per identity. A run that uses it says so loudly.

    Args:
        path: the folder, or the name of a benchmark such as ``att-faces``.
        people: train on these only, such as ``1-20``; a run refuses to verify on any of them. None takes all.
        framing, size: how and to what side faces are aligned (see `faceless.align`).
        aligned: whether the images are crops of that framing already, which are then read when they are needed.
            Photographs are cut at the start of a run, and their crops stay in memory.
        views, in_memory, together, scattered: see `Rows`.
    """

    labelled = True
    real = True

    def __init__(
        self,
        *,
        path: str,
        people: str | None = None,
        framing: str = "dlib",
        size: int = 112,
        aligned: bool = False,
        views: int | None = None,
        in_memory: bool = False,
        together: int = 1,
        scattered: float | None = None,
    ):
        super().__init__(path=path, views=views, in_memory=in_memory, together=together, scattered=scattered)
        check_crops(framing, size)
        self.chosen, self.framing, self.side, self.aligned = people, framing, size, aligned
        self.crops: Tensor | None = None

    def framing_known(self) -> str:
        return self.framing

    def prepare(self, place: Place) -> None:
        self.paths: list[Path] = []
        if self.path in benchmarks.BENCHMARKS:
            benchmark = benchmarks.load(self.path, self.framing, self.side)
            if self.chosen is not None:
                benchmark = benchmark.subset(benchmarks.parse_people(self.chosen, len(benchmark.names)))
            self.crops, self.labels, self.names = benchmark.images, benchmark.identities, list(benchmark.names)
        else:
            self.paths, identities, self.names = listing(Path(self.path))
            if self.chosen is not None:
                people = range(len(self.names))[benchmarks.parse_people(self.chosen, len(self.names))]
                kept = [row for row, person in enumerate(identities) if person in people]
                self.paths = [self.paths[row] for row in kept]
                identities = [identities[row] - people.start for row in kept]
                self.names = self.names[people.start : people.stop]
            self.labels = torch.tensor(identities)
            if not self.aligned:
                self.crops = crops(self.paths, self.framing, self.side)[0]
        super().prepare(place)

    def people(self) -> list[tuple[str, str | None]]:
        return [(self.path, self.chosen)]

    def total(self) -> int:
        return len(self.paths) if self.crops is None else len(self.crops)

    def read(self, rows: Tensor) -> Tensor:
        if self.crops is not None:
            return self.crops[rows]
        return stacked(each(self._decode, [self.paths[row] for row in rows.tolist()]), self.side)

    def _decode(self, path: Path) -> Tensor:
        return square(read_image(path), self.side, str(path), "say aligned: false to cut faces out of photographs")

    @cached_property
    def fingerprint(self) -> str:
        if self.crops is not None:
            return hashlib.sha256(self.crops.numpy().tobytes()).hexdigest()
        return hashlib.sha256("".join([*map(sha256, self.paths), str(self.side)]).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        told = {"kind": "folder", "path": str(self.path), "faces": self.size, "fingerprint": self.fingerprint}
        split = {} if self.chosen is None else {"people": self.chosen, "identities": self.names}
        return told | {"framing": self.framing, "real_faces": True} | split


def stacked(faces: Sequence[Tensor], side: int) -> Tensor:
    """``[n, 3, side, side]`` of n faces, which may be none."""
    return torch.stack(list(faces)) if faces else torch.empty(0, 3, side, side, dtype=torch.uint8)


class ParquetSource(Rows):
    """Faces in anybody's parquet files, such as those of a Hugging Face dataset; real ones unless told otherwise.

    Row groups are read when a face of theirs is needed, and the latest stay in memory, up to 2 GB of them. A shuffled
    order visits them at random, so larger files need row groups of at most 32 MB, or ``in_memory``.

    Args:
        path: a file, or a folder of ``.parquet`` files, which are read in the order of their names.
        image: column of PNG, JPEG, WEBP or BMP files: bytes, or records with ``bytes``.
        label: column that says whose face it is, by number or name; None for faces without labels.
        size: side to which faces are resized; they must be aligned crops already.
        framing: how they are cut, ``dlib`` or ``arcface`` (see `faceless.align`); None if that is not known.
        real: whether they are of real people. A run that trains on real faces says so loudly.
        views, in_memory, together, scattered: see `Rows`.
    """

    def __init__(
        self,
        *,
        path: str,
        image: str = "image",
        label: str | None = "label",
        size: int = 112,
        framing: str | None = None,
        real: bool = True,
        views: int | None = None,
        in_memory: bool = False,
        together: int = 1,
        scattered: float | None = None,
    ):
        super().__init__(path=path, views=views, in_memory=in_memory, together=together, scattered=scattered)
        check_crops(framing, size)
        self.image, self.label_column, self.side, self.framing, self.real = image, label, size, framing, real

    def framing_known(self) -> str | None:
        return self.framing

    def may_be_labelled(self) -> bool:
        return self.label_column is not None

    def prepare(self, place: Place) -> None:
        folder = Path(self.path)
        self.files = visible(folder, "*.parquet") if folder.is_dir() else [folder]
        if not self.files:
            raise InputError(f"{folder}: holds no .parquet files")
        self.encoded = Column(self.files, self.image)
        if not self.in_memory:
            self.encoded.check_groups()
        if self.label_column is not None:
            whose = Column(self.files, self.label_column).values()
            numbers = {name: number for number, name in enumerate(sorted(set(whose) - {None}))}
            self.labels = torch.tensor([numbers.get(name, -1) for name in whose])
        super().prepare(place)

    def total(self) -> int:
        return len(self.encoded)

    def read(self, rows: Tensor) -> Tensor:
        found = list(zip(rows.tolist(), self.encoded.rows(rows.tolist())))
        return stacked(each(self._decode, found), self.side)

    def _decode(self, item: tuple[int, Any]) -> Tensor:
        row, value = item
        data: Any = value.get("bytes") if isinstance(value, dict) else value
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                if max(image.size) > MAX_SIDE:  # known from the header, before anything is decoded
                    raise InputError(f"{self.path}: the image of row {row} is {image.size[0]} x {image.size[1]}")
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.path}: column {self.image!r} of row {row} holds no readable image") from error
        face = torch.from_numpy(pixels).permute(2, 0, 1)
        return square(face, self.side, f"{self.path}: row {row}", "cut the faces out of the photographs first")

    @cached_property
    def fingerprint(self) -> str:
        parts = [*map(sha256, self.files), str(self.side), self.image]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        told = {"kind": "parquet", "path": str(self.path), "faces": self.size, "fingerprint": self.fingerprint}
        return told | {"column": self.image, "framing": self.framing, "real_faces": self.real}


class Column:
    """One column of parquet files, read by row.

    Args:
        files: in their order.
        name: of the column.

    Raises:
        InputError: a file that is no parquet, or lacks the column.
    """

    def __init__(self, files: Sequence[Path], name: str):
        self.name, self.files = name, list(files)
        self._open = [self._opened(file) for file in self.files]
        self._groups = [(f, g) for f, file in enumerate(self._open) for g in range(file.metadata.num_row_groups)]
        rows = [self._open[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = np.cumsum([0, *rows])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def _opened(self, file: Path) -> pq.ParquetFile:
        try:
            opened = pq.ParquetFile(file, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable parquet file ({error})") from error
        if self.name not in opened.schema_arrow.names:
            near = suggest(self.name, opened.schema_arrow.names)
            raise InputError(f"{file}: has no column {self.name!r}; {near}")
        return opened

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check_groups(self) -> None:
        """Refuse files too large to stay in memory whose row groups are too large to be read for single faces.

        Raises:
            InputError: names the largest row group.
        """
        sizes = []
        for f, g in self._groups:
            meta = self._open[f].metadata.row_group(g)
            columns = [meta.column(c) for c in range(meta.num_columns)]
            mine = [c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == self.name]
            sizes.append(sum(mine))
        if sum(sizes) > KEPT and max(sizes) > MAX_GROUP:
            file = self.files[self._groups[int(np.argmax(sizes))][0]]
            raise InputError(
                f"{file}: a row group holds {max(sizes) >> 20} MB, and in a shuffled order each face needs all of its "
                f"own; write the file again with row groups of at most {MAX_GROUP >> 20} MB (row_group_size), "
                "or set in_memory"
            )

    def values(self) -> list[Any]:
        """The whole column, as Python values."""
        return [value for group in range(len(self._groups)) for value in self._read(group).to_pylist()]

    def rows(self, wanted: Sequence[int]) -> list[Any]:
        """The values of these rows, in this order."""
        groups = np.searchsorted(self._starts, np.asarray(wanted, np.int64), side="right") - 1
        found: list[Any] = [None] * len(wanted)
        with self._lock:  # the next batch is read in another thread
            for group in np.unique(groups).tolist():
                values = self._group(group)
                for place in np.flatnonzero(groups == group).tolist():
                    found[place] = values[int(wanted[place] - self._starts[group])].as_py()
        return found

    def _group(self, group: int) -> pa.ChunkedArray:
        if group not in self._kept:
            self._kept[group] = self._read(group)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _read(self, group: int) -> pa.ChunkedArray:
        file, number = self._groups[group]
        try:
            return self._open[file].read_row_group(number, columns=[self.name])[self.name]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.files[file]}: not a readable parquet file ({error})") from error


class OnlineSource(Source):
    """Faces drawn from a generator at every step, if wished around latents that earlier steps found worth it.

    Args:
        generator: what makes the faces.
        resampling: what to draw around (see `mining.resampling`), or None for fresh draws only.
        landmarks: cut each face to the framing of the teacher by its landmarks (dlib; on the CPU). A latent whose face
            shows none is drawn again, at most ``tries`` times, and then kept as it is.
        framing, size: of those crops.
        detect_size: side to which faces are enlarged for the detector.
        tries: see ``landmarks``.
    """

    def __init__(
        self,
        *,
        generator: Generator,
        resampling: Resampling | None = None,
        landmarks: bool = False,
        framing: str = "dlib",
        size: int = 96,
        detect_size: int = 112,
        tries: int = 4,
    ):
        if resampling is not None and resampling.mixes and not generator.continuous:
            raise InputError(
                f"source: {type(resampling).__name__} draws between two latents, and between those of this "
                f"{type(generator).__name__} there are none, since they hold numbers of classes or seeds; use HardPool"
            )
        check_crops(framing, size)
        if tries < 1 or not 16 <= detect_size <= MAX_SIDE:
            raise InputError(f"source: tries must be at least 1, and detect_size from 16 to {MAX_SIDE} pixels")
        self.generator, self.resampling = generator, resampling
        self.landmarks, self.framing, self.side = landmarks, framing, size
        self.detect_size, self.tries = detect_size, tries

    def framing_known(self) -> str | None:
        return self.framing if self.landmarks else None

    def prepare(self, place: Place) -> None:
        self.place = place
        place.share()
        self.generator.to(place.device)

    def rng(self, purpose: str, step: int) -> Rng:
        samples = torch.arange(step * self.place.batch_size, (step + 1) * self.place.batch_size)
        return Rng.of(self.place.seed, purpose, samples[self.place.share()], step=0)

    @torch.no_grad()
    def faces(self, rng: Rng, around: Around | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, their faces, and whether a face was found in each.

        The first ones are drawn ``around`` given latents, the others afresh.
        """
        count, device = len(rng), self.place.device
        revisited = 0 if around is None else len(around.centers)

        def draw(which: Tensor, attempt: int) -> Tensor:
            numbers = rng.rows(which).child(str(attempt))
            again = which < revisited
            parts = []
            if around is not None and again.any():
                rows = moved(which[again], device)
                near = numbers.rows(again).child("around")
                parts.append(self.generator.perturb(around.centers[rows], around.scales[rows], near))
            if not again.all():
                parts.append(self.generator.sample_latents(int((~again).sum()), numbers.rows(~again)).to(device))
            return torch.cat(parts)

        latents = draw(torch.arange(count), 0)
        if not self.landmarks:
            return latents, self.generator.synthesize(latents), None
        crops = torch.zeros(count, 3, self.side, self.side)
        open_rows = torch.arange(count)
        for attempt in range(self.tries):
            if attempt:
                latents[open_rows.to(device)] = draw(open_rows, attempt)
            images = self.generator.synthesize(latents[open_rows.to(device)]).round().clamp(0, 255).byte().cpu()
            points = align.native_points(self.framing)
            found = align.detect(images, points=points, detect_size=self.detect_size, landmark_size=2 * self.side)
            last = attempt == self.tries - 1
            done = found.found
            crops[open_rows[done]] = align.crop(
                images[done].float(), found.points[done], self.framing, self.side, border="border"
            )
            if last and not done.all():
                crops[open_rows[~done]] = F.interpolate(images[~done].float(), (self.side, self.side), mode="bilinear")
            open_rows = open_rows[~done]
            if not len(open_rows):
                break
        shown = torch.ones(count, dtype=torch.bool)
        shown[open_rows] = False
        return latents, moved(crops, device), moved(shown, device)

    def batch(self, step: int) -> Batch:
        around = None
        if self.resampling is not None:
            planned = self.resampling.plan(step, self.place.batch_size, self.place.seed)
            if planned is not None:
                share, device = self.place.share(), self.place.device
                around = Around(*(moved(rows[share], device) for rows in (planned.centers, planned.scales)))
        latents, images, shown = self.faces(self.rng("latents", step), around)
        return Batch(images, self.rng("view", step), latents=latents, shown=shown)

    def feedback(self, batch: Batch, student: Output, teacher: Output) -> None:
        if self.resampling is None or batch.latents is None:
            return
        step = int(batch.rng.indices[0]) // self.place.batch_size
        judged = [F.normalize(seen.embedding.detach().float()) for seen in (student, teacher)]
        shown = batch.latents.new_ones(len(batch.latents)) if batch.shown is None else batch.shown.to(batch.latents)
        latents, student_rows, teacher_rows, faces = (gather(rows) for rows in (batch.latents, *judged, shown))
        self.resampling.learn(step, latents, student_rows, teacher_rows, faces)

    def held_out(self) -> Tensor:
        return self._aside("held out", self.place.held_out)

    def sample(self, count: int) -> Tensor:
        return self._aside("sample", count)

    def _aside(self, purpose: str, count: int) -> Tensor:
        chunks = torch.arange(count).split(128) if count else ()
        faces = [self.faces(Rng.of(self.place.seed, purpose, rows))[1] for rows in chunks]
        return torch.cat(faces).round().clamp(0, 255).byte().cpu() if faces else torch.empty(0, 3, 8, 8).byte()

    def record(self) -> dict[str, Any]:
        told = {"kind": "online", "real_faces": False, "framing": self.framing_known()}
        return told | ({"size": self.side} if self.landmarks else {}) | self.generator.provenance()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.resampling is None else self.resampling.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.resampling is None:
            super().load_state_dict(state)
        else:
            # What was kept lies where the faces are made: the next step reckons with it there, as it would have.
            self.resampling.load_state_dict({name: item.to(self.place.device) for name, item in state.items()})
