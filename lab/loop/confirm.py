"""The morning's confirmation: the night's winner against its baseline, with seeds that the night never used.

A night reports the gain of changes that it selected for their results. Here both sources run PAIRS times with the same
new seeds, and are also scored on text that no verdict has looked at. Then the winner runs without each of its changes,
with SHARE_PAIRS of the seeds: what it loses is that change's share. `next_trial` follows from the journal alone, so a
confirmation resumes like a night. Pure: no files, no clock.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lab.loop.history import Confirmation, Experiment, State
from lab.loop.pace import paced
from lab.loop.source import constants, exact, set_constant
from lab.loop.verdict import Code, Fit, Run, student

FIRST_SEED = 1_000_001  # a night counts its seeds up from 1
PAIRS = 4
SHARE_PAIRS = 2
INVALID_RUNS = 3  # of one trial: it is given up
NORMAL_95 = 1.96


class Trial(NamedTuple):
    """One run of the confirmation: an experiment's source, without one of its kept changes if that is given."""

    id: int
    without: int | None
    seed: int

    @property
    def name(self) -> str:
        change = "" if self.without is None else f"-without{self.without}"
        return f"c{self.id:04d}{change}-s{self.seed}"


class Gain(NamedTuple):
    """Bits per byte; positive is better. The interval covers 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Confirmed:
    """What the confirmation found about the present winner."""

    pairs: int
    gain: Gain
    test: Gain | None  # on the text that no verdict looks at; None if that was not scored
    shares: dict[int, Gain]  # kept change -> what the winner loses without it


def kept_changes(state: State) -> list[Experiment]:
    """The changes that the winner is made of."""
    return [e for e in state.experiments if e.status == "keep" and e is not state.baseline]


def next_trial(state: State) -> Trial | None:
    """What to run next; None when the winner is confirmed, or nothing was kept."""
    return next((trial for trial in _trials(state) if not _done(state, trial)), None)


def runs_left(state: State) -> int:
    """Number of runs until the winner is confirmed, without its shares."""
    return sum(trial.without is None and not _done(state, trial) for trial in _trials(state))


def attempts(state: State, trial: Trial) -> int:
    return len(_ends(state, trial))


def _trials(state: State) -> Iterator[Trial]:
    kept = kept_changes(state)
    if not kept:
        return
    seeds = range(FIRST_SEED, FIRST_SEED + PAIRS)
    yield from (Trial(e.id, None, seed) for seed in seeds for e in (state.baseline, state.incumbent))
    if len(kept) > 1:
        yield from (Trial(state.incumbent.id, e.id, seed) for seed in seeds[:SHARE_PAIRS] for e in kept)


def _ends(state: State, trial: Trial) -> list[str]:
    return [c.status for c in state.confirmations if c[:3] == trial]


def _done(state: State, trial: Trial) -> bool:
    ends = _ends(state, trial)
    return any(end != "invalid" for end in ends) or len(ends) >= INVALID_RUNS


def confirmed(state: State) -> Confirmed | None:
    """The result so far: None before the first pair of the present winner."""
    if not kept_changes(state):
        return None
    best, base = state.incumbent, state.baseline
    gain = _gain(state, (best, None), (base, None), lambda c: c.run)
    if gain is None:
        return None
    shares = {
        e.id: share
        for e in kept_changes(state)
        if (share := _gain(state, (best, None), (best, e), lambda c: c.run)) is not None
    }
    pairs = len(_seeds(state, best.id, None) & _seeds(state, base.id, None))
    return Confirmed(pairs, gain, _gain(state, (best, None), (base, None), lambda c: c.test), shares)


def _seeds(state: State, number: int, without: int | None) -> set[int]:
    return {c.seed for c in state.confirmations if c[:2] == (number, without) and c.run}


def _gain(
    state: State, new: tuple[Experiment, Experiment | None], old: tuple[Experiment, Experiment | None],
    run: Callable[[Confirmation], Run | None],
) -> Gain | None:  # fmt: skip
    """What the first source gains on the second, from shared seeds of the confirmation alone; the night's own runs say
    how large the noise is and what the seeds do."""
    best, codes = state.incumbent, []
    for number, (experiment, change) in enumerate((new, old), 1):
        name = (experiment.id, change and change.id)
        runs = [found for c in state.confirmations if c[:2] == name and (found := run(c))]
        work = experiment.work if change is None or change.same_work else -number
        codes.append(Code(-number, runs, work=work))
    if not codes[0].seeds & codes[1].seeds:
        return None
    mine, its, *others = paced([*codes, *(e.code for e in (best, *state.teachers()))], codes[0].work)
    fit = Fit([mine, its, *(code for code in others if code.runs)], mine)
    delta, error = fit.difference(mine, its)
    reach = student(NORMAL_95, fit.df) * error
    return Gain(-delta, -delta - reach, -delta + reach)


def without_values(source: str, edit: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """`source` with the constants of an edit as they were before it. None if it changed more than constants, or a later
    change replaced their values."""
    known = constants(source, settings)
    if edit.get("form") != "set" or any(
        known[name].value != exact(new) for name, new in edit["values"].items() if name in known
    ):
        return None
    for name, old in edit["was"].items():
        source = set_constant(source, name, exact(old))
    return source
