"""Atomic writes, so that a kill at any moment leaves the old content or the new; and the folders of the cache."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import subprocess
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from lab.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # this checkout


def cache_root() -> Path:
    """The cache folder, of all prepared data: $AUTORESEARCH_CACHE, or ~/.cache/autoresearch."""
    try:
        return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")
    except RuntimeError:
        raise UserError("no home folder is known; set AUTORESEARCH_CACHE to a folder") from None


def without_places(text: str) -> str:
    """`text` without the paths of this checkout, the cache and the home folder: they often name the user."""
    home = os.path.expanduser("~")
    for place, short in ((ROOT, "."), (os.environ.get("AUTORESEARCH_CACHE"), "cache"), (home, "~")):
        for path in {str(place), os.path.realpath(place)} - {"/", "~"} if place else ():
            text = text.replace(path, short)
    return text


def make_cache() -> None:
    """Make the cache folder, without what killed processes left in it. Raises UserError when that is not possible."""
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {cache_root()} ({error.strerror}); set AUTORESEARCH_CACHE to another folder"
        ) from None
    for leftover in [*cache_root().glob(".*.tmp"), *cache_root().glob("users/.*.tmp")]:
        if (pid := leftover.name.split(".")[-2]).isdigit() and _ended(int(pid)):
            leftover.unlink(missing_ok=True)


def _ended(pid: int) -> bool:
    """Whether the process is gone that `write_atomic` named a temporary file after."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def register() -> None:
    """Record this checkout in the cache as a user of it: its nights may need the data prepared there."""
    users = cache_root() / "users"
    with suppress(OSError):  # without write access nothing can be removed either
        users.mkdir(parents=True, exist_ok=True)
        (users / "since").open("x").close()
    with suppress(OSError):
        name = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:16]
        write_atomic(users / f"{name}.path", os.fsencode(ROOT))


def checkouts() -> list[Path]:
    """This checkout and the others recorded in the cache that still exist."""
    recorded = [Path(os.fsdecode(path.read_bytes())) for path in (cache_root() / "users").glob("*.path")]
    return sorted({ROOT, *(path for path in recorded if path.is_dir())})


def recorded_since() -> float:
    """When the cache started to record its users, in seconds since 1970; inf if it cannot be written."""
    with suppress(OSError):
        return (cache_root() / "users" / "since").stat().st_mtime
    return math.inf


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write `content` under a temporary name beside `path`, sync it, then rename it into place."""
    path = Path(path)
    # An experiment may have left a link or a FIFO in this folder: a name that it cannot know, and a new file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path | str, line: str) -> None:
    """Append one line in a single write and sync it. Starts a new line first if the last one is incomplete."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        incomplete = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if incomplete else b"") + line.encode() + b"\n"
        if os.write(descriptor, data) < len(data):  # a full disk takes only a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with a checksum of the rest as its last key: a bit that flips on the disk is noticed by `unsealed`."""
    rest = _without_check(record)
    return rest | {"check": _checksum(rest)}


def unsealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record without its checksum; one without, of an earlier version, as it is. Raises ValueError if it is
    damaged."""
    rest = _without_check(record)
    if "check" in record and record["check"] != _checksum(rest):
        raise ValueError("the checksum differs")
    return rest


def read_sealed(path: Path) -> dict[str, Any]:
    """The record of a JSON file; {} without one that is whole."""
    try:
        return unsealed(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError):
        return {}


def _without_check(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "check"}


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"


def inside(path: Path, folder: Path) -> Path:
    """`path`, which must be below `folder` without a link in between. Raises UserError if a link leads out of it."""
    parent = path.parent
    if parent.resolve() != folder.resolve() / parent.relative_to(folder):
        raise UserError(f"{parent} leads outside {folder} through a link; replace the link with a folder")
    return path


def remove(path: Path, folder: Path) -> None:
    """Remove the file, link or whole folder at `path`, if it exists. Raises UserError unless it is inside `folder`."""
    inside(path, folder)
    if path.is_dir() and not path.is_symlink():
        _remove_tree(path)
        if path.exists():
            raise UserError(f"{path} cannot be removed; allow writing there, then run again")
    else:
        path.unlink(missing_ok=True)


def _remove_tree(folder: Path) -> None:
    """Python's rmtree fails on what a run may leave: folders 1,000 deep, or closed ones. The system's commands do not,
    and neither follows a link."""
    with suppress(OSError, RecursionError):
        return shutil.rmtree(folder)
    for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL)


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
