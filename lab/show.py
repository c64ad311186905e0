"""Progress output: bars and live displays on a terminal, plain lines elsewhere; never a carriage return in a file.

One setting, `verbosity`, controls the amount of output of every long command: QUIET, NORMAL or VERBOSE.
"""

import errno
import io
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from lab.errors import one_line

QUIET, NORMAL, VERBOSE = range(3)
LINE = 1000  # most characters of a log line
LOG_SECONDS = 5.0  # between plain lines when the output is not a terminal
LIVE_SECONDS = 0.5  # between repaints of the training display; one takes about a millisecond
WIDEST = 100  # most columns of a live display


def verbosity_options(quiet: str, verbose: str) -> Callable[[Callable], Callable]:
    """The options -q and -v with these help texts; the command takes them as its argument `verbosity`."""

    def add(function: Callable) -> Callable:
        for flags, level, text in ((("-v", "--verbose"), VERBOSE, verbose), (("-q", "--quiet"), QUIET, quiet)):
            option = click.option(*flags, "verbosity", type=int, flag_value=level, default=NORMAL, help=text)
            function = option(function)
        return function

    return add


class Finite(click.FloatRange):
    """A FloatRange without inf and nan; nan passes every comparison of a FloatRange."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


class Given(click.ParamType):
    """A text that is not empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if value.strip() else self.fail("it is empty; give it a value, or leave it out", param, ctx)


def in_utf8(argument: str) -> str:
    """An argument of the command line as text, in a C locale too."""
    return os.fsencode(argument).decode(errors="replace")


class NewFolder(click.Path):
    """A path that is not empty."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return super().convert(Given().convert(str(value), param, ctx), param, ctx)


SEED = click.IntRange(0, 2**32 - 1)  # what every generator takes
MINUTES = Finite(min=0, min_open=True, max=7 * 24 * 60)  # a week


def examples(*lines: str) -> str:
    """The examples at the end of a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  python {line}" for line in lines)])


def log(line: str) -> None:
    """Print a log line with the time of day."""
    print(f"{datetime.now():%H:%M:%S} {one_line(line, LINE)}", flush=True)


def silent(line: str) -> None:
    """A replacement for `log` that prints nothing."""


def outlast_reader(lost: Callable[[str], Any] = silent) -> None:
    """From now on output that nobody reads any more is dropped, instead of ending the command. `lost` is told once."""
    sys.stdout, sys.stderr = (stream and _lasting(stream, lost) for stream in (sys.stdout, sys.stderr))


def _lasting(stream: TextIO, lost: Callable[[str], Any]) -> TextIO:
    try:
        raw = io.BufferedWriter(_Lasting(stream.fileno(), lost))
    except io.UnsupportedOperation:  # it is no file
        return stream
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)


class _Lasting(io.FileIO):
    """An output that becomes /dev/null when its terminal or its reader is gone. A lost reader is told to `lost`."""

    def __init__(self, descriptor: int, lost: Callable[[str], Any]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost = lost

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            if error.errno == errno.EPIPE:
                self.lost("nobody reads the output")
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.fileno())
        return len(data)


def live_console(stream: TextIO) -> Console | None:
    """A console that can be repainted in place; None for files and dumb terminals, whatever FORCE_COLOR is."""
    console = Console(file=stream, markup=False, emoji=False)
    return console if stream.isatty() and console.is_interactive else None


def bar(share: float, width: int) -> Text:
    """A progress bar of `width` columns, `share` of it filled; readable without colors too."""
    full = int(share * width)
    return Text.assemble(("━" * full, "bar.complete"), ("─" * (width - full), "bar.back"))


def minutes(seconds: float) -> str:
    """A duration as 4:07 or 3:04:07."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def working(message: str, verbosity: int) -> AbstractContextManager:
    """Shows a spinner with `message` on a terminal while the block runs."""
    console = live_console(sys.stdout) if verbosity > QUIET else None
    return console.status(message) if console else nullcontext()


class Bars:
    """One progress bar per label on a terminal, a line every LOG_SECONDS elsewhere, nothing if `quiet`.

    Use it as a context manager. Call it with (label, bytes done, total bytes); a total of 0 means unknown."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self.stream, self.quiet = stream or sys.stderr, quiet
        self.tasks: dict[str, int] = {}
        self.last: dict[str, float] = {}
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = None if quiet else live_console(self.stream)
        self.progress = Progress(*columns, console=console) if console else None

    def __enter__(self) -> "Bars":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if self.progress:
            if label not in self.tasks:
                self.tasks[label] = self.progress.add_task(label, total=total or None)
            self.progress.update(self.tasks[label], completed=done, total=total or None)
        elif label not in self.last or time.monotonic() - self.last[label] >= LOG_SECONDS:
            self.last[label] = time.monotonic()
            amount = f" {done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else f" {done / 1e6:.1f} MB" if done else ""
            print(f"{label}{amount}", file=self.stream, flush=True)


@dataclass(frozen=True)
class Reading:
    """The progress of a training run after a step."""

    step: int
    progress: float  # share of the budget, 0 to 1
    loss: float  # smoothed, nats per token
    tokens_per_second: float
    mfu: float  # percent
    memory_mb: float  # peak
    epoch: int
    remaining: float  # seconds

    def __str__(self) -> str:
        return (
            f"step {self.step:05d} ({100 * self.progress:.1f}%) | loss {self.loss:.4f} | "
            f"{self.tokens_per_second:,.0f} tok/s | mfu {self.mfu:.1f}% | {self.memory_mb:.0f} MB | "
            f"epoch {self.epoch} | remaining {self.remaining:.0f}s"
        )

    def painted(self, width: int) -> Text:
        """Two lines of at most `width` columns: a progress bar of the budget, and the figures."""
        end = f" {100 * self.progress:3.0f}%  {minutes(self.remaining)} left"
        figures = (
            f"step {self.step}  loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tok/s  mfu {self.mfu:.1f}%  "
            f"{self.memory_mb:,.0f} MB  epoch {self.epoch}"
        )
        painted = bar(self.progress, max(0, min(width, WIDEST) - len(end))).append(f"{end}\n").append(figures)
        painted.no_wrap, painted.overflow = True, "ellipsis"
        return painted


class Training:
    """Shows the latest reading of a training run; use it as a context manager.

    On a terminal it repaints in place; elsewhere it prints a line every LOG_SECONDS. Verbose prints every reading,
    quiet none."""

    def __init__(self, verbosity: int = NORMAL, stream: TextIO | None = None):
        self.verbosity, self.stream = verbosity, stream or sys.stdout
        console = live_console(self.stream) if verbosity == NORMAL else None
        self.live = Live(console=console, auto_refresh=False) if console else None
        self.interval = LIVE_SECONDS if console else 0.0 if verbosity == VERBOSE else LOG_SECONDS
        self.last, self.latest = float("-inf"), None

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the latest reading on the screen, and the cursor below it."""
        if self.live and self.latest:
            self._paint()
            self.live.stop()

    def show(self, reading: Reading) -> None:
        """Show `reading`, unless another was shown less than `interval` seconds ago."""
        self.latest = reading
        if self.verbosity == QUIET or time.monotonic() - self.last < self.interval:
            return
        self.last = time.monotonic()
        if self.live:
            self.live.start()
            self._paint()
        else:
            print(reading, file=self.stream, flush=True)

    def _paint(self) -> None:
        self.live.update(self.latest.painted(self.live.console.width), refresh=True)
