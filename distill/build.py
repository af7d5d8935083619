"""The networks and the objective that a run's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import faceless
from distill.cohort import Cohort
from distill.ensembles import FusedRecognizer, Nobody
from distill.identities import stored
from distill.mixtures import MixtureSource, recurring
from distill.objective import Objective
from distill.prompts import PromptedTeacher
from distill.settings import Run, Student
from distill.sources import Rows
from distill.teachers import CachedTeacher, FrozenTeacher, MixedTeacher, StagedTeacher
from faceless.errors import InputError
from faceless.randomness import Rng
from faceless.recognizer import Recognizer


def make_student(run: Run, teacher: Recognizer) -> Recognizer:
    """The student, with its peers if it has some."""
    wanted = [run.student, *(run.peers or [])]
    # Peers of one architecture must not start as one network.
    seeds = [run.seed, *Rng.of(run.seed, "peers", range(1, len(wanted))).integers(1 << 31, 1).flatten().tolist()]
    student, *peers = (make_network(one, teacher, seed) for one, seed in zip(wanted, seeds))
    return Cohort(student, peers) if peers else student


def make_network(wanted: Student, teacher: Recognizer, seed: int) -> Recognizer:
    """A student, framed as its teacher is: both see the same crops."""
    if wanted.start is not None:
        return load_start(wanted, teacher)
    return faceless.create(
        wanted.name,
        embedding_dim=teacher.embedding_dim if wanted.embedding_dim is None else wanted.embedding_dim,
        input_size=wanted.input_size,
        framing=teacher.spec.framing,
        seed=seed,
        **wanted.options,
    )


def load_start(wanted: Student, teacher: Recognizer) -> Recognizer:
    """The trained recognizer to go on from.

    Raises:
        InputError: it is not what the settings of the student describe, or saw other crops than the teacher.
    """
    student = faceless.load(wanted.start or "")
    plain = Student()
    found = {"name": student.name, "embedding_dim": student.embedding_dim, "input_size": student.spec.height}
    for key, value in found.items():
        if getattr(wanted, key) not in (value, getattr(plain, key)):
            raise InputError(
                f"student.{key} is {getattr(wanted, key)}, and that of {wanted.start} is {value}: leave it out"
            )
    if any(student.options.get(key) != value for key, value in wanted.options.items()):
        raise InputError(f"student.options are not those of {wanted.start}: leave them out")
    framings = {student.spec.framing, teacher.spec.framing} - {None}
    if len(framings) > 1:
        raise InputError(
            f"{wanted.start} was trained on faces framed for {student.spec.framing}, and the teacher on "
            f"{teacher.spec.framing}: both see the same crops; start from another student"
        )
    return student


def make_objective(run: Run, student: Recognizer, teachers: Sequence[Recognizer]) -> Objective:
    """The weighted losses, checked against what student and teachers say before training starts.

    Args:
        teachers: those of all stages; the last is the one that all adapters are built for.
    """
    *stages, teacher = teachers
    peers = [peer.embedding_dim for peer in student.others()] if isinstance(student, Cohort) else []
    nobody = isinstance(run.teacher, Nobody)  # nowhere to project to
    objective = Objective(
        {name: term.loss for name, term in run.losses.items()},
        {name: term.weight for name, term in run.losses.items()},
        student_dim=student.embedding_dim,
        teacher_dim=student.embedding_dim if nobody else teacher.embedding_dim,
        peer_dims=[] if nobody else peers,
        center=run.center,
        projection=run.projection,
        adaptive=run.adaptive,
        classifier=run.classifier,
        scattered=[name for name, term in run.losses.items() if term.scattered],
    )
    objective.probe(student, teacher)
    for number, stage in enumerate(stages, 1):
        objective.probe(student, stage, f"teacher of stage {number}", build=False)
    for peer in range(len(run.peers or ())):
        if f"peers.{peer}" not in objective.student_features:
            raise InputError(f"peers: no loss reaches peer {peer + 1}; see distill.losses.mutual")
    return objective


def make_teacher(run: Run, nets: list[Recognizer], objective: Objective, accelerator: Accelerator) -> FrozenTeacher:
    """The frozen teacher, ready to be asked."""
    for net in nets:
        if isinstance(net, FusedRecognizer):
            calibrate(run, net, accelerator.is_main_process)
        net.to(accelerator.device)
        if isinstance(net, FusedRecognizer):
            net.fusion.share()
    stages, means = [], []
    for number, net in enumerate(nets, 1):
        stages.append(make_stage(run, net, objective, accelerator))
        if len(nets) > 1 and objective.centering is not None:
            if not objective.centering.primed:
                raise InputError(f"center: not all faces recur, so the mean of stage {number} is unknown: use false")
            means.append(objective.centering.mean.to(accelerator.device, copy=True))
    # The objective takes the last stage's mean away.
    shifts = [means[-1] - mean for mean in means]
    return stages[0] if len(stages) == 1 else StagedTeacher(stages, shifts)


def calibrate(run: Run, net: FusedRecognizer, learn: bool) -> None:
    """Show an ensemble faces as the run is going to; on the CPU, so that a run may go on with other devices.

    Args:
        learn: whether this process learns from them; all others take over what it learned.
    """
    augment = run.augment if run.teacher_sees == "view" else None  # faces that are blurred have another mean
    # Corpora show the same faces whatever the seed.
    told = [
        {key: record[key] for key in ("fingerprint", "faces", "share") if key in record}
        if "fingerprint" in record
        else [run.seed, record]
        for record in run.source.records()
    ]
    net.know([told, None if augment is None else [run.seed, asdict(augment)]])
    if learn:
        faces = run.source.sample(net.faces)
        if augment is not None:
            faces = augment(faces, Rng.of(run.seed, "calibration", range(len(faces))))
        net.fusion.calibrate(faces)


def make_stage(run: Run, net: Recognizer, objective: Objective, accelerator: Accelerator) -> FrozenTeacher:
    """One network as a teacher; with a cache, filled here by all processes together."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if run.prompts is not None:
        return PromptedTeacher(net, dtype, objective.teacher_features)
    if run.teacher_cache is None:
        return FrozenTeacher(net, dtype, objective.teacher_features)
    augment = run.augment if run.teacher_sees == "view" else None
    hidden = not accelerator.is_local_main_process
    caches: dict[str, CachedTeacher] = {}
    for name, source in recurring(run.source).items():
        caches[name] = CachedTeacher(
            net,
            dtype,
            folder=Path(run.teacher_cache),
            source=source,
            augment=augment,
            seed=run.seed,
            features=objective.teacher_features,
        )
        caches[name].fill(
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.device,
            lambda work: tqdm(work, desc="teacher", unit="part", disable=hidden or not work),
        )
    accelerator.wait_for_everyone()
    shares = run.source.shares if isinstance(run.source, MixtureSource) else {"": 1.0}
    if objective.centering is not None and len(caches) == len(shares):
        means = torch.stack([shares[name] * cache.mean() for name, cache in caches.items()])
        objective.centering.prime(means.sum(0))
    if isinstance(run.source, MixtureSource):
        return MixedTeacher(net, dtype, objective.teacher_features, caches)
    return caches[""]


