"""A story written in turns: a person's sentence, the model's continuation, the person's next sentence.

Only the story goes to standard output, so that lines from a pipe give a plain text; what is said besides goes to
standard error.
"""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lab.interface.sample import Opened

HELP = "type the start or the next sentence, Enter alone to go on; /new /retry /temperature 0.8 /help /quit"
SENTENCE_ENDS = (".", "!", "?", '"', "\n")


@dataclass
class Chat:
    """The running story. A continuation ends with the first sentence after `tokens`, or after twice as many."""

    run: Opened
    tokens: int
    temperature: float
    top_k: int
    seed: int  # of the next continuation
    story: str = ""
    before: str = ""  # the story without the last continuation

    def talk(self, first: str | None) -> None:
        """Answer line after line until they end or one says /quit; `first` is answered before them."""
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal:
            note(HELP)
        if first is not None:
            self.say(first)
        for line in lines("> " if terminal else ""):
            if line == "/quit":
                return
            if line.startswith("/"):
                self.obey(*line.split(maxsplit=1))
            else:
                self.say(line)

    def say(self, line: str) -> None:
        gap = " " if self.story and line and not self.story[-1].isspace() else ""
        self.story += gap + line
        self.go_on()

    def obey(self, command: str, value: str = "") -> None:
        if command == "/new":
            self.story = self.before = ""
        elif command == "/retry":
            self.story = self.before
            self.go_on()
        elif command == "/temperature":
            self.warm(value)
        else:
            note(HELP)

    def warm(self, value: str) -> None:
        with contextlib.suppress(ValueError):
            if 0 <= (given := float(value)) < math.inf:
                self.temperature = given
                return
        note(f"the temperature is {self.temperature:g}; /temperature takes a number from 0, like 0.8")

    def go_on(self) -> None:
        """Stream a continuation. Ctrl-C ends it and keeps what is written."""
        self.before, limit = self.story, 2 * self.tokens
        how = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
        pieces = self.run.write(prompt=self.story, tokens=limit, **how)
        next(pieces)  # the prompt
        self.seed += 1
        with interrupts() as asked:
            for number, piece in enumerate(pieces, 1):
                print(piece, end="", flush=True)
                self.story += piece
                if asked or (number >= self.tokens and self.story.endswith(SENTENCE_ENDS)):
                    break
            else:
                if number <= limit:  # the last piece is what was left of a character
                    note("\n(the end)")
        print(flush=True)


def lines(prompt: str) -> Iterator[str]:
    """What is typed or piped, until it ends; Ctrl-C and Ctrl-D at the prompt end it too."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits and remembers lines)
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        yield line


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C only adds to this list: the model's answer on the pipe is read to its end."""
    asked: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
