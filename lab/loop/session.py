"""Opening a night, new or resumed: its tag and lock, its task, its branch and journal."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import ROOT, inside, register, sealed, write_atomic
from lab.loop.branch import Branch
from lab.loop.git import git, repository
from lab.loop.journal import Journal, lock
from lab.loop.source import Rejected, read_source
from lab.preset import read_record
from lab.show import NORMAL, QUIET, log, silent
from lab.training.run import current_path
from lab.trial.child import interrupts_left_to_child
from lab.trial.runner import Runner
from lab.trial.sandbox import available, bound, self_test

RESUME_HOURS = 6.0  # after its last record, a night tagged with yesterday's date is resumed

NIGHTS = ROOT / "nights"

Log = Callable[[str], None]


def tonight(nights: Path, now: datetime) -> str:
    """The default tag: today's date, or yesterday's if that night is still running past midnight."""
    today, yesterday = (f"{day:%b%d}".lower() for day in (now, now - timedelta(days=1)))
    journal = nights / yesterday / "journal.jsonl"
    recent = journal.is_file() and now.timestamp() - journal.stat().st_mtime < RESUME_HOURS * 3600
    return yesterday if recent and not (nights / today).exists() else today


def tags() -> list[str]:
    """Tags of the nights with a journal; the one that changed last is the last."""
    journals = sorted(NIGHTS.glob("*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in journals if not path.parent.is_symlink()]


def latest_tag() -> str:
    """The tag with the journal that changed last. Raises UserError when there is none."""
    if not tags():
        raise UserError("there is no night yet; start one with: python agent_loop.py run --tag NAME")
    return tags()[-1]


def existing(tag: str | None) -> str:
    """`tag`, or the latest one for None. Raises UserError when there is no such night."""
    if tag and tag not in tags():
        raise UserError(f"there is no night {tag}; there are: {', '.join(sorted(tags())) or 'none'}")
    return tag or latest_tag()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create a night's folder and hold its lock; a folder that stays empty is removed. Raises UserError, before
    anything is created, where a night is impossible."""
    repository(ROOT)
    inside(folder / "lock", ROOT)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder} ({error.strerror}); clone the project into a folder that you can write to"
        ) from None
    with lock(folder / "lock"):
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == ["lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


def running(folder: Path) -> bool:
    """Whether a loop, or a `try`, holds the night's lock now."""
    try:
        with lock(folder / "lock"):
            return False
    except UserError:
        return True


def night_settings(folder: Path, preset: str | None, minutes: float | None, verbosity: int = NORMAL) -> dict[str, Any]:
    """The task of a night, fixed when it starts: a resumed night cannot change it."""
    path = folder / "settings.json"
    if path.is_file():
        settings = read_record(path, "restore it, or choose another --tag", of_run=True)
        if (preset and preset != settings["preset"]["name"]) or (minutes and minutes != settings["minutes"]):
            raise UserError(
                f"{folder.name} has preset {settings['preset']['name']} and {settings['minutes']:g} minutes; leave "
                "these options out to resume it, or choose another --tag"
            )
        return settings
    if preset:
        quiet = verbosity == QUIET
        flags = ["--quiet"] * quiet + ["--no-fit"] * bool(minutes)  # what fits is measured for the preset's own budget
        prepare = [sys.executable, str(ROOT / "prepare.py"), *flags, "--preset", preset]
        with interrupts_left_to_child():
            done = subprocess.run(bound(prepare), cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None, check=False)
        if done.returncode:
            sys.exit(done.returncode)  # prepare has printed its error
    if not current_path().is_file():
        raise UserError("nothing is prepared yet; add --preset offline, or run `make prepare` first")
    settings = read_record(current_path(), "`make prepare` writes a new one")
    settings |= {"minutes": minutes or settings["preset"]["task"]["minutes"], "steps": None}
    write_atomic(path, json.dumps(sealed(settings), indent=1))
    return settings


def open_night(
    folder: Path, *, preset: str | None, minutes: float | None, sandbox: str, verbosity: int = NORMAL
) -> tuple[Branch, Journal, Runner]:
    """The parts of a night, new or resumed. The caller holds its lock (`held`).

    Raises UserError when nothing is prepared, the prepared data is missing, or the tag is used for something else."""
    settings = night_settings(folder, preset, minutes, verbosity)
    kind = chosen_sandbox(sandbox)
    if kind in ("seatbelt", "landlock"):  # no loopback network inside: one process trains
        settings["preset"]["batch"]["processes"] = 1
    tell, echo = (log if verbosity > level else silent for level in (QUIET, NORMAL))
    branch = Branch(ROOT, folder / "worktree", f"autoresearch/{folder.name}", log)
    runner = Runner(folder, branch.worktree, settings, kind, log=tell, echo=echo)
    runner.check_data()
    register()
    journal = Journal(folder)
    check_results(journal)
    branch.ensure(journal.state.head() if journal.state.start else git(ROOT, "rev-parse", "HEAD"))
    if not journal.state.start:
        journal.record("start", tag=folder.name, commit=branch.head)
    keep_edit(branch, journal)
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("results/.*.tmp")]:  # of a kill
        leftover.unlink()
    journal.write_results()
    return branch, journal, runner


def check_results(journal: Journal) -> None:
    """Raise UserError if there is a result to which the journal does not lead: then its end is lost, and a run of the
    same name would get the result of another change."""
    known = set(journal.state.runs())
    for path in sorted((journal.folder / "results").glob("e*.json")):
        if path.stem not in known:
            raise UserError(
                f"{journal.path} has no run {path.stem}, but results/ has: its end is lost; restore the file, or start "
                "another night with --tag"
            )


def chosen_sandbox(wanted: str) -> str:
    """The kind of sandbox for a night. Raises UserError when the requested one does not work here."""
    kind = available() if wanted == "auto" else wanted
    if kind == "none":
        what = "no sandbox: train.py, written by an agent, can use the network and read and write all your files"
        print(f"warning: {what}", file=sys.stderr)
    elif fault := self_test(kind):
        raise UserError(f"the sandbox {kind} does not work here ({fault}); choose another, or --sandbox none")
    return kind


def keep_edit(branch: Branch, journal: Journal) -> None:
    """Save an uncommitted edit of the worktree's train.py before it is reset, and log where."""
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
    log(f"the worktree's train.py was edited; the edit is saved as {saved}")


def read_edit(path: Path) -> str | None:
    """The text of an edited train.py, None if there is none. Raises UserError, and keeps the file, if it is invalid."""
    try:
        return read_source(path) if os.path.lexists(path) else None
    except Rejected as reason:
        raise UserError(f"{reason}; fix {path}, then try again") from None


def stay_awake() -> None:
    """Keep a Mac awake while this process lives (not the display: see docs). Not run on a Mac."""
    if sys.platform == "darwin":
        subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())])
