"""The benchmarks that are more than a script: what they measure is real, what they fit is what was there."""

import argparse
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import bench as bench_module
from benchmarks import sweep
from lab.machine.fit import block_parameters


def bench(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/bench.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_measure_is_printed_and_written_under_its_lasting_name(tmp_path):
    done = bench("loader", "--rounds", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["loader.share"] == report["all"]["loader"]["share"]
    assert 0 < report["loader.share"] < 0.05
    assert "step_seconds" in done.stdout


def test_a_whole_run_is_taken_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "STORIES", 400)
    monkeypatch.setattr(bench_module, "STEPS", 6)
    found = bench_module.run(argparse.Namespace(rounds=1), tmp_path)
    assert 0 < found["outside_step_share"] < 0.5
    assert found["scoring_share"] == found["scoring_s"] / bench_module.BUDGET
    assert min(found["startup_s"], found["scoring_s"], found["tokens_per_second"]) > 0


@pytest.mark.parametrize("arguments", [["lodaer"], ["loader", "--rounds", "1"]])
def test_mistakes_are_one_line(arguments):
    done = bench(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


TINY = {"vocab": 300, "sequence_length": 32, "depth": 2, "width": 64, "head_dim": 32, "softcap": 15.0, "window": "L",
        "dtype": "float32", "rows": 2, "tokens_per_step": 128}  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "ours-2", "plain"])
def test_a_stepper_takes_the_steps_it_is_asked_for(kind):
    """With two processes too: rank 0 answers, the other ends with it."""
    command = [sys.executable, "benchmarks/stepper.py", kind, json.dumps(TINY)]
    done = subprocess.run(command, cwd=ROOT, input="2\n3\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ready, *answers = map(json.loads, done.stdout.splitlines())
    assert ready["ready"] == kind
    assert [len(answer["seconds"]) for answer in answers] == [2, 3]
    assert min(answers[0]["seconds"]) > 0


def test_ratios_are_to_the_faster_of_ours():
    seconds = {"ours": [2.0, 2.0], "ours-2": [1.0, 1.0], "plain": [4.0, 4.0], "torch": [1.5, 1.5]}
    parts = {"forward": [1.0], "forward and backward": [1.5], "optimizer": [0.5]}
    found = bench_module._step_report(seconds, parts, {}, 1e6)
    assert (found["processes"], found["ours_ratio"], found["plain_ratio"], found["torch_ratio"]) == (2, 2, 4, 1.5)
    del seconds["ours-2"]
    found = bench_module._step_report(seconds, parts, {}, 1e6)
    assert (found["processes"], found["plain_ratio"], found["torch_ratio"]) == (1, 2, 0.75)


def test_plain_and_ours_learn_the_same():
    """Both steppers on the same tokens: equal losses mean that the comparison is of speed alone."""
    code = (
        "import sys; sys.path[:0] = ['benchmarks', '.']; import stepper, json\n"
        "whole, *_ = getattr(stepper, sys.argv[1])(json.loads(sys.argv[2]))\n"
        "print([float(whole()) for _ in range(4)])"
    )
    printed = [
        subprocess.check_output([sys.executable, "-c", code, kind, json.dumps(TINY)], cwd=ROOT, text=True)
        for kind in ("ours", "plain")
    ]
    ours, plain = map(json.loads, printed)
    assert ours == pytest.approx(plain, rel=1e-3)
    assert len(set(ours)) == 4


def test_the_rule_finds_the_constants_that_made_the_numbers():
    sizes = [(2, 64), (4, 64), (2, 128), (4, 128), (6, 128), (4, 256)]
    rows = [
        {"depth": d, "width": w, "tokens": n, "val_bpb": 0.3 + 2 / block_parameters(d, w) ** 0.2 + 900 / n**0.6}
        for d, w in sizes
        for n in (4e5, 8e5, 1.6e6)
    ]
    constants, left = sweep.rule(rows)
    assert left < 1e-4
    assert (constants["FLOOR"], constants["ALPHA"], constants["BETA"]) == pytest.approx((0.3, 0.2, 0.6))
    assert (constants["A"], constants["B"]) == pytest.approx((2, 900), rel=0.01)
