"""Start of an experiment's process: end with the guard, set limits, exec the command.

Runs in a new interpreter and imports very little, so that it starts fast.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h
SPARE_PROCESSES = 512  # processes and threads that may be added to those running on the machine


def start(parent: str, disk_bytes: str, *command: str) -> None:
    """Make this process end with the guard, set its limits and become `command`."""
    die_with_parent(int(parent))
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, int(disk_bytes))
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("1000")  # out of memory, the kernel kills this process first
        with open("/proc/loadavg", encoding="utf-8") as file:
            tasks = int(file.read().split()[3].split("/")[1])
        _lower(resource.RLIMIT_NPROC, tasks + SPARE_PROCESSES)
    execute(list(command))


def under(parent: str, file_bytes: str, *command: str) -> None:
    """Become `command`, which ends with process `parent` and writes no file beyond `file_bytes`."""
    die_with_parent(int(parent))
    _lower(resource.RLIMIT_FSIZE, int(file_bytes))
    execute(list(command))


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


@contextmanager
def interrupts_left_to_child() -> Iterator[None]:
    """Within the block only the child reacts to Ctrl-C, as while a shell waits for a command."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def execute(command: list[str]) -> None:
    """Become `command`, with the signals that Python ignores restored. Exit status 127 if it cannot start."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)
