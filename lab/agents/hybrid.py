"""The default agent: a sampler makes most proposals, a language model makes its share and every structural one.

The turn depends only on the experiment's number, so a resumed night takes the same turns. When the model has no
proposal, the log says so and the sampler takes the turn. When the sampler has tried every neighbour, it asks the model.
(arXiv 2603.24647: CMA-ES with 30 % of its proposals by a 0.8B model was the best of all mixtures on this task.)
"""

from collections.abc import Callable

from lab.agents.briefing import Agent, Briefing, NoProposal, Tried
from lab.errors import UserError
from lab.loop.proposal import Proposal

SHARE = 0.3  # of the proposals by the model


class Hybrid:
    """Two agents under one name; `share` in 0..1 of the experiments go to `model`, all of them on a plateau."""

    name = "hybrid"

    def __init__(
        self,
        search: Agent,
        model: Agent,
        share: float = SHARE,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"the model's share of the proposals must be from 0 to 1, not {share}")
        self.search, self.model, self.share, self.log = search, model, share, log

    def propose(self, briefing: Briefing) -> Proposal:
        """Raises NoProposal when neither agent has one."""
        agents = [self.model, self.search] if self.is_models_turn(briefing) else [self.search, self.model]
        if self.share == 0:
            agents = [self.search]
        reasons = []
        for agent in agents:
            try:
                return agent.propose(briefing)
            except (NoProposal, UserError) as reason:  # a missing model does not end the night
                reasons.append(f"{agent.name}: {reason}")
                self.log(f"no proposal from {agent.name}: {reason}")
        raise NoProposal("; ".join(reasons))

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """Report every outcome to both agents, whichever proposed it."""
        self.search.tell(proposal, outcome)
        self.model.tell(proposal, outcome)

    def is_models_turn(self, briefing: Briefing) -> bool:
        """Turns spread evenly: experiment n is the model's when n x share passes a whole number."""
        if briefing.plateau and self.share > 0:
            return True
        turns = [int(number * self.share + 1e-9) for number in (briefing.number - 1, briefing.number)]
        return turns[1] > turns[0]
