"""The recorded runs in docs/recorded give the figures that docs/LOOP.md states."""

import re
import subprocess
import sys

from conftest import ROOT


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
