"""git, called so that nothing inherited decides what it does: not the environment, not the user's configuration.

The repository is always named, never searched for: git would look for it in the folders above, and there may be one.
"""

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lab.errors import UserError

SECONDS = 300.0  # a checkout on a slow disk takes seconds
ADVICE = "clone the project with `git clone`, or there: git init && git add -A && git commit -m start"
# A repository's own configuration is read whatever the environment says, so each line here beats it.
SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.attributesFile": os.devnull,  # filters, line ends, diff drivers
    "core.excludesFile": os.devnull,
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.safecrlf": "false",
    "core.sparseCheckout": "false",
    "core.ignoreStat": "false",  # files would count as unchanged
    "core.fsync": "loose-object",  # the journal, which is synced, names them
    "core.quotePath": "false",
    "commit.gpgSign": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "submodule.recurse": "false",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "log.showSignature": "false",
    "color.ui": "false",
}
WHOM = ("AUTHOR", "COMMITTER")


def git(folder: Path, *arguments: str, text: str = "", check: bool = True, strip: bool = True,
        env: Mapping[str, str] | None = None) -> str:  # fmt: skip
    """What git prints for the checkout whose top is `folder`; `text` is its input. Raises UserError with git's reason
    when it fails, or, unless `check`, returns ""."""
    at = (f"--git-dir={folder / '.git'}", f"--work-tree={folder}")
    data = text.encode(errors="surrogateescape")  # names of files are bytes
    try:
        printed = run(folder, *at, *arguments, data=data, env=env).decode(errors="surrogateescape")
        return printed.strip() if strip else printed
    except UserError:
        if check:
            raise
        return ""


def run(folder: Path, *arguments: str, data: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
    """What git prints, started in `folder`, in a session of its own: a keyboard's Ctrl-C is not for it, and it can ask
    nobody for a password. Raises UserError when it fails or takes too long."""
    settings = [word for key, value in SETTINGS.items() for word in ("-c", f"{key}={value}")]
    command = [word.encode(errors="surrogateescape") for word in ("git", *settings, *arguments)]  # whatever the locale
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=env or environment(), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError as error:
        missing = "git is not installed; the loop keeps its history in it" if folder.is_dir() else f"{folder} is gone"
        raise UserError(missing) from error
    with process:
        try:
            printed, told = process.communicate(data, SECONDS)
        except BaseException as error:
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"git took longer than {SECONDS:.0f} s in {folder}; run again") from None
            raise
    if process.returncode:
        raise UserError(f"git failed in {folder}: {_reason(told.decode(errors='replace'), process.returncode)}")
    return printed


def _reason(told: str, status: int) -> str:
    """git's own: its first error, else its last line."""
    lines = told.strip().splitlines() or [f"exit status {status}"]
    return next((line for line in lines if line.startswith(("error: ", "fatal: "))), lines[-1])


def inherited() -> dict[str, str]:
    """The environment without what would point git into another repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def environment(name: str = "autoresearch", email: str = "autoresearch@localhost") -> dict[str, str]:
    """git's: no configuration of user or machine, nobody to ask, and this identity, so that none is searched for."""
    identity = {f"GIT_{who}_{key}": value for who in WHOM for key, value in (("NAME", name), ("EMAIL", email))}
    none = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    nobody = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "false", "GIT_EDITOR": "false", "GIT_PAGER": "cat"}
    return inherited() | identity | none | nobody | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


def users(folder: Path) -> dict[str, str]:
    """The environment for a commit by the user, where git knows name and address; else ours."""
    at = (f"--git-dir={folder / '.git'}", "config", "--get")
    try:
        known = [run(folder, *at, key, env=inherited()).decode().strip() for key in ("user.name", "user.email")]
    except (UserError, UnicodeDecodeError):
        return environment()
    return environment(*known) if all(re.search(r"\w", value) for value in known) else environment()


def unfiltered(folder: Path) -> list[str]:
    """Settings for what writes files: they turn off the filters that this repository's info/attributes may ask for."""
    at = (f"--git-dir={folder / '.git'}", "config", "--name-only", "--get-regexp", r"^filter\.")
    try:
        keys = os.fsdecode(run(folder, *at)).splitlines()
    except UserError:  # there are none
        return []
    return [word for key in keys for word in ("-c", f"{key}={'false' if key.endswith('.required') else ''}")]


def branch(folder: Path) -> str:
    """The full name of the branch that the git folder of a checkout is on, "" without one."""
    try:
        return os.fsdecode(run(folder, f"--git-dir={folder}", "symbolic-ref", "--quiet", "HEAD")).strip()
    except UserError:
        return ""


def repository(checkout: Path) -> Path:
    """git's folder of this checkout, shared by its worktrees. Raises UserError unless the checkout's top is this folder
    and it has a commit: one that was unpacked, or copied from a worktree, has no repository of its own."""
    own = checkout / ".git"
    told = UserError(f"{checkout} has no git repository of its own, in which a night keeps its history; {ADVICE}")
    at = ("--git-dir=.git", "rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir")
    try:
        top, folder, common = ((checkout / path).resolve() for path in os.fsdecode(run(checkout, *at)).splitlines())
    except UserError as error:
        raise (error if own.is_dir() else told) from None
    if top != checkout.resolve() or (folder != common and named(folder) != own.resolve()):
        raise told
    if not git(checkout, "rev-parse", "--verify", "--quiet", "HEAD", check=False):
        raise UserError(f"the repository of {checkout} has no commit yet; there: git add -A && git commit -m start")
    return common


def named(entry: Path) -> Path | None:
    """The .git file of the worktree that an entry in a repository is of."""
    return _pointer(entry / "gitdir", entry)


def entry(own: Path) -> Path | None:
    """The entry that a worktree's .git file names."""
    return _pointer(own, own.parent, "gitdir: ") if own.is_file() and not own.is_symlink() else None


def _pointer(file: Path, relative_to: Path, prefix: str = "") -> Path | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return (relative_to / text.strip().removeprefix(prefix)).resolve()
