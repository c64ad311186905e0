"""System calls that a sandbox refuses, as a seccomp filter: what neither path rules nor namespaces cover.

Linux on x86-64 and arm64. A refused call fails with EPERM. Both sandboxes refuse the user's keys, the kernel's log,
io_uring and the sockets that no network namespace separates (to the host of a virtual machine, for example). Landlock,
which restricts little but paths, also refuses every socket, what changes a file's permissions, times and attributes,
and what reaches other processes of the same user.
"""

import os
import platform
import socket
import struct

from lab.trial.child import execute

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit architecture, column of the numbers
# Numbers from asm/unistd.h (x86-64, arm64); -1 where the machine lacks the call.
KERNEL = {
    "io_uring_setup": (425, 425), "syslog": (103, 116),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
METADATA = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "inotify_add_watch": (254, 27), "fanotify_mark": (301, 263),
}  # fmt: skip
PROCESSES = {
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip
SOCKET, SOCKETPAIR, PRLIMIT, IOCTL = (41, 198), (53, 199), (302, 261), (16, 29)
SEPARATED = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16: netlink, which tells the addresses
CHANGE_FLAGS = (0x40086602, 0x401C5820)  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR

Line = tuple[int, int, int, int]  # operation, lines to skip if true, if false, operand
LOAD, AND, EQUAL, AT_LEAST, ANSWER = 0x20, 0x54, 0x15, 0x35, 0x06
KILL, REFUSE, ALLOW = (ANSWER, 0, 0, 0x80000000), (ANSWER, 0, 0, 0x00050001), (ANSWER, 0, 0, 0x7FFF0000)
NUMBER, ARCHITECTURE, FIRST, SECOND = ((LOAD, 0, 0, offset) for offset in (0, 4, 16, 24))  # in seccomp_data


def for_bubblewrap() -> bytes:
    """The filter for bubblewrap, whose namespaces cover the rest."""
    return _program(KERNEL, {SOCKET: [FIRST, *_if_one_of(SEPARATED, ALLOW), REFUSE]})


def for_landlock(gpu: bool = False) -> bytes:
    """The filter for Landlock. Of socket pairs only streams are allowed: a datagram has an address of its own.

    With an NVIDIA GPU, local sockets of packets are allowed: its driver does not start without one (CUDA error 304)."""

    def of_kind(kind: int) -> list[Line]:
        return [SECOND, (AND, 0, 0, 0xF), (EQUAL, 1, 0, kind), REFUSE, ALLOW]

    unix = [FIRST, (EQUAL, 1, 0, socket.AF_UNIX), REFUSE]
    rules = {
        SOCKET: [*unix, *of_kind(socket.SOCK_SEQPACKET)] if gpu else [REFUSE],
        SOCKETPAIR: [*unix, *of_kind(socket.SOCK_STREAM)],
        PRLIMIT: [FIRST, *_if_one_of((0,), ALLOW), REFUSE],  # 0: the process itself
        IOCTL: [SECOND, *_if_one_of(CHANGE_FLAGS, REFUSE), ALLOW],
    }
    return _program(KERNEL | METADATA | PROCESSES, rules)


def filtered(*bubblewrap: str) -> None:
    """Become this command of bubblewrap, which reads its filter from a file."""
    file = os.memfd_create("filter", 0)  # 0: it stays open
    os.write(file, for_bubblewrap())
    os.lseek(file, 0, os.SEEK_SET)
    execute([bubblewrap[0], "--seccomp", str(file), *bubblewrap[1:]])


def _program(refused: dict[str, tuple[int, int]], rules: dict[tuple[int, int], list[Line]]) -> bytes:
    """Allow all calls but `refused` and those that their own rules answer otherwise."""
    if platform.machine() not in MACHINES:
        raise OSError(f"no sandbox on {platform.machine()}, only on x86-64 and arm64")
    architecture, column = MACHINES[platform.machine()]
    lines = [ARCHITECTURE, (EQUAL, 1, 0, architecture), KILL, NUMBER]  # another architecture has other numbers
    lines += [(AT_LEAST, 0, 1, 0x40000000), REFUSE]  # the numbers of x32
    lines += _if_one_of([numbers[column] for numbers in refused.values() if numbers[column] >= 0], REFUSE)
    for numbers, rule in rules.items():
        lines += [(EQUAL, 0, len(rule), numbers[column]), *rule]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, ALLOW])


def _if_one_of(values: list[int] | tuple[int, ...], then: Line) -> list[Line]:
    return [line for value in values for line in ((EQUAL, 0, 1, value), then)]
