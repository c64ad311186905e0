"""The commands about a night, running or not: suggest, skip, status, replay and report."""

import click

from lab.agents.suggested import refuse_unfit
from lab.errors import UserError, one_line
from lab.interface.dashboard import summary
from lab.interface.options import tag_option
from lab.interface.report import sample_stories, serve, write_report
from lab.loop import session
from lab.loop.journal import Journal
from lab.loop.suggestions import Suggestions, ask_to_skip, read
from lab.show import SEED, examples, in_utf8, log


@click.command(
    help="Suggest the next experiment of a night, running or not: constants, an idea, a patch, a train.py, or words "
    "for its model. It is taken next, and judged like any other.",
    epilog=examples(
        "agent_loop.py suggest 'MATRIX_LR=0.03 DEPTH=3'",
        "agent_loop.py suggest wider.patch --tag nov22",
        "agent_loop.py suggest 'try a longer warm-down' --tag nov22",
    ),
)
@tag_option("the latest")
@click.argument("suggestion")
def suggest(tag: str | None, suggestion: str) -> None:
    folder, suggested = session.NIGHTS / session.existing(tag), read(in_utf8(suggestion))
    state = Journal(folder).state
    if suggested.form != "words" and state.incumbent:
        refuse_unfit(suggested, state, folder)
    Suggestions(folder).add(suggested)
    when = "next" if session.running(folder) else "when the night is resumed"
    print(f"night {folder.name}: {suggested.text}: {suggested.form}, taken {when}")


@click.command(
    help="End the experiment at hand of a night: it is discarded, and the night continues with the next one.",
    epilog=examples("agent_loop.py skip --tag nov22 -m 'worse from the first minute'"),
)
@click.option("-m", "--message", default="", help="Why, in one line.")
@tag_option("the latest")
def skip(tag: str | None, message: str) -> None:
    folder = session.NIGHTS / session.existing(tag)
    now = Journal(folder).state.pending
    if not now:
        raise UserError(f"night {folder.name} has no experiment at hand; `agent_loop.py status` shows its state")
    if now.baseline:
        raise UserError(f"experiment {now.id} is the baseline, which every night needs; stop the night with Ctrl-C")
    message = one_line(in_utf8(message))
    ask_to_skip(folder, now.id, f"skipped: {message}" if message else "skipped")
    when = "now" if session.running(folder) else "when the night is resumed"
    print(f"night {folder.name}: experiment {now.id} ({now.title}) ends {when}")


@click.command(help="Show the results of a night so far.", epilog=examples("agent_loop.py status --tag nov22"))
@tag_option("the latest")
def status(tag: str | None) -> None:
    folder = session.NIGHTS / session.existing(tag)
    print(summary(folder, Journal(folder).state))


@click.command(
    help="Train and score experiment NUMBER of a night again, with a new seed.",
    epilog=examples("agent_loop.py replay 12 --seed 7"),
)
@tag_option("the latest")
@click.argument("number", type=click.IntRange(min=0))
@click.option("--seed", type=SEED, default=1000, show_default=True, help="Seed of the run.")
def replay(tag: str | None, number: int, seed: int) -> None:
    folder = session.NIGHTS / session.existing(tag)
    with session.held(folder):
        branch, journal, runner = session.open_night(folder, preset=None, minutes=None, sandbox="auto")
        if number >= len(journal.state.experiments):
            last = len(journal.state.experiments) - 1
            raise UserError(f"{folder.name} has no experiment {number}; the last is {last}")
        chosen = journal.state.experiments[number]
        source = branch.source(chosen.commit)
        runner.preflight(source)
        result = runner.run(f"replay-{number}-{seed}", source, seed)
        known = ", ".join(f"{value:.6f}" for value in chosen.values) or "none"
        print(f"experiment {number}: {chosen.title}\nnow: {result.val_bpb} ({result.status}); before: {known}")


@click.command(
    "report",
    help="Write report.html and progress.png for a night, finished or not.",
    epilog=examples("agent_loop.py report --tag nov22 --watch"),
)
@tag_option("the latest")
@click.option("--stories/--no-stories", default=True, help="Sample stories from baseline and best (half a minute).")
@click.option("--watch", is_flag=True, help="Serve the report on 127.0.0.1 and refresh it every minute, until Ctrl-C.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="For --watch; 0: any.")
def report_command(tag: str | None, stories: bool, watch: bool, port: int) -> None:
    folder = session.NIGHTS / session.existing(tag)
    if watch:
        return serve(folder, port, log)
    for path in write_report(folder, sample_stories(folder, log) if stories else None):
        print(path)


COMMANDS = (suggest, skip, status, replay, report_command)
