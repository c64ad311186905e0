"""One experiment as a child process: sandboxed, limited, and killed together with its children.

`run` starts a guard, a small process in its own session. The guard starts the child, copies its output to a log of
limited size, checks time, memory, output and disk, and kills the whole tree in the end. A pipe connects the loop and
the guard: when the loop ends for any reason, the guard sees the pipe close and kills the tree. When the guard itself is
killed, the kernel kills the child (Linux). In that last case processes that the child detached survive outside
bubblewrap, and on macOS the child survives too. Memory and disk are checked four times a second, so a fast child can
exceed a limit by what it takes in 0.25 s; no file grows past the disk limit.
"""

import contextlib
import errno
import json
import os
import re
import resource
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from lab.machine import processes
from lab.machine.device import OUT_OF_MEMORY
from lab.trial.crash import Crash, summary
from lab.trial.sandbox import Policy, environment, launcher, wrap

INTERVAL = 0.25  # seconds between two checks of the limits
LOOK = 1.0  # seconds between two questions whether a run is to end; each wakes a process beside the training
GRACE = 1.0  # seconds from SIGTERM to SIGKILL
STALLED = 5.0  # seconds without a check: the guard itself was stopped (SIGSTOP), and the child with it
CHUNK = 1 << 16
STATUS_OF_SIGNAL = {  # of signals that the guard did not send
    signal.SIGABRT: "memory",  # MLX, out of GPU memory where no Python error can be raised
    signal.SIGKILL: "memory",  # the kernel, out of memory
    signal.SIGXFSZ: "disk",
    signal.SIGTERM: "killed",
    signal.SIGINT: "killed",
    signal.SIGHUP: "killed",
}
# EFBIG and ENOSPC (the same on Linux and macOS), MLX's RuntimeError, the error of lab.training.run.guarded.
OUT_OF_DISK = re.compile(r"\[Errno (27|28)\]|\[write\] Unable to write|error: No space left on device")


@dataclass(frozen=True)
class Limits:
    """Limits of one run: wall-clock seconds, bytes of memory in the whole tree, bytes of output, and bytes that it may
    add to its writable folders."""

    wall_seconds: float
    memory_bytes: int
    output_bytes: int = 16 << 20
    disk_bytes: int = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """How a run ended. status: "ok", "crash", a limit ("timeout", "memory", "output", "disk"), or "killed" from
    outside. `returncode` is negative for a signal; `crash` is None for "ok" and "killed"; `stopped_seconds` is how
    long a process of the run was stopped (SIGSTOP); `cpu_seconds` is the CPU time of all its processes."""

    status: str
    seconds: float
    returncode: int
    crash: Crash | None
    peak_memory_mb: float
    stopped_seconds: float = 0.0
    cpu_seconds: float = 0.0


