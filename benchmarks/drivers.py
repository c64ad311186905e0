"""Who proposes best: simulated nights on a landscape fitted to real trials (benchmarks/landscape.py).

    python benchmarks/drivers.py --trials trials.csv [--fold odd] [--nights N] [--experiments N] [--only search,es]

A night starts from upstream's train.py. An experiment is one proposal; a failed run counts as one. The drivers:
  search   the product's agent, through real briefings over a real constants block
  chance   the same candidates without the model
  menu     one constant at a time, by chance from the menus that small local models choose from
  tpe, cma Optuna's samplers over the whole box of the table
  es       a (1+1) evolution strategy over that box in thirty lines
Without noise the lower value is kept. With noise, the verdict of lab.loop.verdict judges simulated runs: seeds differ
by SEED_SD, runs of the same code and seed by RUN_SD, as repeated trials of the table do; what counts is the true value
of the incumbent, and the runs are counted. Nights run in lock-step: a forest predicts many points as fast as one.
Writes drivers.json (each driver's median and worst tenth, and the same with noise, with runs) and drivers.png.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import verdict  # noqa: E402
from landscape import BLOCK, CONTEXT, Landscape, box, read  # noqa: E402

from lab.agents.briefing import Briefing  # noqa: E402
from lab.agents.evidence import Tried  # noqa: E402
from lab.agents.search import Search  # noqa: E402
from lab.files import write_atomic  # noqa: E402
from lab.loop.proposal import Proposal, describe  # noqa: E402
from lab.loop.source import fingerprint, set_constant  # noqa: E402
from lab.loop.verdict import Run, decide  # noqa: E402

AFTER = (25, 50, 100, 300)  # experiments
TITLES = {"exact": "without noise", "noise": "with noise and the verdict"}
SEED_SD, RUN_SD = 0.0073, 0.0007  # bits per byte
SETTINGS = {"sequence_length": CONTEXT}
SOURCE = "\n".join([*(f"{name} = {value!r}" for name, value in BLOCK.items()), "", "def build_model(vocab_size):",
                    "    return None", "", "def main():", "    pass", ""])  # fmt: skip

Settings = dict[str, Any]
Told = tuple[float, float | None, bool, float]  # value and delta as measured, whether it is kept, error of delta
Box = dict[str, tuple[Any, ...] | list[Any]]


class Driver(Protocol):
    noise: float  # sd of a difference, bits per byte

    def ask(self) -> Settings: ...

    def tell(self, value: float, delta: float | None, keep: bool, error: float) -> None:
        """`value` and `delta` as measured; nan and None for a failed run."""


class Agent:
    """An agent of the product, and the history that its briefings tell."""

    def __init__(self, agent: Any, memory: Sequence[Any] = ()):
        self.agent, self.source, self.history, self.tried = agent, SOURCE, [], {fingerprint(SOURCE, SETTINGS)}
        self.memory = memory
        self.values, self.noise = dict(BLOCK), 0.0
        self.kept: tuple[int, float] | None = None  # place of the last kept one in the history, level before it

    def ask(self) -> Settings:
        known = {"noise": self.noise, "history": self.history, "tried": self.tried, "memory": self.memory}
        brief = Briefing(len(self.history) + 1, self.source, SETTINGS, **known)
        self.proposal = self.agent.propose(brief)
        self.edit = self.proposal.edit
        return self.values | self.edit["values"]

    def tell(self, value: float, delta: float | None, keep: bool, error: float) -> None:
        self._refine(value, delta, keep)
        done, status = self.proposal, "crash" if delta is None else "keep" if keep else "discard"
        self.history.append(Tried(len(self.history) + 1, done.hypothesis, status, delta, done.edit, error))
        self.tried.add(fingerprint(done.source, SETTINGS))
        if keep:
            self.source, self.values = done.source, self.values | done.edit["values"]

    def _refine(self, value: float, delta: float | None, keep: bool) -> None:
        """The incumbent has run again since it was kept: lab.agents.briefing.brief puts this into its delta too."""
        if delta is not None and self.kept:
            place, before = self.kept
            self.history[place] = replace(self.history[place], delta=value - delta - before)
        if keep:
            self.kept = len(self.history), value - delta


class Menu:
    """One constant of the briefing's menu, by chance."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def propose(self, briefing: Briefing) -> Proposal:
        menu = briefing.menu()
        name = self.draw.choice(list(menu))
        source = set_constant(briefing.source, name, self.draw.choice(menu[name]))
        return Proposal(source, "", "menu", describe(source, briefing.source, SETTINGS))


