"""What the experiments of a night say about the constants: results relative to today's incumbent, and what failed.

An edit names the constants that it changed, so the history can be walked back from the incumbent: before a kept change
the constants were what its edit says they were, and val_bpb was worse by its `delta`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.loop import space
from lab.loop.source import exact

FAILED = ("crash", "rejected", "timeout")  # verdicts of runs that gave no number; "invalid" runs are repeated

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """One finished experiment, as agents see it."""

    number: int
    hypothesis: str
    verdict: str  # keep, discard, crash, rejected, timeout, invalid
    delta: float | None = None  # change of val_bpb against its incumbent, negative is better; None: no number
    edit: Mapping[str, Any] | None = None  # see proposal.Proposal; also as read from JSON
    error: float = 0.0  # standard error of delta; 0: not known

    def __post_init__(self) -> None:
        if self.edit and "values" in self.edit:  # JSON has no tuples
            read = {key: hashable(self.edit.get(key, {})) for key in ("values", "was")}
            object.__setattr__(self, "edit", {**self.edit, **read})


@dataclass(frozen=True)
class Result:
    """The constants of one experiment, and what came of them."""

    values: Values
    delta: float | None  # val_bpb minus that of today's incumbent; None: it failed
    error: float  # standard error of delta; 0: not known
    was: Values  # what it changed, as it was before

    def excludes(self, values: Values) -> bool:
        """Whether a block must fail because this one did. If something was made larger, memory was short: so it is for
        what is at least as large in everything. Otherwise all that goes at least as far the same way fails."""
        sizes = {name: value for name, value in self.values.items() if space.takes_memory(name, value)}
        if any(sizes[name] > was for name, was in self.was.items() if name in sizes):
            return all(values[name] >= size for name, size in sizes.items())
        return all(_beyond(values[name], self.values[name], was) for name, was in self.was.items())


def results(history: Iterable[Tried], current: Values) -> list[Result]:
    """The experiments that gave a number or failed, latest first, and the first incumbent. `current`: the incumbent's
    constants; changes of others are left out."""
    values, level, found = dict(current), 0.0, []
    for tried in sorted(history, key=lambda one: one.number, reverse=True):
        changed, was = (known((tried.edit or {}).get(key, {}), current) for key in ("values", "was"))
        delta = tried.delta if tried.delta is not None and math.isfinite(tried.delta) else None
        if not changed or changed.keys() != was.keys():
            continue
        if tried.verdict == "keep" and delta is not None:
            found.append(Result(dict(values), level, tried.error, was))
            values, level = values | was, level - delta
        elif tried.verdict in FAILED:
            found.append(Result(values | changed, None, 0.0, was))
        elif tried.verdict != "invalid" and delta is not None:
            found.append(Result(values | changed, level + delta, tried.error, was))
    return [*found, Result(values, level, 0.0, {})]


def failures(found: Iterable[Result]) -> list[Result]:
    """Those that failed, without those whose conclusion a finished experiment contradicts."""
    finished = [result.values for result in found if result.delta is not None]
    failed = [result for result in found if result.delta is None]
    return [result for result in failed if not any(map(result.excludes, finished))]


def _beyond(value: Any, failed: Any, was: Any) -> bool:
    """Whether a value is the one that failed, or lies on its far side seen from what it was."""
    numbers = all(type(item) in (int, float) for item in (value, failed, was))
    return value == failed or (numbers and (was < failed < value or value < failed < was))


def known(values: Values, current: Values) -> dict[str, Any]:
    """The values of constants that the incumbent has, of the same type."""
    return {name: value for name, value in values.items() if _kind(value) == _kind(current.get(name))}


def _kind(value: Any) -> Any:
    return float if type(value) is int else type(value)


def hashable(values: Values) -> dict[str, Any]:
    return {name: exact(value) for name, value in values.items()}
