"""Measure the scaling rule of lab/machine/fit.py: train models of many sizes, fit the rule to them, and plot it.

    python prepare.py --preset tinystories --no-fit [--files ...]
    python benchmarks/sweep.py [--jobs 2]        an hour on two cores; resumes after an interruption

Every run is train.py for a fixed number of steps without doubling, so its result does not depend on how busy the
machine is. After a change of train.py remove docs/scaling.csv first: runs of different code do not form one rule. Runs
are added to docs/scaling.csv as they end. The rule is fitted to those with the tier's batch and rate, printed as
constants for lab/machine/fit.py, and plotted in docs/scaling.png.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.errors import UserError  # noqa: E402
from lab.files import append_line  # noqa: E402
from lab.machine.fit import block_parameters, predicted_bpb  # noqa: E402
from lab.training.run import recorded  # noqa: E402

TABLE, PLOT = ROOT / "docs" / "scaling.csv", ROOT / "docs" / "scaling.png"
SIZES = ((2, 64), (4, 64), (2, 128), (4, 128), (6, 128), (2, 192), (4, 192), (2, 256))  # depth, width
STEPS = (150, 300, 600, 1200)
LARGE = 6e8  # parameters times steps; larger runs are left out, as they would take too long
COLUMNS = ("depth", "width", "tokens_per_step", "matrix_lr", "steps", "tokens", "val_bpb")


def plan(preset: dict) -> list[dict]:
    """Sizes and lengths with the tier's batch and rate, the cheap ones first; then other batches and rates."""
    step, rate = preset["batch"]["tokens_per_step"], preset["optimizer"]["matrix_lr"]
    runs = [(d, w, step, rate, n) for d, w in SIZES for n in STEPS if block_parameters(d, w) * n <= LARGE]
    runs.sort(key=lambda run: block_parameters(*run[:2]) * run[4])
    runs += [(4, 128, size, rate, 300 * step // size) for size in (step // 2, 2 * step)]
    runs += [(4, 128, step, factor * rate, 300) for factor in (0.5, 2.0)]
    return [dict(zip(COLUMNS, run, strict=False)) for run in runs]


def done() -> list[dict]:
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def train(run: dict, record: dict, core: int | None) -> None:
    """Train once and append a row to the table."""
    preset = json.loads(json.dumps(record["preset"]))
    preset["model"] |= {"depth": run["depth"], "width": run["width"]}
    rows = min(preset["batch"]["rows"], run["tokens_per_step"] // preset["task"]["sequence_length"])
    preset["batch"] |= {"tokens_per_step": run["tokens_per_step"], "rows": rows, "processes": 1, "doubling": 1.0}
    preset["optimizer"]["matrix_lr"] = run["matrix_lr"]
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        settings = Path(folder, "settings.json")
        settings.write_text(
            json.dumps({"preset": preset, "prepared": record["prepared"], "tier": "sweep"}), encoding="utf-8"
        )
        command = [sys.executable, str(ROOT / "train.py"), "--steps", str(run["steps"]), "--run-dir", f"{folder}/run"]
        bind = None if core is None else lambda: os.sched_setaffinity(0, {core})
        env = os.environ | {"AUTORESEARCH_SETTINGS": str(settings)}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, preexec_fn=bind)
        result = json.loads(Path(folder, "run", "result.json").read_text(encoding="utf-8"))
    run |= {"tokens": result["total_tokens"], "val_bpb": round(result["val_bpb"], 6)}
    append_line(TABLE, ",".join(str(run[name]) for name in COLUMNS))
    print(", ".join(f"{name} {run[name]}" for name in COLUMNS), flush=True)


def rule(rows: list[dict]) -> tuple[dict[str, float], float]:
    """Constants of lab.machine.fit.predicted_bpb by least squares, and the root mean square of the residuals, in bpb.

    FLOOR, ALPHA and BETA by grid, A and B in closed form, neither below 0."""
    sizes = np.array([block_parameters(row["depth"], row["width"]) for row in rows])
    tokens, losses = np.array([row["tokens"] for row in rows]), np.array([row["val_bpb"] for row in rows])
    best = (np.inf, {})
    for floor in np.arange(0.0, losses.min(), 0.05):
        for alpha in np.arange(0.05, 1.01, 0.05):
            for beta in np.arange(0.05, 1.01, 0.05):
                terms = np.stack([sizes**-alpha, tokens**-beta], axis=1)
                (a, b), *_ = np.linalg.lstsq(terms, losses - floor, rcond=None)
                left = float(np.mean((terms @ (a, b) + floor - losses) ** 2))
                if left < best[0] and a > 0 and b > 0:
                    best = (left, {"FLOOR": floor, "A": a, "ALPHA": alpha, "B": b, "BETA": beta})
    return {name: float(f"{value:.4g}") for name, value in best[1].items()}, best[0] ** 0.5


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, size in enumerate(
        sorted({(row["depth"], row["width"]) for row in rows}, key=lambda s: block_parameters(*s))
    ):
        mine = sorted((row["tokens"], row["val_bpb"]) for row in rows if (row["depth"], row["width"]) == size)
        tokens, colour = np.geomspace(mine[0][0], mine[-1][0]), f"C{number}"
        axes.plot(*zip(*mine, strict=True), "o", color=colour, label=f"depth {size[0]:.0f}, width {size[1]:.0f}")
        axes.plot(tokens, [predicted_bpb(block_parameters(*size), n) for n in tokens], color=colour, linewidth=1)
    axes.set(xscale="log", xlabel="training tokens", ylabel="val_bpb (lines: the rule of lab/machine/fit.py)")
    axes.legend(frameon=False)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, each bound to a core (Linux; default 1)")
    parser.add_argument("--fit-only", action="store_true", help="do not train; only fit the rule and plot it")
    options = parser.parse_args()
    if not options.fit_only:
        if not (record := recorded()):
            raise UserError("nothing is prepared; run: python prepare.py --preset tinystories --no-fit")
        if not TABLE.is_file():
            TABLE.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        finished = [tuple(row[name] for name in COLUMNS[:5]) for row in done()]
        runs = [run for run in plan(record["preset"]) if tuple(run[name] for name in COLUMNS[:5]) not in finished]
        cores: SimpleQueue[int | None] = SimpleQueue()
        for core in range(options.jobs):
            cores.put(core if options.jobs > 1 else None)

        def one(run: dict) -> None:
            core = cores.get()
            try:
                train(run, record, core)
            finally:
                cores.put(core)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, runs))
    usual = max(rows := done(), key=lambda row: [r["matrix_lr"] for r in rows].count(row["matrix_lr"]))
    same = [r for r in rows if all(r[name] == usual[name] for name in ("matrix_lr", "tokens_per_step"))]
    constants, left = rule(same)
    print(
        f"{len(same)} runs: " + ", ".join(f"{k} = {v}" for k, v in constants.items()) + f"; rms residual {left:.4f} bpb"
    )
    draw(same)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
