"""Distil a teacher into a student: ``accelerate launch distill/train.py --config distill/recipes/quickstart.yaml``.

Everything a run depends on is in its settings (`distill.settings.Run`); ``--print_config`` shows all of them. A run
that was stopped, however rudely, goes on when the same command is given again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from tqdm import tqdm

import faceless
from distill.checkpoints import Checkpoints, Metrics, check_same_record, check_same_settings
from distill.cohort import Cohort, alone
from distill.ensembles import FusedRecognizer, Nobody, load_teachers
from distill.finish import finish, load_benchmark, make_record, reals, student_record
from distill.global_norm import globalize
from distill.identities import stored
from distill.losses.base import FaceLoss
from distill.losses.cross_architecture import URFM, PromptGuard
from distill.losses.features import FeatureLoss
from distill.mixtures import MixtureSource
from distill.muon import Muon
from distill.objective import Objective
from distill.prompts import PromptedTeacher
from distill.settings import Optimizer, Run, Student
from distill.sources import Place, Rows
from distill.teachers import CachedTeacher, FrozenTeacher, MixedTeacher, StagedTeacher
from distill.validation import Validator
from faceless import processes
from faceless.errors import InputError, command
from faceless.files import atomic_write, check_folder
from faceless.randomness import Rng
from faceless.recognizer import Recognizer
from faceless.settings import Settings, parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Run] = parse(Run, arguments, program="distill/train.py", description=__doc__ or "")
    chain = links(settings)
    if len(chain) > 1:
        check_links(chain)
    for link in chain[:-1]:
        if not finished(link):
            train(link, more=True)
    train(chain[-1])


def links(settings: Settings[Run]) -> list[Settings[Run]]:
    """The runs of a chain, each with the student of the one before as its teacher; or the one run there is.

    Raises:
        InputError: a link names what is no key, or what the chain sets by itself.
    """
    plain = settings.asdict()
    if not (chain := plain["chain"]):
        return [seeded(settings)]
    found, teacher = [], plain["teacher"]
    for number, changes in enumerate(chain, 1):
        if odd := [key for key in changes if not isinstance(key, str)]:
            raise InputError(f"chain: link {number} has the key {odd[0]}; name dotted keys of the recipe")
        if taken := {"teacher", "output", "chain"} & {key.split(".")[0] for key in changes}:
            raise InputError(f"chain: link {number} sets {min(taken)}, which follows from the chain")
        if shared := {"precision", "device"} & set(changes):
            raise InputError(f"chain: link {number} sets {min(shared)}, which is one for the whole chain")
        output = plain["output"] if number == len(chain) else f"{plain['output']}/link-{number}"
        own = {"seed": plain["seed"] + number - 1} | changes  # generations start from other weights
        found.append(seeded(settings.changed(own | {"teacher": teacher, "output": output, "chain": None})))
        teacher = f"{output}/student"
    return found


def finished(link: Settings[Run]) -> bool:
    """Whether a link was trained before.

    Raises:
        InputError: it was, under other settings.
    """
    plain = link.asdict()
    folder = Path(plain["output"])
    if not (folder / "report.html").is_file():
        return False
    check_same_settings(folder / "settings.yaml", plain)
    return True


def check_links(chain: list[Settings[Run]]) -> None:
    """Build what each link that is still to train names, and show its losses its two networks, before the first trains.

    Raises:
        InputError: naming the link that would stop the chain, and why.
    """
    untrained: dict[str | None, Recognizer] = {}  # by where they are going to lie
    for number, link in enumerate(chain, 1):
        if finished(link):
            continue
        try:
            run = link.build()
            known = untrained.get(run.teacher) if isinstance(run.teacher, str) else None
            teacher = load_teachers(run.teacher)[-1] if known is None else known
            student = untrained.get(run.student.start)
            if student is None:
                if run.prompts is not None:
                    run.prompts.into(teacher)
                student = make_student(run, teacher)
                objective = make_objective(run, student, teacher)
                check_weights(run, objective)
                check_teacher(run, objective, teacher)
        except InputError as error:
            raise InputError(f"chain: link {number}: {error}") from error
        untrained[f"{run.output}/student"] = alone(student)


def seeded(settings: Settings[Run]) -> Settings[Run]:
    """Give the losses and prompts that name no seed that of the run, so that runs of other seeds draw other numbers."""
    plain = settings.asdict()
    nameless = unseeded({key: plain[key] for key in ("losses", "prompts")})
    return settings.changed(dict.fromkeys(nameless, plain["seed"]))


def unseeded(settings: dict[str, Any], above: str = "") -> Iterator[str]:
    """Dotted keys of the seeds that are null, however deep."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from unseeded(value, f"{above}{name}.")
        elif name == "seed" and value is None:
            yield f"{above}{name}"


