"""A tree of processes: its members, the memory and disk space they use, and how to end all of them.

On Linux the process that calls `adopt_orphans` stays the ancestor of every process started below it, even of daemons;
/proc has the rest. macOS has no such call: there the tree is what `ps` shows below the child, its process group, and
earlier members. A process that leaves both group and parent between two calls of `ps` is missed. The macOS memory
figure has not been run on a Mac.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LINUX = sys.platform == "linux"
SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ENTRY_BYTES = 4096  # least size that a file counts as, so that a million empty files count too
UNKNOWN_BYTES = 1 << 62  # in a folder that cannot be looked into: more than any limit
POLL_SECONDS = 0.01  # between two checks of a tree that is ending
FAST_POLLS = 50


class Process(NamedTuple):
    """`started` distinguishes a process from a later one with the same PID."""

    parent: int
    group: int
    state: str
    started: str


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants from now on (Linux only)."""
    if LINUX:
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def processes() -> dict[int, Process]:
    """Every process that this user can see, by PID."""
    return _from_proc() if LINUX else _from_ps()


def _from_proc() -> dict[int, Process]:
    table = {int(name): _stat(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid: process for pid, process in table.items() if process}


def _stat(pid: int | str) -> Process | None:
    """Fields of /proc/PID/stat (man 5 proc) after the name, which can contain anything; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(int(fields[1]), int(fields[2]), fields[0], fields[19])


def _below(pid: int) -> dict[int, Process]:
    """All descendants of a process. Unlike a scan of all processes, this does not slow down a running child."""
    if not (LINUX and os.path.exists("/proc/thread-self/children")):  # macOS, or a kernel without this file
        return processes()
    table, pending = {}, _children(pid)
    while pending:
        child = pending.pop()
        if process := _stat(child):
            table[child] = process
            pending += _children(child)
    return table


def _children(pid: int) -> list[int]:
    """The children of all threads of a process (Linux)."""
    children = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="utf-8") as file:
                children += map(int, file.read().split())
    except OSError:  # it is ending; its children become children of this process, and the next call lists them
        pass
    return children


def _from_ps() -> dict[int, Process]:
    command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "pgid=", "-o", "state=", "-o", "lstart="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as listing:
        rows = [line.split(maxsplit=4) for line in listing.stdout]
    table = {int(row[0]): Process(int(row[1]), int(row[2]), row[3][0], row[4].strip()) for row in rows}
    table.pop(listing.pid, None)
    return table


@dataclass
class Tree:
    """A child of this process and its descendants. On Linux: all descendants of this process."""

    child: subprocess.Popen
    known: dict[int, str] = field(default_factory=dict)  # PID -> started, of the members at the last call
    stopped: bool = False  # whether a member was stopped (SIGSTOP) at the last call

    def members(self) -> list[int]:
        """The PIDs of living members. Reaps orphans that ended."""
        me = os.getpid()
        table = _below(me)
        members = {pid for pid, started in self.known.items() if pid in table and table[pid].started == started}
        members |= {pid for pid, process in table.items() if self.child.pid in (pid, process.group)}
        members |= {pid for pid, process in table.items() if LINUX and process.parent == me}
        while children := {pid for pid, process in table.items() if process.parent in members} - members:
            members |= children
        self.known = {pid: table[pid].started for pid in members}
        self.stopped = any(table[pid].state == "T" for pid in members)
        self.child.poll()
        for pid in members - {self.child.pid}:
            if table[pid].state == "Z" and table[pid].parent == me:
                os.waitpid(pid, os.WNOHANG)
        return [pid for pid in members if table[pid].state != "Z"]

    def end(self, grace: float) -> None:
        """Send SIGTERM to all, and SIGKILL after `grace` seconds until none is left. grace = 0: SIGKILL at once."""
        deadline = time.monotonic() + grace
        members = self.members()
        if grace:
            _signal(members, signal.SIGTERM)
        while members and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            members = self.members()
        while members or _has_children():
            _signal(members, signal.SIGKILL)
            for _ in range(FAST_POLLS):  # fast enough to catch one that lives for a millisecond
                _signal(_children(os.getpid()), signal.SIGKILL)
            time.sleep(POLL_SECONDS)
            members = self.members()


def _has_children() -> bool:
    """Whether this process has children; on Linux, where it adopts orphans: whether any descendant is left.
    /proc alone can miss a process that keeps forking and exiting."""
    try:
        return LINUX and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not False
    except ChildProcessError:
        return False


def _signal(members: list[int], number: int) -> None:
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def memory(members: list[int], threshold: int) -> int:
    """Bytes of memory that the processes use, including swap.

    Linux: the sum of resident sizes, which counts shared pages once per process; above `threshold`, the exact sum
    of proportional sizes, which is slow to read. macOS: physical footprint, which includes Metal's buffers."""
    if not LINUX:
        return sum(map(_footprint, members))
    total = sum(_kilobytes(pid, "status", ("VmRSS:", "VmSwap:")) for pid in members) * 1024
    if total <= threshold:
        return total
    exact = sum(_kilobytes(pid, "smaps_rollup", ("Pss:", "SwapPss:")) for pid in members) * 1024
    return exact or total


def _kilobytes(pid: int, name: str, keys: tuple[str, ...]) -> int:
    try:
        lines = Path("/proc", str(pid), name).read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(keys))


def _footprint(pid: int) -> int:
    """`ri_phys_footprint` of macOS's rusage_info_v0 (libproc.h): bytes, at offset 72 of 96. Not run on a Mac."""
    buffer = (ctypes.c_uint64 * 12)()
    failed = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(pid, 0, buffer)
    return 0 if failed else buffer[9]


def disk(folders: list[Path], members: list[int]) -> int:
    """Bytes on disk in the folders, and (Linux) in files without a name that members hold open: deleted files and
    files in memory."""
    return sum(map(_folder_bytes, folders)) + (_unlinked_bytes(members) if LINUX else 0)


def _folder_bytes(folder: Path) -> int:
    total, pending = 0, [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    total += max(entry.stat(follow_symlinks=False).st_blocks * 512, ENTRY_BYTES)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
        except (FileNotFoundError, NotADirectoryError):  # removed in the meantime
            continue
        except OSError:  # closed by the child, or too deep for a path
            return UNKNOWN_BYTES
    return total


def _unlinked_bytes(members: list[int]) -> int:
    sizes = {}
    for pid in members:
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                status = os.stat(entry.path)
                if status.st_nlink == 0:
                    sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:  # closed or ended in the meantime
            continue
    return sum(sizes.values())
