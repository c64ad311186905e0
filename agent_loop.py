"""A night of experiments: propose, check, commit, train, score, judge, keep or discard; repeat until morning.

    python agent_loop.py run --tag nov22                      until Ctrl-C; run it again to resume
    python agent_loop.py try -m "wider MLP"                   the same steps for a change you made yourself
    python agent_loop.py confirm                              the winner against the baseline with new seeds
    python agent_loop.py suggest "MATRIX_LR=0.03" | skip      while it runs: what comes next; end the experiment at hand
    python agent_loop.py status | replay 12 | report          report.html and progress.png

A night lives in nights/TAG: journal.jsonl (append-only), results.tsv (upstream's five columns), worktree/ (branch
autoresearch/TAG, the only place where train.py changes), runs/ and settings.json. Your own checkout is never changed.
Importing this module has no effect.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from lab.agents.briefing import Agent, outcome, task_line, where
from lab.agents.bundle import screened
from lab.agents.choose import choose_agent
from lab.agents.external import External
from lab.agents.propose import propose
from lab.errors import UserError
from lab.files import read_sealed, sealed, write_atomic
from lab.interface.commands import COMMANDS
from lab.interface.dashboard import dashboard, summary
from lab.interface.options import agent_options, end_options, futility_option, night_options, tag_option, until_option
from lab.loop import confirm, ledger, session
from lab.loop.branch import Branch
from lab.loop.confirm_runs import confirm_winner, time_to_confirm
from lab.loop.history import Experiment, Step
from lab.loop.journal import Journal
from lab.loop.proposal import Proposal
from lab.loop.stop import Until, end_calmly, stopper
from lab.loop.suggestions import Suggestions, skip_reason
from lab.loop.timing import time_in_turn
from lab.loop.watch import Watch
from lab.preset import from_dict
from lab.show import QUIET, Given, examples, in_utf8, log, outlast_reader, silent, verbosity_options
from lab.training.run import guarded
from lab.trial.runner import Skipped

INVALID_RUNS = 3  # in a row: the experiment counts as a crash and the night continues


@dataclass
class Night:
    """One night: its journal, branch and runner, and the agent that proposes."""

    folder: Path
    branch: Branch
    journal: Journal
    runner: Any  # lab.trial.runner.Runner, or a simulation of it
    rigor: str
    agent: Agent | None = None
    log: Callable[[str], None] = log
    stop: Callable[[], str] = lambda: ""  # the reason to end, or ""
    idea: str = ""  # the proposal that is being checked
    invalid: int = 0  # invalid runs in a row
    last: int | None = None  # number of the last experiment; None: not known
    deadline: Until | None = None  # when the night ends, its confirmation included
    suggestions: Suggestions | None = None  # of a person; None: not taken
    watch: Watch = field(default_factory=Watch)  # of runs that are nearly certain to lose
    memory: Sequence[ledger.Effect] = ()  # what other nights found

    def go(self, experiments: int | None, final: bool = True) -> str:
        """Settle `experiments` more after the baseline, or continue until `stop` gives a reason; return the reason.

        `final`: no experiment follows these, so the incumbent is not measured again for later ones."""
        state = self.journal.state
        known = len(state.experiments) + (not state.incumbent and not state.pending)  # the baseline is not counted
        last = None if experiments is None else known + experiments - 1
        self.last = last if final else None
        self.runner.ended = lambda: bool(self.skip_reason() or self.losing())
        self.branch.reset(state.head())  # before a verdict too: it may time what is there
        while True:
            if (step := state.step()).action in ("propose", "run"):
                self.branch.reset(state.head())
            if step.action in ("run", "judge") and (reason := self.skip_reason()):
                self.settle("skip", reason)
            elif self.watch.lost is not None:
                self.give_up(step)
            elif step.action == "propose":
                done = "done" if last is not None and len(state.experiments) > last else ""
                if reason := self.stop() or done or time_to_confirm(self):
                    return reason
                if not propose(self):
                    return "no agent has a proposal left"
            elif step.action == "run":
                with suppress(Skipped):
                    self.run(step)
                    self.watch.lost = None  # it had just ended by itself
            elif step.action == "judge":
                with suppress(Skipped):
                    self.judge()
            else:
                self.settle(step.verdict)

    @property
    def settings(self) -> dict[str, Any]:
        """The values of SETTINGS in train.py."""
        return from_dict(self.runner.settings["preset"]).settings()

    def skip_reason(self) -> str:
        """Why a person ends the experiment at hand; "" if nobody does. The baseline cannot be skipped."""
        now = self.journal.state.pending
        return skip_reason(self.folder, now.id) if now and not now.baseline else ""

    def losing(self) -> bool:
        return self.watch.losing(self.journal.state, self.branch, self.folder / "runs", self.runner.phase.run_dir)

    def give_up(self, step: Step) -> None:
        """Discard the experiment whose run was ended."""
        lost = self.watch.lost
        reason = f"its run was ended early: at equal tokens its loss was {lost:.3f} bpb above the incumbent's"
        self.journal.record("hopeless", id=step.id, run=step.run, delta=lost, reason=reason)
        self.closed(self.journal.state.experiments[step.id], reason)

    def run(self, step: Step) -> None:
        """One training run and its score."""
        result = self.kept_result(step.run, lambda: self.measure(step))
        result.pop("test_bpb", None)  # of the confirmation only
        self.journal.record("run", id=step.id, who=step.who, run=step.run, seed=step.seed, **result)
        self.log_run(step.run, result)
        if result["status"] == "crash" and not self.journal.state.incumbent:
            self.settle("crash")
            raise UserError(f"the baseline fails: {result['reason']}; the same command tries it again")

    def measure(self, step: Step) -> Any:
        """Train and score. The third invalid run in a row counts as a crash that is not the change's fault."""
        state = self.journal.state
        trained = state.incumbent if step.who == "incumbent" else state.pending
        source = self.branch.source(trained.commit)
        self.log(f"run {step.run}, seed {step.seed}: {trained.title}")
        measured = self.train(step.run, source, step.seed)
        self.invalid = self.invalid + 1 if measured.status == "invalid" else 0
        if self.invalid < INVALID_RUNS:
            return measured
        self.invalid, reason = 0, f"{INVALID_RUNS} runs in a row were invalid: {measured.reason}"
        self.runner.usual_flops = self.runner.best_speed = 0.0  # a machine that stays slow is usual from now on
        if not state.incumbent:
            raise UserError(f"{reason}; close other programs and run it again")
        return replace(measured, status="crash", reason=reason, spoiled=True)

    def train(self, name: str, source: str, seed: int, **options: bool) -> Any:
        """Train and score a source, timed against the baseline."""
        state = self.journal.state
        if not self.runner.preflight_seconds:
            self.runner.preflight(source)  # after a resume: measures how long a start takes
        self.runner.reference = self.branch.source((state.baseline or state.experiments[-1]).commit)
        self.runner.first_speed = state.speed
        return self.runner.run(name, source, seed, **options)

    def log_run(self, name: str, result: dict[str, Any]) -> None:
        number = f"val_bpb {result['val_bpb']:.6f}" if result["status"] == "ok" else result["reason"]
        self.log(f"run {name}: {result['status']}, {number}, {result['minutes']:.1f} min")

    def kept_result(self, name: str, measure: Callable[[], Any]) -> dict[str, Any]:
        """The result of a run; one that a kill left unrecorded is taken over."""
        kept = self.folder / "results" / f"{name}.json"
        if not (result := read_sealed(kept)):
            result = vars(measure())
            kept.parent.mkdir(exist_ok=True)
            write_atomic(kept, json.dumps(sealed(result)))
        return result

    def judge(self) -> None:
        state = self.journal.state
        to_come = None if self.last is None else self.last - state.pending.id
        decision = screened(state.judge(self.rigor, to_come), state.pending)
        if time_in_turn(self, decision):
            decision = screened(state.judge(self.rigor, to_come), state.pending)
        self.journal.record("verdict", id=state.pending.id, **vars(decision))
        if decision.reason:
            self.log(f"{decision.verdict}: {decision.reason}")

    def settle(self, verdict: str, reason: str = "") -> None:
        """Close the experiment in the journal; the branch follows at the next step."""
        done = self.journal.state.pending
        event = {"keep": "kept", "discard": "discarded", "crash": "crashed", "skip": "skipped"}[verdict]
        why = {"crash": {"reason": done.reason}, "skip": {"reason": reason}}.get(verdict, {})
        self.journal.record(event, id=done.id, **why)
        self.closed(done, reason)

    def closed(self, done: Experiment, reason: str) -> None:
        if reason:
            self.log(f"experiment {done.id}: {reason}")
        self.journal.write_results()
        ledger.record(self.folder, *where(self.runner.settings), self.journal.state.experiments)
        self.watch.lost = None
        if self.agent:
            self.agent.tell(Proposal("", done.hypothesis, done.agent, done.edit), outcome(done))


