"""The agent that needs no model: changes of a few constants around the incumbent, ranked by a Gaussian process.

Candidates are random steps of up to six constants on their natural scales (lab.loop.space), those that usually matter
most more often and, at first, alone. Their reach grows after a change that was kept and shrinks after one that was not,
as in a (1+1) evolution strategy. What is known to fail is left out. From STARTUP results on, a Gaussian process over
all results of the night (lab.agents.gaussian) picks the candidate with the largest expected gain, so several effects
that no verdict could confirm alone add up to one proposal. Before that come changes that earlier nights kept
(lab.agents.memory), and near misses together (lab.agents.bundle).

benchmarks/drivers.py compares it with samplers over the whole box: TPE and CMA-ES are worse for the first hundred
experiments, since they learn where values are good in general before they look around the incumbent. The same
candidates without the process are worse too.

Every proposal is a pure function of (briefing, seed): a resumed night continues exactly like an uninterrupted one.
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lab.agents import bundle, ideas
from lab.agents.briefing import Briefing, NoProposal, Tried
from lab.agents.evidence import Result, failures, known
from lab.agents.gaussian import Gaussian, expected_gain
from lab.agents.memory import suggestions
from lab.loop import space
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import Rejected, digest, set_constant, skeleton

STARTUP = 4  # results, the incumbent's among them, before the process picks
ALONE = 8  # first experiments that change one of the constants that matter most alone
CANDIDATES = 100
CHANGES = (1, 2, 2, 3, 4, 6)  # constants that a candidate changes
WIDER, NARROWER = 1.3, 0.93  # factors of the reach after a kept and after another experiment
REACH = (0.25, 2.5)  # its bounds, in steps
NEAREST = 100  # results that the process learns from
SMALLEST = 3e-4  # bits per byte: losses are compressed from here on, or from the size that is usual

Values = Mapping[str, Any]


class Search:
    """Proposes changes of one to six constants of the incumbent; never a repetition."""

    name = "search"

    def __init__(self, seed: int = 0, startup: int = STARTUP) -> None:
        self.seed, self.startup = seed, startup

    def propose(self, briefing: Briefing) -> Proposal:
        """Raises NoProposal when nothing is left to change."""
        if idea := ideas.draw(briefing, self.seed):
            return idea
        (blank, current), found = skeleton(briefing.source, briefing.settings), briefing.results()
        failed = failures(found)
        for values, addition in self._wanted(briefing, current, found):
            fails = space.broken(values, briefing.settings) or any(one.excludes(values) for one in failed)
            if not fails and values != current and digest(blank, values) not in briefing.tried:
                return self._proposal(briefing, values, addition)
        raise NoProposal("search has tried every neighbour of the incumbent's constants")

    def _wanted(
        self, briefing: Briefing, current: Values, found: Sequence[Result]
    ) -> Iterator[tuple[Values, dict[str, Any]]]:
        """Blocks, possible or not, the best first, each with what to add to the edit: what earlier nights found, then
        designs, then single candidates."""
        own = [tried for tried in briefing.history if tried.edit and not tried.edit.keys() & {"memory", "screen"}]
        remembered = sum("memory" in (tried.edit or {}) for tried in briefing.history)
        # A night with a useless memory goes on as it would have begun without.
        draw = random.Random(f"{self.seed} {briefing.number - remembered} {briefing.attempt}")
        reach, noise = _reach(own), briefing.noise or 0.0
        for night, values in suggestions(briefing.memory, briefing.history):
            yield current | known(values, current), {"memory": night}
        if design := bundle.latest(briefing.history):
            yield from ((current | change, addition) for change, addition in design.steps())
        if len(misses := bundle.near_misses(briefing.history)) >= bundle.NEAR_MISSES:
            singles = _candidates(current, briefing.settings, reach / 2, draw, (1,))
            fill = (_changes(values, current) for values in _ranked(singles, found, current, noise))
            changes = _apart([*misses, *filter(_small, fill)])
            if len(changes) >= bundle.FEWEST:
                yield from ((current | change, addition) for change, addition in bundle.Design(changes).steps())
        alone = len(own) < ALONE
        pool = _candidates(current, briefing.settings, reach, draw, (1,) if alone else CHANGES, levers=alone)
        if pool and len(found) > self.startup:
            pool = _ranked(pool, found, current, noise)
        yield from ((values, {}) for values in pool)

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """Nothing to remember: the next briefing's history holds the outcome."""

    def _proposal(self, briefing: Briefing, values: Values, addition: dict[str, Any]) -> Proposal:
        source = briefing.source
        for name, constant in briefing.constants().items():
            source = source if values[name] == constant.value else set_constant(source, name, values[name])
        try:
            check(source, briefing.source, briefing.tried, briefing.settings)
        except Rejected as reason:
            raise NoProposal(f"the search's proposal was refused: {reason}") from None
        edit = describe(source, briefing.source, briefing.settings) | addition
        how = f"from night {addition['memory']}" if "memory" in addition else "screened" if addition else "sampled"
        return Proposal(source, f"{how}: {in_words(edit)}", self.name, edit)


