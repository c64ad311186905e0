"""The pace of every run: how fast the machine was during it, from two measurements. Pure: no files, no clock.

A run's own number of tokens says almost exactly how fast the machine was, compared with other runs of the same work.
But a candidate that does other work than the incumbent has other tokens on the same machine. What tells the two apart
is the speed of one fixed train.py before and after the run (`Run.pace`), which misses what happened in between.

Codes that do the same work for a token share `Code.work`: they differ only in learning rates and the like. With
y = log(tokens), p = log(measured pace) and one speed s for each work,

    y = s + x        x: log(pace); from one run of the night to the next it moves by an sd of `step`
    p = x + e        sd `error`

so within one work the paces differ as the tokens do. Where a verdict needs it, two works are timed in turn, some
seconds each (`Code.timed`): t = s - s' + e', with an error of its own. s is the least squares solution over all runs
in their order: what the machine did just before and after is known from other works, and p says the same less
precisely. But where p contradicts x or t by more than it errs, these weigh less: the machine changed at once, or some
seconds of a training are not like the whole. What p misses is alike in runs beside the same other programs, so the
runs of one work together tell no more than one of them. The first two sds are estimated from the night's own runs.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import exp, log, sqrt
from statistics import fmean

import numpy as np

from lab.loop.verdict import Code, Run

STEP, ERROR = 0.02, 0.018  # sds before any run is known
PRIOR_DF = 2  # runs that these weigh as much as
SUDDEN = 1.5  # errors of a difference of p from which on it is the machine that changed at once
CONTRADICTED = 2.0  # errors from which on p is right, and not some seconds in turn

Timed = tuple[int, Run]  # a work and one of its runs
InTurn = tuple[int, int, float, float]  # two works, log of the speed of the first over that of the second, its error


def paced(codes: Sequence[Code], against: int) -> list[Code]:
    """The same codes, whose runs have the pace that both measurements together say. `doubt` is the standard error of a
    code's s minus that of the work `against`.

    A code with a run that lacks either measurement keeps what was measured; so do all if the work `against` has no
    other runs."""
    known = {code.id for code in codes if code.exact}
    runs = [(code.work, run) for code in codes if code.id in known for run in code.runs]
    in_turn = [(code.work, *code.timed) for code in codes if code.timed]
    speeds, covariance, place = _speeds(sorted(runs, key=lambda timed: timed[1].at), in_turn)

    def corrected(code: Code) -> Code:
        if code.id not in known or against not in place:
            return code
        own, other = place[code.work], place[against]
        doubt = covariance[own, own] + covariance[other, other] - 2 * covariance[own, other]
        runs = [run._replace(pace=exp(log(run.tokens) - speeds[own])) for run in code.runs]
        return code._replace(runs=runs, doubt=sqrt(max(0.0, doubt)))

    return [corrected(code) for code in codes]


def _speeds(runs: Sequence[Timed], in_turn: Sequence[InTurn]) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """s of every work with the covariance, and the place of each work in both."""
    place = {work: i for i, work in enumerate(dict.fromkeys(work for work, _ in runs))}
    moves = [(one, two) for one, two in pairwise(runs)]
    within = [[log(run.tokens / run.pace) for own, run in runs if own == work] for work in place]
    error = max(ERROR**2, _variance(within, ERROR))  # what p misses in all runs of a work alike does not show
    same = [log(two[1].tokens / one[1].tokens) for one, two in moves if one[0] == two[0]]
    step = (sum(move**2 for move in same) + PRIOR_DF * STEP**2) / (len(same) + PRIOR_DF)
    precision, pull = np.zeros((len(place), len(place))), np.zeros(len(place))
    count = Counter(work for work, _ in runs)
    for work, run in runs:
        precision[place[work], place[work]] += 1 / (error * count[work])
        pull[place[work]] += log(run.tokens / run.pace) / (error * count[work])
    differences = []
    for (one, before), (two, after) in moves:
        variance = step + _excess(log(after.pace / before.pace), error, SUDDEN)
        differences.append((one, two, log(after.tokens / before.tokens), variance))
    for one, two, ratio, turn_error in in_turn:
        if {one, two} <= place.keys():
            seen = fmean(within[place[one]]) - fmean(within[place[two]])
            differences.append((one, two, -ratio, turn_error**2 + _excess(ratio - seen, error, CONTRADICTED)))
    for one, two, difference, variance in differences:
        if one != two:
            i, j = place[one], place[two]
            precision[[i, j], [i, j]] += 1 / variance
            precision[[i, j], [j, i]] -= 1 / variance
            pull[[i, j]] += np.array([-difference, difference]) / variance
    covariance = np.linalg.inv(precision)
    return covariance @ pull, covariance, place


def _excess(difference: float, error: float, errors: float) -> float:
    """The square of a difference of two p, as far as it is beyond so many errors; each has the variance `error`."""
    return max(0.0, difference**2 - errors**2 * 2 * error)


def _variance(groups: Sequence[Sequence[float]], prior: float) -> float:
    """Pooled within groups, with the prior as PRIOR_DF further observations."""
    squares = sum((value - fmean(group)) ** 2 for group in groups for value in group)
    return (squares + PRIOR_DF * prior**2) / (sum(len(group) - 1 for group in groups) + PRIOR_DF)