@click.group(commands=COMMANDS, help="Run a night of experiments, try a change of your own, and see the results.")
def command() -> None:
    outlast_reader()
    end_calmly()


@command.command(
    help="Run experiments until you stop it, or resume a night.",
    epilog=examples(
        "agent_loop.py run --tag nov22 --until 07:00 --agent search",
        "agent_loop.py run --preset offline --tag demo --max-experiments 3 --minutes 0.2",
    ),
)
@tag_option("today's date, like nov22")
@night_options
@agent_options
@end_options
@futility_option
@verbosity_options("Print only the summary and errors.", "Also print the output of preflight, training and scorer.")
def run(kind: str, model: str, base_url: str, cli: str, llm_share: float, max_experiments: int | None,
        until: datetime | None, tag: str | None, verbosity: int, rigor: str, futility: bool,
        **options: Any) -> None:  # fmt: skip
    folder = session.NIGHTS / (tag or session.tonight(session.NIGHTS, datetime.now()))
    deadline, log_line = Until(until.time()) if until else None, log if verbosity > QUIET else silent
    agent = choose_agent(kind, model, cli, llm_share, log_line, base_url)
    with session.held(folder):
        session.stay_awake()
        parts = session.open_night(folder, verbosity=verbosity, **options)
        night = Night(folder, *parts, rigor, agent, log_line, stopper(deadline, log_line), deadline=deadline)
        night.memory = ledger.others(folder)
        night.suggestions, night.watch = Suggestions(folder), Watch(futility)
        task = task_line(night.runner.settings)
        log_line(f"night {folder.name}: agent {agent.name}, sandbox {night.runner.sandbox}, {task}")
        try:
            with dashboard(night, deadline, verbosity):
                ended = night.go(max_experiments)
                log_line(f"ended: {ended}")
                if deadline and not night.stop():
                    log_line(f"confirmation: {confirm_winner(night)}")
        finally:
            print(summary(folder, night.journal.state))
            print(f"{folder}/results.tsv; resume with: python agent_loop.py run --tag {folder.name}")


