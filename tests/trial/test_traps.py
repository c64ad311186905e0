"""What an experiment leaves for the loop and the scorer, which run without a sandbox; and what it takes of the machine.

The attempts are in tests/attempts.py. All traps lie in one run folder, which the real scorer then scores."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent, indent

import numpy as np
import pytest
from attempts import CHECKPOINTS, LEFT, RESOURCES, ROOT
from conftest import ROOT as CHECKOUT
from outside import Outside
from processes_left import MARK, needs_proc, none_left

from lab.files import remove
from lab.trial import guard, runner, sandbox
from lab.trial.guard import Limits
from lab.trial.runner import Runner
from lab.trial.sandbox import Policy

pytestmark = needs_proc
KIND = sandbox.available()
HONEST = """
import prepare
from lab.machine.backend import mx, nn
class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = mx.zeros((vocab_size, vocab_size))
    def __call__(self, tokens):
        return self.table[tokens]
def build_model(vocab_size):
    MORE
    return Model(vocab_size)
"""
SETTER = """
import json, os, site, sys
for program, names in json.load(open("traps.json")):
    globals().update(names)
    try:
        exec(program)
    except OSError as error:
        print(type(error).__name__, error, program, flush=True)
"""


class Night:
    """A night's folder with one trained run, whose checkpoint fits HONEST."""

    def __init__(self, folder: Path, prepared: Path, kind: str) -> None:
        current = json.loads((prepared.parents[1] / "current.json").read_text())
        settings = current | {"minutes": 5.0, "steps": None}
        self.runner = Runner(folder, CHECKOUT, settings, kind, echo=self.hear)
        self.run_dir, self.printed = folder / "runs" / "one", ""
        self.run_dir.mkdir(parents=True)
        self.checkpoint(current["preset"]["tokenizer"]["vocab_size"])

    def hear(self, line: str) -> None:
        self.printed += line + "\n"

    def checkpoint(self, size: int) -> None:
        from lab.machine.backend import mx

        table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
        mx.save_safetensors(str(self.run_dir / "checkpoint.safetensors"), {"table": mx.array(table)})

    def score(self, more: str = "pass") -> dict:
        return self.runner._score(
            self.run_dir, HONEST.replace("    MORE", indent(dedent(more), "    ")), 0, None, "--batches", "1"
        )


@pytest.fixture
def night(tmp_path: Path, prepared: Path) -> Night:
    return Night(tmp_path / "night", prepared, "none")


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_no_trap_in_the_run_folder_harms_the_loop_or_the_scorer(kind: str, night: Night, tmp_path: Path) -> None:
    if fault := sandbox.self_test(kind):
        pytest.skip(f"{kind} does not work here: {fault}")
    night.runner.sandbox = kind
    with ExitStack() as stack:
        stack.callback(remove, night.run_dir, night.run_dir.parent)  # pytest cannot
        outside = Outside(tmp_path / "outside", f"lab{os.getpid()}t", stack)
        world = []
        for number, trap in enumerate(LEFT):
            names = outside.set_up(number, trap) | {"LOOP": os.getpid()}
            world.append((dedent(trap.program).strip(), names | {"IMPORTED": f"open({names['HOME'] + '/new'!r}, 'w')"}))
        (night.run_dir / "traps.json").write_text(json.dumps(world))
        outcome = night.runner._train(night.run_dir, SETTER, 0, 60)
        assert outcome.status == "ok", night.printed
        assert night.score()["status"] == "tried"
        assert "SECRET" not in night.printed
        assert [trap.name for number, trap in enumerate(LEFT) if outside.reached(number)] == []
    assert not night.run_dir.exists()


@pytest.mark.parametrize("what", RESOURCES)
def test_a_run_takes_no_more_than_its_share_and_leaves_nothing_running(tmp_path: Path, what: str) -> None:
    if ROOT and "cannot be listed" in what:
        pytest.skip("root lists every folder")
    program, status = RESOURCES[what]
    (tmp_path / "train.py").write_text(f"import os, signal, sys, time\n{program}")
    limits = Limits(2 if status == "timeout" else 20, 200 << 20, 1 << 20, 20 << 20)
    command, marked = [sys.executable, "-S", "train.py"], os.environ | {MARK: str(tmp_path)}
    outcome = guard.run(command, tmp_path, Policy((tmp_path,)), limits, sandbox=KIND, env=marked)
    assert outcome.status == status, outcome
    assert none_left(tmp_path, 0)


# The scorer's own processes

SCORER = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
open("up", "a").close()
time.sleep(60)
"""
LOOP = """
import sys
from pathlib import Path
from lab.trial.runner import Runner
folder = Path(sys.argv[1])
Runner(folder, folder, {}, "none")._score(folder / "runs/one", "", 0)
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_scorer_ends_with_the_loop(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "prepare.py").write_text(SCORER)
    command, env = [sys.executable, "-c", LOOP, str(tmp_path)], os.environ | {MARK: str(tmp_path)}
    with subprocess.Popen(command, cwd=CHECKOUT, env=env, stderr=subprocess.DEVNULL) as loop:
        until = time.monotonic() + 30
        while not list(tmp_path.rglob("up")) and time.monotonic() < until:
            time.sleep(0.01)
        loop.send_signal(end)
    assert loop.returncode
    assert none_left(tmp_path)


def test_what_a_model_starts_ends_with_the_score_and_its_reason_is_one_short_line(night: Night, monkeypatch) -> None:
    monkeypatch.setenv(MARK, str(night.run_dir))
    start = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        raise RuntimeError("\\x1b[31mred\\x1b]0;title\\x07\\n" + "\\u202e" + "x" * 9999)
    """
    score = night.score(start)
    assert none_left(night.run_dir, 0)
    assert score["reason"].startswith("the model failed: RuntimeError: red xxx")
    assert score["reason"].isprintable()
    assert len(score["reason"]) <= 400


def test_a_model_whose_child_holds_its_pipe_cannot_stop_the_night(night: Night, monkeypatch) -> None:
    monkeypatch.setattr(runner, "SCORE_SECONDS", 3.0)
    score = night.score("import os, time\nos.fork() or time.sleep(60)\nos._exit(0)")
    assert score == {"status": "rejected", "reason": "scoring failed: timeout: still running after 3 s"}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_what_is_no_checkpoint_is_rejected(night: Night, what: str) -> None:
    path = night.run_dir / "checkpoint.safetensors"
    path.unlink()
    exec(CHECKPOINTS[what], {"os": os, "PATH": str(path)})
    night.runner._disarm(night.run_dir)
    score = night.score()
    assert score["status"] == "rejected"
    assert re.search("has no checkpoint.safetensors|checkpoint is damaged", score["reason"])
    assert not path.with_name(path.name + ".ran").exists()
