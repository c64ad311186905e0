"""How fast the machine was during a run, measured from outside it."""

import json
import subprocess
import sys
import time

import pytest
from checkout import Checkout

from lab.machine import speed
from lab.machine.speed import Watch, busy_seconds
from lab.trial import runner
from lab.trial.runner import Runner

BURN = "import time; end = time.perf_counter() + {}\nwhile time.perf_counter() < end: sum(range(1000))"
STAT = """cpu  300 0 200 9000 50 10 20 5 0 0
cpu0 100 10 100 4500 25 5 10 3 0 0
cpu1 200 20 100 4500 25 5 10 2 0 0
cpu2 900 20 100 4500 25 5 10 2 0 0
intr 1 2 3
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("timing"))


@pytest.fixture
def bench(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "TIMED_MINUTES", 0.0)
    monkeypatch.setattr(runner, "TIMED_SECONDS", 0.5)
    monkeypatch.setattr(speed, "SECONDS", 0.2)
    settings = json.loads((checkout.cache / "current.json").read_text()) | {"minutes": 0.02, "steps": None}
    (tmp_path / "runs").mkdir()
    return Runner(tmp_path, checkout.folder, settings, "none", preflight_seconds=30.0)


def test_on_a_cpu_a_run_records_its_tokens_and_the_pace_of_the_machine(checkout, bench):
    bench.reference = source = (checkout.folder / "train.py").read_text()
    first, second = (bench.run(f"e0000-r{seed}", source, seed) for seed in (1, 2))
    assert (first.status, first.pace) == ("ok", 1.0), first.reason
    assert first.tokens > 0
    assert second.pace == pytest.approx(second.speed / first.speed)
    assert not (bench.folder / "runs" / "reference").exists()


def test_on_a_gpu_a_fixed_train_py_is_timed_before_and_after(checkout, bench, monkeypatch):
    monkeypatch.setattr(runner, "supported", lambda: False)
    bench.reference = source = (checkout.folder / "train.py").read_text()
    first = bench.run("e0000-r1", source, 1)
    assert (first.status, first.pace) == ("ok", 1.0), first.reason
    assert not list((bench.folder / "runs" / "reference").glob("checkpoint*"))
    bench.reference = "raise SystemExit(1)\n"
    second = bench.run("e0000-r2", source, 2)  # was timed before, moments ago, but not after
    assert (second.status, second.pace, bench.timed[1]) == ("ok", None, None)


def test_a_source_is_timed_in_turn_with_another(checkout, bench, monkeypatch):
    monkeypatch.setattr(runner, "ROUNDS", 2)
    source = (checkout.folder / "train.py").read_text()
    slow = source.replace("    for number in run.clock:\n", "    for number in run.clock:\n        wait(0.2)\n")
    slow = slow.replace("\n\n\n", "\n\nfrom time import sleep as wait\n\n", 1)
    assert slow.count("wait") == 2
    ratio, error = bench.timed_in_turn(slow, source)
    assert ratio < -0.5
    assert error >= runner.TURN_ERROR
    assert bench.timed_in_turn("raise SystemExit(1)\n", source) == (None, None)
    fails = source.replace(
        "    for number in run.clock:\n", "    for number in run.clock:\n        assert number < 4\n"
    )
    assert fails != source
    assert bench.timed_in_turn(fails, source) == (None, None)  # after steps that have a speed
    assert not list((bench.folder / "runs" / "reference").glob("checkpoint*"))
    monkeypatch.setattr(bench, "_tokens_per_second", lambda one: 1e14 if one == "miscounts" else 1e3)
    assert bench.timed_in_turn("miscounts", source) == (None, None)


def test_the_time_that_other_programs_take_lowers_the_speed(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    with Watch() as alone:
        time.sleep(1)
    with Watch() as beside:
        subprocess.run([sys.executable, "-c", BURN.format(1)], check=True)
    own = beside.busy - beside.own
    assert beside.speed(0.0) < beside.speed(own)  # the run's own time is not counted against the machine
    assert beside.speed(own) == pytest.approx(alone.speed(alone.busy), rel=0.5)
    assert alone.speed(0.0) > 0.1


def test_a_run_that_ends_at_once_has_no_speed():
    with Watch() as watch:
        pass
    assert watch.speed(0.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the accounts are Linux's")
def test_only_cores_that_this_process_may_use_are_counted(monkeypatch):
    monkeypatch.setattr(speed.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(speed.os, "sysconf", lambda _: 100)
    assert busy_seconds(STAT) == pytest.approx((228 + 337) / 100)
