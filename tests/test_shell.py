"""Behavior in a shell: help, exit statuses, Ctrl-C, -q and -v, completion."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from checkout import Checkout, run_loop
from conftest import documents, environment, write_jsonl
from terminal import Terminal, needs_tmux

import agent_loop
import prepare
from lab.agents.briefing import brief
from lab.interface import report
from lab.loop.journal import Journal
from lab.trial.sandbox import available

needs_sandbox = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def trained(checkout):
    """The result of a quiet training run."""
    return checkout.python("train.py", "--steps", 2, "-q")


# ---- help


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of prepare.py and agent_loop.py."""
    for script, group in (("prepare.py", prepare.command), ("agent_loop.py", agent_loop.command)):
        if group.invoke_without_command:
            yield script, group
        for name, command in group.commands.items():
            yield f"{script} {name}", command


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_option_has_help_and_every_example_is_accepted(name, command, tmp_path, monkeypatch):
    (tmp_path / "runs/latest").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    unexplained = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert unexplained == []
    examples = re.findall(r"^  python (.*)$", command.epilog, re.M)
    assert examples
    for example in examples:
        assert example.startswith(name)
        command.make_context(name, shlex.split(example.removeprefix(name)))


def test_the_examples_of_train_are_accepted(script):
    shown = script("train.py", "--help").stdout
    examples = re.findall(r"^ +python train.py ?(.*)$", shown, re.M)
    assert len(examples) == 3
    flags = {word for example in examples for word in example.split() if word.startswith("-")}
    assert flags <= set(re.findall(r"--[\w-]+", shown.partition("Examples:")[0]))


