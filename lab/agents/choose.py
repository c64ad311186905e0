"""Which agent proposes, from what the command line says and what answers on this machine."""

from collections.abc import Callable

from lab.agents import Agent, NoProposal
from lab.agents.search import Search
from lab.errors import UserError

Say = Callable[[str], None]


def choose_agent(kind: str, model: str, command: str, share: float, say: Say) -> Agent:
    """The agent that proposes. `auto` is the hybrid when a model is named or an Ollama server with one answers, else
    search. Raises UserError when the model that was asked for cannot be used: before anything is made. A server that
    is away is only waited for when it is its turn."""
    if kind == "search":
        return Search()
    if kind == "command":
        from lab.agents.command import Command

        return Command(command, say=say)
    from lab.agents.hybrid import Hybrid
    from lab.agents.ollama import Ollama
    from lab.agents.ollama_client import PATIENCE, Server

    asked_for = kind != "auto" or bool(model)
    try:
        server = Server(patience=0.0, say=say)
        ollama = Ollama(model, server=server, say=say)
        ollama.choose()
    except UserError as reason:
        if asked_for:
            raise
        return _alone(reason, say)
    except NoProposal as reason:
        if not asked_for:
            return _alone(reason, say)
        say(f"{reason}; it is asked again at its turn")
    server.patience = PATIENCE if asked_for else 0.0
    return ollama if kind == "ollama" else Hybrid(Search(), ollama, share, say=say)


def _alone(reason: Exception, say: Say) -> Agent:
    say(f"no local model ({reason}); the built-in search proposes alone")
    return Search()
