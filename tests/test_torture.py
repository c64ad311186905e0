"""The short form of `make torture`, and that its checks find what is broken."""

import json
import subprocess
import sys

from conftest import ROOT, environment
from processes_left import needs_proc

pytestmark = needs_proc

SHORT = """
import json, os, sys
from pathlib import Path
sys.path[:0] = ["benchmarks", "tests", "."]
import torture, stages
os.environ[torture.MARK] = sys.argv[1]
suite = torture.Suite(Path(sys.argv[1]))
suite.run(torture.deck("nights"), 3, seed=0)
print(*suite.table(), sep="\\n")
stage = suite.stage(stages.Nights)
stage.remember()
found = []
for path, change in [
    (stage.night / "results.tsv", lambda text: text + "more"),
    (stage.night / "worktree" / "train.py", lambda text: "pass"),
    (stage.journal, lambda text: text.partition("run")[0]),
    (next(stage.night.glob("results/*.json")), lambda text: text.replace('"val_bpb": ', '"val_bpb": 1')),
]:
    before = path.read_text()
    path.write_text(change(before))
    found.append(list(stage.broken()))
    path.write_text(before)
print(json.dumps([*found, list(stage.broken())]))
"""


def test_faults_in_a_night_lose_nothing_and_what_is_broken_is_found(tmp_path):
    command = [sys.executable, "-c", SHORT, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults injected, 0 results lost, 0 invariants broken" in done.stdout
    *broken, whole = json.loads(done.stdout.splitlines()[-1])
    wanted = ("results.tsv is not", "the worktree does not have", "results are lost", "the result of")
    assert [any(text in line for line in lines) for text, lines in zip(wanted, broken, strict=True)] == [True] * 4
    assert whole == []
