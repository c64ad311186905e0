"""The panel below the log on a terminal: what the night is doing, its results so far, and the time left.

It reads the night's state once a second and changes nothing. Log lines appear above it, so the log stays in the
terminal's history; at the end the panel is removed and the summary remains.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.errors import one_line
from lab.interface.plot import count
from lab.loop.confirm import confirmed
from lab.loop.history import Experiment, State
from lab.loop.stop import Until
from lab.loop.suggestions import Suggestions
from lab.machine.condition import recorded
from lab.show import QUIET, WIDEST, bar, live_console, minutes
from lab.trial.crash import read_steps

REPAINTS = 1.0  # a second
VERDICTS = 4  # latest verdicts that are shown
ECHO = 4  # columns left free for two ^C, which would otherwise wrap and shift the panel
STYLE = {"keep": "green", "discard": "dim", "crash": "red"}


def dashboard(night: Any, deadline: Until | None, verbosity: int) -> AbstractContextManager:
    """Show the panel of an agent_loop.Night during the block; nothing without a terminal or with --quiet."""
    console = live_console(sys.stdout)
    if console is None or verbosity == QUIET:
        return nullcontext()
    view = View(night, deadline, console)
    return Live(get_renderable=view.panel, console=console, refresh_per_second=REPAINTS, transient=True)


class View:
    """The content of the panel. `deadline`: no new experiment starts after it."""

    def __init__(self, night: Any, deadline: Until | None, console: Console):
        self.night, self.deadline, self.console = night, deadline, console
        self.width, self.begun, self.known = 0, time.monotonic(), len(night.journal.state.settled)

    def panel(self) -> Panel:
        drawn, self.width = self.width, min(self.console.width - ECHO, WIDEST)
        if self.width < drawn:  # the terminal has wrapped the panel's lines
            self.console.clear()
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(style="bold", min_width=9)
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, value in self.rows():
            rows.add_row(name, Text(value) if isinstance(value, str) else value)
        state = self.night.journal.state
        number = state.pending.id if state.pending else len(state.experiments)
        return Panel(
            rows,
            title=Text(f"night {self.night.folder.name}, experiment {number}"),
            title_align="left",
            subtitle=Text(self.end()),
            subtitle_align="right",
            width=self.width,
        )

    def end(self) -> str:
        """When the night ends, and what Ctrl-C does now."""
        if reason := self.night.stop():
            return f"ends after this experiment ({reason}); Ctrl-C: at once"
        hint = "Ctrl-C: end after this experiment"
        if not self.deadline:
            return hint
        return f"until {self.deadline.at:%H:%M}, {minutes(self.deadline.seconds)} left; {hint}"

    def rows(self) -> Iterator[tuple[str, Any]]:
        state = self.night.journal.state
        yield "incumbent", self.incumbent()
        yield "idea", one_line(state.pending.title if state.pending else self.night.idea or "-")
        yield "now", self.now()
        if self.night.suggestions and (waiting := self.night.suggestions.waiting(state.suggestions)):
            more = f" (and {len(waiting) - 1} more)" if len(waiting) > 1 else ""
            yield "next", one_line(f"suggested: {waiting[0].text}{more}")
        yield "verdicts", Group(*map(verdict, state.tried_out[-VERDICTS:])) if state.tried_out else "none yet"
        yield "night", self.pace()
        yield "machine", one_line(str(recorded(state.condition))) if state.condition else "not measured yet"

    def incumbent(self) -> str:
        state = self.night.journal.state
        if not (best := state.incumbent):
            return "none yet: the baseline is being measured"
        text = f"{best.val_bpb:.6f} ± {best.error:.4f} (experiment {best.id}, {runs(best)})"
        return f"{text}, baseline {state.baseline.val_bpb:.6f}" if best is not state.baseline else text

    def now(self) -> Text:
        """The phase and its duration; for training, the progress."""
        phase = self.night.runner.phase
        line = Text(f"{phase.name or f'thinking ({self.night.agent.name})'} ")
        steps = read_steps(phase.run_dir / "steps.jsonl") if phase.run_dir else ()
        if not steps:
            return line.append(minutes(time.monotonic() - phase.since))
        seconds, budget = steps[-1].get("seconds", 0.0), self.night.runner.settings["minutes"] * 60
        seconds = seconds if 0 <= seconds <= budget else budget  # written by the experiment, so not trusted
        who = " (the incumbent)" if self.night.journal.state.step().who == "incumbent" else ""
        line.append(f"{phase.run_dir.name}{who} ").append(bar(seconds / budget, 16))
        line.append(f" {100 * seconds / budget:3.0f}%  {minutes(budget - seconds)} left")
        return line.append(f"  loss {steps[-1].get('loss', float('nan')):.4f}")

    def pace(self) -> str:
        state, hours = self.night.journal.state, (time.monotonic() - self.begun) / 3600
        counts, new = state.counts(), len(state.settled) - self.known
        parts = [f"{counts['keep']} kept", f"{counts['discard']} discarded", f"{counts['crash']} crashed"]
        parts += [f"{state.refused} refused"] + [f"{new / hours:.1f} an hour"] * bool(new)
        return ", ".join(parts)


def verdict(e: Experiment) -> Text:
    """One line of a settled experiment."""
    change = "" if e.delta is None else f"{e.delta:+.6f}"
    head = Text.assemble(f"{e.id:4} ", (f"{e.status:8}", STYLE[e.status]), f"{change:10}")
    line = head.append(one_line(e.title))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def runs(e: Experiment) -> str:
    return count(len(e.values), "run")


def summary(folder: Path, state: State) -> str:
    """A few lines about the night in this folder: number of experiments, kept changes, baseline and incumbent."""
    if not state.incumbent:
        return f"{folder.name}: no experiment is finished yet"
    best, counts = state.incumbent, state.counts()
    lines = [
        f"{folder.name}: {count(len(state.tried_out), 'experiment')}: {counts['keep']} kept, {counts['discard']} "
        f"discarded, {counts['crash']} crashed, {state.refused} refused before training",
        f"baseline  {state.baseline.val_bpb:.6f}",
        f"incumbent {best.val_bpb:.6f} (experiment {best.id}, {runs(best)})",
        f"noise     {state.noise}",
    ]
    found = confirmed(state)
    lines += [f"confirmed {found.gain}, {count(found.pairs, 'new seed')}"] if found else []
    lines += [f"test text {found.test}"] if found and found.test else []
    shares = found.shares if found else {}
    for e in state.tried_out:
        if e.status == "keep":
            share = f"; the winner loses {shares[e.id]} without it" if e.id in shares else ""
            lines.append(f"  kept {e.id}: {e.title} ({e.delta:+.6f}{share})")
    lines += Suggestions(folder).lines(state.suggestions)
    return "\n".join(lines)
