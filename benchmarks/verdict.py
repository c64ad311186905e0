"""What the verdict is worth: simulated nights under the full rule and under upstream's (`--rigor none`).

    python benchmarks/verdict.py [--replicates FILE] [--sd BPB] [--seed N] [--nights N] [--out DIR]

Effects and gains are in sigma, the run-to-run standard deviation. Noise is drawn with replacement from measured
replicates (--replicates: JSON list of lists of val_bpb, one list a source; residuals about each list's mean, scaled
by sqrt(n / (n - 1))), otherwise from a normal with the sd of 30 seeds on one GPU. Both rules see the same draws: a
proposal's effect and the noise of its runs do not depend on the rule. It measures
  A/A    nights of 200 proposals that change nothing: share kept, gain claimed though none is there;
  power  share kept of a gain: as the first proposal after the baseline, and in nights of 100 proposals in
         which one in ten has it and the others change nothing;
  rehearsal  A/A, power and runs spent in nights of three experiments, whose end is known to the rule;
  night  runs spent per real gain kept, and the true and the claimed gain after a budget of runs in a mixed night
         (effect of a proposal: 10 % -2, 40 % 0, 50 % +2 sigma).
Writes benchmarks/out/verdict.json, and verdict.png if matplotlib is there.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.errors import UserError  # noqa: E402
from lab.files import write_atomic  # noqa: E402
from lab.loop.verdict import BASELINE_RUNS, PRIOR_SHARE, Noise, decide  # noqa: E402

BPB = 1.0  # true val_bpb of the baseline
SEED_SD = 0.0089  # bpb, 30 seeds of one source on one GPU
RULES = ("full", "none")
EFFECTS = tuple(i / 2 for i in range(9))  # sigma

Draw = Callable[[random.Random], float]  # noise of one run, unit variance


@dataclass
class Night:
    """What one simulated night came to; gains in sigma, positive is better."""

    runs: int = 0
    proposals: dict[float, int] = field(default_factory=dict)  # by effect
    kept: dict[float, int] = field(default_factory=dict)  # by effect
    true: float = 0.0  # gain of the last incumbent over the baseline
    claimed: float = 0.0  # the same by the rule's own numbers


def simulate(rule: str, seed: int, effects: list[float], draw: Draw, sd: float, budget: float = float("inf"),
             bounded: bool = False) -> Night:  # fmt: skip
    """One night: `effects` in sigma, one a proposal (negative is better), until `budget` runs are spent. `bounded`:
    the rule knows how many proposals there will be."""
    replicates = random.Random(f"{seed} incumbent")
    night, runs = Night(), [random.Random(f"{seed} {i}") for i in range(len(effects) + 1)]
    true, noise = 0.0, Noise(PRIOR_SHARE * BPB)
    incumbent = [BPB + sd * draw(runs[-1]) for _ in range(BASELINE_RUNS if rule == "full" else 1)]
    night.runs, baseline, unselected = len(incumbent), fmean(incumbent), list(incumbent)
    noise = Noise.of([unselected], noise.prior)
    for number, (effect, rng) in enumerate(zip(effects, runs, strict=False), 1):
        to_come = len(effects) - number if bounded else None
        if night.runs >= budget:
            break
        candidate, fresh = [BPB + sd * (true + effect + draw(rng))], []
        night.runs += 1
        while (verdict := decide(incumbent, candidate, noise, rule, to_come=to_come)).verdict == "again":
            own = verdict.who == "candidate"
            value = BPB + sd * (true + effect + draw(rng) if own else true + draw(replicates))
            noise = noise.joined(fresh if own else unselected, value)
            for values in (candidate, fresh) if own else (incumbent, unselected):
                values.append(value)
            night.runs += 1
        night.proposals[effect] = night.proposals.get(effect, 0) + 1
        if verdict.verdict == "keep":
            night.kept[effect] = night.kept.get(effect, 0) + 1
            true, incumbent, unselected = true + effect, candidate, fresh
    night.true, night.claimed = -true, (baseline - fmean(incumbent)) / sd
    return night


def share(nights: list[Night], effect: float) -> float:
    """Share of the proposals with this effect that were kept."""
    return sum(n.kept.get(effect, 0) for n in nights) / sum(n.proposals.get(effect, 0) for n in nights)


def mean_error(values: list[float]) -> dict[str, float]:
    """Mean and its standard error over nights."""
    return {"mean": round(fmean(values), 4), "error": round(stdev(values) / len(values) ** 0.5, 4)}


def null_nights(rule: str, nights: int, seed: int, draw: Draw, sd: float) -> dict:
    runs = [simulate(rule, seed + i, [0.0] * 200, draw, sd) for i in range(nights)]
    first = [simulate(rule, seed + i, [0.0] * 10, draw, sd) for i in range(10 * nights)]
    return {
        "kept_share": mean_error([share([n], 0.0) for n in runs]),
        "kept_share_first_10": mean_error([share([n], 0.0) for n in first]),
        "claimed_gain": mean_error([n.claimed for n in runs]),
        "runs_per_proposal": round(sum(n.runs for n in runs) / (200 * nights), 3),
    }


def power(rule: str, nights: int, seed: int, draw: Draw, sd: float) -> list[dict]:
    rows = []
    for effect in EFFECTS:
        first = [simulate(rule, seed + i, [-effect], draw, sd) for i in range(10 * nights)]
        mixed = [simulate(rule, seed + i, _one_in_ten(-effect, seed + i), draw, sd) for i in range(nights)]
        gains = sum(n.kept.get(-effect, 0) for n in mixed)
        rows.append(
            {
                "effect": effect,
                "first": round(share(first, -effect), 4),
                "in_night": round(night := share(mixed, -effect), 4),
                "in_night_error": round((night * (1 - night) / sum(n.proposals[-effect] for n in mixed)) ** 0.5, 4),
                "null_in_night": round(share(mixed, 0.0), 4),
                "runs_per_gain": round(sum(n.runs for n in mixed) / gains, 1) if effect and gains else None,
            }
        )
    return rows


def _one_in_ten(effect: float, seed: int) -> list[float]:
    rng = random.Random(f"{seed} effects")
    return [effect if rng.random() < 0.1 else 0.0 for _ in range(100)]


def mixed_nights(rule: str, nights: int, seed: int, draw: Draw, sd: float, budget: int) -> dict:
    results = []
    for i in range(nights):
        effects = random.Random(f"{seed + i} mixed").choices([-2.0, 0.0, 2.0], [0.1, 0.4, 0.5], k=budget)
        results.append(simulate(rule, seed + i, effects, draw, sd, budget))
    kept = {effect: sum(n.kept.get(effect, 0) for n in results) for effect in (-2.0, 0.0, 2.0)}
    return {
        "budget": budget,
        "proposals": mean_error([float(sum(n.proposals.values())) for n in results]),
        "true_gain": mean_error([n.true for n in results]),
        "claimed_gain": mean_error([n.claimed for n in results]),
        "kept_that_are_gains": round(kept[-2.0] / sum(kept.values()), 3),
        "kept_that_are_losses": round(kept[2.0] / sum(kept.values()), 3),
        "runs_per_gain": round(sum(n.runs for n in results) / kept[-2.0], 1),
        "nights": [[round(n.true, 3), round(n.claimed, 3)] for n in results],
    }


def rehearsals(rule: str, nights: int, seed: int, draw: Draw, sd: float) -> dict:
    """Nights of three experiments, known beforehand: what the demo of the README costs."""
    null = [simulate(rule, seed + i, [0.0] * 3, draw, sd, bounded=True) for i in range(10 * nights)]
    gain = [simulate(rule, seed + i, [-2.0] * 3, draw, sd, bounded=True) for i in range(10 * nights)]
    runs = sorted(n.runs for n in null)
    return {
        "kept_share": round(share(null, 0.0), 4),
        "kept_at_2_sigma": round(share(gain, -2.0), 4),
        "runs_median": runs[len(runs) // 2],
        "runs_99_percent": runs[len(runs) * 99 // 100],
    }


def measured(path: Path) -> tuple[Draw, float]:
    """Standardised residuals of measured replicates, and their standard deviation in bpb."""
    try:
        groups = [group for group in json.loads(path.read_text(encoding="utf-8")) if len(group) > 1]
        residuals = [(x - fmean(g)) * (len(g) / (len(g) - 1)) ** 0.5 for g in groups for x in g]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON list of lists of val_bpb: {error}") from error
    sd = fmean([r * r for r in residuals]) ** 0.5 if residuals else 0.0
    if not sd:
        raise UserError(f"{path} has no replicates that differ; give at least one list of two or more val_bpb")
    return lambda rng: rng.choice(residuals) / sd, sd


def picture(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for rule, colour in zip(RULES, ("tab:blue", "tab:orange"), strict=True):
        rows = report[rule]["power"]
        left.plot(EFFECTS, [r["first"] for r in rows], "--", color=colour, label=f"{rule}, first proposal")
        left.plot(EFFECTS, [r["in_night"] for r in rows], "-o", color=colour, label=f"{rule}, in a night")
        nights = report[rule]["night"]["nights"]
        right.plot(*zip(*nights, strict=True), ".", color=colour, alpha=0.5, label=rule)
    left.axhline(0.05, color="grey", linewidth=0.8)
    left.axhline(0.8, color="grey", linewidth=0.8)
    left.set(xlabel="true gain of the proposal (sigma)", ylabel="share kept", ylim=(0, 1.02))
    right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    budget = report["full"]["night"]["budget"]
    right.set(xlabel="true gain (sigma)", ylabel="claimed gain (sigma)", title=f"mixed nights of {budget} runs")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(report: dict) -> str:
    lines = [f"noise: {report['noise']}", f"{'':44}{'full':>10}{'none':>10}"]

    def row(name: str, value: Callable[[dict], object]) -> None:
        cells = [value(report[rule]) for rule in RULES]
        lines.append(f"{name:44}" + "".join(f"{c:>10.3f}" if c is not None else f"{'-':>10}" for c in cells))

    row("A/A kept, 200 proposals", lambda r: r["null"]["kept_share"]["mean"])
    row("A/A kept, first 10 proposals", lambda r: r["null"]["kept_share_first_10"]["mean"])
    row("A/A gain claimed (sigma)", lambda r: r["null"]["claimed_gain"]["mean"])
    row("A/A runs a proposal", lambda r: r["null"]["runs_per_proposal"])
    for i, effect in enumerate(EFFECTS):
        row(f"kept at {effect} sigma, first proposal", lambda r, i=i: r["power"][i]["first"])
        row(f"kept at {effect} sigma, in a night", lambda r, i=i: r["power"][i]["in_night"])
        row(f"kept at {effect} sigma, standard error", lambda r, i=i: r["power"][i]["in_night_error"])
        row(f"runs per gain kept at {effect} sigma", lambda r, i=i: r["power"][i]["runs_per_gain"])
    for key in report["full"]["rehearsal"]:
        row(f"night of three: {key.replace('_', ' ')}", lambda r, key=key: r["rehearsal"][key])
    row("mixed night: true gain (sigma)", lambda r: r["night"]["true_gain"]["mean"])
    row("mixed night: claimed gain (sigma)", lambda r: r["night"]["claimed_gain"]["mean"])
    row("mixed night: kept that are gains", lambda r: r["night"]["kept_that_are_gains"])
    row("mixed night: kept that are losses", lambda r: r["night"]["kept_that_are_losses"])
    row("mixed night: runs per gain kept", lambda r: r["night"]["runs_per_gain"])
    return "\n".join(lines)


def evaluate(draw: Draw, sd: float, nights: int, seed: int, budget: int = 100) -> dict:
    return {
        rule: {
            "null": null_nights(rule, nights, seed, draw, sd),
            "power": power(rule, nights, seed, draw, sd),
            "rehearsal": rehearsals(rule, nights, seed, draw, sd),
            "night": mixed_nights(rule, nights, seed, draw, sd, budget),
        }
        for rule in RULES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicates", type=Path, help="JSON list of lists of measured val_bpb")
    parser.add_argument("--sd", type=float, default=SEED_SD, help="sd of the normal noise, bpb (default %(default)s)")
    parser.add_argument("--nights", type=int, default=200, help="nights of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder of what is written")
    options = parser.parse_args()
    draw, sd = (lambda rng: rng.gauss(0, 1)), options.sd
    if options.replicates:
        draw, sd = measured(options.replicates)
    source = f"measured, {options.replicates}" if options.replicates else "normal, not measured here"
    report = {"noise": f"sd {sd:.4f} bpb ({source})", **evaluate(draw, sd, options.nights, options.seed)}
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "verdict.json", json.dumps(report, indent=1))
    print(table(report))
    try:
        picture(report, out / "verdict.png")
    except ModuleNotFoundError:
        print("matplotlib is not installed: no picture")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
