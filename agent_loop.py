"""A night of experiments: propose, check, commit, train, score, judge, keep or discard; repeat until morning.

    python agent_loop.py run --tag nov22                      until Ctrl-C; run it again to resume
    python agent_loop.py run --tag nov22 --until 07:00 --agent search
    python agent_loop.py try -m "wider MLP"                   the same steps for a change you made yourself
    python agent_loop.py status | replay 12 | report          report.html and progress.png

A night lives in nights/TAG: journal.jsonl (append-only), results.tsv (upstream's five columns), worktree/ (branch
autoresearch/TAG, the only place where train.py changes), runs/ and settings.json. Your own checkout is never changed.
Importing this module has no effect.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from lab.agents.briefing import Agent, NoProposal, brief, outcome, task_line, where
from lab.agents.bundle import screened
from lab.agents.choose import choose_agent
from lab.agents.external import External
from lab.agents.search import Search
from lab.errors import UserError
from lab.files import write_atomic
from lab.interface.dashboard import dashboard, summary
from lab.interface.options import agent_options, end_options, night_options, tag_option
from lab.interface.report import sample_stories, serve, write_report
from lab.loop import ledger, session
from lab.loop.branch import Branch
from lab.loop.history import Step
from lab.loop.journal import Journal
from lab.loop.proposal import Proposal, check
from lab.loop.session import NIGHTS, existing, held, latest_tag, open_night
from lab.loop.source import Rejected, fingerprint, nodes
from lab.loop.stop import Until, stopper
from lab.preset import from_dict
from lab.show import QUIET, examples, log, silent, verbosity_options
from lab.training.run import guarded

REDRAWS = 2  # retries after a proposal failed its checks, before search proposes instead
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
    memory: Sequence[ledger.Effect] = ()  # what other nights found

    def go(self, experiments: int | None, final: bool = True) -> str:
        """Settle `experiments` more after the baseline, or continue until `stop` gives a reason; return the reason.

        `final`: no experiment follows these, so the incumbent is not measured again for later ones."""
        state = self.journal.state
        known = len(state.experiments) + (not state.incumbent and not state.pending)  # the baseline is not counted
        last = None if experiments is None else known + experiments - 1
        self.last = last if final else None
        while True:
            self.branch.reset(state.head())
            step = state.step()
            if step.action == "propose":
                if reason := self.stop() or ("done" if last is not None and len(state.experiments) > last else ""):
                    return reason
                if not self.propose():
                    return "no agent has a proposal left"
            elif step.action == "run":
                self.run(step)
            elif step.action == "judge":
                self.judge()
            else:
                self.settle(step.verdict)

    @property
    def settings(self) -> dict[str, Any]:
        """The values of SETTINGS in train.py."""
        return from_dict(self.runner.settings["preset"]).settings()

    def propose(self) -> bool:
        """Get a proposal that passes its checks and commit it. False when no agent has one."""
        state = self.journal.state
        base, refused, refused_source = self.branch.source(state.head()), "", ""
        if not state.incumbent:
            return self.commit(Proposal(base, "baseline", "none"))
        for attempt in range(2 * (1 + REDRAWS)):
            self.idea, proposal = "", None
            agent = self.agent if attempt <= REDRAWS else Search()
            try:
                given = brief(state, self.runner.settings, base, attempt, refused, refused_source, self.memory)
                proposal = agent.propose(given)
                check(proposal.source, base, state.tried.keys(), self.settings)
                self.idea = f"{proposal.hypothesis} ({proposal.agent})"
                self.log(f"experiment {len(state.experiments)}: {self.idea}; preflight")
                if reason := self.runner.preflight(proposal.source):
                    raise Rejected(f"preflight: {reason}")
            except NoProposal as reason:
                self.log(f"no proposal: {reason}")
            except Rejected as reason:
                self.log(f"refused: {reason}")
                refused, refused_source = str(reason), proposal.source if proposal else ""
                if proposal:
                    self.refuse(proposal, str(reason))
            else:
                return self.commit(proposal)
        return False

    def refuse(self, proposal: Proposal, reason: str) -> None:
        try:
            mark = fingerprint(proposal.source, self.settings)
        except Rejected:
            mark = ""
        self.journal.record("refused", fingerprint=mark, reason=reason, **proposal.record)

    def commit(self, proposal: Proposal) -> bool:
        """Commit first, then write the journal. A kill between the two leaves only a commit on no branch."""
        state = self.journal.state
        number, commit, source = len(state.experiments), state.head(), proposal.source
        if state.incumbent:
            commit = self.branch.commit(source, f"experiment {number}: {proposal.hypothesis}")
        elif reason := self.runner.preflight(source):
            raise UserError(f"the baseline fails its preflight: {reason}")
        marks = {"fingerprint": fingerprint(source, self.settings), "nodes": nodes(source, self.settings)}
        marks["source"] = hashlib.sha256(source.encode()).hexdigest()
        self.journal.record("proposal", id=number, commit=commit, **proposal.record, **marks)
        return True

    def run(self, step: Step) -> None:
        """One training run and its score; a result that a kill left unrecorded is taken over."""
        state = self.journal.state
        kept = self.folder / "results" / f"{step.run}.json"
        if not kept.is_file():
            measured = self.measure(step)
            kept.parent.mkdir(exist_ok=True)
            write_atomic(kept, json.dumps(vars(measured)))
        result = json.loads(kept.read_text(encoding="utf-8"))
        self.journal.record("run", id=step.id, who=step.who, run=step.run, seed=step.seed, **result)
        number = f"val_bpb {result['val_bpb']:.6f}" if result["status"] == "ok" else result["reason"]
        self.log(f"run {step.run}: {result['status']}, {number}, {result['minutes']:.1f} min")
        if result["status"] == "crash" and not state.incumbent:
            self.settle("crash")
            raise UserError(f"the baseline fails: {result['reason']}; the same command tries it again")

    def measure(self, step: Step) -> Any:
        """Train and score. The third invalid run in a row counts as a crash that is not the change's fault."""
        state = self.journal.state
        trained = state.incumbent if step.who == "incumbent" else state.pending
        source = self.branch.source(trained.commit)
        self.log(f"run {step.run}, seed {step.seed}: {trained.hypothesis}")
        if not self.runner.preflight_seconds:
            self.runner.preflight(source)  # after a resume: measures how long a start takes
        measured = self.runner.run(step.run, source, step.seed)
        self.invalid = self.invalid + 1 if measured.status == "invalid" else 0
        if self.invalid < INVALID_RUNS:
            return measured
        self.invalid, reason = 0, f"{INVALID_RUNS} runs in a row were invalid: {measured.reason}"
        if not state.incumbent:
            raise UserError(f"{reason}; close other programs and run it again")
        return replace(measured, status="crash", reason=reason, spoiled=True)

    def judge(self) -> None:
        state = self.journal.state
        to_come = None if self.last is None else self.last - state.pending.id
        decision = screened(state.judge(self.rigor, to_come), state.pending)
        self.journal.record("verdict", id=state.pending.id, **vars(decision))
        if decision.reason:
            self.log(f"{decision.verdict}: {decision.reason}")

    def settle(self, verdict: str) -> None:
        """Close the experiment in the journal; the branch follows at the next step."""
        done = self.journal.state.pending
        event = {"keep": "kept", "discard": "discarded", "crash": "crashed"}[verdict]
        self.journal.record(event, id=done.id, **({"reason": done.reason} if verdict == "crash" else {}))
        self.journal.write_results()
        ledger.record(self.folder, *where(self.runner.settings), self.journal.state.experiments)
        if self.agent:
            self.agent.tell(Proposal("", done.hypothesis, done.agent, done.edit), outcome(done))