def _candidates(
    current: Values, settings: Values, reach: float, draw: random.Random, counts: Sequence[int], levers: bool = False
) -> list[Values]:
    """Blocks with a few constants changed, possible or not; with `levers`, only the constants that matter most."""
    weights = {name: space.weight(name) for name, value in current.items() if space.coordinates(name, value)}
    heaviest = {name: weight for name, weight in weights.items() if weight > 1}
    weights = heaviest if levers and heaviest else weights
    pool = []
    for _ in range(CANDIDATES if weights else 0):
        count, values = draw.choice(counts), dict(current)
        for name in sorted(weights, key=lambda name: draw.random() ** (1 / weights[name]))[-count:]:
            values[name] = space.step(name, values, settings, reach, draw)
        pool.append(values)
    return pool


def _changes(values: Values, current: Values) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != current[name]}


def _small(change: Values) -> bool:
    """Whether it changes no size: sizes have large effects, and constraints on each other."""
    return all(isinstance(value, float | tuple) for value in change.values())


def _apart(changes: Iterable[Values]) -> list[Values]:
    """The first of these changes that have no constant in common, as many as a design takes."""
    chosen: list[Values] = []
    for change in changes:
        if len(chosen) < bundle.ROWS and not change.keys() & bundle.merged(chosen).keys():
            chosen.append(change)
    return chosen


def _reach(history: Sequence[Tried]) -> float:
    """Of a step: it adapts to what succeeds, so that about one change in five does."""
    reach = 1.0
    for tried in history:
        if tried.verdict != "invalid":
            reach *= WIDER if tried.verdict == "keep" else NARROWER
            reach = min(max(reach, REACH[0]), REACH[1])
    return reach


def _ranked(pool: Sequence[Values], found: Sequence[Result], current: Values, noise: float) -> list[Values]:
    """The blocks from which a Gaussian process expects most first. Only what exceeds the noise of a pair counts as a
    gain: the verdict does not see less."""
    here = _place(current)
    points = [(place, result) for result in found if len(place := _place(result.values)) == len(here)]
    points = sorted(points, key=lambda one: ((one[0] - here) ** 2).sum())[:NEAREST]
    values = _compressed([result.delta for _, result in points])
    variance = [(result.error or noise) ** 2 if result.was else 0.0 for _, result in points]
    process = Gaussian(np.array([place for place, _ in points]), values, np.array(variance))
    best = process.predict(here[None])[0][0]
    gains = expected_gain(*process.predict(np.array([_place(values) for values in pool])), best - noise)
    return [pool[i] for i in np.argsort(-gains)]


def _place(values: Values) -> np.ndarray:
    return np.array([x for name, value in values.items() for x in space.coordinates(name, value)])


def _compressed(deltas: Sequence[float | None]) -> np.ndarray:
    """The results, with large losses on a logarithmic scale and failures as the largest: how bad does not matter."""
    sizes = sorted(abs(delta) for delta in deltas if delta is not None)
    usual = max(SMALLEST, sizes[len(sizes) * 3 // 10])
    values = [delta if delta is None or delta < usual else usual * (1 + math.log(delta / usual)) for delta in deltas]
    worst = max(value for value in values if value is not None)
    return np.array([worst if value is None else value for value in values])
