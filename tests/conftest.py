"""What the tests share: a cache of their own, the checkout's scripts as real processes, and texts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from loopback_server import Page

from lab.data import stories

# Two BLAS threads on a core that another test keeps busy wait for each other: ten times slower than one.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
# tests/fuzz: some seconds of the same inputs in `make test`, many new ones in `make fuzz`. The folders of a
# test may stay the same for every input.
FUZZ = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("short", derandomize=True, max_examples=60, stateful_step_count=30, **FUZZ)
settings.register_profile("long", max_examples=5000, stateful_step_count=100, print_blob=True, **FUZZ)
settings.load_profile("short")
ROOT = Path(__file__).resolve().parent.parent
PROGRESS = ("training the tokenizer", "tokenizing")  # what prepare.py says on stderr while it works
Script = Callable[..., subprocess.CompletedProcess]


def pytest_configure() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it; helpers that import this module may want that


def environment(cache: Path, **more: str) -> dict[str, str]:
    """This process's environment for a child that may touch `cache` only."""
    ours = ("AUTORESEARCH_", "COLUMNS", "LINES")  # pytest-xdist sets the width; a terminal has its own
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return inherited | {"AUTORESEARCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | more


def run_script(cache: Path, *arguments: object, timeout: float = 100, **more: str) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGUMENTS...` from the checkout, as a user would type it there; fitting only if asked."""
    script, *flags = map(str, arguments)
    if script == "prepare.py" and "--fit" not in flags and not {"score", "sample", "doctor", "clean"} & set(flags):
        flags = ["--no-fit", *flags]
    return subprocess.run(
        [sys.executable, script, *flags],
        cwd=ROOT, env=environment(cache, **more), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def refusal(process: subprocess.CompletedProcess) -> str:
    """The one line with which a command refused, after checking that it said nothing else but progress."""
    lines = process.stderr.splitlines()
    assert process.returncode > 0, f"not refused: {process.stdout}{process.stderr}"
    assert "Traceback" not in process.stdout + process.stderr, process.stderr
    assert lines, "refused without a word"
    assert lines[-1].startswith("error: "), process.stderr
    assert [line for line in lines[:-1] if not line.startswith(PROGRESS)] == []
    return lines[-1]


def documents(count: int, seed: int = 7) -> list[str]:
    return list(islice(stories.stories(seed), count))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def edit(path: Path, **changes: object) -> None:
    """Change keys of settings; without their checksum, which would not match, they are like an earlier version's."""
    record = json.loads(path.read_text("utf-8")) | changes
    record.pop("check", None)
    path.write_text(json.dumps(record), "utf-8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet. Every test has one: none may touch the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(folder))
    monkeypatch.delenv("AUTORESEARCH_SETTINGS", raising=False)
    return folder


@pytest.fixture
def script(cache: Path) -> Script:
    """Run a script of the checkout with this test's cache: script("prepare.py", "--preset", "offline")."""
    return lambda *arguments, **more: run_script(cache, *arguments, **more)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 stories, 0.3 MB; about 20 of them are held out."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "stories.jsonl", documents(400))


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A cache in which `text_file` is prepared with 300 tokens. Never written to: see `prepared`."""
    folder = tmp_path_factory.mktemp("prepared")
    done = run_script(folder, "prepare.py", "--preset", "offline", "--vocab", 300, "--files", text_file)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def prepared(prepared_once: Path, cache: Path) -> Path:
    """This test's own copy of `prepared_once`: the folder with the manifest, in this test's cache."""
    shutil.copytree(prepared_once, cache)
    current = cache / "current.json"
    folder = Path(json.loads(current.read_text())["prepared"].replace(str(prepared_once), str(cache)))
    edit(current, prepared=str(folder))
    return folder


@pytest.fixture
def page():
    """Starts other programs on ports of their own; see Page."""
    pages = []

    def start(*arguments) -> Page:
        pages.append(Page(*arguments))
        return pages[-1]

    yield start
    for each in pages:
        each.stop()
