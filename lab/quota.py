"""The CPU and memory limits of control groups (containers, systemd slices, batch systems) on Linux.

Version 2 has one tree of groups, version 1 one for each controller; /proc/self/mountinfo says where they are. The
smallest limit of a process's group and of the groups above it counts. A set of cores (cpuset) shows in the affinity.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
NO_LIMIT = 2**62  # bytes; version 1 writes the largest number of whole pages


def cores() -> int:
    """Cores to work with: those this process may run on, but no more than its quota pays for, rounded up."""
    return math.ceil(cpus())


def cpus() -> float:
    """CPU seconds that this process may use in a second."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, cpu_limit())


def cpu_limit(root: Path = ROOT) -> float:
    """CPU seconds a second, infinite without a quota."""
    return min(map(_cpu_limit, _groups("cpu", root)), default=math.inf)


def _cpu_limit(group: Path) -> float:
    limit = _text(group / "cpu.max").split() or [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    return int(limit[0]) / int(limit[1]) if len(limit) == 2 and all(map(str.isdigit, limit)) else math.inf


def memory_limit(root: Path = ROOT) -> float:
    """Bytes, infinite without a limit. memory.high is one: above it the kernel slows the group down."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    texts = [_text(group / name) for group in _groups("memory", root) for name in names]
    return min((int(text) for text in texts if text.isdigit() and int(text) < NO_LIMIT), default=math.inf)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's group and of the groups above it, as far as they are visible here."""
    groups = re.findall(r"^\d+:([^:]*):(/.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE)
    own = {name: PurePosixPath(path) for names, path in groups for name in names.split(",")}  # version 2: name ""
    mounts = re.findall(r"^\S+ \S+ \S+ (\S+) (\S+) .* - (\S+) \S+ (\S+)$", _text(root / "proc/self/mountinfo"), re.M)
    for top, mount, kind, options in mounts:
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name in own and name in ["", *options.split(",")]:
            folder, path = root / _unescaped(mount)[1:], own[name]
            inside = path.is_relative_to(top) and ".." not in path.parts  # else: the group itself is what is mounted
            below = path.relative_to(top) if inside else PurePosixPath()
            yield from (folder / part for part in (below, *below.parents))


def _unescaped(path: str) -> str:
    """A path of mountinfo (man 5 proc): blanks and backslashes are octal there."""
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # no such controller or version, or hidden from this process
        return ""
