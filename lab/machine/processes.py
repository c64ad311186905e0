"""A tree of processes: who belongs to it, how much memory and disk it takes, and how to end all of it.

On Linux the process that calls `adopt_orphans` stays the ancestor of everything started below it, whatever
forks away; /proc has the rest. On macOS nothing of the kind exists: the tree is what `ps` shows below the
child, its process group, and whatever was seen there before. There, a process that leaves both group and
parent within one look is missed. The macOS memory figure was not run on a Mac.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LINUX = sys.platform == "linux"
SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ENTRY_BYTES = 4096  # what any file counts for at least, so that a million empty ones count, too
SOON = 0.01  # seconds between two looks at a dying tree
QUICK_LOOKS = 50


class Process(NamedTuple):
    """`started` tells a process from a later one with the same number."""

    parent: int
    group: int
    state: str
    started: str


def adopt_orphans() -> None:
    """From now on, orphans among this process's descendants become its children (Linux; else nothing)."""
    if LINUX:
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def processes() -> dict[int, Process]:
    """Every process that this user can see, by number."""
    return _from_proc() if LINUX else _from_ps()


def _from_proc() -> dict[int, Process]:
    found = {int(name): _stat(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid: process for pid, process in found.items() if process}


def _stat(pid: int | str) -> Process | None:
    """Fields of /proc/PID/stat (man 5 proc) after the name, which may hold anything; None if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(int(fields[1]), int(fields[2]), fields[0], fields[19])


def _below(pid: int) -> dict[int, Process]:
    """All that descends from a process. Unlike a look at the whole machine, this costs a running child nothing."""
    if not (LINUX and os.path.exists("/proc/thread-self/children")):  # macOS, or a kernel built without it
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
    except OSError:  # it ends just now; its children become this process's, to be seen at the next look
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
    """A child of this process and everything below it. On Linux: everything below this process."""

    child: subprocess.Popen
    seen: dict[int, str] = field(default_factory=dict)  # number -> started, of every member so far

    def members(self) -> list[int]:
        """The living members' numbers. Reaps the orphans that ended."""
        me = os.getpid()
        table = _below(me)
        found = {pid for pid, started in self.seen.items() if pid in table and table[pid].started == started}
        found |= {pid for pid, process in table.items() if self.child.pid in (pid, process.group)}
        found |= {pid for pid, process in table.items() if LINUX and process.parent == me}
        grown = True
        while grown:
            children = {pid for pid, process in table.items() if process.parent in found} - found
            found, grown = found | children, bool(children)
        self.seen = {pid: table[pid].started for pid in found}
        self.child.poll()
        for pid in found - {self.child.pid}:
            if table[pid].state == "Z" and table[pid].parent == me:
                os.waitpid(pid, os.WNOHANG)
        return [pid for pid in found if table[pid].state != "Z"]

    def end(self, grace: float) -> None:
        """SIGTERM to all, after `grace` seconds SIGKILL, until none is left. grace = 0: SIGKILL at once."""
        deadline = time.monotonic() + grace
        members = self.members()
        if grace:
            _signal(members, signal.SIGTERM)
        while members and time.monotonic() < deadline:
            time.sleep(SOON)
            members = self.members()
        while members or _has_children():
            _signal(members, signal.SIGKILL)
            for _ in range(QUICK_LOOKS):  # fast enough to catch one that lives for a millisecond
                _signal(_children(os.getpid()), signal.SIGKILL)
            time.sleep(SOON)
            members = self.members()


def _has_children() -> bool:
    """Whether this process has children; on Linux, where it adopts orphans, that is: whether descendants are left.
    A look at /proc alone can miss a process that forks and ends all the time."""
    try:
        return LINUX and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not False
    except ChildProcessError:
        return False


def _signal(members: list[int], number: int) -> None:
    for pid in members:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def memory(members: list[int], enough: int) -> int:
    """Bytes of memory that the processes hold, swapped ones included.

    Linux: the sum of resident sizes, which counts shared pages once for each process; only a sum above
    `enough` is worth the dear exact one (proportional sizes). macOS: physical footprint, which includes
    Metal's buffers."""
    if not LINUX:
        return sum(map(_footprint, members))
    total = sum(_kilobytes(pid, "status", ("VmRSS:", "VmSwap:")) for pid in members) * 1024
    if total <= enough:
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
    """`ri_phys_footprint` of macOS's rusage_info_v0 (libproc.h): bytes, at offset 72 of 96. Not run on a
    Mac."""
    buffer = (ctypes.c_uint64 * 12)()
    failed = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(pid, 0, buffer)
    return 0 if failed else buffer[9]


def disk(folders: list[Path], members: list[int]) -> int:
    """Bytes on disk in the folders, and (Linux) in files that members hold open and nobody can see: deleted
    files and those that live in memory alone."""
    return sum(map(_folder_bytes, folders)) + (_unseen_bytes(members) if LINUX else 0)


def _folder_bytes(folder: Path) -> int:
    total, pending = 0, [folder]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    total += max(entry.stat(follow_symlinks=False).st_blocks * 512, ENTRY_BYTES)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
        except OSError:  # gone meanwhile, or made unreadable by the child
            continue
    return total


def _unseen_bytes(members: list[int]) -> int:
    sizes = {}
    for pid in members:
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                status = os.stat(entry.path)
                if status.st_nlink == 0:
                    sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:  # closed or ended meanwhile
            continue
    return sum(sizes.values())
