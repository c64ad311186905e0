"""Error rates of the verdict: simulated nights with the paired rule, the rule before it and upstream's.

    python benchmarks/verdict.py [--nights N] [--seed N] [--out DIR]

The result of a run of five and a half minutes is the value of the code, plus the effect of the seed (sd 0.0073), noise
(so that a pair's difference has sd 0.0018) and the effect of the machine's pace (-0.09 times its logarithm). All rules
run on the same machines, whose pace is steady; sags to 70 % within 20 minutes and stays there; swings between 60 and
100 % in the first hour; loses up to a tenth to bursts of seconds; or gains a quarter at once when the baseline has
run. Half of the proposals do other work for a token than their incumbent. The paired rule knows the tokens of every
run, and the pace of the machine with an error of 1.8 % that all runs of a work at the same pace share, and it times
promising proposals of other work in turn with their incumbent, with an error of 0.6 %; "unpaced" is the same rule
without all three. Kinds of night:
  first        one proposal after the baseline: share kept if it changes nothing, if it gains 0.0025 (a third of a
               seed's sd) and if it gains 0.0146 (two of them);
  A/A          nights of 200 proposals that change nothing: share kept, runs per proposal without the baseline's;
  night        nights of 100 proposals of which one in ten gains 0.0025: shares kept, runs per kept gain, and the gain
               that the night reports against the true one;
  three        nights of three proposals, a number that the rule knows: share kept, runs in total.
Writes verdict.json (`aa`, `power`, `null`: the worst of the machines, and the same under `old`), and verdict.png if
matplotlib is installed. N is the number of nights of each kind; there are ten times as many first proposals.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import unpaired  # noqa: E402

from lab.files import write_atomic  # noqa: E402
from lab.loop.history import TEACHERS  # noqa: E402
from lab.loop.pace import paced  # noqa: E402
from lab.loop.verdict import SURE, Code, Run, decide  # noqa: E402
from lab.trial.runner import TURN_ERROR  # noqa: E402

BPB = 0.97  # val_bpb of the baseline
SEED_SD, PAIR_SD = 0.0073, 0.0018  # measured at that val_bpb
SLOPE = -0.09  # val_bpb on the logarithm of tokens: -0.102 and -0.064 measured
REPEAT_SD = 0.0003  # of the same code, seed and number of tokens: measured within 0.0004
PACE_ERROR = 0.018  # sd of log(pace) measured from outside a run (benchmarks/recorded.py)
TOKENS = 2.5e6  # of a run of the baseline at the usual pace
OTHER_WORK, WORK_SD = 0.5, 0.2  # share of proposals that do other work, and the sd of its log(tokens)
RUN_MINUTES, TURN_MINUTES = 5.5, 1.0
GAIN, LARGE = 0.0025, 0.0146  # bits per byte
MACHINES: dict[str, Callable[[float, random.Random], float]] = {  # logarithm of the pace after these minutes
    "steady": lambda minutes, rng: 0.0,
    "sags": lambda minutes, rng: log(1 - 0.3 * min(1.0, minutes / 20)) + rng.gauss(0, 0.01),
    "first hour": lambda minutes, rng: log(rng.uniform(0.6, 1.0)) if minutes < 60 else 0.0,
    "bursts": lambda minutes, rng: -min(0.1, abs(rng.gauss(0, 0.03))),
    "frees": lambda minutes, rng: log(0.8) if minutes < 16 else 0.0,  # after the baseline, before the first proposal
}


@dataclass
class Experiment:
    """A proposal, or the baseline."""

    id: int
    true: float  # true val_bpb minus the baseline's
    parent: int | None = None
    runs: list[Run] = field(default_factory=list)
    selected: int = 0
    level: float = 0.0  # estimate of `true` by the rule
    work: int = 0  # first experiment that does the same work for a token
    speed: float = 0.0  # log(tokens) of a run at the usual pace, against the baseline's
    timed: tuple[int, float, float] | None = None  # in turn with the incumbent, as lab.loop.verdict.Code says

    @property
    def code(self) -> Code:
        return Code(self.id, self.runs, self.parent, self.selected, self.work, self.timed)


class Night:
    """One simulated night under one rule."""

    paced = True  # the pace of every run is measured

    def __init__(self, seed: int, machine: str, bounded: int | None = None):
        self.seed, self.pace, self.proposals = seed, MACHINES[machine], bounded
        self.rng, self.minutes, self.runs, self.highest = random.Random(seed), 0.0, 0, 0
        self.experiments: list[Experiment] = []
        self.kept: list[Experiment] = []

    def run(self, experiment: Experiment, seed: int) -> None:
        x = self.pace(self.minutes, self.rng)
        effect = random.Random(f"{self.seed} {seed}").gauss(0, SEED_SD)
        effect += random.Random(f"{self.seed} {experiment.id} {seed}").gauss(0, PAIR_SD / sqrt(2))
        value = BPB + experiment.true + effect + SLOPE * x + self.rng.gauss(0, REPEAT_SD)
        same_load = random.Random(f"{self.seed} {experiment.work} {x:.1f}")
        miss = same_load.gauss(0, PACE_ERROR)
        pace = exp(x + miss) if self.paced else None
        tokens = round(TOKENS * exp(x + experiment.speed)) if self.paced else None
        experiment.runs.append(Run(seed, value, pace, self.runs, tokens))
        self.runs, self.minutes, self.highest = self.runs + 1, self.minutes + RUN_MINUTES, max(self.highest, seed)

    def time_in_turn(self, new: Experiment, best: Experiment) -> None:
        new.timed = best.work, new.speed - best.speed + self.rng.gauss(0, TURN_ERROR), TURN_ERROR
        self.minutes += TURN_MINUTES

    @property
    def incumbent(self) -> Experiment | None:
        return self.kept[-1] if self.kept else None

    @property
    def to_come(self) -> int | None:
        return None if self.proposals is None else self.proposals + 1 - len(self.experiments)

    def propose(self, effect: float) -> tuple[bool, int]:
        """Judge a change with this effect (the first is the baseline). Returns whether it is kept, and its runs."""
        best, before = self.incumbent, self.runs
        number = len(self.experiments)
        new = Experiment(number, (best.true if best else 0.0) + effect, work=best.work if best else 0)
        draw = random.Random(f"{self.seed} {number} work")
        new.speed = best.speed if best else 0.0
        if best and draw.random() < OTHER_WORK:
            new.work, new.speed = number, draw.gauss(0, WORK_SD)
        self.experiments.append(new)
        if keep := self.judge(new):
            if best:
                new.parent, new.selected = best.id, len(new.runs)
            self.kept.append(new)
        return keep, self.runs - before

    def judge(self, new: Experiment) -> bool:
        """The paired rule."""
        best = self.incumbent
        others = [e for e in self.kept if e is not best]
        others += [e for e in self.experiments if e not in self.kept and e is not new and len(e.runs) > 1][-TEACHERS:]
        while True:
            codes = [e.code for e in (new, *([best] if best else []), *others)]
            candidate, *known = paced(codes, (best or new).work)
            incumbent = known.pop(0) if best else None
            decision = decide(candidate, incumbent, known, new_seed=self.highest + 1, to_come=self.to_come)
            if best and new.runs:
                best.level, new.level = decision.standing, decision.standing + decision.delta
                stands = decision.verdict == "discard" or -decision.delta > SURE * decision.error
                if self.paced and not stands and new.work != best.work and not new.timed:
                    self.time_in_turn(new, best)
                    continue
            if decision.verdict != "again":
                return decision.verdict == "keep"
            self.run(new if decision.who == "candidate" else best, decision.seed)


class UnpacedNight(Night):
    """The paired rule where the pace is not measured: the incumbent repeats its runs before a keep."""

    paced = False


class OldNight(Night):
    """The earlier rule: means of unpaired runs; the seed is the number of the run."""

    noise = unpaired.Noise(unpaired.PRIOR_SHARE * BPB)

    def judge(self, new: Experiment) -> bool:
        best, ran = self.incumbent, new
        while True:
            self.run(ran, len(ran.runs) + 1)
            values = [run.value for run in ran.runs]
            self.noise = self.noise.joined(values[ran.id > 0 : -1], values[-1])
            known = [run.value for run in best.runs] if best else []
            decision = unpaired.decide(known, [run.value for run in new.runs], self.noise, self.to_come)
            if decision.verdict != "again":
                new.level = fmean(run.value for run in new.runs) - fmean(r.value for r in self.experiments[0].runs)
                return decision.verdict == "keep"
            ran = new if decision.who == "candidate" else best


class UpstreamNight(Night):
    """Upstream's rule: one run each, keep the lower."""

    def judge(self, new: Experiment) -> bool:
        self.run(new, 1)
        new.level = new.runs[0].value - self.experiments[0].runs[0].value
        return not self.incumbent or new.runs[0].value < self.incumbent.runs[0].value


