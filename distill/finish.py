"""The end of a run: the student's folder, the record, the verification and the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

import faceless
from distill.cohort import Cohort, alone
from distill.ensembles import Nobody
from distill.objective import Objective
from distill.settings import Run
from distill.teachers import FrozenTeacher
from eval import benchmarks, efficiency, report
from eval.benchmarks import Benchmark, conditions, parse_people, under
from eval.verify import crop_size, verify
from faceless import assets
from faceless.errors import InputError
from faceless.files import atomic_path, atomic_write
from faceless.recognizer import Output, Recognizer

SHOWN = 2048  # training faces looked at for the report
# Of the record, in the student's config.
TOLD = ("part", "share", "kind", "real_faces", "faces", "people", "generator", "licence", "identities_from")


def check_benchmark(run: Run) -> None:
    """What is wrong with the benchmark of a run, as far as its name and its conditions say it.

    Raises:
        InputError: naming the setting.
    """
    for condition in run.verification.conditions:
        conditions.check(condition)
    source = run.verification.benchmark
    if source is None:
        return
    if Path(source).suffix in (".bin", ".parquet") or source.partition(":")[0] in benchmarks.PROTOCOLS:
        raise InputError(
            f"verification.benchmark {source}: a run verifies on att-faces or a folder of people; take one of these or "
            f"null, and afterwards eval/verify.py --model {Path(run.output, 'student')} --benchmark {source}"
        )
    benchmarks.check_known(source)


def load_benchmark(run: Run, teacher: Recognizer, accelerator: Accelerator) -> Benchmark | None:
    """The benchmark of the run, made ready on one process first."""
    check_benchmark(run)
    source = run.verification.benchmark
    if source is None:
        return None
    with accelerator.main_process_first():
        # The pixels that eval/verify.py shows them, so that both say the same of a student.
        size = max(crop_size(teacher), run.student.input_size)
        benchmark = benchmarks.load(source, framing=teacher.spec.framing, size=size)
    people = int(benchmark.identities.max()) + 1
    trained = trained_on(run, people)
    subsets = run.verification.subsets()
    if trained and not subsets:
        raise InputError(f"the source trains on people of {benchmark.name}: set verification.people to others")
    for subset in subsets:
        try:
            chosen = parse_people(subset, people)
        except InputError as error:
            raise InputError(f"verification.people: {error}") from error
        both = trained & set(range(people)[chosen])
        if both:
            raise InputError(f"verification.people {subset} has person {min(both) + 1}, whom the source trains on")
    return benchmark


def trained_on(run: Run, people: int) -> set[int]:
    """Positions of the people of the benchmark, of whom there are so many, whose pictures the run trains on."""
    found: set[int] = set()
    for source, who in run.source.people():
        if Path(source).resolve() == Path(str(run.verification.benchmark)).resolve():
            found |= set(range(people)[slice(None) if who is None else parse_people(who, people)])
    return found


def finish(
    run: Run,
    output: Path,
    record: dict[str, Any],
    teacher: FrozenTeacher,
    student: Recognizer,
    before: Recognizer,
    objective: Objective,
    benchmark: Benchmark | None,
) -> None:
    """Write ``student/``, the record, a sample of faces, the verification and ``report.html``.

    Args:
        record: from `make_record`, of when training began.
        before: the student of then.
    """
    # Meanwhile more assets may have been used, for the verification.
    provenance = record | {"assets": assets.used()}
    atomic_write(output / "provenance.json", json.dumps(provenance, indent=1, default=str) + "\n")
    student = student.cpu().eval()
    for number, peer in enumerate(student.others() if isinstance(student, Cohort) else (), 1):
        faceless.save(peer, output / "peers" / str(number), student_record(run, record))
    student = alone(student)
    faceless.save(student, output / "student", student_record(run, record))
    save_faces(run, output, teacher, student, objective)
    if benchmark is not None:
        label = "untrained student" if run.student.start is None else "student before"
        models = {"teacher": teacher.recognizer.cpu(), "student": student, label: before.cpu().eval()}
        if isinstance(run.teacher, Nobody):
            del models["teacher"]
        verify_all(run, output, models, benchmark)
    page = report.write(output)
    print(f"student: {output / 'student'}\nreport:  {page}")


def teacher_record(teacher: Recognizer) -> dict[str, Any]:
    """Which network taught."""
    return {"name": teacher.name, "embedding_dim": teacher.embedding_dim} | teacher.source


def student_record(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """What of the run's record goes into a student's own config."""
    kept = {key: record[key] for key in ("teacher", "real_faces_in_training", "started_from") if key in record}
    return kept | {"training_faces": training_faces(run)}


def training_faces(run: Run) -> list[dict[str, Any]]:
    """What kind of faces came from each place, and how many; goes into the student's own config."""
    found = []
    for record in run.source.records():
        generator = record.get("manifest", {}).get("generator")  # of a corpus; other sources say it themselves
        told = record if generator is None else generator | record
        found.append({key: told[key] for key in TOLD if key in told})
    return found


def reals(run: Run, before: Recognizer) -> list[str]:
    """Why this is a run of real faces, if it is one.

    Args:
        before: the student as training finds it.
    """
    reasons = ["this run trains on pictures of real people"] if run.source.real else []
    if run.student.start is not None:
        told = before.source.get("record", {}).get("real_faces_in_training")
        if told is not False:  # what is not on record may be
            known = "was trained on real people" if told else "has no record of what it was trained on"
            reasons.append(f"this run goes on from {run.student.start}, which {known}")
    return reasons


