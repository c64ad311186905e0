"""Figures of the noise, from recorded runs: seeds and pairs, the pace of the machine, runs that end early.

    python benchmarks/recorded.py [--data docs/recorded]

pairs.csv   one row a run of a fixed number of steps: code, kind (base, constant, structure), seed, val_bpb
pace.csv    one row a run of five minutes of the same code and seed: tokens, val_bpb, speed measured from outside, and
            how long another program ran beside it (seconds; 0 for none)
slope.csv   one row a run of one minute, at a varying speed of the machine, of codes that differ in Adam's epsilon only:
            code, seed, tokens, val_bpb, speed
busy.csv    one row a run of half a minute, in their order, the first ten beside other programs: code (0 the baseline,
            the others change nothing that matters), seed, val_bpb, pace, tokens
curves.csv  one row a run, those of pairs.csv and others with larger changes: code, model (1 if only the model was
            changed), seed, val_bpb, seconds of training, and for each step its tokens (in units of 1,024) and its loss

docs/LOOP.md says what the figures are used for.
"""

import argparse
import csv
import sys
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.loop.futility import gap
from lab.trial.curve import Curve

DATA = Path(__file__).resolve().parents[1] / "docs" / "recorded"
SMALL = 0.03  # bits per byte; pairs of larger effects scatter more


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pooled(groups: list[list[float]]) -> float:
    """Standard deviation within groups."""
    groups = [group for group in groups if len(group) > 1]
    return sqrt(sum(stdev(g) ** 2 * (len(g) - 1) for g in groups) / sum(len(g) - 1 for g in groups))


def pairs(path: Path) -> dict[str, float]:
    """sd of a run with another seed; sd of a difference to the base at the same seed, by kind of change."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    kinds = {}
    for row in rows(path):
        values[row["code"]][int(row["seed"])] = float(row["val_bpb"])
        kinds[row["code"]] = row["kind"]
    base = values["base"]
    differences = {code: [v - base[s] for s, v in runs.items()] for code, runs in values.items() if code != "base"}
    small = {code: found for code, found in differences.items() if abs(fmean(found)) < SMALL}
    found = {"runs": sum(map(len, values.values())), "codes": len(values)}
    found["seed sd"] = pooled([list(runs.values()) for code, runs in values.items() if code in small or code == "base"])
    for kind in ("constant", "structure"):
        found[f"pair sd, {kind}"] = pooled([found for code, found in small.items() if kinds[code] == kind])
    return found


def pace(path: Path) -> dict[str, float]:
    """How far val_bpb of the same code and seed varies, as it is and at equal numbers of tokens, and how well the speed
    that was measured from outside predicts the tokens."""
    found = rows(path)
    values = np.array([float(row["val_bpb"]) for row in found])
    tokens = np.log([float(row["tokens"]) for row in found])
    slope, at_zero = np.polyfit(tokens, values, 1)
    speeds = np.log([float(row["speed"]) for row in found])
    return {
        "runs": len(found),
        "beside a load": sum(float(row["loaded"]) > 0 for row in found),
        "sd": float(values.std(ddof=1)),
        "sd at equal tokens": float((values - slope * tokens - at_zero).std(ddof=2)),
        "slope": float(slope),
        "tokens by the speed, error": float((speeds - tokens).std(ddof=1)),
    }


def short(path: Path) -> dict[str, float]:
    """The slope of val_bpb on log(tokens) among runs of the same seed, as a share of val_bpb, and its noise."""
    found, groups = rows(path), defaultdict(list)
    for row in found:
        groups[row["seed"]].append((np.log(float(row["tokens"])), float(row["val_bpb"])))
    x, y = np.concatenate([np.array(group) - np.mean(group, axis=0) for group in groups.values()]).T
    slope = (x @ y) / (x @ x)
    noise = sqrt(((y - slope * x) ** 2).sum() / (len(found) - len(groups) - 1))
    level = fmean(float(row["val_bpb"]) for row in found)
    return {"short runs": len(found), "short slope, share": float(slope) / level, "short noise": noise}


def futility(path: Path) -> dict[str, float]:
    """Every run replayed against the base with the same seed: the share of training that is saved, and the winners that
    are ended."""
    found = {(row["code"], int(row["seed"])): row for row in rows(path)}
    saved, winners, lost = [], 0, 0
    for (code, seed), row in found.items():
        if code == "base" or ("base", seed) not in found:
            continue
        base = found["base", seed]
        share = saved_share(curve(row), curve(base)) if row["model"] == "1" else 0.0
        better = float(row["val_bpb"]) < float(base["val_bpb"])
        saved.append(share)
        winners += better
        lost += better and share > 0
    ended = sum(share > 0 for share in saved)
    return {"runs": len(saved), "ended": ended, "saved": fmean(saved), "winners": winners, "winners ended": lost}


def saved_share(mine: Curve, its: Curve) -> float:
    """Share of the run that is left when it is ended; 0 if it is not."""
    for step in range(1, len(mine.loss)):
        if gap(Curve(*(values[:step] for values in mine)), its) is not None:
            return 1 - step / len(mine.loss)
    return 0.0


def curve(row: dict[str, str]) -> Curve:
    tokens, loss = (np.array([float(value) for value in row[key].split()]) for key in ("tokens", "loss"))
    return Curve(np.linspace(0, float(row["seconds"]), len(loss) + 1)[1:], 1024 * tokens.cumsum(), loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA)
    data = parser.parse_args().data
    for name, figures in (("pairs", pairs), ("pace", pace), ("slope", short), ("curves", futility)):
        print(name)
        for what, value in figures(data / f"{name}.csv").items():
            print(f"  {what}: {value:.4g}")


if __name__ == "__main__":
    main()
