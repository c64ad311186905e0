"""Commands that stop before one of their writes, and a disk that can be filled, for benchmarks/torture.py."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from processes_left import MARK, marked

SECONDS = 600.0  # that a command may take
DISK = "48m"
INSIDE = "TORTURE_NAMESPACE"  # in the environment: mounts are this process's own

# ---- commands that stop before a write

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "subprocess.Popen"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def stop_before(number: int, count: Any) -> None:
    """Stop this process before its write `number`; `count` counts them. One is a file opened for writing, a line
    appended or synced, a file renamed or removed, or a process started."""
    own = os.getpid()

    def tick() -> None:
        if os.getpid() == own:
            count.value += 1
            if count.value == number:
                os.kill(own, signal.SIGSTOP)

    def hook(event: str, given: tuple) -> None:
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITING):
            tick()

    def ticking(function: Callable) -> Callable:
        return lambda *given: (tick(), function(*given))[1]

    os.write, os.fsync = ticking(os.write), ticking(os.fsync)
    sys.addaudithook(hook)


def jump(seconds: float) -> None:
    """Set the clocks of this process that a person can set."""

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    now = time.time
    time.time = lambda: now() + seconds
    for module in [m for name, m in sys.modules.items() if name.startswith(("lab.", "agent_loop"))]:
        if getattr(module, "datetime", None) is datetime:
            module.datetime = Jumped


class Ended(NamedTuple):
    status: int  # negative for a signal
    printed: str
    errors: str

    @property
    def clean(self) -> bool:
        """Whether it succeeded, was killed, or said in one line what is wrong."""
        last = (self.errors.splitlines() or [""])[-1]
        if "Traceback" in self.printed + self.errors:
            return False
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        refused = self.status == 1 and lines == [last]
        killed = self.status in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
        return self.status == 0 or killed or refused or (self.status, last) == (130, "stopped")


class Started:
    """A function in a process of its own, as if it were a command; `stop_at`: see `stop_before`."""

    def __init__(self, function: Callable[[], None], folder: Path, stop_at: int = 0):
        self.folder, self.count = folder, multiprocessing.Value("i", 0, lock=False)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become(function, stop_at)

    def _become(self, function: Callable[[], None], stop_at: int) -> None:
        status = 1
        try:
            os.setsid()
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stop_before(stop_at, self.count)
            function()
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self) -> Ended | None:
        """How it ended; None if it stopped before its write."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)
            if pid and os.WIFSTOPPED(status):
                return None
            if pid:
                texts = [(self.folder / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
                return Ended(os.waitstatus_to_exitcode(status), *texts)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return Ended(124, "", f"Traceback: it did not end within {SECONDS:.0f} s")

    def go_on(self) -> Ended:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        while not (ended := self.wait()):
            os.kill(self.pid, signal.SIGCONT)
        return ended

    def child(self, word: str) -> int:
        """Its process with this word in the command line; 0 if it ends without one."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for pid in marked(os.environ[MARK]):
                with suppress(OSError):
                    if word.encode() in Path("/proc", pid, "cmdline").read_bytes():
                        return int(pid)
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return 0
            time.sleep(0.005)
        return 0


# ---- the disk


class Disk:
    """A folder on a disk of its own that can be filled and made read-only; an ordinary one outside `in_namespace`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self.real = INSIDE in os.environ and self._mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs")

    def _mount(self, *options: object) -> bool:
        return not subprocess.run(["mount", *map(str, options), self.folder], capture_output=True).returncode

    def fill(self, left: int = 0) -> Callable[[], None]:
        """Leave `left` bytes free. The function that is returned frees them again."""
        filler, block = self.folder / "filler", b"\0" * (1 << 20)
        with open(filler, "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(block)
        if left:
            os.truncate(filler, max(0, filler.stat().st_size - left))
        return filler.unlink

    def close(self) -> None:
        if self.real:
            subprocess.run(["umount", "--lazy", self.folder], check=True)

    def read_only(self) -> Callable[[], None]:
        assert self._mount("--bind", self.folder)
        assert self._mount("-o", "remount,bind,ro")
        return lambda: subprocess.run(["umount", "--lazy", self.folder], check=True)


def in_namespace() -> None:
    """Start again in a mount namespace: its mounts end with it, and nobody else sees them."""
    command = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    if INSIDE in os.environ or shutil.which("unshare") is None:
        return
    if not subprocess.run([*command, "true"], capture_output=True).returncode:
        os.environ[INSIDE] = "1"
        os.execvp(command[0], [*command, sys.executable, *sys.argv])
