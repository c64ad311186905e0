"""The next experiment of a night: a person's suggestions first, then the agent's, until one passes its checks.

`night` is an agent_loop.Night. What passes is committed to its branch and recorded in its journal.
"""

import hashlib
from typing import Any

from lab.agents.briefing import Briefing, NoProposal, brief
from lab.agents.compared import compared
from lab.agents.search import Search
from lab.agents.suggested import NAME, proposed
from lab.errors import UserError
from lab.loop.proposal import Proposal, check
from lab.loop.source import Rejected, fingerprint, nodes

REDRAWS = 2  # retries after a proposal failed its checks, before search proposes instead


def propose(night: Any) -> bool:
    """Get a proposal that passes its checks and commit it. False when no agent has one."""
    state = night.journal.state
    base = night.branch.source(state.head())
    if not state.incumbent:
        return _commit(night, Proposal(base, "baseline", "none"))
    return _suggested(night, base) or _drawn(night, base)


def _suggested(night: Any, base: str) -> bool:
    """Commit the first suggestion that passes its checks, and refuse those before it. False without one."""
    taken, committed = night.journal.state.suggestions, False
    while night.suggestions:
        night.suggestions.settle(taken)
        if committed or not (waiting := night.suggestions.waiting(taken)):
            break
        suggestion = waiting[0]
        proposal = Proposal("", f"suggested: {suggestion.text}", NAME)
        try:
            proposal = proposed(suggestion, _briefing(night, base), night.agent)
            _admit(night, proposal, base)
        except (NoProposal, Rejected) as reason:
            night.log(f"suggestion refused: {suggestion.text}: {reason}")
            _refuse(night, proposal, str(reason), suggestion=suggestion.name)
        else:
            committed = _commit(night, proposal, suggestion=suggestion.name)
    return committed


def _drawn(night: Any, base: str) -> bool:
    """Commit the first proposal of the agent that passes its checks. False when no agent has one."""
    refused, refused_source = "", ""
    for attempt in range(2 * (1 + REDRAWS)):
        night.idea, proposal = "", None
        agent = night.agent if attempt <= REDRAWS else Search()
        try:
            proposal = agent.propose(_briefing(night, base, attempt, refused, refused_source))
            _admit(night, proposal, base)
        except NoProposal as reason:
            night.log(f"no proposal: {reason}")
        except Rejected as reason:
            night.log(f"refused: {reason}")
            refused, refused_source = str(reason), proposal.source if proposal else ""
            if proposal:
                _refuse(night, proposal, str(reason))
        else:
            return _commit(night, proposal)
    return False


def _briefing(night: Any, base: str, *tries: Any) -> Briefing:
    state = night.journal.state
    measured = compared(night.folder, state)
    return brief(state, night.runner.settings, base, *tries, measured=measured, memory=night.memory)


def _admit(night: Any, proposal: Proposal, base: str) -> None:
    """Raise Rejected unless the proposal passes its checks and its preflight."""
    state = night.journal.state
    check(proposal.source, base, state.tried.keys(), night.settings)
    night.idea = f"{proposal.title} ({proposal.agent})"
    night.log(f"experiment {len(state.experiments)}: {night.idea}; preflight")
    if reason := night.runner.preflight(proposal.source):
        raise Rejected(f"preflight: {reason}")


def _refuse(night: Any, proposal: Proposal, reason: str, **more: str) -> None:
    try:
        mark = fingerprint(proposal.source, night.settings) if proposal.source else ""
    except Rejected:
        mark = ""
    night.journal.record("refused", fingerprint=mark, reason=reason, **proposal.record, **more)


def _commit(night: Any, proposal: Proposal, **more: str) -> bool:
    """Commit first, then write the journal. After a kill between the two, the next step moves the branch back."""
    state = night.journal.state
    number, commit, source = len(state.experiments), state.head(), proposal.source
    if state.incumbent:
        commit = night.branch.commit(source, f"experiment {number}: {proposal.title}")
    elif reason := night.runner.preflight(source):
        raise UserError(f"the baseline fails its preflight: {reason}")
    marks = {"fingerprint": fingerprint(source, night.settings), "nodes": nodes(source, night.settings)}
    marks["source"] = hashlib.sha256(source.encode()).hexdigest()
    night.journal.record("proposal", id=number, commit=commit, **proposal.record, **marks, **more)
    return True
