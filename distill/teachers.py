"""Teachers: frozen recognizers, asked at every step, or once beforehand, or both in a mixture."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.augment import Augment
from distill.losses.margin import check_labels
from distill.mixtures import MixedBatch
from distill.sources import Batch, Rows
from faceless.devices import moved
from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.recognizer import Output, Recognizer

PART = 4096  # faces per file of a cache
OPEN = 256  # files of a cache that are open at once; many systems allow 1,024
CHUNK = 128  # faces per forward pass while a cache is filled; fixed, because its bits depend on it


class FrozenTeacher(nn.Module):
    """A recognizer that is asked about every batch.

    Args:
        recognizer: any; put in eval mode and frozen.
        autocast: dtype of its forward pass, None for float32.
        features: sub-modules of its backbone whose outputs are wanted too.

    Attributes:
        learns: whether its answers change while the run goes.
    """

    learns = False

    def __init__(self, recognizer: Recognizer, autocast: torch.dtype | None = None, features: tuple[str, ...] = ()):
        super().__init__()
        self.features = features
        self.recognizer = recognizer.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.autocast = autocast

    def train(self, mode: bool = True) -> FrozenTeacher:
        """A teacher stays in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def see(self, images: Tensor) -> Output:
        """What the teacher says about ``images [B, 3, H, W]``, in float32."""
        return self.look(images)

    def look(self, images: Tensor) -> Output:
        """The same with gradient for those parameters that want it; see `distill.prompts`."""
        device = images.device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            out = self.recognizer(images, features=self.features)
        return Output(out.embedding.float(), None if out.logits is None else out.logits.float(), out.features)

    def at(self, done: float) -> None:
        """Learn how much of the run is behind, as a share."""

    def forward(self, images: Tensor, batch: Batch) -> Output:
        return self.see(images)


class StagedTeacher(FrozenTeacher):
    """Teachers one after the other, each for an equal part of the run.

    Outside of training (`see`) the last one answers.

    Args:
        stages: from the first to the last.
        shifts: ``[D]`` for each stage, added to its embeddings: what brings its mean to that of the last; or none.
    """

    def __init__(self, stages: Sequence[FrozenTeacher], shifts: Sequence[Tensor] = ()):
        last = stages[-1]
        super().__init__(last.recognizer, last.autocast, last.features)
        self.stages = tuple(stages)  # no sub-modules: the last is one already
        self.shifts = tuple(shifts)
        self.now = 0

    def at(self, done: float) -> None:
        self.now = min(int(done * len(self.stages)), len(self.stages) - 1)

    def forward(self, images: Tensor, batch: Batch) -> Output:
        answer: Output = self.stages[self.now](images, batch)
        if self.shifts:
            answer = replace(answer, embedding=answer.embedding + self.shifts[self.now].to(answer.embedding))
        return answer


