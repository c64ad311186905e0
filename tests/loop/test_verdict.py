"""The verdict: what it decides in each case, and how often it errs in simulated nights."""

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lab.loop import verdict
from lab.loop.verdict import Noise, decide, student

ROOT = Path(__file__).resolve().parents[2]
QUIET = Noise(prior=0.01, squares=0.01**2 * 99, df=99)  # sigma 0.01, well known
KNOWN = [1.0] * verdict.FLOOR  # an incumbent that is trusted


def test_noise_is_the_pooled_standard_deviation():
    groups = [[1.0, 1.1, 1.3], [2.0, 2.2], [3.0]]
    noise = Noise.of(groups, prior=0.05)
    pooled = 2 * statistics.variance(groups[0]) + statistics.variance(groups[1])
    assert noise.df == 3
    assert noise.sigma == pytest.approx(((pooled + verdict.PRIOR_DF * 0.05**2) / (3 + verdict.PRIOR_DF)) ** 0.5)


def test_two_runs_that_agree_by_chance_do_not_make_the_noise_zero():
    assert Noise.of([[1.0, 1.0]], prior=0.01).sigma > 0.005


def test_many_replicates_outweigh_a_wrong_prior():
    rng = random.Random(0)
    groups = [[rng.gauss(1, 0.001) for _ in range(3)] for _ in range(100)]
    assert Noise.of(groups, prior=0.01).sigma == pytest.approx(0.001, rel=0.3)


@pytest.mark.parametrize(("df", "t975", "t95"), [(2, 4.303, 2.920), (3, 3.182, 2.353), (10, 2.228, 1.812)])
def test_student_quantile_matches_the_published_table(df, t975, t95):
    assert student(1.959964, df) == pytest.approx(t975, rel=0.01)
    assert student(1.644854, df) == pytest.approx(t95, rel=0.01)


def test_the_baseline_runs_twice():
    first = decide([], [1.0], QUIET)
    assert (first.verdict, first.who) == ("again", "candidate")
    assert decide([], [1.0, 1.01], QUIET).verdict == "keep"


def test_one_clearly_worse_run_is_discarded_at_once():
    decision = decide([1.0, 1.0], [1.05], QUIET)
    assert decision.verdict == "discard"
    assert not decision.near_miss
    assert decision.delta == pytest.approx(0.05)
    assert decision.sigma == pytest.approx(0.01)
    assert "\n" not in decision.reason


def test_barely_worse_than_a_little_known_incumbent_measures_the_incumbent():
    decision = decide([1.0, 1.0], [1.003], QUIET)
    assert (decision.verdict, decision.who) == ("again", "incumbent")
    assert decide(KNOWN, [1.003], QUIET).verdict == "discard"


def test_no_win_is_kept_on_one_run():
    decision = decide(KNOWN, [0.5], QUIET)
    assert (decision.verdict, decision.who) == ("again", "candidate")


def test_a_win_beyond_the_noise_is_kept_and_one_inside_is_not():
    assert decide(KNOWN, [0.97, 0.97], QUIET).verdict == "keep"
    assert decide(KNOWN, [0.99, 0.995], QUIET).verdict == "again"


def test_a_little_known_incumbent_raises_the_bar():
    gain = [0.98, 0.98]
    assert decide(KNOWN, gain, QUIET).verdict == "keep"
    assert decide([1.0, 1.0], gain, QUIET).who == "incumbent"
    assert decide([1.0, 1.0], [0.9, 0.9], QUIET).verdict == "keep"


def test_few_degrees_of_freedom_raise_the_bar():
    early = Noise(prior=0.01, squares=0.01**2, df=1)
    assert early.sigma == pytest.approx(QUIET.sigma)
    assert early.bar > 2 * QUIET.bar


def test_hardly_better_with_all_its_runs_is_given_up_unless_it_is_simpler():
    hardly, fairly = [0.997] * verdict.CANDIDATE_RUNS, [0.992] * verdict.CANDIDATE_RUNS
    decision = decide(KNOWN, hardly, QUIET)
    assert (decision.verdict, decision.near_miss) == ("discard", True)
    assert decide(KNOWN, hardly, QUIET, simpler=True).who == "incumbent"
    assert (decide(KNOWN, fairly, QUIET).verdict, decide(KNOWN, fairly, QUIET).who) == ("again", "incumbent")
    assert decide(KNOWN[1:], hardly, QUIET).verdict == "again"  # the incumbent may have been lucky


def test_better_but_never_beyond_the_noise_is_a_near_miss_or_a_simplification():
    incumbent, candidate = [1.0] * verdict.INCUMBENT_RUNS, [0.998] * verdict.CANDIDATE_RUNS
    decision = decide(incumbent, candidate, QUIET)
    assert (decision.verdict, decision.near_miss) == ("discard", True)
    assert decide(incumbent, candidate, QUIET, simpler=True).verdict == "keep"
    assert decide(incumbent, [1.002] * 3, QUIET, simpler=True).verdict == "discard"


def test_an_incumbent_that_crashes_is_not_asked_again():
    rng = random.Random(1)
    for _ in range(500):
        incumbent = [rng.gauss(1, 0.01) for _ in range(rng.randint(1, 12))]
        candidate = [rng.gauss(0.99, 0.01) for _ in range(rng.randint(1, 3))]
        decision = decide(incumbent, candidate, QUIET, remeasure=False)
        assert not (decision.verdict == "again" and decision.who == "incumbent")


