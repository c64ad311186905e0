"""Servers that are not what they seem: models that run elsewhere, other programs, variables of the network."""

import pytest
from experiment import briefing
from ollama_server import CODER, OllamaServer
from test_ollama import agent_for, sized

from lab import doctor
from lab.agents import NoProposal
from lab.errors import UserError

# As /api/tags and /api/show of Ollama tell them (ConfigV2: remote_host, remote_model).
CLOUD = {"remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com:443"}
LOCAL, LARGE = {"tiny:1b": sized(1)}, CODER | {"parameters": 120_000_000_000, "size": 382}
LARGE_FILE = LARGE | {"size": 10_000_000_000}


@pytest.fixture
def serve():
    servers = []

    def start(**kwargs) -> OllamaServer:
        servers.append(OllamaServer(**kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


ELSEWHERE = {
    "cloud, as Ollama lists it": ("gpt-oss:120b-cloud", LARGE | {"listed": CLOUD, "shown": CLOUD}),
    "said by /api/tags alone": ("mine:latest", LARGE_FILE | {"listed": CLOUD}),
    "said by /api/show alone": ("mine:latest", LARGE_FILE | {"shown": CLOUD}),
    "a remote model without a host": ("mine:latest", LARGE_FILE | {"listed": {"remote_model": "gpt-oss:120b"}}),
    "a remote host of one's own": ("mine:latest", LARGE_FILE | {"listed": {"remote_host": "http://10.0.0.5:11434"}}),
    "by its tag": ("glm-4.6:cloud", LARGE_FILE),
    "by the end of its tag": ("deepseek-v3.1:671b-cloud", LARGE_FILE),
    "by the end of its name": ("kimi-k2-cloud:latest", LARGE_FILE),
    "in capitals": ("kimi-k2:1T-Cloud", LARGE_FILE),
    "weights of 382 bytes": ("mine:latest", LARGE),
    "weights without a size": ("mine:latest", LARGE | {"listed": {"size": None}}),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_model_that_runs_elsewhere_is_asked_only_by_name_and_that_is_said(serve, kind):
    name, model = ELSEWHERE[kind]
    host = "10.0.0.5" if "own" in kind else "ollama.com"
    server, said = serve(models={name: model} | LOCAL), []
    assert agent_for(server, said).choose().name == "tiny:1b"
    assert not any("leave this machine" in line for line in said)
    with pytest.raises(UserError, match=rf"no model of its own \({name} runs at {host}; .*run: ollama pull"):
        agent_for(serve(models={name: model})).choose()
    assert agent_for(server, said, model=name).choose().remote == host
    assert f"train.py and the briefing leave this machine for {host}, where {name} runs" in said


def test_a_model_that_moves_elsewhere_in_the_night_is_not_asked_again(serve):
    server, said = serve(models={"mine:latest": CODER}), []
    for agent in (agent_for(server, said), agent_for(server, said, model="mine")):
        agent.propose(briefing(1))
        asked = len(server.chats())
        server.models["mine:latest"] = CODER | {"shown": CLOUD}
        for number in (2, 3):
            with pytest.raises(NoProposal, match=r"mine:latest now runs at ollama.com: train.py does not leave"):
                agent.propose(briefing(number))
        assert len(server.chats()) == asked
        server.models["mine:latest"] = CODER


def test_a_server_elsewhere_is_used_and_said(serve, monkeypatch):
    server, said = serve(), []
    agent = agent_for(server, said)
    agent.server.local = False
    agent.choose()
    assert f"train.py and the briefing leave this machine for {server.url}" in said


def test_doctor_says_where_models_run(serve, monkeypatch):
    server = serve(models={"gpt-oss:120b-cloud": LARGE | {"listed": CLOUD}})
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    first, second = doctor._ollama()
    assert (first.level, first.mend) == ("warning", "ollama pull qwen2.5-coder:1.5b")
    assert second.told == (
        "gpt-oss:120b-cloud runs at ollama.com: asked only if you name it, and then train.py leaves this machine"
    )
    server.models["tiny:1b"] = sized(1)
    assert [finding.level for finding in doctor._ollama()] == ["ok", "ok"]