class CachedTeacher(FrozenTeacher):
    """A teacher whose embeddings of every view of every face of a source are computed once and kept on disk.

    The cache is keyed by the teacher's weights, the faces, the augmentation, the seed and the number of views, and is
    written in parts of fixed size by all processes together: an interrupted filling goes on, and the numbers do not
    depend on who computed them. Features, if any are wanted, lie beside the embeddings in folders of their own, so that
    runs with and without them share the embeddings.

    Args:
        recognizer, autocast: as in `FrozenTeacher`.
        folder: where caches are kept.
        source: whose faces; with ``augment`` it must have a fixed number of views.
        augment: the augmentation of the run, or None where the teacher sees the faces as they are: one view each.
        seed: of the run.
        features: as in `FrozenTeacher`; kept as float32.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        autocast: torch.dtype | None,
        *,
        folder: Path,
        source: Rows,
        augment: Augment | None,
        seed: int,
        features: tuple[str, ...] = (),
    ):
        super().__init__(recognizer, autocast, features)
        check_views(source, augmented=augment is not None)
        self.source, self.augment = source, augment
        self.views = 1 if augment is None else source.views or 0
        key = {
            "teacher": recognizer.source.get("sha256") or recognizer.name,
            "faces": source.fingerprint,
            "augment": None if augment is None else asdict(augment) | {"seed": seed},
            "size": source.size,
            "precision": str(autocast),
            "layout": 1,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"teacher-{digest}"
        self.parts = -(-source.size // PART)
        self._open: OrderedDict[tuple[int, int, str], np.ndarray] = OrderedDict()  # the latest

    def path(self, view: int, part: int, feature: str = "") -> Path:
        """Where the embeddings, or the named features, of a part of a view lie."""
        folder = self.folder / f"feature-{feature}" if feature else self.folder
        return folder / f"view-{view:03d}" / f"part-{part:06d}.npy"

    def missing(self, rank: int = 0, processes: int = 1) -> list[tuple[int, int]]:
        """``(view, part)`` of what a process is still to compute; what is whose does not depend on what is there."""
        everything = [(view, part) for view in range(self.views) for part in range(self.parts)]
        return [
            (view, part)
            for view, part in everything[rank::processes]
            if not all(self.path(view, part, name).is_file() for name in ("", *self.features))
        ]

    def fill(self, rank: int, processes: int, device: torch.device, progress: Callable[[Iterable], Iterable]) -> None:
        """Compute this process's share of what is missing; call it in every process, then wait for all."""
        for view, part in progress(self.missing(rank, processes)):
            first = part * PART
            rows = torch.arange(first, min(first + PART, self.source.size))
            found: dict[str, list[Tensor]] = {name: [] for name in ("", *self.features)}
            for chunk in rows.split(CHUNK):
                faces = self.source.faces(chunk).to(device)
                if self.augment is not None:
                    faces = self.augment(faces, self.source.augmentation(chunk, view))
                seen = self.see(faces)
                for name, values in found.items():
                    values.append((seen.features[name].float() if name else seen.embedding).cpu())
            for name, values in found.items():
                path = self.path(view, part, name)
                if path.is_file():
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, torch.cat(values).contiguous().numpy(), allow_pickle=False)

    def mean(self) -> Tensor:
        """``[D]``: mean embedding over all cached views, float32."""
        total, count = torch.zeros(self.recognizer.embedding_dim, dtype=torch.float64), 0
        for view in range(self.views):
            for part in range(self.parts):
                block = torch.from_numpy(np.array(self._part(view, part)))
                total += block.double().sum(0)
                count += len(block)
        return (total / count).float()

    def embeddings(self) -> Tensor:
        """``[size, D]``: the cached embeddings of the first view."""
        return torch.cat([torch.from_numpy(np.array(self._part(0, part))) for part in range(self.parts)])

    def class_centers(self, labels: Tensor, classes: int, mean: Tensor | None = None) -> Tensor:
        """``[classes, D]``: mean unit embedding of each class over all views; zero for a class without a face.

        Args:
            labels: ``[size]``, -1 for faces that do not count.
            mean: ``[D]``, subtracted from the embeddings first.
        """
        check_labels(labels, classes)
        sums = torch.zeros(classes, self.recognizer.embedding_dim)
        for view in range(self.views):
            for part in range(self.parts):
                block = torch.from_numpy(np.array(self._part(view, part)))
                own = labels[part * PART : part * PART + len(block)]
                unit = F.normalize(block if mean is None else block - mean)
                sums.index_add_(0, own[own >= 0], unit[own >= 0])
        counts = torch.bincount(labels[labels >= 0], minlength=classes).clamp(min=1) * self.views
        return sums / counts.unsqueeze(1)

    def _part(self, view: int, part: int, feature: str = "") -> np.ndarray:
        key = view, part, feature
        if key not in self._open:
            path = self.path(*key)
            try:
                block = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise InputError(f"{path}: damaged teacher cache ({error}); delete it and run again") from error
            rows = min(PART, self.source.size - part * PART)
            expected = (rows, *block.shape[1:]) if feature else (rows, self.recognizer.embedding_dim)
            if block.shape != expected or block.dtype != np.float32:
                raise InputError(f"{path}: damaged teacher cache; delete it and run again")
            self._open[key] = block
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def forward(self, images: Tensor, batch: Batch) -> Output:
        if batch.rows is None or batch.view is None:
            raise InputError("teacher_cache needs a source whose faces recur, such as CorpusSource")
        view = 0 if self.augment is None else batch.view
        found = {name: moved(self._rows(view, batch.rows, name), images.device) for name in self.features}
        return Output(moved(self._rows(view, batch.rows), images.device), features=found)

    def _rows(self, view: int, rows: Tensor, feature: str = "") -> Tensor:
        where = rows // PART
        found: Tensor | None = None
        for part in where.unique().tolist():
            chosen = where == part
            block = torch.from_numpy(self._part(view, part, feature)[(rows[chosen] % PART).numpy()])
            if found is None:
                found = torch.empty(len(rows), *block.shape[1:])
            found[chosen] = block
        assert found is not None
        return found


def check_views(source: Rows, augmented: bool) -> None:
    """Refuse to keep the answers to views of which there is no end.

    Raises:
        InputError: the teacher sees augmented faces, and a source draws new views in every epoch.
    """
    if augmented and source.views is None:
        raise InputError("teacher_cache needs source.init_args.views: how many views of each face are to be kept")


class MixedTeacher(FrozenTeacher):
    """A teacher for a mixture: cached where faces recur, asked at every step where they do not.

    Args:
        recognizer, autocast, features: as in `FrozenTeacher`.
        cached: caches by name of the part; the other parts' faces are shown to the recognizer.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        autocast: torch.dtype | None,
        features: tuple[str, ...],
        cached: Mapping[str, CachedTeacher],
    ):
        super().__init__(recognizer, autocast, features)
        self.cached = dict(cached)  # no sub-modules: they share the recognizer

    def forward(self, images: Tensor, batch: Batch) -> Output:
        if not isinstance(batch, MixedBatch):
            raise InputError("this teacher is for batches of a MixtureSource")
        outputs, places = [], []
        for name, (where, part) in batch.parts.items():
            where = moved(where, images.device)
            teacher = self.cached.get(name)
            outputs.append(self.see(images[where]) if teacher is None else teacher(images[where], part))
            places.append(where)
        order = torch.cat(places).argsort()

        def mixed(rows: list[Tensor]) -> Tensor:
            return torch.cat([x.float() for x in rows])[order]

        features = {name: mixed([out.features[name] for out in outputs]) for name in self.features}
        logits = [out.logits for out in outputs if out.logits is not None]
        return Output(
            mixed([out.embedding for out in outputs]), mixed(logits) if len(logits) == len(outputs) else None, features
        )