class Sampler:
    """A sampler of Optuna over the box; failures count as very bad values, since these samplers rank."""

    def __init__(self, sampler: Any, box: Box):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study, self.box = optuna.create_study(sampler=sampler), box

    def ask(self) -> Settings:
        self.trial = self.study.ask()
        return {name: self._suggest(name, self.box[name]) for name in BLOCK}

    def _suggest(self, name: str, values: tuple[Any, ...] | list[Any]) -> Any:
        if isinstance(values[0], str):
            return self.trial.suggest_categorical(name, values)
        if isinstance(values, list):
            return values[self.trial.suggest_int(name, 0, len(values) - 1)]
        if isinstance(values[0], int):
            return self.trial.suggest_int(name, *values)
        return self.trial.suggest_float(name, *values, log=name.endswith("_LR"))

    def tell(self, value: float, delta: float | None, keep: bool, error: float) -> None:
        self.study.tell(self.trial, 10.0 if delta is None else value)


class Evolution:
    """(1+1): one to three constants of the incumbent, mutated inside the box; the better one lives."""

    def __init__(self, seed: int, box: Box):
        self.draw, self.box, self.values = random.Random(seed), box, dict(BLOCK)

    def ask(self) -> Settings:
        names = self.draw.sample(list(BLOCK), self.draw.randint(1, 3))
        self.mutant = self.values | {name: self._mutate(name, self.box[name]) for name in names}
        return self.mutant

    def _mutate(self, name: str, values: tuple[Any, ...] | list[Any]) -> Any:
        value, draw = self.values[name], self.draw
        if isinstance(values, list):
            if isinstance(value, str) or value not in values:
                return draw.choice(values)
            return values[min(max(values.index(value) + draw.choice((-1, 1)), 0), len(values) - 1)]
        if name == "DEPTH":
            moved = value + draw.choice((-3, -2, -1, 1, 2, 3))
        elif isinstance(value, int):
            moved = round(value * math.exp(0.2 * draw.gauss(0, 1)))
        else:
            moved = value * math.exp(0.5 * draw.gauss(0, 1)) if name.endswith("_LR") else value + draw.gauss(0, 0.1)
        return min(max(moved, values[0]), values[1])

    def tell(self, value: float, delta: float | None, keep: bool, error: float) -> None:
        self.values = self.mutant if keep else self.values


def _sampler(name: str, seed: int) -> Any:
    import optuna

    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


DRIVERS: dict[str, Callable[[int, Box], Driver]] = {
    "search": lambda seed, box: Agent(Search(seed)),
    "chance": lambda seed, box: Agent(Search(seed, startup=10**9)),
    "menu": lambda seed, box: Agent(Menu(seed)),
    "tpe": lambda seed, box: Sampler(_sampler("tpe", seed), box),
    "cma": lambda seed, box: Sampler(_sampler("cma", seed), box),
    "es": Evolution,
}


def fleet(name: str, ranges: Box, nights: int) -> list[Driver]:
    return [DRIVERS[name](seed, ranges) for seed in range(nights)]


class Exact:
    """Without noise: one run each, the lower is kept."""

    noise = 0.0  # sd of a difference

    def __init__(self, seed: int, start: float):
        self.level, self.runs = start, 1

    def __call__(self, value: float, screen: bool) -> Told:
        """Judge an experiment with this true value. `screen`: a row of a design runs once and is not kept."""
        self.runs += 1
        delta = None if math.isnan(value) else value - self.level
        keep = delta is not None and delta < 0 and not screen
        self.level = value if keep else self.level
        return value, delta, keep, 0.0


class Noisy(verdict.Night):
    """With noise: the verdict's runs on a steady machine."""

    noise = RUN_SD * math.sqrt(2)

    def __init__(self, seed: int, start: float):
        super().__init__(seed, "steady")
        self.start = self.level = start
        self.screen = False
        self.propose(0.0)

    def run(self, experiment: verdict.Experiment, seed: int) -> None:
        effect = random.Random(f"{self.seed} {seed}").gauss(0, SEED_SD)
        value = self.start + experiment.true + effect + self.rng.gauss(0, RUN_SD)
        experiment.runs.append(Run(seed, value, 1.0))
        self.runs, self.highest = self.runs + 1, max(self.highest, seed)

    def judge(self, new: verdict.Experiment) -> bool:
        return self.screened(new) if self.screen else super().judge(new)

    def screened(self, new: verdict.Experiment) -> bool:
        """The first run of a comparison, with the incumbent's before it, and its delta."""
        best = self.incumbent
        while True:
            decision = decide(new.code, best.code, [e.code for e in self.kept[:-1]], new_seed=self.highest + 1)
            best.level, new.level = decision.standing, decision.standing + decision.delta
            if new.runs:
                return False
            self.run(new if decision.who == "candidate" else best, decision.seed)

    def __call__(self, value: float, screen: bool) -> Told:
        if math.isnan(value):
            self.runs += 1
            return value, None, False, 0.0
        best, self.screen = self.incumbent, screen
        keep, _ = self.propose(value - self.level)
        new = self.experiments[-1]
        self.level = value if keep else self.level
        return self.start + new.level, new.level - best.level, keep, RUN_SD * math.sqrt(2 / len(new.runs))


