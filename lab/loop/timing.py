"""The speed of a candidate against the incumbent's, timed in turn where a verdict needs it.

A candidate that does other work for a token has other tokens on the same machine. The pace that is measured during its
runs tells the two apart less precisely than two trainings of some seconds, one right after the other (lab.loop.pace).
`night` is an agent_loop.Night.
"""

from math import exp
from typing import Any

from lab.loop.verdict import SURE, Decision
from lab.trial.runner import TIMED_MINUTES

KNOWN = 0.01  # error of the logarithm of the speed below which it is not timed again: other programs disturbed it


def time_in_turn(night: Any, decision: Decision) -> bool:
    """Time the pending experiment against the incumbent and record it, unless `decision` stands without it or its speed
    is known. Whether it was recorded."""
    state = night.journal.state
    now, best = state.pending, state.incumbent
    short = night.runner.settings["minutes"] < TIMED_MINUTES
    if short or night.rigor == "none" or not state.can_be_timed:
        return False
    stands = decision.verdict == "discard" or -decision.delta > SURE * decision.error
    known = now.work == best.work or (now.timed and now.timed[2] < KNOWN)
    if stands or known or not (now.code.exact and best.code.exact):  # without paces, their speeds are not compared
        return False
    ratio, error = night.runner.timed_in_turn(night.branch.source(now.commit), night.branch.source(best.commit))
    night.journal.record("timed", id=now.id, work=best.work, ratio=ratio, error=error)
    if ratio is not None:
        night.log(f"timed in turn: {100 * (exp(ratio) - 1):+.1f} ± {100 * error:.1f} % tokens/s against the incumbent")
    return True
