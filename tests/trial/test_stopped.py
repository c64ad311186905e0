"""A training, or its guard, that something stops (SIGSTOP) and continues, as tools that save power do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from checkout import Checkout
from processes_left import MARK, needs_proc, none_left

from lab.loop.journal import read
from lab.trial import guard
from lab.trial.guard import Limits
from lab.trial.sandbox import Policy

pytestmark = needs_proc
CHILD = "import os, time; print(os.getppid(), os.getpid(), flush=True); time.sleep({})"


def numbers(log: Path) -> list[int]:
    """The processes that a training has printed: its guard, and itself."""
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text("utf-8").endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.01)
    return [int(word) for word in log.read_text("utf-8").split()]


@pytest.mark.parametrize(("what", "seconds"), [("training", 1.5), ("guard and training", 5.5)])
def test_the_time_for_which_a_training_was_stopped_is_known(tmp_path, what, seconds):
    outcomes = []
    command, limits = [sys.executable, "-S", "-c", CHILD.format(seconds + 1.5)], Limits(20, 1 << 30)
    run = threading.Thread(
        target=lambda: outcomes.append(guard.run(command, tmp_path, Policy((tmp_path,)), limits, sandbox="none"))
    )
    run.start()
    stopped = numbers(tmp_path / "run.log")[1 if what == "training" else 0 :]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stopped:
            os.kill(pid, number)
        time.sleep(seconds * (number == signal.SIGSTOP))
    run.join()
    assert outcomes[0].status == "ok"
    assert seconds - 1 < outcomes[0].stopped_seconds < seconds + 2


def test_a_stopped_guard_does_not_keep_the_loop_from_ending_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lab.trial.guard import *; here = Path(sys.argv[1])\n"
        "run([sys.executable, '-S', '-c', sys.argv[2]], here, Policy((here,)), Limits(60, 1 << 30), sandbox='none')"
    )
    command = [sys.executable, "-c", code, str(tmp_path), CHILD.format(60)]
    loop = subprocess.Popen(command, env=os.environ | {MARK: str(tmp_path)}, stderr=subprocess.DEVNULL)
    parent, _ = numbers(tmp_path / "run.log")
    os.kill(parent, signal.SIGSTOP)
    loop.send_signal(signal.SIGINT)
    try:
        loop.wait(10)
    finally:
        loop.kill()
        loop.wait()
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGCONT)
    assert none_left(tmp_path)


def test_a_scorer_ends_with_the_loop_that_is_killed(tmp_path):
    (tmp_path / "prepare.py").write_text("import time; open('scoring', 'w').close(); time.sleep(60)")
    code = (
        "import sys; from pathlib import Path; from lab.trial.runner import Runner; here = Path(sys.argv[1])\n"
        "Runner(here, here, {}, 'none')._score(here, '', 0)"
    )
    loop = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {MARK: str(tmp_path)})
    until = time.monotonic() + 30
    while not (tmp_path / "scoring").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    loop.kill()
    loop.wait()
    assert none_left(tmp_path)


def test_a_run_that_was_stopped_does_not_count(tmp_path):
    checkout = Checkout(tmp_path)
    night = checkout.folder / "nights/n"
    command = checkout.command("agent_loop.py", "run", "--agent", "search", "--tag", "n", "--minutes", 0.1,
                               "--rigor", "none", "--max-experiments", 0, "--sandbox", "none")  # fmt: skip
    loop = subprocess.Popen(command, **checkout.where(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps, until = night / "runs/e0000-r1/steps.jsonl", time.monotonic() + 90
    try:
        while not (steps.exists() and steps.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        training = subprocess.check_output(["pgrep", "-f", "--", f"--run-dir {steps.parent}"], text=True).split()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in training:
                os.kill(int(pid), number)
            time.sleep(6 * (number == signal.SIGSTOP))
        assert loop.wait(120) == 0
    finally:
        loop.kill()
        loop.wait()
    runs = [record for record in read(night / "journal.jsonl") if record["event"] == "run"]
    assert [run["status"] for run in runs] == ["invalid", "ok"], json.dumps(runs)
    assert "the training was stopped for" in runs[0]["reason"]
