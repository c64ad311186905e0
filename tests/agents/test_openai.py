"""The same agent on servers with OpenAI's protocol, which misbehave on demand."""

import json
import time

import pytest
from experiment import briefing, night
from loopback_server import Page
from openai_server import OpenAIServer

from lab.agents import openai_client
from lab.agents.briefing import NoProposal, Tried
from lab.agents.choose import choose_agent
from lab.agents.hybrid import Hybrid
from lab.agents.model import LocalModel
from lab.agents.openai_client import OpenAIServer as Client
from lab.errors import UserError
from lab.interface import doctor

LOGIN = "<html><head><title>Sign in to the model proxy</title></head></html>"
GGUF = "models/qwen2.5-coder-1.5b-q4_k_m.gguf"


@pytest.fixture
def serve():
    servers = []

    def start(kind=OpenAIServer, *arguments, **options):
        servers.append(kind(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch):
    """Neither this machine's servers nor its key are asked."""
    monkeypatch.setattr(openai_client, "USUAL_PORTS", ())
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def agent_for(server, said=None, patience=2.0, named=True, **options) -> LocalModel:
    log = (said if said is not None else []).append
    client = Client(server.url, named, patience, answer_seconds=1.0, first_pause=0.05, log=log)
    return LocalModel(client, log=log, **options)


def test_a_night_with_a_small_model(serve):
    server, said = serve(), []
    proposals = night(agent_for(server, said), 5, lambda values: (0.001, "discard"))
    assert {(proposal.agent, proposal.edit["form"]) for proposal in proposals} == {("openai", "set")}
    chats = server.chats()
    assert len({chat["seed"] for chat in chats}) == 5
    assert {(chat["stream"], chat["max_tokens"], chat["model"]) for chat in chats} == {(True, 200, GGUF)}
    assert chats[0]["response_format"]["json_schema"]["strict"]
    assert sum("cannot be asked to unload" in line for line in said) == 1
    assert not any("are sent to" in line for line in said)


@pytest.mark.parametrize("fault", ["down", "500", "503", "broken", "error", "garbage", "html", "hang"])
def test_a_failing_server_is_asked_again_and_the_same(serve, fault):
    server, said = serve(faults=(fault,)), []
    assert agent_for(server, said).propose(briefing()).edit["form"] == "set"
    first, second = server.chats()
    assert first == second
    assert any("retrying" in line for line in said)


@pytest.mark.parametrize("fault", ["empty", "nothing", "length", "huge"])
def test_a_worthless_answer_is_drawn_again_with_a_new_seed(serve, fault):
    server = serve(faults=(fault,))
    agent_for(server).propose(briefing())
    first, second = server.chats()
    assert first["seed"] != second["seed"]


def test_an_endless_line_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(openai_client, "MAX_STREAM", 500_000)
    server = serve(faults=("line",))
    agent_for(server).propose(briefing())
    assert len(server.chats()) == 2


def test_a_server_that_does_not_stream_is_understood(serve):
    server = serve(faults=("whole",))
    assert agent_for(server).propose(briefing()).edit["form"] == "set"
    assert len(server.chats()) == 1


@pytest.mark.parametrize("fault", ["pings", "half"])
def test_a_slow_answer_and_a_cut_prompt_are_no_proposal(serve, fault):
    start = time.monotonic()
    with pytest.raises(NoProposal, match="within the time" if fault == "pings" else "cut the prompt"):
        agent_for(serve(faults=(fault,))).propose(briefing())
    assert time.monotonic() - start < 4


def test_a_wrong_key_in_the_night_is_no_proposal(serve):
    server = serve()
    agent = agent_for(server)
    agent.propose(briefing(1))
    server.faults = ["401"] * 9
    with pytest.raises(NoProposal, match="answers 401: set OPENAI_API_KEY"):
        agent.propose(briefing(2))
    server.faults = []
    assert agent.propose(briefing(3)).agent == "openai"


# ---- what a server refuses or ignores


@pytest.mark.parametrize("error", [{"code": 400, "message": "failed to parse grammar"}, "json_schema is not supported"])
def test_a_refused_schema_is_left_out_and_answers_are_validated(serve, error):
    answers = iter(['{"change": "ROWS = 7"}', 'Sure: {"reason": "", "change": "DEPTH = 5"}'])
    server = serve(answer=lambda request: next(answers))
    server.refuse = lambda request: (400, error) if "response_format" in request else None
    assert agent_for(server).propose(briefing()).edit["values"] == {"DEPTH": 5}
    shapes = [json.dumps(chat.get("response_format")) for chat in server.chats()]
    assert ["maxLength" in shape for shape in shapes] == [True, False, False, False]
    assert shapes[2:] == ["null", "null"]


def test_optional_fields_are_left_out_once_they_are_refused(serve):
    server = serve()

    def refuse(request):
        field = next((key for key in ("chat_template_kwargs", "stream_options", "seed") if key in request), "")
        return (422, {"message": f"Unrecognized request argument supplied: {field}"}) if field else None

    server.refuse = refuse
    server.answer = lambda request: '{"reason": "", "change": "DEPTH = 5"}'
    agent = agent_for(server)
    agent.propose(briefing(1))
    agent.propose(briefing(1, attempt=1))
    assert len(server.chats()) == 5


def test_a_model_that_thinks_whatever_it_is_told_gets_room_for_it(serve):
    def answer(request):
        if request["max_tokens"] < 1000:
            return "<think>" + "hm " * 60
        return '<think>so</think>{"reason": "", "change": "DEPTH = 5"}'

    server = serve(answer=answer, faults=("length",))
    assert agent_for(server).propose(briefing()).edit["values"] == {"DEPTH": 5}
    first, second = server.chats()
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in second


def test_the_prompt_fits_the_context_that_the_server_has(serve):
    server = serve()
    server.context = 2048
    agent = agent_for(server)
    agent.propose(briefing())
    [chat] = server.chats()
    assert agent.choose().context == 2048
    assert len(chat["messages"][1]["content"].encode()) / 2.5 < 2048 - 200


def test_what_a_person_wishes_is_in_the_prompt_and_on_the_menu(serve):
    server = serve()
    failed = [Tried(1, "a", "discard", 0.1, {"form": "set", "values": {"DEPTH": 3}, "was": {"DEPTH": 4}})]
    agent = agent_for(server)
    agent.propose(briefing(2, history=failed))
    agent.propose(briefing(2, history=failed, wish="make it deeper"))
    menus = [
        chat["response_format"]["json_schema"]["schema"]["properties"]["change"]["enum"] for chat in server.chats()
    ]
    assert ["DEPTH = 5" in menu for menu in menus] == [False, True]  # it rests after a failure, but not from a wish
    assert "make it deeper" in server.chats()[1]["messages"][1]["content"]


# ---- memory


@pytest.mark.parametrize("product", ["router", "lmstudio"])
def test_a_server_that_can_free_memory_does_so_before_the_run(serve, product):
    server, said = serve(product=product, models=("qwen2.5-7b", "text-embed-1b")), []
    agent = agent_for(server, said, form="menu", memory_gb=16)
    agent.propose(briefing())
    assert server.loaded == set()
    assert [path for path, _, _ in server.requests if path.endswith("unload")]
    assert not any("unload" in line for line in said)
    assert [model.name for model in agent.server.models() if model.completes] == ["qwen2.5-7b"]


def test_a_model_that_stays_loaded_is_said(serve, monkeypatch):
    monkeypatch.setattr(openai_client, "UNLOAD_SECONDS", 0.3)
    server, said = serve(product="router"), []
    agent = agent_for(server, said)
    monkeypatch.setattr(server, "loaded", type("Stuck", (set,), {"discard": lambda *_: None})())
    agent.propose(briefing())
    assert any("is still loaded" in line for line in said)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("mlx-community/Qwen2.5-Coder-7B-Instruct-4bit", 3.5), ("a/gemma-3-270m-it-bf16", 0.54),
                            ("a/Llama-3.2-1B", 2.0), ("who-knows", 0)],
)  # fmt: skip
def test_the_size_of_a_model_that_nobody_tells_is_that_of_its_name(serve, name, gigabytes):
    [model] = agent_for(serve(product="mlx", models=(name,))).server.models()
    assert model.bytes / 1e9 == pytest.approx(gigabytes)


