"""What the cache holds, how large it is, and its removal. What a night or the next training needs is never removed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.files import cache_root
from lab.run import ROOT, current_path


@dataclass(frozen=True)
class Entry:
    """One folder of the cache."""

    path: Path
    bytes: int
    needed_by: str  # "" or who

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:10,.1f} MB  {self.name}" + (
            f"  (in use: {self.needed_by})" if self.needed_by else ""
        )


def listing() -> list[Entry]:
    """Folders of the cache, largest first."""
    needed = _needed()
    folders = [
        path for part in ("prepared", "text", "hub") for path in (cache_root() / part).glob("*") if path.is_dir()
    ]
    entries = [Entry(path, _size(path), needed.get(path.resolve(), "")) for path in folders]
    return sorted(entries, key=lambda entry: -entry.bytes)


def remove(names: tuple[str, ...], everything: bool) -> str:
    """Remove these entries, or every prepared folder that nobody needs; what was done. Downloaded text goes only by
    name: it may not be had again. UserError names what cannot be removed."""
    entries = {entry.name: entry for entry in listing()}
    for name in names:
        if name not in entries:
            raise UserError(f"the cache has no {name}; it has: {', '.join(entries) or 'nothing'}")
        if entries[name].needed_by:
            raise UserError(f"{name} is in use by {entries[name].needed_by}; nothing was removed")
    wanted = [entry for entry in entries.values() if entry.name in names or (everything and _ready(entry))]
    chosen = [entry for entry in wanted if not entry.needed_by]
    for entry in chosen:
        shutil.rmtree(entry.path)
    return f"removed {len(chosen)}, {sum(entry.bytes for entry in chosen) / 1e6:,.1f} MB"


def _ready(entry: Entry) -> bool:
    """A prepared folder that is whole: one without its manifest is being made."""
    return entry.path.parent.name == "prepared" and (entry.path / "manifest.json").is_file()


def _needed() -> dict[Path, str]:
    """Prepared folders that the next training or a night reads."""
    found = {}
    for path in [*sorted((ROOT / "nights").glob("*/settings.json")), current_path()]:
        try:
            prepared = Path(json.loads(path.read_text())["prepared"]).resolve()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[prepared] = "the next training" if path == current_path() else f"night {path.parent.name}"
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
