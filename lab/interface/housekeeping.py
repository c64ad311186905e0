"""List and remove prepared data and checkpoints. Data that a night or the next training needs is never removed.

Only the checkpoint and temporary files of a run are removed: its source, settings, steps and result stay. The NEWEST
runs in runs/ and the best of each task are kept complete, and in a night the kept and the unfinished experiments.
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

NEWEST = 5  # runs in runs/ that are kept complete
MADE = (
    "checkpoint.safetensors",
    "score",
    "tmp",
    "__pycache__",
)  # by training and scoring; other files belong to the user


@dataclass(frozen=True)
class Entry:
    """One folder of the cache, or one run."""

    name: str
    path: Path
    bytes: int  # freed by removing it
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
    """Remove these entries, or every prepared folder that is not needed, and return a summary. Downloads are removed
    only by name, since they may not be available again; so are folders older than the record of the cache's users.
    Raises UserError for an entry that cannot be removed."""
    register()
    entries = listing()
    whole = [entry for entry in entries if everything and _ready(entry)]
    known = {entry.name for entry in whole if (entry.path / "manifest.json").stat().st_mtime >= recorded_since()}
    chosen = _chosen(entries, names, known)
    for entry in chosen:
        files.remove(entry.path, entry.path.parent)
    rest = [entry.name for entry in whole if not entry.kept and entry not in chosen]
    hint = f"; NAMES='{' '.join(rest)}' removes data that nights of other checkouts may need" if rest else ""
    return _summary(chosen) + hint


def runs() -> list[Entry]:
    """Runs with a checkpoint, in runs/ and in every night, largest first."""
    with _idle_nights() as idle:
        return _runs(idle)


def remove_checkpoints(names: tuple[str, ...], everything: bool) -> str:
    """Remove the checkpoints of these runs, or of all that are not kept, and return a summary. A running night is
    skipped, and none can start meanwhile. Raises UserError for a run that cannot be removed."""
    with _idle_nights() as idle:
        entries = _runs(idle)
        chosen = _chosen(entries, names, {entry.name for entry in entries if everything})
        for entry in chosen:
            for part in _parts(entry.path):
                files.remove(part, ROOT)
        return _summary(chosen)


def _chosen(entries: list[Entry], names: tuple[str, ...], others: set[str]) -> list[Entry]:
    """The entries of these names, and those of `others` that are not kept. Raises UserError for a wrong name."""
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            raise UserError(f"there is no {name}; there are: {', '.join(known) or 'none'}")
        if known[name].kept:
            raise UserError(f"{name} is kept ({known[name].kept}); nothing was removed")
    return [entry for entry in entries if not entry.kept and (entry.name in names or entry.name in others)]


def _summary(removed: list[Entry]) -> str:
    return f"removed {len(removed)}, {sum(entry.bytes for entry in removed) / 1e6:,.1f} MB"


def _ready(entry: Entry) -> bool:
    """Whether it is a complete prepared folder; without a manifest it is still being written."""
    return entry.path.parent.name == "prepared" and (entry.path / "manifest.json").is_file()


def _needed() -> Callable[[Path], str]:
    """A function that returns why a prepared folder is kept, or "": the next training, or a night of any checkout that
    uses this cache, reads it."""
    users, damaged = {}, ""
    for checkout in checkouts():
        where = "" if checkout == ROOT else f" in {checkout}"
        for path in sorted((checkout / "nights").glob("*/settings.json")):
            night = f"night {path.parent.name}{where}"
            if prepared := _prepared(path):
                users[prepared] = f"for {night}"
            else:
                damaged = f"{night} may need it: its settings.json is damaged"
    if current := _prepared(current_path()):
        users[current] = "for the next training"
    return lambda folder: users.get(folder, damaged if folder.parent.name == "prepared" else "")


def _prepared(record: Path) -> Path | None:
    """The prepared folder that a settings.json names."""
    try:
        return Path(json.loads(record.read_text(encoding="utf-8"))["prepared"]).resolve()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _nights() -> list[Path]:
    """Folders of this checkout's nights that have runs, without links."""
    return [path.parent for path in sorted((ROOT / "nights").glob("*/runs")) if path.resolve() == path]


# ---- runs


@contextmanager
def _idle_nights() -> Iterator[set[Path]]:
    """The nights that are not running; none of them can start meanwhile."""
    idle = set()
    with ExitStack() as stack:
        for folder in _nights():
            with suppress(UserError):
                stack.enter_context(lock(folder / "lock"))
                idle.add(folder)
        yield idle


def _runs(idle: set[Path]) -> list[Entry]:
    reasons = dict(_own_runs())
    for folder in _nights():
        reasons |= _night_runs(folder, folder in idle)
    return _largest_first(
        Entry(str(path.relative_to(ROOT)), path, _size(_parts(path)), kept) for path, kept in reasons.items()
    )


def _parts(run: Path) -> list[Path]:
    """The files to remove from a run: in a night all but its records, since an experiment may have written anything."""
    parts = leftovers(run)
    return parts if ROOT / "nights" in run.parents else [path for path in parts if path.name in MADE]


def _trained(folder: Path) -> list[Path]:
    """Runs with a checkpoint, oldest first."""
    checkpoints = [path for path in folder.glob("*/checkpoint.safetensors") if path.parent.resolve() == path.parent]
    return [path.parent for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime)]


def _own_runs() -> Iterator[tuple[Path, str]]:
    """The runs in runs/, each with the reason to keep it, or ""."""
    trained, latest = _trained(ROOT / "runs"), Path(os.path.realpath(ROOT / "runs" / "latest"))  # may link to itself
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


def _night_runs(night: Path, idle: bool) -> Iterator[tuple[Path, str]]:
    """The runs of a night, each with the reason to keep it, or ""."""
    try:
        experiments = Journal(night).state.experiments
    except UserError:
        experiments = None
    for path in _trained(night / "runs"):
        if experiments is None:
            yield path, "the night's journal is damaged"
        else:
            yield path, _why_kept(path.name, experiments) if idle else "the night is running"


def _why_kept(run: str, experiments: list[Experiment]) -> str:
    """Why the night needs this run (such as e0007-r1 or replay-7-1000), or ""."""
    number = re.match(r"(?:e|replay-)(\d+)-", run)
    if not number or int(number[1]) >= len(experiments):
        return ""
    experiment = experiments[int(number[1])]
    reasons = {"keep": "was kept", "pending": "is not finished"}
    return f"experiment {experiment.id} {reasons[experiment.status]}" if experiment.status in reasons else ""


def _largest_first(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.bytes)


def _size(paths: list[Path]) -> int:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
