"""The short form of `make torture`, and that its checks find what is broken."""

import json
import subprocess
import sys

from conftest import ROOT
from processes_left import needs_proc

pytestmark = needs_proc

DAMAGED = """
import json, os, sys
from pathlib import Path
sys.path[:0] = ["benchmarks", "tests", "."]
folder = Path(sys.argv[1])
import torture, stages
os.environ[torture.MARK] = str(folder)
stage = torture.Suite(folder).stage(stages.Nights)
fault = next(fault for fault in torture.FAULTS if fault.when == "rest" and stages.Nights in fault.stages)
found = []
for path, change in [
    (lambda: stage.night / "results.tsv", lambda text: text + "more"),
    (lambda: stage.night / "worktree" / "train.py", lambda text: "pass"),
    (lambda: stage.journal, lambda text: text.partition("run")[0]),
    (lambda: next(stage.night.glob("results/*.json")), lambda text: text.replace("0.", "1.")),
]:
    stage.begin(fault, None)
    before = path().read_text()
    path().write_text(change(before))
    found.append(list(stage.broken()))
    path().write_text(before)
print(json.dumps([*found, list(stage.broken()), stage.lost]))
"""


def test_faults_in_a_night_lose_nothing(tmp_path):
    command = [sys.executable, "benchmarks/torture.py", "--only", "nights", "--faults", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 faults injected, 0 results lost, 0 invariants broken" in done.stdout
    assert json.loads((tmp_path / "torture.json").read_text())["broken"] == []


def test_what_is_broken_is_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    *broken, whole, lost = json.loads(done.stdout.splitlines()[-1])
    wanted = ("results.tsv is not", "the worktree does not have", "results are lost", "the result of")
    assert [any(text in line for line in lines) for text, lines in zip(wanted, broken, strict=True)] == [True] * 4
    assert (whole, lost) == ([], 2)  # the baseline and one experiment
