"""Servers that are not what they seem: models that run elsewhere, other programs, variables of the network."""

import json
import re
import subprocess
import time

import pytest
from checkout import Checkout
from conftest import refusal
from experiment import briefing
from loopback_server import LOGIN
from ollama_server import CODER, OllamaServer
from test_ollama import agent_for, sized

from lab.agents.briefing import NoProposal
from lab.agents.choose import choose_agent
from lab.agents.ollama_client import Server
from lab.errors import UserError
from lab.interface import doctor

# As /api/tags and /api/show of Ollama tell them (ConfigV2: remote_host, remote_model).
CLOUD = {"remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com:443"}
LOCAL, LARGE = {"tiny:1b": sized(1)}, CODER | {"parameters": 120_000_000_000, "size": 382}
LARGE_FILE = LARGE | {"size": 10_000_000_000}


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch):
    """This machine's own servers are not asked."""
    monkeypatch.setattr("lab.agents.openai_client.USUAL_PORTS", ())


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
    assert not any("are sent to" in line for line in said)
    with pytest.raises(UserError, match=rf"no model that runs locally \({name} runs at {host}; .*run: ollama pull"):
        agent_for(serve(models={name: model})).choose()
    assert agent_for(server, said, model=name).choose().remote == host
    assert f"train.py and the briefing are sent to {host}, where {name} runs" in said


def test_a_model_that_moves_elsewhere_in_the_night_is_not_asked_again(serve):
    server, said = serve(models={"mine:latest": CODER}), []
    for agent in (agent_for(server, said), agent_for(server, said, model="mine")):
        agent.propose(briefing(1))
        asked = len(server.chats())
        server.models["mine:latest"] = CODER | {"shown": CLOUD}
        for number in (2, 3):
            with pytest.raises(NoProposal, match=r"mine:latest now runs at ollama.com; train.py is not sent there"):
                agent.propose(briefing(number))
        assert len(server.chats()) == asked
        server.models["mine:latest"] = CODER


def test_a_server_elsewhere_is_used_and_said(serve, monkeypatch):
    server, said = serve(), []
    agent = agent_for(server, said)
    agent.server.local = False
    agent.choose()
    assert f"train.py and the briefing are sent to {server.url}" in said


def test_doctor_says_where_models_run(serve, monkeypatch):
    server = serve(models={"gpt-oss:120b-cloud": LARGE | {"listed": CLOUD}})
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    first, second = doctor._ollama()
    assert (first.level, first.fix) == ("warning", "ollama pull qwen2.5-coder:1.5b")
    assert second.message == (
        "gpt-oss:120b-cloud runs at ollama.com; used only if you name it, and then train.py is sent there"
    )
    server.models["tiny:1b"] = sized(1)
    assert [finding.level for finding in doctor._ollama()] == ["ok", "ok"]


# ---- another program on the port

