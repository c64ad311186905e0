"""Writing files so that a kill at any moment leaves either the old content or the new, never half of it."""

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lab.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # this checkout


def cache_root() -> Path:
    """Folder of everything prepared: $AUTORESEARCH_CACHE, or ~/.cache/autoresearch."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def register() -> None:
    """Let the cache know this checkout, whose nights may need what is prepared in it."""
    users = cache_root() / "users"
    with suppress(OSError):  # who may not write here may not remove either
        users.mkdir(parents=True, exist_ok=True)
        (users / "since").open("x").close()
    with suppress(OSError):
        name = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:16]
        write_atomic(users / f"{name}.path", os.fsencode(ROOT))


def checkouts() -> list[Path]:
    """This checkout and the others that use the cache, as far as they are still there."""
    known = [Path(os.fsdecode(path.read_bytes())) for path in (cache_root() / "users").glob("*.path")]
    return sorted({ROOT, *(path for path in known if path.is_dir())})


def recorded_since() -> float:
    """When the cache began to know who uses it, in seconds since 1970."""
    return (cache_root() / "users" / "since").stat().st_mtime


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write `content` under a temporary name beside `path`, sync it, then rename it into place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path | str, line: str) -> None:
    """Append one line in a single write and sync it. Starts a new line first if the last one was cut short."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if cut else b"") + line.encode() + b"\n"
        if os.write(descriptor, data) < len(data):  # a disk that fills up takes a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(path: Path, folder: Path) -> Path:
    """`path`, which must lie below `folder`, with no link on the way. Raises UserError where one leads out."""
    parent = path.parent
    if parent.resolve() != folder.resolve() / parent.relative_to(folder):
        raise UserError(f"{parent} leads out of {folder} by a link, which is not followed; put a folder in its place")
    return path


def remove(path: Path, folder: Path) -> None:
    """Remove what is at `path`, if anything: a file, a link, a whole folder. Raises UserError unless it lies inside
    `folder`."""
    inside(path, folder)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
