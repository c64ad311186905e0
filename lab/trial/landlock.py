"""Landlock and seccomp by system call: a Linux sandbox that needs neither root nor a package.

`enter` is the launcher that sandbox.py puts before a command. Landlock's rules only add rights, so a hidden path inside
a readable folder is excluded by granting its siblings one by one. What Landlock does not restrict (sockets, permissions
and times of files, limits of other processes) is refused as a system call, see seccomp.py: so chmod, chown and utime
fail everywhere, in the child's own folder too. Needs Linux 6.2 (Landlock version 3) on x86-64 or arm64.

Not covered: existence, size, times and link targets of all files can be seen, the names next to a hidden path be listed
and the command lines of other processes be read. Before Linux 6.12 (version 6) the child can send signals to the user's
other processes.
"""

import ctypes
import json
import os
import platform
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from lab.trial.child import execute
from lab.trial.seccomp import MACHINES, for_landlock

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Numbers from linux/landlock.h, seccomp.h and prctl.h; libc wraps none of these calls.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL  # the rights that apply to files
ALL = -1
SET_NO_NEW_PRIVS, SET_SECCOMP, SECCOMP_FILTER, CAPABILITY_VERSION_3 = 38, 22, 2, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def enter(rules: str, *command: str) -> None:
    """Restrict this process, then become `command`. `rules`: JSON [[path, "read" | "write" | "hide" | "device"], ...].

    Raises OSError where the kernel has no Landlock, or one too old to protect files from truncation."""
    version = call(libc.syscall, CREATE_RULESET, None, 0, 1)
    if version < 3 or platform.machine() not in MACHINES:
        raise OSError(
            f"Landlock version {version} on {platform.machine()} is not supported; use Linux 6.2 or later on x86-64 or "
            "arm64, or install bubblewrap"
        )
    rights = (1 << (16 if version >= 5 else 15)) - 1
    tcp = 3 if version >= 4 else 0  # bind, connect
    scope = 3 if version >= 6 else 0  # abstract sockets and signals stay among the sandboxed
    ruleset = call(libc.syscall, CREATE_RULESET, struct.pack("QQQ", rights, tcp, scope), 24, 0)
    given = [(Path(path), mode) for path, mode in json.loads(rules)]
    for path, allowed in grants(given):
        add_rule(ruleset, path, rights & allowed)
    call(libc.prctl, SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(libc.syscall, RESTRICT_SELF, ruleset, 0)
    call(libc.capset, struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))  # root could read other memories
    refuse_calls(gpu=any(mode == "device" for _, mode in given))
    execute(list(command))


def grants(rules: list[tuple[Path, str]]) -> Iterator[tuple[Path, int]]:
    """(path, rights) of each Landlock rule."""
    hidden, devices = ([path for path, mode in rules if mode == wanted] for wanted in ("hide", "device"))
    yield from ((Path(device), READ_FILE | WRITE_FILE) for device in DEVICES)
    yield Path("/proc"), READ  # shows only public facts of other processes: Landlock also denies ptrace
    yield from ((device, READ_FILE | WRITE_FILE | IOCTL) for device in devices)
    if devices:  # NVIDIA's driver names its threads and gives up (CUDA error 304) where it cannot
        yield Path("/proc/self/task"), READ | WRITE_FILE | TRUNCATE
    for path, mode in rules:
        if mode == "write":
            yield path, ALL
        elif mode == "read":
            yield from around(path, hidden)


def around(path: Path, hidden: list[Path]) -> Iterator[tuple[Path, int]]:
    """Rights to read everything under `path` except what is hidden."""
    if not any(other.is_relative_to(path) for other in hidden):
        yield path, READ
        return
    yield path, READ_DIR  # Python's import lists the folder; rules are inherited, so names below are visible too
    for child in path.iterdir():
        if child not in hidden:
            yield from around(child, hidden)


def add_rule(ruleset: int, path: Path, allowed: int) -> None:
    """Grant rights on the file or below the folder. A symbolic link gets none: its target has its own rules."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # removed since the folder was listed
        return
    mode = os.fstat(descriptor).st_mode
    allowed &= ALL if stat.S_ISDIR(mode) else FILE_RIGHTS
    if allowed and not stat.S_ISLNK(mode):
        call(libc.syscall, ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
    os.close(descriptor)


def refuse_calls(gpu: bool) -> None:
    """Install the seccomp filter."""
    program = for_landlock(gpu)
    code = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    call(libc.prctl, SET_SECCOMP, SECCOMP_FILTER, header, 0, 0)


def call(function: ctypes._CFuncPtr, *arguments: object) -> int:
    """A C function's result. Raises OSError if it is negative."""
    result = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
