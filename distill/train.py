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
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from tqdm import tqdm

import faceless
from distill.build import identify, make_objective, make_student, make_teacher
from distill.chain import check_links, finished, links
from distill.checkpoints import Checkpoints, Metrics, check_same_record, check_same_settings
from distill.checks import check_classes, check_labelled, check_run, mirrored
from distill.cohort import alone
from distill.ensembles import load_teachers, snapshot_steps
from distill.finish import finish, load_benchmark, make_record, reals, student_record
from distill.gather import equal_shares
from distill.global_norm import globalize
from distill.muon import Muon
from distill.settings import Optimizer, Run
from distill.sources import Place
from distill.validation import Validator
from faceless import processes
from faceless.devices import moved
from faceless.errors import InputError, command
from faceless.files import atomic_write, check_folder
from faceless.randomness import Rng
from faceless.settings import Settings, parse

PACE = 10.0  # of learned weights between losses, whose logarithms move by several units in a run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process."""
    settings: Settings[Run] = parse(Run, arguments, program="distill/train.py", description=__doc__ or "")
    chain = links(settings)
    if len(chain) > 1:
        check_links(chain)
    for link in chain[:-1]:
        if not finished(Path(link.asdict()["output"])):
            train(link, more=True)
    train(chain[-1])


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
    objective = make_objective(run, student, teacher_nets)
    objective.prompts = prompts  # which learn, are averaged over processes and are saved with it
    place = Place(
        run.seed,
        run.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        device,
        run.validation.faces,
        steps=run.steps,
    )
    check_run(run, objective, teacher_net, place)
    benchmark = load_benchmark(run, teacher_net, accelerator)

    if notice := run.source.check_framing(teacher_net.spec.framing):
        accelerator.print(notice)
    if main_process:
        run.source.write()
    accelerator.wait_for_everyone()
    run.source.prepare(place)
    check_labelled(run, objective, run.source.labelled)
    check_classes(run, objective)
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
    optimizer = make_optimizer(run.optimizer, [student, objective], objective.tables(), objective.learned_weights())
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
    del saved  # as large as all that was restored from it

    metrics = Metrics(output / "metrics.jsonl", step) if main_process else None
    if run.tensorboard and step < run.steps:
        accelerator.init_trackers("tensorboard")
    averaged = Average(average, student)  # after a checkpoint was read into both
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

    def tell(entry: dict[str, Any], figures: dict[str, Any]) -> None:
        if metrics:
            metrics.write({"step": step} | entry)
        accelerator.log(figures, step=step)

    framing = teacher_net.spec.framing
    kept = snapshot_steps(run.snapshot_every, run.steps)
    trained.train()
    objective.train()
    with bar:
        while step < run.steps:
            batch = run.source.batch(step)
            faces = moved(batch.images, device)
            images = run.augment(faces, batch.rng)
            done = step / run.steps
            teacher.at(done)
            seen = teacher(images if run.teacher_sees == "view" else faces, batch)
            if run.degrade is not None:
                images = run.degrade(images, framing, batch.rng.child("student"), done)
            # Dropout draws from the global state, which a resumed run would not know, nor another number of processes.
            torch.manual_seed(dropout_seed(run.seed, step, accelerator.process_index))
            out = trained(images, features=bare_objective.student_features)
            if batch.landmarks is not None:
                points = run.augment.points(batch.landmarks, batch.rng)
                out.features["landmarks"] = moved(points, device)
                known = points if run.teacher_sees == "view" else batch.landmarks
                seen.features["landmarks"] = moved(known, device)
            labels = None if batch.labels is None else moved(batch.labels, device)
            scattered = None if batch.scattered is None else moved(batch.scattered, device)
            with equal_shares():  # the source gives each process as many faces
                loss, terms = objective(out, seen, labels, batch.weights, scattered)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, run.optimizer.clip or math.inf)
            rate = learning_rate(run.optimizer, step, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("pace", 1.0)
            optimizer.step()
            optimizer.zero_grad()
            averaged.follow(run.ema, step)
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
                entry = {"loss": loss, "terms": named, "lr": rate, "faces_per_second": round(speed, 3)}
                if run.adaptive is not None:
                    entry["weights"] = bare_objective.weights_now()
                    named |= {f"weight/{name}": weight for name, weight in entry["weights"].items()}
                tell(entry, {"loss": loss, "lr": rate, "faces_per_second": speed} | named)
            if run.validation.faces and (step % run.validation.every == 0 or step == run.steps):
                agreement = validator(average)
                tell({"validation": agreement}, {f"validation/{name}": value for name, value in agreement.items()})
                since, since_step = time.perf_counter(), step
            if main_process and step in kept:
                current = average if run.ema else accelerator.unwrap_model(student)
                faceless.save(current, output / "snapshots" / f"step-{step:08d}", student_record(run, record))
            if step % run.checkpoint_every == 0 or step == run.steps:
                save()
    # Without the wrapper, which would have the finished student compute in the run's precision.
    final = average if run.ema else accelerator.unwrap_model(student, keep_fp32_wrapper=False)
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
    torch.set_num_threads(max(1, cores // max(1, local)))
    if cpu:
        processes.keep_memory()
    if run.precision == "fp16" and cpu:
        raise InputError("precision is fp16, which is for GPUs: use auto, bf16 or fp32 on a CPU")
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
    set_seed(run.seed)  # of initial weights; each step has a seed of its own, for dropout
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


def make_optimizer(
    settings: Optimizer,
    modules: list[nn.Module],
    tables: Sequence[nn.Parameter] = (),
    quick: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels only; not for ``tables`` of class centers, of which a step moves few.

    Args:
        quick: vectors that have far to go; where steps are normalized (not for sgd), they take steps `PACE` times as
            large.
    """
    apart = {id(p) for p in (*tables, *quick)}
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({"params": list(tables), "weight_decay": 0.0, "table": True})
    if quick:
        groups.append({"params": list(quick), "weight_decay": 0.0, "pace": 1.0 if settings.name == "sgd" else PACE})
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


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What the global state is set to before a step: the same after a resume, another in each process."""
    return int(Rng.of(seed, "dropout", [rank], step=step).integers(1 << 31, 1))


class Average:
    """The running average of a student: its tensors side by side, found once.

    Args:
        average, student: two copies of one network, whose tensors stay where they are.
    """

    def __init__(self, average: nn.Module, student: nn.Module):
        pairs = list(zip(average.state_dict().values(), student.state_dict().values()))
        moving = [(a, b) for a, b in pairs if a.is_floating_point()]
        self.mine, self.theirs = [a for a, _ in moving], [b for _, b in moving]
        self.counts = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def follow(self, decay: float, step: int) -> None:
        """Move a step towards the student; quickly at first, when the student changes quickly."""
        torch._foreach_lerp_(self.mine, self.theirs, 1 - min(decay, (1 + step) / (10 + step)))
        for a, b in self.counts:
            a.copy_(b)


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
