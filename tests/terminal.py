"""A real terminal for tests: a tmux server of its own, keys to press, and the screen as a person sees it."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed (apt-get install tmux)")


class Terminal:
    """A shell in a tmux session; use as a context manager."""

    def __init__(self, folder: Path, env: dict[str, str], columns: int = 80, rows: int = 30):
        self.folder, self.columns, self.rows = folder, columns, rows
        self.env = {key: text for key, text in env.items() if not key.startswith("TMUX")}
        self.socket = f"autoresearch-test-{os.getpid()}-{time.monotonic_ns()}"

    def tmux(self, *words: object) -> str:
        command = ["tmux", "-L", self.socket, "-f", "/dev/null", *map(str, words)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def __enter__(self) -> "Terminal":
        size = ("-x", self.columns, "-y", self.rows)
        self.tmux("new-session", "-d", *size, "-c", self.folder, "bash --norc --noprofile")
        return self

    def __exit__(self, *_: object) -> None:
        self.tmux("kill-server")

    def run(self, *words: object) -> None:
        """Type a command; when it ends, its exit status is on the screen."""
        self.type(shlex.join(map(str, words)) + "; echo status=$?", "Enter")

    def type(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def resize(self, columns: int) -> None:
        self.tmux("resize-window", "-x", columns, "-y", self.rows)

    def screen(self, colours: bool = False) -> str:
        return self.tmux("capture-pane", "-p", *(["-e"] if colours else [])).rstrip()

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """The screen once `pattern` is on it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if re.search(pattern, screen := self.screen()):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} never came:\n{screen}")

    def cursor_is_shown(self) -> bool:
        return self.tmux("display", "-p", "#{cursor_flag}").strip() == "1"
