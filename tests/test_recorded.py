"""The recorded runs in docs/recorded give the figures that docs/LOOP.md states."""

import csv
import re
import subprocess
import sys

from conftest import ROOT

from lab.loop.pace import paced
from lab.loop.verdict import Code, Run, decide


def test_the_figures_of_the_docs_follow_from_the_recorded_runs():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "recorded.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name.strip(): float(value) for name, value in re.findall(r"^  (.+): (\S+)$", done.stdout, re.M)}
    text = " ".join((ROOT / "docs" / "LOOP.md").read_text().split())
    for name, shown in (
        ("sd", "a standard deviation of {:.4f}"), ("sd at equal tokens", "numbers of tokens it is {:.4f}"),
        ("seed sd", "a seed moves a run by {:.4f}, and a difference varies"),
        ("pair sd, constant", "by {:.4f} for changes of constants"),
        ("pair sd, structure", "by {:.4f} for changes of the structure"), ("ended", "this ends {:.0f} of them"),
        ("winners", "none of the {:.0f} runs that won"),
    ):  # fmt: skip
        assert shown.format(found[name]) in text, name
    assert f"{found['short slope, share']:.2f} with half a million" in text
    assert f"error of {100 * found['tokens by the speed, error']:.1f} %" in text
    assert f"saves {100 * found['saved']:.0f} % of the training" in text
    assert found["winners ended"] == 0


def test_a_change_without_effect_that_ran_after_other_programs_had_ended_is_not_kept():
    """busy.csv: code 3 changes an epsilon and counts as other work. The pace misses a part of what the others took."""
    runs = {code: [] for code in range(4)}
    lines = (ROOT / "docs" / "recorded" / "busy.csv").read_text().splitlines()
    for at, row in enumerate(csv.DictReader(lines)):
        known = (float(row["pace"]), at, int(row["tokens"]))
        runs[int(row["code"])].append(Run(int(row["seed"]), float(row["val_bpb"]), *known))
    candidate, incumbent, *others = paced([Code(code, runs[code], work=3 * (code == 3)) for code in (3, 0, 1, 2)], 0)
    assert decide(candidate, incumbent, others, new_seed=9).verdict == "discard"
