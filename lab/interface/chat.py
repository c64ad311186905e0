"""A story written in turns: a person's sentence, the model's continuation, the person's next sentence.

Only the story goes to standard output, so piped lines give a plain text; help and notes go to standard error.
"""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lab.interface.sample import Opened

HELP = "type a sentence, or press Enter to continue the story; commands: /new /retry /temperature 0.8 /help /quit"
SENTENCE_ENDS = (".", "!", "?", '"', "\n")


@dataclass
class Chat:
    """The current story. A continuation ends with the first sentence after `tokens`, or after twice as many."""

    run: Opened
    tokens: int
    temperature: float
    top_k: int
    seed: int  # of the next continuation
    story: str = ""
    before: str = ""  # the story without the last continuation

    def talk(self, first: str | None) -> None:
        """Answer each line until the input ends or a line is /quit; `first` is answered before them."""
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal:
            note(HELP)
        if first is not None:
            self.say(first)
        for line in lines("> " if terminal else ""):
            if line == "/quit":
                return
            if line.startswith("/"):
                self.run_command(*line.split(maxsplit=1))
            else:
                self.say(line)

    def say(self, line: str) -> None:
        gap = " " if self.story and line and not self.story[-1].isspace() else ""
        self.story += gap + line
        self.extend()

    def run_command(self, command: str, value: str = "") -> None:
        if command == "/new":
            self.story = self.before = ""
        elif command == "/retry":
            self.story = self.before
            self.extend()
        elif command == "/temperature":
            self.set_temperature(value)
        else:
            note(HELP)

    def set_temperature(self, value: str) -> None:
        with contextlib.suppress(ValueError):
            if 0 <= (number := float(value)) < math.inf:
                self.temperature = number
                return
        note(f"the temperature is {self.temperature:g}; /temperature needs a number of at least 0, such as 0.8")

    def extend(self) -> None:
        """Stream a continuation. Ctrl-C stops it and keeps the text so far."""
        self.before, limit = self.story, 2 * self.tokens
        options = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
        pieces = self.run.write(prompt=self.story, tokens=limit, **options)
        next(pieces)  # the prompt
        self.seed += 1
        with interrupts() as pressed:
            for number, piece in enumerate(pieces, 1):
                print(piece, end="", flush=True)
                self.story += piece
                if pressed or (number >= self.tokens and self.story.endswith(SENTENCE_ENDS)):
                    break
            else:
                if number <= limit:  # the last piece is the rest of an incomplete character
                    note("\n(the end)")
        print(flush=True)


def lines(prompt: str) -> Iterator[str]:
    """The lines typed or piped, until the input ends or Ctrl-C or Ctrl-D at the prompt."""
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
    """While active, Ctrl-C only adds to this list, so that the model's answer on the pipe is read to its end."""
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
