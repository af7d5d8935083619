"""The typed settings of a run: everything a run depends on, and nothing that it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from distill.augment import Augment, Degrade
from distill.ensembles import Nobody, Snapshots, Teachers
from distill.losses.base import Loss
from distill.objective import Adaptive, Classifier
from distill.prompts import Prompts
from distill.sources import Source
from faceless.errors import InputError


@dataclass
class Student:
    """The network to train.

    Args:
        name: an architecture of `faceless.names`.
        embedding_dim: D of the student; None takes the teacher's. Another D is projected to the teacher's during
            training (see `Run.projection`).
        input_size: side of the student's input in pixels.
        options: further arguments of `faceless.create`.
        start: a trained recognizer (anything `faceless.load` takes) to go on from, instead of fresh weights. It brings
            its architecture along: the other keys are left out, or as in it.
    """

    name: str = "mobilefacenet"
    embedding_dim: int | None = None
    input_size: int = 112
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None


@dataclass
class Term:
    """One loss and its weight in the sum.

    Args:
        loss: the loss.
        weight: its weight.
        scattered: for a loss of labels: count the faces only that came by themselves, and not those that a source with
            ``scattered`` groups shows together (EKD's classes). Null counts all.
    """

    loss: Loss
    weight: float = 1.0
    scattered: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise InputError(
                f"losses: the weight of {type(self.loss).__name__} is {self.weight}; it is a number from 0"
            )


@dataclass
class Optimizer:
    """How weights move.

    Args:
        name: ``muon`` (learns from the fewest faces; lr about 0.02), ``adamw``, ``adam`` or ``sgd`` (Nesterov).
        lr: at the end of the warm-up, for the whole batch over all processes.
        weight_decay: not applied to biases and normalisation weights.
        momentum: of SGD and Muon.
        betas: of Adam and AdamW.
        warmup: steps of linear growth from zero.
        schedule: ``cosine`` down to ``final`` times lr, ``constant``, or ``steps`` (a tenth at each of ``milestones``).
        milestones: fractions of the run, for ``steps``.
        clip: largest gradient norm; 0 switches clipping off.
    """

    name: Literal["muon", "adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 100
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    final: float = 0.01
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup < 0 or self.clip < 0 or self.weight_decay < 0:
            raise InputError("optimizer: lr must be positive; warmup, clip and weight_decay cannot be negative")
        if not all(0 <= decay < 1 for decay in (self.momentum, *self.betas)):
            raise InputError("optimizer: momentum and betas must be at least 0 and below 1")


@dataclass
class Validation:
    """Faces of the source that are kept out of training, on which student and teacher are compared along the way.

    Args:
        faces: how many; 0 switches validation off.
        every: steps between two validations.
        neighbors: k of the neighborhood agreement.
    """

    faces: int = 1024
    every: int = 500
    neighbors: int = 10

    def __post_init__(self) -> None:
        if self.faces < 0 or self.every < 1 or self.neighbors < 1:
            raise InputError("validation: faces cannot be negative; every and neighbors must be at least 1")


@dataclass
class Verification:
    """What the finished student, its teacher and an untrained student are verified on.

    Args:
        benchmark: ``att-faces``, or a folder of square crops with one sub-folder for each person; None skips
            verification. Protocols (``.bin``, ``ijbc:`` and the like) are for ``eval/verify.py``, when the run is done.
        flip: add the embedding of the mirrored face.
        bootstrap: replicates for the intervals.
        people: subsets to report besides all people, such as ``21-40``; None takes those of att-faces whom nothing here
            was tuned on, 21-40, and none of other benchmarks.
        conditions: worse conditions under which they are verified too, such as ``28px``, ``masked`` or
            ``masked/clean`` (see `eval.benchmarks.conditions`).
    """

    benchmark: str | None = "att-faces"
    flip: bool = False
    bootstrap: int = 1000
    people: list[str] | None = None
    conditions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.bootstrap < 0:
            raise InputError(f"verification.bootstrap is {self.bootstrap}; it cannot be negative")

    def subsets(self) -> list[str]:
        """The subsets of people to report besides all."""
        if self.people is None:
            return ["21-40"] if self.benchmark == "att-faces" else []
        return self.people


@dataclass
class Run:
    """A distillation run.

    Args:
        teacher: anything `faceless.load` takes, or several of them (see `distill.ensembles`).
        source: where the faces of a step come from.
        losses: named terms of the objective.
        output: folder of the run; an existing one of the same settings is resumed.
        student: the network to train.
        peers: further students that train along, for mutual learning (see `distill.losses.mutual`).
        chain: train several students, each taught by the one before, and the first by ``teacher``: for each the dotted
            keys in which it differs from this recipe. Links before the last have the seed plus 1000, 2000, ... unless
            they name one. All but the last, which is the run's, are whole runs of their own in ``output/link-1``,
            ``output/link-2``, and so on.
        snapshot_every: keep the student as it is every so many steps, and at the end, in ``output/snapshots``; null
            keeps none.
        augment: what is done to the faces that teacher and student see.
        teacher_sees: ``view``: the augmented face that the student sees; or ``face``: the face before augmentation,
            so that the student learns to see through the augmentation.
        degrade: what only the student's copy of a view suffers: resolution, masks, occlusion; null for nothing.
        teacher_cache: folder to keep the teacher's embeddings of all views of a fixed set of faces in, so that it runs
            once per view instead of once per step; None asks it at every step. Views need the source's ``views``.
            Feature maps that losses want are kept beside them.
        prompts: learnable tokens in a Transformer teacher, for losses that let it learn; null leaves it as it is.
        pseudo_identities: label the faces of a corpus by that many clusters of their cached teacher embeddings, for
            losses that need labels.
        classifier: give student and teacher scores over the identities, for losses that need logits.
        adaptive: let the weights of the losses follow the sizes of their gradients; null keeps them.
        center: subtract the teacher's mean embedding from its embeddings before any loss.
        projection: how a student of another D meets the teacher: ``linear`` (trained along, dropped at the end), or
            ``none`` (an error).
        optimizer: how weights move.
        steps, batch_size: length of the run, and faces per step over all processes.
        ema: decay of the running average of the student that is saved and verified; 0 saves the last weights.
        seed: of initial weights, the order of faces, latents and augmentation, and of what losses and prompts draw that
            name no seed of their own.
        precision: ``auto`` takes bf16 where the device computes it natively, else fp32.
        device: ``auto`` takes a GPU when there is one.
        compile: let torch.compile fuse the student.
        threads: CPU threads of all processes of this machine together; 0 takes all cores.
        log_every, checkpoint_every: steps.
        keep_checkpoints: how many of the latest stay.
        validation, verification: comparisons along the way and at the end.
        tensorboard: write TensorBoard events to ``output/tensorboard`` too.
        deterministic: on a GPU, take slower algorithms that give the same bits every time, as those of CPUs do.
        show_real_faces: let the report show training faces of real people too.
    """

    teacher: str | Teachers
    source: Source
    losses: dict[str, Term]
    output: str = "runs/run"
    student: Student = field(default_factory=Student)
    peers: list[Student] | None = None
    chain: list[dict[str, Any]] | None = None
    snapshot_every: int | None = None
    augment: Augment = field(default_factory=Augment)
    teacher_sees: Literal["view", "face"] = "view"
    degrade: Degrade | None = None
    teacher_cache: str | None = None
    prompts: Prompts | None = None
    pseudo_identities: int | None = None
    classifier: Classifier | None = None
    adaptive: Adaptive | None = None
    center: bool = False
    projection: Literal["linear", "none"] = "linear"
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 10_000
    batch_size: int = 128
    ema: float = 0.99
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    threads: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    validation: Validation = field(default_factory=Validation)
    verification: Verification = field(default_factory=Verification)
    tensorboard: bool = True
    deterministic: bool = False
    show_real_faces: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2^32 - 1")
        if self.threads < 0:
            raise InputError(f"threads is {self.threads}; use 0 for all cores, or 1 and more")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; it must be at least 0 and below 1")
        if self.pseudo_identities is not None and (self.pseudo_identities < 2 or self.teacher_cache is None):
            raise InputError("pseudo_identities is the number of clusters, 2 or more, and needs teacher_cache")
        if any(peer.start is not None for peer in self.peers or ()):
            raise InputError("peers: a peer starts from fresh weights; leave out its start")
        if self.snapshot_every is not None and self.snapshot_every < 1:
            raise InputError(f"snapshot_every is {self.snapshot_every}; it must be at least 1, or null")
        if isinstance(self.teacher, Snapshots) and self.center and self.teacher_cache is None:
            raise InputError(
                "center: each snapshot has its own mean, which teacher_cache finds: name one, or use false"
            )
        if isinstance(self.teacher, Nobody) and (self.validation.faces or self.pseudo_identities or self.teacher_cache):
            raise InputError(
                "there is no teacher: set validation.faces to 0, and leave out pseudo_identities and teacher_cache"
            )
        if isinstance(self.teacher, Nobody) and self.center:
            raise InputError("there is no teacher: set center to false, as there is no mean to take away")
        if self.prompts is not None and not isinstance(self.teacher, str):
            raise InputError("prompts are for one Transformer: name one network as teacher")
        if self.prompts is not None and self.teacher_cache is not None:
            raise InputError("prompts change the teacher at every step: remove teacher_cache")
        if not self.losses:
            raise InputError("losses is empty; name at least one loss, for example losses.cosine")
