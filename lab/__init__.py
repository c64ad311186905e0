"""The fixed laboratory: everything that decides a result and that an experiment may not edit."""

import sys
from types import TracebackType


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught  # for a Ctrl-C in the second that the imports take: lab.run.guarded comes after them
