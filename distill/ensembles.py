"""Several recognizers in the place of one teacher, together or one after the other; or none at all."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import faceless
from distill.gather import processes
from faceless import align
from faceless.errors import InputError
from faceless.recognizer import InputSpec, Recognizer

CHUNK = 128  # faces per forward pass of a calibration


class Teachers(ABC):
    """What may stand where a recipe names its teacher; loaded when the run starts."""

    @abstractmethod
    def load(self) -> list[Recognizer]:
        """The networks that teach one after the other, in eval mode; the last is what the student is compared with."""


def load_teachers(teacher: str | Teachers) -> list[Recognizer]:
    """The networks of a recipe's ``teacher``: one for the whole run, or the stages of several.

    Raises:
        InputError: it cannot be loaded, or is a list, which does not say how its members come together.
    """
    if not isinstance(teacher, str):
        return teacher.load()
    if teacher.startswith("["):
        raise InputError(
            f"teacher is a list; for several at once use {{class_path: distill.ensembles.Ensemble, init_args: "
            f"{{members: {teacher}}}}}, for one after the other distill.ensembles.Snapshots with stages"
        )
    return [faceless.load(teacher)]


class Ensemble(Teachers):
    """Several recognizers, with inputs, framings and embedding dimensions of their own, that teach as one.

    Args:
        members: anything `faceless.load` takes, two or more. Faces come in the framing of the first.
        fusion: ``concatenate``, ``mean`` or ``von-mises-fisher``: see `Fusion`.
        center: subtract each member's mean embedding first. The recipe's own ``center`` is then not needed.
        by_norm: let the norm of a (centered) embedding say how sure its member is of the face, for von Mises-Fisher.
        weights: how concentrated each member is on the average, for von Mises-Fisher; None takes all for alike.
        embedding_dim: D of a concatenation, of which the principal directions are kept; None keeps all numbers.
        faces: how many faces of the source the members are aligned on, before training starts; as the run's teacher
            sees them.
    """

    def __init__(
        self,
        *,
        members: list[str],
        fusion: Literal["concatenate", "mean", "von-mises-fisher"] = "von-mises-fisher",
        center: bool = True,
        by_norm: bool = True,
        weights: list[float] | None = None,
        embedding_dim: int | None = None,
        faces: int = 1024,
    ):
        if len(members) < 2:
            raise InputError("teacher.members: an ensemble has two members or more; name a single teacher by itself")
        if weights is not None and (len(weights) != len(members) or not all(0 < w < math.inf for w in weights)):
            raise InputError(f"teacher.weights are {weights}; give each of {len(members)} members a positive one")
        if weights is not None and fusion != "von-mises-fisher":
            raise InputError(f"teacher.weights are for fusion von-mises-fisher; {fusion} takes all members for alike")
        if not by_norm and fusion != "von-mises-fisher":
            raise InputError(f"teacher.by_norm is for fusion von-mises-fisher; {fusion} goes by no norm")
        if embedding_dim is not None and (embedding_dim < 1 or fusion != "concatenate"):
            raise InputError(
                f"teacher.embedding_dim is {embedding_dim}: it is positive, and for fusion concatenate; others have "
                "that of their widest member"
            )
        if faces < 2:
            raise InputError(f"teacher.faces is {faces}; an ensemble is aligned on 2 faces or more")
        self.members, self.fusion, self.center, self.by_norm, self.faces = members, fusion, center, by_norm, faces
        self.weights, self.embedding_dim = weights, embedding_dim

    def load(self) -> list[Recognizer]:
        nets = [faceless.load(source) for source in self.members]
        fusion = Fusion(nets, self.fusion, self.center, self.by_norm, self.weights, self.embedding_dim)
        return [cast(Recognizer, FusedRecognizer(fusion, self.faces).eval())]


class Snapshots(Teachers):
    """One teacher at growing maturity, each stage for an equal part of the run.

    Multi-step distillation (Boutros et al.: PocketNet, IEEE Access 2022, section III-C): epoch e of the student is
    taught by the teacher as it was after its own epoch e.

    Args:
        stages: anything `faceless.load` takes, from the least to the most mature, all of one embedding dimension; or
            one folder of snapshots that a run with ``snapshot_every`` left, which are taken in the order of its steps.
    """

    def __init__(self, *, stages: list[str] | str):
        self.stages = stages

    def load(self) -> list[Recognizer]:
        stages = self.stages
        if isinstance(stages, str):
            if not Path(stages).is_dir():
                raise InputError(f"teacher.stages {stages}: no such folder; a run with snapshot_every makes one")
            if (Path(stages) / "snapshots").is_dir():
                raise InputError(f"teacher.stages {stages} is a run: name its folder {Path(stages) / 'snapshots'}")
            check_complete(Path(stages))
            stages = [str(path) for path in sorted(Path(stages).glob("step-*"))]
        if len(stages) < 2:
            raise InputError(f"teacher.stages {self.stages}: found {len(stages)} snapshots; two or more make steps")
        nets = [faceless.load(stage) for stage in stages]
        for stage, net in zip(stages, nets):
            if (net.embedding_dim, net.spec.framing) != (nets[-1].embedding_dim, nets[-1].spec.framing):
                raise InputError(f"teacher.stages: {stage} and {stages[-1]} differ in embedding dimension or framing")
        nets[-1].source["stages"] = [{key: net.source[key] for key in ("source", "sha256")} for net in nets]
        return nets


def snapshot_steps(every: int | None, steps: int) -> list[int]:
    """After which steps a run of so many keeps its student: every so many, and after the last.

    >>> snapshot_steps(300, 1000)
    [300, 600, 900, 1000]
    """
    return [] if every is None else [*range(every, steps, every), steps]


def check_complete(folder: Path) -> None:
    """Compare a run's folder of snapshots with the run's settings, which lie beside it; without these any will do.

    Raises:
        InputError: a snapshot is missing, as the run is not finished, or somebody took it away.
    """
    path = folder.parent / "settings.yaml"
    if not path.is_file():
        return
    try:
        settings = yaml.safe_load(path.read_text(errors="replace"))
        wanted = snapshot_steps(settings["snapshot_every"], settings["steps"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged; put it back, or list the snapshots in teacher.stages") from error
    missing = [step for step in wanted if not (folder / f"step-{step:08d}").is_dir()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(wanted)} snapshots, the first of step {missing[0]}: finish that "
            "run, or list those to take in teacher.stages"
        )


class Silence(nn.Module):
    """Says nothing of any face: ``[B, D]`` zeros."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.embedding_dim)


