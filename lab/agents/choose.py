"""Which agent proposes, from what the command line says and what answers on this machine."""

from collections.abc import Callable

from lab.agents.briefing import Agent, NoProposal
from lab.agents.search import Search
from lab.errors import UserError

Log = Callable[[str], None]


def choose_agent(kind: str, model: str, command: str, share: float, log: Log) -> Agent:
    """The agent that proposes. `auto` is the hybrid when a model is named or an Ollama server with one answers, else
    search. Raises UserError when the model that was asked for cannot be used: before anything is made. A server that
    is away is only waited for when it is its turn."""
    if kind == "search":
        return Search()
    if kind == "command":
        from lab.agents.command import Command

        return Command(command, log=log)
    from lab.agents.hybrid import Hybrid
    from lab.agents.ollama import Ollama
    from lab.agents.ollama_client import PATIENCE, Server

    asked_for = kind != "auto" or bool(model)
    try:
        server = Server(patience=0.0, log=log)
        ollama = Ollama(model, server=server, log=log)
        ollama.choose()
    except UserError as reason:
        if asked_for:
            raise
        return _alone(reason, log)
    except NoProposal as reason:
        if not asked_for:
            return _alone(reason, log)
        log(f"{reason}; it is asked again at its turn")
    server.patience = PATIENCE if asked_for else 0.0
    return ollama if kind == "ollama" else Hybrid(Search(), ollama, share, log=log)


def _alone(reason: Exception, log: Log) -> Agent:
    log(f"no local model ({reason}); the built-in search proposes alone")
    return Search()
