"""Keep, discard or run again: the one place that turns numbers into a verdict. Pure: no files, no clock.

The question is whether the candidate's true mean is below the incumbent's, given that the same source with
another seed moves by sigma. The statistic is Student's

    t = (mean(candidate) - mean(incumbent)) / (sigma * sqrt(1/candidate runs + 1/incumbent runs))

with one sigma for the night, pooled over all replicates (`Noise`). The rule:

- not below the incumbent: discard, usually after one run. But where t < WIDE and the incumbent has fewer
  than FLOOR runs the incumbent runs again first: its mean may be the lucky one;
- below it after one run: run again. Nothing is kept on one run; the second costs nothing in the long run,
  because a kept change is the next incumbent, which needs replicates anyway;
- beyond the bar (t < -BAR, widened for few degrees of freedom): keep. While the incumbent has fewer than
  FLOOR runs the bar is EARLY times as high, so that only large gains get by on little evidence;
- barely below it (t > -HOPELESS) when the candidate had all its runs and the incumbent FLOOR: discard, as a
  near miss. More runs of the incumbent would seldom carry it beyond the bar;
- otherwise whoever has fewer runs goes again, the incumbent on ties (its run serves every later
  comparison), up to CANDIDATE_RUNS and INCUMBENT_RUNS. Then discard, as a near miss. Where only so many
  comparisons are still to come, each repays one run of the incumbent beyond FLOOR, no more;
- a change that makes train.py simpler is not given up as hopeless, and is kept where others end as near misses:
  its loss is then under 0.82 sigma with 90 % confidence (1.28 * sqrt(1/3 + 1/14)).

Why the incumbent runs again: a kept change was picked for looking good, so its mean is too low by about one
standard error (winner's curse). Without fresh runs of the incumbent a third or more of all true 2-sigma gains
is then lost, and A/A looks better than it is, since nothing beats a lucky number. With three candidate runs
and two incumbent runs the standard error is 0.91 sigma and no bar gives 5 % and 80 % at once; with
fourteen it is 0.64.

The constants come from simulation over some 900 settings with normal noise (benchmarks/verdict.py measures the
chosen one): under 5 % of null changes kept even for the first proposal after a two-run baseline, where A/A is
hardest (4.7 %; over a night of 200 it is 0.8 %), and at least 80 % of 2-sigma gains kept both there (89 %) and
in nights where one proposal in ten has such a gain (80 %). Giving up the hopeless saves one run in nine per kept
gain (29 against 33) and costs none of that; a higher HOPELESS saves more and falls below 80 %.

Left out: a paired test over the documents. It measures the difference between two trained models precisely,
but the question is about two sources, and there seeds, not documents, are the noise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from statistics import fmean
from typing import Literal

BAR = 1.93  # standard normal quantile that a gain must pass; one-sided 2.7 % a look, under 5 % over all
FLOOR = 5  # incumbent runs below which its mean is not trusted near the bar
EARLY = 1.5  # factor on the bar while the incumbent has fewer than FLOOR runs
WIDE = 1.0  # t up to which an incumbent with fewer than FLOOR runs may be the lucky one
HOPELESS = 0.8  # -t below which a candidate with all its runs is given up
CANDIDATE_RUNS = 3  # at most; also the runs a near miss has had
INCUMBENT_RUNS = 14  # at most, over all comparisons it is in
BASELINE_RUNS = 2  # with different seeds, before the first proposal
PRIOR_SHARE = 0.01  # prior sigma over val_bpb; 30 seeds on one GPU had 0.9 %, runs on a Mac 2.5 %
PRIOR_DF = 1  # weight of the prior in degrees of freedom: outweighed by the second replicate

Rigor = Literal["full", "none"]


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

    @classmethod
    def of(cls, groups: Iterable[Sequence[float]], prior: float) -> "Noise":
        """Noise over groups of unselected replicates of one source each."""
        noise = cls(prior)
        for group in groups:
            for i, value in enumerate(group):
                noise = noise.joined(group[:i], value)
        return noise

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
        """BAR as a quantile of Student's t with the degrees of freedom at hand."""
        return student(BAR, PRIOR_DF + self.df)


