"""Write a corpus of generated faces: ``python synth/generate.py --config synth/recipes/dcgan.yaml``.

Candidates are numbered, and cut into blocks of fixed size; a block depends on the settings and its number alone. So any
number of processes, and any interruption, end with the same bytes. Finished blocks wait in ``.blocks`` inside the
corpus until their shard is complete; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

import faceless
from faceless import assets
from faceless.errors import InputError, command
from faceless.files import atomic_write, sha256
from faceless.settings import Settings, parse
from synth.blocks import Blocks, Pool, columns, teacher
from synth.corpus import (
    FORMAT,
    REMOVED,
    VERSION,
    Corpus,
    CorpusWriter,
    damaged_shards,
    read_manifest,
    size_problem,
    write_manifest,
)
from synth.datasheet import contact_sheet, datasheet
from synth.near import judges, unpack
from synth.settings import Generation

# What no byte of the corpus depends on.
INCIDENTAL = ("output", "workers", "repair", "config")
# Recorded only where they are used, so that a corpus begun before there were such settings is the same corpus.
LATER = ("around", "around_scale", "teacher", "gate")


def read_settings(arguments: Sequence[str] | None = None) -> Settings[Generation]:
    """Settings of the command from its arguments, those of this process when None."""
    return parse(Generation, arguments, program="synth/generate.py", description=(__doc__ or "").split("\n\n")[0])


def generate(settings: Settings[Generation], progress: bool = True, *, rank: int = 0, world: int = 1) -> Corpus:
    """Write the corpus that the settings describe, or finish it, or just open it if it is there.

    Args:
        settings: from `read_settings`.
        progress: show a progress bar.
        rank, world: this process's share when several call this at the same time, as ``accelerate launch`` does.

    Raises:
        InputError: the folder holds another corpus, the disk is full, or hardly any candidate is accepted.
    """
    complete(settings)  # refuses a folder of another corpus before anything that the settings name is built
    made = settings.build()
    folder = Path(made.output)
    content = recorded(settings, made)
    if made.device == "cuda" and "LOCAL_RANK" in os.environ:
        made.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if (folder / "manifest.json").is_file():
        existing = read_manifest(folder)
        check_same(folder, existing["settings"], content)
        if existing["generator"] != made.generator.provenance():
            raise InputError(f"{folder}: holds a corpus of other generator weights; choose another output")
        if made.repair and rank == 0:
            repair(made, existing, progress)
        while made.repair and any(size_problem(folder, shard) for shard in existing["shards"]):
            time.sleep(0.05)  # until rank 0 has put them there
        return Corpus(folder)
    if made.repair:
        raise InputError(f"{folder}: there is no finished corpus to repair here (no manifest.json)")
    if made.align is not None:
        # Once, before the workers want it at the same time.
        assets.fetch(f"dlib-landmarks-{made.align.points}")
    run = Run(made, content, rank, world)
    run.begin(settings.yaml())
    run.finish(progress) if rank == 0 else run.help()
    return Corpus(folder)


def complete(settings: Settings[Generation]) -> bool:
    """Whether the corpus of these settings is there; looked up without its generator and teacher, which need not be.

    Raises:
        InputError: the folder holds another corpus.
    """
    folder = Path(settings.asdict()["output"])
    if not (folder / "manifest.json").is_file():
        return False
    found = read_manifest(folder).get("settings")
    before = {key: value for key, value in found.items() if key != "teacher_sha256"} if isinstance(found, dict) else {}
    check_same(folder, before, described(settings))
    return True


def described(settings: Settings[Generation]) -> dict[str, Any]:
    """The settings that make the corpus what it is, as they are written; the file of latents by its SHA-256."""
    content = {key: value for key, value in settings.asdict().items() if key not in INCIDENTAL}
    defaults = {field.name: field.default for field in fields(Generation)}
    content = {key: value for key, value in content.items() if key not in LATER or value != defaults[key]}
    if (around := content.get("around")) is not None:
        if not Path(around).is_file():
            raise InputError(f"{around}: no such file of latents to draw near")
        content["around"] = f"sha256 {sha256(around)}"
    return content


def recorded(settings: Settings[Generation], made: Generation) -> dict[str, Any]:
    """The settings that make the corpus what it is; files in them by their SHA-256."""
    content = described(settings)
    if made.teacher is not None:
        network = teacher(made.teacher, made.device)
        if made.align is not None and network.spec.framing != made.align.framing:
            raise InputError(
                f"teacher {made.teacher}: knows {network.spec.framing} crops, and align.framing is "
                f"{made.align.framing}; use the same"
            )
        content["teacher_sha256"] = network.source["sha256"]
    return content


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to mix two corpora in one folder; names the first key that differs."""
    if before == now:
        return
    key = next((k for k in sorted({*before, *now}) if before.get(k) != now.get(k)), "settings")
    raise InputError(
        f"{folder}: holds a corpus with {key} {before.get(key)!r}, and the settings say {now.get(key)!r}; "
        "choose another output or delete the folder"
    )