def simulate(
    name: str, drivers: Sequence[Driver], judge: type, surface: Landscape, experiments: int
) -> dict[str, np.ndarray]:
    """True value of the incumbent, runs and failures so far, after each experiment (rows) of each night (columns)."""
    start = float(surface([BLOCK])[0])
    judges = [judge(seed, start) for seed in range(len(drivers))]
    found, failed = {"value": [], "runs": [], "failed": []}, np.zeros(len(drivers))
    for one in drivers:
        one.noise = judge.noise
    for number in range(1, experiments + 1):
        values = surface([one.ask() for one in drivers])
        for one, judged, value in zip(drivers, judges, values, strict=True):
            one.tell(*judged(float(value), "screen" in getattr(one, "edit", {})))
        failed = failed + np.isnan(values)
        for key, row in (("value", [j.level for j in judges]), ("runs", [j.runs for j in judges]), ("failed", failed)):
            found[key].append(row)
        if number in AFTER:
            median, worst = np.quantile(found["value"][-1], (0.5, 0.9))
            what = f"{name}, {judge.__name__.lower()}, after {number}"
            runs, failures = np.median(found["runs"][-1]), failed.mean()
            print(
                f"{what}: {median:.5f}, worst tenth {worst:.5f}, {runs:.0f} runs, {failures:.1f} failed",
                file=sys.stderr,
            )
    return {key: np.array(rows) for key, rows in found.items()}


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Median, 90th percentile (the best of the worst tenth), runs and failures; curves of the first two."""
    reached = [n for n in AFTER if n <= len(found["value"])]

    def after(key: str, figure: Callable[[np.ndarray], float], digits: int) -> dict[str, float]:
        return {str(n): round(float(figure(found[key][n - 1])), digits) for n in reached}

    return {
        "median": after("value", np.median, 5),
        "worst_tenth": after("value", lambda row: np.quantile(row, 0.9), 5),
        "runs": after("runs", np.median, 0),
        "failed": after("failed", np.mean, 2),
        "curves": [np.quantile(found["value"], share, axis=1).round(5).tolist() for share in (0.5, 0.9)],
    }


def table(title: str, figures: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: median, and in brackets the worst tenth."""
    reached = list(next(iter(figures.values()))["median"])
    lines = [f"| {title} | {' | '.join(reached)} | runs | failed |", f"|---|{'---|' * (len(reached) + 2)}"]
    for name, one in figures.items():
        cells = [f"{one['median'][n]:.4f} ({one['worst_tenth'][n]:.4f})" for n in reached]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {one['runs'][reached[-1]]:.0f} | {one['failed'][reached[-1]]} |"
        )
    return "\n".join(lines)


def picture(report: dict[str, Any], path: Path) -> None:
    """Median curves, and the worst tenth as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [key for key in TITLES if report[key]]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], shown, strict=True):
        for name, one in report[key].items():
            experiments = range(1, len(one["curves"][0]) + 1)
            line = axis.plot(experiments, one["curves"][0], label=name)[0]
            axis.plot(experiments, one["curves"][1], color=line.get_color(), linewidth=0.6, alpha=0.6)
        axis.set(xlabel="experiments", title=TITLES[key])
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set(ylabel="val_bpb of the incumbent")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def rows_of(path: Path, fold: str) -> Sequence[dict[str, str]]:
    """The rows whose trial has an even or odd number, or all."""
    return [row for row in read(path) if fold == "all" or int(row["trial"]) % 2 == (fold == "odd")]


def landscape_parser(doc: str) -> argparse.ArgumentParser:
    """The options of every simulation on the landscape."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--trials", type=Path, required=True, help="the landscape: a CSV file of real trials")
    parser.add_argument("--fold", choices=("all", "odd", "even"), default="all", help="trials with these numbers only")
    parser.add_argument("--nights", type=int, default=50, help="of each kind (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="output folder")
    return parser


def main() -> None:
    parser = landscape_parser(__doc__)
    parser.add_argument("--experiments", type=int, default=300, help="of a night without noise (default %(default)s)")
    parser.add_argument("--noisy", type=int, default=100, help="of a night with noise (default %(default)s)")
    parser.add_argument("--only", default=",".join(DRIVERS), help="drivers, separated by commas")
    options = parser.parse_args()
    rows = rows_of(options.trials, options.fold)
    surface, ranges, chosen = Landscape(rows), box(rows), options.only.split(",")
    exact, noisy = (
        {name: simulate(name, fleet(name, ranges, options.nights), judge, surface, count) for name in chosen if count}
        for judge, count in ((Exact, options.experiments), (Noisy, options.noisy))
    )
    report: dict[str, Any] = {"fold": options.fold, "rows": len(rows), "nights": options.nights}
    for key, found in (("exact", exact), ("noise", noisy)):
        report[key] = {name: summary(one) for name, one in found.items()}
        if found:
            print(table(TITLES[key], report[key]), end="\n\n")
    report |= {name: one["median"] for name, one in report["exact"].items()}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "drivers.json", json.dumps(report))
    picture(report, options.out / "drivers.png")


if __name__ == "__main__":
    main()
