"""Which experiments are timed in turn with the incumbent, and what becomes of that."""

from math import exp

import pytest
import simulated

from lab.loop.journal import Journal, read
from lab.loop.proposal import Proposal, describe
from lab.loop.source import set_constant
from lab.loop.suggestions import ask_to_skip
from lab.trial.runner import Measured, Skipped

RATIO, ERROR = -0.3, 0.006


class Timed(simulated.SimulatedBench):
    """Runs with tokens and a pace; DEPTH 6 and 9 gain a little and DEPTH 7 much, DEPTH 2 loses."""

    times = 0

    def run(self, name, source, seed, test=False):
        effect = {9: -0.01, 7: -0.2, 6: -0.002, 2: 0.2}
        value = 1.0 + 0.005 * (seed % 3) + sum(by for depth, by in effect.items() if f"DEPTH = {depth}" in source)
        return Measured(
            "ok", value, 0.1, 5.0, "", tokens=round(1e6 * exp(RATIO * ("DEPTH = 9" in source))), speed=1.0, pace=1.0
        )

    def timed_in_turn(self, source, other):
        self.times += 1
        return RATIO, ERROR


class Set:
    name = "search"

    def __init__(self, name: str, value: object):
        self.change = name, value

    def propose(self, briefing):
        source = set_constant(briefing.source, *self.change)
        return Proposal(source, "", self.name, describe(source, briefing.source, briefing.settings))

    def tell(self, proposal, outcome):
        pass


@pytest.fixture
def night(tmp_path):
    night = simulated.begin(tmp_path)
    night.runner = Timed()
    return night


def events(night) -> list[str]:
    return [record["event"] for record in read(night.journal.path)]


def test_a_promising_change_of_the_work_is_timed_once_before_its_verdict(night):
    night.agent = Set("DEPTH", 9)
    night.go(1)
    assert night.runner.times == 1
    named = events(night)
    assert named[named.index("timed") - 1 : named.index("timed") + 2] == ["run", "timed", "verdict"]
    tried = Journal(night.folder).state.experiments[1]
    assert (tried.status, tried.timed) == ("keep", (0, RATIO, ERROR))
    assert tried.code.timed == tried.timed


@pytest.mark.parametrize(
    ("change", "why"),
    [(("DEPTH", 2), "it loses"), (("DEPTH", 7), "it is sure to gain"), (("MATRIX_LR", 0.033), "the same work")],
)
def test_what_needs_no_timing_gets_none(night, change, why):
    night.agent = Set(*change)
    night.go(1)
    assert (night.runner.times, "timed" in events(night)) == (0, False), why


@pytest.mark.parametrize("case", ["short", "none"])
def test_short_runs_and_upstreams_rule_time_nothing(night, case):
    night.agent, night.rigor = Set("DEPTH", 9), "none" if case == "none" else "full"
    night.runner.settings["minutes"] = 0.2 if case == "short" else 5.0
    night.go(1)
    assert night.runner.times == 0


def test_a_timing_that_other_programs_disturbed_is_repeated_before_the_next_verdict(night):
    errors = [0.03, 0.012, 0.04, 0.001]
    night.runner.timed_in_turn = lambda *_: (errors[0], errors.pop(0))
    night.agent = Set("DEPTH", 6)
    night.go(1)
    named = events(night)
    assert errors == [0.001]  # three times
    assert named[named.index("timed") + 1] == "verdict"
    assert Journal(night.folder).state.experiments[1].timed == (0, 0.012, 0.012)  # the most precise


def test_a_timing_that_fails_is_not_repeated(night):
    night.runner.timed_in_turn = lambda *_: (None, None)
    night.agent = Set("DEPTH", 9)
    night.go(1)
    assert events(night).count("timed") == 1
    assert Journal(night.folder).state.experiments[1].timed is None


def test_a_person_can_skip_an_experiment_while_it_is_timed(night):
    def skipped(*_):
        ask_to_skip(night.folder, 1, "skipped")
        raise Skipped

    night.runner.timed_in_turn = skipped
    night.agent = Set("DEPTH", 9)
    night.go(1)
    assert night.journal.state.experiments[1].skipped


def test_a_night_that_was_killed_while_it_timed_resets_its_files_before_it_times_again(night):
    def killed(*_):
        raise KeyboardInterrupt

    night.agent, train = Set("DEPTH", 9), night.branch.worktree / "train.py"
    night.runner.timed_in_turn = killed
    with pytest.raises(KeyboardInterrupt):
        night.go(1)
    train.write_text("cut short")
    trained = []

    def timed_in_turn(source, _):
        trained.append((train.read_text(), source))
        return RATIO, ERROR

    night.runner.timed_in_turn = timed_in_turn
    night.go(0)
    ((found, source),) = trained
    assert found == source


def test_a_timing_that_does_not_follow_is_refused(night):
    night.go(0)
    with pytest.raises(ValueError, match="timed does not follow"):
        night.journal.record("timed", id=0, work=0, ratio=0.1, error=0.01)


@pytest.mark.parametrize("error", [None, 0.0, -0.1])
def test_a_ratio_without_its_error_is_refused(night, error):
    night.runner.timed_in_turn = lambda *_: (RATIO, error)
    night.agent = Set("DEPTH", 9)
    with pytest.raises(ValueError, match="timed without its error"):
        night.go(1)
