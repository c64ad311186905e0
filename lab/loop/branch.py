"""The branch of a night: a git worktree of its own, so that the user's checkout is never touched.

A candidate is a commit on autoresearch/TAG that changes train.py alone; keeping it leaves the branch there, discarding
it moves the branch back. Every operation can be repeated without harm. Commits are made without the worktree, whose
filters and hooks they would pass. Before anything acts on the worktree, `ensure` proves that it is this night's, of
this repository; what it finds in its place that is not is set aside, never removed.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lab.errors import UserError
from lab.files import inside, write_atomic
from lab.loop.git import branch, entry, git, named, repository, unfiltered, users

TAG = re.compile(r"(?!.*(\.\.|\.lock$|\.$))[A-Za-z0-9][A-Za-z0-9._-]{0,79}", re.ASCII)
TAG_RULE = "up to 80 letters, digits, dots, hyphens and underscores, a letter or digit first"


def check_tag(tag: str) -> str:
    """The tag. Raises UserError for one that cannot name a folder and a branch."""
    if not TAG.fullmatch(tag):
        shown = ascii(tag if len(tag) < 40 else f"{tag[:40]}...")
        raise UserError(f"{shown} cannot be the tag of a night; take {TAG_RULE}")
    return tag


@dataclass(frozen=True)
class Branch:
    """`repository` is the user's checkout, `worktree` the night's."""

    repository: Path
    worktree: Path
    name: str
    log: Callable[[str], None] = print

    def ensure(self, start: str) -> Path:
        """git's entry of the worktree. Creates branch (at commit `start`) and worktree where they are missing, and
        mends a worktree that was moved, copied or lost. Raises UserError where that would touch what is not ours."""
        inside(self.worktree / ".git", self.repository)
        common, own = repository(self.repository), self.worktree / ".git"
        for checkout in (common, self.repository / ".git"):
            if branch(checkout) == self.ref:
                raise UserError(f"{self.name} is checked out in {self.repository}; there: git switch -")
        if not self._entry(common):
            if foreign(own):
                self._set_aside()
            if not self._link(common):
                self._set_aside()
                self._add(start)
        if found := self._entry(common):
            return found
        raise UserError(f"{self.worktree} is no worktree of {self.repository}; move it away")

    @property
    def ref(self) -> str:
        return f"refs/heads/{self.name}"

    def _entry(self, common: Path) -> Path | None:
        """The entry in our repository that names this worktree and that it names."""
        own = self.worktree / ".git"
        found = entry(own)
        return found if found and found.parent == common / "worktrees" and named(found) == own.resolve() else None

    def _link(self, common: Path) -> bool:
        """Join the worktree, or an empty folder, with its entry in our repository again. False without an entry."""
        own = self.worktree / ".git"
        for found in sorted((common / "worktrees").glob("*")):
            other = named(found)
            if other != own.resolve() and branch(found) != self.ref:
                continue
            if other != own.resolve() and other and entry(other) == found:
                raise UserError(f"branch {self.name} is checked out in {other.parent}; choose another --tag")
            self.worktree.mkdir(parents=True, exist_ok=True)
            write_atomic(found / "gitdir", f"{own}\n")
            write_atomic(own, f"gitdir: {found}\n")
            return True
        return False

    def _set_aside(self) -> None:
        """Keep what is in the worktree's place under another name: nobody knows whose it is."""
        if self.worktree.is_dir() and any(self.worktree.iterdir()):
            spare = next(path for n in count(1) if not (path := self.worktree.with_name(f"worktree-{n}")).exists())
            self.worktree.rename(spare)
            self.log(f"{self.worktree} was no worktree of this night; what it held is in {spare}")

    def _add(self, start: str) -> None:
        exists = git(self.repository, "rev-parse", "--verify", "--quiet", self.ref, check=False)
        create = [str(self.worktree), self.name] if exists else ["-b", self.name, str(self.worktree), start]
        git(self.repository, *unfiltered(self.repository), "worktree", "add", "--quiet", *create)

    @property
    def head(self) -> str:
        """The commit that the branch is on."""
        return git(self.repository, "rev-parse", "--verify", self.ref)

    def source(self, commit: str) -> str:
        """train.py of a commit."""
        return git(self.repository, "cat-file", "blob", f"{commit}:train.py", strip=False).replace("\r\n", "\n")

    def commit(self, source: str, message: str) -> str:
        """Commit this train.py on top of the branch, which `reset` moves; the new commit."""
        parent = self.head
        blob = git(self.repository, "hash-object", "-w", "--stdin", text=source)
        files = git(self.repository, "ls-tree", "-z", parent, strip=False)
        files = re.sub(r"(?<= blob )\w+(?=\ttrain\.py\0)", blob, files)
        tree = git(self.repository, "mktree", "-z", text=files)
        env = users(self.repository)
        return git(self.repository, "commit-tree", tree, "-p", parent, text=message, env=env)

    def reset(self, commit: str) -> None:
        """Put the branch and its files on `commit`, whatever state a kill or anybody else left them in."""
        own = self.ensure(commit)
        common = own.parent.parent
        for lock in (own / "index.lock", own / "HEAD.lock", common / f"{self.ref}.lock"):
            lock.unlink(missing_ok=True)  # ours: one loop per branch, and this is it
        if branch(own) != self.ref:
            write_atomic(own / "HEAD", f"ref: {self.ref}\n")
        put = (*unfiltered(self.worktree), "reset", "--quiet", "--hard", commit)
        try:
            git(self.worktree, *put)
        except UserError:
            (own / "index").unlink(missing_ok=True)  # a crash of the machine may have cut it
            git(self.worktree, *put)
        git(self.worktree, "clean", "-fdq")


def foreign(own: Path) -> bool:
    """Whether this .git is of another repository's checkout. One that names nothing, or the entry of another worktree,
    was moved or copied together with its folder."""
    found = entry(own)
    if found is None:
        return os.path.lexists(own)
    return found.is_dir() and named(found) in (None, own.resolve())
