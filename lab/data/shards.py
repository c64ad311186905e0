"""Prepared data: documents -> tokenizer.json, train-*.npy, val.npy, test.npy and a manifest, in a folder of the cache.

The folder is named by preset, vocabulary and a digest of everything that determines its content. Each file is written
atomically and recorded in shards.jsonl, so that an interrupted preparation resumes where it stopped; the manifest is
written last, and without it the folder is incomplete. Shards are flat uint16 token arrays; <|bos|> starts every
document. One process per core encodes them, a few shards at a time, so memory does not grow with the text.

val.npy is what every verdict looks at. test.npy is as much text again, the validation documents that follow: only the
confirmation of a night scores it. A source with too few documents has none.

The task fingerprint is a digest of the scored text, the context length and the budget, and of nothing else.
"""

import dataclasses
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lab import quota
from lab.data.tokens import Tokenizer, train_tokenizer
from lab.errors import UserError
from lab.files import append_line, cache_root, register, sealed, sha256, unsealed, write_atomic
from lab.preset import Preset

if TYPE_CHECKING:
    from lab.data.corpus import Corpus

FORMAT = 1  # increment it when the same text would give other shards
SHARD_BYTES = 8 * 2**20  # UTF-8 bytes of text per shard
SAMPLE_BYTES = 8_000_000  # of text that the tokenizer is trained on
ENCODE_DOCUMENTS = 512  # documents per call to the tokenizer library

NAMES = re.compile(r"train-\d+\.npy|(val|test)\.npy|tokenizer\.json")  # of the files
NO_COUNTS = {"documents": 0, "bytes": 0, "tokens": 0}
PARTS = ("train", "val", "tokenizer")  # of a manifest; an experiment opens only train and cannot read the held-out text
HELD_OUT = ("val", "test")

Progress = Callable[[str, int, int], None]  # (label, bytes done, total bytes)


class Shard(NamedTuple):
    """The entry of a token file in the manifest."""

    name: str
    documents: int
    bytes: int  # of UTF-8 text
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A complete folder of prepared data."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    @cached_property
    def train(self) -> list[np.ndarray]:
        """The training shards: flat uint16 memory maps."""
        return [np.load(self.folder / s["name"], mmap_mode="r") for s in self.manifest["train"]]

    @cached_property
    def val(self) -> np.ndarray:
        return self.held_out("val")

    def held_out(self, part: str) -> np.ndarray:
        """(tokens,) uint16: the documents of "val" or "test", concatenated, <|bos|> before each."""
        return np.load(self.folder / self.manifest[part]["name"])

    @property
    def has_test(self) -> bool:
        """False if the source has no documents left for it, or it was prepared by an earlier version."""
        return bool(self.manifest.get("test"))

    def fingerprint(self, sequence_length: int, minutes: float, steps: int | None = None) -> str:
        """Identifies the task: scored text, context and budget. Results of different tasks are never compared."""
        task = [self.manifest["val_text_sha256"], sequence_length, float(minutes), steps]
        return hashlib.sha256(json.dumps(task).encode()).hexdigest()[:12]

    def damaged(self, parts: tuple[str, ...] = PARTS) -> list[str]:
        """Names of files that are missing or do not match the manifest."""
        parts = (*parts, "test") if "val" in parts and self.has_test else parts
        listed = {part: self.manifest[part] for part in parts}
        entries = [e for entry in listed.values() for e in (entry if isinstance(entry, list) else [entry])]
        paths = [(entry["name"], self.folder / entry["name"], entry["sha256"]) for entry in entries]
        return [name for name, path, digest in paths if not path.is_file() or sha256(path) != digest]


