"""An edit of a night's train.py, by a person or a coding agent, is judged, refused in one line or saved: never lost."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkout import Checkout, run_loop
from conftest import refusal
from processes_left import MARK, needs_proc, none_left

from lab.trial.sandbox import available

pytestmark = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")
TRY = ("agent_loop.py", "try", "--tag", "edits", "--rigor", "none", "-m", "lower")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    made = Checkout(tmp_path_factory.mktemp("edits"))
    run_loop(made, "edits", "--max-experiments", 0, "--rigor", "none")
    return made


@pytest.fixture
def path(checkout):
    """train.py in the night's worktree, whole again afterwards."""
    path = checkout.folder / "nights" / "edits" / "worktree" / "train.py"
    before = path.read_bytes()
    yield path
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(before)


def lower(path: Path, value: str) -> bytes:
    edited = path.read_text(encoding="utf-8").replace("FINAL_LR = SETTINGS.final_lr", f"FINAL_LR = {value}")
    assert value in edited
    return edited.encode()


def saved(checkout: Checkout) -> list[bytes]:
    return [file.read_bytes() for file in sorted((checkout.folder / "nights" / "edits" / "saved").glob("*"))]


def test_an_edit_that_does_not_parse_is_refused_in_one_line_and_stays(checkout, path):
    broken = path.read_bytes() + b"def (:\n"
    path.write_bytes(broken)
    done = checkout.python(*TRY, check=False)
    assert refusal(done).startswith("error: refused: does not parse: invalid syntax")
    assert path.read_bytes() == broken


@pytest.mark.parametrize("kind", ["latin", "link", "folder", "nul"])
def test_a_file_that_is_no_source_is_refused_in_one_line_and_stays(checkout, path, tmp_path, kind):
    if kind in ("latin", "nul"):
        path.write_bytes(path.read_bytes() + ("# größer\n".encode("latin-1") if kind == "latin" else b"\0\n"))
        before = path.read_bytes()
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "elsewhere.py")
    line = refusal(checkout.python(*TRY, check=False))
    not_regular = "is not a regular file"
    reasons = {"latin": "is not UTF-8", "link": not_regular, "folder": not_regular, "nul": "does not parse"}
    assert reasons[kind] in line
    assert path.is_dir() if kind == "folder" else path.is_symlink() if kind == "link" else path.read_bytes() == before


def test_an_edit_by_an_editor_of_windows_is_judged(checkout, path):
    path.write_bytes(b"\xef\xbb\xbf" + lower(path, "0.031").replace(b"\n", b"\r\n"))
    assert "discard: " in (printed := checkout.python(*TRY).stdout) or "keep: " in printed


def test_a_cut_try_does_not_lose_the_next_edit(checkout, path):
    """A coding agent's shell ends its commands after two minutes; it edits again, and something else runs on."""
    path.write_bytes(lower(path, "0.037"))
    with subprocess.Popen(checkout.command(*TRY), **checkout.where(), stdout=subprocess.DEVNULL) as cut:
        until = time.monotonic() + 60
        while not checkout.night("edits").state.pending and time.monotonic() < until:
            time.sleep(0.02)
        cut.kill()
    edit = re.sub(rb"FINAL_LR = \S+", b"FINAL_LR = 0.041", path.read_bytes())  # of the first edit, or of the incumbent
    path.write_bytes(edit)
    done = run_loop(checkout, "edits", "--max-experiments", 0, "--rigor", "none")
    assert edit in saved(checkout)
    assert "the edit is saved as " in done.stdout


@needs_proc
@pytest.mark.parametrize(("phase", "number"), [("preflight", signal.SIGTERM), ("scoring", signal.SIGHUP)])
def test_a_try_that_is_ended_keeps_its_edit_and_leaves_no_process(checkout, path, phase, number, tmp_path):
    value = {"preflight": b"0.043", "scoring": b"0.047"}[phase]
    edit = re.sub(rb"FINAL_LR = \S+", b"FINAL_LR = " + value, path.read_bytes())
    path.write_bytes(edit)
    runs, known = path.parents[1] / "runs", len(checkout.night("edits").state.experiments)
    begun = {"preflight": runs / "preflight" / "run.log", "scoring": runs / f"e{known:04d}-r1" / "score.log"}[phase]
    begun.unlink(missing_ok=True)
    where = checkout.where()
    where["env"] |= {MARK: str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(checkout.command(*TRY), **where, **pipes) as ended:
        until = time.monotonic() + 100
        while not begun.exists():
            assert ended.poll() is None, ended.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(ended.pid, number)
        printed, errors = ended.communicate(timeout=30)
    assert (ended.returncode, errors.splitlines()[-1]) == (130, "stopped")
    assert none_left(tmp_path)
    assert saved(checkout)[-1] == edit
    assert "the edit is saved as " in printed
    pending = checkout.night("edits").state.pending
    if phase == "preflight":
        assert path.read_bytes() == edit  # the same command tries it again
    else:
        assert pending.edit["values"] == {"FINAL_LR": float(value)}
        run_loop(checkout, "edits", "--max-experiments", 0, "--rigor", "none")
        assert checkout.night("edits").state.experiments[pending.id].status in ("keep", "discard")
