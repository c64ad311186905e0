"""The ledger: what the experiments of all nights found, one line each, in nights/ledger.jsonl.

It is derived from the journals: after each experiment, the lines of the night at hand are written anew. Agents read the
lines of other nights when a night starts. Remove the file, or lines of it, to forget. A line has:

    night, id, date            the tag, the number of the experiment there, and the day it was written
    task, machine              what it was found on; evidence from elsewhere counts less (`trust`)
    verdict                    keep or discard
    values, was, ideas         what changed: constants, or ideas by name; lines of earlier versions lack the ideas
    effect, low, high, runs    change of val_bpb, its 95 % interval, and the runs of the candidate behind it
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import write_atomic
from lab.loop.history import Experiment
from lab.loop.proposal import in_words

FILE = "ledger.jsonl"  # in nights/
ELSEWHERE = 0.5  # trust in evidence of another task, and of another machine


@dataclass(frozen=True)
class Effect:
    night: str
    id: int
    date: str
    task: str
    machine: str
    verdict: str
    values: Mapping[str, Any]
    was: Mapping[str, Any]
    effect: float  # bits per byte, negative is better
    low: float
    high: float
    runs: int
    ideas: tuple[str, ...] = ()

    def trust(self, task: str, machine: str) -> float:
        """How much it counts for this task on this machine, from 0 to 1."""
        return ELSEWHERE ** ((self.task != task) + (self.machine != machine))


def effect(e: Experiment, known: Sequence[Experiment]) -> float | None:
    """Change of val_bpb by an experiment. Later runs of a kept one count too: those did not select it."""
    kept = e.status == "keep" and e.parent is not None
    return e.val_bpb - known[e.parent].val_bpb if kept else e.delta


def effects(night: str, task: str, machine: str, known: Sequence[Experiment]) -> list[Effect]:
    """The lines of a night: its settled experiments that changed constants alone, or brought ideas, and gave a
    number."""
    lines, today = [], f"{date.today()}"
    for e in known:
        edit, change = e.edit or {}, effect(e, known)
        values, was = edit.get("values", {}), edit.get("was", {})
        alone = e.hypothesis.startswith(in_words(edit))  # else more than the ideas changed
        ideas = tuple(edit.get("ideas", ())) if alone else ()
        if e.status in ("keep", "discard") and not e.baseline and (values or ideas) and change is not None:
            half = 1.96 * (e.error or 0.0)
            found = [round(number, 6) for number in (change, change - half, change + half)]
            made = night, e.id, today, task, machine, e.status, values, was
            lines.append(Effect(*made, *found, len(e.results), ideas))
    return lines


def record(folder: Path, task: str, machine: str, known: Sequence[Experiment]) -> None:
    """Write the lines of the night in this folder."""
    update(folder.parent / FILE, folder.name, effects(folder.name, task, machine, known))


def others(folder: Path) -> list[Effect]:
    """The lines of other nights than the one in this folder."""
    return [line for line in read(folder.parent / FILE) if line.night != folder.name]


def update(path: Path, night: str, lines: Iterable[Effect]) -> None:
    """Replace the lines of one night. The day of a line that is there already stays."""
    known = read(path)
    days = {line.id: line.date for line in known if line.night == night}
    dated = [dataclasses.replace(line, date=days.get(line.id, line.date)) for line in lines]
    rows = [vars(line) for line in [*(line for line in known if line.night != night), *dated]]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[Effect]:
    """All lines. Raises UserError for one that cannot be read."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(Effect(**row | {"ideas": tuple(row.get("ideas", ()))}))
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}: line {number} is damaged; remove the line, or the file to forget all") from None
    return found
