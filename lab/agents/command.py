"""An agent that runs a command: a coding CLI or a script.

The command runs in a temporary git repository with train.py, program.md, briefing.md and the untried files of ideas/,
and edits train.py. Its hypothesis is the text of hypothesis.txt, or else the last line of its output. A proposal that
changes another file is rejected by name; dot files are ignored. The command runs with your environment and permissions,
without a sandbox. When it exits, takes too long or prints too much, all its descendants are ended
(lab/trial/supervise.py). A rejected change goes back to the command, twice at most.
"""

import os
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from lab.agents.briefing import Briefing, NoProposal, Tried
from lab.errors import UserError, one_line
from lab.files import sha256
from lab.loop import git
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import Rejected, read_source
from lab.trial.sandbox import launcher

REPAIRS = 2  # how often a rejected change goes back to the command
BRIEFING_TOKENS = 20_000
MAX_OUTPUT = 10_000_000  # bytes; a tool that prints more is in a loop
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL
HYPOTHESIS = "hypothesis.txt"
ALLOWED = ("train.py", HYPOTHESIS)
TASK = """You are asked for one experiment. Edit train.py in this directory, and nothing else, so that the model
reaches a lower val_bpb in the same time. Do not train: the laboratory runs and judges your train.py when you stop.
Write one line on why it should help to hypothesis.txt.

"""


class Command:
    """Proposals by `command`, which /bin/sh runs in the temporary repository: 'mytool "$(cat briefing.md)"'."""

    name = "command"

    def __init__(self, command: str, seconds: float = 600.0, log: Callable[[str], None] = lambda line: None) -> None:
        if not command.strip():
            raise UserError("--agent command needs a command; set it with --command")
        self.command, self.seconds, self.log = command, seconds, log

    def propose(self, briefing: Briefing) -> Proposal:
        """Raises NoProposal when the command fails or takes too long, or when its last repair is rejected too."""
        for attempt in range(1 + REPAIRS):
            with tempfile.TemporaryDirectory(prefix="autoresearch-", ignore_cleanup_errors=True) as folder:
                scratch = Path(folder)
                before = self._lay_out(scratch, briefing)
                printed = self._run(scratch)
                try:
                    return self._read(scratch, before, printed, briefing)
                except Rejected as reason:
                    self.log(f"command, attempt {attempt + 1} of {1 + REPAIRS}: {reason}")
                    kept = read_source(scratch / "train.py", otherwise=briefing.source)
                    briefing = replace(briefing, refused=str(reason), refused_source=kept)
        raise NoProposal(f"the command's change was rejected {1 + REPAIRS} times; last reason: {briefing.refused}")

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """Does nothing: the next briefing lists the outcome."""

    def _lay_out(self, scratch: Path, briefing: Briefing) -> dict[str, str]:
        """Write the command's files; a repair starts from the rejected train.py. Returns the files' digests."""
        files = {
            "train.py": briefing.refused_source or briefing.source,
            "program.md": briefing.program,
            "briefing.md": TASK + briefing.render(BRIEFING_TOKENS, code=""),
        } | {f"ideas/{idea.name}.toml": idea.text for idea in briefing.untried_ideas()}
        for name, text in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8", newline="\n")
        _commit(scratch)
        return _digests(scratch)

    def _run(self, scratch: Path) -> str:
        """Run the command until it and all its descendants are gone. Returns the end of its output."""
        supervisor = [*launcher("lab.trial.supervise", "supervise"), str(GRACE_SECONDS)]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [*supervisor, "/bin/sh", "-c", self.command],
                cwd=scratch,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=git.inherited(),
                start_new_session=True,
            )
            try:
                reason = self._watch(process, output)
            finally:
                process.stdin.close()  # the supervisor ends whatever is left
                process.send_signal(signal.SIGCONT)  # it may be stopped
                process.wait()
            printed = _tail(output)
        if reason or process.returncode:
            reason = reason or f"exited with status {process.returncode}"
            raise NoProposal(f"the command {reason}: {one_line(_last_line(printed), 120)}")
        return printed

    def _watch(self, process: subprocess.Popen, output: BinaryIO) -> str:
        """Wait for the command. Returns why it must be ended, or "" if it exited."""
        deadline = time.monotonic() + self.seconds
        while process.poll() is None:
            if time.monotonic() > deadline:
                return f"took longer than {self.seconds:.0f} s"
            if os.fstat(output.fileno()).st_size > MAX_OUTPUT:
                return f"printed more than {MAX_OUTPUT // 10**6} MB"
            time.sleep(0.05)
        return ""

    def _read(self, scratch: Path, before: dict[str, str], printed: str, briefing: Briefing) -> Proposal:
        after = _digests(scratch)
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if others := [name for name in names if name not in ALLOWED]:
            raise Rejected(f"changes {one_line(', '.join(others), 120)}; only train.py may change")
        source = read_source(scratch / "train.py")
        check(source, briefing.source, briefing.tried, briefing.settings)
        edit = describe(source, briefing.source, briefing.settings, briefing.ideas)
        hypothesis = read_source(scratch / HYPOTHESIS, otherwise="").strip() or _last_line(printed) or in_words(edit)
        return Proposal(source, hypothesis, self.name, edit)


def _commit(scratch: Path) -> None:
    """Make it a git repository with one commit: several coding CLIs refuse to work outside one."""
    git.run(scratch, "init", "--quiet", "--template=")
    git.git(scratch, "add", "-A")
    git.git(scratch, "commit", "--quiet", "-m", "incumbent")


def _digests(scratch: Path) -> dict[str, str]:
    """Relative path -> digest of each file, without dot files and Python's caches; links are not followed."""
    digests = {}
    for folder, folders, files in os.walk(scratch):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            path = Path(folder, name)
            if not name.startswith("."):
                digests[str(path.relative_to(scratch))] = _digest(path)
    return digests


def _digest(path: Path) -> str:
    status = path.lstat()
    plain = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_OUTPUT
    return sha256(path) if plain else f"{stat.filemode(status.st_mode)} {status.st_size}"


def _tail(output: BinaryIO, size: int = 20_000) -> str:
    """The end of the output."""
    output.seek(max(0, os.fstat(output.fileno()).st_size - size))
    return output.read().decode("utf-8", "replace")


def _last_line(printed: str) -> str:
    return printed.strip().rpartition("\n")[2]
