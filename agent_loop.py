"""The night: propose, check, commit, train, score, judge, keep or discard, again until morning.

    python agent_loop.py run --tag nov22                      until Ctrl-C; the same command resumes
    python agent_loop.py run --tag nov22 --until 07:00 --agent search
    python agent_loop.py try -m "wider MLP"                   the same judged step for a change you made yourself
    python agent_loop.py status | replay 12 | report          report.html and progress.png

Everything of a night is in nights/TAG: journal.jsonl (what happened, append-only), results.tsv (upstream's five
columns), worktree/ (branch autoresearch/TAG, the only place where train.py changes), runs/ and settings.json. Your own
checkout is never touched. Importing this module does nothing.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from lab.agents import Agent, Briefing, NoProposal, Tried
from lab.agents.choose import choose_agent
from lab.agents.external import External
from lab.errors import UserError
from lab.files import register, write_atomic
from lab.interface.dashboard import dashboard, summary
from lab.loop.branch import TAG_RULE, Branch, check_tag
from lab.loop.git import git
from lab.loop.history import Experiment
from lab.loop.journal import Journal, lock, read
from lab.loop.proposal import Proposal, check
from lab.loop.session import held, next_time, night_settings, stay_awake, stopper, tonight
from lab.loop.source import Rejected, fingerprint, nodes, read_source
from lab.preset import from_dict
from lab.show import MINUTES, NORMAL, QUIET, Finite, examples, silent, verbosity_options
from lab.training.run import ROOT, guarded
from lab.trial.crash import clean

NIGHTS = ROOT / "nights"
REDRAWS = 2  # after a proposal that failed its checks, before the sampler takes the slot
INVALID_RUNS = 3  # of one experiment in a row: it is given up, the night goes on
SAID = 1000  # characters of a line of the log
PLATEAU = 15  # experiments without a kept one


def say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {clean(line, SAID)}", flush=True)


@dataclass
class Night:
    """One tag: its journal, its branch, its runner, and the agent that proposes."""

    folder: Path
    branch: Branch
    journal: Journal
    runner: Any
    rigor: str
    agent: Agent | None = None
    say: Callable[[str], None] = say
    idea: str = ""  # what is being checked
    edits: dict[int, dict[str, Any]] = field(default_factory=dict)  # experiment -> what it changed
    stop: Callable[[], str] = lambda: ""  # why to end, or ""
    spoiled: int = 0  # runs in a row
    last: int | None = None  # number of the last experiment, None if nobody knows

    def go(self, experiments: int | None, final: bool = True) -> str:
        """Work until `experiments` more are settled (after the baseline) or something says stop; returns why.

        `final`: others are not expected to follow these, so the incumbent is not measured for their sake."""
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
                    return "nothing is left to try: every agent is out of proposals"
            elif step.action == "run":
                self.run(step)
            elif step.action == "judge":
                self.judge()
            else:
                self.settle(step.verdict)

    # --- one experiment

    def propose(self) -> bool:
        """Get a proposal past its checks and commit it. False when nobody has one."""
        state = self.journal.state
        if not state.incumbent:
            return self.commit(Proposal(self.branch.source(state.head()), "baseline", "none"))
        base, refused, refused_source = self.branch.source(state.head()), "", ""
        for attempt in range(2 * (1 + REDRAWS)):
            self.idea, proposal = "", None
            agent = self.agent if attempt <= REDRAWS else self.sampler()
            try:
                proposal = agent.propose(self.briefing(base, attempt, refused, refused_source))
                check(proposal.source, base, state.tried.keys(), self.settings)
                self.idea = f"{proposal.hypothesis} ({proposal.agent})"
                self.say(f"experiment {len(state.experiments)}: {self.idea}; preflight")
                if reason := self.runner.preflight(proposal.source):
                    raise Rejected(f"preflight: {reason}")
            except NoProposal as reason:
                self.say(f"no proposal: {reason}")
                continue
            except Rejected as reason:
                self.say(f"refused: {reason}")
                refused, refused_source = str(reason), proposal.source if proposal else ""
                if proposal:
                    self.refuse(proposal, str(reason))
                continue
            return self.commit(proposal)
        return False

    def refuse(self, proposal: Proposal, reason: str) -> None:
        try:
            mark = fingerprint(proposal.source, self.settings)
        except Rejected:
            mark = ""
        told = {"agent": proposal.agent, "hypothesis": proposal.hypothesis, "edit": proposal.edit}
        self.journal.record("refused", fingerprint=mark, reason=reason, **told)

    def commit(self, proposal: Proposal) -> bool:
        """Write ahead: the commit, then the journal. A kill between the two leaves a commit on no branch."""
        state = self.journal.state
        number, source = len(state.experiments), proposal.source
        commit = state.head()
        if state.incumbent:
            commit = self.branch.commit(source, f"experiment {number}: {proposal.hypothesis}")
        elif reason := self.runner.preflight(source):
            raise UserError(f"the baseline fails before it starts: {reason}")
        self.journal.record(
            "proposal",
            id=number,
            agent=proposal.agent,
            hypothesis=proposal.hypothesis,
            commit=commit,
            source=hashlib.sha256(source.encode()).hexdigest(),
            fingerprint=fingerprint(source, self.settings),
            nodes=nodes(source, self.settings),
            edit=proposal.edit,
        )
        self.edits[number] = proposal.edit or {}
        return True

    def run(self, step: Any) -> None:
        """One training run and its score; a result that a kill left unrecorded is taken over."""
        state = self.journal.state
        trained = state.incumbent if step.who == "incumbent" else state.pending
        kept = self.folder / "results" / f"{step.run}.json"
        if not kept.is_file():
            self.say(f"run {step.run}, seed {step.seed}: {trained.hypothesis}")
            if not self.runner.preflight_seconds:
                self.runner.preflight(self.branch.source(trained.commit))  # after a resume: how long a start takes
            measured = self.runner.run(step.run, self.branch.source(trained.commit), step.seed)
            self.spoiled = self.spoiled + 1 if measured.status == "invalid" else 0
            if self.spoiled == INVALID_RUNS:
                self.spoiled, reason = 0, f"{INVALID_RUNS} runs in a row were spoiled: {measured.reason}"
                if not state.incumbent:
                    raise UserError(f"{reason}; quiet the machine and run again")
                measured = replace(measured, status="crash", reason=reason, spoiled=True)
            kept.parent.mkdir(exist_ok=True)
            write_atomic(kept, json.dumps(vars(measured)))
        result = json.loads(kept.read_text(encoding="utf-8"))
        self.journal.record("run", id=step.id, who=step.who, run=step.run, seed=step.seed, **result)
        number = f"val_bpb {result['val_bpb']:.6f}" if result["status"] == "ok" else result["reason"]
        self.say(f"run {step.run}: {result['status']}, {number}, {result['minutes']:.1f} min")
        if result["status"] == "crash" and not state.incumbent:
            self.settle("crash")
            raise UserError(f"the baseline fails: {result['reason']}; the same command tries it again")

    def judge(self) -> None:
        state = self.journal.state
        found = state.judge(self.rigor, None if self.last is None else self.last - state.pending.id)
        told = {"delta": found.delta, "sigma": found.sigma, "near_miss": found.near_miss, "reason": found.reason}
        self.journal.record("verdict", id=state.pending.id, verdict=found.verdict, who=found.who, **told)
        self.say(f"{found.verdict}: {found.reason}")

    def settle(self, verdict: str) -> None:
        """Close the experiment: the journal first says so, then the branch follows."""
        state = self.journal.state
        done = state.pending
        event = {"keep": "kept", "discard": "discarded", "crash": "crashed"}[verdict]
        self.journal.record(event, id=done.id, **({"reason": done.reason} if verdict == "crash" else {}))
        self.journal.write_results()
        if self.agent:
            self.agent.tell(Proposal("", done.hypothesis, done.agent, self.edits.get(done.id)), self.tried(done))

    # --- what agents are told

    @property
    def settings(self) -> dict[str, Any]:
        return from_dict(self.runner.settings["preset"]).settings()

    def briefing(self, base: str, attempt: int, refused: str, refused_source: str) -> Briefing:
        state = self.journal.state
        judged = [e for e in state.experiments if not e.baseline and e.status != "pending"]
        history = [self.tried(e) for e in judged]
        history += [self.refusal(entry) for entry in state.refusals]
        kept = max((e.id for e in state.experiments if e.status == "keep"), default=0)
        last = state.experiments[-1]
        program = ROOT / "program.md"
        return Briefing(
            number=len(state.experiments),
            source=base,
            settings=self.settings,
            program=program.read_text(encoding="utf-8") if program.is_file() else "",
            task=self.task(),
            value=state.incumbent.mean if state.incumbent else None,
            noise=state.noise.sigma if state.noise else None,
            history=history,
            near_misses=[self.tried(e) for e in judged if e.near_miss],
            last_failure=last.reason if last.status == "crash" and not last.spoiled else "",
            refused=refused,
            refused_source=refused_source,
            attempt=attempt,
            plateau=len(state.experiments) - kept > PLATEAU,
            tried=state.tried.keys(),
        )

    def task(self) -> str:
        from lab.machine.hardware import describe

        preset, chip = from_dict(self.runner.settings["preset"]), describe()
        return (
            f"Preset {preset.name}: context {preset.task.sequence_length} tokens, {self.runner.settings['minutes']:g} "
            f"minutes of training on {chip['chip']} ({chip['backend']}, {chip['memory_gb']:.0f} GB)."
        )

    def tried(self, e: Experiment) -> Tried:
        verdict = "discard" if e.status == "pending" else "invalid" if e.spoiled else e.status
        return Tried(e.id, e.hypothesis, verdict, e.delta, self.edits.get(e.id))

    @staticmethod
    def refusal(entry: dict[str, Any]) -> Tried:
        return Tried(entry["after"] + 1, f"{entry['hypothesis']}: {entry['reason']}", "rejected")

    def sampler(self) -> Agent:
        from lab.agents.search import Search

        return Search()


def open_night(
    tag: str, *, preset: str | None, minutes: float | None, rigor: str, sandbox: str, verbosity: int = NORMAL
) -> Night:
    """The night of this tag, new or resumed. Raises UserError when nothing is prepared or the tag is in other use."""
    from lab.trial.runner import Runner
    from lab.trial.sandbox import available, self_test

    folder = NIGHTS / tag
    settings = night_settings(folder, preset, minutes, verbosity)
    kind = available() if sandbox == "auto" else sandbox
    if kind == "none":
        told = "no sandbox: train.py, written by an agent, can read and write whatever you can, and the network"
        print(f"warning: {told}", file=sys.stderr)
    elif fault := self_test(kind):
        raise UserError(f"the sandbox {kind} does not hold here ({fault}); choose another, or --sandbox none")
    if kind in ("seatbelt", "landlock"):  # no loopback network within: one process trains
        settings["preset"]["batch"]["processes"] = 1
    tell, echo = (say if verbosity > level else silent for level in (QUIET, NORMAL))
    branch = Branch(ROOT, folder / "worktree", f"autoresearch/{tag}", say)
    runner = Runner(folder, branch.worktree, settings, kind, say=tell, echo=echo)
    runner.check_data()
    register()
    branch.ensure(git(ROOT, "rev-parse", "HEAD"))
    journal = Journal(folder)
    if not journal.state.start:
        journal.record("start", tag=tag, commit=branch.head)
    keep_edit(branch, journal)
    night = Night(folder, branch, journal, runner, rigor, say=tell)
    for record in read(journal.path):
        if record["event"] == "proposal":
            night.edits[record["id"]] = record.get("edit") or {}
    return night


def keep_edit(branch: Branch, journal: Journal) -> None:
    """Save an edit of the worktree's train.py that is on no commit, before anything resets it; say where."""
    edited = branch.worktree / "train.py"
    if not os.path.lexists(edited):
        return
    known = {branch.source(commit).encode() for commit in (branch.head, journal.state.head())}
    if edited.is_file() and edited.read_bytes().replace(b"\r\n", b"\n") in known:
        return
    saved = branch.worktree.parent / "saved" / f"{datetime.now():%Y%m%d-%H%M%S-%f}-train.py"
    saved.parent.mkdir(exist_ok=True)
    if edited.is_file():
        write_atomic(saved, edited.read_bytes())
    else:
        edited.rename(saved)
    say(f"train.py of the worktree was edited; the edit is saved as {saved}")


