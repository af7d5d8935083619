"""A chain of runs: assistants, generations. Each link is a run, taught by the student of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.build import make_objective, make_student
from distill.checkpoints import check_same_settings, read_record
from distill.checks import check_run
from distill.cohort import alone
from distill.ensembles import load_teachers
from distill.finish import check_benchmark, teacher_record
from distill.settings import Run
from distill.sources import Place
from faceless.errors import InputError
from faceless.recognizer import Recognizer
from faceless.settings import Settings, dotted


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
        # Generations start from other weights, and chains of neighboring seeds have no link in common.
        own = {"seed": (plain["seed"] + 1000 * (len(chain) - number)) % 2**32} | changes
        try:
            found.append(seeded(settings.changed(own | {"teacher": teacher, "output": output, "chain": None})))
        except InputError as error:
            raise InputError(f"chain: link {number}: {error}") from error
        teacher = f"{output}/student"
    return found


def finished(run: Path) -> bool:
    """Whether the run in a folder has come to its end, of which the report is the last thing."""
    return (run / "report.html").is_file()


def check_links(chain: list[Settings[Run]]) -> None:
    """Build what each link that is still to train names, and show its losses its two networks, before the first trains.

    Raises:
        InputError: naming the link that would stop the chain, and why.
    """
    untrained: dict[str | None, Recognizer] = {}  # by where they are going to lie
    for number, link in enumerate(chain, 1):
        try:
            run = link.build()
            check_same_settings(Path(run.output) / "settings.yaml", link.asdict())
            if finished(Path(run.output)):
                check_same_teacher(run)
                continue
            check_benchmark(run)
            known = untrained.get(run.teacher) if isinstance(run.teacher, str) else None
            teachers = load_teachers(run.teacher) if known is None else [known]
            teacher = teachers[-1]
            student = untrained.get(run.student.start)
            if student is None:
                if run.prompts is not None:
                    run.prompts.into(teacher)
                student = make_student(run, teacher)
                objective = make_objective(run, student, teachers)
                place = Place(run.seed, run.batch_size, held_out=run.validation.faces, steps=run.steps)
                check_run(run, objective, teacher, place)
        except InputError as error:
            raise InputError(f"chain: link {number}: {error}" if len(chain) > 1 else str(error)) from error
        untrained[f"{run.output}/student"] = alone(student)


def check_same_teacher(run: Run) -> None:
    """Compare the teacher of a link that was trained before with that of its record, if it is still there.

    Raises:
        InputError: it is another one by now, so that the rest of the chain would not be what its settings say.
    """
    try:
        teacher = teacher_record(load_teachers(run.teacher)[-1])
    except InputError:
        return
    path = Path(run.output) / "provenance.json"
    record = read_record(path)
    if digests(record.get("teacher")) != digests(teacher):
        raise InputError(
            f"{path} names another teacher than there is now, by its contents: put the old one back, or delete "
            f"{run.output}, or choose another output"
        )


def digests(teacher: Any) -> list[Any]:
    """Those of the networks behind a teacher of a record."""
    networks = teacher.get("members") or teacher.get("stages") or [teacher] if isinstance(teacher, dict) else []
    return [network.get("sha256") if isinstance(network, dict) else None for network in networks]


def seeded(settings: Settings[Run]) -> Settings[Run]:
    """Give the losses and prompts that name no seed that of the run, so that runs of other seeds draw other numbers."""
    plain = settings.asdict()
    found = dotted({key: plain[key] for key in ("losses", "prompts")})
    nameless = [key for key, value in found if key.split(".")[-1] == "seed" and value is None]
    return settings.changed(dict.fromkeys(nameless, plain["seed"]))
