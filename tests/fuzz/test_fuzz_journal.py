"""The journal: any sequence of events that may follow keeps the state's invariants; any damage is refused in one line,
or leaves a state with which everything works that reads it."""

import copy
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from experiment import SOURCE
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from values import anything, damaged, is_short, mangled, texts

from lab.agents.briefing import BYTES_PER_TOKEN, brief
from lab.errors import UserError
from lab.interface import report
from lab.interface.dashboard import View, summary, verdict
from lab.loop.history import CLOSING, FIELDS, State
from lab.loop.journal import HEADER, Journal, _row
from lab.preset import load, to_dict

SETTINGS = {"preset": to_dict(load("offline")), "minutes": 5.0}
EVENT = {status: event for event, status in CLOSING.items()}
CONDITION = {"flops": 1e11, "slept": 0.5, "swap_mb": 3.0, "memory_pressure": 1, "heat": None, "power": "AC"}
constants = st.integers(1, 9) | st.just([0.9, 0.95]) | texts.filter(str.isascii)
edits = st.none() | st.fixed_dictionaries(
    {
        "form": st.just("set"),
        "values": st.dictionaries(st.sampled_from(["DEPTH", "BETAS", "WINDOW"]), constants, max_size=2),
        "was": st.just({"DEPTH": 4}),
    }
)
statuses = st.sampled_from(["ok"] * 6 + ["crash", "invalid"])
names = st.sampled_from(sorted({name for fields in FIELDS.values() for name in fields}))
values = st.floats(0.2, 4.0) | st.sampled_from([1.0, 1.0000001, 1e-6, 30.0, 1e30])


def folded(records: list[dict]) -> State:
    state = State()
    for record in records:
        state.check(record["event"], record)
        state.apply(record)
    return state


def use(state: State, folder: Path) -> None:
    """Everything that reads a state."""
    night = SimpleNamespace(
        folder=folder, journal=SimpleNamespace(state=state), runner=None, agent=None, idea="", suggestions=None
    )
    lines = summary(folder, state).splitlines()
    assert len(lines) <= 5 + len(state.experiments)
    for e in state.settled:
        assert len(_row(e).split("\t")) == len(HEADER.split("\t"))
        assert _row(e).count("\n") == 1
        assert _row(e).rstrip("\n").replace("\t", "").isprintable()
        verdict(e)
    assert all(line.isprintable() for line in lines)
    view = View(night, None, SimpleNamespace(width=100))
    assert view.incumbent()
    assert view.pace()
    if state.start:
        state.head()
        assert state.step().action in ("propose", "run", "judge", "settle")
    if state.pending and state.step().action == "judge":
        assert state.judge().verdict in ("keep", "discard", "again")
    if state.experiments:
        shown = brief(state, SETTINGS, SOURCE).render(9000)
        assert len(shown.encode()) <= 9000 * BYTES_PER_TOKEN
        assert all(line.isprintable() for line in shown.split("\n"))


