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
    entries = [Entry(path, _size(path), needed.get(path, "")) for path in folders]
    return sorted(entries, key=lambda entry: -entry.bytes)


def remove(names: tuple[str, ...], everything: bool) -> str:
    """Remove these entries, or all that nobody needs; what was done. UserError names what cannot be removed."""
    entries = {entry.name: entry for entry in listing()}
    for name in names:
        if name not in entries:
            raise UserError(f"the cache has no {name}; it has: {', '.join(entries) or 'nothing'}")
        if entries[name].needed_by:
            raise UserError(f"{name} is in use by {entries[name].needed_by}; nothing was removed")
    chosen = [entry for entry in entries.values() if not entry.needed_by and (everything or entry.name in names)]
    for entry in chosen:
        shutil.rmtree(entry.path)
    return f"removed {len(chosen)}, {sum(entry.bytes for entry in chosen) / 1e6:,.1f} MB"


def _needed() -> dict[Path, str]:
    """Prepared folders that the next training or a night reads."""
    found = {}
    for path in [*sorted((ROOT / "nights").glob("*/settings.json")), current_path()]:
        try:
            prepared = Path(json.loads(path.read_text())["prepared"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[prepared] = "the next training" if path == current_path() else f"night {path.parent.name}"
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