@dataclass(frozen=True)
class Decision:
    verdict: Literal["keep", "discard", "again"]
    delta: float  # candidate's mean minus incumbent's, bits per byte; negative is better; 0 for the baseline
    sigma: float  # run-to-run standard deviation assumed, bits per byte
    error: float  # standard error of delta, bits per byte
    reason: str  # one line
    who: Literal["candidate", "incumbent"] = "candidate"  # who runs again, if "again"
    near_miss: bool = False  # discarded, though its mean is below the incumbent's


def decide(
    incumbent: Sequence[float],
    candidate: Sequence[float],
    noise: Noise,
    rigor: Rigor = "full",
    simpler: bool = False,
    remeasure: bool = True,
    to_come: int | None = None,
) -> Decision:
    """The verdict on a candidate from the val_bpb of all its valid runs and all of the incumbent's.

    An empty `incumbent` means that the candidate is the baseline. `rigor="none"` is upstream's rule: keep what
    is strictly lower. `simpler`: the candidate's train.py has fewer nodes (lab.loop.source). `remeasure=False` never
    asks for the incumbent (it crashed when it ran again). `to_come`: experiments after this one, None if nobody knows.
    A kept candidate becomes the incumbent with all its runs.
    Raises ValueError on an empty candidate or a value that is not finite: only valid runs belong here.
    """
    if not candidate or not all(map(isfinite, (*incumbent, *candidate))):
        raise ValueError(f"a verdict needs finite val_bpb values, got {incumbent} and {candidate}")
    if not incumbent:
        return _baseline(candidate, noise, rigor)
    delta = fmean(candidate) - fmean(incumbent)
    error = noise.sigma * sqrt(1 / len(candidate) + 1 / len(incumbent))
    verdict, who, why = (
        ("keep" if delta < 0 else "discard", "candidate", "upstream's rule")
        if rigor == "none"
        else _weigh(
            len(incumbent), len(candidate), delta / error, noise.bar, simpler, _most(to_come) if remeasure else 0
        )
    )
    runs = f"{len(candidate)} against {len(incumbent)} run{'s' * (len(incumbent) > 1)}"
    reason = f"{delta:+.6f} ± {error:.6f} bpb, {runs}: {why}"
    return Decision(verdict, delta, noise.sigma, error, reason, who, verdict == "discard" and delta < 0)


def _baseline(candidate: Sequence[float], noise: Noise, rigor: Rigor) -> Decision:
    done = rigor == "none" or len(candidate) >= BASELINE_RUNS
    error = noise.sigma / sqrt(len(candidate))
    reason = "baseline" if done else f"the baseline runs {BASELINE_RUNS} times to measure the noise"
    return Decision("keep" if done else "again", 0.0, noise.sigma, error, reason)


def _most(to_come: int | None) -> int:
    """Runs of the incumbent that what is still to come repays."""
    return INCUMBENT_RUNS if to_come is None else min(INCUMBENT_RUNS, FLOOR + to_come)


def _weigh(incumbents: int, candidates: int, t: float, bar: float, simpler: bool, most: int) -> tuple[str, str, str]:
    """(verdict, who, why) from the numbers of runs and Student's t; the incumbent may have `most` runs."""
    trusted = incumbents >= min(FLOOR, most)
    if t >= 0:
        if t < WIDE and not trusted:
            return "again", "incumbent", "barely worse, and the incumbent may have been lucky"
        return "discard", "candidate", "not better"
    if candidates == 1:
        return "again", "candidate", "better once"
    if t < -bar * (1 if trusted else EARLY):
        return "keep", "candidate", "beyond the noise"
    if trusted and candidates >= CANDIDATE_RUNS and t > -HOPELESS and not simpler:
        return "discard", "candidate", "better, but hardly"
    return _undecided(candidates, incumbents, simpler, most)


def _undecided(candidates: int, incumbents: int, simpler: bool, most: int) -> tuple[str, str, str]:
    """Better, but within the noise: the next run goes where it narrows the standard error most."""
    if incumbents < most and (incumbents <= candidates or candidates >= CANDIDATE_RUNS):
        return "again", "incumbent", "better, but within the noise"
    if candidates < CANDIDATE_RUNS:
        return "again", "candidate", "better, but within the noise"
    if simpler:
        return "keep", "candidate", "no worse, and simpler"
    return "discard", "candidate", "better, but never beyond the noise"


def student(z: float, df: int) -> float:
    """Quantile of Student's t at the probability of the normal quantile `z`: Abramowitz and Stegun 26.7.5.

    Within 1 % for |z| <= 2 and df >= 2.
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))
