"""The curve of a run: seconds, tokens and loss of its steps, and its speed.

steps.jsonl is written by the experiment, so it is not trusted: its size is limited, links are not followed, and lines
that are not steps are skipped.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.trial.crash import read_bytes

BYTES = 8 << 20  # read of a file
LARGEST = 1e15  # of any number in it
UNTIMED = 2  # first steps, which compile kernels (lab.training.clock)


class Curve(NamedTuple):
    """One entry a step, float64."""

    seconds: np.ndarray  # billed, when the step ended
    tokens: np.ndarray  # trained on until then
    loss: np.ndarray  # nats per token

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first steps; None if it cannot be told."""
        if len(self.seconds) <= UNTIMED:
            return None
        seconds, tokens = (float(a[-1] - a[UNTIMED - 1]) for a in (self.seconds, self.tokens))
        return tokens / seconds if seconds > 0 and tokens > 0 else None


def read_curve(path: Path, points: int = BYTES) -> Curve:
    """The curve in this file, empty if there is none. Of a longer one about `points` steps, evenly chosen."""
    steps, lines = [], read_bytes(path, BYTES).splitlines()
    for line in lines[:: max(1, len(lines) // points)]:
        try:
            entry = json.loads(line)
            step = [float(entry[key]) for key in Curve._fields]
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        if all(0 <= value < LARGEST for value in step):
            steps.append(step)
    return Curve(*np.array(steps, dtype=float).reshape(-1, 3).T)
