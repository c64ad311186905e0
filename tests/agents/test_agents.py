"""Briefing, hybrid, and the command agent with real scripts in real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from experiment import PROGRAM, SETTINGS, SOURCE, briefing, long_history, outcome
from processes_left import MARK, marked, needs_proc, none_left

from lab.agents.briefing import Briefing, NoProposal, Tried, row
from lab.agents.command import Command
from lab.agents.hybrid import Hybrid
from lab.errors import UserError
from lab.loop.proposal import Proposal, describe
from lab.loop.source import set_constant

# The briefing


@pytest.mark.parametrize("tokens", [2000, 3000, 8000])
def test_the_briefing_stays_in_its_bound_and_drops_the_oldest_rows(tokens):
    sizes = []
    for count in (0, 10, 100, 1000):
        brief = briefing(count + 1, history=long_history(count), last_failure="NaN " * 9000, plateau=True)
        text = brief.render(tokens)
        sizes.append(len(text.encode()) / 2.5)
        assert sizes[-1] <= tokens
        if count:
            assert f"{count:4d} discard" in text  # the latest always stays
    assert sizes[3] - sizes[2] < 100
    assert "older ones left out" in text
    assert "   1 discard" not in text


def test_the_briefing_says_where_we_stand():
    near = Tried(7, "wider", "discard", -0.0004, None)
    text = briefing(
        9,
        task="tinystories on M4",
        value=0.9,
        noise=0.002,
        near_misses=(near,),
        last_failure="ValueError: bad shape, line 12",
        refused="changes nothing",
    ).render(5000)
    for part in (PROGRAM[:40], "tinystories on M4", "0.900000", "0.0020", "wider", "bad shape", "was refused", SOURCE):
        assert part.strip() in text
    assert "Plateau" not in text


def test_code_that_does_not_fit_is_no_proposal_not_a_crash():
    with pytest.raises(NoProposal, match="does not fit"):
        briefing().render(200)


def test_rows_of_the_history_are_one_line():
    tried = Tried(3, "a\nb\x1b", "keep", -0.01, {"values": {"ROWS": 4}, "was": {"ROWS": 8}})
    assert row(tried) == "   3 keep     -0.01000 [ROWS 8 -> 4] a b"
    assert "--" in row(Tried(3, "a", "crash"))
    sampled = Tried(3, "sampled: ROWS from 8 to 4", "keep", -0.01, tried.edit)
    assert row(sampled) == "   3 keep     -0.01000 [ROWS 8 -> 4]"


def test_the_menu_leaves_out_what_crashed_and_what_lies_beyond():
    crashed = Tried(1, "", "crash", None, {"form": "set", "values": {"DEPTH": 6}, "was": {"DEPTH": 4}})
    assert briefing().menu()["DEPTH"] == [2, 3, 5, 6, 9]
    assert briefing(history=(crashed,)).menu()["DEPTH"] == [2, 3, 5]
    low = Tried(2, "", "crash", None, {"form": "set", "values": {"MATRIX_LR": 0.016}, "was": {"MATRIX_LR": 0.02}})
    assert briefing(history=(low,)).menu()["MATRIX_LR"] == [0.025, 0.032, 0.04, 0.08]


def test_the_history_may_come_from_json():
    edit = {"form": "set", "values": {"BETAS": (0.9, 0.95)}, "was": {"BETAS": (0.8, 0.95)}}
    read_back = Tried(1, "", "crash", None, json.loads(json.dumps(edit)))
    assert read_back.edit["values"] == edit["values"]
    assert (0.9, 0.95) in briefing().menu()["BETAS"]
    assert (0.9, 0.95) not in briefing(history=(read_back,)).menu()["BETAS"]


# hybrid


class Scripted:
    """An agent that proposes a fixed change, or refuses."""

    def __init__(self, name: str, refusal: Exception | None = None):
        self.name, self.refusal, self.told = name, refusal, []
        source = set_constant(SOURCE, "DEPTH", 5)
        self.proposal = Proposal(source, name, name, describe(source, SOURCE, SETTINGS))

    def propose(self, brief: Briefing) -> Proposal:
        if self.refusal:
            raise self.refusal
        return self.proposal

    def tell(self, proposal: Proposal, result: Tried) -> None:
        self.told.append((proposal.agent, result.number))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_hybrid_keeps_its_share_and_its_turns(share):
    agents = Scripted("search"), Scripted("model")
    names = [Hybrid(*agents, share=share).propose(briefing(n)).agent for n in range(1, 101)]
    assert names.count("model") == round(100 * share)
    assert names[40:] == [Hybrid(*agents, share=share).propose(briefing(n)).agent for n in range(41, 101)]


def test_the_hybrid_asks_the_model_on_a_plateau_and_tells_both():
    search, model = Scripted("search"), Scripted("model")
    hybrid = Hybrid(search, model)
    proposal = hybrid.propose(briefing(1, plateau=True))
    hybrid.tell(proposal, outcome(1, proposal))
    assert proposal.agent == "model"
    assert search.told == model.told == [("model", 1)]


@pytest.mark.parametrize("refusal", [NoProposal("asleep"), UserError("no model; run: ollama pull x")])
def test_the_hybrid_falls_back_and_says_so(refusal):
    said = []
    hybrid = Hybrid(Scripted("search"), Scripted("model", refusal), share=1.0, log=said.append)
    assert hybrid.propose(briefing()).agent == "search"
    assert str(refusal) in said[0]
    both = Hybrid(Scripted("search", NoProposal("dry")), Scripted("model", refusal))
    with pytest.raises(NoProposal, match="dry"):
        both.propose(briefing())


def test_a_share_out_of_range_is_the_users_mistake():
    with pytest.raises(UserError, match="0 to 1"):
        Hybrid(Scripted("a"), Scripted("b"), share=1.5)


# command


def script(tmp_path, text: str) -> str:
    """A real executable script standing in for a coding CLI."""
    path = tmp_path / "tool.py"
    path.write_text(f"import os, pathlib, subprocess, sys, time\n{text}\n")
    return f"{sys.executable} {path}"


EDIT = "p = pathlib.Path('train.py'); p.write_text(p.read_text().replace('SETTINGS.depth', '6'))"


def test_a_command_edits_train_py_and_gives_its_hypothesis(tmp_path):
    reads = "text = pathlib.Path('briefing.md').read_text(); assert 'wider' in text and 'Edit train.py' in text"
    program = "assert 'Never stop' in pathlib.Path('program.md').read_text()"
    repository = "assert not subprocess.check_output(['git', 'status', '--porcelain'])"
    writes = "pathlib.Path('hypothesis.txt').write_text('deeper is better\\n')"
    command = script(tmp_path, f"{reads}\n{program}\n{repository}\n{EDIT}\n{writes}\nprint('bye')")
    history = (Tried(1, "wider", "discard", 0.1),)
    proposal = Command(command).propose(briefing(2, history=history))
    assert proposal.hypothesis == "deeper is better"
    assert proposal.agent == "command"
    assert proposal.edit == {"form": "set", "values": {"DEPTH": 6}, "was": {"DEPTH": 4}}


def test_the_hypothesis_may_be_the_last_line_printed(tmp_path):
    assert Command(script(tmp_path, f"{EDIT}\nprint('a')\nprint('more depth')")).propose(briefing()).hypothesis == (
        "more depth"
    )
    assert Command(script(tmp_path, EDIT)).propose(briefing()).hypothesis == "DEPTH from 4 to 6"


def test_a_tools_own_dot_files_are_its_own_business(tmp_path):
    own = "os.mkdir('.tool'); open('.tool/log', 'w').write('x'); os.mkdir('__pycache__'); open('.x', 'w')"
    assert Command(script(tmp_path, f"{EDIT}\n{own}")).propose(briefing()).edit["values"] == {"DEPTH": 6}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pass", "changes nothing"),
        (f"{EDIT}\nopen('prepare.py', 'w').write('x')", "changes prepare.py"),
        (f"{EDIT}\nopen('program.md', 'a').write('x')", "changes program.md"),
        (f"{EDIT}\nos.makedirs('lab/a'); open('lab/a/score.py', 'w').write('x')", "changes lab/a/score.py"),
        ("os.remove('train.py')", "train.py is missing"),
        ("os.remove('train.py'); os.symlink('/etc/passwd', 'train.py')", "not a regular file"),
        ("os.remove('train.py'); os.mkfifo('train.py')", "not a regular file"),
        ("open('train.py', 'wb').write(b'\\xff\\xfe')", "not UTF-8"),
        ("open('train.py', 'w').write('def (')", "does not parse"),
        ("open('train.py', 'a').write('#' * 300_000)", "too long"),
        (EDIT.replace("'6'", "'0'"), "at least 1"),
    ],
)
def test_a_change_that_cannot_be_tried_is_refused_by_name(tmp_path, text, word, monkeypatch):
    monkeypatch.setattr("lab.agents.command.REPAIRS", 0)
    with pytest.raises(NoProposal, match=word):
        Command(script(tmp_path, text)).propose(briefing())


def test_a_command_may_repair_twice():
    said = []
    with pytest.raises(NoProposal, match="rejected 3 times; last reason: changes nothing"):
        Command("true", log=said.append).propose(briefing())
    assert len(said) == 3


def test_a_refused_change_goes_back_with_its_reason_and_its_file(tmp_path):
    text = (
        "brief = pathlib.Path('briefing.md').read_text(); p = pathlib.Path('train.py'); code = p.read_text()\n"
        "again = 'was refused' in brief and 'not defined' in brief and 'missing_name' in code\n"
        "change = ('missing_name', '0.5') if again else ('return 1.0', 'return missing_name')\n"
        "p.write_text(code.replace(*change))"
    )
    proposal = Command(script(tmp_path, text)).propose(briefing())
    assert "return 0.5" in proposal.source
    assert proposal.edit == {"form": "code", "definitions": ["schedule"]}


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0 and sys.platform != "linux"


@pytest.mark.parametrize("deaf", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_an_overrunning_command_dies_with_its_children(tmp_path, deaf, monkeypatch):
    monkeypatch.setattr("lab.agents.command.GRACE_SECONDS", 0.3)
    pids = tmp_path / "pids"
    child = f"child = subprocess.Popen(['sleep', '60']); open('{pids}', 'w').write(f'{{os.getpid()}} {{child.pid}}')"
    start = time.monotonic()
    with pytest.raises(NoProposal, match="longer than 1 s"):
        Command(script(tmp_path, f"{deaf}{child}\ntime.sleep(60)"), seconds=1).propose(briefing())
    assert time.monotonic() - start < 10
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_what_a_command_leaves_running_is_killed(tmp_path):
    pids = tmp_path / "pids"
    child = f"child = subprocess.Popen(['sleep', '60']); open('{pids}', 'w').write(str(child.pid))"
    Command(script(tmp_path, f"{EDIT}\n{child}")).propose(briefing())
    assert not alive(int(pids.read_text()))


def test_a_failing_and_a_chattering_command_are_no_proposal(tmp_path, monkeypatch):
    with pytest.raises(NoProposal, match="status 3: no key"):
        Command("echo no key; exit 3").propose(briefing())
    with pytest.raises(NoProposal, match="status 127"):
        Command("a-tool-that-is-not-there").propose(briefing())
    monkeypatch.setattr("lab.agents.command.MAX_OUTPUT", 100_000)
    with pytest.raises(NoProposal, match="printed more"):
        Command("yes", seconds=20).propose(briefing())
    with pytest.raises(UserError, match="needs a command"):
        Command(" ")


def test_gits_environment_does_not_reach_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    Command(script(tmp_path, f"assert 'GIT_DIR' not in os.environ\n{EDIT}")).propose(briefing())
    assert not (tmp_path / "elsewhere").exists()


def test_importing_the_agents_does_nothing():
    code = "import lab.agents, lab.agents.command, lab.agents.hybrid, lab.agents.search, lab.agents.model"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


DETACHED = {
    "setsid": "subprocess.Popen(['sleep', '60'], start_new_session=True)",
    "nohup": "subprocess.Popen('nohup sleep 60 >/dev/null 2>&1 &', shell=True).wait()",
    "double fork": "os.fork() or (os.setsid(), os.fork() and os._exit(0), os.execvp('sleep', ['sleep', '60']))",
    "daemon": "os.fork() or (os.setsid(), os.fork() and os._exit(0), os.chdir('/'), os.closerange(0, 100), "
    "os.execvp('sleep', ['sleep', '60']))",
    "deaf": "subprocess.Popen(['sh', '-c', 'trap \"\" TERM HUP; sleep 60 & wait; sleep 60'], start_new_session=True)",
    "stopped": "os.kill(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, 19)",
    "always another process": "while not os.fork():\n    while True:\n        os.setsid(); os.fork() and os._exit(0)",
}


@needs_proc
@pytest.mark.parametrize("way", DETACHED)
@pytest.mark.parametrize("end", ["done", "failed", "timeout"])
def test_no_descendant_of_a_command_outlives_its_turn(tmp_path, monkeypatch, way, end):
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setattr("lab.agents.command.GRACE_SECONDS", 0.2)
    last = {"done": EDIT, "failed": "sys.exit(3)", "timeout": "time.sleep(60)"}[end]
    agent = Command(script(tmp_path, f"{DETACHED[way]}\nopen('{tmp_path}/begun', 'w')\n{last}"), seconds=1)
    if end == "done":
        agent.propose(briefing())
    else:
        with pytest.raises(NoProposal):
            agent.propose(briefing())
    assert (tmp_path / "begun").exists()
    assert marked(tmp_path) == []


@needs_proc
def test_a_server_that_the_user_started_outlives_a_command_that_talks_to_it(tmp_path):
    server = subprocess.Popen([sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"], cwd=tmp_path,
                              stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    try:
        port = server.stdout.readline().split(b" port ")[1].split()[0].decode()
        asks = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}').read()"
        Command(script(tmp_path, f"{asks}\n{EDIT}")).propose(briefing())
        assert server.poll() is None
    finally:
        server.kill()
        server.communicate()


@needs_proc
@pytest.mark.parametrize("who", ["loop", "guard"])
def test_a_command_dies_with_the_loop_and_with_its_guard(tmp_path, who):
    begun = tmp_path / "begun"
    tool = script(tmp_path, f"open('{begun}', 'w').write(f'{{os.getppid()}} {{os.getpid()}}'); time.sleep(60)")
    code = f"from lab.agents.command import Command; Command({f'exec {tool}'!r})._run(__import__('pathlib').Path('.'))"
    loop = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {MARK: str(tmp_path)}, stderr=-3)
    until = time.monotonic() + 20
    while not (begun.exists() and begun.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(loop.pid if who == "loop" else int(begun.read_text().split()[0]), signal.SIGKILL)
    loop.wait(10)
    assert none_left(tmp_path)