RULES: dict[str, type[Night]] = {"paired": Night, "unpaced": UnpacedNight, "old": OldNight, "upstream": UpstreamNight}


def simulate(rule: str, seed: int, machine: str, effects: list[float], bounded: bool = False) -> tuple[Night, list]:
    """A simulated night, and (effect, kept, runs) of its proposals."""
    night = RULES[rule](seed, machine, len(effects) if bounded else None)
    night.propose(0.0)
    return night, [(effect, *night.propose(effect)) for effect in effects]


def one_in_ten(seed: int, effect: float, count: int = 100) -> list[float]:
    rng = random.Random(f"{seed} effects")
    return [effect if rng.random() < 0.1 else 0.0 for _ in range(count)]


def share(values: list[bool]) -> dict[str, float]:
    """The share of true values, with its standard error."""
    mean = fmean(values)
    return {"share": round(mean, 4), "error": round(sqrt(mean * (1 - mean) / len(values)), 4)}


def evaluate(rule: str, machine: str, nights: int, seed: int, length: int) -> dict[str, Any]:
    def firsts(effect: float) -> list:
        nights_of_one = (simulate(rule, seed + i, machine, [effect]) for i in range(10 * nights))
        return [(night.experiments[1].work == 0, *proposals[0][1:]) for night, proposals in nights_of_one]

    null, gain, large = firsts(0.0), firsts(-GAIN), firsts(-LARGE)
    same = [simulate(rule, 10**6 + seed + i, machine, [0.0] * 2 * length) for i in range(max(1, nights // 2))]
    mixed = [simulate(rule, 2 * 10**6 + seed + i, machine, one_in_ten(seed + i, -GAIN, length)) for i in range(nights)]
    three = [simulate(rule, 3 * 10**6 + seed + i, machine, [0.0] * 3, bounded=True) for i in range(2 * nights)]
    judged = [one for _, proposals in mixed for one in proposals]
    gains = [kept for effect, kept, _ in judged if effect]
    same_judged = [one for _, proposals in same for one in proposals]
    runs = sorted(night.runs for night, _ in three)
    return {
        "first": {
            "null": share([kept for _, kept, _ in null]),
            "gain": share([kept for _, kept, _ in gain]),
            "gain_same_work": share([kept for same, kept, _ in gain if same]),
            "gain_other_work": share([kept for same, kept, _ in gain if not same]),
            "large": share([kept for _, kept, _ in large]),
            "null_runs": round(fmean(runs for *_, runs in null), 3),
        },
        "aa": {
            "null": share([kept for _, kept, _ in same_judged]),
            "runs": round(fmean(runs for *_, runs in same_judged), 3),
            "claimed": round(-fmean(night.incumbent.level for night, _ in same), 5),
        },
        "night": {
            "gain": share(gains),
            "null": share([kept for effect, kept, _ in judged if not effect]),
            "runs_per_gain": round(sum(runs for *_, runs in judged) / max(1, sum(gains)), 1),
            "null_runs": round(fmean(runs for effect, _, runs in judged if not effect), 3),
            "true": round(-fmean(night.incumbent.true for night, _ in mixed), 5),
            "claimed": round(-fmean(night.incumbent.level for night, _ in mixed), 5),
            "nights": [[round(-n.incumbent.true, 5), round(-n.incumbent.level, 5)] for n, _ in mixed],
        },
        "three": {
            "null": share([kept for _, proposals in three for _, kept, _ in proposals]),
            "runs_median": runs[len(runs) // 2],
            "runs_99_percent": runs[len(runs) * 99 // 100],
        },
    }


def worst(by_machine: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over the machines."""
    figures = list(by_machine.values())
    return {
        "aa": {
            "first": max(one["first"]["null"]["share"] for one in figures),
            "night": max(one["aa"]["null"]["share"] for one in figures),
        },
        "power": {"third_sigma": min(one[kind]["gain"]["share"] for one in figures for kind in ("first", "night"))},
        "null": {"runs": max(one["aa"]["runs"] for one in figures)},
    }


ROWS = {
    "A/A, first proposal": lambda r: r["first"]["null"]["share"],
    "A/A, night of 200": lambda r: r["aa"]["null"]["share"],
    "A/A, night of three": lambda r: r["three"]["null"]["share"],
    "A/A, runs per proposal": lambda r: r["aa"]["runs"],
    "A/A, reported gain": lambda r: r["aa"]["claimed"],
    "gain 0.0025 kept, first proposal": lambda r: r["first"]["gain"]["share"],
    "the same, if it does the same work for a token": lambda r: r["first"]["gain_same_work"]["share"],
    "the same, if it does other work": lambda r: r["first"]["gain_other_work"]["share"],
    "gain 0.0025 kept, in a night": lambda r: r["night"]["gain"]["share"],
    "gain 0.0146 kept, first proposal": lambda r: r["first"]["large"]["share"],
    "no gain kept, in a night": lambda r: r["night"]["null"]["share"],
    "runs per change without effect, in a night": lambda r: r["night"]["null_runs"],
    "runs per kept gain": lambda r: r["night"]["runs_per_gain"],
    "night of 100: true gain": lambda r: r["night"]["true"],
    "night of 100: reported gain": lambda r: r["night"]["claimed"],
    "night of three: runs, median": lambda r: r["three"]["runs_median"],
    "night of three: runs, 99 %": lambda r: r["three"]["runs_99_percent"],
}


def table(rules: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table of the figures of every rule on every machine."""
    lines = [f"| | | {' | '.join(MACHINES)} |", f"|---|---|{'---|' * len(MACHINES)}"]
    for name, value in ROWS.items():
        for rule, machines in rules.items():
            lines.append(f"| {name} | {rule} | {' | '.join(f'{value(machines[m]):.4g}' for m in MACHINES)} |")
    return "\n".join(lines)


def picture(rules: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in ROWS if " kept, " in name or name.startswith("A/A, f")]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for number, (rule, machines) in enumerate(rules.items()):
        places = [i + 0.2 * (number - 1.5) for i in range(len(shown))]
        spans = [[ROWS[name](one) for one in machines.values()] for name in shown]
        axes[0].barh(places, [fmean(span) for span in spans], 0.19, label=rule)
        axes[0].hlines(places, [min(s) for s in spans], [max(s) for s in spans], color="black", linewidth=1)
        costs = [machines[m]["night"]["runs_per_gain"] for m in MACHINES]
        axes[1].bar([i + 0.2 * (number - 1.5) for i in range(len(MACHINES))], costs, 0.19, label=rule)
        nights = [night for one in machines.values() for night in one["night"]["nights"]]
        axes[2].plot(*zip(*nights, strict=True), ".", alpha=0.3, label=rule)
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].set(xlabel="share kept (line: range over the machines)", xlim=(0, 1))
    axes[0].axvline(0.8, color="grey", linewidth=0.8)
    axes[1].set_xticks(range(len(MACHINES)), MACHINES)
    axes[1].set(ylabel="runs per kept gain of 0.0025")
    axes[2].axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes[2].set(xlabel="true gain of a night of 100", ylabel="reported gain")
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nights", type=int, default=200, help="nights of each kind (default %(default)s)")
    parser.add_argument(
        "--length", type=int, default=100, help="proposals of a night, half of A/A's (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="output folder")
    options = parser.parse_args()
    size = options.nights, options.seed, options.length
    rules = {rule: {machine: evaluate(rule, machine, *size) for machine in MACHINES} for rule in RULES}
    options.out.mkdir(parents=True, exist_ok=True)
    report = worst(rules["paired"]) | {"old": worst(rules["old"]), "rules": rules}
    write_atomic(options.out / "verdict.json", json.dumps(report, indent=1))
    print(table(rules))
    try:
        picture(rules, options.out / "verdict.png")
    except ModuleNotFoundError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()
