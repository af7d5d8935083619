"""What are faces worth that come from nothing but a teacher? Students of each kind at equal steps, in one table.

    python scripts/data_free.py

makes a teacher with batch statistics (``distill/recipes/bn_teacher.yaml``) unless it is there; corpora of noise, of
DeepInversion and of the DCGAN; trains one student from each of them, one with DAFL and one with FastDFKD, which make
their faces on the way; and writes into the output folder ``data_free.md`` (AT&T people 21 to 40, seconds per 1,000
faces), ``sheets/``, a contact sheet of each, and the first lines of these in ``data_free.png``. A command that was
stopped, however rudely, goes on when it is given again; what is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faceless
from distill.build import make_network
from distill.settings import Run
from distill.sources import Place
from distill.synthesis import SynthesisSource
from faceless.errors import InputError, command
from faceless.files import atomic_path, atomic_write
from faceless.settings import ROOT, parse
from scripts import ablate
from synth.generate import generate, read_settings

CORPORA = ("noise", "deep_inversion", "dcgan")
ONLINE = ("dafl", "fast")
SMALL = '{"stem": "space2depth", "widths": [32, 64, 128], "depths": [2, 2, 2], "head": "flat"}'
NAMES = {
    "noise": "noise",
    "deep_inversion": "DeepInversion",
    "dafl": "DAFL",
    "fast": "FastDFKD",
    "dcgan": "DCGAN (trained on rendered faces)",
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/data_free")
    parser.add_argument(
        "--teacher", default="runs/bn_teacher/student", help="made by --teacher-recipe if it is missing"
    )
    parser.add_argument("--teacher-recipe", default="distill/recipes/bn_teacher.yaml")
    parser.add_argument("--teacher-steps", type=int, default=700, help="of 128 faces, if it is made here")
    parser.add_argument("--side", type=int, default=48, help="of what the students see, and a teacher made here")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="students that are trained at the same time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--faces", type=int, default=1024, help="of DeepInversion")
    parser.add_argument("--inversion-steps", type=int, default=160, help="half of them at half the side")
    parser.add_argument("--cheap-faces", type=int, default=20_000, help="of noise, and of the DCGAN")
    parser.add_argument("--timed-rounds", type=int, default=4, help="rounds and batches of faces that are timed")
    parser.add_argument("--benchmark", default="att-faces")
    parser.add_argument("--people", default="21-40")
    parser.add_argument("--student", default=SMALL, type=json.loads, help="JSON: options of the student")
    return parser


def settings_of(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What is changed in the recipe of a corpus."""
    half = given.inversion_steps // 2
    common = {"output": f"{given.output}/corpora/{kind}", "device": given.device}
    return (
        common
        | {
            "noise": {
                "generator.init_args.teacher": given.teacher,
                "generator.init_args.face_size": "null",
                "count": given.cheap_faces,
            },
            "deep_inversion": {
                "generator.init_args.teacher": given.teacher,
                "generator.init_args.schedule": f"[[2, {half}], [1, {given.inversion_steps - half}]]",
                "count": given.faces,
            },
            "dcgan": {"count": given.cheap_faces},
        }[kind]
    )


RECIPES = {"noise": "noise", "deep_inversion": "deep_inversion", "dcgan": "quickstart"}


def write_corpus(given: argparse.Namespace, kind: str, **changes: Any) -> None:
    """The corpus of a kind, or what is missing of it."""
    settings = settings_of(given, kind) | changes
    arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    generate(read_settings(["--config", f"synth/recipes/{RECIPES[kind]}.yaml", *arguments]))


def make_teacher(given: argparse.Namespace) -> None:
    """Train the teacher, or what is left of it."""
    if (Path(given.teacher) / "config.json").is_file():
        return
    output = str(Path(given.teacher).parent)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", str(ROOT / "distill" / "train.py")]
    if subprocess.run([*launch, *teacher_settings(given, output)], check=False).returncode:
        raise InputError(f"{output}: the teacher could not be trained; see above")


