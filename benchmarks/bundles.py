"""Small gains: one change at a time against a design that tests them together, in simulated nights.

    python benchmarks/bundles.py [--nights N] [--out DIR]

Of eleven changes of the baseline, four gain GAIN each. The others do nothing, or lose as much each. Runs have the noise
of benchmarks/verdict.py, and the real verdict judges. `design` screens the rows of lab.agents.bundle with one run each,
then puts what looks good to the verdict; `single` puts one change after the other to it, until RUNS runs are spent.
Writes bundles.json: per kind of night the share of nights that keep at least three of the gains within RUNS runs after
the baseline's, how many gains are kept on average, the true gain of all that was kept, and the runs.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from verdict import Experiment, Night, share  # noqa: E402

from lab.agents.bundle import ROWS, Design  # noqa: E402
from lab.files import write_atomic  # noqa: E402
from lab.loop.verdict import decide  # noqa: E402

GAIN, GAINS, ENOUGH, RUNS = 0.001, 4, 3, 20  # bits per byte; changes; changes; runs
OTHERS = {"others do nothing": 0.0, "others lose as much": GAIN}


class Bundles(Night):
    """A night over eleven changes with these effects."""

    def __init__(self, seed: int, effects: list[float]):
        super().__init__(seed, "steady")
        self.effects = {f"C{place}": effect for place, effect in enumerate(effects)}
        self.propose(0.0)
        self.first = self.runs
        self.on: set[str] = set()

    @property
    def spent(self) -> int:
        return self.runs - self.first

    def put(self, names: set[str]) -> bool:
        """Put these changes of the incumbent to the verdict."""
        keep, _ = self.propose(sum(self.effects[name] for name in names))
        self.on |= names if keep else set()
        return keep

    def screen(self, names: set[str]) -> float:
        """The difference to the baseline in one run."""
        best = self.incumbent
        new = Experiment(len(self.experiments), sum(self.effects[name] for name in names))
        self.experiments.append(new)
        self.run(new, decide(new.code, best.code, new_seed=self.highest + 1).seed)
        return decide(new.code, best.code, new_seed=self.highest + 1).delta


def single(night: Bundles) -> None:
    for name in night.effects:
        if night.spent < RUNS:
            night.put({name})


def design(night: Bundles) -> None:
    plan = Design([{name: True} for name in night.effects])
    rows = [set(row) for (row, addition), _ in zip(plan.steps(), range(ROWS), strict=False) if addition]
    measured = {number: night.screen(row) for number, row in enumerate(rows)}
    night.put({name for change in Design(plan.changes, measured).good() for name in change})


def evaluate(kind: Any, others: float, nights: int) -> dict[str, Any]:
    found = []
    for seed in range(nights):
        effects = [-GAIN] * GAINS + [others] * (ROWS - GAINS)
        random.Random(seed).shuffle(effects)
        night = Bundles(seed, effects)
        kind(night)
        found.append((sum(night.effects[name] < 0 for name in night.on), -night.incumbent.true, night.spent))
    kept, gain, runs = zip(*found, strict=True)
    return {
        "enough": share([count >= ENOUGH and spent <= RUNS for count, spent in zip(kept, runs, strict=True)]),
        "kept": round(fmean(kept), 2),
        "gain": round(fmean(gain), 5),
        "runs": round(fmean(runs), 1),
        "most_runs": max(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nights", type=int, default=200, help="nights of each kind (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="output folder")
    options = parser.parse_args()
    report = {
        kind.__name__: {others: evaluate(kind, effect, options.nights) for others, effect in OTHERS.items()}
        for kind in (design, single)
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "bundles.json", json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