@click.group(help="Run a night of experiments, try a change of your own, and see the results.")
def command() -> None:
    pass


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
@verbosity_options("Print only the summary and errors.", "Also print the output of preflight, training and scorer.")
def run(kind: str, model: str, cli: str, llm_share: float, max_experiments: int | None, until: datetime | None,
        tag: str | None, verbosity: int, rigor: str, **options: Any) -> None:  # fmt: skip
    folder = NIGHTS / (tag or session.tonight(NIGHTS, datetime.now()))
    deadline = Until(until.time()) if until else None
    log_line = log if verbosity > QUIET else silent
    agent = choose_agent(kind, model, cli, llm_share, log_line)
    with held(folder):
        session.stay_awake()
        parts = open_night(folder, verbosity=verbosity, **options)
        night = Night(folder, *parts, rigor, agent, log_line, stopper(deadline, log_line), memory=ledger.others(folder))
        task = task_line(night.runner.settings)
        log_line(f"night {folder.name}: agent {agent.name}, sandbox {night.runner.sandbox}, {task}")
        try:
            with dashboard(night, deadline, verbosity):
                ended = night.go(max_experiments)
            log_line(f"ended: {ended}")
        finally:
            print(summary(night))
            print(f"{folder}/results.tsv; resume with: python agent_loop.py run --tag {folder.name}")


