"""Ideas as experiments: any of them by name, alone or together, and the share that `search` draws."""

import random
from collections.abc import Sequence

from lab.agents.briefing import Briefing
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
    """An untried idea in `share` of all experiments, else None: a function of the briefing and the seed alone."""
    chance = random.Random(f"idea {seed} {briefing.number} {briefing.attempt}")
    if chance.random() >= share:
        return None
    names = briefing.ideas_left()
    for name in chance.sample(names, len(names)):
        try:
            return proposal(briefing, [name], agent)
        except Rejected:  # it does not fit the incumbent, or was refused before
            continue
    return None
