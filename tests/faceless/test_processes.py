"""How many processes a launcher asked for; that they really run is tested with the training command."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys

import pytest

from faceless import processes
from faceless.errors import InputError
from faceless.processes import spread, wanted


@pytest.mark.parametrize(
    "command, count",
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "4", "x.py"], 4),
        (["python", "-m", "accelerate.commands.launch", "--num-processes=2", "x.py"], 2),
        (["accelerate", "launch", "--cpu", "x.py"], None),
        (["accelerate", "launch", "--num_processes", "two", "x.py"], None),
        (["accelerate", "launch", "--num_processes"], None),
    ],
)
def test_the_number_is_read_from_the_command_line(command: list[str], count: int | None) -> None:
    assert wanted(command) == count


def test_an_unknown_number_is_one_line_that_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc_per_node"):
        spread()
    # A process that a launcher has numbered is one of several already.
    monkeypatch.setenv("RANK", "0")
    spread()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("MASTER_PORT")
    spread()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc")
def test_kept_memory_needs_no_new_pages() -> None:
    """Page faults of ten blocks of 40 MB, one after the other; each has at least 20 pages, of 2 MB if they are huge."""
    work = (
        "import resource, sys\n"
        "from faceless.processes import keep_memory\n"
        "if sys.argv[1] == 'kept':\n    keep_memory()\n"
        "b'x' * 40_000_000\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "for _ in range(10):\n    bytes(bytearray(40_000_000))\n"
        "print(faults() - before)\n"
    )
    given, kept = (
        int(subprocess.run([sys.executable, "-c", work, how], capture_output=True, text=True, check=True).stdout)
        for how in ("given back", "kept")
    )
    assert given >= 10 * 20 and kept < given / 4


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_ctrl_c_waits_in_workers_until_they_can_end_without_a_word() -> None:
    """A terminal sends it to all processes; sent before the imports are done, it used to show a traceback for each."""
    code = (
        "import os, signal, faceless.processes; os.kill(os.getpid(), signal.SIGINT); print('imported', flush=True); "
        "faceless.processes.end_quietly(); print('never')"
    )
    with processes.starting_workers():
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.stdout, child.stderr, child.returncode) == ("imported\n", "", -signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
