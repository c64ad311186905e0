"""List and remove prepared data and checkpoints. What a night or the next training needs is never removed.

Of a run only the checkpoint and scratch files go: its source, settings, steps and result stay. Kept whole are the
NEWEST in runs/ and the best of each task, and in a night what was kept and what is not settled.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lab import files
from lab.errors import UserError
from lab.files import ROOT, cache_root, checkouts, recorded_since, register
from lab.interface.sample import result
from lab.loop.history import Experiment
from lab.loop.journal import Journal, lock
from lab.training.run import current_path
from lab.trial.runner import leftovers

NEWEST = 5  # runs of runs/ that stay whole
MADE = (
    "checkpoint.safetensors",
    "score",
    "tmp",
    "__pycache__",
)  # by training and scoring: all else there is the user's


@dataclass(frozen=True)
class Entry:
    """One folder of the cache, or one run."""

    name: str
    path: Path
    bytes: int  # that removing it frees
    kept: str = ""  # why it is not removed

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:10,.1f} MB  {self.name}" + (f"  (kept: {self.kept})" if self.kept else "")


def listing() -> list[Entry]:
    """Folders of the cache, largest first."""
    needed = _needed()
    folders = [
        path
        for part in ("prepared", "text", "hub")
        for path in (cache_root() / part).glob("*")
        if path.is_dir() and not path.is_symlink()
    ]
    return _largest_first(
        Entry(f"{path.parent.name}/{path.name}", path, _size([path]), needed(path.resolve())) for path in folders
    )


def remove(names: tuple[str, ...], everything: bool) -> str:
    """Remove these entries, or every prepared folder that nobody needs; what was done. Downloaded text goes only by
    name: it may not be had again. So does what is older than the record of who uses it. UserError names what cannot be
    removed."""
    register()
    entries = listing()
    whole = [entry for entry in entries if everything and _ready(entry)]
    known = {entry.name for entry in whole if (entry.path / "manifest.json").stat().st_mtime >= recorded_since()}
    chosen = _chosen(entries, names, known)
    for entry in chosen:
        files.remove(entry.path, entry.path.parent)
    rest = [entry.name for entry in whole if not entry.kept and entry not in chosen]
    hint = f"; NAMES='{' '.join(rest)}' removes data that nights of other checkouts may need" if rest else ""
    return _told(chosen) + hint


def runs() -> list[Entry]:
    """Runs with a checkpoint, in runs/ and of every night, largest first."""
    with _nights_at_rest() as resting:
        return _runs(resting)


def remove_checkpoints(names: tuple[str, ...], everything: bool) -> str:
    """Remove the checkpoints of these runs, or of all that are not kept; what was done. A night that is running is
    left alone, and none can begin meanwhile. UserError names what cannot be removed."""
    with _nights_at_rest() as resting:
        entries = _runs(resting)
        chosen = _chosen(entries, names, {entry.name for entry in entries if everything})
        for entry in chosen:
            for part in _parts(entry.path):
                files.remove(part, ROOT)
        return _told(chosen)


def _chosen(entries: list[Entry], names: tuple[str, ...], others: set[str]) -> list[Entry]:
    """The entries of these names, and those of `others` that are not kept. Raises UserError for a wrong name."""
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            raise UserError(f"there is no {name}; there are: {', '.join(known) or 'none'}")
        if known[name].kept:
            raise UserError(f"{name} is kept ({known[name].kept}); nothing was removed")
    return [entry for entry in entries if not entry.kept and (entry.name in names or entry.name in others)]


def _told(removed: list[Entry]) -> str:
    return f"removed {len(removed)}, {sum(entry.bytes for entry in removed) / 1e6:,.1f} MB"


def _ready(entry: Entry) -> bool:
    """A prepared folder that is whole: one without its manifest is being made."""
    return entry.path.parent.name == "prepared" and (entry.path / "manifest.json").is_file()


def _needed() -> Callable[[Path], str]:
    """Says why a prepared folder is kept: the next training or a night, of any checkout that uses this cache, reads
    it; "" for no reason."""
    found, damaged = {}, ""
    for checkout in checkouts():
        where = "" if checkout == ROOT else f" in {checkout}"
        for path in sorted((checkout / "nights").glob("*/settings.json")):
            night = f"night {path.parent.name}{where}"
            if prepared := _prepared(path):
                found[prepared] = f"for {night}"
            else:
                damaged = f"{night} may need it: its settings.json is damaged"
    if current := _prepared(current_path()):
        found[current] = "for the next training"
    return lambda folder: found.get(folder, damaged if folder.parent.name == "prepared" else "")


def _prepared(record: Path) -> Path | None:
    """The prepared folder that a settings.json names."""
    try:
        return Path(json.loads(record.read_text(encoding="utf-8"))["prepared"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _nights() -> list[Path]:
    """Folders of this checkout's nights that have runs; links lead elsewhere."""
    return [path.parent for path in sorted((ROOT / "nights").glob("*/runs")) if path.resolve() == path]