# ---- which server, and which model


LISTS = {
    "no list": {"object": "list"}, "a text": {"data": "none"}, "numbers": {"data": [1]}, "no names": {"data": [{}]},
    "a list": [], "null": {"data": None}, "a name that is none": {"data": [{"id": 3}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*LISTS, "html 404", "html 401", "html 200", "redirect"])
def test_another_program_is_one_line(serve, kind):
    if kind in LISTS:
        server = serve()
        server.listed = LISTS[kind]
    else:
        status = {"html 404": 404, "html 401": 401, "html 200": 200}.get(kind, 302)
        server = serve(Page, status, LOGIN, "text/html", "http://127.0.0.1:9/" if kind == "redirect" else "")
    with pytest.raises(UserError) as refused:
        choose_agent("openai", "", "", 0.3, print, server.url)
    assert server.url in str(refused.value)
    assert "\n" not in str(refused.value)


def test_models_that_are_missing_or_do_not_fit_are_one_line(serve):
    server = serve(models=(GGUF,))
    with pytest.raises(UserError, match=f"has no model llama3; it lists: {GGUF}"):
        choose_agent("openai", "llama3", "", 0.3, print, server.url)
    for name in (GGUF, GGUF.rpartition("/")[2], GGUF.rpartition("/")[2].removesuffix(".gguf")):
        assert choose_agent("openai", name, "", 0.3, print, server.url).choose().name == GGUF
    with pytest.raises(UserError, match=r"no installed model fits 1\.0 GB"):
        agent_for(serve(product="mlx", models=("a/b-70B",)), memory_gb=1).choose()
    with pytest.raises(UserError, match="has no model"):
        agent_for(serve(models=())).choose()


def test_a_server_is_found_on_its_usual_port_when_ollama_is_absent(serve, monkeypatch):
    page, empty, server, said = serve(Page, 404, LOGIN), serve(models=()), serve(), []
    ports = [9, int(page.url.rpartition(":")[2]), empty.port, server.port]
    monkeypatch.setattr(openai_client, "USUAL_PORTS", ports)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    agent = choose_agent("auto", "", "", 0.3, said.append)
    assert isinstance(agent, Hybrid)
    assert agent.model.server.host == server.url
    assert any(f"using the server at {server.url}" in line for line in said)
    assert {key for _, _, key in server.requests} == {""}  # a key is for a server that was named
    assert choose_agent("openai", "", "", 0.3, said.append).name == "openai"
    [finding] = doctor._openai()
    assert (finding.level, server.url in finding.message) == ("warning", True)


def test_without_any_server_openai_says_so_and_auto_searches():
    with pytest.raises(UserError, match="no server with OpenAI's protocol answers"):
        choose_agent("openai", "", "", 0.3, print)
    assert choose_agent("auto", "", "", 0.3, lambda line: None).name == "search"
    assert [finding.level for finding in doctor._openai()] == ["ok"]


def test_a_named_server_gets_the_key_and_one_elsewhere_is_said(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server, said = serve(), []
    agent = agent_for(server, said)
    agent.server.local = False
    agent.propose(briefing())
    assert {key for _, _, key in server.requests} == {"Bearer secret"}
    assert f"train.py and the briefing are sent to {server.url}" in said
    assert not any("unload" in line for line in said)


@pytest.mark.parametrize("kind", ["search", "command", "ollama"])
def test_a_base_url_without_its_agent_is_refused(kind):
    with pytest.raises(UserError, match="use it with --agent openai"):
        choose_agent(kind, "", "true", 0.3, print, "127.0.0.1:1")


@pytest.mark.parametrize(
    ("given", "host"),
    [("127.0.0.1:1234", "http://127.0.0.1:1234/v1"), ("http://localhost:1234/v1/", "http://localhost:1234/v1"),
     ("localhost", "http://localhost:8080/v1"), ("https://gpu.example/api/v3", "https://gpu.example/api/v3")],
)  # fmt: skip
def test_a_base_url_is_read_as_other_clients_read_it(given, host):
    assert Client(given).host == host


@pytest.mark.parametrize("given", ["http://", "http://me:secret@127.0.0.1", "ftp://a", "127.0.0.1:port"])
def test_a_base_url_that_is_none_is_one_line(given):
    with pytest.raises(UserError, match="BASE_URL is not an address"):
        choose_agent("openai", "", "", 0.3, print, given)
