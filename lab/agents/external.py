"""The agent of `agent_loop.py try`: an edit made by a person or by another agent."""

from pathlib import Path
from typing import Any

from lab.agents.briefing import Briefing, Tried
from lab.errors import UserError
from lab.loop.proposal import Proposal, describe


class External:
    """One proposal; when a check refuses it, the edit stays in the worktree so that you can fix it."""

    name = "external"

    def __init__(self, source: str, message: str, settings: dict[str, Any], path: Path):
        self.source, self.message, self.settings, self.path = source, message, settings, path

    def propose(self, briefing: Briefing) -> Proposal:
        if briefing.attempt:
            raise UserError(f"refused: {briefing.refused}; fix {self.path} and try again")
        edit = describe(self.source, briefing.source, self.settings, briefing.ideas)
        return Proposal(self.source, self.message, self.name, edit)

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        pass
