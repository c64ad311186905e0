"""The journal of a night: journal.jsonl, append-only, one JSON object per line. All other state is folded from it.

Every line has "n" (1, 2, 3 ... without gaps), "time" (ISO 8601, UTC) and "event"; lab.loop.history.FIELDS lists each
event's other fields, and State there is the fold. The events of an experiment, and what a kill -9 leaves before each:

    proposal   The commit exists, and the branch is on it. Killed before: the next step moves the branch back, and no
               time was spent on it.
    run        One training run and its score, valid or not. Its name (e0007-r2: experiment 7, second run) follows
               from the journal alone. Killed before: if results/<name>.json is whole, the loop records it instead of
               running again; if not, it deletes the run's folder and runs. A name is recorded once.
    timed      The candidate's speed against the incumbent's, timed in turn, or null where that failed; before verdicts,
               at most three times. Killed before: it is timed again.
    verdict    Written before git acts on it. "again" names who runs next.
    kept, discarded, crashed
               Close the experiment. The branch follows before the next step that reads its files.
    skipped    Closes it before its verdict, as discarded, because a person asked for that. Its runs so far stay; a run
               that was ended for it is not recorded.

So a resumed loop gets the next step from `State.step()`, sets the branch to `State.head()`, and continues. "refused" is
a proposal that failed its checks and did not become an experiment; "start" is the first event of a night; "note" is
anything else worth recording. Experiment 0 is the baseline; if it crashes, the next one is. A run with status "invalid"
(the machine slept, throttled or swapped) is repeated under the next name; the loop limits the repeats, and then records
a crash with "spoiled". A crash of the candidate settles it; if the incumbent crashes when it runs again, it does not
run again during this experiment.

A line that a kill cut short was never acted on: readers ignore it and a writer removes it. Any other damage is an
error, since `n` shows that something is missing and "check", a checksum of the line, that something has changed
(journals of earlier versions have none). One writer at a time: hold `lock` around a Journal that records.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import append_line, sealed, unsealed, write_atomic
from lab.loop.history import Experiment, State

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


class Journal:
    """journal.jsonl of one night, and its fold. `Journal(folder)` reads; only `record` writes."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.path = self.folder / "journal.jsonl"
        self.state = State()
        self.size = 0  # of the file, bytes, without an incomplete last line
        for line in _lines(self.path):
            record = _parse(line, self.state.n + 1, self.path)
            try:
                self.state.check(record["event"], record)
            except ValueError as error:
                raise UserError(f"{self.path}: event {record['n']} is invalid: {error}") from error
            self.state.apply(record)
            self.size += len(line)
        self.opened = self.path.stat().st_size if self.path.exists() else 0

    def record(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one event, synced to the disk, then fold it in."""
        self.state.check(event, fields)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"n": self.state.n + 1, "time": time, "event": event, **fields}
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors="replace").decode()
        record = json.loads(text)  # as every reader will see it
        line = json.dumps(sealed(record), ensure_ascii=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_partial_line()
        append_line(self.path, line)
        self.size = self.opened = self.path.stat().st_size
        self.state.apply(record)
        return record

    def _drop_partial_line(self) -> None:
        """Remove an incomplete last line: its writer was killed before it counted. Raises UserError if the file is not
        as this object read or wrote it: what is appended to it could not be read again."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.opened:
            raise UserError(f"{self.path} was changed by another program; restore it, then run again")
        if size > self.size:
            os.truncate(self.path, self.size)

    def write_results(self) -> None:
        """Rewrite results.tsv: upstream's five columns, one row per settled experiment."""
        rows = [_row(e) for e in self.state.experiments if e.status != "pending"]
        write_atomic(self.folder / "results.tsv", HEADER + "".join(rows))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events in order, without an incomplete last line. Raises UserError where one is missing."""
    for n, line in enumerate(_lines(path), 1):
        yield _parse(line, n, path)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines, without a last one that was cut short: one that lacks a newline and is no whole JSON either."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") or _begins_with_json(line):
                yield line


def _begins_with_json(line: bytes) -> bool:
    with suppress(ValueError):
        return bool(json.JSONDecoder().raw_decode(line.decode(errors="replace")))
    return False


def _parse(line: bytes, n: int, path: Path) -> dict[str, Any]:
    try:
        record = unsealed(json.loads(line))
        if type(record["n"]) is int and record["n"] == n and isinstance(record["event"], str):
            return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: line {n} is not event {n}; restore the file, or start another night with --tag")


def _row(experiment: Experiment) -> str:
    crashed = experiment.status == "crash" or experiment.val_bpb is None  # None: skipped before its verdict
    value = 0.0 if crashed else experiment.val_bpb
    memory = 0.0 if crashed else experiment.memory_gb
    fields = (experiment.commit[:7], f"{value:.6f}", f"{memory:.1f}", experiment.status, experiment.title)
    return "\t".join(fields) + "\n"


@contextmanager
def lock(path: Path | str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel releases it when its holder ends. UserError if another process has it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            raise UserError(f"{path} is held by process {pid}; wait for it, or stop it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
