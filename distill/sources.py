"""Where the faces of a training step come from.

Everything random in a batch depends only on ``(seed, purpose, step, sample index)``. A source knows the process it runs
in and hands out that process's share of the global batch.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
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
from faceless import align
from faceless.errors import InputError, suggest
from faceless.files import sha256
from faceless.randomness import Rng, permutation
from faceless.recognizer import MAX_SIDE, Output, Recognizer, resize
from faceless.settings import recipe
from mining.resampling import Around, Resampling
from synth.corpus import Corpus
from synth.generators.base import Generator

CPU = torch.device("cpu")


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
    """

    images: Tensor
    rng: Rng
    labels: Tensor | None = None
    rows: Tensor | None = None
    view: int | None = None
    latents: Tensor | None = None


@dataclass
class Place:
    """Where a source works: which process of how many, on what device, for which run."""

    seed: int = 0
    batch_size: int = 128
    rank: int = 0
    processes: int = 1
    device: torch.device = CPU
    held_out: int = 0
    piece: slice | None = None

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
    """

    labelled = False
    classes = 0
    real = False

    def people(self) -> list[tuple[str, str | None]]:
        """Whose pictures it trains on, known before `prepare`: benchmarks or folders, and which people of each."""
        return []

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
        views: how many augmented views of each face there are; epoch e shows view e modulo ``views``. None draws a new
            view in every epoch. A teacher cache needs a number.
        in_memory: keep the decoded faces in memory.
    """

    def __init__(self, *, views: int | None = None, in_memory: bool = False):
        if views is not None and views < 1:
            raise InputError(f"views is {views}; use 1 or more, or null for a new view in every epoch")
        self.views = views
        self.in_memory = in_memory
        self.labels: Tensor | None = None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._memory: Tensor | None = None
        self._reader: ThreadPoolExecutor | None = None

    @abstractmethod
    def total(self) -> int:
        """Faces, held-out ones included."""

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """``[n, 3, H, W]`` uint8 faces by row number."""

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
        self._reader = ThreadPoolExecutor(1, "faces")
        if self.labels is not None:
            self.label(self.labels)
        if self.in_memory:
            chunks = torch.arange(self.total()).split(1024)
            self._memory = torch.cat([self.read(rows) for rows in chunks])

    def name(self) -> str:
        return type(self).__name__

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
        """Rows ``[B]`` and epochs ``[B]`` of this process's samples of a step."""
        samples = torch.arange(step * self.place.batch_size, (step + 1) * self.place.batch_size)[self.place.share()]
        epochs = samples // self.size
        rows = torch.empty_like(samples)
        for epoch in epochs.unique().tolist():
            if self._order[0] != epoch:
                self._order = (epoch, permutation(self.place.seed, "order", self.size, epoch))
            chosen = epochs == epoch
            rows[chosen] = self._order[1][samples[chosen] % self.size]
        return rows, epochs

    def augmentation(self, rows: Tensor, view: int) -> Rng:
        """What the augmentation of a view of these rows is drawn from."""
        return Rng.of(self.place.seed, "view", rows, step=view)

    def batch(self, step: int) -> Batch:
        if self._reader is None:
            raise RuntimeError("prepare the source first")
        rows, epochs = self.position(step)
        ahead = self._ahead
        images = ahead[1].result() if ahead is not None and ahead[0] == step else self.faces(rows)
        # The next batch is read while this one is computed with.
        self._ahead = (step + 1, self._reader.submit(self.faces, self.position(step + 1)[0]))
        # A batch across the end of an epoch belongs to the view that it begins in: one view per batch.
        epoch = int(epochs[0])
        view = epoch if self.views is None else epoch % self.views
        labels = None if self.labels is None else self.labels[rows]
        return Batch(images, self.augmentation(rows, view), labels, rows, view)

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
        views, in_memory: see `Rows`.
    """

    def __init__(
        self,
        *,
        path: str,
        recipe: str | None = None,
        faces: int | None = None,
        labels: str | None = None,
        views: int | None = None,
        in_memory: bool = False,
    ):
        super().__init__(views=views, in_memory=in_memory)
        self.path, self.recipe, self.limit, self.label_file = path, recipe, faces, labels

    def name(self) -> str:
        return str(self.path)

    def write(self) -> None:
        if self.recipe is not None:
            from synth.generate import generate, read_settings

            generate(read_settings(["--config", str(recipe(self.recipe)), "--output", self.path]))
        # The record of the run names these faces by the hashes in the manifest.
        Corpus(self.path).verify()

    def prepare(self, place: Place) -> None:
        self.corpus = Corpus(self.path)
        self.real = bool(self.corpus.manifest.get("real_faces", True))
        if self.label_file is not None:
            self.labels = read_labels(Path(self.label_file))[: self.total()]
        elif "identity" in self.corpus.columns:
            self.labels = torch.as_tensor(self.corpus.column("identity"), dtype=torch.int64)[: self.total()]
        super().prepare(place)

    def total(self) -> int:
        return len(self.corpus) if self.limit is None else min(self.limit, len(self.corpus))

    def read(self, rows: Tensor) -> Tensor:
        return self.corpus.images(rows)

    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def record(self) -> dict[str, Any]:
        return {"kind": "corpus", "path": str(self.path), "faces": self.size, "manifest": self.corpus.manifest}


def read_labels(path: Path) -> Tensor:
    """``[rows]`` whole numbers from a ``.npy`` file."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy file of labels ({error})") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"{path}: labels are one whole number for each face, these are {found.dtype} {found.shape}")
    return torch.from_numpy(found.astype(np.int64))


