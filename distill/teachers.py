"""Teachers: frozen recognizers, asked at every step or once beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.augment import Augment
from distill.sources import Batch, Rows
from faceless.errors import InputError
from faceless.files import atomic_path
from faceless.recognizer import Output, Recognizer

PART = 4096  # faces per file of a cache
CHUNK = 128  # faces per forward pass while a cache is filled; fixed, because its bits depend on it


class FrozenTeacher(nn.Module):
    """A recognizer that is asked about every batch.

    Args:
        recognizer: any; put in eval mode and frozen.
        autocast: dtype of its forward pass, None for float32.
        features: sub-modules of its backbone whose outputs are wanted too.
    """

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
        device = images.device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            out = self.recognizer(images, features=self.features)
        return Output(out.embedding.float(), None if out.logits is None else out.logits.float(), out.features)

    def forward(self, images: Tensor, batch: Batch) -> Output:
        return self.see(images)


class CachedTeacher(FrozenTeacher):
    """A teacher whose embeddings of every view of every face of a source are computed once and kept on disk.

    The cache is keyed by the teacher's weights, the faces, the augmentation, the seed and the number of views, and is
    written in parts of fixed size by all processes together: an interrupted filling goes on, and the numbers do not
    depend on who computed them.

    Args:
        recognizer, autocast: as in `FrozenTeacher`.
        folder: where caches are kept.
        source: whose faces; with ``augment`` it must have a fixed number of views.
        augment: the augmentation of the run, or None where the teacher sees the faces as they are: one view each.
        seed: of the run.
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
    ):
        super().__init__(recognizer, autocast)
        if augment is not None and source.views is None:
            raise InputError("teacher_cache needs source.init_args.views: how many views of each face are to be kept")
        self.source, self.augment = source, augment
        self.views = 1 if augment is None else source.views or 0
        key = {
            "teacher": recognizer.source.get("sha256") or recognizer.name,
            "faces": source.fingerprint(),
            "augment": None if augment is None else asdict(augment) | {"seed": seed},
            "size": source.size,
            "precision": str(autocast),
            "layout": 1,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"teacher-{digest}"
        self.parts = -(-source.size // PART)
        self._open: dict[tuple[int, int], np.ndarray] = {}

    def path(self, view: int, part: int) -> Path:
        return self.folder / f"view-{view:03d}" / f"part-{part:06d}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """``(view, part)`` of what is still to be computed."""
        return [
            (view, part)
            for view in range(self.views)
            for part in range(self.parts)
            if not self.path(view, part).is_file()
        ]

    def fill(self, rank: int, processes: int, device: torch.device, progress: Callable[[Iterable], Iterable]) -> None:
        """Compute this process's share of what is missing; call it in every process, then wait for all."""
        work = self.missing()[rank::processes]
        for view, part in progress(work):
            first = part * PART
            rows = torch.arange(first, min(first + PART, self.source.size))
            found = []
            for chunk in rows.split(CHUNK):
                faces = self.source.faces(chunk).to(device)
                if self.augment is not None:
                    faces = self.augment(faces, self.source.augmentation(chunk, view))
                found.append(self.see(faces).embedding.cpu())
            path = self.path(view, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, torch.cat(found).numpy(), allow_pickle=False)

    def mean(self) -> Tensor:
        """``[D]``: mean embedding over all cached views, float32."""
        total, count = torch.zeros(self.recognizer.embedding_dim, dtype=torch.float64), 0
        for view in range(self.views):
            for part in range(self.parts):
                block = torch.from_numpy(np.array(self._part(view, part)))
                total += block.double().sum(0)
                count += len(block)
        return (total / count).float()

    def _part(self, view: int, part: int) -> np.ndarray:
        if (view, part) not in self._open:
            path = self.path(view, part)
            try:
                block = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: damaged teacher cache ({error}); delete it and run again") from error
            rows = min(PART, self.source.size - part * PART)
            if block.shape != (rows, self.recognizer.embedding_dim) or block.dtype != np.float32:
                raise InputError(f"{path}: damaged teacher cache; delete it and run again")
            self._open[view, part] = block
        return self._open[view, part]

    def forward(self, images: Tensor, batch: Batch) -> Output:
        if batch.rows is None or batch.view is None:
            raise InputError("teacher_cache needs a source whose faces recur, such as CorpusSource")
        view = 0 if self.augment is None else batch.view
        found = torch.empty(len(batch.rows), self.recognizer.embedding_dim)
        where = batch.rows // PART
        for part in where.unique().tolist():
            chosen = where == part
            found[chosen] = torch.from_numpy(self._part(view, part)[(batch.rows[chosen] % PART).numpy()])
        return Output(found.to(images.device, non_blocking=True))
