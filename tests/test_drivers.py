"""The benchmarks of who proposes, in small: a landscape with a known optimum, and nights of a few experiments."""

import csv
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "benchmarks"))

import bundles
import drivers
import landscape
import second_night


def truth(settings: dict) -> float:
    """Best at DEPTH 10 and MATRIX_LR 0.02; out of memory from 200 rows on."""
    if settings["DEVICE_BATCH_SIZE"] > 200:
        return math.nan
    return 0.97 + 0.001 * abs(settings["DEPTH"] - 10) + 0.01 * abs(math.log(settings["MATRIX_LR"] / 0.02))


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Chance over a box, as a table of trials."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("landscape") / "trials.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["method", "seed", "trial", "val_bpb", "seconds", *landscape.BLOCK])
        for trial in range(300):
            chosen = landscape.BLOCK | {
                "DEPTH": draw.randint(4, 24),
                "DEVICE_BATCH_SIZE": draw.choice((32, 64, 128, 256)),
                "MATRIX_LR": round(math.exp(draw.uniform(math.log(0.005), math.log(0.3))), 6),
                "WARMUP_RATIO": round(draw.random() / 5, 4),
                "WINDOW_PATTERN": draw.choice(("SSSL", "LLLL", "SLSL")),
            }
            value = truth(chosen)
            table.writerow(["Random", 0, trial, "" if math.isnan(value) else value, 300, *chosen.values()])
    return path


@pytest.fixture(scope="module")
def surface(trials):
    return landscape.Landscape(landscape.read(trials))


def test_the_landscape_is_that_of_the_trials(trials, surface):
    chosen = [landscape.BLOCK | {"DEPTH": depth, "MATRIX_LR": rate} for depth in (5, 10, 20) for rate in (0.01, 0.1)]
    expected = [truth(settings) for settings in chosen]
    assert surface(chosen) == pytest.approx(expected, abs=0.01)
    assert np.isnan(surface([landscape.BLOCK | {"DEVICE_BATCH_SIZE": 256}])).all()
    assert np.isnan(surface([landscape.BLOCK | {"DEVICE_BATCH_SIZE": 96}])).all()  # no whole number of passes
    ranges = landscape.box(landscape.read(trials))
    assert ranges["DEPTH"] == (4, 24)
    assert ranges["DEVICE_BATCH_SIZE"] == [32, 64, 128, 256]
    assert ranges["WINDOW_PATTERN"] == ["LLLL", "SLSL", "SSSL"]


def test_drivers_are_compared_and_written_under_their_names(trials, tmp_path):
    command = [sys.executable, "benchmarks/drivers.py", "--trials", trials, "--nights", 2, "--experiments", 25]
    command += ["--noisy", 0, "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "drivers.json").read_text())
    start = 0.97 + 0.002 + 0.01 * math.log(2)
    for name in ("search", "menu", "tpe", "cma", "es"):
        assert report[name] == report["exact"][name]["median"]
        assert 0.96 < report[name]["25"] < start + 0.003
        assert name in done.stdout
    assert report["search"]["25"] < start - 0.002
    assert (tmp_path / "drivers.png").stat().st_size > 1000


def test_with_noise_the_verdict_judges_and_its_runs_are_counted():
    judge = drivers.Noisy(0, 1.0)
    baseline = judge.runs
    value, delta, keep, error = judge(0.98, False)
    assert keep
    assert judge.level == 0.98
    assert delta == pytest.approx(-0.02, abs=0.004)
    assert value == pytest.approx(0.98, abs=0.01)
    assert 0 < error < 0.001
    assert judge.runs >= baseline + 2
    before = judge.runs
    value, delta, keep, _ = judge(0.96, True)  # a row of a design
    assert not keep
    assert delta < -0.01
    assert judge.runs - before <= 8  # one, and the incumbent's new seeds
    assert judge(math.nan, False)[1:3] == (None, False)
    assert judge.level == 0.98


def test_an_agent_is_told_what_later_runs_say_about_its_incumbent():
    agent = drivers.Agent(drivers.Search(1))
    agent.ask()
    agent.tell(0.99, -0.01, True, 0.001)
    agent.ask()
    agent.tell(0.995, 0.003, False, 0.001)  # so the incumbent is at 0.992 by now
    assert [tried.delta for tried in agent.history] == pytest.approx([-0.008, 0.003])


def test_a_true_ledger_helps_and_a_wrong_one_costs_little(surface):
    first = [drivers.Agent(drivers.Search(seed)) for seed in range(2)]
    before = drivers.simulate("first", first, drivers.Exact, surface, 12)["value"]
    ledgers = [second_night.remembered(night) for night in first]
    second = [drivers.Agent(drivers.Search(9), ledger) for ledger in ledgers]
    values = drivers.simulate("second", second, drivers.Exact, surface, 2)["value"]
    assert (second_night.until(values, before[-1]) <= 2).all()
    wrong = second_night.shuffled(ledgers[0], 0)
    assert sorted(one.effect for one, _ in wrong) == sorted(one.effect for one, _ in ledgers[0])
    assert [one.values for one, _ in wrong] == [one.values for one, _ in ledgers[0]]


def test_a_bundle_keeps_small_gains_that_single_changes_do_not():
    together = bundles.evaluate(bundles.design, 0.0, 10)
    alone = bundles.evaluate(bundles.single, 0.0, 10)
    assert together["enough"]["share"] >= 0.7
    assert together["runs"] <= 20
    assert alone["kept"] < 1.5
