"""Whether a run that is still training is nearly certain to lose, from its loss so far. Pure: no files, no clock.

With the same seed two models see the same batches, so their training losses can be compared step by step at equal
numbers of tokens. The gap still moves until the end: from a share p of the budget on, by DRIFT * (1 - p) of the loss
(sd; docs/LOOP.md has the recorded runs). A model that does less work for a token will see more tokens by the end, and
at equal tokens it is at an earlier point of its schedule, so such a run must also lose at equal time.

Only changes of the model are compared: other learning rates, schedules, batches or losses give the curve another shape.
"""

import numpy as np

from lab.loop.source import uses
from lab.trial.curve import Curve

EARLIEST, LATEST = 0.3, 0.9  # share of the budget; later there is little to save
WINDOW = 0.1  # of the tokens so far at least, over which the gap is measured
DRIFT = 0.01  # share of the loss
ERRORS = 2.5  # standard errors by which it must lose
FASTER = 1.03  # tokens in the same time, from which the run must lose at equal time too
BLOCKS = 5  # of steps whose means give the standard error: steps beside each other are not independent


def comparable(names: set[str], source: str) -> bool:
    """Whether only the model that `build_model` makes is changed: `names` are the changed constants and definitions."""
    return names <= uses(source, "build_model")


def gap(mine: Curve, its: Curve) -> float | None:
    """By how many nats per token the first run will lose, if that is nearly certain; else None.

    `its` is the whole run of the incumbent with the same seed and budget."""
    if len(mine.loss) < 4 * BLOCKS or len(its.loss) < 4 * BLOCKS or not its.seconds[-1]:
        return None
    progress = mine.seconds[-1] / its.seconds[-1]
    if not EARLIEST <= progress <= LATEST:
        return None
    mean, error = _difference(mine.tokens, mine.loss, its.tokens, its.loss)
    level = float(its.loss[-len(its.loss) // 10 :].mean())
    bar = ERRORS * np.hypot(error, DRIFT * (1 - progress) * level)
    if mean < bar:
        return None
    ratio = mine.tokens[-1] / np.interp(mine.seconds[-1], its.seconds, its.tokens)
    if ratio > FASTER:
        at_time, error = _difference(mine.seconds, mine.loss, its.seconds, its.loss)
        if at_time < ERRORS * np.hypot(error, DRIFT * (1 - progress) * level):
            return None
        mean = at_time
    return float(mean)


def _difference(x: np.ndarray, loss: np.ndarray, other_x: np.ndarray, other_loss: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the difference of two losses over the last part of the first curve."""
    last = x >= x[-1] - WINDOW * other_x[-1]
    differences = loss[last] - np.interp(x[last], other_x, other_loss)
    blocks = [float(block.mean()) for block in np.array_split(differences, BLOCKS)]
    return float(np.mean(blocks)), float(np.std(blocks, ddof=1) / BLOCKS**0.5)