@command.command(
    "try",
    help="Train, score and judge your edit of nights/TAG/worktree/train.py.",
    epilog=examples("agent_loop.py try --tag nov22 -m 'wider MLP, fewer layers'"),
)
@click.option("-m", "--message", required=True, help="What you changed and why, in one line.")
@tag_option("the latest")
@night_options
def try_command(message: str, tag: str | None, rigor: str, **options: Any) -> None:
    folder, message = NIGHTS / (tag or latest_tag()), os.fsencode(message).decode(errors="replace")  # in a C locale too
    edited_file = folder / "worktree" / "train.py"
    with held(folder):
        edited = session.read_edit(edited_file)
        night = Night(folder, *open_night(folder, **options), rigor)
        night.go(0)  # the baseline, and anything a kill left unfinished
        if edited in (None, night.branch.source(night.journal.state.head())):
            raise UserError(f"{edited_file} is unchanged; edit it, then run this again")
        night.agent = External(edited, message, night.settings, edited_file)
        night.go(1, final=False)
        done = night.journal.state.experiments[-1]
        print(f"{done.status}: {done.reason or done.hypothesis}")
        print(summary(night))


@command.command(help="Show the results of a night so far.", epilog=examples("agent_loop.py status --tag nov22"))
@tag_option("the latest")
def status(tag: str | None) -> None:
    folder = NIGHTS / existing(tag)
    print(summary(Night(folder, None, Journal(folder), None, "full")))


@command.command(
    help="Train and score experiment NUMBER of a night again, with a new seed.",
    epilog=examples("agent_loop.py replay 12 --seed 7"),
)
@tag_option("the latest")
@click.argument("number", type=click.IntRange(min=0))
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True, help="Seed of the run.")
def replay(tag: str | None, number: int, seed: int) -> None:
    folder = NIGHTS / existing(tag)
    with held(folder):
        branch, journal, runner = open_night(folder, preset=None, minutes=None, sandbox="auto")
        if number >= len(journal.state.experiments):
            last = len(journal.state.experiments) - 1
            raise UserError(f"{folder.name} has no experiment {number}; the last is {last}")
        chosen = journal.state.experiments[number]
        source = branch.source(chosen.commit)
        runner.preflight(source)
        result = runner.run(f"replay-{number}-{seed}", source, seed)
        known = ", ".join(f"{value:.6f}" for value in chosen.values) or "none"
        print(f"experiment {number}: {chosen.hypothesis}\nnow: {result.val_bpb} ({result.status}); before: {known}")


@command.command(
    "report",
    help="Write report.html and progress.png for a night, finished or not.",
    epilog=examples("agent_loop.py report --tag nov22 --watch"),
)
@tag_option("the latest")
@click.option("--stories/--no-stories", default=True, help="Sample stories from baseline and best (half a minute).")
@click.option("--watch", is_flag=True, help="Serve the report on 127.0.0.1 and refresh it every minute, until Ctrl-C.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="For --watch; 0: any.")
def report_command(tag: str | None, stories: bool, watch: bool, port: int) -> None:
    folder = NIGHTS / existing(tag)
    if watch:
        return serve(folder, port, log)
    for path in write_report(folder, sample_stories(folder, log) if stories else None):
        print(path)


if __name__ == "__main__":
    guarded(command)