class Nobody(Teachers):
    """No teacher, for students that learn from labels and from each other.

    Args:
        embedding_dim: D of the student, unless it names one of its own.
        framing: of the faces, ``dlib`` or ``arcface``.
    """

    def __init__(self, *, embedding_dim: int = 128, framing: Literal["dlib", "arcface"] = "dlib"):
        self.embedding_dim, self.framing = embedding_dim, framing

    def load(self) -> list[Recognizer]:
        return [Recognizer(Silence(self.embedding_dim), InputSpec(framing=self.framing), name="nobody").eval()]


class Fit(nn.Module):
    """What calibration learns of one member: its mean, its mean norm, and the map to the reference."""

    mean: Tensor
    spread: Tensor
    turn: Tensor

    def __init__(self, dim: int, wide: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim), persistent=False)
        self.register_buffer("spread", torch.ones(()), persistent=False)
        self.register_buffer("turn", torch.eye(dim, wide), persistent=False)


class Fusion(nn.Module):
    """One embedding out of those of several recognizers.

    Each member's embedding is centered and normalized to ``u``, and mapped by ``R``, the orthogonal map that brings its
    unit embeddings closest to those of the member of the largest D (Procrustes; Schönemann, 1966).

    - ``concatenate``: all ``u`` side by side, divided by the root of their number: the cosine is the mean of theirs.
      With ``embedding_dim``, what they are along so many of their principal directions, which are orthogonal: of all
      maps to so few numbers the one that keeps most of their products. A learned map would distort them, as a student
      is deployed without it.
    - ``mean``: the mean of ``u R``, whose norm is 1 where the members agree.
    - ``von-mises-fisher``: each member says ``k u R``, the natural parameter of a von Mises-Fisher distribution, and
      their mean is that of the fused one: its direction is the target and its norm the concentration, small where
      members disagree or are not sure. BEA-KD (CVPR 2023) fuses so; its code and its way to ``k`` are not public, and
      its members share a classifier. Chosen here are the centering and ``R``, and that ``k`` is the member's weight, in
      parts of their sum, times the norm of this face's embedding over the mean norm (``by_norm``).

    Args:
        members: the recognizers; each resizes and normalizes for itself, and is shown faces in its own framing.
        how: as above.
        center, by_norm, weights, embedding_dim: see `Ensemble`.

    Shape:
        images ``[B, 3, H, W]`` in the framing of the first member; returns ``[B, D]``: the sum of all D, or
        ``embedding_dim``, when concatenated, else the largest.
    """

    concentration: Tensor
    basis: Tensor | None

    def __init__(
        self,
        members: Sequence[Recognizer],
        how: str,
        center: bool = True,
        by_norm: bool = True,
        weights: Sequence[float] | None = None,
        embedding_dim: int | None = None,
    ):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.how, self.center, self.by_norm = how, center, by_norm
        dims = [member.embedding_dim for member in members]
        self.reference = dims.index(max(dims))
        self.embedding_dim = sum(dims) if how == "concatenate" else max(dims)
        self.register_buffer("basis", None, persistent=False)
        if embedding_dim is not None:
            if embedding_dim > self.embedding_dim:
                raise InputError(f"teacher.embedding_dim is {embedding_dim}; the members have {self.embedding_dim}")
            self.basis = torch.eye(self.embedding_dim, embedding_dim)
            self.embedding_dim = embedding_dim
        self.framing = members[0].spec.framing
        self.fits = nn.ModuleList(Fit(dim, max(dims)) for dim in dims)
        shares = torch.tensor([1.0] * len(dims) if weights is None else list(weights))
        self.register_buffer("concentration", shares / shares.sum(), persistent=False)

    def ask(self, member: int, images: Tensor) -> Tensor:
        """Raw embeddings ``[B, D]`` of one member, in float32."""
        network = cast(Recognizer, self.members[member])
        if network.spec.framing != self.framing:
            images = align.reframe(images, self.framing, network.spec.framing, network.spec.height)
        embedding: Tensor = network(images).embedding
        return embedding.float()

    def forward(self, images: Tensor) -> Tensor:
        asked = [self.ask(i, images) for i in range(len(self.members))]
        with torch.autocast(images.device.type, enabled=False):
            rows = []
            for i, raw in enumerate(asked):
                fit = cast(Fit, self.fits[i])
                unit = F.normalize(raw - fit.mean)
                if self.how == "von-mises-fisher":
                    unit = self.concentration[i] * unit
                    if self.by_norm:
                        unit = unit * ((raw - fit.mean).norm(dim=1, keepdim=True) / fit.spread)
                rows.append(unit if self.how == "concatenate" else unit @ fit.turn)
            if self.how == "concatenate":
                wide = torch.cat(rows, 1) / len(rows) ** 0.5
                return wide if self.basis is None else wide @ self.basis
            total = torch.stack(rows).sum(0)
            return total if self.how == "von-mises-fisher" else total / len(rows)

    @torch.no_grad()
    def calibrate(self, faces: Tensor) -> None:
        """Learn each member's mean, norm and map from ``faces [N, 3, H, W]``.

        Raises:
            InputError: there are fewer faces than numbers in an embedding.
        """
        self.eval()  # batch statistics of a teacher are not to move
        dims = [cast(Recognizer, member).embedding_dim for member in self.members]
        aligned = self.how != "concatenate" or self.basis is not None
        if aligned and len(faces) < self.embedding_dim:
            raise InputError(
                f"{len(faces)} faces cannot align embeddings of {self.embedding_dim} numbers: raise teacher.faces, or "
                "take a source of more faces"
            )
        device, units = self.concentration.device, []
        for i in range(len(dims)):
            raw = torch.cat([self.ask(i, chunk.to(device)) for chunk in faces.split(CHUNK)]).double()
            mean = raw.mean(0) * self.center
            units.append(F.normalize(raw - mean))
            fit = cast(Fit, self.fits[i])
            fit.mean.copy_(mean)
            fit.spread.copy_((raw - mean).norm(dim=1).mean().clamp(min=1e-12))
        for i, unit in enumerate(units):
            if i != self.reference:
                left, _, right = torch.linalg.svd(unit.T @ units[self.reference], full_matrices=False)
                cast(Fit, self.fits[i]).turn.copy_(left @ right)
        if self.basis is not None:
            basis = torch.linalg.svd(torch.cat(units, 1), full_matrices=False)[2][: self.embedding_dim].T
            largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
            self.basis.copy_(basis * largest.sign())  # a direction has no sign of its own

    def share(self) -> None:
        """Take over what the first process learned in `calibrate`, to the bit."""
        if processes() > 1:
            for buffer in (*self.fits.buffers(), *([] if self.basis is None else [self.basis])):
                dist.broadcast(buffer, 0)


