"""Runs that are nearly certain to lose end early, and no others."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import simulated
from conftest import ROOT

from lab.agents.search import Search
from lab.loop import watch
from lab.loop.futility import EARLIEST, comparable, gap
from lab.loop.journal import Journal, read
from lab.loop.proposal import Proposal, describe
from lab.loop.source import set_constant, uses
from lab.trial.curve import Curve
from lab.trial.runner import Measured, Phase, Skipped

STEPS = 400


def curve(worse: float = 0.0, share: float = 1.0, speed: float = 1.0, seed: int = 0) -> Curve:
    """A run of 300 s, seen after this share: its loss falls with tokens; noise of batches is common to all runs."""
    rng, own = np.random.default_rng(1), np.random.default_rng(seed)
    tokens = np.arange(1, STEPS + 1) * 2048.0 * speed
    loss = 2 + 6 / (1 + tokens / 2e5) + worse + rng.normal(0, 0.1, STEPS) + own.normal(0, 0.01, STEPS)
    kept = round(share * STEPS)
    return Curve(*(a[:kept] for a in (np.linspace(0, 300, STEPS), tokens, loss)))


@pytest.mark.parametrize("share", [0.32, 0.5, 0.7])
def test_a_run_that_is_far_behind_is_seen_to_lose(share):
    assert gap(curve(0.3, share), curve()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("worse", [-0.3, 0.0, 0.01])
def test_a_run_that_may_still_win_goes_on(worse):
    assert all(gap(curve(worse, share, seed=n), curve()) is None for share in (0.3, 0.5, 0.7) for n in range(20))


def test_no_run_is_ended_before_a_share_of_the_budget_or_at_its_end():
    assert gap(curve(0.5, EARLIEST - 0.02), curve()) is None
    assert gap(curve(0.5, 0.95), curve()) is None
    assert gap(curve(0.5, 0.01), curve()) is None


def test_a_gap_must_be_larger_early_than_late():
    assert gap(curve(0.03, 0.32), curve()) is None
    assert gap(curve(0.03, 0.85), curve()) is not None


def test_a_faster_model_must_lose_at_equal_time_too():
    ahead = curve(0.15, 0.5, speed=2.0)  # 0.15 worse at equal tokens, but it has seen twice as many
    assert ahead.loss[-40:].mean() < curve(0.0, 0.5).loss[-40:].mean() + 0.05
    assert gap(ahead, curve()) is None
    assert gap(curve(2.0, 0.5, speed=2.0), curve()) is not None


def test_only_changes_of_the_model_are_compared():
    source = (ROOT / "train.py").read_text()
    assert comparable({"DEPTH", "MLP_RATIO", "HEAD_DIM"}, source)
    assert comparable({"MLP", "Attention", "norm"}, source)
    for name in ("MATRIX_LR", "TOKENS_PER_STEP", "WARMDOWN", "schedule", "MuonAdamW", "loss_function", "main"):
        assert not comparable({name, "DEPTH"}, source)


def test_names_are_followed_through_other_definitions():
    source = "A = 1\nB = A\n\n\ndef f():\n    return B\n\n\ndef g():\n    return f() + f()\n\n\nC = 3\n"
    assert uses(source, "g") == {"g", "f", "B", "A"}
    assert uses(source, "missing") == set()


# ---- in a night


class Bench(simulated.SimulatedBench):
    """Runs write their curve as they go and ask whether to go on, as the guard does."""

    def __init__(self, folder: Path, worse: float):
        super().__init__()
        self.folder, self.worse, self.phase, self.ended = folder, worse, Phase(), lambda: False
        self.steps = {}

    def run(self, name, source, seed, test=False):
        run_dir = self.folder / "runs" / name
        run_dir.mkdir(parents=True)
        worse = self.worse if name.startswith("e0001") else 0.0
        self.phase = Phase("training", run_dir)
        for share in np.linspace(0.1, 1, 10):
            seen = curve(worse, share)
            lines = (json.dumps(dict(zip(Curve._fields, step, strict=True))) for step in zip(*seen, strict=True))
            (run_dir / "steps.jsonl").write_text("\n".join(lines) + "\n")
            self.steps[name] = len(seen.loss)
            time.sleep(1.2 * watch.LOOK_SECONDS)
            if self.ended():  # the guard asks, then the runner at once
                if self.ended():
                    raise Skipped
                return Measured("crash", None, 0.1, 5.0, "killed: stopped from outside")
        return Measured("ok", 1.0 + worse / 2 + self.random.gauss(0, 0.001), 0.1, 5.0, "")


class Once:
    name = "search"

    def __init__(self, constant, value):
        self.change = constant, value

    def propose(self, briefing):
        source = set_constant(briefing.source, *self.change)
        return Proposal(source, "an idea", self.name, describe(source, briefing.source, briefing.settings))

    def tell(self, proposal, outcome):
        self.told = outcome


@pytest.fixture
def night(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.1)
    night = simulated.begin(tmp_path)
    night.runner, night.watch.on = Bench(night.folder, 0.5), True
    return night


def test_a_losing_run_is_ended_and_its_experiment_discarded(night):
    night.agent = Once("MLP_RATIO", 3)
    assert night.go(1) == "done"
    lost = night.journal.state.experiments[1]
    assert (lost.status, lost.results, lost.ended_run) == ("discard", [], "e0001-r1")
    assert lost.delta == pytest.approx(0.5 / 2.3, rel=0.3)  # bits per byte: val_bpb 1 is a loss of about 2.3 here
    assert night.runner.steps["e0001-r1"] <= 0.5 * STEPS
    assert "ended early" in lost.reason
    assert night.agent.told.delta == lost.delta
    assert [r["event"] for r in read(night.journal.path)][-1] == "hopeless"
    assert "\tdiscard\t" in (night.folder / "results.tsv").read_text().splitlines()[-1]
    night.agent = Search()
    night.journal = Journal(night.folder)
    assert night.go(1) == "done"
    assert len(night.journal.state.experiments) == 3


def test_a_person_may_skip_a_run_that_is_just_being_ended(night):
    night.agent, night.watch.lost = Once("MLP_RATIO", 3), None
    plain = night.settle

    def settle(verdict, reason=""):
        plain(verdict, reason)
        assert night.watch.lost is None

    night.settle = settle
    night.skip_reason = lambda: "skipped" if night.watch.lost is not None else ""
    assert night.go(1) == "done"
    assert night.journal.state.experiments[1].skipped


@pytest.mark.parametrize("kind", ["rates", "off"])
def test_other_changes_are_trained_to_the_end(night, kind):
    night.agent = Once("MATRIX_LR", 0.033) if kind == "rates" else Once("MLP_RATIO", 3)
    night.watch.on = kind != "off"
    night.go(1)
    assert night.runner.steps["e0001-r1"] == STEPS
    assert night.journal.state.experiments[1].results
