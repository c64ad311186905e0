"""How a night ends: signals, closed terminals and pipes, and a clock that is set; real processes on real terminals."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from datetime import time as time_of_day
from pathlib import Path

import pytest
from conftest import ROOT, environment
from processes_left import MARK, marked, needs_proc, none_left

from lab.loop import stop
from lab.loop.journal import Journal

pytestmark = needs_proc
DEVNULL = subprocess.DEVNULL


@contextmanager
def night(folder: Path, seconds: float = 0.6, flags: tuple = (), before: tuple = (), **streams) -> Iterator:
    """`agent_loop.py run` of simulated trainings that last so long; killed if a test leaves it running."""
    script = [sys.executable, str(ROOT / "tests/quick_night.py"), str(folder), str(seconds)]
    env = environment(
        folder / "cache", **{MARK: str(folder), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "xterm"}
    )
    command = [*before, *script, "run", "--agent", "search", "--tag", "n", "--rigor", "none", *map(str, flags)]
    process = subprocess.Popen(command, cwd=folder, env=env, **{"stdin": DEVNULL, "start_new_session": True} | streams)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def begun(folder: Path, name: str = "e0000-r1") -> None:
    """Wait until this training runs."""
    log, until = folder / "runs" / name / "run.log", time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()):
        assert time.monotonic() < until, f"{name} never began"
        time.sleep(0.01)


def whole(folder: Path, running: str = "e0000-r1") -> Journal:
    """The journal, after checking that the training that ran was recorded and that no process is left."""
    assert none_left(folder)
    journal = Journal(folder / "repo/nights/n")
    assert "done" in (folder / "runs" / running / "run.log").read_text()
    assert journal.state.pending is None
    assert [e.status for e in journal.state.experiments][:1] == ["keep"]
    return journal


@pytest.fixture
def terminal():
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    for end in (ours, theirs):
        with suppress(OSError):
            os.close(end)


def takes_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def on(theirs: int) -> dict:
    return {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": takes_terminal}


def drained(ours: int) -> bytes:
    """Everything shown until the other end closes."""
    shown = b""
    with suppress(OSError):
        while data := os.read(ours, 1 << 16):
            shown += data
    return shown


def test_a_night_whose_terminal_is_closed_ends_after_its_experiment(tmp_path, terminal):
    ours, theirs = terminal
    with night(tmp_path, **on(theirs)) as process:
        os.close(theirs)
        begun(tmp_path)
        os.close(ours)  # the kernel sends SIGHUP to the foreground, and SIGCONT
        assert process.wait(20) == 0
        assert len(whole(tmp_path).state.experiments) == 1


def test_a_shell_and_the_kernel_may_both_report_the_closed_terminal(tmp_path):
    with night(tmp_path, stdout=DEVNULL, stderr=DEVNULL) as process:
        begun(tmp_path)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        assert process.wait(20) == 0
        assert len(whole(tmp_path).state.experiments) == 1


def test_a_night_started_with_nohup_goes_on_without_its_terminal(tmp_path, terminal):
    ours, theirs = terminal
    streams = on(theirs) | {"stderr": DEVNULL}
    with night(tmp_path, 0.3, ("--max-experiments", 2), before=("nohup",), **streams) as process:
        os.close(theirs)
        begun(tmp_path)
        os.close(ours)
        assert process.wait(30) == 0
        assert len(whole(tmp_path).state.experiments) == 3
    assert "ended: done" in (tmp_path / "nohup.out").read_text()


def test_a_night_in_the_background_of_a_closed_terminal_goes_on(tmp_path, terminal):
    """As with `disown` or setsid: no SIGHUP comes, and every write fails."""
    ours, theirs = terminal
    with night(tmp_path, 0.3, ("--max-experiments", 2), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        begun(tmp_path)
        os.close(ours)
        assert process.wait(30) == 0
        assert len(whole(tmp_path).state.experiments) == 3


def test_a_night_whose_output_nobody_reads_any_more_ends_after_its_experiment(tmp_path):
    with night(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert b"night n" in process.stdout.readline()  # as `head -1`
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 0
        assert len(whole(tmp_path).state.experiments) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_after_the_experiment_and_two_at_once(tmp_path, number):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    with night(tmp_path / "once", stdout=subprocess.PIPE) as process:
        begun(tmp_path / "once")
        process.send_signal(number)
        shown, _ = process.communicate(timeout=20)
        assert b"ended: stopped" in shown
        assert process.returncode == 0
        whole(tmp_path / "once")
    with night(tmp_path / "twice", 60, stdout=DEVNULL, stderr=subprocess.PIPE) as process:
        begun(tmp_path / "twice")
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)
        assert process.communicate(timeout=20)[1].strip() == b"stopped"
        assert process.returncode == 130
        assert none_left(tmp_path / "twice")


def test_ctrl_backslash_ends_at_once_with_the_summary(tmp_path, terminal):
    ours, theirs = terminal
    with night(tmp_path, 60, **on(theirs)) as process:
        os.close(theirs)
        begun(tmp_path)
        os.write(ours, b"\x1c")
        shown = drained(ours)
        assert process.wait(20) == 130, shown
        assert b"resume with: python agent_loop.py run --tag n" in shown
        assert b"Traceback" not in shown
        assert none_left(tmp_path)


def test_a_signal_while_output_is_blocked_does_not_end_the_night(tmp_path):
    """A pager that is not read from blocks the night inside a write, where its own message cannot be written."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ: one page
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"x" * 512):
            continue
    os.set_blocking(writing, True)
    with night(tmp_path, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        while "pipe_write" not in Path(f"/proc/{process.pid}/wchan").read_text("utf-8"):  # it waits in a write
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None, process.stderr.read()
        with open(reading, "rb") as pager:
            assert b"ended: stopped" in pager.read()
        assert process.wait(20) == 0


@pytest.mark.parametrize("what", ["loop", "all"])
def test_a_stopped_night_goes_on_when_it_is_continued(tmp_path, what):
    with night(tmp_path, flags=("--max-experiments", 1), stdout=subprocess.PIPE) as process:
        begun(tmp_path)
        victims = [process.pid] if what == "loop" else [int(pid) for pid in marked(tmp_path)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in victims:
                os.kill(pid, number)
            time.sleep(1)
        assert b"ended: done" in process.communicate(timeout=20)[0]
        assert len(whole(tmp_path).state.experiments) == 2


class Clock:
    """The computer's clock and one that nobody sets, in seconds."""

    def __init__(self, monkeypatch, now: str):
        self.wall, self.since = datetime.fromisoformat(now).timestamp(), 1000.0
        monkeypatch.setattr(stop.time, "time", lambda: self.wall)
        monkeypatch.setattr(stop, "seconds_with_sleep", lambda: self.since)

    def wait(self, hours: float) -> None:
        self.wall += 3600 * hours
        self.since += 3600 * hours


@pytest.mark.parametrize(
    ("begun", "hours", "jump", "reached"),
    [
        ("2026-11-24 23:00", 7.9, 0, False),
        ("2026-11-24 23:00", 8.1, 0, True),
        ("2026-11-24 08:00", 22.9, 0, False),  # 07:00 of tomorrow
        ("1970-01-01 00:01", 1, 495_000, False),  # no battery for the clock: NTP sets it to 2026-06-21 05:01 or so
        ("2026-11-25 23:00", 8.1, -24, True),  # a day ahead at the start
        ("2026-11-25 23:00", 7.9, -24, False),
        ("2026-11-24 06:30", 0.3, 0.4, True),  # 06:48 was 07:12
        ("2026-11-24 22:00", 1, 8.5, True),  # set past the time
        ("2026-11-24 22:00", 8.9, -3, False),  # the clock shows 03:54
    ],
)
def test_the_time_of_day_is_that_of_a_clock_which_may_be_set_meanwhile(monkeypatch, begun, hours, jump, reached):
    clock = Clock(monkeypatch, begun)
    until = stop.Until(time_of_day(7))
    clock.wait(hours)
    clock.wall += 3600 * jump
    assert (until.seconds <= 0) == reached


@pytest.mark.parametrize(("day", "hours"), [("2026-10-24", 9), ("2026-03-28", 7), ("2026-06-01", 8)])
def test_a_night_with_a_change_to_or_from_summer_time_ends_by_the_clock_on_the_wall(monkeypatch, day, hours):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        clock = Clock(monkeypatch, f"{day} 23:00")
        until = stop.Until(time_of_day(7))
        assert until.seconds == 3600 * hours
        clock.wait(hours - 0.1)
        assert until.seconds == pytest.approx(360)
        clock.wait(0.2)
        assert until.seconds < 0
    finally:
        monkeypatch.undo()
        time.tzset()
