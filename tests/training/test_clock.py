import time
from types import SimpleNamespace

import pytest

from lab.training import clock
from lab.training.clock import WARMUP_STEPS, Clock


class Time:
    """A machine whose clocks the test sets. `now` does not advance while the machine sleeps."""

    def __init__(self, monkeypatch):
        self.now, self.asleep = 1000.0, 50.0  # it had slept before the run
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(clock, "seconds_with_sleep", lambda: self.now + self.asleep)


@pytest.fixture
def machine(monkeypatch) -> Time:
    return Time(monkeypatch)


def test_the_budget_ends_the_run(machine):
    ours = Clock(minutes=0.5)
    for _ in ours:
        machine.now += 1
    assert ours.elapsed == 30
    assert ours.step == 30 + WARMUP_STEPS
    assert ours.progress == 1.0


def test_before_the_first_step_nothing_is_spent(machine):
    ours = Clock(minutes=0.5)
    assert (ours.elapsed, ours.progress, ours.remaining) == (0, 0, 30)


def test_a_step_that_is_begun_is_finished_and_billed(machine):
    ours = Clock(minutes=0.5)
    for number in ours:
        machine.now += 1 if number < WARMUP_STEPS else 20
    assert ours.elapsed == 40
    assert ours.progress == 1.0


def test_steps_are_numbered_from_zero_without_a_gap(machine):
    numbers = []
    for number in Clock(minutes=0.1):
        numbers.append(number)
        machine.now += 1
    assert numbers == list(range(6 + WARMUP_STEPS))


def test_warm_up_is_not_billed(machine):
    ours = Clock(minutes=1)
    for number in ours:
        machine.now += 20 if number < WARMUP_STEPS else 1
    assert ours.elapsed == 60
    assert ours.step == 60 + WARMUP_STEPS
    assert machine.now == 1000 + 20 * WARMUP_STEPS + 60


def test_no_more_warm_up_than_the_cap_is_free(machine):
    ours = Clock(minutes=5)
    for _ in ours:
        machine.now += 100
    assert ours.billed_from == ours.begun + ours.unbilled
    assert ours.elapsed == machine.now - 1000 - ours.unbilled
    assert ours.step == 4  # 400 - 45 is the first that is over 300


def test_a_warm_up_longer_than_cap_and_budget_ends_the_run(machine):
    ours = Clock(minutes=0.5)
    for _ in ours:
        machine.now += 1000
    assert ours.step == 1


def test_only_the_first_steps_are_warm_up(machine):
    ours = Clock(minutes=10)
    for number in ours:
        machine.now += 30 if number == WARMUP_STEPS else 1
    assert ours.elapsed == pytest.approx(600)
    assert ours.step == WARMUP_STEPS + 1 + 570


def test_progress_starts_at_zero_and_never_falls(machine):
    ours, shares = Clock(minutes=1), []
    for number in ours:
        shares.append(ours.progress)
        machine.now += 7 if number < WARMUP_STEPS else 2.5
    assert shares[0] == 0
    assert shares[WARMUP_STEPS] == 0
    assert shares[WARMUP_STEPS:] == sorted(shares[WARMUP_STEPS:])
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == pytest.approx(57.5 / 60)
    assert ours.progress == 1


def test_steps_end_the_run_whatever_the_minutes(machine):
    ours, shares = Clock(minutes=0.01, steps=4), []
    for _ in ours:
        shares.append(ours.progress)
        machine.now += 1000
    assert shares == [0, 0.25, 0.5, 0.75]
    assert (ours.step, ours.progress) == (4, 1.0)


def test_sleep_is_counted_and_not_billed(machine):
    ours = Clock(minutes=0.5)
    for number in ours:
        machine.now += 1
        if number == 10:
            machine.asleep += 3600
        if number == 20:
            machine.asleep += 60
    assert ours.slept == 3660
    assert ours.elapsed == 30


def test_sleep_before_the_run_is_not_its_sleep(machine):
    machine.asleep += 8 * 3600
    ours = Clock(minutes=0.5)
    for _ in ours:
        machine.now += 1
    assert ours.slept == 0


def test_a_real_run_takes_its_budget_and_has_not_slept():
    ours, begun = Clock(minutes=0.3 / 60), time.perf_counter()
    for _ in ours:
        time.sleep(0.01)
    assert 0.3 <= ours.elapsed <= time.perf_counter() - begun
    assert ours.elapsed < 0.8
    assert ours.slept < 0.01
