"""The exception for errors of the user, which are not bugs, and text for one line of output."""

import re

ESCAPE = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b.?", re.S)
HIDDEN = (*range(9), *range(11, 32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
          *range(0x2066, 0x206A), 0xFEFF, *range(0xE0000, 0xE0080))  # fmt: skip
CONTROLS = dict.fromkeys(HIDDEN, "\ufffd")
INTERRUPTED = 130  # exit status after Ctrl-C, as shells give it


class UserError(Exception):
    """An expected error: one line that says what was wrong and what to do, printed without a traceback."""


def printable(text: str | BaseException, limit: int = 5000) -> str:
    """The start of a text, or the message of an exception, as one printable line without escapes."""
    whole = str(text) or (type(text).__name__ if isinstance(text, BaseException) else "")
    plain = ESCAPE.sub("", whole[:limit]).encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else " " for c in plain)


def one_line(text: str | BaseException, limit: int = 200) -> str:
    """The same in at most `limit` characters, with single spaces."""
    plain = " ".join(printable(text, 20 * limit).split())
    return plain if len(plain) <= limit else plain[: limit - 1].rstrip() + "…"


def visible(text: str) -> str:
    """A text of several lines whose control characters, and those that change the direction of text, are replaced."""
    return text.encode("utf-8", "replace").decode().translate(CONTROLS)