# ---- runs


@contextmanager
def _nights_at_rest() -> Iterator[set[Path]]:
    """The nights that nobody runs; none of them can begin meanwhile."""
    resting = set()
    with ExitStack() as stack:
        for folder in _nights():
            with suppress(UserError):
                stack.enter_context(lock(folder / "lock"))
                resting.add(folder)
        yield resting


def _runs(resting: set[Path]) -> list[Entry]:
    found = dict(_own_runs())
    for folder in _nights():
        found |= _night_runs(folder, folder in resting)
    return _largest_first(
        Entry(str(path.relative_to(ROOT)), path, _size(_parts(path)), kept) for path, kept in found.items()
    )


def _parts(run: Path) -> list[Path]:
    """What of a run goes: in a night all but its records, for an experiment may have written anything."""
    found = leftovers(run)
    return found if ROOT / "nights" in run.parents else [path for path in found if path.name in MADE]


def _trained(folder: Path) -> list[Path]:
    """Runs with a checkpoint, oldest first."""
    found = [path for path in folder.glob("*/checkpoint.safetensors") if path.parent.resolve() == path.parent]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def _own_runs() -> Iterator[tuple[Path, str]]:
    """The runs of runs/, each with why it is kept."""
    trained, latest = _trained(ROOT / "runs"), Path(os.path.realpath(ROOT / "runs" / "latest"))  # a link to itself too
    scores = {path: result(path) for path in trained}
    best: dict[str, float] = {}  # task -> lowest val_bpb
    for score in filter(None, scores.values()):
        best[score["task"]] = min(score["val_bpb"], best.get(score["task"], score["val_bpb"]))
    for path in trained:
        score = scores[path]
        reasons = [
            "runs/latest" if path == latest else "",
            f"the best of task {score['task']}" if score and score["val_bpb"] == best[score["task"]] else "",
            f"one of the newest {NEWEST}" if path in trained[-NEWEST:] else "",
        ]
        yield path, next(filter(None, reasons), "")


def _night_runs(night: Path, resting: bool) -> Iterator[tuple[Path, str]]:
    """The runs of a night, each with why it is kept."""
    try:
        experiments = Journal(night).state.experiments
    except UserError:
        experiments = None
    for path in _trained(night / "runs"):
        if experiments is None:
            yield path, "the night's journal is damaged"
        else:
            yield path, _held(path.name, experiments) if resting else "the night is running"


def _held(run: str, experiments: list[Experiment]) -> str:
    """Why the night needs this run (e0007-r1, replay-7-1000), or ""."""
    number = re.match(r"(?:e|replay-)(\d+)-", run)
    if not number or int(number[1]) >= len(experiments):
        return ""
    of = experiments[int(number[1])]
    return {"keep": f"experiment {of.id} was kept", "pending": f"experiment {of.id} is not settled"}.get(of.status, "")


def _largest_first(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.bytes)


def _size(paths: list[Path]) -> int:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
