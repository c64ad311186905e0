"""The state of a night, folded from its events: experiments, incumbent, noise, and what comes next. Pure.

`FIELDS` is the schema of the events that lab.loop.journal stores. `State.check` rejects an event that does not follow
from the state, `State.apply` folds it in at constant cost, and `State.step` returns what a new or resumed loop does
next. Sources are not kept and texts are cut to one printable line, so the state takes about a kilobyte per experiment.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple

from lab.errors import one_line
from lab.loop import space
from lab.loop.pace import paced
from lab.loop.proposal import title
from lab.loop.verdict import Code, Decision, Rigor, Run, decide

TEXT = 300  # characters of a hypothesis or reason kept in the state
REFUSALS = 20  # last refused proposals kept in the state
TIMINGS = 3  # of an experiment in turn with the incumbent, at most
TEACHERS = 40  # most discarded experiments that a verdict reads: its time grows with their number
# Fields of each event besides n, time and event; more may be added. id: experiment. commit: 40 hex digits. source:
# sha256 of train.py. fingerprint: of its normalised AST ("" if it does not parse). nodes: of its AST. status:
# ok | crash | invalid. val_bpb: None unless ok. minutes: wall-clock. delta, sigma: bits per byte. Journals of
# earlier versions lack a run's pace and a verdict's seed, error, pair and standing.
FIELDS: dict[str, tuple[str, ...]] = {
    "start": ("tag", "commit"),
    "proposal": ("id", "agent", "hypothesis", "commit", "source", "fingerprint", "nodes"),
    "refused": ("agent", "hypothesis", "fingerprint", "reason"),
    "run": ("id", "who", "run", "seed", "status", "val_bpb", "memory_gb", "minutes", "reason"),
    "verdict": ("id", "verdict", "who", "delta", "sigma", "near_miss", "reason"),
    "kept": ("id",),
    "discarded": ("id",),
    "crashed": ("id", "reason"),
    "confirmation": ("id", "without", "run", "seed", "status", "val_bpb", "test_bpb", "reason"),
    "skipped": ("id", "reason"),
    "hopeless": ("id", "run", "delta", "reason"),
    "timed": ("id", "work", "ratio", "error"),
    "note": ("text",),
}
CLOSING = {"kept": "keep", "discarded": "discard", "crashed": "crash"}
LARGEST = 1e100  # of any number in a journal
NUMBER = int | float
TYPES = (
    dict.fromkeys(
        ("tag", "commit", "agent", "hypothesis", "source", "fingerprint", "reason", "run", "text", "suggestion"), str
    )
    | dict.fromkeys(("id", "nodes", "seed", "work"), int)
    | dict.fromkeys(("near_miss", "spoiled"), bool)
    | dict.fromkeys(("memory_gb", "minutes", "delta", "sigma", "flops", "slept"), NUMBER)
    | dict.fromkeys(("val_bpb", "test_bpb", "pace", "speed", "error", "pair", "standing", "ratio"), NUMBER | None)
    | dict.fromkeys(("swap_mb", "memory_pressure", "heat"), NUMBER | None)
    | dict.fromkeys(("tokens", "without"), int | None)
    | dict.fromkeys(("edit", "before", "after"), dict | None)
    | {"power": str | None}
)
CHOICES = {
    "status": ("ok", "crash", "invalid"),
    "verdict": ("keep", "discard", "again"),
    "who": ("candidate", "incumbent"),
}


@dataclass
class Experiment:
    id: int
    agent: str
    hypothesis: str
    commit: str
    fingerprint: str
    nodes: int
    edit: dict[str, Any] | None = None  # its change, as in lab.loop.proposal.Proposal
    baseline: bool = False  # proposed while there was no incumbent: the first, and the next if that one crashed
    spoiled: bool = False  # its runs were spoiled by the machine; it counts as crashed
    status: Literal["pending", "keep", "discard", "crash"] = "pending"
    results: list[Run] = field(default_factory=list)  # its valid runs, including later ones as incumbent
    parent: int | None = None  # the incumbent that it changes
    same_work: bool = False  # it does the same work for a token as the incumbent that it changes
    work: int = 0  # the first experiment that does the same work for a token
    timed: tuple[int, float, float] | None = None  # as in lab.loop.verdict.Code
    timings: int = 0  # how often it was timed; TIMINGS once that failed
    selected: int = 0  # number of its first runs, on which it was kept
    val_bpb: float | None = None  # the baseline's, plus the difference by the verdicts
    runs: int = 0  # valid or not
    memory_gb: float = 0.0  # largest peak of its runs
    minutes: float = 0.0  # all its runs together
    delta: float | None = None  # the last verdict's, bits per byte
    error: float | None = None  # standard error of delta; for the baseline, of its mean
    verdict: str = ""
    near_miss: bool = False
    reason: str = ""
    names: dict[int, str] = field(default_factory=dict)  # seed -> name of its last valid run
    ended_run: str = ""  # name of the run that was ended because it was going to lose
    skipped: bool = False  # a person ended it before its verdict; it counts as discarded

    @property
    def title(self) -> str:
        return title(self.edit, self.hypothesis)

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.results]

    @property
    def code(self) -> Code:
        """Its runs, as the verdict needs them."""
        parent = self.parent if self.status == "keep" else None
        return Code(self.id, self.results, parent, self.selected, self.work, self.timed)


class Confirmation(NamedTuple):
    """One run of the morning's confirmation (lab.loop.confirm)."""

    id: int  # experiment
    without: int | None  # kept change that was taken back
    seed: int
    status: str  # ok, crash or invalid
    run: Run | None
    test: Run | None  # the same, scored on the text that no verdict looks at


