"""When a night ends: at a time of day, after a signal, or when nobody reads its output any more.

Ctrl-C, SIGTERM         after this experiment; a second one ends it at once
Ctrl-\\ (SIGQUIT)        at once
SIGHUP                  the terminal was closed: after this experiment; nohup ignores it, and the night goes on
a pipe is closed        the reader has ended (`make agent | head -1`): after this experiment
a terminal is lost      without SIGHUP, as after `disown` or setsid: the night goes on, and only its log is lost
"""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from datetime import time as time_of_day

from lab.machine.hardware import seconds_with_sleep
from lab.show import outlast_reader

Log = Callable[[str], None]


def next_time(at: time_of_day, after: datetime) -> datetime:
    """The next moment at which it is this time of day."""
    today = datetime.combine(after.date(), at)
    return today + timedelta(days=today <= after)


class Until:
    """The first moment after now at which it is this time of day. The computer's clock may be set meanwhile: the clock
    of the moment counts, and how long ago `now` was is measured without it."""

    def __init__(self, at: time_of_day) -> None:
        self.at, self.begun = at, seconds_with_sleep()

    @property
    def moment(self) -> datetime:
        return next_time(self.at, datetime.fromtimestamp(time.time() - (seconds_with_sleep() - self.begun)))

    @property
    def seconds(self) -> float:
        """How long it takes until then; negative afterwards."""
        return self.moment.timestamp() - time.time()


def end_calmly() -> None:
    """From now on SIGTERM and SIGHUP end a command as Ctrl-C does: its children end too, and what is complete stays."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def stopper(until: Until | None, log: Log) -> Callable[[], str]:
    """Watch for signals and lost output from now on. The function that is returned says why to end, or ""."""
    reasons = []

    def ask(number: int, _: object) -> None:
        if number == signal.SIGQUIT or (reasons and number != signal.SIGHUP):
            raise KeyboardInterrupt
        reasons.append("the terminal was closed" if number == signal.SIGHUP else "stopped")
        with suppress(RuntimeError):  # this signal interrupted a write, and a stream cannot be written twice at a time
            log("stopping after this experiment; once more to stop at once (nothing is lost)")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ask)
    outlast_reader(reasons.append)
    return lambda: reasons[0] if reasons else "end time reached" if until and until.seconds <= 0 else ""
