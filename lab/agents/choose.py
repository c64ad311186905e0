"""Choose the agent from the command line and the servers of models that are found."""

from collections.abc import Callable
from typing import Any

from lab.agents.briefing import Agent, NoProposal
from lab.agents.search import Search
from lab.errors import UserError
from lab.loop.ideas import load_all

Log = Callable[[str], None]


def choose_agent(kind: str, model: str, command: str, share: float, log: Log, base_url: str = "") -> Agent:
    """The agent that proposes. `auto` is hybrid when a model or server is named or found, else search.

    A named server (`base_url`) speaks OpenAI's protocol. Without one, hybrid and auto use Ollama, and where it is
    absent a server on one of the usual ports. Raises UserError, before anything is created, when the requested model
    cannot be used or a file of ideas is damaged. A server that is not running is waited for only at its turn."""
    if base_url and kind not in ("auto", "hybrid", "openai"):
        raise UserError(f"--base-url names a server with OpenAI's protocol; use it with --agent openai, not {kind}")
    if errors := load_all()[1]:
        raise UserError(f"{errors[0]}; fix or remove the file")
    if kind == "search":
        return Search()
    if kind == "command":
        from lab.agents.command import Command

        return Command(command, log=log)
    from lab.agents.hybrid import Hybrid
    from lab.agents.model import LocalModel
    from lab.agents.server import PATIENCE

    requested = kind != "auto" or bool(model or base_url)
    try:
        agent = LocalModel(_server(kind, base_url, log), model, log=log)
        agent.choose()
    except UserError as reason:
        if requested:
            raise
        return _alone(reason, log)
    except NoProposal as reason:
        if not requested:
            return _alone(reason, log)
        log(f"{reason}; retrying when it is its turn")
    agent.server.patience = PATIENCE if requested else 0.0
    return agent if kind == agent.name else Hybrid(Search(), agent, share, log=log)


def _server(kind: str, base_url: str, log: Log) -> Any:
    """The server to ask. Raises UserError where there is none, or none can be contacted."""
    from lab.agents.openai_client import USUAL_PORTS, OpenAIServer, found

    if base_url:
        return OpenAIServer(base_url, patience=0.0, log=log)
    if kind == "openai":
        if server := next(found(log), None):
            return server
        ports = ", ".join(map(str, USUAL_PORTS))
        raise UserError(f"no server with OpenAI's protocol answers on the ports {ports}; start one, or name --base-url")
    from lab.agents.ollama_client import Server

    server = Server(patience=0.0, log=log)
    if kind != "ollama" and (reason := server.absent()) and (other := next(found(log), None)):
        log(f"{reason}; using the server at {other.host}")
        return other
    return server


def _alone(reason: Exception, log: Log) -> Agent:
    log(f"no local model ({reason}); using the built-in search alone")
    return Search()
