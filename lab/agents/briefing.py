"""The interface of an agent, and the briefing that every agent gets.

`propose(briefing)` returns an experiment, `tell(proposal, outcome)` reports its result. The briefing holds all that an
agent may know and is rebuilt from the journal before every experiment, so an agent without other state resumes after
a kill as if nothing had happened. After `NoProposal` the caller asks another agent.

The drivers: search (needs nothing), ollama (a local model), command (any coding CLI) and hybrid.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

from lab.agents.evidence import Result, Tried, failures, results
from lab.errors import one_line
from lab.files import ROOT
from lab.loop import ideas, space
from lab.loop.history import Experiment, State
from lab.loop.ideas import Idea
from lab.loop.ledger import Effect, effect
from lab.loop.proposal import Proposal, changes, in_words
from lab.loop.source import Constant, Rejected, constants, fingerprint
from lab.machine.hardware import describe
from lab.preset import from_dict

MEASURED_SHARE = 4  # of a briefing's room, at most a fourth is for the last experiments in numbers
PLATEAU = 15  # experiments without a kept one
REMEMBERED = 6  # effects of earlier nights in a briefing
BYTES_PER_TOKEN = 2.5  # code and figures give 3 to 4 with current tokenizers: estimates err on the long side


class NoProposal(Exception):
    """The agent has nothing to propose for this experiment; the message says why in one line."""


class Agent(Protocol):
    name: str

    def propose(self, briefing: "Briefing") -> Proposal:
        """The next experiment. Raises NoProposal, or UserError when only the user can fix it."""
        ...

    def tell(self, proposal: Proposal, outcome: Tried) -> None:
        """The outcome of a proposal."""
        ...


@dataclass(frozen=True)
class Briefing:
    """Everything an agent may know before it proposes."""

    number: int  # of the experiment to propose, from 1
    source: str  # the incumbent's train.py
    settings: Mapping[str, Any]  # the values of SETTINGS in train.py
    program: str = ""  # program.md
    task: str = ""  # task and machine in one line
    value: float | None = None  # the incumbent's val_bpb
    noise: float | None = None  # standard deviation of a difference of val_bpb at the same seed
    history: Sequence[Tried] = ()  # oldest first
    near_misses: Sequence[Tried] = ()
    last_failure: str = ""  # structured summary of the last crash
    refused: str = ""  # why the last proposal for this experiment was refused
    refused_source: str = ""  # that proposal's train.py, for agents that can fix it
    attempt: int = 0  # earlier requests for this experiment; each attempt draws again
    plateau: bool = False
    measured: Sequence[str] = ()  # the last experiments in numbers, see lab.agents.compared
    wish: str = ""  # what a person asks for, in words: this experiment has to follow it
    tried: AbstractSet[str] = field(default_factory=frozenset)  # fingerprints, made with `settings`
    ideas: Mapping[str, Idea] = field(default_factory=dict)  # all of ideas/, by name
    idea_errors: Sequence[str] = ()  # files there that are none, one line each
    memory: Sequence[tuple[Effect, float]] = ()  # what earlier nights found, and how much it counts here, up to 1

    def constants(self) -> dict[str, Constant]:
        return constants(self.source, self.settings)

    def results(self) -> list[Result]:
        """What the history says about the constants."""
        return results(self.history, {name: constant.value for name, constant in self.constants().items()})

    def menu(self) -> dict[str, list[Any]]:
        """Values to try for each constant: valid, not tried yet, not known to fail."""
        current = {name: constant.value for name, constant in self.constants().items()}
        failed, menu = failures(self.results()), {}
        for name, options in space.menu(self.source, self.settings, self.tried).items():
            safe = [value for value in options if not any(one.excludes({**current, name: value}) for one in failed)]
            if safe:
                menu[name] = safe
        return menu

    def untried_ideas(self) -> list[Idea]:
        """Ideas that fit the incumbent and were neither tried by themselves nor refused."""
        return [self.ideas[name] for name in self.ideas_left() if self._fits(name)]

    def ideas_left(self) -> list[str]:
        """Names of the ideas that were not tried by themselves, whether they fit or not."""
        alone = [t.edit["ideas"] for t in self.history if t.edit and t.edit.get("ideas") and t.verdict != "invalid"]
        return [name for name in self.ideas if [name] not in alone]

    def _fits(self, name: str) -> bool:
        try:
            return fingerprint(ideas.apply(self.source, [name], self.ideas), self.settings) not in self.tried
        except Rejected:
            return False

    def render(self, max_tokens: int, code: str | None = None) -> str:
        """The briefing as Markdown of about `max_tokens` tokens at most; `code`, if given, for the source.

        When it does not fit, the oldest rows of the history go first, then the end of program.md. Raises
        NoProposal when the code alone is too long.
        """
        room = int(max_tokens * BYTES_PER_TOKEN)
        code = self.source if code is None else code
        shown = f"## train.py\n```python\n{code.strip()}\n```" if code else ""
        parts = (self._standing(), shown, self._failures(room // 8), self._plateau(), self._wish())
        fixed, most, some = [part for part in parts if part], room // MEASURED_SHARE, room // 8
        room -= sum(_bytes(part) + 2 for part in fixed)
        if room < 0:
            raise NoProposal(f"the code does not fit in a briefing of {max_tokens} tokens")
        for part in (self._near_misses(), self._ideas(min(some, room // 2)), self._memory()):
            if part and _bytes(part) + 2 <= room:
                fixed.append(part)
                room -= _bytes(part) + 2
        measured = self._measured(min(most, room // 2))
        room -= _bytes(measured) + 2
        program = _cut(f"# Programme\n{self.program.strip()}", max(room // 4, room - 6000)) if self.program else ""
        history = self._history(room - _bytes(program) - 2)
        return "\n\n".join(part for part in (program, *fixed, measured, history) if part) + "\n"

    def _standing(self) -> str:
        value = "not measured yet" if self.value is None else f"{self.value:.6f}"
        noise = "" if self.noise is None else f"; differences at the same seed vary by {self.noise:.4f}"
        return (
            f"## Current state\n{self.task}\nExperiment {self.number}. "
            f"The incumbent's val_bpb (bits per byte, lower is better): {value}{noise}."
        )

    def _failures(self, room: int) -> str:
        parts = [f"## The last failure\n{_cut(one_line(self.last_failure, 1500), room)}"] if self.last_failure else []
        parts += [f"## Your last proposal was refused\n{one_line(self.refused, 300)}"] if self.refused else []
        return "\n\n".join(parts)

    def _near_misses(self) -> str:
        rows = [row(tried) for tried in self.near_misses[-8:]]
        return "\n".join(["## Near misses: better, but within the noise", *rows]) if rows else ""

    def _measured(self, room: int) -> str:
        """As many of the latest lines as fit behind the legend and the incumbent."""
        head = ["## The last experiments in numbers, against the incumbent at the same seed", *self.measured[:2]]
        rows: list[str] = []
        for line in reversed(self.measured[2:]):
            if _bytes("\n".join([*head, line, *rows])) > room:
                break
            rows.insert(0, line)
        return "\n".join([*head, *rows]) if rows else ""

    def _memory(self) -> str:
        """The largest effects of earlier nights whose interval excludes zero."""
        clear = [(one, trust) for one, trust in self.memory if one.high < 0 or one.low > 0]
        largest = sorted(clear, key=lambda line: -abs(line[0].effect) * line[1])[:REMEMBERED]
        rows = [_remembered(one, trust) for one, trust in largest]
        return "\n".join(["## Earlier nights (change in val_bpb, 95 % interval)", *rows]) if rows else ""

    def _plateau(self) -> str:
        text = "No change was kept for a long time. Move away from here: change something that was not changed yet."
        return f"## Plateau\n{text}" if self.plateau else ""

    def _wish(self) -> str:
        text = f"This experiment has to follow it as closely as possible:\n{self.wish}"
        return f"## A person suggests\n{text}" if self.wish else ""

    def _ideas(self, room: int) -> str:
        """The ideas that were not tried, with their claims where these fit, and files that are no ideas."""
        head, untried = "## Ideas not tried yet: changes that are written already, in ideas/", self.untried_ideas()
        full = "\n".join([head, *(f"{idea.name}: {idea.claim}" for idea in untried)])
        names = f"{head}\n{', '.join(idea.name for idea in untried)}"
        parts = [full if _bytes(full) <= room else _cut(names, room)] if untried else []
        if self.idea_errors:
            parts.append("\n".join(["## Files in ideas/ that cannot be used", *self.idea_errors[:3]]))
        return "\n\n".join(parts)

    def _history(self, room: int) -> str:
        """As many of the latest rows as fit, oldest first."""
        head = "## Tried so far (change in val_bpb against the incumbent at the time, negative is better)"
        room -= _bytes(head) + 40
        rows: list[str] = []
        for tried in reversed(self.history):
            line = row(tried)
            room -= _bytes(line) + 1
            if room < 0:
                break
            rows.append(line)
        left_out = len(self.history) - len(rows)
        note = [f"({left_out} older ones left out)"] if left_out else []
        return "\n".join([head, *note, *reversed(rows)]) if rows else ""


def brief(state: State, night: Mapping[str, Any], source: str, attempt: int = 0, refused: str = "",
          refused_source: str = "", measured: Sequence[str] = (),
          memory: Sequence[Effect] = ()) -> Briefing:  # fmt: skip
    """The briefing for the next experiment: `night` is its settings.json, `source` the incumbent's train.py, `memory`
    what other nights found."""
    judged = [e for e in state.experiments if not e.baseline and e.status != "pending"]
    kept = max((e.id for e in state.experiments if e.status == "keep"), default=0)
    last = state.experiments[-1]
    program = ROOT / "program.md"
    known, errors = ideas.load_all()
    return Briefing(
        number=len(state.experiments),
        source=source,
        settings=from_dict(night["preset"]).settings(),
        program=program.read_text(encoding="utf-8") if program.is_file() else "",
        task=task_line(night),
        value=state.incumbent.val_bpb if state.incumbent else None,
        noise=state.noise.pair if state.noise else None,
        history=[*(outcome(e, state.experiments) for e in judged), *map(refusal, state.refusals)],
        near_misses=[outcome(e) for e in judged if e.near_miss],
        last_failure=last.reason if last.status == "crash" and not last.spoiled else "",
        refused=refused,
        refused_source=refused_source,
        measured=measured,
        attempt=attempt,
        plateau=len(state.experiments) - kept > PLATEAU,
        tried=state.tried.keys(),
        ideas=known,
        idea_errors=errors,
        memory=[(one, one.trust(*where(night))) for one in memory],
    )


def where(night: Mapping[str, Any]) -> tuple[str, str]:
    """Task and machine of a night."""
    preset, chip = from_dict(night["preset"]), describe()
    task = f"{preset.name}: context {preset.task.sequence_length} tokens, {night['minutes']:g} minutes of training"
    return task, f"{chip['chip']} ({chip['backend']}, {chip['gpu_memory_gb'] or chip['memory_gb']:.0f} GB)"


def task_line(night: Mapping[str, Any]) -> str:
    """Task and machine of a night in one line."""
    return "Preset {} on {}.".format(*where(night))


def outcome(e: Experiment, known: Sequence[Experiment] = ()) -> Tried:
    """An experiment as agents see it. `known`: all of the night by id; later runs of a kept one then count too."""
    verdict = "discard" if e.status == "pending" else "invalid" if e.spoiled or e.skipped else e.status
    return Tried(e.id, e.hypothesis, verdict, effect(e, known) if known else e.delta, e.edit, e.error or 0.0)


def refusal(entry: Mapping[str, Any]) -> Tried:
    """A refused proposal (State.refusals) as agents see it. What it changed is evidence only if it was run."""
    edit = entry.get("edit") if entry["reason"].startswith("preflight") else None
    return Tried(entry["after"] + 1, f"{entry['hypothesis']}: {entry['reason']}", "rejected", edit=edit)


def _remembered(one: Effect, trust: float) -> str:
    what = ", ".join(changes({"values": one.values, "was": one.was, "ideas": one.ideas}))
    where = "" if trust == 1 else ", on another task or machine"
    return f"{one.effect:+.5f} ({one.low:+.5f} to {one.high:+.5f}) {one_line(what, 120)} [night {one.night}{where}]"


def row(tried: Tried) -> str:
    """One line of the history: verdict, change of val_bpb, what was changed and why."""
    delta = "   --   " if tried.delta is None else f"{tried.delta:+.5f}"
    edit = tried.edit or {}
    what = f" [{one_line(', '.join(changes(edit)[:6]), 120)}]" if edit else ""
    named = "definitions" not in edit or "ideas" in edit
    repeats = edit and named and in_words(edit) in tried.hypothesis  # adds nothing
    why = "" if repeats else f" {one_line(tried.hypothesis)}"
    return f"{tried.number:4d} {tried.verdict:8s} {delta}{what}{why}"


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _cut(text: str, room: int) -> str:
    """The start of `text` in at most `room` bytes, marked [cut] when it was cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= room:
        return text
    mark = "\n[cut]"
    return raw[: max(0, room - len(mark))].decode("utf-8", "ignore") + mark if room > 200 else ""
