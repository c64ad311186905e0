"""Progress for people: a live line or a bar on a terminal, plain lines in a log; never a carriage return in a file."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LOG_SECONDS = 10.0  # between plain lines when the output is not a terminal
LIVE_SECONDS = 0.25  # between repaints of the live line


class Bars:
    """One bar per label on a terminal; elsewhere a line every LOG_SECONDS. Use as a context manager; call it with
    (label, bytes done, bytes in all); a total of 0 means unknown."""

    def __init__(self, stream: TextIO = sys.stderr):
        self.stream = stream
        self.tasks: dict[str, int] = {}
        self.last: dict[str, float] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(file=stream)) if stream.isatty() else None

    def __enter__(self) -> "Bars":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        if self.progress:
            if label not in self.tasks:
                self.tasks[label] = self.progress.add_task(label, total=total or None)
            self.progress.update(self.tasks[label], completed=done, total=total or None)
        elif label not in self.last or time.monotonic() - self.last[label] >= LOG_SECONDS:
            self.last[label] = time.monotonic()
            amount = f" {done / 1e6:.1f} of {total / 1e6:.1f} MB" if total else f" {done / 1e6:.1f} MB" if done else ""
            print(f"{label}{amount}", file=self.stream, flush=True)


class LiveLine:
    """The latest state of a long run: repainted in place on a terminal, a plain line now and then elsewhere."""

    def __init__(self, stream: TextIO = sys.stdout):
        self.stream = stream
        self.console = Console(file=stream) if stream.isatty() else None
        self.last = float("-inf")

    def show(self, text: str) -> None:
        """Print `text` if the last print is long enough ago."""
        now = time.monotonic()
        if now - self.last < (LIVE_SECONDS if self.console else LOG_SECONDS):
            return
        self.last = now
        if self.console:
            self.stream.write("\r" + text[: self.console.width - 1].ljust(self.console.width - 1))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the live line; what is printed next starts on a line of its own."""
        if self.console and self.last > float("-inf"):
            self.stream.write("\n")
            self.stream.flush()
