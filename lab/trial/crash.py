"""Why a run failed, in a few short, sanitized fields that are safe to put into a model's prompt.

A log is written by code that a model wrote, and may contain instructions to the next model. So only the last
exception's type, its message and the line of train.py are passed on, truncated and without control characters and
escape sequences. That limits what injected text can do; it does not make it harmless, so prompts should quote these
fields as data.
"""

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from lab.errors import one_line
from lab.files import without_places

MESSAGE_CHARS, NAME_CHARS, SOURCE_CHARS = 300, 80, 200
STEPS, STEP_KEYS, STEP_BYTES = 3, 12, 2000
HEADER = "Traceback (most recent call last):"
FRAME = re.compile(r'^  File "([^"\n]*)", line (\d+)(?:, in [^\n]*)?\n(?:    ([^\n]*))?', re.M)
RAISED = re.compile(r"^([A-Za-z_][\w.]*)(?:: ?|$)", re.M)
ERROR = re.compile(r"^(?:error|bwrap|sandbox-exec): [^\n]*", re.M)  # ours, and those of a failed sandbox
STEP_KEY = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True)
class Crash:
    """Exception type and message, line of train.py (number and text), and the numbers of the last three steps."""

    type: str
    message: str
    line: int | None = None
    source: str = ""
    last_steps: tuple[dict[str, float], ...] = ()


def summary(log: str, steps: Path, default: str, program: str = "train.py") -> Crash:
    """The last Python traceback in a log as a Crash. Without a traceback the type is `default` and the message the
    last line that starts with "error: ", with which the project's own commands end."""
    last_steps = read_steps(steps)
    raised = traceback(log, program)
    if raised:
        return Crash(*raised, last_steps)
    errors = ERROR.findall(log)
    return Crash(default, one_line(without_places(errors[-1]), MESSAGE_CHARS) if errors else "", last_steps=last_steps)


def traceback(log: str, program: str) -> tuple[str, str, int | None, str] | None:
    """(type, message, line, source) of the last traceback in `log`; the line is the innermost one in `program`."""
    start = log.rfind("\n" + HEADER) + 1
    if not start and not log.startswith(HEADER):  # a SyntaxError of the program itself has no header
        start = log.rfind('\n  File "') + 1
    text = log[start:]
    frames = list(FRAME.finditer(text))
    raised = RAISED.search(text, len(HEADER) if text.startswith(HEADER) else 0)
    if not raised or not frames or raised.start() < frames[0].start():
        return None
    frames = [frame for frame in frames if frame.end() <= raised.start()]
    own = [frame for frame in frames if os.path.basename(frame[1]) == program]
    line, source = (int(own[-1][2][:9]), one_line(own[-1][3] or "", SOURCE_CHARS)) if own else (None, "")
    message = without_places(text[raised.end() :][: 20 * MESSAGE_CHARS])
    return one_line(raised[1], NAME_CHARS), one_line(message, MESSAGE_CHARS), line, source


def read_steps(path: Path) -> tuple[dict[str, float], ...]:
    """The numbers in the last three complete lines of steps.jsonl; other values are dropped."""
    records = []
    for line in read_bytes(path, 4 * STEP_BYTES).splitlines()[-STEPS - 1 :]:
        try:
            record = json.loads(line[:STEP_BYTES])
        except (ValueError, RecursionError):  # truncated, or not JSON
            continue
        if isinstance(record, dict):
            records.append(dict([item for item in record.items() if _is_number(*item)][:STEP_KEYS]))
    return tuple(records[-STEPS:])


def _is_number(key: str, value: object) -> bool:
    bounded = isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)
    return bounded and STEP_KEY.fullmatch(key) is not None


def read_bytes(path: Path, limit: int) -> bytes:
    """The last `limit` bytes of a file that a child may have replaced: b"" unless it is a regular file.

    A link could point to a file that the child itself cannot read; opening a pipe would block forever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return b""
        return os.pread(descriptor, limit, max(status.st_size - limit, 0))
    finally:
        os.close(descriptor)
