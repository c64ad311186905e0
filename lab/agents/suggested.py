"""A person's suggestion as a proposal.

Constants, an idea, a patch and a whole train.py are applied to the incumbent; words go to the model or command of the
night as a part of its briefing. Whatever comes out is checked, trained and judged like any other proposal.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from lab.agents.briefing import Agent, Briefing, NoProposal, brief
from lab.agents.hybrid import Hybrid
from lab.agents.search import Search
from lab.errors import UserError, one_line
from lab.files import ROOT
from lab.loop import git, ideas
from lab.loop.branch import Branch
from lab.loop.history import State
from lab.loop.proposal import Proposal, check, describe
from lab.loop.session import night_settings
from lab.loop.source import Rejected, constants, set_constant
from lab.loop.space import coerce
from lab.loop.suggestions import HUNK, Suggestion, assignments

NAME = "suggestion"  # as the agent of a proposal, unless words were suggested


def proposed(suggestion: Suggestion, briefing: Briefing, agent: Agent) -> Proposal:
    """What a suggestion means for this incumbent. Raises Rejected or NoProposal where that is nothing."""
    if suggestion.form == "words":
        given = _reader(agent).propose(replace(briefing, wish=suggestion.text))
        return replace(given, hypothesis=f"suggested: {suggestion.text}; {given.hypothesis}")
    if suggestion.form not in APPLIED:
        raise Rejected("its file is damaged; suggest it again")
    source = APPLIED[suggestion.form](suggestion, briefing)
    why = "suggested" if suggestion.form in ("constants", "idea") else f"suggested: {suggestion.text}"
    return Proposal(source, why, NAME, describe(source, briefing.source, briefing.settings, briefing.ideas))


def refuse_unfit(suggestion: Suggestion, state: State, folder: Path) -> None:
    """Raise UserError, while the person still looks, for a suggestion that the incumbent of now cannot take."""
    settings = night_settings(folder, None, None)
    base = Branch(ROOT, folder / "worktree", f"autoresearch/{folder.name}").source(state.incumbent.commit)
    briefing = brief(state, settings, base)
    try:
        check(proposed(suggestion, briefing, Search()).source, base, state.tried.keys(), briefing.settings)
    except Rejected as reason:
        raise UserError(f"{suggestion.text}: {reason}") from None


def _reader(agent: Agent) -> Agent:
    """The agent of this night that reads words."""
    agent = agent.model if isinstance(agent, Hybrid) else agent
    if isinstance(agent, Search):
        raise NoProposal("no model reads words in this night; suggest constants, a patch or a train.py")
    return agent


def _constants(suggestion: Suggestion, briefing: Briefing) -> str:
    block, source = briefing.constants(), briefing.source
    for name, written in assignments(suggestion.text).items():
        if name not in block:
            close = get_close_matches(name, block)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(block)}"
            raise Rejected(f"train.py has no constant {name}; {remedy}")
        source = set_constant(source, name, coerce(block[name], _value(written)))
    return source


def _value(written: str) -> object:
    """A value as train.py would have it, 2**14 included; any other text stands for itself: WINDOW=SL."""
    try:
        return constants(f"X = {written}", {})["X"].value
    except (Rejected, KeyError):
        return written.strip("\"'")


def _patch(suggestion: Suggestion, briefing: Briefing) -> str:
    """A unified diff of one file, whatever it calls this file."""
    lines = suggestion.content.splitlines(keepends=True)
    if sum(line.startswith("+++ ") for line in lines) > 1:
        raise Rejected("the patch changes several files; only train.py may change")
    first = next(number for number, line in enumerate(lines) if HUNK.match(line))
    hunks = "".join(lines[first:])
    with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
        path = Path(folder) / "train.py"
        path.write_text(briefing.source, encoding="utf-8", newline="\n")
        patch = f"--- a/train.py\n+++ b/train.py\n{hunks}" + "\n" * (not hunks.endswith("\n"))
        try:
            git.run(Path(folder), "apply", "--whitespace=nowarn", "-", data=patch.encode())
        except UserError as error:
            reason = one_line(str(error).rpartition("error: ")[2], 120)
            raise Rejected(f"the patch does not fit the incumbent's train.py ({reason})") from None
        return path.read_text(encoding="utf-8")


def _file(suggestion: Suggestion, briefing: Briefing) -> str:
    return suggestion.content


def _idea(suggestion: Suggestion, briefing: Briefing) -> str:
    return ideas.apply(briefing.source, [suggestion.text], briefing.ideas)


APPLIED: dict[str, Callable[[Suggestion, Briefing], str]] = {
    "constants": _constants,
    "patch": _patch,
    "file": _file,
    "idea": _idea,
}