def run(command: list[str], run_dir: Path, policy: Policy, limits: Limits, *, sandbox: str,
        env: Mapping[str, str] = os.environ, ended: Callable[[], bool] | None = None) -> Outcome:  # fmt: skip
    """Run `command` in the folder `run_dir` with the variables of `env` that `environment` passes. Its output goes to
    run_dir/run.log. It is killed once `ended()`, which is asked every LOOK seconds.

    `sandbox` is a kind from sandbox.KINDS. All processes of the child have ended when this returns or raises.
    Raises UserError for an invalid policy."""
    variables = environment(env, policy)
    job = {
        "command": wrap(command, policy, sandbox),
        "environment": variables,
        "folder": str(run_dir.resolve()),
        "writable": [str(folder.resolve()) for folder in policy.writable],
        "limits": asdict(limits),
        "signals_as_codes": sandbox == "bubblewrap",  # it exits with 128 + signal
    }
    Path(variables["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(launcher("lab.trial.guard", "guard"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    with process.stdout, process.stdin:
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            while ended and not select.select([process.stdout], [], [], LOOK)[0]:
                if ended():
                    process.stdin.close()
                    process.send_signal(signal.SIGCONT)
                    break
            answer = process.stdout.read()
        finally:
            process.stdin.close()  # makes the guard kill the tree
            process.send_signal(signal.SIGCONT)  # it may be stopped
            process.wait()
    if not answer:
        return Outcome("killed", time.monotonic() - began, process.returncode, None, 0.0)
    return _outcome(json.loads(answer))


def _outcome(fields: dict) -> Outcome:
    crash = fields["crash"]
    if crash:
        crash = Crash(**crash | {"last_steps": tuple(crash["last_steps"])})
    return Outcome(**fields | {"crash": crash})


def guard() -> None:
    """Main function of the guard's process: one line of JSON in, the outcome as JSON out."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    job = json.loads(line)
    processes.adopt_orphans()
    path = Path(job["folder"], "run.log")
    path.unlink(missing_ok=True)
    try:
        with open(path, "xb+", buffering=0) as log:
            outcome = _Watch(job, log).outcome()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        outcome = Outcome("disk", 0.0, 1, Crash("disk", f"{error.strerror}: {path}"), 0.0)
    with contextlib.suppress(BrokenPipeError):  # the loop has ended, and now its child has too
        os.write(1, json.dumps(asdict(outcome)).encode())


class _Watch:
    """Starts one child, watches it, kills its tree and reports the outcome."""

    def __init__(self, job: dict, log: BinaryIO) -> None:
        self.job, self.log = job, log
        self.limits = Limits(**job["limits"])
        self.folders = [Path(folder) for folder in job["writable"]]
        self.disk_before = processes.disk(self.folders, [])
        self.written = self.peak = 0
        self.stopped_seconds, self.checked = 0.0, time.monotonic()

    def outcome(self) -> Outcome:
        began = time.monotonic()
        self.deadline = began + self.limits.wall_seconds
        self.child = self.begin()
        self.tree = processes.Tree(self.child)
        try:
            stopped = self.watch()
        except OSError:
            self.tree.end(0)
            raise
        seconds = time.monotonic() - began
        self.tree.end(GRACE if stopped == "timeout" else 0)
        code = self.child.wait()
        stopped = stopped or self.rest()
        if self.job["signals_as_codes"] and code > 128:
            code = 128 - code
        status, crash = (stopped, self.stopped(stopped)) if stopped else self.ended(code)
        peak = max(self.peak, _largest_child())
        crash = None if status == "killed" else crash
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = used.ru_utime + used.ru_stime
        return Outcome(status, seconds, code, crash, peak / 2**20, self.stopped_seconds, cpu_seconds)

    def begin(self) -> subprocess.Popen:
        first = [*launcher("lab.trial.child", "start"), str(os.getpid()), str(self.limits.disk_bytes)]
        child = subprocess.Popen(
            [*first, *self.job["command"]],
            cwd=self.job["folder"],
            env=self.job["environment"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.set_blocking(child.stdout.fileno(), False)
        return child

    def watch(self) -> str:
        """Wait until the child ends (""), exceeds a limit (its name) or the loop ends ("killed")."""
        next_check = 0.0
        with selectors.DefaultSelector() as ready:
            ready.register(0, selectors.EVENT_READ)
            ready.register(self.child.stdout, selectors.EVENT_READ)
            while self.child.poll() is None:
                events = {key.fileobj for key, _ in ready.select(INTERVAL)}
                if 0 in events:
                    return "killed"
                if self.child.stdout in events and self.pump() == 0:
                    ready.unregister(self.child.stdout)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.child.wait(INTERVAL)  # a child usually closes its output by ending
                if self.written > self.limits.output_bytes:
                    return "output"
                if time.monotonic() >= next_check:
                    next_check = time.monotonic() + INTERVAL
                    if exceeded := self.check():
                        return exceeded
                    self.checked = time.monotonic()
        return ""

    def check(self) -> str:
        """The limit that is exceeded now, or ""."""
        members = self.tree.members()
        if self.tree.stopped or time.monotonic() - self.checked > STALLED:
            self.stopped_seconds += time.monotonic() - self.checked
        memory = processes.memory(members, self.limits.memory_bytes)
        self.peak = max(self.peak, memory)
        if time.monotonic() > self.deadline:
            return "timeout"
        if memory > self.limits.memory_bytes:
            return "memory"
        added = processes.disk(self.folders, members) - self.disk_before
        return "disk" if added > self.limits.disk_bytes else ""

    def pump(self) -> int | None:
        """Copy available output to the log, up to its limit. Returns bytes read: 0 at the end, None for none yet."""
        try:
            data = os.read(self.child.stdout.fileno(), CHUNK)
        except BlockingIOError:
            return None
        self.log.write(data[: max(self.limits.output_bytes - self.written, 0)])
        self.written += len(data)
        return len(data)

    def rest(self) -> str:
        """Check output and disk once more after the end."""
        while self.written <= self.limits.output_bytes and self.pump():
            continue
        if self.written > self.limits.output_bytes:
            return "output"
        return "disk" if processes.disk(self.folders, []) - self.disk_before > self.limits.disk_bytes else ""

    def stopped(self, limit: str) -> Crash:
        allowed = {
            "timeout": f"still running after {self.limits.wall_seconds:g} s",
            "memory": f"used more than {self.limits.memory_bytes >> 20} MiB of memory",
            "output": f"printed more than {self.limits.output_bytes} bytes",
            "disk": f"wrote more than {self.limits.disk_bytes >> 20} MiB to disk",
            "killed": "",
        }
        return self.crash(limit, allowed[limit])

    def ended(self, code: int) -> tuple[str, Crash | None]:
        """(status, crash) of a child that ended by itself."""
        if code == 0:
            return "ok", None
        if code < 0 and (status := STATUS_OF_SIGNAL.get(-code)):
            return status, self.crash(signal.Signals(-code).name, f"killed by {signal.Signals(-code).name}")
        crash = self.crash(signal.Signals(-code).name if code < 0 else f"exit {code}")
        if crash.type == "MemoryError" or OUT_OF_MEMORY.match(crash.message):
            return "memory", crash
        return "disk" if OUT_OF_DISK.match(crash.message) else "crash", crash

    def crash(self, kind: str, message: str = "") -> Crash:
        """A crash with this message; without a message, the crash found in the log."""
        self.log.seek(0)
        log = "" if message else self.log.read().decode(errors="replace")
        crash = summary(log, Path(self.job["folder"], "steps.jsonl"), kind)
        return Crash(kind, message, last_steps=crash.last_steps) if message else crash


def _largest_child() -> int:
    """Peak resident bytes of the largest ended process: includes peaks between two checks."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
