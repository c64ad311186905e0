"""What earlier nights suggest: the constants of whole nights first, then single changes that were clear gains; and
ideas that were.

A suggestion is an experiment like any other, judged by tonight's runs. After MISSES of them were not kept, none is made
for the rest of the night: so a wrong memory costs a few runs, not a night.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lab.agents.evidence import Tried, hashable
from lab.loop.ledger import Effect

MISSES = 3


def suggestions(
    memory: Sequence[tuple[Effect, float]], history: Sequence[Tried]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(night, values of constants) that earlier nights found good, the most promising first. `memory`: effects in the
    order of each night, and how much each counts."""
    if spent(history):
        return
    kept = {tried.edit["memory"] for tried in _taken(history) if tried.verdict == "keep" and "values" in tried.edit}
    found: list[tuple[float, str, Mapping[str, Any]]] = []
    for night, lines in groupby(memory, key=lambda line: line[0].night):
        if night not in kept:
            known = [(effect, trust) for effect, trust in lines if effect.values]
            good = [(effect, trust) for effect, trust in known if effect.verdict == "keep"]
            whole = {name: value for effect, _ in good for name, value in effect.values.items()}
            found.append((sum(effect.effect * trust for effect, trust in good), night, whole))
            found += [(effect.effect * trust, night, effect.values) for effect, trust in known if effect.high < 0]
    for gain, night, values in sorted(found, key=lambda one: one[0]):
        if gain < 0:
            yield night, hashable(values)


def clear_ideas(memory: Sequence[tuple[Effect, float]]) -> dict[str, float]:
    """Change of val_bpb by each idea alone where earlier nights were sure of its sign, times how much it counts."""
    found: dict[str, float] = {}
    for effect, trust in memory:
        if len(effect.ideas) == 1 and (effect.high < 0 or effect.low > 0):
            found[effect.ideas[0]] = found.get(effect.ideas[0], 0.0) + trust * effect.effect
    return found


def spent(history: Sequence[Tried]) -> bool:
    """Whether MISSES suggestions were not kept."""
    return sum(tried.verdict != "keep" for tried in _taken(history)) >= MISSES


def _taken(history: Sequence[Tried]) -> list[Tried]:
    return [tried for tried in history if "memory" in (tried.edit or {})]
