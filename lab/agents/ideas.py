"""Ideas as experiments: any of them by name, alone or together, and the share that `search` draws."""

import dataclasses
import random
from collections.abc import Sequence

from lab.agents.briefing import Briefing
from lab.agents.memory import clear_ideas, spent
from lab.loop.ideas import apply
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import Rejected

SHARE = 0.2  # of search's proposals, while there are untried ideas


def proposal(briefing: Briefing, names: Sequence[str], agent: str) -> Proposal:
    """The incumbent with these ideas. Raises Rejected, with the idea's name, when they do not fit."""
    source = apply(briefing.source, names, briefing.ideas)
    check(source, briefing.source, briefing.tried, briefing.settings)
    edit = describe(source, briefing.source, briefing.settings, briefing.ideas)
    claims = "; ".join(briefing.ideas[name].claim for name in names)
    return Proposal(source, f"{in_words(edit)}: {claims}", agent, edit)


def draw(briefing: Briefing, seed: int, share: float = SHARE, agent: str = "search") -> Proposal | None:
    """An untried idea, else None: at once what gained in earlier nights, then one in `share` of all experiments, what
    lost there last. A function of the briefing and the seed alone."""
    chance = random.Random(f"idea {seed} {briefing.number} {briefing.attempt}")
    left, effects = briefing.ideas_left(), clear_ideas(briefing.memory)
    gained = [] if spent(briefing.history) else sorted((n for n in left if effects.get(n, 0.0) < 0), key=effects.get)
    others = chance.sample(left, len(left)) if chance.random() < share else []
    for name in [*gained, *sorted(others, key=lambda name: effects.get(name, 0.0) > 0)]:
        try:
            found = proposal(briefing, [name], agent)
        except Rejected:  # it does not fit the incumbent, or was refused before
            continue
        night = next((one.night for one, _ in briefing.memory if one.ideas == (name,) and one.high < 0), "")
        return dataclasses.replace(found, edit=found.edit | {"memory": night}) if name in gained else found
    return None
