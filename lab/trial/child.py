"""The first moment of an experiment's process: bind its life to the guard's, take limits, become the command.

Runs in a fresh interpreter between fork and the command, and imports next to nothing so that this takes no time.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h
SPARE_PROCESSES = 512  # how many processes and threads the child may add to the machine's


def start(parent: str, disk_bytes: str, *command: str) -> None:
    """The child's first moment: bind its life to the guard's, take its limits, become `command`."""
    die_with_parent(int(parent))
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, int(disk_bytes))
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("1000")  # if the kernel has to kill, then this one
        with open("/proc/loadavg", encoding="utf-8") as file:
            tasks = int(file.read().split()[3].split("/")[1])
        _lower(resource.RLIMIT_NPROC, tasks + SPARE_PROCESSES)
    execute(list(command))


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when process `parent`, its parent, ends (Linux; else nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def interrupts_left_to_child() -> Iterator[None]:
    """For the time of the block the keyboard's interrupt is for the child alone, as it is while a shell waits."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def execute(command: list[str]) -> None:
    """Become `command`, with the signals restored that Python ignores. Exit status 127 if it cannot start."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
