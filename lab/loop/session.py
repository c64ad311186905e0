"""What a night needs before its first experiment: its task, its agent, when to stop, a machine that stays awake."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import ROOT, inside, write_atomic
from lab.loop.git import repository
from lab.loop.journal import lock
from lab.show import NORMAL, QUIET
from lab.training.run import current_path, read_record
from lab.trial.child import interrupts_left_to_child

GOES_ON_HOURS = 6.0  # after its last record a night of yesterday's date goes on under that name

Say = Callable[[str], None]


def tonight(nights: Path, now: datetime) -> str:
    """The tag of a night without one: today's date, or yesterday's while that night goes on past midnight."""
    today, yesterday = (f"{day:%b%d}".lower() for day in (now, now - timedelta(days=1)))
    journal = nights / yesterday / "journal.jsonl"
    recent = journal.is_file() and now.timestamp() - journal.stat().st_mtime < GOES_ON_HOURS * 3600
    return yesterday if recent and not (nights / today).exists() else today


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a night's folder and hold its lock; a folder in which nothing came to be is removed again. Raises UserError
    where no night can be: before it is made."""
    repository(ROOT)
    inside(folder / "lock", ROOT)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); clone the project to where you may write"
        ) from None
    with lock(folder / "lock"):
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == ["lock"]:
                (folder / "lock").unlink()
                folder.rmdir()


def night_settings(folder: Path, preset: str | None, minutes: float | None, verbosity: int = NORMAL) -> dict[str, Any]:
    """The task of a night, fixed when it begins: a resumed night may not change it."""
    path = folder / "settings.json"
    if path.is_file():
        settings = read_record(path, "restore it, or choose another --tag")
        if (preset and preset != settings["preset"]["name"]) or (minutes and minutes != settings["minutes"]):
            raise UserError(
                f"{folder.name} has preset {settings['preset']['name']} and {settings['minutes']:g} minutes; leave "
                "them out to go on with it, or choose another --tag"
            )
        return settings
    if preset:
        quiet = verbosity == QUIET
        flags = ["--quiet"] * quiet + ["--no-fit"] * bool(minutes)  # what fits is measured for the preset's own budget
        prepare = [sys.executable, str(ROOT / "prepare.py"), *flags, "--preset", preset]
        with interrupts_left_to_child():
            status = subprocess.run(prepare, cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None).returncode
        if status:
            sys.exit(status)  # it has said why
    if not current_path().is_file():
        raise UserError("nothing is prepared yet; add --preset offline, or run `make prepare` first")
    settings = read_record(current_path(), "`make prepare` writes it anew")
    settings |= {"minutes": minutes or settings["preset"]["task"]["minutes"], "steps": None}
    write_atomic(path, json.dumps(settings, indent=1))
    return settings


def next_time(at: time) -> datetime:
    """The next moment at which it is this time of day."""
    today = datetime.combine(datetime.now().date(), at)
    return today + timedelta(days=today <= datetime.now())


def stopper(deadline: datetime | None, say: Say) -> Callable[[], str]:
    """Says when to end: at the deadline, or after the first Ctrl-C or TERM; the second Ctrl-C ends at once."""
    asked = []

    def ask(*_: Any) -> None:
        asked.append(True)
        if len(asked) > 1:
            raise KeyboardInterrupt
        say("stopping after this experiment; once more to stop at once (nothing is lost)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return lambda: "stopped" if asked else "it is time" if deadline and datetime.now() >= deadline else ""


def stay_awake() -> None:
    """Keep a Mac awake while this process lives (not the display: see docs). Not run on a Mac."""
    if sys.platform == "darwin":
        subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())])
