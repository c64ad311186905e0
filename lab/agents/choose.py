"""Choose the agent from the command line and the Ollama server that is found."""

from collections.abc import Callable

from lab.agents.briefing import Agent, NoProposal
from lab.agents.search import Search
from lab.errors import UserError
from lab.loop.ideas import load_all

Log = Callable[[str], None]


def choose_agent(kind: str, model: str, command: str, share: float, log: Log) -> Agent:
    """The agent that proposes. `auto` is hybrid when a model is named or an Ollama server has one, else search.

    Raises UserError, before anything is created, when the requested model cannot be used or a file of ideas is damaged.
    A server that is not running is waited for only at its turn."""
    if errors := load_all()[1]:
        raise UserError(f"{errors[0]}; fix or remove the file")
    if kind == "search":
        return Search()
    if kind == "command":
        from lab.agents.command import Command

        return Command(command, log=log)
    from lab.agents.hybrid import Hybrid
    from lab.agents.ollama import Ollama
    from lab.agents.ollama_client import PATIENCE, Server

    requested = kind != "auto" or bool(model)
    try:
        server = Server(patience=0.0, log=log)
        ollama = Ollama(model, server=server, log=log)
        ollama.choose()
    except UserError as reason:
        if requested:
            raise
        return _alone(reason, log)
    except NoProposal as reason:
        if not requested:
            return _alone(reason, log)
        log(f"{reason}; retrying when it is its turn")
    server.patience = PATIENCE if requested else 0.0
    return ollama if kind == "ollama" else Hybrid(Search(), ollama, share, log=log)


def _alone(reason: Exception, log: Log) -> Agent:
    log(f"no local model ({reason}); using the built-in search alone")
    return Search()
