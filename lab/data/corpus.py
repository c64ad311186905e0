"""Where documents come from: the hub, the user's own files, or the built-in stories.

`open_corpus` gives the training and validation documents of a preset as plain strings in a fixed order, and the
identity that determines them. No training document is ever equal to a validation document: either a fixed share of all
documents, chosen by hash of the text, is validation (stories, and files without validation files), or training
documents that occur in validation are dropped (files with them, and the hub). Reading is in lab/data/documents.py,
downloading in lab/data/hub.py. Not covered: near duplicates.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lab.data import hub
from lab.data.documents import READERS, digest, read_documents
from lab.data.hub import Progress
from lab.errors import UserError
from lab.files import sha256
from lab.preset import Data

HELD_OUT = 20  # one document in 20 is validation where it is chosen by hash
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".br")


@dataclass(frozen=True)
class Corpus:
    """Documents and what determines them: equal identities mean equal documents in equal order."""

    identity: dict[str, Any]  # JSON-able
    train: Callable[[], Iterator[str]]  # whole documents, at most train_bytes of UTF-8 but at least one document
    val: Callable[[], Iterator[str]]  # every candidate in order, without an end for the built-in stories


def open_corpus(data: Data, progress: Progress | None = None) -> Corpus:
    """The documents of a preset; downloads what is missing from the hub. Raises UserError."""
    sources = {"hub": _hub, "files": _files, "stories": _stories}
    return sources[data.source](data, progress or (lambda label, done, total: None))


def _held_out(text: str) -> bool:
    return int.from_bytes(digest(text)[:8]) % HELD_OUT == 0


def _within(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Whole documents until the next one would exceed `limit` bytes; always the first one."""
    used = 0
    for text in texts:
        size = len(text.encode())
        if used and used + size > limit:
            return
        used += size
        yield text


def _some(texts: Iterable[str], message: str) -> Iterator[str]:
    """The same documents; raises UserError if there are none."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise UserError(message)


def _hub(data: Data, progress: Progress) -> Corpus:
    kept = hub.fetch(data, progress)
    return Corpus(kept.identity, partial(read_documents, kept.train, "text"), partial(read_documents, kept.val, "text"))


def _stories(data: Data, progress: Progress) -> Corpus:
    from lab.data import stories, story_plots, story_words

    grammar = [sha256(module.__file__) for module in (stories, story_plots, story_words)]
    identity = {"source": "stories", "grammar": grammar, "seeds": [1, 2], "train_bytes": data.train_bytes}
    train = partial(_one_side, stories.stories, seed=1, held_out=False)
    return Corpus(identity, lambda: _within(train(), data.train_bytes), partial(_one_side, stories.stories, 2, True))


def _one_side(stories: Callable[[int], Iterator[str]], seed: int, held_out: bool) -> Iterator[str]:
    """Stories of one seed that are, or are not, held out: a story of both seeds is on one side only."""
    return (text for text in stories(seed) if _held_out(text) == held_out)


def _files(data: Data, progress: Progress) -> Corpus:
    if not data.train_files:
        raise UserError("no training file matches; give FILES='folder/*.parquet' (parquet, jsonl or txt)")
    state = _state(data)
    described = {split: [_described(path) for path in paths] for split, paths in _splits(data)}
    identity = {"source": "files", "field": data.text_field, "train_bytes": data.train_bytes, **described}
    names = ", ".join(Path(path).name for path in data.train_files[:3]) + ("" if len(data.train_files) < 4 else ", ...")
    no_train = f"{names}: no training document; every document is empty, held out or validation"
    no_val = f"no validation document for {names}; give VAL_FILES=, or more documents"
    return Corpus(
        identity,
        lambda: _unchanged(_some(_within(_training(data), data.train_bytes), no_train), data, state),
        lambda: _unchanged(_some(_validation(data), no_val), data, state),
    )


def _state(data: Data) -> dict[str, tuple[int, int] | None]:
    """Size and time of the last change of every file; None for a missing file."""
    state: dict[str, tuple[int, int] | None] = {}
    for path in (*data.train_files, *data.val_files):
        state[path] = None
        with suppress(OSError):
            status = os.stat(path)
            state[path] = status.st_size, status.st_mtime_ns
    return state


def _unchanged(texts: Iterable[str], data: Data, state: dict[str, tuple[int, int] | None]) -> Iterator[str]:
    """The same documents; raises UserError at the end if a file has changed: its digest names what is prepared."""
    yield from texts
    now = _state(data)
    if changed := [path for path in state if state[path] != now[path]]:
        raise UserError(f"{changed[0]} changed while it was read; run again once it is complete")


def _splits(data: Data) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ("train", data.train_files), ("val", data.val_files)


def _training(data: Data) -> Iterator[str]:
    if not data.val_files:
        return (text for text in read_documents(data.train_files, data.text_field) if not _held_out(text))
    seen = {digest(text) for text in read_documents(data.val_files, data.text_field)}
    return (text for text in read_documents(data.train_files, data.text_field) if digest(text) not in seen)


def _validation(data: Data) -> Iterator[str]:
    if data.val_files:
        return read_documents(data.val_files, data.text_field)
    return (text for text in read_documents(data.train_files, data.text_field) if _held_out(text))


def _described(path: str) -> dict[str, Any]:
    """Name, size and digest of a readable file of a supported type."""
    suffix = Path(path).suffix.lower()
    if suffix in COMPRESSED:
        raise UserError(f"{path}: compressed; decompress it first")
    if suffix not in READERS:
        raise UserError(f"{path}: unknown file type; use {', '.join(READERS)}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise UserError(f"{path}: not a regular file; write its content to a file first")
        size = os.path.getsize(path)
        if size == 0:
            raise UserError(f"{path}: the file is empty; remove it or leave it out of FILES")
        return {"name": Path(path).name, "bytes": size, "sha256": sha256(path)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check FILES and the permissions") from None