class FusedRecognizer(Recognizer):
    """A `Fusion` as a recognizer: it takes faces as they come, since its members prepare them for themselves.

    Args:
        fusion: of the members.
        faces: how many to calibrate it on.
    """

    def __init__(self, fusion: Fusion, faces: int):
        members = [cast(Recognizer, member) for member in fusion.members]
        side = max(max(member.spec.height, member.spec.width) for member in members)
        settings = {"fusion": fusion.how, "center": fusion.center, "by_norm": fusion.by_norm, "faces": faces}
        settings |= {"weights": fusion.concentration.tolist(), "embedding_dim": fusion.embedding_dim}
        known = [member.source.get("sha256") or member.name for member in members]
        digest = hashlib.sha256(json.dumps([known, settings]).encode()).hexdigest()
        named = [{"name": member.name, "embedding_dim": member.embedding_dim} | member.source for member in members]
        super().__init__(
            fusion,
            replace(members[0].spec, height=side, width=side),
            name="ensemble",
            source={"sha256": digest, "members": named} | settings,
        )
        self.faces = faces

    @property
    def fusion(self) -> Fusion:
        return cast(Fusion, self.backbone)

    def know(self, shown: Any) -> None:
        """Let the digest that caches and records go by name what `calibrate` is to see.

        Args:
            shown: which faces and what is done to them, in JSON. Not their pixels: those that a network generates, or
                an augmentation changes, differ in their last bits between devices.
        """
        self.source["sha256"] = hashlib.sha256(
            json.dumps([self.source["sha256"], shown], default=str).encode()
        ).hexdigest()

    def preprocess(self, images: Tensor) -> Tensor:
        return images
