"""The earlier verdict, for comparison: means of unpaired runs against one noise estimate for the night."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean
from typing import Literal

from lab.loop.verdict import student

BAR = 1.93  # standard normal quantile that a gain must pass; one-sided 2.7 % a look, under 5 % over all
FLOOR = 5  # incumbent runs below which its mean is not trusted near the bar
EARLY = 1.5  # factor on the bar while the incumbent has fewer than FLOOR runs
WIDE = 1.0  # t up to which an incumbent with fewer than FLOOR runs may have been lucky
HOPELESS = 0.8  # -t below which a candidate with all its runs is discarded
CANDIDATE_RUNS = 3  # at most; a near miss has all of them
INCUMBENT_RUNS = 14  # at most, over all its comparisons
BASELINE_RUNS = 2  # with different seeds, before the first proposal
PRIOR_SHARE = 0.01  # prior sigma over val_bpb; 30 seeds on one GPU had 0.9 %, runs on a Mac 2.5 %
PRIOR_DF = 1  # weight of the prior in degrees of freedom: outweighed by the second replicate


@dataclass(frozen=True)
class Noise:
    """Run-to-run standard deviation of val_bpb: pooled squares about group means over degrees of freedom.

    `prior` (bits per byte) counts as PRIOR_DF degrees, so that two baseline runs that agree by chance do not
    make every change look significant. Crashed and invalid runs never enter. Nor does a candidate's first run:
    it is replicated only if it was low, which would bias the spread upwards.
    """

    prior: float
    squares: float = 0.0
    df: int = 0

    def joined(self, group: Sequence[float], value: float) -> "Noise":
        """The noise after one more run of a source with the unselected runs `group` (Welford's update)."""
        if not group:
            return self
        squares = self.squares + len(group) / (len(group) + 1) * (value - fmean(group)) ** 2
        return replace(self, squares=squares, df=self.df + 1)

    @property
    def sigma(self) -> float:
        return sqrt((PRIOR_DF * self.prior**2 + self.squares) / (PRIOR_DF + self.df))

    @property
    def bar(self) -> float:
        """BAR as a quantile of Student's t with the current degrees of freedom."""
        return student(BAR, PRIOR_DF + self.df)


@dataclass(frozen=True)
class Decision:
    verdict: Literal["keep", "discard", "again"]
    who: Literal["candidate", "incumbent"] = "candidate"  # who runs again, if "again"


def decide(incumbent: Sequence[float], candidate: Sequence[float], noise: Noise, to_come: int | None) -> Decision:
    """The verdict from the val_bpb of all runs of both; without an `incumbent` the candidate is the baseline."""
    if not incumbent:
        return Decision("keep" if len(candidate) >= BASELINE_RUNS else "again")
    most = INCUMBENT_RUNS if to_come is None else min(INCUMBENT_RUNS, FLOOR + to_come)
    t = (fmean(candidate) - fmean(incumbent)) / (noise.sigma * sqrt(1 / len(candidate) + 1 / len(incumbent)))
    trusted, tried = len(incumbent) >= min(FLOOR, most), len(candidate) >= CANDIDATE_RUNS
    if t >= 0:
        return Decision("again", "incumbent") if t < WIDE and not trusted else Decision("discard")
    if len(candidate) == 1:
        return Decision("again")
    if t < -noise.bar * (1 if trusted else EARLY):
        return Decision("keep")
    if trusted and tried and t > -HOPELESS:
        return Decision("discard")
    if len(incumbent) < most and (tried or len(incumbent) <= len(candidate)):
        return Decision("again", "incumbent")
    return Decision("discard" if tried else "again")