class Run:
    """One corpus being written by ``world`` processes, of which rank 0 puts the shards together."""

    def __init__(self, made: Generation, content: dict[str, Any], rank: int, world: int):
        self.made, self.content, self.rank, self.world = made, content, rank, world
        self.folder = Path(made.output)
        self.blocks = Blocks(self.folder / ".blocks")

    def begin(self, settings: str) -> None:
        """Claim the folder, or check that what was begun there is the same corpus."""
        claim = self.blocks.folder / "settings.json"
        mine = {
            "settings": self.content,
            "generator": self.made.generator.provenance(),
            "versions": versions(self.made),
        }
        if claim.is_file():
            begun = self.read(claim, dict)
            check_same(self.folder, begun["settings"], self.content)
            check_same(self.folder, begun["generator"], mine["generator"])
            check_same(self.folder, begun["versions"], mine["versions"])
        elif self.rank == 0:
            if self.folder.is_dir() and any(p.name not in (".blocks", "settings.yaml") for p in self.folder.iterdir()):
                raise InputError(f"{self.folder}: is not empty and holds no corpus; choose another output")
            try:
                unpack(self.made, self.blocks.folder)
            except InputError:  # what cannot be begun claims no folder
                shutil.rmtree(self.blocks.folder, ignore_errors=True)
                with suppress(OSError):
                    self.folder.rmdir()
                raise
            atomic_write(self.folder / "settings.yaml", settings)
            atomic_write(claim, json.dumps(mine))
        while not claim.is_file() and not (self.folder / "manifest.json").is_file():
            time.sleep(0.05)

    def read(self, path: Path, kind: type) -> Any:
        """What was noted of a corpus that was begun."""
        try:
            found = json.loads(path.read_text())
            if isinstance(found, kind):
                return found
        except ValueError:
            pass
        raise InputError(f"{path}: damaged; delete {self.folder} and run the same command again")

    def pool(self) -> Pool:
        mine = lambda number: number % self.world == self.rank  # noqa: E731
        return Pool(self.made, self.blocks, workers(self.made, self.world), mine)

    def all_blocks(self) -> int | None:
        """How many there are, where no face is ever rejected; else that shows only in the end."""
        sure = self.made.align is None and self.made.gate is None
        return -(-self.made.count // self.made.block) if sure else None

    def help(self) -> None:
        """Make this rank's blocks until rank 0 has written the manifest."""
        manifest, stop = self.folder / "manifest.json", self.all_blocks()
        with self.pool() as pool:
            frontier = 0
            while not manifest.is_file():
                while self.blocks.counts(frontier) is not None:
                    frontier += 1
                mine = next(n for n in range(frontier, frontier + self.world) if pool.mine(n))
                if self.blocks.counts(mine) is None and (stop is None or mine < stop):
                    pool.advance(mine, stop)
                else:
                    time.sleep(0.05)
        shutil.rmtree(self.blocks.folder, ignore_errors=True)

    def finish(self, progress: bool) -> None:
        made, book = self.made, self.blocks.folder / "shards.json"
        finished = self.read(book, list) if book.is_file() else []
        writer = CorpusWriter(
            self.folder, columns(made), rows=made.count, shard_rows=made.shard_rows, finished=finished
        )
        last = finished[-1]["last"] if finished else -1
        accepted, number = 0, 0
        rejected: Counter[str] = Counter()
        bar = tqdm(total=made.count, initial=writer.done, desc="generate", unit="face", disable=not progress)
        # The pool goes last into the stack and so ends first: it may still be writing blocks.
        with bar, writer, self.pool() as pool:
            dropped = 0
            while not writer.complete or accepted < made.count:
                stop = self.all_blocks()
                if stop is None and number:
                    # As many more as the acceptance so far calls for.
                    stop = number + 2 + (made.count - accepted) * number // max(accepted, 1)
                while (counts := self.blocks.counts(number)) is None:
                    pool.advance(number, stop)
                accepted += counts["accepted"]
                rejected.update(counts["rejected"])
                number += 1
                if counts["last"] > last:
                    rows = self.blocks.rows(number - 1)
                    rows = rows.filter(pc.greater(rows["index"], last))
                    before = writer.done
                    if writer.append(rows):
                        atomic_write(book, json.dumps(writer.shards))
                        # The block at the shard's end may reach into the next one; all before it are used up.
                        for used in range(dropped, number - 1):
                            self.blocks.drop_rows(used)
                        dropped = number - 1
                    bar.update(writer.done - before)
                drawn = number * made.block
                if drawn >= 4096 and accepted < made.min_acceptance * drawn:
                    raise InputError(
                        f"only {accepted} of {drawn} candidates were accepted ({dict(rejected)}); "
                        "check the generator, or relax align or min_acceptance"
                    )
        counts = {"candidates": number * made.block, "accepted": accepted, "rejected": dict(sorted(rejected.items()))}
        write_manifest_and_sheets(made, self.content, writer.shards, counts)
        shutil.rmtree(self.blocks.folder, ignore_errors=True)


def write_manifest_and_sheets(
    made: Generation, content: dict[str, Any], shards: list[dict[str, Any]], counts: dict[str, Any]
) -> None:
    """The manifest goes last: its presence means that the corpus is complete."""
    folder, generator = Path(made.output), made.generator
    side = made.align.size if made.align else generator.face_size
    used = [a for a in assets.used() if a["sha256"] == generator.provenance().get("weights_sha256")]
    if made.align is not None:
        used += [a for a in assets.used() if a["name"] == f"dlib-landmarks-{made.align.points}"]
    licences = [{"what": f"generator {type(generator).__name__}", "licence": generator.licence}]
    if made.teacher is not None:
        used += [a for a in assets.used() if a["sha256"] == content["teacher_sha256"]]
    licences += [{"what": f"{a['name']} (used, not contained)", "licence": a["licence"]} for a in used]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "real_faces": False,
        "rows": made.count,
        "image": {"height": side, "width": side, "format": made.image_format, "quality": made.quality},
        "framing": made.align.framing if made.align else None,
        "latent_shape": list(generator.latent_shape),
        "latent_dtype": made.latent_dtype,
        "columns": columns(made).names,
        "generator": generator.provenance(),
        "settings": content,
        "counts": counts,
        "shards": shards,
        "licences": licences,
        "assets": used,
        "versions": versions(made),
    }
    if made.around is not None and (mined_by := judges(made.around)):
        manifest["mined_by"] = mined_by
    write_sheets(folder, manifest)
    write_manifest(folder, manifest)


