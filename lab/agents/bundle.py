"""Small changes tested together: many gains are smaller than the noise of a pair of runs.

A Plackett-Burman design of 12 rows (Biometrika 1946) tells seven to eleven changes of the incumbent apart: each row
applies about half of them, and each change is in half of the rows, so that every run says something about every change.
One row is the incumbent itself. The others run once each, as experiments whose edit has the key `screen`, and none is
kept. Then what looks good goes to the verdict as one proposal. The changes are near misses, filled up with untried
ones. All is read from the history, so a resumed night goes on with its design.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lab.agents.evidence import Tried, hashable
from lab.loop.history import Experiment
from lab.loop.verdict import Decision

GENERATOR = (1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0)  # its cyclic shifts are the rows
ROWS = len(GENERATOR)  # and the most changes
FEWEST = 7  # changes
NEAR_MISSES = 3  # since the last kept change and the last design: then a design is due
PRIOR = 0.5  # sd of an effect, in sds of a paired difference

Change = Mapping[str, Any]  # name -> value, of one or more constants


@dataclass(frozen=True)
class Design:
    changes: Sequence[Change]
    measured: Mapping[int, float] = field(default_factory=dict)  # row -> delta
    following: int = 0  # the next row

    def steps(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(constants, what to add to the edit) of the rows that are left, then of what looks good."""
        for row in range(self.following, ROWS):
            applied = [change for place, change in enumerate(self.changes) if _applies(place, row)]
            yield merged(applied), {"screen": {"row": row, "changes": [dict(change) for change in self.changes]}}
        yield merged(self.good()), {}

    def good(self) -> list[Change]:
        """The changes that look better, by ridge regression on the paired differences of the rows."""
        count = len(self.changes)
        design = np.array([[_applies(place, row) for place in range(count)] for row in self.measured]).reshape(
            -1, count
        )
        precision = design.T @ design + np.eye(count) / PRIOR**2
        effects = np.linalg.solve(precision, design.T @ np.array(list(self.measured.values())))
        return [change for change, effect in zip(self.changes, effects, strict=True) if effect < 0]


def _applies(place: int, row: int) -> float:
    return float(GENERATOR[(place - row) % ROWS])


def merged(changes: Iterable[Change]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def latest(history: Sequence[Tried]) -> Design | None:
    """The last design, finished or not, unless another change was kept since it began."""
    screened = [tried for tried in history if "screen" in (tried.edit or {})]
    if not screened:
        return None
    changes = screened[-1].edit["screen"]["changes"]
    members = [tried for tried in screened if tried.edit["screen"]["changes"] == changes]
    if any(tried.verdict == "keep" and tried.number > members[0].number for tried in history):
        return None
    measured = {tried.edit["screen"]["row"]: tried.delta for tried in members if tried.delta is not None}
    return Design([hashable(change) for change in changes], measured, members[-1].edit["screen"]["row"] + 1)


def near_misses(history: Sequence[Tried]) -> list[Change]:
    """What was discarded although it looked better by more than its error, the best first: since the last kept change
    and the last design."""
    since = max((t.number for t in history if t.verdict == "keep" or "screen" in (t.edit or {})), default=0)
    discarded = [t for t in history if t.number > since and t.verdict == "discard" and t.delta is not None]
    missed = sorted((t for t in discarded if t.delta < -t.error), key=lambda tried: tried.delta)
    return [tried.edit["values"] for tried in missed if (tried.edit or {}).get("values")]


def screened(decision: Decision, experiment: Experiment) -> Decision:
    """The decision on an experiment; a row of a design is discarded after its first run."""
    if not experiment.results or "screen" not in (experiment.edit or {}):
        return decision
    return replace(
        decision, verdict="discard", near_miss=False, reason=f"{decision.reason}; a row of a design runs once"
    )