PAGES = {
    "404 html": (404, LOGIN),
    "404 of a file server": (404, "404 page not found", "text/plain"),
    "404 json": (404, '{"detail": "Not Found"}', "application/json"),
    "404 of an OpenAI server": (
        404,
        '{"error": {"code": 404, "message": "no model at this path"}}',
        "application/json",
    ),
    "404 json list": (404, "[]", "application/json"),
    "400": (400, "The plain HTTP request was sent to HTTPS port", "text/plain"),
    "401 html": (401, LOGIN),
    "401 json": (401, '{"error": "unauthorized"}', "application/json"),
    "403": (403, LOGIN),
    "405": (405, "", "text/plain"),
    "407": (407, LOGIN),
    "429": (429, '{"error": "slow down"}', "application/json"),
    "302": (302, "", "text/plain", "elsewhere"),
    "307": (307, "", "text/plain", "elsewhere"),
    "500": (500, '{"error": "boom"}', "application/json"),
    "502": (502, LOGIN),
    "503": (503, LOGIN),
    "200 html": (200, LOGIN),
    "200 empty": (200, ""),
    "204": (204, ""),
    "200 other json": (200, '{"status": "ok"}', "application/json"),
    "200 null": (200, "null", "application/json"),
    "200 list": (200, "[1]", "application/json"),
    "200 text for models": (200, '{"models": "none"}', "application/json"),
    "200 numbers for models": (200, '{"models": [1, 2]}', "application/json"),
    "200 models without names": (200, '{"models": [{"size": 3}]}', "application/json"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_another_program_on_the_port_is_told_in_one_line(page, monkeypatch, kind):
    status, body, *more = PAGES[kind]
    target = page(200, LOGIN)
    if len(more) == 2:
        more[1] = f"{target.url}/login"
    server, said = page(status, body, *more), []
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    assert choose_agent("auto", "", "", 0.3, said.append).name == "search"
    for agent, model in (("ollama", ""), ("hybrid", ""), ("auto", "coder")):
        with pytest.raises(UserError) as refused:
            choose_agent(agent, model, "", 0.3, said.append)
        assert server.url in str(refused.value)
    [line] = [line for line in said if "using the built-in search alone" in line]
    [finding] = doctor._ollama()
    assert (finding.level, "make" in finding.fix) == ("warning", False)
    for told in (line, str(refused.value), finding.message):
        assert server.url in told
        assert "ollama pull" not in told
        assert "\n" not in told
        assert status == 200 or str(status) in told
        assert body != LOGIN or "Sign in to the model proxy" in told
    assert target.requests == []  # a redirected question would go to a host that nobody named


def test_a_page_in_the_middle_of_a_night_does_not_end_it(serve, monkeypatch):
    server, said = serve(), []
    agent = agent_for(server, said, patience=0.1)
    agent.propose(briefing(1))
    for status in (400, 401, 403, 404, 407, 500, 502):
        server.refuse = lambda request, status=status: (status, "<html>no such model here</html>")
        with pytest.raises(NoProposal):
            agent.propose(briefing(2))
    server.models["qwen2.5-coder:1.5b"] = CODER | {"show_fault": (400, {"error": "no"})}
    with pytest.raises(NoProposal):
        agent.propose(briefing(2))
    server.models["qwen2.5-coder:1.5b"] = CODER
    server.refuse = lambda request: None
    assert agent.propose(briefing(3)).agent == "ollama"


@pytest.mark.parametrize(
    "fault", [(404, {"error": "model 'b' not found"}), (500, {"error": "bad manifest"}), (200, "<html>"), (401, "no")]
)
def test_a_model_that_cannot_be_shown_hides_no_other(serve, fault):
    models = {"a:1b": sized(1), "b:3b": sized(3) | {"show_fault": fault}, "c:1.5b": sized(1.5)}
    server = serve(models=models)
    assert agent_for(server).choose().name == "c:1.5b"
    with pytest.raises(UserError, match=r"b:3b is installed, but .* cannot show it"):
        agent_for(server, model="b:3b").choose()
    with pytest.raises(UserError, match=r"b:3b is installed, but .* cannot show it"):
        agent_for(serve(models={"b:3b": models["b:3b"]})).choose()


# ---- what a model or its server refuses


def thinker(serve, answer=None, **more) -> OllamaServer:
    models = {"thinker:8b": sized(8, capabilities=["completion", "thinking"])}
    return serve(models=models, **({"answer": answer} if answer else {}), **more)


@pytest.mark.parametrize("instead", ["", "Sure, I think so.", "<think>So.</think>"])
def test_a_thinking_model_that_answers_nothing_when_told_not_to_is_let_think(serve, instead):
    def answer(request):
        change = request["format"]["properties"]["change"]["enum"][0]
        return instead if request.get("think") is False else json.dumps({"reason": "", "change": change})

    server = thinker(serve, answer)
    agent = agent_for(server, form="menu")
    agent.propose(briefing(1))
    agent.propose(briefing(1, attempt=1))
    assert [chat.get("think", "") for chat in server.chats()] == [False, "", ""]  # it is remembered
    assert server.chats()[1]["options"]["num_predict"] > 1000  # room for its thoughts


def test_a_thinking_model_that_answers_nothing_to_a_schema_is_asked_without(serve):
    def answer(request):
        return "" if "format" in request else 'It helps. {"reason": "", "change": "DEPTH = 5"}'

    server = thinker(serve, answer)
    assert agent_for(server, form="menu").propose(briefing(1)).edit["values"] == {"DEPTH": 5}
    assert [(chat.get("think", ""), "format" in chat) for chat in server.chats()] == [
        (False, True), ("", True), ("", False)
    ]  # fmt: skip


def test_a_server_that_refuses_think_is_asked_without(serve):
    server = thinker(serve)
    server.refuse = lambda request: (400, "does not support thinking") if "think" in request else None
    agent = agent_for(server, form="menu")
    agent.propose(briefing(1))
    agent.propose(briefing(2))
    assert ["think" in chat for chat in server.chats()] == [True, False, False]


GRAMMAR = {
    "llama.cpp": (400, "Failed to initialize samplers: failed to parse grammar"),
    "its object": (400, {"code": 400, "message": "failed to parse grammar", "type": "invalid_request_error"}),
    "repetitions": (500, "number of repetitions exceeds sane defaults, please reduce the number of repetitions"),
    "Ollama": (500, "failed to load model vocabulary required for format"),
    "schema": (400, "invalid JSON schema in format"),
}


@pytest.mark.parametrize("kind", GRAMMAR)
def test_a_grammar_that_refuses_long_texts_is_asked_without_a_bound(serve, kind):
    edits = {"reason": "tie", "edits": [{"search": "TIED = False", "replace": "TIED = True"}]}
    server = serve(models={"coder:32b": sized(32.8)}, answer=lambda request: json.dumps(edits))
    server.refuse = lambda request: GRAMMAR[kind] if "maxLength" in json.dumps(request.get("format")) else None
    agent = agent_for(server, memory_gb=64)
    for attempt in range(2):
        assert agent.propose(briefing(1, attempt=attempt)).edit["values"] == {"TIED": True}
    assert ["maxLength" in json.dumps(chat["format"]) for chat in server.chats()] == [True, False, False]
    assert server.chats()[1]["format"]["properties"]["edits"]["maxItems"] == 8


def test_a_server_that_refuses_every_schema_is_asked_without_one(serve):
    server = serve(answer=lambda request: '{"reason": "", "change": "DEPTH = 5"}')
    server.refuse = lambda request: (500, "invalid format") if "format" in request else None
    assert agent_for(server).propose(briefing(1)).edit["values"] == {"DEPTH": 5}
    assert len(server.chats()) == 3


# ---- before the baseline


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("servers"), prepared=False)


def begin(checkout: Checkout, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """A night in a checkout where nothing is prepared: it ends there, if not before."""
    return checkout.python("agent_loop.py", "run", "--tag", "x", *flags, check=False, **variables)


@pytest.mark.parametrize("agent", ["ollama", "hybrid", "auto"])
def test_a_model_that_is_not_installed_is_told_before_anything_is_made(serve, checkout, agent):
    start = time.monotonic()
    done = begin(checkout, "--agent", agent, "--model", "llama3", OLLAMA_HOST=serve().url)
    assert refusal(done) == "error: the model llama3 is not installed; run: ollama pull llama3"
    assert time.monotonic() - start < 10
    assert done.stdout == ""
    assert not (checkout.folder / "nights").exists()


def test_a_server_that_is_away_does_not_keep_a_night_from_beginning(checkout):
    done = begin(checkout, "--agent", "ollama", OLLAMA_HOST="127.0.0.1:9")
    assert "it is not running" in done.stdout
    assert "retrying when it is its turn" in done.stdout
    assert "nothing is prepared yet" in refusal(done)


def test_a_program_on_the_port_ends_a_night_that_needs_the_model_and_no_other(page, checkout):
    server = page(401, LOGIN)
    assert f"{server.url} (OLLAMA_HOST)" in refusal(begin(checkout, "--agent", "hybrid", OLLAMA_HOST=server.url))
    done = begin(checkout, "--agent", "auto", OLLAMA_HOST=server.url)
    assert f"{server.url} (OLLAMA_HOST)" in done.stdout
    assert "nothing is prepared yet" in refusal(done)


# ---- variables of the network

ADDRESSES = [
    "::1",
    "[::1]:11434",
    "http://",
    "127.0.0.1:port",
    "127.0.0.1:99999",
    "http://[::1",
    "socks5://127.0.0.1:1",
]
VARIABLES = {
    "socks5": {"ALL_PROXY": "socks5://127.0.0.1:9"},
    "socks": {"all_proxy": "socks://127.0.0.1:9/"},
    "proxy nonsense": {"http_proxy": "non sense://x"},
    "proxy port": {"http_proxy": ":::"},
    "proxy that is down": {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    "certificates": {"SSL_CERT_FILE": "/nope.pem"},
    "certificate folder": {"SSL_CERT_DIR": "/nope"},
    "key log": {"SSLKEYLOGFILE": "/nope/keys"},
    "no proxy": {"NO_PROXY": "a b,*.x,[::1],::1/128,http://["},
}
EVERYTHING = {name: value for each in reversed(VARIABLES.values()) for name, value in each.items()}


@pytest.mark.parametrize("host", ADDRESSES)
def test_a_search_reads_no_network_variable(checkout, host):
    done = begin(checkout, "--agent", "search", OLLAMA_HOST=host, **EVERYTHING)
    assert "nothing is prepared yet" in refusal(done)
    assert done.stdout == ""


@pytest.mark.parametrize("kind", [*VARIABLES, "all"])
def test_no_network_variable_stands_between_a_night_and_its_own_machine(serve, checkout, kind):
    server = serve()
    done = begin(checkout, "--agent", "hybrid", OLLAMA_HOST=server.url, **VARIABLES.get(kind, EVERYTHING))
    assert "using qwen2.5-coder:1.5b" in done.stdout
    assert "are sent to" not in done.stdout
    assert "nothing is prepared yet" in refusal(done)


@pytest.mark.parametrize("kind", VARIABLES)
def test_a_network_variable_that_no_connection_can_use_is_named(checkout, kind):
    if kind == "certificate folder":
        pytest.skip("known only when somebody answers")
    host = "https://model.invalid" if kind in ("certificates", "key log") else "http://model.invalid"
    done = begin(checkout, "--agent", "hybrid", OLLAMA_HOST=host, **VARIABLES[kind])
    told = done.stdout + refusal(done)
    if kind == "proxy that is down":  # known only when it is asked
        assert f"{host} (OLLAMA_HOST) is not available" in told
    else:
        assert all(f"{name}={value}" in told for name, value in VARIABLES[kind].items())
        assert told == refusal(done)


def test_a_search_is_the_night_where_no_connection_can_be_made(checkout):
    variables = {"OLLAMA_HOST": "http://model.invalid", "ALL_PROXY": "socks://me:secret@127.0.0.1:9/"}
    done = begin(checkout, "--agent", "auto", **variables)
    assert "no connection can be made with ALL_PROXY=socks://...@127.0.0.1:9/ (Unknown scheme" in done.stdout
    assert "using the built-in search alone" in done.stdout
    assert "secret" not in done.stdout + refusal(done)


@pytest.mark.parametrize(
    ("host", "url", "local"),
    [
        ("", "http://127.0.0.1:11434", True),
        ("::1", "http://[::1]:11434", True),
        ("[::1]", "http://[::1]:11434", True),
        ("[::1]:80", "http://[::1]", True),
        ("::", "http://[::1]:11434", True),
        ("0.0.0.0", "http://127.0.0.1:11434", True),
        ("0.0.0.0:9", "http://127.0.0.1:9", True),
        (":9", "http://127.0.0.1:9", True),
        ("  '127.0.0.2:9' ", "http://127.0.0.2:9", True),
        ("localhost", "http://localhost:11434", True),
        ("http://localhost", "http://localhost", True),
        ("localhost:9/ollama/", "http://localhost:9/ollama", True),
        ("https://gpu.example", "https://gpu.example", False),
        ("10.0.0.5", "http://10.0.0.5:11434", False),
        ("fe80::2", "http://[fe80::2]:11434", False),
        ("localhost.example", "http://localhost.example:11434", False),
    ],
)
def test_an_address_is_read_as_ollama_reads_it(monkeypatch, host, url, local):
    monkeypatch.setenv("OLLAMA_HOST", host)
    server = Server()
    assert (server.url, server.local) == (url, local)
    assert str(server.client._client.base_url).rstrip("/") == url


NO_ADDRESSES = [*ADDRESSES[2:], "a b", "me:secret@127.0.0.1", "http://a?b", "127.0.0.1:0", "?", ":x", "/", "ftp://a"]


@pytest.mark.parametrize("host", NO_ADDRESSES)
def test_an_address_that_is_none_is_the_users_mistake(monkeypatch, host):
    monkeypatch.setenv("OLLAMA_HOST", host)
    told = f"OLLAMA_HOST is not an address: {host!r}; write it as 127.0.0.1:11434"
    with pytest.raises(UserError, match=re.escape(told)):
        choose_agent("ollama", "", "", 0.3, print)
    [finding] = doctor._ollama()
    assert (finding.level, told in finding.message, "make" in finding.fix) == ("warning", True, False)


def test_an_address_that_is_none_is_told_before_anything_is_made(checkout):
    told = refusal(begin(checkout, "--agent", "ollama", OLLAMA_HOST="http://[::1"))
    assert told == "error: OLLAMA_HOST is not an address: 'http://[::1'; write it as 127.0.0.1:11434"
    done = begin(checkout, "--agent", "auto", OLLAMA_HOST="http://[::1")
    assert "using the built-in search alone" in done.stdout
