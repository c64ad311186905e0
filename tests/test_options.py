"""Every option of every command with values that nobody means: one line, an exit status, nothing left behind."""

import io
import re
from pathlib import Path

import click
import pytest
from checkout import git
from conftest import ROOT

import agent_loop
import prepare
import train
from lab.loop import session
from lab.training.run import execute, guarded

LONG = "x" * 300
NUMBERS = ("", "nan", "inf", "-1", "1e400", "0x10", "٣.٥.", LONG, "1,5", "\udcff", "9" * 5000)
WHOLE = (*NUMBERS, "1.5", "1e3")
PATHS = ("", "missing/folder", LONG, "\udcff\udcfe")
TAGS = ("", ".", "..", "a/b", "a b", "-x", "--", LONG, "\udcff", "a\nb", "\x1b[2J", "x.lock", "ü")
RUNS = ("README.md", "presets", "/dev/null", *PATHS)

# (command, option or argument, values). "{}" stands for the value where it is no option.
TABLE = [
    ("prepare", "--preset", ("", "absent", "../presets/offline", "offline.toml", ".", "Offline", "\udcff", LONG)),
    ("prepare", "--vocab", (*WHOLE, "0", "299", "65537", str(10**30))),
    ("prepare", "--seq", (*WHOLE, "0", "7", str(10**30))),
    ("prepare", "--files", ("", "missing.txt", "missing/*.txt", "docs", "LICENSE", "README.md", "/dev/null", "a\nb")),
    ("prepare", "--files", ("\udcff", LONG, "[", "**/*.none")),
    ("prepare", "--files presets/offline.toml --val-files", ("", "missing.txt", "docs")),
    ("prepare", "--val-files", ("", "README.md")),
    ("prepare", "extra", ("",)),
    ("prepare score", "{}", RUNS),
    ("prepare score presets --batches", "{}", (*WHOLE, "0")),
    ("prepare score presets --sandbox", "{}", ("", "chroot", "NONE", LONG)),
    ("prepare score presets --text", "{}", ("", "train", "VAL", LONG)),
    ("prepare evidence --minutes", "{}", (*NUMBERS, "0", "10081")),
    ("prepare evidence --check", "{}", ("", "absent.tar.gz", "docs", "README.md", LONG)),
    ("prepare sample", "{}", RUNS),
    ("prepare sample", "--tag", (*TAGS, "absent")),
    ("prepare sample presets --tokens", "{}", (*WHOLE, "0")),
    ("prepare sample presets --temperature", "{}", NUMBERS),
    ("prepare sample presets --top-k", "{}", WHOLE),
    ("prepare sample presets --seed", "{}", (*WHOLE, str(2**64))),
    ("prepare sample presets --count", "{}", (*WHOLE, "0")),
    ("prepare sample presets --export", "{}", ("", "README.md", "docs", "new", LONG)),
    ("prepare clean", "{}", ("", "absent", "../..", "/", "prepared", LONG, "\udcff")),
    ("prepare clean --runs", "{}", ("", "absent", "../..", "/", "runs", "runs/..", LONG)),
    ("prepare doctor", "{}", ("extra",)),
    ("agent run", "--tag", TAGS),
    ("agent run --agent search --tag t --preset", "{}", ("", " ")),
    ("agent run --tag t --minutes", "{}", (*NUMBERS, "0", "10081")),
    ("agent run --tag t --rigor", "{}", ("", "none ", LONG)),
    ("agent run --tag t --sandbox", "{}", ("", "docker")),
    ("agent run --tag t --agent", "{}", ("", "gpt", LONG)),
    ("agent run --tag t --agent command --command", "{}", ("", "  ")),
    ("agent run --tag t --llm-share", "{}", (*NUMBERS, "1.01", "-0.1")),
    ("agent run --tag t --max-experiments", "{}", WHOLE),
    ("agent run --tag t --until", "{}", ("", "25:00", "7", "07:00:00", "-1", "nan", LONG, "\udcff", "24:00")),
    ("agent try --tag absent -m", "{}", ("", " ")),
    ("agent try -m x --tag", "{}", TAGS),
    ("agent status --tag", "{}", (*TAGS, "absent")),
    ("agent confirm --tag", "{}", (*TAGS, "absent")),
    ("agent confirm --until", "{}", ("", "25:00", "7", "nan")),
    ("agent skip --tag", "{}", (*TAGS, "absent")),
    ("agent suggest X --tag", "{}", (*TAGS, "absent")),
    ("agent run --tag t --agent openai --base-url", "{}", ("ftp://x", "\udcff")),
    ("agent report --tag", "{}", (*TAGS, "absent")),
    ("agent report --port", "{}", (*WHOLE, "65536")),
    ("agent replay", "{}", (*WHOLE, "0", str(10**30))),
    ("agent replay 0 --tag", "{}", (*TAGS, "absent")),
    ("agent replay 0 --seed", "{}", (*WHOLE, str(2**64))),
    ("train", "--minutes", (*NUMBERS, "0", "10081")),
    ("train", "--steps", (*WHOLE, "0", str(10**30))),
    ("train", "--seed", (*WHOLE, str(2**64))),
    ("train --steps 1 --run-dir", "{}", ("", ".", "README.md", "lab/../.", "/dev/null/x", LONG)),
]  # fmt: skip