class Events(RuleBasedStateMachine):
    """A loop that proposes, runs, judges and settles as State.step says, with any results."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.records, self.names = State(), [], set()
        self.add("start", tag="t", commit="b" * 40)

    def add(self, event: str, **fields: object) -> None:
        line = json.dumps({"n": self.state.n + 1, "time": "", "event": event, **fields}, allow_nan=False)
        record = json.loads(line)
        self.state.check(event, record)
        self.state.apply(record)
        self.records.append(record)

    def next_is(action: str):
        return precondition(lambda self: self.state.step().action == action)

    @next_is("propose")
    @rule(hypothesis=texts, edit=edits, nodes=st.integers(1, 20), mark=st.integers(0, 5))
    def propose(self, hypothesis, edit, nodes, mark):
        number = len(self.state.experiments)
        given = {"commit": f"{number:040x}", "source": "s", "fingerprint": f"f{mark}", "nodes": nodes, "edit": edit}
        self.add("proposal", id=number, agent="search", hypothesis=hypothesis, **given)

    @next_is("run")
    @rule(
        value=values,
        status=statuses,
        reason=texts,
        pace=st.none() | st.floats(0.5, 2),
        spoiled=st.booleans(),
        tokens=st.none() | st.integers(1, 10**9),
    )
    def run(self, value, status, reason, pace, spoiled, tokens=None):
        step = self.state.step()
        assert step.run not in self.names
        self.names.add(step.run)
        measured = {"memory_gb": 1.0, "minutes": 5.0, "reason": reason, "pace": pace, "spoiled": spoiled}
        measured |= {"tokens": tokens}
        value = value if status == "ok" else None
        self.add("run", id=step.id, who=step.who, run=step.run, seed=step.seed, status=status, val_bpb=value,
                 before=CONDITION, after=CONDITION, **measured)  # fmt: skip

    @next_is("judge")
    @rule(rigor=st.sampled_from(["full", "full", "none"]), to_come=st.none() | st.integers(0, 9))
    def judge(self, rigor, to_come):
        self.add("verdict", id=self.state.step().id, **vars(self.state.judge(rigor, to_come)))

    @precondition(lambda self: self.state.can_be_timed)
    @rule(ratio=st.none() | st.floats(-3, 3), error=st.floats(1e-4, 1))
    def time(self, ratio, error):
        now, best = self.state.pending, self.state.incumbent
        self.add("timed", id=now.id, work=best.work, ratio=ratio, error=None if ratio is None else error)

    @next_is("settle")
    @rule(reason=texts)
    def settle(self, reason):
        step = self.state.step()
        self.add(EVENT[step.verdict], id=step.id, reason=reason)

    @rule(hypothesis=texts, reason=texts, mark=st.integers(0, 5))
    def refuse(self, hypothesis, reason, mark):
        self.add(
            "refused", agent="ollama", hypothesis=hypothesis, fingerprint=f"f{mark}" if mark else "", reason=reason
        )

    @rule(event=st.sampled_from(sorted(FIELDS)), fields=st.dictionaries(names, anything))
    def refuse_an_event_that_does_not_follow(self, event, fields):
        before = copy.deepcopy(vars(self.state))
        with pytest.raises(ValueError, match=r"."):
            self.state.check(event, {"id": 10**6} | fields if event not in ("note", "start", "refused") else {})
        assert vars(self.state) == before

    @invariant()
    def is_whole(self):
        state, step = self.state, self.state.step()
        assert [e.id for e in state.experiments] == list(range(len(state.experiments)))
        assert (state.pending is None) == (step.action == "propose")
        assert [e for e in state.experiments if e.status == "pending"] == ([state.pending] if state.pending else [])
        kept = [e for e in state.experiments if e.status == "keep"]
        assert (state.baseline, state.incumbent) == ((kept[0], kept[-1]) if kept else (None, None))
        assert all(e.val_bpb is not None and math.isfinite(e.val_bpb) and e.error >= 0 for e in kept)
        for e in state.experiments:
            assert len({run.seed for run in e.results}) <= len(e.results) <= e.runs
        use(state, Path("night"))

    def teardown(self):
        assert vars(folded(self.records)) == vars(self.state)


TestEvents = Events.TestCase


# ---- damage


def a_night() -> list[dict]:
    """The records of a short night with every kind of event."""
    night = Events()
    night.propose("baseline", None, 9, 0)
    while night.state.step().action != "settle":
        night.judge("full", 2) if night.state.step().action == "judge" else night.run(
            1.0 + 0.001 * night.state.seeds, "ok", "", 1.0, False
        )
    night.settle("")
    night.refuse("wider", "was tried before", 3)
    for value, status in ((0.9, "ok"), (None, "crash"), (1.1, "ok")):
        night.propose("deeper", {"form": "set", "values": {"BETAS": [0.9, 0.95]}, "was": {"BETAS": [0.8, 0.9]}}, 9, 1)
        while night.state.step().action != "settle":
            if night.state.step().action == "judge":
                night.judge("full", 0)
            else:
                who = night.state.step().who
                night.run(value if who == "candidate" else 1.0, status if who == "candidate" else "ok", "", 1.0, False)
        night.settle("")
    night.propose("under way", {"form": "code", "definitions": ["MLP"]}, 9, 2)
    night.add("note", text="hot")
    return night.records


NIGHT = a_night()
LINES = "".join(json.dumps(record) + "\n" for record in NIGHT).encode()


def opened(content: bytes) -> None:
    """Read a journal with this content: it is refused in one line that names it, or everything works that reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(content)
        try:
            journal = Journal(folder)
        except UserError as error:
            is_short(error, 500, f"{path}: ")
            return
        use(journal.state, Path(folder))
        found = report.collect(Path(folder))
        report.summary(found)
        report._machine(found)
        for e in found.state.settled:
            report._row(found, e, {}, {e.id: []}, {})


@given(damaged(NIGHT))
def test_a_record_with_other_values_is_refused_or_usable(records):
    opened("".join(json.dumps(record) + "\n" for record in records).encode())


@given(mangled(LINES))
@example(b"[" * 100_000 + b"\n")
@example(b'{"n": 1, "event": "note", "text": 1' + b"0" * 5000 + b"}\n")
def test_a_damaged_journal_is_refused_or_usable(content):
    opened(content)


@given(st.integers(0, len(LINES)))
def test_a_journal_that_was_cut_off_is_a_shorter_night(end):
    whole = (LINES[:end] + b"\n" * (LINES[end : end + 1] == b"\n")).count(b"\n")  # complete, but for its newline
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "journal.jsonl").write_bytes(LINES[:end])
        assert vars(Journal(folder).state) == vars(folded(NIGHT[:whole]))
    opened(LINES[:end])