@command.command(
    "try",
    help="Train, score and judge your edit of nights/TAG/worktree/train.py.",
    epilog=examples("agent_loop.py try --tag nov22 -m 'wider MLP, fewer layers'"),
)
@click.option("-m", "--message", required=True, type=Given(), help="What you changed and why, in one line.")
@tag_option("the latest")
@night_options
def try_command(message: str, tag: str | None, rigor: str, **options: Any) -> None:
    folder, message = session.NIGHTS / (tag or session.latest_tag()), in_utf8(message)
    edited_file = folder / "worktree" / "train.py"
    with session.held(folder):
        edited = session.read_edit(edited_file)
        night = Night(folder, *session.open_night(folder, **options), rigor)
        try:
            night.go(0)  # the baseline, and anything a kill left unfinished
            if edited in (None, night.branch.source(night.journal.state.head())):
                raise UserError(f"{edited_file} is unchanged; edit it, then run this again")
            night.agent = External(edited, message, night.settings, edited_file)
            night.go(1, final=False)
        except (KeyboardInterrupt, UserError):
            pending = night.journal.state.pending
            if edited and not (pending and night.branch.source(pending.commit) == edited):
                edited_file.write_text(edited, encoding="utf-8")  # not committed: the same command tries it again
            raise
        done = night.journal.state.experiments[-1]
        print(f"{done.status}: {done.reason or done.title}")
        print(summary(folder, night.journal.state))


@command.command(
    "confirm",
    help="Run the winner of a night against its baseline with new seeds, then without each of its changes.",
    epilog=examples("agent_loop.py confirm --tag nov22", "agent_loop.py confirm --until 09:00"),
)
@tag_option("the latest")
@until_option
@verbosity_options("Print only the summary and errors.", "Also print the output of preflight, training and scorer.")
def confirm_command(tag: str | None, until: datetime | None, verbosity: int) -> None:
    folder = session.NIGHTS / session.existing(tag)
    deadline, log_line = Until(until.time()) if until else None, log if verbosity > QUIET else silent
    with session.held(folder):
        session.stay_awake()
        parts = session.open_night(folder, preset=None, minutes=None, sandbox="auto", verbosity=verbosity)
        night = Night(folder, *parts, "full", None, log_line, stopper(deadline, log_line), deadline=deadline)
        if not confirm.kept_changes(night.journal.state):
            raise UserError(f"night {folder.name} has kept no change, so there is nothing to confirm")
        with dashboard(night, deadline, verbosity):
            ended = confirm_winner(night)
        log_line(f"ended: {ended}")
        print(summary(folder, night.journal.state))


if __name__ == "__main__":
    guarded(command)
