"""The state of a night, folded from its events: experiments, incumbent, noise, and what comes next. Pure.

`FIELDS` is the schema of the events that lab.loop.journal stores. `State.check` rejects an event that does not follow
from the state, `State.apply` folds it in at constant cost, and `State.step` returns what a new or resumed loop does
next. Sources are not kept and texts are cut, so the state takes about a kilobyte per experiment.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import fmean
from typing import Any, Literal, NamedTuple

from lab.loop.verdict import Code, Decision, Rigor, Run, decide

TEXT = 300  # characters of a hypothesis or reason kept in the state
REFUSALS = 20  # last refused proposals kept in the state
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
    "note": ("text",),
}
CLOSING = {"kept": "keep", "discarded": "discard", "crashed": "crash"}


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

    @property
    def values(self) -> list[float]:
        return [run.value for run in self.results]

    @property
    def code(self) -> Code:
        """Its runs, as the verdict needs them."""
        return Code(self.id, self.results, self.parent if self.status == "keep" else None, self.selected)


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
    condition: dict[str, Any] | None = None  # lab.machine.condition.Condition at the end of the last run
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
        return decide(
            self.pending.code,
            best and best.code,
            [e.code for e in self._teachers()],
            new_seed=self.seeds + 1,
            rigor=rigor,
            simpler=best is not None and self.pending.nodes < best.nodes,
            remeasure=self.remeasure,
            to_come=to_come,
        )

    def _teachers(self) -> list[Experiment]:
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
        _check_values(event, fields)

    def _expected(self, event: str) -> dict[str, Any]:
        """The values that the event must have. ValueError if another event is next."""
        now = self.step()
        if event == "run" and now.action == "judge" and not self.pending.runs:
            now = self._run_step(now)  # earlier versions had no verdict before the first run
        turn = {"proposal": "propose", "run": "run", "verdict": "judge"} | dict.fromkeys(CLOSING, "settle")
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
        getattr(self, f"_{event}")(record)

    def _start(self, record: dict[str, Any]) -> None:
        self.start = self.start or record

    def _note(self, record: dict[str, Any]) -> None:
        pass

    def _refused(self, record: dict[str, Any]) -> None:
        self.refused += 1
        short = {key: str(record[key])[:TEXT] for key in FIELDS["refused"]}
        self.refusals.append({**short, "after": len(self.experiments) - 1})
        if record["fingerprint"]:
            self.tried.setdefault(record["fingerprint"], -1)

    def _proposal(self, record: dict[str, Any]) -> None:
        given = {key: record[key] for key in ("id", "agent", "commit", "fingerprint", "nodes")}
        given |= {"hypothesis": record["hypothesis"][:TEXT], "edit": record.get("edit")}
        parent = self.incumbent and self.incumbent.id
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
        if record["status"] == "invalid":
            self._next = Step("run", self.pending.id, record["who"], seed=record["seed"])
            return
        self._next = Step("judge", self.pending.id)
        if record["status"] == "ok":
            ran.results.append(Run(record["seed"], record["val_bpb"], record.get("pace")))
        elif candidate:
            self._next = Step("settle", ran.id, verdict="crash")
            ran.reason, ran.spoiled = record["reason"][:TEXT], record.get("spoiled", False)
        else:
            self.remeasure = False

    def _verdict(self, record: dict[str, Any]) -> None:
        judged = self.pending
        judged.verdict, judged.near_miss, judged.reason = (
            record["verdict"],
            record["near_miss"],
            record["reason"][:TEXT],
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

    def _closed(self, record: dict[str, Any]) -> None:
        self.pending.status = CLOSING[record["event"]]
        if record["event"] == "kept":
            self.incumbent = self.pending
            self.baseline = self.baseline or self.pending
            self.pending.selected = 0 if self.pending is self.baseline else len(self.pending.results)
        if self.pending.spoiled:
            self.tried.pop(self.pending.fingerprint, None)  # so that it can be proposed again
        self.pending, self._next = None, Step("propose")


def _check_values(event: str, fields: dict[str, Any]) -> None:
    if event == "run" and fields["status"] not in ("ok", "crash", "invalid"):
        raise ValueError(f"run with status {fields['status']!r}")
    if event == "run" and fields["status"] == "ok" and not isfinite(fields["val_bpb"]):
        raise ValueError(f"run with val_bpb {fields['val_bpb']}")
    if event == "run" and (pace := fields.get("pace")) is not None and not 0 < pace < inf:
        raise ValueError(f"run with pace {pace}")
    if event == "verdict" and fields["verdict"] not in ("keep", "discard", "again"):
        raise ValueError(f"verdict {fields['verdict']!r}")
