"""The branch of a night: a git worktree of its own, so that the user's checkout is never touched.

A candidate is a commit on autoresearch/TAG that changes train.py alone; keeping it leaves the branch there, discarding
it moves the branch back. Every operation can be repeated without harm.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.files import write_atomic


@dataclass(frozen=True)
class Branch:
    """`repository` is the user's checkout, `worktree` the night's."""

    repository: Path
    worktree: Path
    name: str

    def ensure(self, start: str) -> None:
        """Create branch (at commit `start`) and worktree where they are missing; mend a worktree that was lost."""
        if (self.worktree / ".git").exists():
            return
        shutil.rmtree(self.worktree, ignore_errors=True)
        git(self.repository, "worktree", "prune")
        exists = git(self.repository, "branch", "--list", self.name)
        create = [self.name] if exists else ["-b", self.name, start]
        at = [str(self.worktree), *create] if exists else [*create[:2], str(self.worktree), create[2]]
        git(self.repository, "worktree", "add", "--quiet", *at)

    @property
    def head(self) -> str:
        """The commit that the branch is on."""
        return git(self.worktree, "rev-parse", "HEAD")

    def source(self, commit: str) -> str:
        """train.py of a commit."""
        return git(self.worktree, "show", f"{commit}:train.py", strip=False)

    def commit(self, source: str, message: str) -> str:
        """Commit this train.py on the branch; the new commit."""
        write_atomic(self.worktree / "train.py", source)
        git(self.worktree, "add", "train.py")
        identity = ["-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost"]
        given = git(self.worktree, "config", "user.email", check=False)
        git(self.worktree, *([] if given else identity), "commit", "--quiet", "--no-verify", "-m", message)
        return self.head

    def reset(self, commit: str) -> None:
        """Put the branch and its files on `commit`, whatever state a kill left them in."""
        lock = Path(git(self.worktree, "rev-parse", "--absolute-git-dir"), "index.lock")
        lock.unlink(missing_ok=True)  # ours: one loop per branch, and this is it
        git(self.worktree, "checkout", "--quiet", "--force", self.name)
        git(self.worktree, "reset", "--quiet", "--hard", commit)
        git(self.worktree, "clean", "-fdq")


def git(folder: Path, *arguments: str, check: bool = True, strip: bool = True) -> str:
    """What git prints. Raises UserError with git's own last line when it fails."""
    try:
        words = [argument.encode(errors="surrogateescape") for argument in arguments]  # in an ASCII locale too
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise UserError("git is not installed; the loop keeps its history in it") from None
    if check and done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {arguments[0]} failed in {folder}: {line}")
    return done.stdout.strip() if strip else done.stdout