class FolderSource(Rows):
    """Real faces: a folder with one sub-folder per identity. A run that uses it says so loudly.

    Args:
        path: the folder, or the name of a benchmark such as ``att-faces``.
        people: train on these only, such as ``1-20``; a run refuses to verify on any of them. None takes all.
        framing, size: how and to what side faces are aligned (see `faceless.align`).
        aligned: whether the images are crops of that framing already.
        views, in_memory: see `Rows`.
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
    ):
        super().__init__(views=views, in_memory=True)
        self.path, self.chosen, self.framing, self.side, self.aligned = path, people, framing, size, aligned

    def name(self) -> str:
        return str(self.path)

    def prepare(self, place: Place) -> None:
        self.benchmark = benchmarks.load(self.path, self.framing, self.side, align=not self.aligned)
        if self.chosen is not None:
            everybody = len(self.benchmark.names)
            self.benchmark = self.benchmark.subset(benchmarks.parse_people(self.chosen, everybody))
        self.labels = self.benchmark.identities
        super().prepare(place)

    def people(self) -> list[tuple[str, str | None]]:
        return [(self.path, self.chosen)]

    def total(self) -> int:
        return len(self.benchmark.images)

    def read(self, rows: Tensor) -> Tensor:
        return self.benchmark.images[rows]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.benchmark.images.numpy().tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        names = list(self.benchmark.names)
        split = {} if self.chosen is None else {"people": self.chosen, "identities": names}
        return {"kind": "folder", "path": str(self.path), "faces": self.size, "real_faces": True} | split


class ParquetSource(Rows):
    """Faces in anybody's parquet files, such as those of a Hugging Face dataset; real ones unless told otherwise.

    Args:
        path: a file, or a folder of ``.parquet`` files, which are read in the order of their names.
        image: column of PNG, JPEG, WEBP or BMP files: bytes, or records with ``bytes``.
        label: column that says whose face it is, by number or name; None for faces without labels.
        size: side to which faces are resized; they must be aligned crops already.
        real: whether they are of real people. A run that trains on real faces says so loudly.
        views, in_memory: see `Rows`.
    """

    def __init__(
        self,
        *,
        path: str,
        image: str = "image",
        label: str | None = "label",
        size: int = 112,
        real: bool = True,
        views: int | None = None,
        in_memory: bool = False,
    ):
        super().__init__(views=views, in_memory=in_memory)
        if not 16 <= size <= MAX_SIDE:
            raise InputError(f"size is {size}; use 16 to {MAX_SIDE} pixels")
        self.path, self.image, self.label_column, self.side, self.real = path, image, label, size, real

    def name(self) -> str:
        return str(self.path)

    def prepare(self, place: Place) -> None:
        folder = Path(self.path)
        self.files = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
        if not self.files:
            raise InputError(f"{folder}: holds no .parquet files")
        wanted = [self.image] + ([] if self.label_column is None else [self.label_column])
        tables = [self._table(file, wanted) for file in self.files]
        self.encoded = pa.chunked_array([chunk for table in tables for chunk in table[self.image].chunks])
        if self.label_column is not None:
            whose = [name for table in tables for name in table[self.label_column].to_pylist()]
            numbers = {name: number for number, name in enumerate(sorted(set(whose) - {None}))}
            self.labels = torch.tensor([numbers.get(name, -1) for name in whose])
        super().prepare(place)

    @staticmethod
    def _table(file: Path, columns: list[str]) -> pa.Table:
        try:
            parquet = pq.ParquetFile(file, memory_map=True)
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                near = suggest(min(missing), parquet.schema_arrow.names)
                raise InputError(f"{file}: has no column {min(missing)!r}; {near}")
            return parquet.read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable parquet file ({error})") from error

    def total(self) -> int:
        return len(self.encoded)

    def read(self, rows: Tensor) -> Tensor:
        return torch.stack([self._decode(row) for row in rows.tolist()])

    def _decode(self, row: int) -> Tensor:
        value: Any = self.encoded[row].as_py()
        data: Any = value.get("bytes") if isinstance(value, dict) else value
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                if max(image.size) > MAX_SIDE:  # known from the header, before anything is decoded
                    raise InputError(f"{self.path}: the image of row {row} is {image.size[0]} x {image.size[1]}")
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.path}: column {self.image!r} of row {row} holds no readable image") from error
        face = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return resize(face.float(), self.side, self.side)[0].round().clamp(0, 255).byte()

    def fingerprint(self) -> str:
        return hashlib.sha256("".join([*map(sha256, self.files), str(self.side)]).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        return {"kind": "parquet", "path": str(self.path), "faces": self.size, "real_faces": self.real}


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
        self.generator, self.resampling = generator, resampling
        self.landmarks, self.framing, self.side = landmarks, framing, size
        self.detect_size, self.tries = detect_size, tries

    def prepare(self, place: Place) -> None:
        self.place = place
        place.share()
        self.generator.to(place.device)

    def rng(self, purpose: str, step: int) -> Rng:
        samples = torch.arange(step * self.place.batch_size, (step + 1) * self.place.batch_size)
        return Rng.of(self.place.seed, purpose, samples[self.place.share()], step=0)

    @torch.no_grad()
    def faces(self, rng: Rng, around: Around | None = None) -> tuple[Tensor, Tensor]:
        """Latents and their faces; the first ones are drawn ``around`` given latents, the others afresh."""
        count, device = len(rng), self.place.device
        revisited = 0 if around is None else len(around.centers)

        def draw(which: Tensor, attempt: int) -> Tensor:
            numbers = rng.rows(which).child(str(attempt))
            again = which < revisited
            parts = []
            if around is not None and again.any():
                rows = which[again].to(device)
                near = numbers.rows(again).child("around")
                parts.append(self.generator.perturb(around.centers[rows], around.scales[rows], near))
            if not again.all():
                parts.append(self.generator.sample_latents(int((~again).sum()), numbers.rows(~again)).to(device))
            return torch.cat(parts)

        latents = draw(torch.arange(count), 0)
        if not self.landmarks:
            return latents, self.generator.synthesize(latents)
        crops = torch.zeros(count, 3, self.side, self.side)
        open_rows = torch.arange(count)
        for attempt in range(self.tries):
            if attempt:
                latents[open_rows.to(device)] = draw(open_rows, attempt)
            images = self.generator.synthesize(latents[open_rows.to(device)]).round().clamp(0, 255).byte().cpu()
            found = align.detect(images, detect_size=self.detect_size, landmark_size=2 * self.side)
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
        return latents, crops.to(device)

    def batch(self, step: int) -> Batch:
        around = None
        if self.resampling is not None:
            planned = self.resampling.plan(step, self.place.batch_size, self.place.seed)
            if planned is not None:
                share, device = self.place.share(), self.place.device
                around = Around(planned.centers[share].to(device), planned.scales[share].to(device))
        latents, images = self.faces(self.rng("latents", step), around)
        return Batch(images, self.rng("view", step), latents=latents)

    def feedback(self, batch: Batch, student: Output, teacher: Output) -> None:
        if self.resampling is None or batch.latents is None:
            return
        step = int(batch.rng.indices[0]) // self.place.batch_size
        judged = [F.normalize(seen.embedding.detach().float()) for seen in (student, teacher)]
        self.resampling.learn(step, gather(batch.latents), *(gather(rows) for rows in judged))

    def held_out(self) -> Tensor:
        return self._aside("held out", self.place.held_out)

    def sample(self, count: int) -> Tensor:
        return self._aside("sample", count)

    def _aside(self, purpose: str, count: int) -> Tensor:
        chunks = torch.arange(count).split(128) if count else ()
        faces = [self.faces(Rng.of(self.place.seed, purpose, rows))[1] for rows in chunks]
        return torch.cat(faces).round().clamp(0, 255).byte().cpu() if faces else torch.empty(0, 3, 8, 8).byte()

    def record(self) -> dict[str, Any]:
        return {"kind": "online", "real_faces": False} | self.generator.provenance()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.resampling is None else self.resampling.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.resampling is None:
            super().load_state_dict(state)
        else:
            self.resampling.load_state_dict(state)