def teacher_settings(given: argparse.Namespace, output: str) -> list[str]:
    """The arguments that make the teacher."""
    changes = {"output": output, "device": given.device, "steps": given.teacher_steps}
    changes |= {"student.input_size": given.side, "augment.size": given.side}
    flags = (text for key, value in changes.items() for text in (f"--{key}", str(value)))
    return ["--config", given.teacher_recipe, *flags]


def grid(given: argparse.Namespace) -> ablate.Grid:
    """One cell for each kind of faces; they differ in nothing else."""
    faces: dict[str, dict[str, Any]] = {}
    for kind in NAMES:
        if kind in ONLINE:
            source = ablate.read(f"distill/recipes/data_free_{kind}.yaml")["source"]
        else:
            path = f"{given.output}/corpora/{kind}"
            source = {"class_path": "distill.sources.CorpusSource", "init_args": {"path": path, "in_memory": True}}
        faces[kind] = {"source": source}
    common = {
        "teacher": given.teacher,
        "student.input_size": given.side,
        "student.options": given.student,
        "augment.size": given.side,
        "optimizer": {"name": "muon", "lr": 0.02, "momentum": 0.95, "warmup": 50},
        "steps": given.steps,
        "batch_size": given.batch_size,
        "device": given.device,
        "checkpoint_every": max(1, given.steps // 5),
        "verification.benchmark": given.benchmark,
        "verification.people": [given.people],
    }
    return ablate.Grid(
        base="distill/recipes/data_free_fast.yaml",
        axes={"faces": faces},
        common=common,
        seeds=list(range(given.seeds)),
        output=given.output,
        people=given.people,
        jobs=given.jobs,
    )


def run_of(made: ablate.Grid, kind: str) -> Run:
    return parse(Run, ["--config", str(ablate.write(made, (kind,), 0))]).build()


def distinct(made: ablate.Grid, kind: str) -> int:
    """How many different faces a student saw at most."""
    run = run_of(made, kind)
    shown = run.steps * run.batch_size
    if not isinstance(run.source, SynthesisSource):
        path = Path(made.output, "corpora", kind, "manifest.json")
        return min(shown, json.loads(path.read_text())["rows"])
    rounds = math.ceil(run.steps / run.source.every)
    return min(shown, rounds * (run.source.faces or run.batch_size)) if run.source.pool else shown


def seconds(given: argparse.Namespace, made: ablate.Grid, kind: str) -> float:
    """Time per 1,000 faces, encoding and rejected candidates included where there are such."""
    if kind in CORPORA:
        # One batch of an inversion costs as much for each face as all of them.
        count = 64 if kind == "deep_inversion" else 512
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            # In this process and on one core, as for the others.
            write_corpus(given, kind, output=f"{folder}/corpus", count=count, workers=0, block=count)
        return 1000 * (time.perf_counter() - began) / count
    torch.set_num_threads(1)
    run = run_of(made, kind)
    assert isinstance(run.source, SynthesisSource)
    device = torch.device(given.device)
    teacher = faceless.load(given.teacher).to(device)
    run.source.prepare(Place(run.seed, run.batch_size, device=device))
    run.source.watch(teacher, make_network(run.student, teacher, run.seed).to(device))
    every = run.source.every
    for step in range(every):  # whatever the first round alone has to do
        run.source.batch(step)
    began = time.perf_counter()
    for step in range(every, every * (given.timed_rounds + 1)):
        run.source.batch(step).images.sum().item()
    faces = given.timed_rounds * ((run.source.faces or run.batch_size) if run.source.pool else every * run.batch_size)
    return 1000 * (time.perf_counter() - began) / faces


def costs(given: argparse.Namespace, made: ablate.Grid) -> dict[str, float]:
    """Seconds per 1,000 faces by kind; measured once, together."""
    path = Path(given.output, f"costs-{given.device}.json")
    if not path.is_file():
        found = {kind: seconds(given, made, kind) for kind in NAMES}
        atomic_write(path, json.dumps(found, indent=1) + "\n")
    measured: dict[str, float] = json.loads(path.read_text())
    return measured


def sheet(run: Path, path: Path, tile: int = 96) -> None:
    """An even sample of the faces that a run was trained on, eight in a line."""
    with np.load(run / "faces.npz") as file:
        faces = file["images"][-32:]
    made = Image.new("RGB", (8 * tile, -(-len(faces) // 8) * tile))
    for place, face in enumerate(faces):
        one = Image.fromarray(face.transpose(1, 2, 0)).resize((tile, tile), Image.Resampling.BICUBIC)
        made.paste(one, (place % 8 * tile, place // 8 * tile))
    with atomic_path(path) as temporary:
        made.save(temporary, "PNG")


def overview(sheets: Path, path: Path, left: int = 112) -> None:
    """The first line of each contact sheet, with its name."""
    lines = [Image.open(sheets / f"{kind}.png") for kind in NAMES]
    width, tile = lines[0].width, lines[0].width // 8
    made = Image.new("RGB", (left + width, tile * len(lines)), "white")
    draw = ImageDraw.Draw(made)
    for row, (kind, line) in enumerate(zip(NAMES, lines, strict=True)):
        made.paste(line.crop((0, 0, width, tile)), (left, row * tile))
        draw.text((8, (row + 0.5) * tile), NAMES[kind].split(" (")[0], fill="black", anchor="lm", font_size=13)
    with atomic_path(path) as temporary:
        made.save(temporary, "PNG")


def table(given: argparse.Namespace, made: ablate.Grid) -> str:
    """Markdown: a line for each kind of faces, and for teacher and untrained student."""
    measures = [name for name, (_, rate) in ablate.MEASURES.items() if rate]
    cost = costs(given, made)
    head = ["faces", *(f"{name}, %" for name in measures), "different faces", "s per 1,000"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    first = ablate.folder(made, (next(iter(NAMES)),), made.seeds[0])

    def figures(found: dict[str, Any]) -> list[str]:
        return [ablate.shown(name, found[name]) for name in measures]

    for label in ("teacher", "untrained student"):
        found = {name: ablate.summarize([one]) for name, one in ablate.measured(made, first, label).items()}
        lines.append([label, *figures(found), "", ""])
    for row in ablate.collect(made):
        (kind,) = row["cell"]
        lines.append([NAMES[kind], *figures(row), f"{distinct(made, kind):,}", f"{cost[kind]:.1f}"])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = (
        f"{given.steps} steps of {given.batch_size} faces; {given.benchmark}, people {given.people}; in parentheses "
        f"95 % intervals: over people, or over {given.seeds} seeds. Time: {given.device}, one process, one thread."
    )
    return f"{body}\n\n{about}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make everything that is missing, and the table."""
    given = options().parse_args(arguments)
    made = grid(given)
    make_teacher(given)
    for kind in NAMES:  # whatever is wrong shows before anything is trained
        ablate.write(made, (kind,), 0)
    for kind in CORPORA:
        write_corpus(given, kind)
    failed = ablate.train_all(made, [(cell, seed) for seed in made.seeds for cell in ablate.cells(made)])
    if failed:
        kind = failed[0][0][0]
        raise InputError(f"{len(failed)} runs failed ({kind}): give the same command again once that is mended")
    for kind in NAMES:
        sheet(ablate.folder(made, (kind,), 0), Path(given.output, "sheets", f"{kind}.png"))
    overview(Path(given.output, "sheets"), Path(given.output, "data_free.png"))
    text = table(given, made)
    atomic_write(Path(given.output, "data_free.md"), text)
    print(f"\n{text}\n{Path(given.output, 'data_free.md')}")


if __name__ == "__main__":
    command(main)()