@pytest.mark.parametrize(
    ("to_come", "most"), [(None, verdict.INCUMBENT_RUNS), (2, verdict.FLOOR + 2), (0, verdict.FLOOR)]
)
def test_the_bounds_on_runs_hold_for_any_numbers(to_come, most):
    rng, reached = random.Random(2), 0
    for _ in range(500):
        incumbent, candidate = [rng.gauss(1, 0.01), rng.gauss(1, 0.01)], [rng.gauss(0.995, 0.01)]
        while (decision := decide(incumbent, candidate, QUIET, to_come=to_come)).verdict == "again":
            (candidate if decision.who == "candidate" else incumbent).append(rng.gauss(0.995, 0.01))
        assert len(candidate) <= verdict.CANDIDATE_RUNS
        assert len(incumbent) <= most
        reached += len(incumbent) == most
        assert decision.verdict == "discard" or len(candidate) >= 2
    assert reached


def test_lowering_a_candidates_runs_never_turns_keep_into_discard():
    rng = random.Random(3)
    order = {"discard": 0, "again": 1, "keep": 2}
    for _ in range(500):
        incumbent = [rng.gauss(1, 0.01) for _ in range(rng.randint(2, 12))]
        candidate = [rng.gauss(0.99, 0.01) for _ in range(rng.randint(1, 3))]
        lower = [value - 0.003 for value in candidate]
        verdicts = [order[decide(incumbent, c, QUIET).verdict] for c in (candidate, lower)]
        assert verdicts[0] <= verdicts[1]


def test_units_do_not_matter():
    rng = random.Random(4)
    for _ in range(200):
        incumbent, candidate = [rng.gauss(1, 0.01) for _ in range(3)], [rng.gauss(0.99, 0.01) for _ in range(2)]
        noise = Noise.of([incumbent], prior=0.01)
        scaled = [[7 * value for value in values] for values in (incumbent, candidate)]
        assert decide(*scaled, Noise.of(scaled[:1], prior=0.07)).verdict == decide(incumbent, candidate, noise).verdict


def test_rigor_none_is_upstreams_rule():
    assert decide([], [1.0], QUIET, "none").verdict == "keep"
    assert decide([1.0], [0.999999], QUIET, "none").verdict == "keep"
    assert decide([1.0], [1.0], QUIET, "none").verdict == "discard"


@pytest.mark.parametrize("candidate", [[], [float("nan")], [1.0, float("inf")]])
def test_only_valid_numbers_are_judged(candidate):
    with pytest.raises(ValueError, match="finite"):
        decide([1.0], candidate, QUIET)


def _kept(effects, nights, seed=0):
    """Share kept of the proposals with the first effect of each night, by the benchmark's simulation."""
    import benchmarks.verdict as simulation

    results = [
        simulation.simulate("full", seed + i, effects, lambda rng: rng.gauss(0, 1), 0.0089) for i in range(nights)
    ]
    return simulation.share(results, effects[0])


def test_a_night_that_changes_nothing_keeps_at_most_one_in_twenty():
    assert _kept([0.0] * 200, nights=20) < 0.02


def test_even_the_first_proposal_that_changes_nothing_is_kept_at_most_one_time_in_twenty():
    assert _kept([0.0], nights=4000) < 0.055  # 0.045; standard error 0.0033


def test_a_first_gain_of_two_sigma_is_kept_four_times_in_five():
    assert _kept([-2.0], nights=2000) > 0.8


def test_a_gain_of_two_sigma_within_a_night_is_kept_four_times_in_five():
    pattern = [-2.0, *[0.0] * 9] * 10
    random.Random(0).shuffle(pattern)
    gains = pattern if pattern[0] else [-2.0, *pattern]
    assert _kept(gains, nights=100) > 0.77  # 0.81 in 15,000 gains; standard error here 0.013


@pytest.mark.parametrize("ratio", [1 / 3, 3])
def test_a_prior_three_times_off_still_keeps_few_null_changes(ratio):
    import benchmarks.verdict as simulation

    nights = [simulation.simulate("full", i, [0.0] * 200, lambda rng: rng.gauss(0, 1), 0.01 * ratio) for i in range(10)]
    assert simulation.share(nights, 0.0) < 0.03


def test_the_benchmark_draws_from_measured_replicates_and_writes_its_figures(tmp_path):
    rng = random.Random(5)
    replicates = tmp_path / "replicates.json"
    replicates.write_text(json.dumps([[rng.gauss(1, 0.02) for _ in range(5)] for _ in range(4)]))
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/verdict.py", "--replicates", replicates, "--nights", "4", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "verdict.json").read_text())
    assert "measured" in report["noise"]
    assert report["full"]["null"]["kept_share"]["mean"] <= 0.05
    assert (out / "verdict.png").exists() or "no picture" in done.stdout


@pytest.mark.parametrize("content", ["{", "[]", "[[1.0]]", "[[1.0, 1.0]]", "3", '[["a", "b"]]'])
def test_useless_replicates_are_one_clear_line(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    command = [sys.executable, "benchmarks/verdict.py", "--replicates", tmp_path / "r.json", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