def write_sheets(folder: Path, manifest: dict[str, Any]) -> None:
    """Those that are missing: others may have written into a datasheet that is there, as audits do."""
    if not (folder / "DATASHEET.md").is_file():
        atomic_write(folder / "DATASHEET.md", datasheet(manifest))
    if not (folder / "contact_sheet.png").is_file():
        first = pq.ParquetFile(folder / manifest["shards"][0]["name"]).read_row_group(0, columns=["image"])["image"]
        atomic_write(folder / "contact_sheet.png", contact_sheet([image["bytes"] for image in first[:128].to_pylist()]))


def repair(made: Generation, manifest: dict[str, Any], progress: bool) -> None:
    """Write the missing and damaged shards of a finished corpus again, byte by byte as they were.

    Raises:
        InputError: they come out with other bytes, because libraries or processor are not those of the corpus; or rows
            of it were removed.
    """
    folder, shards = Path(made.output), manifest["shards"]
    if "removed_by_audit" in manifest:
        raise InputError(f"{folder}: {REMOVED}")
    damaged = damaged_shards(folder, shards)
    scratch = folder / ".repair"
    shutil.rmtree(scratch, ignore_errors=True)
    blocks = Blocks(scratch)
    with tqdm(total=len(damaged), desc="repair", unit="shard", disable=not progress) as bar:
        for number in damaged:
            shard = shards[number]
            begin, stop = shard["first"] // made.block, shard["last"] // made.block + 1
            writer = CorpusWriter(
                scratch, columns(made), rows=made.count, shard_rows=made.shard_rows, finished=shards[:number]
            )
            with writer, Pool(made, blocks, workers(made), lambda _: True) as pool:
                for block in range(begin, stop):
                    while blocks.counts(block) is None:
                        pool.advance(block, stop)
                    rows = blocks.rows(block)
                    inside = pc.and_(
                        pc.greater_equal(rows["index"], shard["first"]), pc.less_equal(rows["index"], shard["last"])
                    )
                    writer.append(rows.filter(inside))
            if writer.shards[number:] != [shard]:
                now = versions(made)
                changed = [f"{k} {v}, now {now.get(k)}" for k, v in manifest["versions"].items() if now.get(k) != v]
                raise InputError(
                    f"{folder / shard['name']}: cannot be made again with the same bytes here "
                    f"({'; '.join(changed) or 'same versions'}); write the corpus anew into another folder"
                )
            (scratch / shard["name"]).replace(folder / shard["name"])
            bar.update()
    shutil.rmtree(scratch, ignore_errors=True)
    write_sheets(folder, manifest)


def workers(made: Generation, world: int = 1) -> int:
    """Processes to start: as the settings say, or this process's share of the cores."""
    if made.workers is not None:
        return made.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local)


def versions(made: Generation) -> dict[str, str]:
    """What the bytes of a corpus depend on besides its settings."""
    found = {"faceless": faceless.__version__, "python": platform.python_version()}
    for package in ("torch", "kornia", "numpy", "pillow", "pyarrow", "dlib-bin", "dlib", *made.generator.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["processor"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if torch.device(made.device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(made.device)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of this process; under ``accelerate launch``, this process's share of it."""
    settings = read_settings(arguments)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    corpus = generate(settings, rank=rank, world=world)
    if rank == 0:
        counts = corpus.manifest["counts"]
        rejected = ", ".join(f"{number} {reason}" for reason, number in counts["rejected"].items()) or "none"
        print(f"{corpus.folder}: {len(corpus)} faces of {counts['candidates']} candidates (rejected: {rejected})")


if __name__ == "__main__":
    command(main)()
