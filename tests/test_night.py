"""The loop itself over many experiments: real git, journal, agent and checks; only the training is simulated."""

import resource
from functools import partial
from pathlib import Path

import pytest
from checkout import git
from simulated import begin

from lab.agents.briefing import BYTES_PER_TOKEN, brief, outcome
from lab.errors import UserError
from lab.interface.dashboard import summary
from lab.loop.verdict import BASELINE_RUNS
from lab.show import silent
from lab.trial.runner import Measured


@pytest.fixture
def night(tmp_path):
    return partial(begin, tmp_path)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_many_experiments_in_flat_memory_with_a_bounded_briefing(night):
    n = night()
    n.log = silent
    assert n.go(15) == "done"
    before = resident_mb()
    assert n.go(45) == "done"
    state = n.journal.state
    assert len(state.experiments) == 61
    assert resident_mb() - before < 15  # MB; `make soak` has a thousand experiments
    briefing = brief(state, n.runner.settings, n.branch.source(state.head()))
    for bound in (8_000, 16_000):
        assert len(briefing.render(bound).encode()) <= bound * BYTES_PER_TOKEN
    assert len((n.folder / "results.tsv").read_text().splitlines()) == 62
    assert git(n.branch.worktree, "rev-parse", "HEAD") == state.head()
    kept = sum(e.status == "keep" for e in state.experiments[1:])
    assert kept <= 0.05 * 60  # the simulated changes do nothing
    assert any(e.timed for e in state.experiments)


def test_an_experiment_whose_runs_are_always_spoiled_is_given_up_and_the_night_goes_on(night):
    n = night(spoil=lambda name: name.startswith("e0001"))
    assert n.go(2) == "done"
    first, second = n.journal.state.experiments[1:]
    assert (first.status, first.runs) == ("crash", 3)
    assert first.reason == "3 runs in a row were invalid: the machine slept for 60 s"
    assert outcome(first).verdict == "invalid"  # nothing was learnt about the change, and it may be tried again
    assert first.fingerprint not in n.journal.state.tried
    assert second.status in ("keep", "discard")


@pytest.mark.parametrize(("final", "runs"), [(True, 3), (False, BASELINE_RUNS)])
def test_a_night_that_ends_soon_measures_the_baseline_only_as_far_as_that_pays(night, final, runs):
    n = night()
    n.runner.run = lambda name, source, seed: Measured("ok", 1 + 0.1 * name.startswith("e0001"), 0.1, 5.0, "")
    n.go(1, final)
    assert n.journal.state.experiments[0].runs == runs


def test_a_run_spoiled_once_is_run_again(night):
    n = night(spoil=lambda name: name == "e0001-r1")
    assert n.go(1) == "done"
    assert n.journal.state.experiments[1].status in ("keep", "discard")
    assert n.runner.names.count("e0001-r1") == n.runner.names.count("e0001-r2") == 1


@pytest.mark.parametrize("damage", [lambda text: text[:20], lambda text: text.replace("0.5", "0.4")])
def test_a_damaged_result_that_is_not_recorded_yet_is_measured_again(night, damage):
    n = night()
    n.go(0)
    kept = n.folder / "results" / "e0000-r1.json"
    kept.write_text(kept.read_text().replace('"minutes": 5.0', '"minutes": 0.5'))
    (n.folder / "results" / "e0001-r1.json").write_text(damage(kept.read_text()))
    assert n.go(1) == "done"
    assert "e0001-r1" in n.runner.names


def test_a_baseline_that_the_machine_spoils_three_times_is_told_to_the_user(night):
    with pytest.raises(UserError, match="close other programs and run it again"):
        night(spoil=lambda name: True).go(1)


def test_a_baseline_that_was_killed_is_run_again_by_the_same_command(night):
    n = night()
    healthy = n.runner.run
    n.runner.run = lambda *_: Measured("crash", None, 0.1, 0.1, "killed: stopped from outside")
    with pytest.raises(UserError, match="the same command tries it again"):
        n.go(1)
    assert "no experiment is finished" in summary(n.folder, n.journal.state)
    n.runner.run = healthy
    assert n.go(1) == "done"
    state = n.journal.state
    assert [e.hypothesis for e in state.experiments[:2]] == ["baseline", "baseline"]
    assert [e.status for e in state.experiments[:2]] == ["crash", "keep"]
    assert state.noise.sigma > 0
    assert [t.number for t in brief(state, n.runner.settings, "").history] == [2]
    assert len(state.experiments) == 3
    assert "1 crashed" in summary(n.folder, n.journal.state)


def test_the_users_branch_does_not_move(night, monkeypatch):
    n = night()
    n.go(3)
    assert git(n.branch.repository, "rev-list", "--count", "main") == "1"