def make_record(run: Run, teacher: Recognizer, before: Recognizer, benchmark: Benchmark | None) -> dict[str, Any]:
    """Where every training face came from, who taught, what the student was before, and under what licences."""
    more: dict[str, Any] = {}
    if run.student.start is not None:
        more["started_from"] = {"name": before.name} | before.source
    if benchmark is not None and (people := trained_on(run, len(benchmark.names))):
        names = [benchmark.names[i] for i in sorted(people)]
        more["split"] = {"trained_on": names, "verified_on": run.verification.subsets()}
    if run.degrade is not None:
        more["degrade"] = asdict(run.degrade)
    if reasons := reals(run, before):
        more["real_faces_because"] = reasons
    return {
        "faceless": faceless.__version__,
        "torch": torch.__version__,
        "real_faces_in_training": bool(reasons),
        "sources": run.source.records(),
        "teacher": teacher_record(teacher),
        "augment": asdict(run.augment),
        "benchmark": None if benchmark is None else benchmark.record,
        "assets": assets.used(),
    } | more


def save_faces(run: Run, output: Path, teacher: FrozenTeacher, student: Recognizer, objective: Objective) -> None:
    """A sample of training faces, the hardest disagreements first, for the report; of people only if asked for.

    Without a teacher there is nothing to disagree with, and none.
    """
    source = run.source
    if isinstance(run.teacher, Nobody):
        return
    faces = source.sample(SHOWN) if run.show_real_faces or not source.real else source.generated(SHOWN)
    if not len(faces):
        return
    device = next(teacher.parameters()).device
    objective.cpu()
    disagreement = []
    for chunk in faces.split(128):
        with torch.inference_mode():
            out, seen = student(chunk), teacher.see(chunk.to(device))
            s, t = objective.comparable(Output(out.embedding), Output(seen.embedding.cpu()))
            disagreement.append(1 - F.cosine_similarity(s.embedding.float(), t.embedding.float()))
    scores = torch.cat(disagreement)
    order = scores.argsort(descending=True, stable=True)
    # The hardest, and an even sample of the rest to compare them with.
    keep = torch.cat((order[:32], order[32:][:: max(1, (len(order) - 32) // 32)][:32]))
    with atomic_path(output / "faces.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, images=faces[keep].numpy(), disagreement=scores[keep].numpy())


def verify_all(run: Run, output: Path, models: dict[str, Recognizer], benchmark: Benchmark) -> None:
    """Verify each model on all people and on each subset, measure what it costs, and print the table."""
    chosen = run.verification
    people = int(benchmark.identities.max()) + 1
    # People who were trained on are not verified on; without such, everybody comes first.
    subsets = {} if trained_on(run, people) else {"all": benchmark}
    subsets |= {name: benchmark.subset(parse_people(name, people)) for name in chosen.subsets()}
    whose = list(subsets)
    for condition in chosen.conditions:
        worse = under(benchmark, condition)
        for name in whose:
            some = worse if name == "all" else worse.subset(parse_people(name, people))
            subsets[f"{name} {condition}"] = some
    costs = {label: efficiency.measure(model) for label, model in models.items()}
    known: dict[str, dict[bytes, np.ndarray]] = {label: {} for label in models}
    results: dict[str, list[dict[str, Any]]] = {}
    scores: dict[str, np.ndarray] = {}
    for name, faces in subsets.items():
        results[name] = []
        for label, model in models.items():
            # Other runs ask the same teacher about the same faces; one with prompts has them from this run.
            cache = label == "teacher" and run.prompts is None
            found = verify(model, faces, chosen.flip, chosen.bootstrap, seed=run.seed, cache=cache, known=known[label])
            results[name].append({"label": label} | found.summary() | {"efficiency": costs[label]})
            if name == next(iter(subsets)):
                scores |= {f"{label}/{key}": array for key, array in found.arrays().items()}
    with atomic_path(output / "scores.npz") as path, path.open("wb") as file:
        np.savez_compressed(file, **scores)  # type: ignore[arg-type]
    verification = {"benchmark": benchmark.name, "flip": chosen.flip, "subsets": results}
    atomic_write(output / "verification.json", json.dumps(verification, indent=1) + "\n")
    show(benchmark.name, results)


def show(benchmark: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the figures of all models as a table."""
    table = Table(title=f"{benchmark}: rates in percent", title_justify="left")
    for column in ("people", "model", "EER", "TAR@1e-2", "TAR@1e-3", "rank-1", "params", "MACs", "MB", "ms/face"):
        table.add_column(column, justify="left" if column in ("people", "model") else "right")
    for subset, rows in results.items():
        for row in rows:
            cost = row["efficiency"]
            rates = [row["eer"], row["tar_at_far"]["1e-2"], row["tar_at_far"]["1e-3"], row["rank1"]]
            table.add_row(
                subset,
                row["label"],
                *(f"{100 * rate:.2f}" for rate in rates),
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{cost['macs'] / 1e6:.0f} M",
                f"{cost['megabytes']['fp32']:.1f}",
                f"{cost['latency_ms']['batch1']['median']:.1f}",
            )
        table.add_section()
    # Wide enough for all columns where output goes to a file; a terminal wraps as it likes.
    Console(width=None if Console().is_terminal else 120).print(table)
