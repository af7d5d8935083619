"""Does a corpus that was killed again and again end with the same bytes, and does its memory stay flat?

``python scripts/bench/interrupt.py`` writes 20,000 faces of the DCGAN without a pause, looking at the memory of the
command and its workers; then writes them again, killing the command (SIGKILL) at ten random moments; compares every
file; and prints what it found. It ends with exit code 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from faceless.errors import command
from faceless.files import sha256
from faceless.randomness import Rng
from faceless.settings import ROOT

PAUSE = 0.25  # seconds between two looks at memory


def start(given: argparse.Namespace, output: Path, count: int) -> subprocess.Popen[bytes]:
    arguments = ["--config", given.config, "--output", str(output), "--count", str(count)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "synth/generate.py", *arguments], cwd=ROOT, **quiet)


def memory(process: psutil.Process) -> float:
    """MiB that a command and its workers have for themselves."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().uss
        except psutil.Error:  # it has just ended
            continue
    return total / 2**20


def watch(running: subprocess.Popen[bytes], most: float = float("inf")) -> tuple[list[float], bool]:
    """Look at the memory of a command until it ends, or kill it after ``most`` seconds.

    Returns:
        MiB at each look, and whether it was killed.
    """
    begin, seen, process = time.monotonic(), [], psutil.Process(running.pid)
    while running.poll() is None:
        if time.monotonic() - begin >= most:
            running.kill()
            running.wait()
            return seen, True
        try:
            seen.append(memory(process))
        except psutil.NoSuchProcess:
            break
        time.sleep(min(PAUSE, max(0.0, most - (time.monotonic() - begin))))
    if running.wait():
        raise SystemExit("synth/generate.py failed; run it by itself to see why")
    return seen, False


def growth(seen: Sequence[float]) -> dict[str, float]:
    """The highest of memory's second fifth, when all workers are at work, and of its last."""
    fifth = max(1, len(seen) // 5)
    early, late = max(seen[fifth : 2 * fifth] or seen), max(seen[-fifth:])
    return {"peak_mib": max(seen), "early_mib": early, "late_mib": late, "growth_mib": late - early}


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the settings, which name the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "settings.yaml")
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="synth/recipes/dcgan.yaml")
    parser.add_argument("--faces", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as place:
        few, whole, killed = (Path(place, name) for name in ("few", "whole", "killed"))
        found: dict[str, object] = {"faces": given.faces}
        found["memory_of_a_tenth"] = growth(watch(start(given, few, max(1, given.faces // 10)))[0])
        begin = time.monotonic()
        found["memory"] = growth(watch(start(given, whole, given.faces))[0])
        seconds = time.monotonic() - begin
        found["faces_per_second"] = given.faces / seconds
        # Together they are as long as the whole takes, its starts not counted: the last kill is still before the end.
        moments = Rng.of(given.seed, "kills", range(given.kills)).uniform(1)[:, 0] * 2 * seconds / (given.kills + 1)
        kills = [watch(start(given, killed, given.faces), most)[1] for most in moments.tolist()]
        shards = len(list(killed.glob("data/[!.]*.parquet")))
        watch(start(given, killed, given.faces))
        found |= {"killed": sum(kills), "seconds_until": [round(most, 2) for most in moments.tolist()]}
        found |= {"shards_after_the_last_kill": shards, "same_bytes": contents(killed) == contents(whole)}
    print(json.dumps(found, indent=1))
    if not found["same_bytes"]:
        raise SystemExit(1)


if __name__ == "__main__":
    command(main)()