def train(settings: Settings[Run], more: bool = False) -> Path:
    """Train, save, verify and report; returns the folder of the run.

    Args:
        more: these processes have another run to do after this one, which waits for it.
    """
    run = settings.build()
    output = Path(run.output)
    check_folder(output)
    check_same_settings(output / "settings.yaml", settings.asdict())
    accelerator = start(run)
    main_process, device = accelerator.is_main_process, accelerator.device

    # Whatever is wrong with the settings shows here, before any face is made.
    teacher_nets = load_teachers(run.teacher)
    teacher_net = teacher_nets[-1]
    prompts = None if run.prompts is None else run.prompts.into(teacher_net)
    student = make_student(run, teacher_net)
    untrained = copy.deepcopy(alone(student))
    objective = make_objective(run, student, teacher_net)
    objective.probe_stages(student, teacher_nets[:-1])
    objective.prompts = prompts  # which learn, are averaged over processes and are saved with it
    check_weights(run, objective)
    check_teacher(run, objective, teacher_net)
    benchmark = load_benchmark(run, teacher_net, accelerator)

    if notice := run.source.check_framing(teacher_net.spec.framing):
        accelerator.print(notice)
    if main_process:
        run.source.write()
    accelerator.wait_for_everyone()
    place = Place(
        run.seed,
        run.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        device,
        run.validation.faces,
        steps=run.steps,
    )
    run.source.prepare(place)
    check_labels(run, objective)
    if names := mirrored(run, objective):
        accelerator.print(
            f"losses.{names[0]} compares the student's maps of mirrored faces with the teacher's of unmirrored ones: "
            "set augment.flip to 0, or teacher_sees to view"
        )
    for reason in reals(run, untrained):
        accelerator.print(f"\n  REAL FACES: {reason}; the record of this run says so.\n")

    teacher = make_teacher(run, teacher_nets, objective, accelerator)
    identify(run, teacher, objective, accelerator)
    record = make_record(run, teacher_net, untrained, benchmark)
    check_same_record(output / "provenance.json", record)
    if main_process:  # only now: what was refused so far leaves no run behind
        atomic_write(output / "settings.yaml", settings.yaml())
        atomic_write(output / "provenance.json", json.dumps(record, indent=1, default=str) + "\n")
    student = globalize(student.to(device).to(memory_format=torch.channels_last), device)
    objective.to(device)
    objective.watch(student.parameters())
    average = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = make_optimizer(run.optimizer, [student, objective], objective.tables())
    run.source.watch(teacher_net, student)
    validator = Validator(run.validation, run.source.held_out(), teacher, objective, device)

    checkpoints = Checkpoints(output / "checkpoints", run.keep_checkpoints)
    step = 0
    stateful: dict[str, Any] = {
        "student": student,
        "average": average,
        "objective": objective,
        "optimizer": optimizer,
        "source": run.source,
    }
    if (saved := checkpoints.latest()) is not None:
        step = saved["step"]
        for name, part in stateful.items():
            with checkpoints.fitting(step, name):
                part.load_state_dict(saved[name])
        accelerator.print(f"resuming {output} at step {step}")
    trained, optimizer = accelerator.prepare(student, optimizer)
    if any(p.requires_grad for p in objective.parameters()):
        objective = accelerator.prepare_model(objective)
    bare_objective = accelerator.unwrap_model(objective)
    if run.compile:
        if run.adaptive is not None:  # gradients are taken more than once
            torch._functorch.config.donated_buffer = False
        trained = torch.compile(trained)
    if saved is not None and accelerator.scaler is not None:
        with checkpoints.fitting(step, "scaler"):
            accelerator.scaler.load_state_dict(saved["scaler"])

    metrics = Metrics(output / "metrics.jsonl", step) if main_process else None
    if run.tensorboard and step < run.steps:
        accelerator.init_trackers("tensorboard")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # The first step whose loss or gradient was not finite, kept on the device: looking costs a synchronisation.
    broken = torch.full((), -1, dtype=torch.int64, device=device)
    bar = tqdm(
        total=run.steps, initial=step, desc="distill", unit="step", disable=not accelerator.is_local_main_process
    )
    since, since_step = time.perf_counter(), step

    def save() -> None:
        stop_if_broken(broken, checkpoints, accelerator)
        if main_process:
            state = {name: part.state_dict() for name, part in stateful.items()}
            checkpoints.save(step, state | {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else {}})

    framing = teacher_net.spec.framing
    trained.train()
    objective.train()
    with bar:
        while step < run.steps:
            batch = run.source.batch(step)
            faces = batch.images.to(device, non_blocking=True)
            images = run.augment(faces, batch.rng)
            done = step / run.steps
            teacher.at(done)
            seen = teacher(images if run.teacher_sees == "view" else faces, batch)
            if run.degrade is not None:
                images = run.degrade(images, framing, batch.rng.child("student"), done)
            with accelerator.autocast():
                out = trained(images, features=bare_objective.student_features)
            if batch.landmarks is not None:
                moved = run.augment.points(batch.landmarks, batch.rng)
                out.features["landmarks"] = moved.to(device, non_blocking=True)
                kept = moved if run.teacher_sees == "view" else batch.landmarks
                seen.features["landmarks"] = kept.to(device, non_blocking=True)
            labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
            loss, terms = objective(out, seen, labels, batch.weights)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, run.optimizer.clip or math.inf)
            rate = learning_rate(run.optimizer, step, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            follow(average, student, run.ema, step)
            run.source.feedback(batch, *bare_objective.comparable(out, seen))
            healthy = loss.detach().isfinite()
            if accelerator.scaler is None and norm is not None:  # with fp16, steps of infinite gradients are skipped
                healthy = healthy & norm.isfinite()
            broken = torch.where((broken < 0) & ~healthy, step, broken)
            step += 1
            bar.update()

            if step % run.log_every == 0 or step == run.steps:
                loss, *values = accelerator.reduce(torch.stack([loss.detach(), *terms.values()]), "mean").tolist()
                stop_if_broken(broken, checkpoints, accelerator)
                now = time.perf_counter()
                speed = (step - since_step) * run.batch_size / (now - since)
                since, since_step = now, step
                named = dict(zip(terms, values))
                bar.set_postfix(loss=f"{loss:.3f}", faces_per_s=f"{speed:.0f}")
                entry = {"step": step, "loss": loss, "terms": named, "lr": rate, "faces_per_second": round(speed, 3)}
                if run.adaptive is not None:
                    entry["weights"] = bare_objective.weights_now()
                    named |= {f"weight/{name}": weight for name, weight in entry["weights"].items()}
                if metrics:
                    metrics.write(entry)
                accelerator.log({"loss": loss, "lr": rate, "faces_per_second": speed} | named, step=step)
            if run.validation.faces and (step % run.validation.every == 0 or step == run.steps):
                agreement = validator(average)
                if metrics:
                    metrics.write({"step": step, "validation": agreement})
                accelerator.log({f"validation/{name}": value for name, value in agreement.items()}, step=step)
                since, since_step = time.perf_counter(), step
            if run.snapshot_every and step % run.snapshot_every == 0 and main_process:
                current = average if run.ema else accelerator.unwrap_model(student)
                faceless.save(current, output / "snapshots" / f"step-{step:08d}", student_record(run, record))
            if step % run.checkpoint_every == 0 or step == run.steps:
                save()
    final = average if run.ema else accelerator.unwrap_model(student)
    accelerator.wait_for_everyone()
    if not more:
        accelerator.end_training()  # the processes part here
    if main_process:
        bare_objective.prompts = None  # they stay with the teacher, wherever the objective goes
        finish(run, output, record, teacher, final, untrained, bare_objective, benchmark)
    if more:
        accelerator.wait_for_everyone()
    return output


def start(run: Run) -> Accelerator:
    """Threads, device, precision and processes."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, and PyTorch sees no CUDA device: use device auto or cpu")
    cpu = run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available())
    cores = run.threads or len(os.sched_getaffinity(0))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(max(1, cores // max(1, local if cpu else 1)))
    if cpu:
        processes.keep_memory()
    precision = run.precision if run.precision != "auto" else native_precision(cpu)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with="tensorboard" if run.tensorboard else None,
        project_dir=run.output,
        kwargs_handlers=[
            # One process writes the corpus while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
            # Statistics and memories are the same everywhere by their own doing.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    if accelerator.num_processes > 1:
        accelerator.print(f"{accelerator.num_processes} processes on {accelerator.device.type}")
    set_seed(run.seed)  # initial weights; nothing later draws from the global state
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not run.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def native_precision(cpu: bool) -> str:
    """bf16 where the device computes it natively; emulated, it is several times slower than fp32."""
    if not cpu:
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, check, lambda: False)() for check in checks) else "fp32"


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


def make_objective(run: Run, student: Recognizer, teacher: Recognizer) -> Objective:
    """The weighted losses, checked against the two networks' dimensions before training starts."""
    objective = Objective(
        {name: term.loss for name, term in run.losses.items()},
        {name: term.weight for name, term in run.losses.items()},
        student_dim=student.embedding_dim,
        teacher_dim=teacher.embedding_dim,
        center=run.center,
        projection=run.projection,
        adaptive=run.adaptive,
        classifier=run.classifier,
    )
    objective.probe(student, teacher)
    for peer in range(len(run.peers or ())):
        if f"peers.{peer}" not in objective.student_features:
            raise InputError(f"peers: no loss reaches peer {peer + 1}; see distill.losses.mutual")
    return objective


def make_teacher(run: Run, nets: list[Recognizer], objective: Objective, accelerator: Accelerator) -> FrozenTeacher:
    """The frozen teacher, ready to be asked."""
    for net in nets:
        net.to(accelerator.device)
        if isinstance(net, FusedRecognizer):
            net.calibrate(run.source.sample(net.faces))
    stages = [make_stage(run, net, objective, accelerator) for net in nets]
    return stages[0] if len(stages) == 1 else StagedTeacher(stages)


def make_stage(run: Run, net: Recognizer, objective: Objective, accelerator: Accelerator) -> FrozenTeacher:
    """One network as a teacher; with a cache, filled here by all processes together."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if run.prompts is not None:
        return PromptedTeacher(net, dtype, objective.teacher_features)
    if run.teacher_cache is None:
        return FrozenTeacher(net, dtype, objective.teacher_features)
    sources = run.source.sources if isinstance(run.source, MixtureSource) else {"": run.source}
    recurring = {name: source for name, source in sources.items() if isinstance(source, Rows)}
    if not recurring:
        raise InputError(f"teacher_cache: {type(run.source).__name__} never shows a face twice; remove teacher_cache")
    augment = run.augment if run.teacher_sees == "view" else None
    hidden = not accelerator.is_local_main_process
    caches: dict[str, CachedTeacher] = {}
    for name, source in recurring.items():
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
    if objective.centering is not None and len(caches) == len(sources):
        shares = run.source.shares if isinstance(run.source, MixtureSource) else {"": 1.0}
        means = torch.stack([shares[name] * cache.mean() for name, cache in caches.items()])
        objective.centering.prime(means.sum(0))
    if isinstance(run.source, MixtureSource):
        return MixedTeacher(net, dtype, objective.teacher_features, caches)
    return caches[""]


def check_labels(run: Run, objective: Objective) -> None:
    """Compare the identities of the faces with what the losses need.

    Raises:
        InputError: naming the loss, or the setting, that does not fit.
    """
    name, source = type(run.source).__name__, run.source
    if objective.needs_labels and not source.labelled and run.pseudo_identities is None:
        raise InputError(
            f"losses.{objective.needs_labels[0]} needs labels, and {name} has none; "
            "for a corpus, pseudo_identities makes some"
        )
    if run.pseudo_identities is not None and not isinstance(source, Rows):
        raise InputError(f"pseudo_identities are clusters of the faces of one corpus, and {name} is none")
    classes = run.pseudo_identities or source.classes
    for term, loss in objective.terms():
        if loss.classes is not None and classes > loss.classes:
            raise InputError(f"losses.{term} is for {loss.classes} classes, and the faces have {classes} identities")
    if objective.needs_centers and not (isinstance(source, Rows) and run.teacher_cache is not None and classes > 1):
        wants = "classifier" if run.classifier is not None else "a loss of frozen centers"
        raise InputError(
            f"{wants} needs the mean teacher embedding of each identity: set teacher_cache, and a labelled source "
            "or pseudo_identities"
        )


def check_weights(run: Run, objective: Objective) -> None:
    """Compare the weights of the faces with what the losses can do.

    Raises:
        InputError: the source gives its faces weights, and a loss cannot take them.
    """
    for term, loss in objective.terms():
        if run.source.weighs and not isinstance(loss, FaceLoss):
            raise InputError(
                f"losses.{term}: {type(loss).__name__} is no mean over single faces, and cannot weight them as this "
                "source asks; use another loss, or set the source's correction to [0, 0]"
            )


def check_teacher(run: Run, objective: Objective, teacher: Recognizer) -> None:
    """Compare what the losses take the teacher for with what it is.

    Raises:
        InputError: naming the loss, or the setting, that does not fit.
    """
    pupils = []
    for name, loss in objective.terms():
        if isinstance(run.teacher, Nobody) and loss.needs_teacher:
            raise InputError(f"losses.{name}: {type(loss).__name__} learns from a teacher, and there is none")
        if isinstance(loss, URFM) and loss.framing != teacher.spec.framing:
            raise InputError(
                f"losses.{name}: framing is {loss.framing}, and the teacher knows {teacher.spec.framing} crops"
            )
        if isinstance(loss, PromptGuard) and run.adaptive is not None and run.adaptive.rule in ("matched", "literal"):
            raise InputError(
                f"adaptive.rule {run.adaptive.rule} follows gradients of the student, and losses.{name} has none: "
                "use magnitude or learned, or weights that stay"
            )
        if isinstance(loss, FeatureLoss) and loss.teacher_learns:
            pupils.append(name)
    if pupils and run.prompts is None:
        raise InputError(f"losses.{pupils[0]}: teacher_learns is for a teacher with prompts; set prompts")
    if run.prompts is not None and not pupils:
        raise InputError("prompts: no loss lets the teacher learn; set teacher_learns of URFM")


def mirrored(run: Run, objective: Objective) -> list[str]:
    """Losses between feature maps whose left is the teacher's right."""
    if run.teacher_sees == "view" or not run.augment.flip:
        return []
    return [name for name, loss in objective.terms() if loss.student_features and loss.teacher_features]


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


def make_optimizer(
    settings: Optimizer, modules: list[nn.Module], tables: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels only; not for ``tables`` of class centers, of which a step moves few."""
    apart = {id(p) for p in tables}
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({"params": list(tables), "weight_decay": 0.0, "table": True})
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    if settings.name == "muon":
        return Muon(groups, settings.lr, momentum=settings.momentum, betas=settings.betas)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then the schedule over the whole run.

    >>> settings = Optimizer(lr=1.0, warmup=10)
    >>> [round(learning_rate(settings, step, 1000), 3) for step in (0, 4, 500, 1000)]
    [0.1, 0.5, 0.505, 0.01]
    """
    done = min(1.0, step / steps)
    factor = 1.0
    if settings.schedule == "cosine":
        factor = settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2
    elif settings.schedule == "steps":
        factor = 0.1 ** sum(done >= milestone for milestone in settings.milestones)
    return settings.lr * factor * min(1.0, (step + 1) / max(1, settings.warmup))


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Move the running average a step towards the student; quickly at first, when the student changes quickly."""
    decay = min(decay, (1 + step) / (10 + step))
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    for a, b in zip(average.state_dict().values(), student.state_dict().values()):
        if a.is_floating_point():
            mine.append(a)
            theirs.append(b)
        else:
            a.copy_(b)
    torch._foreach_lerp_(mine, theirs, 1 - decay)


def stop_if_broken(broken: Tensor, checkpoints: Checkpoints, accelerator: Accelerator) -> None:
    """End the run when a loss was not finite.

    Raises:
        InputError: naming the step and the last good checkpoint.
    """
    # Any process's bad step stops all of them, so that none waits for the others.
    steps = [step for step in accelerator.gather(broken.reshape(1)).tolist() if step >= 0]
    if steps:
        paths = checkpoints.paths()
        kept = f"the last good checkpoint is {paths[-1]}" if paths else "there was no checkpoint yet"
        step = min(steps)
        raise InputError(
            f"step {step}: the loss or its gradient is not a finite number; {kept}; "
            f"lower optimizer.lr, raise optimizer.warmup or use precision fp32"
        )


if __name__ == "__main__":
    command(processes.spread)()
    command(main)()