def open_prepared(folder: Path, parts: tuple[str, ...] = PARTS) -> Prepared:
    """The data in `folder`, after a check of `parts`. Raises UserError if one is missing or damaged."""
    if not (folder / "manifest.json").is_file():
        raise UserError(f"nothing is prepared in {folder}; run `make prepare`")
    prepared = Prepared(folder, _manifest(folder))
    if damaged := prepared.damaged(parts):
        raise UserError(f"damaged in {folder}: {', '.join(damaged)}; `make prepare` rebuilds it")
    return prepared


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises UserError if it is damaged."""
    try:
        manifest = unsealed(json.loads((folder / "manifest.json").read_bytes()))
        for entry in (*manifest["train"], manifest["val"], NO_COUNTS | manifest["tokenizer"]):
            _shard(entry)
        numbers = [manifest["vocab_size"], *(manifest["totals"][key] for key in NO_COUNTS)]
        if all(type(number) is int for number in numbers) and isinstance(manifest["val_text_sha256"], str):
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"damaged in {folder}: manifest.json; `make prepare` rebuilds it")


def _shard(entry: Any) -> Shard:
    """The entry of a file as it is recorded. Raises ValueError or TypeError if it is damaged."""
    shard = Shard(**entry)
    counts = all(type(number) is int and 0 <= number < 2**63 for number in shard[1:4])
    if not counts or not NAMES.fullmatch(shard.name) or not isinstance(shard.sha256, str):
        raise ValueError("damaged")
    return shard


def prepare(preset: Preset, corpus: "Corpus", progress: Progress) -> tuple[Prepared, list[str]]:
    """Tokenizer and shards of `corpus` in the cache, and the names of the damaged files that were rebuilt.

    Does nothing if they are complete and undamaged. Raises UserError if there is too little text."""
    vocabulary = preset.tokenizer.vocab_size
    decides = {"format": FORMAT, "text": corpus.identity, "vocab_size": vocabulary, "val": preset.data.val_bytes}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_root() / "prepared" / f"{preset.name}-v{vocabulary}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    register()
    with _locked(folder):
        rebuilt = []
        if (folder / "manifest.json").exists():
            try:
                rebuilt = Prepared(folder, _manifest(folder)).damaged()
            except UserError:
                rebuilt = ["manifest.json"]
            if not rebuilt and "test" in _manifest(folder):
                return open_prepared(folder), []
            if rebuilt:  # else an earlier version prepared it, without a test text, and it is in use
                (folder / "manifest.json").unlink()
        for leftover in folder.glob(".*.tmp"):  # from a killed preparation
            leftover.unlink()
        _build(folder, preset, corpus, decides, progress)
        return open_prepared(folder), rebuilt


def _build(folder: Path, preset: Preset, corpus: "Corpus", decides: dict[str, Any], progress: Progress) -> None:
    done = _finished_shards(folder)
    tokenizer_path = folder / "tokenizer.json"
    if done.pop("tokenizer.json", None) is None:
        progress("training the tokenizer", 0, 0)
        tokenizer = train_tokenizer(_first_bytes(corpus.train(), SAMPLE_BYTES), preset.tokenizer.vocab_size)
        write_atomic(tokenizer_path, tokenizer.to_json())
        _record(folder, Shard("tokenizer.json", 0, 0, 0, sha256(tokenizer_path)))
    tokenizer = Tokenizer.load(tokenizer_path)

    val_texts, test_texts = held_out_documents(corpus.val(), preset.data.val_bytes)
    val = _write_shard(folder, "val.npy", val_texts, tokenizer)
    test = _write_shard(folder, "test.npy", test_texts, tokenizer)._asdict() if test_texts else None
    total = 0 if preset.data.source == "files" else preset.data.train_bytes  # the user's files may hold less
    train = list(_write_train(folder, corpus.train(), total, done, progress))
    if not train:
        raise UserError("no training documents in the source; choose other files with FILES=")
    manifest = {
        "preset": preset.name,
        "vocab_size": tokenizer.vocab_size,
        "decides": decides,
        "tokenizer": {"name": "tokenizer.json", "sha256": sha256(tokenizer_path)},
        "val": val._asdict(),
        "test": test,
        "val_text_sha256": hashlib.sha256("\0".join(val_texts).encode()).hexdigest(),
        "train": [shard._asdict() for shard in train],
        "totals": {key: sum(getattr(shard, key) for shard in train) for key in ("documents", "bytes", "tokens")},
        "versions": {"numpy": np.__version__, "tokenizers": version("tokenizers")},
    }
    write_atomic(folder / "manifest.json", json.dumps(sealed(manifest), indent=1))


def held_out_documents(documents: Iterable[str], limit: int) -> tuple[list[str], list[str]]:
    """The first whole documents of at most `limit` UTF-8 bytes together, and as much from those that follow. Raises
    UserError if none fits."""
    documents = iter(documents)
    val = _fitting(documents, limit)
    if not val:
        raise UserError(
            f"no validation document fits in val_bytes = {limit}: the source has too few documents, or they are too "
            "long; choose other files with VAL_FILES="
        )
    scored = set(val)
    return val, _fitting((text for text in documents if text not in scored), limit)


def _fitting(documents: Iterator[str], limit: int) -> list[str]:
    """Skips documents until one fits, then stops at the first that does not."""
    chosen, total = [], 0
    for text in documents:
        size = len(text.encode())
        if total + size <= limit:
            chosen.append(text)
            total += size
        elif chosen:
            break
    return chosen


def _write_shard(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> Shard:
    """Encode `texts`, write folder/name atomically, and return its entry."""
    starts = range(0, len(texts), ENCODE_DOCUMENTS)
    tokens = np.concatenate([a for at in starts for a in tokenizer.encode(texts[at : at + ENCODE_DOCUMENTS])])
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    write_atomic(folder / name, buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return Shard(name, len(texts), sum(len(text.encode()) for text in texts), len(tokens), digest)


def _write_train(
    folder: Path, documents: Iterator[str], total: int, done: dict[str, Shard], progress: Progress
) -> Iterator[Shard]:
    """Encode the groups of documents that are not `done`, one process per core; yield all entries in order."""
    workers = quota.cores()
    read = 0
    pending: deque[Shard | Future[Shard]] = deque()

    def finished() -> Shard:
        shard = pending.popleft()
        if isinstance(shard, Future):
            shard = shard.result()
            _record(folder, shard)
        return shard

    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (folder / "tokenizer.json",)
    ) as pool:
        for number, (texts, size) in enumerate(_groups(documents)):
            name = f"train-{number:05d}.npy"
            pending.append(done[name] if name in done else pool.submit(_work, folder, name, texts))
            read += size
            if len(pending) > workers + 1:
                yield finished()
            progress("tokenizing", read, total)
        while pending:
            yield finished()
    progress("tokenizing", read, read)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    _worker_tokenizer = Tokenizer.load(tokenizer)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:  # else the workers of a killed parent would wait forever
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(folder: Path, name: str, texts: list[str]) -> Shard:
    return _write_shard(folder, name, texts, _worker_tokenizer)


def _groups(documents: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Groups of documents of SHARD_BYTES together (the last document may exceed it), with their size in bytes."""
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text.encode())
        if size >= SHARD_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _first_bytes(documents: Iterator[str], limit: int) -> Iterator[str]:
    for text in documents:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text


def _record(folder: Path, shard: Shard) -> None:
    append_line(folder / "shards.jsonl", json.dumps(sealed(shard._asdict())))


def _finished_shards(folder: Path) -> dict[str, Shard]:
    """Whole shards of an interrupted preparation. Incomplete lines and damaged files are skipped and done again."""
    done: dict[str, Shard] = {}
    path = folder / "shards.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            shard = _shard(unsealed(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
        file = folder / shard.name
        if file.is_file() and sha256(file) == shard.sha256:
            done[shard.name] = shard
    return done


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: a second preparation waits."""
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
