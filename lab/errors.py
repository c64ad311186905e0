"""The exception for errors of the user, which are not bugs, and text for one line of output."""

import re

ESCAPE = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b.?", re.S)
INTERRUPTED = 130  # exit status after Ctrl-C, as shells give it


class UserError(Exception):
    """An expected error: one line that says what was wrong and what to do, printed without a traceback."""


def one_line(text: str | BaseException, limit: int = 200) -> str:
    """A text, or the message of an exception, as one printable line of at most `limit` characters, without escapes."""
    whole = str(text) or (type(text).__name__ if isinstance(text, BaseException) else "")
    plain = ESCAPE.sub("", whole[: 20 * limit]).encode("utf-8", "replace").decode()
    plain = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    return plain if len(plain) <= limit else plain[: limit - 1].rstrip() + "…"
