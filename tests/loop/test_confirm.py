"""The morning's confirmation: winner against baseline with new seeds, then without each change."""

import random
from datetime import datetime, timedelta

import pytest
import simulated
from checkout import git

from lab.loop import confirm
from lab.loop.confirm import Trial, confirmed, next_trial, without_values
from lab.loop.confirm_runs import confirm_winner, run_seconds
from lab.loop.journal import Journal
from lab.loop.proposal import Proposal, describe
from lab.loop.source import set_constant
from lab.loop.stop import Until
from lab.trial.runner import Measured

EFFECTS = {"MATRIX_LR = 0.033": 0.01, "WEIGHT_DECAY = 0.077": 0.02}  # bits per byte that each change gains


def value(source: str, seed: int) -> float:
    """A simulated run: the seed's effect is common to all sources, and 0.0005 of noise is not."""
    gained = sum(gain for line, gain in EFFECTS.items() if line in source)
    return 1.0 - gained + random.Random(seed).gauss(0, 0.005) + random.Random(source + str(seed)).gauss(0, 0.0003)


class Changes:
    """An agent that proposes these sources in turn."""

    name = "search"

    def __init__(self, *changes):
        self.changes = list(changes)

    def propose(self, briefing):
        change = self.changes.pop(0)
        source = change(briefing.source)
        return Proposal(source, "a change", self.name, describe(source, briefing.source, briefing.settings))

    def tell(self, proposal, outcome):
        pass


def constant(name: str, new: float):
    return lambda source: set_constant(source, name, new)


@pytest.fixture
def night(tmp_path):
    """A finished night with two kept changes."""
    night = simulated.begin(tmp_path)
    night.runner.run = lambda name, source, seed, test=False: Measured(
        "ok", value(source, seed), 0.1, 5.0, "", test_bpb=value(source, seed) + 0.1 if test else None
    )
    night.agent = Changes(constant("MATRIX_LR", 0.033), constant("WEIGHT_DECAY", 0.077))
    night.go(2)
    assert [e.status for e in night.journal.state.experiments] == ["keep"] * 3
    return night


def test_winner_and_baseline_run_with_the_same_new_seeds_and_then_without_each_change(night):
    used = {run.seed for e in night.journal.state.experiments for run in e.results}
    assert confirm_winner(night) == "done"
    done = night.journal.state.confirmations
    assert [c[:2] for c in done[: 2 * confirm.PAIRS]] == [(0, None), (2, None)] * confirm.PAIRS
    assert [c[:2] for c in done[2 * confirm.PAIRS :]] == [(2, 1), (2, 2)] * confirm.SHARE_PAIRS
    assert not used & {c.seed for c in done}
    found = confirmed(night.journal.state)
    assert found.pairs == confirm.PAIRS
    assert found.gain.value == pytest.approx(0.03, abs=0.001)
    assert found.gain.low < 0.03 < found.gain.high
    assert found.test.value == pytest.approx(0.03, abs=0.001)
    assert found.shares[1].value == pytest.approx(0.01, abs=0.001)
    assert found.shares[2].value == pytest.approx(0.02, abs=0.001)


def test_an_interrupted_confirmation_goes_on_and_runs_nothing_twice(night):
    calls = []
    night.stop = lambda: "stopped" if len(calls) == 3 else calls.append(0) or ""
    assert confirm_winner(night) == "stopped"
    night.stop = lambda: ""
    night.journal = Journal(night.folder)
    assert confirm_winner(night) == "done"
    names = [c[:3] for c in night.journal.state.confirmations]
    assert len(names) == len(set(names)) == 2 * confirm.PAIRS + 2 * confirm.SHARE_PAIRS
    assert next_trial(night.journal.state) is None


def test_an_invalid_run_is_repeated_and_given_up_in_the_end(night):
    healthy = night.runner.run
    night.runner.run = lambda name, *run, **options: (
        Measured("invalid", None, 0.1, 5.0, "slept") if "c0000-s1000001" in name else healthy(name, *run, **options)
    )
    assert confirm_winner(night) == "done"
    ends = [c.status for c in night.journal.state.confirmations if c[:3] == Trial(0, None, 1_000_001)]
    assert ends == ["invalid"] * confirm.INVALID_RUNS
    assert confirmed(night.journal.state).pairs == confirm.PAIRS - 1


def test_a_night_that_kept_nothing_has_nothing_to_confirm(tmp_path):
    night = simulated.begin(tmp_path)
    night.go(1)
    assert confirm_winner(night) == "done"
    assert confirmed(night.journal.state) is None
    assert night.journal.state.confirmations == []


def test_a_night_with_a_deadline_leaves_time_to_confirm(night):
    minutes = confirm.runs_left(night.journal.state) * run_seconds(night) / 60
    night.agent = Changes(constant("WARMUP", 0.1))
    night.deadline = Until((datetime.now() + timedelta(minutes=minutes - 2)).time())
    assert night.go(None) == "time to confirm the winner"
    confirm_winner(night)
    assert night.journal.state.confirmations


def test_the_verdict_does_not_see_the_confirmation(night):
    before = Journal(night.folder).state
    confirm_winner(night)
    after = Journal(night.folder).state
    assert [e.results for e in after.experiments] == [e.results for e in before.experiments]
    assert (after.seeds, after.step()) == (before.seeds, before.step())


SOURCE = "A = 1\nB = (2, 3)\n\n\ndef f():\n    return A\n\n\n\n\n\n\n\ndef g():\n    return B\n"


def test_constants_are_taken_back_by_name():
    edit = {"form": "set", "values": {"B": [2, 3]}, "was": {"B": [0, 3]}}
    assert without_values(SOURCE, edit, {}) == SOURCE.replace("(2, 3)", "(0, 3)")
    assert without_values(SOURCE.replace("(2, 3)", "(4, 4)"), edit, {}) is None
    assert without_values(SOURCE, {"form": "code", "definitions": ["f"]}, {}) is None


def test_code_is_taken_back_by_merging_unless_later_changes_overlap(night):
    change = lambda old, new: lambda source: source.replace(old, new)  # noqa: E731
    one = change("return self.down(relu_squared(", "return self.down(2 * relu_squared(")
    other = change("self.embedding = mx.random.normal(", "self.embedding = 2 * mx.random.normal(")
    base = night.branch.source(night.journal.state.head())
    first = night.branch.commit(one(base), "one")
    git(night.branch.repository, "update-ref", night.branch.ref, first)
    assert night.branch.taken_back(other(one(base)), first) == other(base)
    overlapping = one(base).replace("self.down(2 * relu", "self.down(3 * relu")
    with pytest.raises(Exception, match="overlap"):
        night.branch.taken_back(overlapping, first)
