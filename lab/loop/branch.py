"""The branch of a night, in its own git worktree, so that the user's checkout is never touched.

A candidate is a commit on autoresearch/TAG that changes only train.py; keeping it leaves the branch there, discarding
it moves the branch back. Every operation can be repeated. Commits are created without the worktree, so that no filters
and hooks run. Before anything changes the worktree, `ensure` checks that it belongs to this night and this repository;
anything else in its place is moved aside, never removed.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.errors import UserError
from lab.files import inside, write_atomic
from lab.loop.git import branch, entry, git, named, repository, run, unfiltered, users

TAG = re.compile(r"(?!.*(\.\.|\.lock$|\.$))[A-Za-z0-9][A-Za-z0-9._-]{0,79}", re.ASCII)
COMMON = b"../..\n"  # git's content of commondir in .git/worktrees/NAME
TAG_RULE = "up to 80 letters, digits, dots, hyphens and underscores, starting with a letter or digit"


def check_tag(tag: str) -> str:
    """The tag. Raises UserError if it cannot name a folder and a branch."""
    if not TAG.fullmatch(tag):
        shown = ascii(tag if len(tag) < 40 else f"{tag[:40]}...")
        raise UserError(f"{shown} is not a valid tag; use {TAG_RULE}")
    return tag


@dataclass(frozen=True)
class Branch:
    """`repository` is the user's checkout, `worktree` the night's."""

    repository: Path
    worktree: Path
    name: str
    log: Callable[[str], None] = print

    def ensure(self, start: str) -> Path:
        """The worktree's entry in .git/worktrees. Creates branch (at commit `start`) and worktree if missing, repairs
        those that were moved, copied or lost. Raises UserError if that would touch anything that is not ours."""
        inside(self.worktree / ".git", self.repository)
        common, own = repository(self.repository), self.worktree / ".git"
        for checkout in {common, (self.repository / ".git").resolve()}:
            if branch(checkout) == self.ref:
                raise UserError(f"{self.name} is checked out in {self.repository}; run there: git switch -")
        self._restore(common, start)
        if not self._entry(common):
            if foreign(own):
                self._set_aside()
            if not self._link(common):
                self._set_aside()
                add = (*unfiltered(self.repository), "worktree", "add", "--quiet", str(self.worktree), self.name)
                git(self.repository, *add)
        if valid := self._entry(common):
            return valid
        raise UserError(f"{self.worktree} is not a worktree of {self.repository}; move it away, then run again")

    @property
    def ref(self) -> str:
        return f"refs/heads/{self.name}"

    @property
    def _head(self) -> bytes:
        """git's content of HEAD where the branch is checked out."""
        return f"ref: {self.ref}\n".encode()

    def _entry(self, common: Path) -> Path | None:
        """The entry in our repository, if it and this worktree point to each other."""
        own = self.worktree / ".git"
        other = entry(own)
        return other if other and other.parent == common / "worktrees" and named(other) == own.resolve() else None

    def _link(self, common: Path) -> bool:
        """Reconnect the worktree, or an empty folder, with its entry in our repository. False without an entry."""
        own = self.worktree / ".git"
        for candidate in sorted((common / "worktrees").glob("*")):
            other = named(candidate)
            if other != own.resolve() and branch(candidate) != self.ref:
                continue
            if other != own.resolve() and other and entry(other) == candidate:
                raise UserError(f"branch {self.name} is checked out in {other.parent}; choose another --tag")
            self.worktree.mkdir(parents=True, exist_ok=True)
            write_atomic(candidate / "gitdir", f"{own}\n")
            write_atomic(own, f"gitdir: {candidate}\n")
            return True
        return False

    def _set_aside(self) -> None:
        """Rename a folder in the worktree's place: it may belong to the user."""
        if self.worktree.is_dir() and any(self.worktree.iterdir()):
            spare = next(path for n in count(1) if not (path := self.worktree.with_name(f"worktree-{n}")).exists())
            self.worktree.rename(spare)
            self.log(f"{self.worktree} was not the worktree of this night; its content is now in {spare}")

    def _restore(self, common: Path, start: str) -> None:
        """Create the branch where it is missing, or a crash of the machine has emptied its file."""
        if not git(self.repository, "rev-parse", "--verify", "--quiet", f"{self.ref}^{{commit}}", check=False):
            (common / self.ref).unlink(missing_ok=True)
            git(self.repository, "update-ref", self.ref, start)

    @property
    def head(self) -> str:
        """The commit that the branch is on."""
        return git(self.repository, "rev-parse", "--verify", self.ref)

    def source(self, commit: str) -> str:
        """train.py of a commit."""
        return git(self.repository, "cat-file", "blob", f"{commit}:train.py", strip=False).replace("\r\n", "\n")

    def taken_back(self, source: str, commit: str) -> str:
        """`source` without what `commit` changed in train.py. Raises UserError if later changes overlap with it."""
        with TemporaryDirectory(prefix="take-back-") as folder:
            for name, text in (("now", source), ("after", self.source(commit)), ("before", self.source(f"{commit}^"))):
                Path(folder, name).write_text(text, encoding="utf-8")
            try:
                return run(Path(folder), "merge-file", "-p", "-q", "now", "after", "before").decode()
            except UserError:
                raise UserError("later changes overlap with it") from None

    def commit(self, source: str, message: str) -> str:
        """Commit this train.py to the branch, and return the commit. `reset` changes the worktree."""
        parent = self.head
        blob = git(self.repository, "hash-object", "-w", "--stdin", text=source)
        files = git(self.repository, "ls-tree", "-z", parent, strip=False)
        files = re.sub(r"(?<= blob )\w+(?=\ttrain\.py\0)", blob, files)
        tree = git(self.repository, "mktree", "-z", text=files)
        env = users(self.repository)
        commit = git(self.repository, "commit-tree", tree, "-p", parent, text=message, env=env)
        git(self.repository, "update-ref", self.ref, commit)
        self.source(commit)  # raises UserError if a `git gc` at this moment has removed a part
        return commit

    def reset(self, commit: str) -> None:
        """Reset the branch and its files to `commit`, whatever state they are in."""
        own = self.ensure(commit)
        common = own.parent.parent
        for lock in (own / "index.lock", own / "HEAD.lock", common / f"{self.ref}.lock"):
            lock.unlink(missing_ok=True)  # ours: one loop per branch, and this is it
        shared = own / "commondir"
        if not shared.is_file() or shared.read_bytes() != COMMON:
            write_atomic(shared, COMMON)
        head = own / "HEAD"
        if not head.is_file() or head.read_bytes() != self._head:
            write_atomic(head, self._head)
        put = (*unfiltered(self.worktree), "reset", "--quiet", "--hard", commit)
        try:
            git(self.worktree, *put)
        except UserError:
            (own / "index").unlink(missing_ok=True)  # a crash of the machine may have truncated it
            git(self.worktree, *put)
        git(self.worktree, "clean", "-fdq")


def foreign(own: Path) -> bool:
    """Whether this .git belongs to the checkout of another repository. A .git that points to nothing, or to the entry
    of another worktree, was moved or copied together with its folder."""
    other = entry(own)
    if other is None:
        return os.path.lexists(own)
    return other.is_dir() and named(other) in (None, own.resolve())
