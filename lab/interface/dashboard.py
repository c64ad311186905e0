"""The night on a terminal: a panel below the log that says what it is at, what it has found, and how long it takes.

It reads the night's state about once a second and changes nothing. What is printed while it stands appears above it,
so the log stays in the terminal's own history; at the end the panel is taken away and the summary is what remains.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.errors import one_line
from lab.loop.history import Experiment
from lab.machine.condition import Condition
from lab.show import QUIET, WIDEST, bar, live_console, minutes
from lab.trial.crash import read_steps

REPAINTS = 1.0  # a second
VERDICTS = 4  # the last ones that are shown
ECHO = 4  # columns left free for two ^C, which would otherwise go to the next line and shift what is painted over
STYLE = {"keep": "green", "discard": "dim", "crash": "red"}


def dashboard(night: Any, deadline: datetime | None, verbosity: int) -> AbstractContextManager:
    """The panel of an agent_loop.Night for the time of the block, on a terminal; elsewhere, or when quiet, nothing."""
    console = live_console(sys.stdout)
    if console is None or verbosity == QUIET:
        return nullcontext()
    view = View(night, deadline, console)
    return Live(get_renderable=view.panel, console=console, refresh_per_second=REPAINTS, transient=True)


class View:
    """What the panel says of a night now. `deadline`: when no new experiment starts."""

    def __init__(self, night: Any, deadline: datetime | None, console: Console):
        self.night, self.deadline, self.console = night, deadline, console
        self.width, self.begun, self.known = 0, time.monotonic(), len(night.journal.state.settled)

    def panel(self) -> Panel:
        drawn, self.width = self.width, min(self.console.width - ECHO, WIDEST)
        if self.width < drawn:  # the terminal has wrapped the panel's lines
            self.console.clear()
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(style="bold", min_width=9)
        rows.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, told in self.rows():
            rows.add_row(name, Text(told) if isinstance(told, str) else told)
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
        """When the night ends, and what a Ctrl-C does now."""
        if reason := self.night.stop():
            return f"ends after this experiment ({reason}); Ctrl-C: at once"
        told = "Ctrl-C: end after this experiment"
        if not self.deadline:
            return told
        left = (self.deadline - datetime.now()).total_seconds()
        return f"until {self.deadline:%H:%M}, {minutes(left)} left; {told}"

    def rows(self) -> Iterator[tuple[str, Any]]:
        state = self.night.journal.state
        yield "incumbent", self.incumbent()
        yield "idea", one_line(state.pending.hypothesis if state.pending else self.night.idea or "-")
        yield "now", self.now()
        yield "verdicts", Group(*map(verdict, state.tried_out[-VERDICTS:])) if state.tried_out else "none yet"
        yield "night", self.pace()
        yield "machine", str((state.condition and Condition(**state.condition)) or "not measured yet")

    def incumbent(self) -> str:
        state = self.night.journal.state
        if not (best := state.incumbent):
            return "none yet: the baseline is being measured"
        told = f"{best.val_bpb:.6f} ± {best.error:.4f} (experiment {best.id}, {runs(best)})"
        return f"{told}, baseline {state.baseline.val_bpb:.6f}" if best is not state.baseline else told

    def now(self) -> Text:
        """The phase, how long it has lasted, and for training how far it is."""
        phase = self.night.runner.phase
        told = Text(f"{phase.name or f'thinking ({self.night.agent.name})'} ")
        steps = read_steps(phase.run_dir / "steps.jsonl") if phase.run_dir else ()
        if not steps:
            return told.append(minutes(time.monotonic() - phase.since))
        seconds, budget = steps[-1].get("seconds", 0.0), self.night.runner.settings["minutes"] * 60
        seconds = seconds if 0 <= seconds <= budget else budget  # it is the experiment's to write
        who = " (the incumbent)" if self.night.journal.state.step().who == "incumbent" else ""
        told.append(f"{phase.run_dir.name}{who} ").append(bar(seconds / budget, 16))
        told.append(f" {100 * seconds / budget:3.0f}%  {minutes(budget - seconds)} left")
        return told.append(f"  loss {steps[-1].get('loss', float('nan')):.4f}")

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
    line = head.append(one_line(e.hypothesis))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def runs(e: Experiment) -> str:
    return f"{len(e.values)} run{'s' * (len(e.values) > 1)}"


def summary(night: Any) -> str:
    """A few lines: how many experiments, what was kept, baseline and incumbent."""
    state = night.journal.state
    if not state.incumbent:
        return f"{night.folder.name}: no experiment is finished yet"
    best, counts = state.incumbent, state.counts()
    lines = [
        f"{night.folder.name}: {len(state.tried_out)} experiments: {counts['keep']} kept, {counts['discard']} "
        f"discarded, {counts['crash']} crashed, {state.refused} refused before training",
        f"baseline  {state.baseline.val_bpb:.6f}",
        f"incumbent {best.val_bpb:.6f} (experiment {best.id}, {runs(best)})",
        f"noise     {state.noise}",
    ]
    lines += [f"  kept {e.id}: {e.hypothesis} ({e.delta:+.6f})" for e in state.tried_out if e.status == "keep"]
    return "\n".join(lines)