# ---- exit status


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        ("agent_loop.py run --until 25:99", 2, "Error: Invalid value for '--until': '25:99' does not match"),
        ("agent_loop.py run --agent search --preset absent --tag none", 1, "error: "),
        ("prepare.py --preset offline sample", 2, "Error: sample takes no options before its name; see"),
        ("agent_loop.py run -q extra", 2, "Error: Got unexpected extra argument (extra)"),
    ],
)
def test_a_wrong_command_line_is_one_error_and_an_exit_status(checkout, command, status, line):
    done = checkout.python(*command.split(), check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("rror: ") == 1


def test_a_closed_pipe_ends_the_command_silently(checkout):
    line = shlex.join(checkout.command("prepare.py", "doctor"))
    done = subprocess.run(f"{line} | head -1", shell=True, **checkout.where(), capture_output=True, text=True)
    assert done.stdout.startswith("ok       machine")
    assert done.stderr == ""


CLOSED = {
    ("agent_loop.py", "status", "--tag", "loud"): 0,
    ("prepare.py", "clean"): 1,
    ("prepare.py", "--help"): 1,
    ("train.py", "--steps", 2, "-v", "--run-dir", "runs/piped"): 0,
}


@needs_sandbox
@pytest.mark.parametrize("command", CLOSED, ids=lambda command: "-".join(map(str, command[:2])))
def test_a_command_whose_output_nobody_reads_says_nothing_and_loses_no_result(checkout, loud_night, command):
    line = f"{{ {shlex.join(checkout.command(*command))}; echo status=$? >&2; }} | true"
    where = checkout.where()
    where["env"].pop("PYTHONUNBUFFERED", None)  # what is buffered is written at the very end
    done = subprocess.run(line, shell=True, **where, capture_output=True, text=True, timeout=100)
    assert done.stderr == f"status={CLOSED[command]}\n"
    if command[0] == "train.py":
        assert json.loads((checkout.folder / "runs/piped/result.json").read_text())["val_bpb"] > 0


# ---- Ctrl-C


def interrupted(
    checkout: Checkout, begun: Callable[[str], bool], *arguments: object, **more: str
) -> subprocess.CompletedProcess:
    """The result of a command that gets its terminal's Ctrl-C once `begun(output so far)`."""
    folder = checkout.folder.parent
    with open(folder / "out", "w", encoding="utf-8") as out, open(folder / "err", "w", encoding="utf-8") as err:
        where = {"cwd": checkout.folder, "env": environment(checkout.cache, **more), "start_new_session": True}
        process = subprocess.Popen(checkout.command(*arguments), **where, stdout=out, stderr=err)
        until = time.monotonic() + 60
        while not begun((folder / "out").read_text() + (folder / "err").read_text()):
            assert process.poll() is None, (folder / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(30)
    return subprocess.CompletedProcess([], status, (folder / "out").read_text(), (folder / "err").read_text())


def calm(done: subprocess.CompletedProcess) -> None:
    assert (done.returncode, done.stderr.count("\nstopped\n")) == (130, 1), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_an_interrupted_prepare_is_calm_and_what_was_prepared_stays(checkout):
    text = write_jsonl(checkout.folder.parent / "more.jsonl", documents(3000, seed=1))
    before = (checkout.cache / "current.json").read_text()
    flags = ("--preset", "offline", "--vocab", 600, "--files", text, "--no-fit")
    calm(interrupted(checkout, lambda output: "training the tokenizer" in output, "prepare.py", *flags))
    assert (checkout.cache / "current.json").read_text() == before


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_training_is_calm(checkout, processes, tmp_path):
    record = json.loads((checkout.cache / "current.json").read_text())
    record["preset"]["batch"] |= {"rows": 2, "processes": processes}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    where = {"AUTORESEARCH_SETTINGS": str(tmp_path / "settings.json")}
    calm(interrupted(checkout, lambda output: "step 0" in output, "train.py", "-v", "--no-score", **where))


def test_an_interrupted_scoring_is_calm_and_leaves_no_process(checkout):
    run = checkout.folder / "runs" / "scored"
    calm(interrupted(checkout, lambda _: (run / "score").is_dir(), "train.py", "--steps", 2, "--run-dir", run))
    time.sleep(0.5)
    assert subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True).stdout == ""


def test_an_interrupted_sample_is_calm(checkout, trained):
    done = interrupted(checkout, lambda said: "upon" in said, "prepare.py", "sample", "--tokens", 100000, "--count", 99)
    calm(done)
    assert done.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("attempt", range(8))  # one in seven hung in an import
def test_an_interrupted_doctor_is_calm(checkout, attempt):
    calm(interrupted(checkout, lambda said: "machine" in said, "prepare.py", "doctor"))


def test_an_interrupt_while_modules_are_imported_is_calm(checkout):
    code = "import lab, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], **checkout.where(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "\nstopped\n")  # a shell makes 130 of it


# ---- a night: -q, -v, report


@pytest.fixture(scope="module")
def loud_night(checkout):
    return run_loop(checkout, "loud", "-v", "--max-experiments", 0, "--rigor", "none")


@needs_sandbox
def test_a_verbose_night_tells_what_training_and_scorer_print(loud_night):
    assert len(re.findall(r"^[\d:]+ \| step 0000\d \(", loud_night.stdout, re.M)) >= 2  # of preflight and run
    assert len(re.findall(r"^[\d:]+ \| [\d,]+ bytes scored in", loud_night.stdout, re.M)) == 1


@needs_sandbox
def test_a_quiet_night_says_its_summary_alone(checkout, loud_night):
    quiet = run_loop(checkout, "loud", "-q", "--max-experiments", 0)
    assert [line.split()[0] for line in quiet.stdout.splitlines()[:4]] == ["loud:", "baseline", "incumbent", "noise"]
    assert (len(quiet.stdout.splitlines()), quiet.stderr) == (5, "")


@needs_sandbox
def test_a_nights_records_name_no_folder_user_or_machine(checkout, loud_night):
    folder = checkout.folder / "nights" / "loud"
    private = {str(checkout.folder.parent), str(Path.home()), sys.prefix, "u@localhost"}
    private |= {name for name in [socket.gethostname()] if len(name) > 5}
    texts = {name: (folder / name).read_text() for name in ("journal.jsonl", "results.tsv")}
    texts["report.html"] = report.page(report.collect(folder), None)
    texts["briefing.md"] = brief(Journal(folder).state, json.loads((folder / "settings.json").read_text()), "").render(
        9000
    )
    assert [(name, text) for name in texts for text in private if text in texts[name]] == []


@needs_sandbox
def test_an_interrupted_report_is_calm(checkout, loud_night):
    watch = ("--tag", "loud", "--watch", "--port", 0)
    calm(interrupted(checkout, lambda said: "serving night" in said, "agent_loop.py", "report", *watch))


# ---- -q and -v of prepare and train


def test_quiet_and_verbose_prepare(script, text_file):
    flags = ("--preset", "offline", "--vocab", 256, "--files", text_file)
    quiet = script("prepare.py", "-q", *flags)
    assert quiet.stderr == ""
    assert quiet.stdout.startswith("prepared offline, vocabulary 257")
    verbose = script("prepare.py", "-v", *flags).stdout
    assert verbose.startswith(quiet.stdout)
    assert "\nmatrix_lr = 0." in verbose


def test_quiet_and_verbose_train(checkout, trained):
    assert (trained.stdout[:12], trained.stderr) == ("---\nval_bpb:", "")
    verbose = checkout.python("train.py", "--steps", 2, "-v").stdout
    assert len(re.findall(r"^step 0000[01] \(", verbose, re.M)) == 2
    assert re.search(r"^[\d,]+ bytes scored in [\d.]+ s, task \w+$", verbose, re.M)


# ---- completion


@needs_tmux
def test_completion_in_a_real_bash(checkout):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Terminal(checkout.folder, environment(checkout.cache, PATH=path)) as shown:
        shown.type("source completion.sh; clear", "Enter")
        shown.type("python prepare.py sam", "Tab")
        shown.wait("prepare.py sample")
        shown.type("C-u", "python agent_loop.py run --age", "Tab")
        shown.wait("run --agent$")
        shown.type("hy", "Tab")
        shown.wait("--agent hybrid")
        shown.type("C-u", "python prog", "Tab")  # a file, as always
        shown.wait("python program.md")