def identify(run: Run, teacher: FrozenTeacher, objective: Objective, accelerator: Accelerator) -> None:
    """Give the faces pseudo-identities, and the objective the mean teacher embedding of each identity, as wanted."""
    source, teacher = run.source, teacher.stages[-1] if isinstance(teacher, StagedTeacher) else teacher
    if not isinstance(source, Rows) or not isinstance(teacher, CachedTeacher):
        return
    mean = None if objective.centering is None else objective.centering.mean
    if run.pseudo_identities is not None:
        kind = "plain" if mean is None else "centered"
        path = teacher.folder / f"identities-{run.pseudo_identities}-{kind}-seed{run.seed}.npy"
        with accelerator.main_process_first():
            labels = stored(path, lambda: centered(teacher, mean), run.pseudo_identities, run.seed)
        # Faces that are held out have none.
        source.label(torch.cat((labels, labels.new_full((source.total() - source.size,), -1))))
    if objective.needs_centers:
        assert source.labels is not None
        objective.prime(teacher.class_centers(source.labels[: source.size], source.classes, mean))


def centered(teacher: CachedTeacher, mean: Tensor | None) -> Tensor:
    """``[size, D]``: cached embeddings, less their mean if there is one."""
    embeddings = teacher.embeddings()
    return embeddings if mean is None else embeddings.sub_(mean)
