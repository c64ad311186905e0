"""Which processes a test left behind: those that inherited a mark in their environment, wherever they moved since."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
MARK = "AUTORESEARCH_TEST_MARK"


def marked(mark: object) -> list[str]:
    """The numbers of the living processes that were started with MARK=mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            inherited = Path("/proc", pid, "environ").read_bytes().split(b"\0")
            found += [pid] * (f"{MARK}={mark}".encode() in inherited)
    return found


def none_left(mark: object, seconds: float = 10) -> bool:
    """Whether all of them end within some seconds."""
    until = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.02)
    return not marked(mark)
