"""What a ledger is worth: second nights on the landscape of benchmarks/drivers.py, with a true and a wrong memory.

    python benchmarks/second_night.py --trials trials.csv [--fold odd] [--nights N] [--experiments N]

First nights run without a ledger. Second nights start from the same train.py with another seed: with the ledger of
their first night; with one whose effects were shuffled over its changes; and without. Nothing has noise. Writes
second_night.json: `reached`, the experiments until a night with the true ledger is as good as its first night was at
the end (median); `lost`, how many experiments more the median night with the shuffled one takes until it is as good as
the median night without is after LATER; and `refused`, how many suggestions of the shuffled one were tried in vain.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from drivers import Agent, Exact, landscape_parser, rows_of, simulate  # noqa: E402
from landscape import Landscape  # noqa: E402

from lab.agents.search import Search  # noqa: E402
from lab.files import write_atomic  # noqa: E402
from lab.loop.ledger import Effect  # noqa: E402

LATER = 25  # experiments
HERE = ("web text", "H200")
Memory = list[tuple[Effect, float]]


def remembered(night: Agent) -> Memory:
    """The ledger of a night."""
    return [
        (Effect("first", t.number, "", *HERE, t.verdict, t.edit["values"], t.edit["was"], *[t.delta] * 3, 1), 1.0)
        for t in night.history
        if t.delta is not None
    ]


def shuffled(memory: Memory, seed: int) -> Memory:
    """The same effects and verdicts, each beside the change of another experiment."""
    found = [dataclasses.asdict(one) for one, _ in memory]
    random.Random(seed).shuffle(found)
    results = [{key: one[key] for key in ("verdict", "effect", "low", "high")} for one in found]
    return [(dataclasses.replace(one, **result), trust) for (one, trust), result in zip(memory, results, strict=True)]


def until(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Per night the experiments until it is at most at its level; all of them and one more if it never is."""
    there = values <= levels + 1e-12
    return np.where(there.any(axis=0), there.argmax(axis=0) + 1, len(values) + 1)


def main() -> None:
    parser = landscape_parser(__doc__)
    parser.add_argument("--experiments", type=int, default=50, help="of a night (default %(default)s)")
    options = parser.parse_args()
    surface = Landscape(rows_of(options.trials, options.fold))

    def nights(name: str, first: int, memories: list[Memory]) -> tuple[list[Agent], np.ndarray]:
        agents = [Agent(Search(first + seed), memory) for seed, memory in enumerate(memories)]
        return agents, simulate(name, agents, Exact, surface, options.experiments)["value"]

    firsts, before = nights("first", 0, [[]] * options.nights)
    ledgers = [remembered(night) for night in firsts]
    wrong = [shuffled(ledger, seed) for seed, ledger in enumerate(ledgers)]
    _, informed = nights("ledger", 1000, ledgers)
    mislead, misled = nights("shuffled", 1000, wrong)
    _, without = nights("without", 1000, [[]] * options.nights)
    level = np.median(without[LATER - 1])
    took = [until(np.median(values, axis=1)[:, None], level)[0] for values in (misled, without)]
    refused = [sum("memory" in t.edit and t.verdict != "keep" for t in night.history) for night in mislead]
    report = {
        "experiments": options.experiments,
        "reached": float(np.median(until(informed, before[-1]))),
        "lost": int(took[0] - took[1]),
        "refused": float(np.mean(refused)),
        "medians": {name: round(float(np.median(values[LATER - 1])), 5) for name, values in
                    (("ledger", informed), ("shuffled", misled), ("without", without))},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "second_night.json", json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
