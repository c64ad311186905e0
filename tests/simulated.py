"""A night in which only the training is simulated: real git, journal, agent and checks."""

import random
from math import exp
from pathlib import Path

from checkout import git
from conftest import ROOT

import agent_loop
from lab.agents.search import Search
from lab.loop.branch import Branch
from lab.loop.journal import Journal
from lab.loop.suggestions import Suggestions
from lab.preset import load, to_dict
from lab.trial.runner import Measured


class SimulatedBench:
    """Runs take no time and give noise around a value, on a machine whose speed varies by 1 %. `spoil` says which runs
    the machine spoils."""

    def __init__(self, spoil=lambda name: False):
        self.settings = {"preset": to_dict(load("offline")), "minutes": 5.0}
        self.preflight_seconds, self.sandbox, self.spoil = 1.0, "none", spoil
        self.random, self.names = random.Random(0), []

    def preflight(self, source: str) -> str:
        return ""

    def run(self, name: str, source: str, seed: int, test: bool = False) -> Measured:
        self.names.append(name)
        if self.spoil(name):
            return Measured("invalid", None, 0.1, 5.0, "the machine slept for 60 s")
        value, pace = 1.0 + self.random.gauss(0, 0.003), exp(self.random.gauss(0, 0.01))
        known = {"tokens": round(1e6 * pace), "speed": pace, "pace": pace}
        return Measured("ok", value, 0.1, 5.0, "", test_bpb=value + 0.1 if test else None, **known)

    def timed_in_turn(self, source: str, other: str) -> tuple[float | None, float | None]:
        return self.random.gauss(0, 0.006), 0.006


def begin(folder: Path, **options) -> agent_loop.Night:
    """A night in a repository of its own that holds train.py."""
    user = folder / "repo"
    user.mkdir()
    (user / "train.py").write_text((ROOT / "train.py").read_text())
    (user / ".gitignore").write_text("nights/\n")
    git(user, "init", "--quiet", "-b", "main")
    git(user, "add", "-A")
    git(user, "commit", "--quiet", "-m", "start")
    night = user / "nights" / "n"
    night.mkdir(parents=True)
    branch = Branch(user, night / "worktree", "autoresearch/n")
    branch.ensure(git(user, "rev-parse", "HEAD"))
    journal = Journal(night)
    journal.record("start", tag="n", commit=branch.head)
    return agent_loop.Night(night, branch, journal, SimulatedBench(**options), "full", Search(),
                            suggestions=Suggestions(night))  # fmt: skip
