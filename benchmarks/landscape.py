"""A landscape of real trials as a function: extremely randomised trees fitted to a table of runs.

The table is a CSV file with the columns `method`, `seed` (of the method), `val_bpb` (empty: the trial failed) and one
for each constant in BLOCK. One forest predicts val_bpb, another whether a trial fails. Predictions take some 10 ms
whatever their number, so simulated nights ask in lock-step.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np

TREES = 100
# The constants of upstream's train.py and their defaults, where a night starts.
BLOCK: dict[str, Any] = {
    "DEPTH": 8,
    "ASPECT_RATIO": 64,
    "HEAD_DIM": 128,
    "DEVICE_BATCH_SIZE": 128,
    "TOTAL_BATCH_SIZE": 524288,
    "EMBEDDING_LR": 0.6,
    "UNEMBEDDING_LR": 0.004,
    "MATRIX_LR": 0.04,
    "SCALAR_LR": 0.5,
    "WEIGHT_DECAY": 0.2,
    "WARMUP_RATIO": 0.0,
    "WARMDOWN_RATIO": 0.5,
    "FINAL_LR_FRAC": 0.0,
    "WINDOW_PATTERN": "SSSL",
}
CONTEXT = 2048  # tokens; a step is a whole number of passes of DEVICE_BATCH_SIZE rows of this length
SHARES = ("WARMUP_RATIO", "WARMDOWN_RATIO", "FINAL_LR_FRAC", "WEIGHT_DECAY")
LAYERS = 4  # letters of WINDOW_PATTERN that are told apart


def read(path: Path, seeds: Iterable[str] = ()) -> list[dict[str, str]]:
    """The trials of a table, of all seeds of the methods or of these alone."""
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if not seeds or row["seed"] in seeds]


def box(rows: Sequence[Mapping[str, str]]) -> dict[str, tuple[Any, ...] | list[Any]]:
    """Per constant the lowest and highest value in the table as a tuple, or a list of its values if they are few."""
    ranges: dict[str, tuple[Any, ...] | list[Any]] = {}
    for name, default in BLOCK.items():
        values = sorted({type(default)(float(row[name]) if type(default) is int else row[name]) for row in rows})
        ranges[name] = values if len(values) < 10 else (values[0], values[-1])
    return ranges


class Landscape:
    """val_bpb of any setting of BLOCK, or nan where the trial fails."""

    def __init__(self, rows: Sequence[Mapping[str, str]]):
        from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor

        features = np.array([encode(row) for row in rows])
        finished = np.array([bool(row["val_bpb"]) for row in rows])
        values = np.array([float(row["val_bpb"]) for row in rows if row["val_bpb"]])
        self.value = ExtraTreesRegressor(TREES, random_state=0).fit(features[finished], values)
        self.fails = ExtraTreesClassifier(TREES, random_state=0).fit(features, ~finished)

    def __call__(self, settings: Sequence[Mapping[str, Any]]) -> np.ndarray:
        features = np.array([encode(one) for one in settings])
        fails = self.fails.predict(features)
        fails |= np.array(
            [int(one["TOTAL_BATCH_SIZE"]) % (int(one["DEVICE_BATCH_SIZE"]) * CONTEXT) > 0 for one in settings]
        )
        return np.where(fails, np.nan, self.value.predict(features))


def encode(row: Mapping[str, Any]) -> list[float]:
    """A setting as numbers on natural scales: thresholds of the trees are uniform in them."""
    numbers = {name: float(row[name]) for name, default in BLOCK.items() if not isinstance(default, str)}
    scaled = [value**0.5 if name in SHARES else log(value) for name, value in numbers.items()]
    pattern = (str(row["WINDOW_PATTERN"]) * LAYERS)[:LAYERS]
    width = log(numbers["DEPTH"] * numbers["ASPECT_RATIO"])
    return [*scaled, width, *(float(letter == "L") for letter in pattern)]