def words(command: str, option: str, value: str) -> list[str]:
    """A command line with this value."""
    flags = [*command.split(), *([] if option == "{}" else option.split())]
    return [*flags, value]


CASES = [words(command, option, value) for command, option, values in TABLE for value in values]


@pytest.fixture
def place(monkeypatch, tmp_path, prepared) -> Path:
    """A checkout with text prepared and no nights, as the current folder."""
    monkeypatch.chdir(ROOT)
    user = tmp_path / "repo"
    user.mkdir()
    git(user, "init", "--quiet")
    git(user, "commit", "--quiet", "--allow-empty", "-m", "start")
    monkeypatch.setattr(session, "ROOT", user)
    monkeypatch.setattr(session, "NIGHTS", user / "nights")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def ended(arguments: list[str], monkeypatch, capfd) -> tuple[int, str, str]:
    """Exit status, output and errors of a command, run in this process as its script runs it."""
    script, *rest = arguments
    command = {"prepare": prepare.command, "agent": agent_loop.command}.get(script)
    if script == "agent" and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]  # not the group, which would change this process
    monkeypatch.setattr("sys.argv", [f"{script}.py", *rest])
    monkeypatch.setattr("lab.training.run.outlast_reader", lambda: None)
    monkeypatch.setattr(prepare, "outlast_reader", lambda: None)
    code = 0
    try:
        execute(train.main, train.__file__) if script == "train" else guarded(command)
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    out, err = capfd.readouterr()
    return (1, out, err + code) if isinstance(code, str) else (code, out, err)


def there(place: Path) -> set[str]:
    """Everything in the checkout, the cache and the nights."""
    ours = {path for name in ("runs", "nights", "presets", "prepared") for path in (ROOT / name).rglob("*")}
    return {str(path) for path in (*ours, *ROOT.glob("*"), *place.rglob("*")) if "users" not in path.parts}


def test_values_that_nobody_means(place, monkeypatch, capfd):
    wrong = []
    before = there(place)
    for case in CASES:
        status, out, err = ended(case, monkeypatch, capfd)
        lines = [line for line in err.splitlines() if not re.match(r"Usage: |Try '|$|warning: no sandbox", line)]
        clean = len(lines) == 1 and re.match(r"[eE]rror: ", lines[0]) and lines[0].isprintable()
        if status not in (1, 2) or not clean or (out and "clean" not in case) or there(place) != before:
            wrong.append((case, status, out[:200], err[-300:], sorted(there(place) ^ before)))
    assert wrong == [], "\n".join(map(str, wrong))


def test_the_table_has_every_option():
    tried = " ".join(f"{command} {option}" for command, option, _ in TABLE)
    commands = [*prepare.command.commands.values(), *agent_loop.command.commands.values(), prepare.command]
    options = [option for command in commands for option in command.params if isinstance(option, click.Option)]
    taking = [option for option in options if not option.is_flag and option.name != "verbosity"]
    missing = [option.opts for option in taking if not any(flag in tried.split() for flag in option.opts)]
    assert missing == [["--prompt"], ["--out"], ["--model"]]  # any text is one, or a place for a file
