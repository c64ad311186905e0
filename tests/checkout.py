"""A user's clone with a tiny model prepared, for tests that run the loop in it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, documents, edit, environment, write_jsonl

from lab.loop.journal import Journal

MINUTES = "0.02"
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # whoever runs the tests has settings of their own


def git(folder: Path, *arguments: object) -> str:
    """What git prints in `folder`, whatever the environment and configuration of whoever runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    known = ("-c", "user.name=u", "-c", "user.email=u@localhost")
    command = ["git", *known, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=kept | GIT, capture_output=True, text=True, check=True
    ).stdout.strip()


class Checkout:
    """A git repository with the project's files, as a user's clone, and a tiny model prepared if not told otherwise."""

    def __init__(self, folder: Path, prepared: bool = True):
        self.folder, self.cache = folder / "repo", folder / "cache"
        for name in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        self.git("init", "--quiet", "-b", "main")
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", "start")
        if prepared:
            self.prepare(folder)

    def prepare(self, folder: Path) -> None:
        text = write_jsonl(folder / "text.jsonl", documents(400))
        self.python("prepare.py", "--no-fit", "--preset", "offline", "--vocab", "256", "--seq", "64", "--files", text)
        current = self.cache / "current.json"
        preset = json.loads(current.read_text())["preset"]
        preset["model"] |= {"depth": 2, "width": 64, "head_dim": 32}
        preset["batch"] |= {"rows": 4, "tokens_per_step": 256, "processes": 1}
        edit(current, preset=preset)

    def at(self, folder: Path) -> "Checkout":
        """This checkout, with its cache, at another place: to be moved or copied there."""
        other = copy.copy(self)
        other.folder = folder
        return other

    def git(self, *arguments: str) -> str:
        return git(self.folder, *arguments)

    def python(self, *arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
        where = self.where() | {"env": self.where()["env"] | variables}
        done = subprocess.run(self.command(*arguments), **where, capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def where(self) -> dict:
        return {"cwd": self.folder, "env": environment(self.cache)}

    def night(self, tag: str) -> Journal:
        return Journal(self.folder / "nights" / tag)


def run_loop(checkout: Checkout, tag: str, *flags: object, check: bool = True) -> subprocess.CompletedProcess:
    return checkout.python(
        "agent_loop.py", "run", "--agent", "search", "--tag", tag, "--minutes", MINUTES, *flags, check=check
    )


def attempt(checkout: Checkout, tag: str, change) -> subprocess.CompletedProcess:
    """`try` with a changed train.py in the night's worktree; one run decides."""
    path = checkout.folder / "nights" / tag / "worktree" / "train.py"
    path.write_text(change(path.read_text()))
    return checkout.python("agent_loop.py", "try", "--tag", tag, "--rigor", "none", "-m", "cheat", check=False)
