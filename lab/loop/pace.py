"""The pace of every run: how fast the machine was during it, from two measurements. Pure: no files, no clock.

A run's own number of tokens says almost exactly how fast the machine was, compared with other runs of the same work.
But a candidate that does other work than the incumbent has other tokens on the same machine. What tells the two apart
is the speed of one fixed train.py before and after the run (`Run.pace`), which misses what happened in between.

Codes that do the same work for a token share `Code.work`: they differ only in learning rates and the like. With
y = log(tokens), p = log(measured pace) and one speed s for each work,

    y = s + x        x: log(pace), normal around the night's mean, sd `spread`
    p = x + e        sd `error`

so within one work the paces differ as the tokens do, and their mean is the mean of p, drawn to the night's mean by as
much as p errs. Both sds are estimated from the night's own runs.
"""

from collections.abc import Mapping, Sequence
from math import exp, log, sqrt
from statistics import fmean

from lab.loop.verdict import Code, Run

SPREAD, ERROR = 0.02, 0.015  # sds before any run is known
PRIOR_DF = 2  # runs that these weigh as much as


def paced(codes: Sequence[Code]) -> list[Code]:
    """The same codes, whose runs have the pace that both measurements together say.

    A code with a run that lacks either measurement keeps what was measured."""
    known = [code for code in codes if code.runs and all(run.pace and run.tokens for run in code.runs)]
    works: dict[int, list[Run]] = {}
    for code in known:
        works.setdefault(code.work, []).extend(code.runs)
    known, speeds = {code.id for code in known}, _speeds(works)
    return [_corrected(code, *speeds[code.work]) if code.id in known else code for code in codes]


def _corrected(code: Code, speed: float, doubt: float) -> Code:
    return code._replace(runs=[run._replace(pace=exp(log(run.tokens) - speed)) for run in code.runs], doubt=doubt)


def _speeds(works: Mapping[int, Sequence[Run]]) -> dict[int, tuple[float, float]]:
    """s of each work and its standard error."""
    spread = _variance([[log(run.tokens) for run in runs] for runs in works.values()], SPREAD)
    error = _variance([[log(run.tokens / run.pace) for run in runs] for runs in works.values()], ERROR)
    trust = spread / (spread + error)
    usual = fmean(log(run.pace) for runs in works.values() for run in runs) if works else 0.0
    speeds = {}
    for work, runs in works.items():
        pace = usual + trust * (fmean(log(run.pace) for run in runs) - usual)
        speeds[work] = fmean(log(run.tokens) for run in runs) - pace, sqrt(trust * error / len(runs))
    return speeds


def _variance(groups: Sequence[Sequence[float]], prior: float) -> float:
    """Pooled within groups, with the prior as PRIOR_DF further observations."""
    squares = sum((value - fmean(group)) ** 2 for group in groups for value in group)
    return (squares + PRIOR_DF * prior**2) / (sum(len(group) - 1 for group in groups) + PRIOR_DF)
