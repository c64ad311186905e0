"""What a shell, a notebook or a service leaves in the environment decides nothing: locale, Python's own variables."""

import re
import subprocess
import sys

import pytest
from checkout import MINUTES, Checkout
from conftest import environment

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MPLCONFIGDIR": "/dev/null/none", "TERM": "dumb"}
NIGHT = ("agent_loop.py", "run", "--agent", "search", "--minutes", MINUTES, "--max-experiments", 1, "--rigor", "none",
         "--tag")  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("environment"))


def output(checkout: Checkout, *arguments: object, **more: str) -> str:
    """What a command that has to succeed prints with these variables."""
    env = environment(checkout.cache, **more)
    done = subprocess.run(checkout.command(*arguments), cwd=checkout.folder, env=env, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout + done.stderr).decode("ascii" if more.get("LC_ALL") else "utf-8")


@pytest.fixture(scope="module")
def printed(checkout):
    """What a night prints on a terminal that knows ASCII alone; its train.py has other letters."""
    source = checkout.folder / "train.py"
    source.write_text(source.read_text(encoding="utf-8") + "# größer als µ\n", encoding="utf-8")
    checkout.git("-c", "user.name=u", "-c", "user.email=u@localhost", "commit", "--quiet", "-am", "größer")
    return output(checkout, *NIGHT, "ascii", **ASCII)


def test_a_terminal_that_knows_ascii_alone_shows_question_marks_and_files_stay_utf_8(checkout, printed):
    output(checkout, "train.py", "--steps", 2, **ASCII)
    assert "±" not in printed
    assert re.search(r"-?\d\.\d+ \? \d\.\d+ bpb", printed)
    worktree = checkout.folder / "nights" / "ascii" / "worktree" / "train.py"
    worktree.write_text(worktree.read_text(encoding="utf-8").replace("FINAL_LR = SETTINGS.final_lr", "FINAL_LR = 0.02"))
    output(checkout, "agent_loop.py", "try", "--tag", "ascii", "--rigor", "none", "-m", "kürzer", **ASCII)
    assert "kürzer" in (checkout.folder / "nights" / "ascii" / "results.tsv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "more", [NOTEBOOK, {"PYTHONOPTIMIZE": "2"}, {"PYTHONWARNINGS": "error", "COLUMNS": "0"}], ids=str
)
def test_a_report_is_written_whatever_the_environment_holds(checkout, printed, tmp_path, more):
    rc = tmp_path / "matplotlibrc"
    rc.write_text("text.usetex: True\n", encoding="utf-8")
    output(checkout, "agent_loop.py", "report", "--tag", "ascii", "--no-stories", MATPLOTLIBRC=str(rc), **more)


def test_make_keeps_pythons_own_variables_from_the_commands(checkout, tmp_path):
    """A module that shadows one of Python's or ours, or a wrong value, would end them before the first line."""
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    (checkout.folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    python = checkout.folder / ".venv" / "bin" / "python"
    python.unlink(missing_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (checkout.folder / ".venv" / ".ready").touch()
    bad = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "none", "PYTHONHOME": "/none"}
    where = {"cwd": checkout.folder, "env": environment(checkout.cache, **bad)}
    done = subprocess.run(["make", "train", "STEPS=2"], **where, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
