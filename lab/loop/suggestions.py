"""What a person asks of a running night: suggestions for the next experiments, and to skip the one at hand.

Only the loop holds the lock of a night, so other commands leave files in its folder:

    suggestions/0001-4f2a91c3.json           waiting; the lowest is taken next
    suggestions/refused/0001-4f2a91c3.json   the same, with the reason
    skip.json                                the experiment to end, and why

A file appears whole, under a name that is never used again. The journal's event (proposal or refused) has this name,
and the file is removed after it. So a kill at any moment leaves either a file that still waits, or one that the journal
knows and `settle` removes: a suggestion is taken exactly once.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.errors import UserError, one_line
from lab.files import write_atomic
from lab.loop.ideas import load_all
from lab.loop.source import Rejected, read_source

SHOWN = 8  # refused suggestions that a person is told of
WORDS = 500  # characters of a suggestion in words, which goes into the briefing
ASSIGNMENT = re.compile(r"([A-Za-z]\w*)\s*=\s*([^=\s].*)", re.DOTALL)
BETWEEN = re.compile(r"[\s,;]+(?=[A-Za-z]\w*\s*=(?!=))")  # two assignments
HUNK = re.compile(r"^@@ -\d", re.MULTILINE)
FILE = re.compile(r"\S+\.(py|patch|diff|txt)")


@dataclass(frozen=True)
class Suggestion:
    """`text` is what the person typed; `form` how it is read: constants, idea (its name in ideas/), patch, file (a
    train.py) or words."""

    text: str
    form: str
    content: str = ""  # of the patch or file when it was suggested
    name: str = ""  # of its file; "" until it waits
    reason: str = ""  # why it was refused


def read(text: str) -> Suggestion:
    """The first reading that fits: an idea, a file, constants, then words. Raises UserError for none of these."""
    text = text.strip()
    if not text:
        raise UserError('the suggestion is empty; try: agent_loop.py suggest "MATRIX_LR=0.03"')
    if text in load_all()[0]:
        return Suggestion(text, "idea")
    if FILE.fullmatch(text) or ("\n" not in text and len(text) < WORDS and Path(text).is_file()):
        return _of_file(Path(text))
    if assignments(text):
        return Suggestion(one_line(text), "constants")
    if len(text) > WORDS:
        raise UserError(f"the suggestion has {len(text)} characters; use at most {WORDS}, or a patch file")
    return Suggestion(one_line(text, WORDS), "words")


def _of_file(path: Path) -> Suggestion:
    try:
        content = read_source(path)
    except (Rejected, OSError) as reason:
        raise UserError(f"{reason}; suggest a patch, a train.py, constants or words") from None
    return Suggestion(one_line(str(path)), "patch" if HUNK.search(content) else "file", content)


def assignments(text: str) -> dict[str, str]:
    """The constants and values of "MATRIX_LR=0.03 DEPTH=3", as written; {} for any other text."""
    pairs = [ASSIGNMENT.fullmatch(part.strip()) for part in BETWEEN.split(text.strip())]
    return {pair[1].upper(): pair[2].strip() for pair in pairs} if all(pairs) else {}


class Suggestions:
    """The suggestions of the night in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "suggestions"

    def add(self, suggestion: Suggestion) -> None:
        """Let it wait, after those that wait already."""
        self.folder.mkdir(exist_ok=True)
        number = 1 + max((int(name[:4]) for name in self._names(self.folder)), default=0)
        self._write(self.folder / f"{number:04}-{secrets.token_hex(4)}.json", suggestion)

    def waiting(self, taken: Mapping[str, str]) -> list[Suggestion]:
        """In order, without those that the journal has taken."""
        return [self._load(self.folder, name) for name in self._names(self.folder) if name not in taken]

    def refused(self) -> list[Suggestion]:
        """In order, with their reasons."""
        return [self._load(self.folder / "refused", name) for name in self._names(self.folder / "refused")]

    def settle(self, taken: Mapping[str, str]) -> None:
        """Remove the files of taken suggestions, and move refused ones aside with their reasons."""
        for name in set(self._names(self.folder)) & taken.keys():
            if taken[name]:
                (self.folder / "refused").mkdir(exist_ok=True)
                suggestion = self._load(self.folder, name)
                refused = Suggestion(suggestion.text, suggestion.form, suggestion.content, reason=taken[name])
                self._write(self.folder / "refused" / f"{name}.json", refused)
            (self.folder / f"{name}.json").unlink()

    def lines(self, taken: Mapping[str, str]) -> list[str]:
        """What waits and what was refused, for a person."""
        waiting = [f"suggested, waiting: {each.text}" for each in self.waiting(taken)]
        return waiting + [f"suggested, refused: {each.text} ({each.reason})" for each in self.refused()[-SHOWN:]]

    def _names(self, folder: Path) -> list[str]:
        return sorted(path.stem for path in folder.glob("[0-9][0-9][0-9][0-9]-*.json"))

    def _load(self, folder: Path, name: str) -> Suggestion:
        """A damaged file is a suggestion that cannot be followed."""
        try:
            record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            fields = {key: str(record[key]) for key in ("text", "form", "content", "reason")}
        except (OSError, ValueError, KeyError, TypeError):
            fields = {"text": "(damaged)", "form": "damaged"}
        return Suggestion(**fields | {"name": name})

    def _write(self, path: Path, suggestion: Suggestion) -> None:
        write_atomic(path, json.dumps({key: value for key, value in asdict(suggestion).items() if key != "name"}))


def ask_to_skip(folder: Path, experiment: int, reason: str) -> None:
    """Ask the loop to end this experiment. A request for another experiment than the one at hand is ignored."""
    write_atomic(folder / "skip.json", json.dumps({"experiment": experiment, "reason": reason}))


def skip_reason(folder: Path, experiment: int) -> str:
    """Why this experiment is to be ended; "" if nobody asked for that."""
    try:
        asked = json.loads((folder / "skip.json").read_text(encoding="utf-8"))
        return str(asked["reason"]) if asked["experiment"] == experiment else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
