"""As many processes as the launcher was asked for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import psutil

from faceless.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def spread() -> None:
    """Become the CPU processes that ``accelerate launch --cpu --num_processes N`` was asked for.

    Accelerate starts one process on CPUs and leaves the others to MPI, so that N processes would silently be one. Here
    the one replaces itself by PyTorch's own launcher. To be called first by a command that can run as several.

    Raises:
        InputError: several processes are wanted, and how many is not on the launcher's command line.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and "MASTER_PORT" in os.environ
    if not asked or {"RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"} & set(os.environ):
        return
    count = wanted(psutil.Process(os.getppid()).cmdline())
    if count is None:
        raise InputError(
            "accelerate launch starts one process on CPUs: use torchrun --nproc_per_node N "
            f"{sys.argv[0]}, or give --num_processes on the command line"
        )
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


@contextmanager
def starting_workers() -> Iterator[None]:
    """Around what starts worker processes: Ctrl-C, which a terminal sends to them too, waits for `end_quietly` there.

    Else each of them would show a traceback of whatever it was just importing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it lets the signal through when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_quietly() -> None:
    """In a worker process, ready to work: end at Ctrl-C without a word, since the parent has one for all."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def wanted(command: list[str]) -> int | None:
    """The ``--num_processes`` of a launcher's command line.

    >>> wanted(["accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"])
    2
    >>> wanted(["accelerate", "launch", "--num-processes=3", "train.py"])
    3
    """
    for text, following in zip(command, [*command[1:], ""]):
        name, _, value = text.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or following
            return int(value) if value.isdigit() else None
    return None


def keep_memory() -> None:
    """Let this process keep the memory that its tensors give back, for those of the next step.

    By default the C library returns large blocks to the system, and every step on a CPU begins with page faults: for an
    IResNet-18 at 64 faces of 48 pixels they are an eighth of its time. Keeping the blocks costs it a fifth more memory.
    Nothing happens where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
        mallopt(parameter, size)