def edit_of(path: Path) -> str | None:
    """The text of an edited train.py, None where there is none. Raises UserError and leaves what cannot be read."""
    try:
        return read_source(path) if os.path.lexists(path) else None
    except Rejected as reason:
        raise UserError(f"{reason}; mend {path}, then try again") from None


def tags() -> list[str]:
    """Nights with a journal, the one that changed last at the end."""
    journals = sorted(NIGHTS.glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in journals if not path.parent.is_symlink()]


def latest_tag() -> str:
    """The tag whose journal changed last. Raises UserError when there is none."""
    if not tags():
        raise UserError("there is no night yet; start one with: python agent_loop.py run --tag NAME")
    return tags()[-1]


def existing(tag: str | None) -> str:
    """The tag of a night that is there, the latest for none. Raises UserError when there is no such night."""
    if tag and tag not in tags():
        raise UserError(f"there is no night {tag}; there are: {', '.join(sorted(tags())) or 'none'}")
    return tag or latest_tag()


def tag_option(default: str) -> Callable:
    return click.option(
        "--tag",
        callback=lambda context, option, tag: tag if tag is None else check_tag(tag),
        help=f"Name of the night: {TAG_RULE}.  [default: {default}]",
    )


def shared_options(function: Callable) -> Callable:
    from lab.trial.sandbox import KINDS

    for option in (
        click.option("--preset", help="Prepare and use this preset.  [default: what was prepared last]"),
        click.option("--minutes", type=MINUTES, help="Of training.  [default: 5]"),
        click.option("--rigor", type=click.Choice(["full", "none"]), default="full", show_default=True,
                     help="none is upstream's rule: keep whatever is lower once."),
        click.option("--sandbox", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True,
                     help="Around an experiment."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.group(help="The night: propose, check, commit, train, score, judge, keep or discard, again until morning.")
def command() -> None:
    pass


@command.command(
    help="Run experiments until morning, or go on with a night that was interrupted.",
    epilog=examples(
        "agent_loop.py run --tag nov22 --until 07:00 --agent search",
        "agent_loop.py run --preset offline --tag demo --max-experiments 3 --minutes 0.2",
    ),
)
@shared_options
@tag_option("today, like nov22")
@click.option(
    "--agent",
    "kind",
    type=click.Choice(["auto", "hybrid", "search", "ollama", "command"]),
    default="auto",
    show_default=True,
    help="Who proposes. auto: hybrid when a local model answers or --model names one, else search.",
)
@click.option("--model", default="", help="Ollama model.  [default: the most able one that fits]")
@click.option("--command", "cli", default="", help="For --agent command: a coding CLI, run in a scratch folder.")
@click.option(
    "--llm-share", default=0.3, type=Finite(0, 1), show_default=True, help="Of hybrid's proposals by the model, 0 to 1."
)
@click.option("--max-experiments", type=click.IntRange(min=0), help="After so many: stop.  [default: no bound]")
@click.option(
    "--until",
    type=click.DateTime(["%H:%M"]),
    metavar="HH:MM",
    help="Time of day from which no new experiment starts, like 07:00.  [default: no end]",
)
@verbosity_options("Only the summary and errors.", "Also what preflight, training and scorer print.")
def run(kind: str, model: str, cli: str, llm_share: float, max_experiments: int | None, until: datetime | None,
        tag: str | None, verbosity: int, **options: Any) -> None:  # fmt: skip
    tag = tag or tonight(NIGHTS, datetime.now())
    deadline = next_time(until.time()) if until else None
    tell = say if verbosity > QUIET else silent
    agent = choose_agent(kind, model, cli, llm_share, tell)
    with held(NIGHTS / tag):
        stay_awake()
        night = open_night(tag, verbosity=verbosity, **options)
        night.agent, night.stop = agent, stopper(deadline, tell)
        tell(f"night {tag}: agent {agent.name}, sandbox {night.runner.sandbox}, {night.task()}")
        try:
            with dashboard(night, deadline, verbosity):
                ended = night.go(max_experiments)
            tell(f"ended: {ended}")
        finally:
            print(summary(night))
            print(f"{night.folder}/results.tsv; go on with: python agent_loop.py run --tag {tag}")


@command.command(
    "try",
    help="Judge the change that you made to nights/TAG/worktree/train.py.",
    epilog=examples("agent_loop.py try --tag nov22 -m 'wider MLP, fewer layers'"),
)
@shared_options
@tag_option("the latest")
@click.option("-m", "--message", required=True, help="What you changed and why, one line.")
def try_command(message: str, tag: str | None, **options: Any) -> None:
    tag, message = tag or latest_tag(), os.fsencode(message).decode(errors="replace")  # in a C locale too
    with held(NIGHTS / tag):
        worktree = NIGHTS / tag / "worktree" / "train.py"
        edited = edit_of(worktree)
        night = open_night(tag, **options)
        night.go(0)  # the baseline, and what a kill left unfinished
        base = night.branch.source(night.journal.state.head())
        if edited is None or edited == base:
            raise UserError(f"nothing is changed in {worktree}; edit that file, then try again")
        night.agent = External(edited, message, night.settings, worktree)
        night.go(1, final=False)
        done = night.journal.state.experiments[-1]
        print(f"{done.status}: {done.reason or done.hypothesis}")
        print(summary(night))


@command.command(help="What a night has found so far.", epilog=examples("agent_loop.py status --tag nov22"))
@tag_option("the latest")
def status(tag: str | None) -> None:
    tag = existing(tag)
    night = Night(NIGHTS / tag, None, Journal(NIGHTS / tag), None, "full")
    print(summary(night))


@command.command(
    help="Train and score experiment NUMBER of a night again, with a new seed.",
    epilog=examples("agent_loop.py replay 12 --seed 7"),
)
@tag_option("the latest")
@click.argument("number", type=click.IntRange(min=0))
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True, help="Of the run.")
def replay(tag: str | None, number: int, seed: int) -> None:
    tag = existing(tag)
    with held(NIGHTS / tag):
        night = open_night(tag, preset=None, minutes=None, rigor="full", sandbox="auto")
        experiments = night.journal.state.experiments
        if number >= len(experiments):
            raise UserError(f"{tag} has no experiment {number}; the last is {len(experiments) - 1}")
        chosen = experiments[number]
        source = night.branch.source(chosen.commit)
        night.runner.preflight(source)
        result = night.runner.run(f"replay-{number}-{seed}", source, seed)
        known = ", ".join(f"{value:.6f}" for value in chosen.values) or "none"
        print(f"experiment {number}: {chosen.hypothesis}\nnow {result.val_bpb} ({result.status}); then {known}")


@command.command(
    "report",
    help="Write report.html and progress.png of a night, finished or not.",
    epilog=examples("agent_loop.py report --tag nov22 --watch"),
)
@tag_option("the latest")
@click.option("--stories/--no-stories", default=True, help="Sample stories of baseline and best, half a minute.")
@click.option("--watch", is_flag=True, help="Serve it on 127.0.0.1 and write it anew every minute until Ctrl-C.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="For --watch; 0: any.")
def report_command(tag: str | None, stories: bool, watch: bool, port: int) -> None:
    from lab.interface.report import sample_stories, serve, write_report
    from lab.trial.sandbox import available

    folder = NIGHTS / existing(tag)
    if watch:
        return serve(folder, port, say)
    told = None
    if stories and available() != "none":  # the models that write them are an agent's code
        try:
            with lock(folder / "lock"):  # a night that is running is not to be slowed down
                told = sample_stories(folder, available())
        except (UserError, OSError, ValueError, KeyError) as reason:
            say(f"no stories: {reason}")
    for path in write_report(folder, told):
        print(path)


if __name__ == "__main__":
    guarded(command)
