"""The pace of every run, from its tokens and the speed of the machine around it."""

from math import exp, log
from random import Random

import pytest

from lab.loop import pace
from lab.loop.space import same_work
from lab.loop.verdict import Code, Run


def paced(codes: list[Code]) -> list[Code]:
    return pace.paced(codes, against=0)


def codes(paces: dict[int, list[float]], error: float = 0.0, speeds=(1e6, 2e6), seed: int = 0) -> list[Code]:
    """One code a work, with the true log paces of its runs; the measured ones err by `error`."""
    rng = Random(seed)

    def run(work: int, seed: int, x: float) -> Run:
        return Run(seed, 1.0, exp(x + rng.gauss(0, error)), tokens=round(speeds[work] * exp(x)))

    return [Code(work, [run(work, *one) for one in enumerate(xs)], work=work) for work, xs in paces.items()]


def logs(code: Code) -> list[float]:
    return [log(run.pace) for run in code.runs]


def test_runs_of_the_same_work_differ_in_pace_as_their_tokens_do():
    true = [0.0, 0.01, -0.3, 0.02, -0.1]
    (code,) = paced(codes({0: true}, error=0.05))
    assert [x - logs(code)[0] for x in logs(code)] == pytest.approx(true, abs=1e-5)


def test_codes_that_change_rates_only_share_their_work():
    base, same = codes({0: [0.0, 0.01, -0.01, 0.0]}), codes({0: [-0.2]}, error=0.2)
    found = paced([base[0], same[0]._replace(id=1)])
    assert logs(found[1])[0] - logs(found[0])[0] == pytest.approx(-0.2, abs=1e-5)


def test_other_work_is_placed_by_the_measured_pace_as_far_as_that_can_be_trusted():
    steady = {0: [0.001 * i for i in range(-5, 6)], 1: [0.0]}
    drawn = [
        logs(other)[0] - sum(logs(base)) / 11
        for base, other in (paced(codes(steady, error=0.04, seed=i)) for i in range(200))
    ]
    assert sum(x**2 for x in drawn) / 200 < (0.04 / 2) ** 2  # nearly steady: an outlier of the probe is not believed
    sagging = {0: [0.1 * i for i in range(-5, 6)], 1: [-0.4]}
    (_, slow) = paced(codes(sagging, error=0.02))
    assert logs(slow)[0] == pytest.approx(-0.4, abs=0.08)


def test_works_that_were_timed_in_turn_differ_as_they_were_timed():
    steady = {0: [0.3 * (-1) ** i for i in range(6)], 1: [0.0, -0.2]}
    (base, other), ratio = codes(steady, error=0.05, speeds=(1e6, 1.3e6), seed=3), log(1.3)
    before = paced([base, other])[1]
    its, timed = paced([base, other._replace(timed=(0, ratio, 0.001))])
    assert timed.doubt < 0.2 * before.doubt
    assert logs(timed)[0] - logs(its)[0] == pytest.approx(-0.3, abs=0.003)
    assert paced([base, other._replace(timed=(7, ratio, 0.001))])[1].doubt == before.doubt  # a work that is not there


@pytest.mark.parametrize("timed", [None, (0, log(2), 0.006)])
def test_a_machine_that_changes_at_once_is_not_taken_for_the_change(timed):
    jumped = {0: [0.01 * i for i in range(10)], 1: [0.24, 0.25, 0.26]}  # 0.15 faster than before, then as it was
    base, other = codes(jumped, error=0.004, seed=5)
    runs = [run._replace(at=at) for at, run in enumerate([*base.runs, *other.runs])]
    found = paced([base._replace(runs=runs[:10]), other._replace(runs=runs[10:], timed=timed)])
    assert logs(found[1])[0] - logs(found[0])[9] == pytest.approx(0.15, abs=0.015)


def test_seconds_that_contradict_the_runs_are_not_believed():
    base, other = codes({0: [0.0] * 6, 1: [0.0, 0.01]}, error=0.005, seed=1)
    its, timed = paced([base, other._replace(timed=(0, log(2) + 0.2, 0.006))])
    assert logs(timed)[0] - logs(its)[0] == pytest.approx(0, abs=0.02)
    assert timed.doubt > 0.008


def test_nothing_is_compared_with_a_work_of_unknown_pace():
    base, other = codes({0: [0.0] * 3, 1: [0.1, 0.2]}, error=0.05)
    base = base._replace(runs=[*base.runs, Run(9, 1.0)])
    assert paced([base, other]) == [base, other]


def test_what_was_not_measured_stays_as_it_is():
    plain = Code(0, [Run(1, 1.0), Run(2, 1.0)])
    half = Code(1, [Run(1, 1.0, 0.9), Run(2, 1.0, 1.1, tokens=10)], work=1)
    assert paced([plain, half, Code(2, [])]) == [plain, half, Code(2, [])]
    assert paced([]) == []


def test_rates_and_their_like_leave_the_work_as_it_is():
    for names in (["MATRIX_LR"], ["WEIGHT_DECAY", "MUON_MOMENTUM"], ["WARMUP", "WARMDOWN"], ["ADAM_BETAS"]):
        assert same_work(names)


def test_what_changes_the_computation_is_other_work():
    for name in ("DEPTH", "ROWS", "DOUBLING", "TOKENS_PER_STEP", "WINDOW", "MLP_RATIO", "SOFTCAP", "X"):
        assert not same_work([name, "MATRIX_LR"])
