"""The ollama agent against a loopback server that speaks the protocol and misbehaves on demand."""

import dataclasses
import json
import random
import threading
import time

import pytest
from experiment import SOURCE, briefing, long_history, night
from ollama_server import CODER, OllamaServer

from lab.agents.briefing import NoProposal, Tried
from lab.agents.hybrid import Hybrid
from lab.agents.model import RESTING, LocalModel, _rested
from lab.agents.ollama_client import Server, full_name
from lab.agents.search import Search
from lab.agents.server import billions
from lab.errors import UserError


@pytest.fixture
def serve():
    servers = []

    def start(**kwargs) -> OllamaServer:
        servers.append(OllamaServer(**kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def agent_for(server: OllamaServer, said: list[str] | None = None, patience: float = 2.0, **kwargs) -> LocalModel:
    log = (said if said is not None else []).append
    client = Server(server.url, patience=patience, answer_seconds=1.0, first_pause=0.05, log=log)
    return LocalModel(client, log=log, **kwargs)


def sized(parameters: float, **more) -> dict:
    return CODER | {"parameters": int(parameters * 1e9), "size": int(parameters * 0.7e9)} | more


def test_a_night_with_a_small_model(serve):
    server = serve()
    proposals = night(agent_for(server), 6, lambda values: (0.001, "discard"))
    assert {proposal.edit["form"] for proposal in proposals} == {"set"}
    assert proposals[0].hypothesis == "the rate is too low"
    chats = server.chats()
    assert len({chat["options"]["num_ctx"] for chat in chats}) == 1  # a change would reload the model
    assert len({chat["options"]["seed"] for chat in chats}) == 6
    assert all(chat["stream"] and 0 < chat["options"]["num_predict"] <= 200 for chat in chats)
    assert "think" not in chats[0]
    change = json.loads(server.answer(chats[0]))["change"]
    assert all(change not in chat["format"]["properties"]["change"]["enum"] for chat in chats[1:])
    assert server.loaded == {}


def test_constants_of_the_last_failures_rest_and_those_that_were_kept_do_not(serve):
    def changed(verdict: str) -> list[str]:
        proposals = night(agent_for(serve()), 8, lambda values: (0.001, verdict))
        return [name for proposal in proposals for name in proposal.edit["values"]]

    failing = changed("discard")
    assert all(len(set(failing[at : at + RESTING + 1])) == RESTING + 1 for at in range(len(failing) - RESTING))
    assert len(set(changed("keep"))) < 8  # what helps may be followed up at once


def test_refusals_do_not_end_the_rest():
    tried = [Tried(1, "a", "discard", 0.1, {"form": "set", "values": {"DEPTH": 3}, "was": {"DEPTH": 4}})]
    tried += [Tried(2, f"refused {i}", "rejected") for i in range(5)]
    assert "DEPTH" in briefing(7).menu()
    assert "DEPTH" not in _rested(dataclasses.replace(briefing(7), history=tried))


def test_the_model_is_gone_from_memory_before_propose_returns(serve):
    server = serve()
    server.unload_lag = 0.4
    start = time.monotonic()
    agent_for(server).propose(briefing())
    assert time.monotonic() - start > 0.4
    assert server.loaded == {}
    assert ("/api/ps", {}) in server.requests[-3:]


def test_unloading_is_tried_again(serve):
    server, said = serve(), []
    server.unload_faults = ["500", "500"]
    agent_for(server, said).propose(briefing())
    assert server.loaded == {}
    assert sum("could not unload" in line for line in said) == 2


def test_a_server_that_dies_before_unloading_holds_nothing(serve):
    server = serve()
    agent = agent_for(server)
    agent.propose(briefing())
    server.stop()
    assert agent.server.unload("qwen2.5-coder:1.5b")


def test_an_unload_that_hangs_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("lab.agents.ollama_client.UNLOAD_SECONDS", 0.3)
    monkeypatch.setattr("lab.agents.ollama_client.CONTROL_SECONDS", 0.3)
    server, said = serve(), []
    server.unload_faults = ["hang"] * 9
    agent_for(server, said).propose(briefing())
    assert any("still loaded" in line for line in said)


def test_a_model_that_stays_loaded_is_said_loudly(serve, monkeypatch):
    monkeypatch.setattr("lab.agents.ollama_client.UNLOAD_SECONDS", 0.3)
    server, said = serve(), []
    server.unload_lag = 30
    agent_for(server, said).propose(briefing())
    assert any("still loaded" in line for line in said)


@pytest.mark.parametrize("fault", ["down", "500", "broken", "error", "garbage", "list", "html", "hang"])
def test_a_failing_server_is_asked_again_and_the_same(serve, fault):
    server, said = serve(faults=(fault,)), []
    assert agent_for(server, said, patience=30.0).propose(briefing()).edit["form"] == "set"
    first, *later = server.chats()  # more than two on a busy machine, where an answer takes longer than a second
    assert later == [first] * len(later) != []
    assert any("retrying" in line for line in said)


@pytest.mark.parametrize("fault", ["length", "empty", "endless"])
def test_a_worthless_answer_is_drawn_again_with_a_new_seed(serve, fault):
    server = serve(faults=(fault,))
    agent_for(server).propose(briefing())
    first, second = server.chats()
    assert first["options"].pop("seed") != second["options"].pop("seed")
    assert first == second


def test_four_worthless_answers_are_no_proposal(serve):
    server = serve(answer=lambda request: "I cannot help with that.")
    with pytest.raises(NoProposal, match="no usable answer in 4 draws; the last: the answer has no JSON"):
        agent_for(server).propose(briefing())
    assert len(server.chats()) == 4
    assert server.loaded == {}


def test_an_answer_that_ignores_the_schema_is_validated(serve):
    answers = iter([json.dumps({"change": "ROWS = 7"}), json.dumps({"value": 1}), json.dumps({"change": "DEPTH = 5"})])
    proposal = agent_for(serve(answer=lambda request: next(answers))).propose(briefing())
    assert proposal.edit["values"] == {"DEPTH": 5}


def test_a_slow_answer_is_given_up_and_cancelled(serve):
    server = serve(faults=("trickle",))
    start = time.monotonic()
    with pytest.raises(NoProposal, match="no complete answer in 1 s"):
        agent_for(server).propose(briefing())
    assert time.monotonic() - start < 4


def test_a_cut_prompt_is_refused(serve):
    server = serve(faults=("half",))
    with pytest.raises(NoProposal, match="cut the prompt"):
        agent_for(server).propose(briefing())
    server.forced_context = 512
    with pytest.raises(NoProposal, match="context of 512"):
        agent_for(server).propose(briefing())
    assert server.loaded == {}


def test_the_prompt_fits_a_small_context(serve):
    server = serve(models={"tiny:latest": sized(0.5, context=2048)})
    history = long_history(500)
    agent_for(server).propose(briefing(501, history=history))
    (chat,) = server.chats()
    assert chat["options"]["num_ctx"] == 2048
    assert "older ones left out" in chat["messages"][1]["content"]


def test_a_server_that_is_away_sleeps_and_comes_back(serve):
    server, said = serve(), []
    agent = agent_for(server, said, patience=0.5)
    agent.propose(briefing(1))
    server.stop()
    with pytest.raises(NoProposal, match="not available"):
        agent.propose(briefing(2))
    start = time.monotonic()
    with pytest.raises(NoProposal):  # asleep: one look, no waiting
        agent.propose(briefing(3))
    assert time.monotonic() - start < 0.4
    server.start()
    assert agent.propose(briefing(4)).agent == "ollama"
    assert any("is back" in line for line in said)


def test_a_server_that_restarts_meanwhile_is_waited_for(serve):
    server = serve()
    agent = agent_for(server, patience=10)
    agent.propose(briefing(1))
    server.stop()
    threading.Timer(0.5, server.start).start()
    assert agent.propose(briefing(2)).agent == "ollama"


def test_a_missing_model_names_the_command_that_fixes_it(serve):
    with pytest.raises(UserError, match="run: ollama pull llama3"):
        agent_for(serve(), model="llama3").choose()
    with pytest.raises(UserError, match="run: ollama pull"):
        agent_for(serve(models={})).choose()
    embeds = serve(models={"bert:latest": sized(0.1, capabilities=["embedding"])})
    with pytest.raises(UserError, match="has no model"):
        agent_for(embeds).choose()


def test_a_model_that_vanishes_at_night_does_not_end_it(serve):
    server = serve()
    agent = agent_for(server)
    agent.propose(briefing(1))
    server.models.clear()
    with pytest.raises(NoProposal, match="ollama pull"):
        agent.propose(briefing(2))


@pytest.mark.parametrize(
    ("memory", "chosen"), [(100, "llama:70b"), (12, "qwen-coder:14b"), (6, "llama:8b"), (2, "qwen-coder:1.5b")]
)
def test_the_most_able_model_that_fits_is_chosen(serve, memory, chosen):
    models = {f"qwen-coder:{n}b": sized(n) for n in (1.5, 14)} | {f"llama:{n}b": sized(n) for n in (1, 8, 70)}
    assert agent_for(serve(models=models), memory_gb=memory).choose().name == chosen


@pytest.mark.parametrize(("machine", "chosen"), [(8, "3b"), (16, "7b"), (32, "14b"), (48, "32b")])
def test_the_model_for_a_mac_is_that_of_the_docs(serve, monkeypatch, machine, chosen):
    gigabytes = {1.5: 0.99, 3: 1.9, 7: 4.7, 14: 9.0, 32: 20.0}  # as `ollama list` tells them
    models = {f"qwen2.5-coder:{n}b": sized(n) | {"size": int(size * 1e9)} for n, size in gigabytes.items()}
    monkeypatch.setattr("lab.agents.model.describe", lambda: {"memory_gb": float(machine), "gpu_memory_gb": 0.0})
    assert agent_for(serve(models=models)).choose().name == f"qwen2.5-coder:{chosen}"


def test_nothing_fits_is_said_with_sizes(serve):
    with pytest.raises(UserError, match=r"no installed model fits 1.0 GB .the smallest, llama:8b, needs 5.2"):
        agent_for(serve(models={"llama:8b": sized(8)}), memory_gb=1).choose()


def test_the_tag_may_be_left_out(serve):
    assert agent_for(serve(models={"llama3:latest": sized(8)}), model="llama3").choose().name == "llama3:latest"
    assert (full_name("a"), full_name("host:80/b"), full_name("c:1b")) == ("a:latest", "host:80/b:latest", "c:1b")
    assert (billions("7.6B"), billions("494.03M"), billions("?")) == (7.6, pytest.approx(0.49403), 0.0)


def test_code_is_asked_of_models_that_manage_it(serve):
    def answer(request):
        prompt = request["messages"][1]["content"]
        name = "MLP" if "a better MLP" in prompt else "schedule"
        old = SOURCE[SOURCE.index(f"{'class' if name == 'MLP' else 'def'} {name}") :].split("\n\n\n")[0]
        return f"It helps.\n```python\n{old.replace('** 2', '** 3').replace('return 1.0', 'return 0.9')}\n```"

    server = serve(models={"coder:7b": sized(7.6)}, answer=answer)
    proposal = agent_for(server).propose(briefing(1, plateau=True))
    (chat,) = server.chats()
    assert proposal.edit["form"] == "code"
    assert proposal.edit["definitions"] in (["MLP"], ["schedule"])
    assert proposal.hypothesis == "It helps."
    assert "format" not in chat  # fenced code, not code inside JSON
    assert "def build_model" not in chat["messages"][1]["content"]  # the definition alone is shown


def test_large_models_get_the_file_and_search_and_replace(serve):
    edits = {"reason": "tie", "edits": [{"search": "TIED = False", "replace": "TIED = True"}]}
    server = serve(models={"coder:32b": sized(32.8)}, answer=lambda request: json.dumps(edits))
    proposal = agent_for(server, memory_gb=64).propose(briefing())
    (chat,) = server.chats()
    assert proposal.edit["values"] == {"TIED": True}
    assert SOURCE.strip() in chat["messages"][1]["content"]
    assert "edits" in chat["format"]["properties"]


def test_the_form_can_be_overridden(serve):
    edits = {"reason": "tie", "edits": [{"search": "TIED = False", "replace": "TIED = True"}]}
    server = serve(answer=lambda request: json.dumps(edits))
    assert agent_for(server, form="replace").propose(briefing()).edit["values"] == {"TIED": True}
    with pytest.raises(UserError, match="choose one of: menu"):
        agent_for(server, form="poem")


@pytest.mark.parametrize("think", [False, True])
def test_thinking_is_sent_only_to_models_that_can(serve, think):
    server = serve(models={"thinker:8b": sized(8, capabilities=["completion", "thinking"])})
    agent_for(server, think=think, form="menu").propose(briefing())
    assert server.chats()[0]["think"] is think
    plain = serve()
    agent_for(plain, think=think).propose(briefing())
    assert "think" not in plain.chats()[0]


def test_the_environments_host_is_honoured(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not meant for this machine's own server
    assert LocalModel(Server()).propose(briefing()).agent == "ollama"


@pytest.mark.parametrize("host", ["127.0.0.1:port", "http://[::1", "127.0.0.1:99999999"])
def test_a_host_that_is_no_address_is_the_users_mistake(host):
    with pytest.raises(UserError, match="not an address"):
        Server(host)


def test_a_hybrid_night_with_a_failing_server_fills_every_slot(serve):
    draw = random.Random(0)
    faults = [draw.choice(("", "down", "500", "empty", "half", "length", "list")) for _ in range(20)]
    hybrid = Hybrid(Search(seed=1), agent_for(serve(faults=tuple(faults))), share=0.5)
    names = [proposal.agent for proposal in night(hybrid, 12, lambda values: (0.001, "discard"))]
    assert len(names) == 12
    assert set(names) == {"search", "ollama"}
