"""git, called independently of the environment and of the user's configuration.

The repository is always passed explicitly: otherwise git would search the parent folders, and might find another one.
"""

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage

from lab.errors import UserError

ROOM = 1 << 20  # bytes; with less free, git's failures are due to the disk, which its messages do not always say
SECONDS = 300.0  # a checkout on a slow disk takes seconds
ADVICE = "clone the project with `git clone`, or run there: git init && git add -A && git commit -m start"
# git always reads a repository's own configuration; these override it.
SETTINGS = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.attributesFile": os.devnull,  # filters, line ends, diff drivers
    "core.excludesFile": os.devnull,
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.safecrlf": "false",
    "core.sparseCheckout": "false",
    "core.ignoreStat": "false",  # true makes files count as unchanged
    "core.fsync": "loose-object",  # the journal, which is synced, refers to them
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
ROLES = ("AUTHOR", "COMMITTER")


def git(folder: Path, *arguments: str, text: str = "", check: bool = True, strip: bool = True,
        env: Mapping[str, str] | None = None) -> str:  # fmt: skip
    """The output of git for the checkout at `folder`; `text` is its input. On failure raises UserError with git's
    reason, or returns "" without `check`."""
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
    """The output of git, run in `folder` in its own session: Ctrl-C does not reach it, and it cannot prompt for a
    password. Raises UserError when it fails or takes too long."""
    settings = [word for key, value in SETTINGS.items() for word in ("-c", f"{key}={value}")]
    command = [word.encode(errors="surrogateescape") for word in ("git", *settings, *arguments)]  # whatever the locale
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=env or environment(), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError as error:
        missing = "git is not installed; install it, then run again"
        raise UserError(missing if folder.is_dir() else f"the folder {folder} does not exist") from error
    with process:
        try:
            printed, errors = process.communicate(data, SECONDS)
        except BaseException as error:
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"git took longer than {SECONDS:.0f} s in {folder}; run again") from None
            raise
    if process.returncode:
        reason = _reason(errors.decode(errors="replace"), process.returncode)
        full = "; No space left on device: free disk space, then run again" * (disk_usage(folder).free < ROOM)
        raise UserError(f"git failed in {folder}: {reason}{full}")
    return printed


def _reason(errors: str, status: int) -> str:
    """git's first error, else the last line that it printed."""
    lines = errors.strip().splitlines() or [f"exit status {status}"]
    return next((line for line in lines if line.startswith(("error: ", "fatal: "))), lines[-1])


def inherited() -> dict[str, str]:
    """The environment without git's variables, which could point it to another repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def environment(name: str = "autoresearch", email: str = "autoresearch@localhost") -> dict[str, str]:
    """Environment for git: no configuration of user or system, no prompts, and this identity."""
    identity = {f"GIT_{role}_{key}": value for role in ROLES for key, value in (("NAME", name), ("EMAIL", email))}
    no_configuration = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    no_prompts = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "false", "GIT_EDITOR": "false", "GIT_PAGER": "cat"}
    return inherited() | identity | no_configuration | no_prompts | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


def users(folder: Path) -> dict[str, str]:
    """The environment for a commit by the user if git is configured with name and email, else by our default."""
    at = (f"--git-dir={folder / '.git'}", "config", "--get")
    try:
        known = [run(folder, *at, key, env=inherited()).decode().strip() for key in ("user.name", "user.email")]
    except (UserError, UnicodeDecodeError):
        return environment()
    return environment(*known) if all(re.search(r"\w", value) for value in known) else environment()


def unfiltered(folder: Path) -> list[str]:
    """Options that turn off the repository's filters, for commands that write files."""
    at = (f"--git-dir={folder / '.git'}", "config", "--name-only", "--get-regexp", r"^filter\.")
    try:
        keys = os.fsdecode(run(folder, *at)).splitlines()
    except UserError:  # no filters are configured
        return []
    return [word for key in keys for word in ("-c", f"{key}={'false' if key.endswith('.required') else ''}")]


def branch(folder: Path) -> str:
    """The full name of the branch that this git folder has checked out, "" without one."""
    try:
        at = folder if folder.is_dir() else folder.parent  # the .git of a worktree is a file
        return os.fsdecode(run(at, f"--git-dir={folder}", "symbolic-ref", "--quiet", "HEAD")).strip()
    except UserError:
        return ""


def repository(checkout: Path) -> Path:
    """The git folder of this checkout, shared by its worktrees. Raises UserError unless `checkout` is the top of a
    repository with a commit; an unpacked archive or a copy of a worktree is not."""
    own = checkout / ".git"
    missing = UserError(f"{checkout} is not a separate git repository, which a night needs; {ADVICE}")
    folders = ("--show-toplevel", "--absolute-git-dir", "--git-common-dir")
    try:
        printed = run(checkout, "--git-dir=.git", "rev-parse", *folders, "--revs-only", "HEAD")
        lines = os.fsdecode(printed).splitlines()
        top, folder, common = ((checkout / path).resolve() for path in lines[: len(folders)])
    except UserError as error:
        raise (error if own.is_dir() else missing) from None
    if top != checkout.resolve() or (folder != common and named(folder) != own.resolve()):
        raise missing
    if len(lines) == len(folders):
        raise UserError(f"the repository {checkout} has no commit yet; run there: git add -A && git commit -m start")
    return common


def named(entry: Path) -> Path | None:
    """The .git file of the worktree that belongs to an entry in .git/worktrees."""
    return _pointer(entry / "gitdir", entry)


def entry(own: Path) -> Path | None:
    """The entry in .git/worktrees that a worktree's .git file points to."""
    return _pointer(own, own.parent, "gitdir: ") if own.is_file() and not own.is_symlink() else None


def _pointer(file: Path, relative_to: Path, prefix: str = "") -> Path | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return (relative_to / text.strip().removeprefix(prefix)).resolve()