class Noise(NamedTuple):
    """Standard deviations in bits per byte, as the last verdict estimated them."""

    sigma: float  # of a run with another seed
    pair: float | None  # of a difference at the same seed; None in journals without it

    def __str__(self) -> str:
        pair = "" if self.pair is None else f", and a difference at the same seed by {self.pair:.4f}"
        return f"one run of the same code varies by {self.sigma:.4f} with its seed{pair}"


@dataclass(frozen=True)
class Step:
    """What a new or resumed loop does next."""

    action: Literal["propose", "run", "judge", "settle"]
    id: int = 0  # the current experiment
    who: Literal["candidate", "incumbent"] = "candidate"
    run: str = ""  # name of the run, if action is "run"
    seed: int = 0  # of the run
    verdict: str = ""  # "keep", "discard" or "crash", if action is "settle"


@dataclass
class State:
    """The fold of a journal. `apply` takes constant time, however long the journal is."""

    n: int = 0
    start: dict[str, Any] = field(default_factory=dict)  # the first "start" event
    experiments: list[Experiment] = field(default_factory=list)  # index = id
    incumbent: Experiment | None = None
    pending: Experiment | None = None
    baseline: Experiment | None = None  # the first that was kept
    noise: Noise | None = None  # from the first verdict on
    seeds: int = 0  # the highest seed of a run
    tried: dict[str, int] = field(default_factory=dict)  # AST fingerprint -> experiment, or -1 if refused
    refusals: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REFUSALS))
    refused: int = 0
    confirmations: list[Confirmation] = field(default_factory=list)
    suggestions: dict[str, str] = field(default_factory=dict)  # taken ones by name -> why refused, or ""
    condition: dict[str, Any] | None = None  # lab.machine.condition.Condition at the end of the last run
    speed: float | None = None  # of the machine during the first run: pace 1
    remeasure: bool = True  # False once the incumbent crashed during the pending experiment
    _next: Step = field(default_factory=lambda: Step("propose"))

    @property
    def settled(self) -> list[Experiment]:
        """The experiments with a verdict."""
        return [e for e in self.experiments if e.status != "pending"]

    @property
    def tried_out(self) -> list[Experiment]:
        """The settled experiments without the baseline."""
        return [e for e in self.settled if e is not self.baseline]

    def counts(self) -> dict[str, int]:
        """The number of `tried_out` by status."""
        ends = [e.status for e in self.tried_out]
        return {status: ends.count(status) for status in CLOSING.values()}

    def step(self) -> Step:
        """What comes next, a "run" with its name and seed."""
        return self._run_step(self._next) if self._next.action == "run" else self._next

    def _run_step(self, now: Step) -> Step:
        ran = self.incumbent if now.who == "incumbent" else self.pending
        number = ran.runs + 1
        return Step("run", self.pending.id, now.who, f"e{ran.id:04d}-r{number}", now.seed or number)

    def runs(self) -> Iterator[str]:
        """The names of all runs so far, and of those that may come next."""
        for ran in self.experiments:
            next_run = self.pending is not None and (ran is self.pending or ran is self.incumbent)
            for number in range(1, ran.runs + next_run + 1):
                yield f"e{ran.id:04d}-r{number}"

    def head(self) -> str:
        """The commit that the branch must be on: the candidate's, or the incumbent's once it is settled."""
        if self.pending and self._next.verdict not in ("discard", "crash"):
            return self.pending.commit
        return self.incumbent.commit if self.incumbent else self.start["commit"]

    def judge(self, rigor: Rigor = "full", to_come: int | None = None) -> Decision:
        """The verdict on the pending experiment, once `step` says "judge"; `to_come` as in `decide`."""
        best = self.incumbent
        codes = [e.code for e in (self.pending, *([best] if best else []), *self.teachers())]
        candidate, *known = paced(codes, (best or self.pending).work)
        return decide(
            candidate,
            known[0] if best else None,
            known[1:],
            new_seed=self.seeds + 1,
            rigor=rigor,
            simpler=best is not None and self.pending.nodes < best.nodes,
            remeasure=self.remeasure,
            to_come=to_come,
        )

    @property
    def can_be_timed(self) -> bool:
        """Whether the pending experiment has a run and may be timed in turn with the incumbent before its verdict."""
        now = self.pending
        return bool(now and now.results and self.incumbent and now.timings < TIMINGS and self._next.action == "judge")

    def teachers(self) -> list[Experiment]:
        """What the verdict estimates seeds and noise from: the kept ones and the last others with several runs."""
        decided = [e for e in self.experiments if e.status in ("keep", "discard") and e is not self.incumbent]
        kept = [e for e in decided if e.status == "keep"]
        return kept + [e for e in decided if e.status == "discard" and len(e.results) > 1][-TEACHERS:]

    def check(self, event: str, fields: dict[str, Any]) -> None:
        """Raise ValueError if the event does not follow from this state: a bug in the caller, or a damaged file."""
        if event not in FIELDS:
            raise ValueError(f"unknown event {event!r}")
        if missing := [name for name in FIELDS[event] if name not in fields]:
            raise ValueError(f"{event} has no {', '.join(missing)}")
        if not self.start and event != "start":
            raise ValueError(f"{event} before start")
        for key, value in self._expected(event).items():
            if fields.get(key) != value:
                raise ValueError(f"{event} with {key} {fields.get(key)!r} does not follow: next is {self.step()}")
        _check_values(fields)
        if event == "run" and fields["status"] == "ok" and fields["val_bpb"] is None:
            raise ValueError("run without val_bpb")
        timed = event == "timed" and fields["ratio"] is not None
        if timed and not 0 < (fields["error"] or 0) < 10 > abs(fields["ratio"]):
            raise ValueError("timed without its error")
        if event == "verdict" and not self._can_follow(fields["verdict"], fields["who"]):
            raise ValueError(
                f"verdict {fields['verdict']} for the {fields['who']} does not follow: next is {self.step()}"
            )

    def _can_follow(self, verdict: str, who: str) -> bool:
        """Whether the pending experiment can be settled, or the one that is to run again exists."""
        return bool(self.pending.results) if verdict != "again" else who == "candidate" or self.incumbent is not None

    def _expected(self, event: str) -> dict[str, Any]:
        """The values that the event must have. ValueError if another event is next."""
        now = self.step()
        if event == "timed" and not self.can_be_timed:
            raise ValueError(f"timed does not follow: next is {now}")
        if event in ("skipped", "hopeless"):
            if now.action not in ("run", "judge") or self.pending.baseline:
                raise ValueError(f"{event} does not follow: next is {now}")
            return {"id": now.id}
        if event == "run" and now.action == "judge" and not self.pending.runs:
            now = self._run_step(now)  # earlier versions had no verdict before the first run
        turn = {"proposal": "propose", "run": "run", "verdict": "judge", "timed": "judge"}
        turn |= dict.fromkeys(CLOSING, "settle")
        wrong = CLOSING.get(event, now.verdict) != now.verdict
        if event in turn and (turn[event] != now.action or wrong):
            raise ValueError(f"{event} does not follow: next is {now}")
        if event == "proposal":
            return {"id": len(self.experiments)}
        if event == "run":
            return {"id": now.id, "who": now.who, "run": now.run}
        return {"id": now.id} if event in turn else {}

    def apply(self, record: dict[str, Any]) -> None:
        """Fold in one event that `check` accepted."""
        self.n = record["n"]
        event = "closed" if record["event"] in CLOSING else record["event"]
        if name := record.get("suggestion"):
            self.suggestions[name] = record.get("reason", "")
        getattr(self, f"_{event}")(record)

    def _start(self, record: dict[str, Any]) -> None:
        self.start = self.start or record

    def _note(self, record: dict[str, Any]) -> None:
        pass

    def _refused(self, record: dict[str, Any]) -> None:
        self.refused += 1
        short = {key: one_line(record[key], TEXT) for key in FIELDS["refused"]}
        self.refusals.append({**short, "edit": record.get("edit"), "after": len(self.experiments) - 1})
        if record["fingerprint"]:
            self.tried.setdefault(record["fingerprint"], -1)

    def _proposal(self, record: dict[str, Any]) -> None:
        given = {key: record[key] for key in ("id", "commit", "fingerprint", "nodes")}
        given |= {key: one_line(record[key], TEXT) for key in ("agent", "hypothesis")} | {"edit": record.get("edit")}
        parent = self.incumbent and self.incumbent.id
        edit = given["edit"] or {}
        same = self.incumbent is not None and edit.get("form") == "set" and space.same_work(edit["values"])
        given |= {"same_work": same, "work": self.incumbent.work if same else given["id"]}
        self.pending = Experiment(**given, baseline=self.incumbent is None, parent=parent)
        self.experiments.append(self.pending)
        self.tried[record["fingerprint"]] = record["id"]
        self.remeasure = True
        self._next = Step("judge", record["id"])

    def _run(self, record: dict[str, Any]) -> None:
        candidate = record["who"] == "candidate"
        ran = self.pending if candidate else self.incumbent
        ran.runs += 1
        self.seeds = max(self.seeds, record["seed"])
        ran.minutes += record["minutes"]
        ran.memory_gb = max(ran.memory_gb, record["memory_gb"])
        self.condition = record.get("after") or self.condition
        self.speed = self.speed or record.get("speed")
        if record["status"] == "invalid":
            self._next = Step("run", self.pending.id, record["who"], seed=record["seed"])
            return
        self._next = Step("judge", self.pending.id)
        if record["status"] == "ok":
            measured = record["seed"], record["val_bpb"], record.get("pace"), record["n"], record.get("tokens")
            ran.results.append(Run(*measured))
            ran.names[record["seed"]] = record["run"]
        elif candidate:
            self._next = Step("settle", ran.id, verdict="crash")
            ran.reason, ran.spoiled = one_line(record["reason"], TEXT), record.get("spoiled", False)
        else:
            self.remeasure = False

    def _confirmation(self, record: dict[str, Any]) -> None:
        self.speed = self.speed or record.get("speed")
        values, known = (record["val_bpb"], record["test_bpb"]), (record.get("pace"), record["n"], record.get("tokens"))
        runs = [None if value is None else Run(record["seed"], value, *known) for value in values]
        name = record["id"], record["without"], record["seed"]
        self.confirmations.append(Confirmation(*name, record["status"], *runs))

    def _verdict(self, record: dict[str, Any]) -> None:
        judged = self.pending
        judged.verdict, judged.near_miss, judged.reason = (
            record["verdict"],
            record["near_miss"],
            one_line(record["reason"], TEXT),
        )
        if record["sigma"]:
            self.noise = Noise(record["sigma"], record.get("pair"))
        if judged.results:
            judged.delta = record["delta"]
            judged.error = record.get("error", record["sigma"] / len(judged.results) ** 0.5)
            self._place(judged, record)
        if record["verdict"] == "again":
            self._next = Step("run", judged.id, record["who"], seed=record.get("seed", 0))
        else:
            self._next = Step("settle", judged.id, verdict=record["verdict"])

    def _place(self, judged: Experiment, record: dict[str, Any]) -> None:
        """Set val_bpb of the judged experiment, and of the incumbent from its later runs."""
        if not (best := self.incumbent):
            judged.val_bpb = fmean(judged.values)
            return
        if record.get("standing") is not None:
            best.val_bpb = self.baseline.val_bpb + record["standing"]
        judged.val_bpb = best.val_bpb + record["delta"]

    def _timed(self, record: dict[str, Any]) -> None:
        now = self.pending
        now.timings = TIMINGS if record["ratio"] is None else now.timings + 1
        if record["ratio"] is not None and (not now.timed or record["error"] < now.timed[2]):
            now.timed = record["work"], record["ratio"], record["error"]

    def _skipped(self, record: dict[str, Any]) -> None:
        self.pending.skipped, self.pending.reason = True, record["reason"][:TEXT]
        self._closed({"event": "discarded"})

    def _hopeless(self, record: dict[str, Any]) -> None:
        lost = self.pending
        lost.ended_run, lost.reason, lost.delta = record["run"], record["reason"][:TEXT], record["delta"]
        lost.val_bpb = self.incumbent.val_bpb + record["delta"]
        self._closed({"event": "discarded"})

    def _closed(self, record: dict[str, Any]) -> None:
        self.pending.status = CLOSING[record["event"]]
        if record["event"] == "kept":
            self.incumbent = self.pending
            self.baseline = self.baseline or self.pending
            self.pending.selected = 0 if self.pending is self.baseline else len(self.pending.results)
        if self.pending.spoiled:
            self.tried.pop(self.pending.fingerprint, None)  # so that it can be proposed again
        self.pending, self._next = None, Step("propose")


def _check_values(fields: dict[str, Any]) -> None:
    """Raise ValueError for a value of another type than the journal's, or out of range."""
    for name, value in fields.items():
        kind = TYPES.get(name, object)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise ValueError(f"{name} is {one_line(repr(value), 40)}")
        if isinstance(value, NUMBER) and not -LARGEST < value < LARGEST:
            raise ValueError(f"{name} is out of range")
        if (kind is int and value < 0) or (name in ("pace", "speed", "tokens") and value is not None and value <= 0):
            raise ValueError(f"{name} is {value}")
        if value not in CHOICES.get(name, [value]) or (name == "commit" and not value.isalnum()):
            raise ValueError(f"{name} is {one_line(repr(value), 40)}")
        if name in ("before", "after") and value:
            _check_values({"flops": None, "slept": None} | value)
        if name == "edit" and value and not _is_edit(value):
            raise ValueError("edit is incomplete")


def _is_edit(edit: dict[str, Any]) -> bool:
    """Whether this is what lab.loop.proposal.describe returns."""
    tables, names = (edit.get("values", {}), edit.get("was", {})), edit.get("definitions", [])
    lists = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return lists and all(isinstance(table, dict) for table in tables)
