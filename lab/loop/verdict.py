"""The verdict: keep, discard or run again, from the numbers of the runs. Pure: no files, no clock.

The model. Over the runs of a night, with normal noise,

    val_bpb = code + seed + slope * log(pace) + e

A seed sets the initial parameters and the order of the text for any code, so most of its effect on a run is the same
for two codes. Measured at val_bpb 0.97 (250 steps, four seeds, three codes): a seed moves a run by 0.0073 (sd), and a
difference of two codes at the same seed varies by 0.0018. `pace` is the speed of the machine during the run
(lab.loop.pace): five minutes at another pace are another number of tokens, and val_bpb falls with their logarithm.
`Fit` solves the model by generalized least squares over the candidate, the incumbent and the codes with two runs or
more, from which it estimates the effects of the seeds. Its priors, as shares of val_bpb:

- Seeds are random with sd SEED, pairs with sd PAIR. Both are estimated from the night's own runs. Each has a log-normal
  prior with sd DOUBT, which weighs as much as two degrees of freedom. Differences scatter more where the effect is
  beyond SMALL (0.0066 at an effect of 0.074): their noise grows in proportion, so they are not used to estimate the
  noise of small ones.
- The slope is SLOPE +- SLOPE_SD: it is steeper the fewer tokens a run gets. Measured, as a share of val_bpb: -0.078 and
  -0.124 with 2 million, -0.24 with half a million (docs/recorded). The night's own runs narrow it down, above all
  repeats of the same code and seed at another pace: these differ by the slope, with an sd of REPEAT.
- A kept change was selected for a good result (winner's curse). So each incumbent has a normal prior centred on the
  code that it changes, as wide as its effect and at least KEPT.

The rule. delta is the posterior mean of candidate - incumbent, t = -delta / its error, and
pairs = 2 var(e) / error^2 is the information so far, as a number of pairs of runs. Wald's sequential test of no gain
against a gain of GAIN pair sds bounds t from both sides (`bounds`):

- above: keep, but never below LEAST (both widened for few degrees of freedom, up to SURE), and only with two shared
  seeds;
- below, or worse by WORSE errors: discard. A change that makes train.py simpler is not discarded while delta < 0;
- after CANDIDATE_RUNS runs: discard, as a near miss; a simpler change is kept;
- where the pace is not known, the incumbent repeats CONTROLS of the shared seeds before a change is kept. The same
  code and seed should score the same: the gain must exceed what the machine did to these scores;
- otherwise the run that reduces the error most is next: the candidate with a seed that the incumbent has, the
  incumbent with one that the candidate has, or both with a new one; or the incumbent repeats a seed at today's pace.

The baseline runs with BASELINE_RUNS seeds. A kept change runs with FRESH new seeds before the next candidate, because
these did not select it; with fewer when few experiments remain, and with none if it is better than its parent by more
than CLEAR errors, because luck did not select that. First runs of candidates take turns over the seeds
that were not part of a selection: one lucky run of the incumbent would hide every gain.

The constants of the rule come from simulation over some 50 settings (benchmarks/verdict.py measures the chosen ones):
2 to 5 % of null changes kept as first proposal, and 73 to 85 % of gains of 1.4 pair sds (docs/LOOP.md). A flat
bar instead of Wald's keeps a third more null changes as first proposals at equal power; four new seeds instead of FRESH
lose one gain in twenty more; without KEPT one in twenty more is lost again.

Left out: a paired test over the documents. It measures the difference between two trained models precisely,
but the question is about two sources, and there the noise comes from seeds, not documents.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, hypot, inf, isfinite, log, sqrt
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

SEED = 0.0075  # sd of a run with another seed, share of val_bpb
PAIR = 0.0018  # sd of a difference at the same seed, share of val_bpb
REPEAT = 0.0012  # sd of a run of the same code and seed at an equal number of tokens, share of val_bpb
DOUBT = 0.5  # sd of the logarithm of either: weighs 1 / (2 * DOUBT^2) = 2 degrees of freedom
SLOPE, SLOPE_SD = -0.12, 0.08  # val_bpb on log(pace), share of val_bpb
SMALL = 0.01  # largest effect of a code whose runs estimate the noise of pairs, share of val_bpb
KEPT = 0.002  # least sd of an incumbent's prior around the code that it changes, share of val_bpb
FLAT = 1e-4  # prior precision of the codes, practically none, 1 / bpb^2
PRIOR_DF = 1 / (2 * DOUBT**2)
GAIN = 1.3  # pair sds: the gain that the sequential test is designed for
KEEP, DISCARD = 1.85, -1.0  # log-likelihood ratios that end it
WORSE = 3.0  # errors by which a candidate is worse: then no gain is left to look for, small or large
LEAST = 1.65  # standard normal quantile that a gain must always exceed
SURE = 5.0  # errors by which it is better: kept with two shared seeds, however few the degrees of freedom
CANDIDATE_RUNS = 8  # at most
BASELINE_RUNS = 3  # with different seeds, before the first proposal
FRESH = 7  # runs of a kept change with seeds that did not select it
CLEAR = 4.0  # errors by which it is better than its parent and needs none
PAIRS = 2  # least number of shared seeds to keep a change
CONTROLS = 2  # of them that the incumbent repeats before a change is kept

Rigor = Literal["full", "none"]
Who = Literal["candidate", "incumbent"]


class Run(NamedTuple):
    """One valid run."""

    seed: int
    value: float  # val_bpb
    pace: float | None = None  # speed of the machine relative to its usual speed of 1.0; None: not measured
    at: int = 0  # position in the night: later runs have larger numbers
    tokens: int | None = None  # trained on; None: unknown

    @property
    def x(self) -> float:
        return log(self.pace) if self.pace else 0.0


class Code(NamedTuple):
    """One source with its runs."""

    id: int
    runs: Sequence[Run]
    parent: int | None = None  # if it was kept: id of the incumbent that it changed
    selected: int = 0  # number of its first runs, on which it was kept
    work: int = 0  # codes with the same do the same work for a token (lab.loop.pace)
    timed: tuple[int, float, float] | None = None  # other work, log of its own speed over that work's, and its error
    doubt: float = 0.0  # sd of an error of log(pace) that all its runs share, against the incumbent's work

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    @property
    def unselected(self) -> list[int]:
        """Seeds that it ran with only after it was kept."""
        selecting = {run.seed for run in self.runs[: self.selected]}
        return [seed for seed in dict.fromkeys(run.seed for run in self.runs[self.selected :]) if seed not in selecting]

    @property
    def by_seed(self) -> list[Run]:
        """One run for each seed, the mean of its repeats: these share their noise."""
        repeats = [[run for run in self.runs if run.seed == seed] for seed in dict.fromkeys(r.seed for r in self.runs)]
        return [Run(g[0].seed, fmean(r.value for r in g), exp(fmean(r.x for r in g))) for g in repeats]

    @property
    def repeats(self) -> list[tuple[Run, Run]]:
        """Each run with the mean of its seed; none unless the paces are exact."""
        means = {mean.seed: mean for mean in self.by_seed}
        return [(run, means[run.seed]) for run in self.runs] if self.exact else []

    @property
    def exact(self) -> bool:
        """Whether the paces of its runs are known almost exactly, from their tokens (lab.loop.pace)."""
        return bool(self.runs) and all(run.pace and run.tokens for run in self.runs)


@dataclass(frozen=True)
class Decision:
    verdict: Literal["keep", "discard", "again"]
    delta: float  # candidate minus incumbent at the same seed and pace, bits per byte; negative is better
    error: float  # standard error of delta, bits per byte; for the baseline, of its mean
    sigma: float  # sd of a run with another seed, bits per byte
    pair: float  # sd of a difference at the same seed, bits per byte
    reason: str  # one line; empty before the first run
    who: Who = "candidate"  # who runs next, if "again"
    seed: int = 0  # and with which seed
    near_miss: bool = False  # discarded although it looked better
    standing: float | None = None  # incumbent minus the night's first code, from all runs so far, bits per byte


def decide(
    candidate: Code,
    incumbent: Code | None,
    others: Sequence[Code] = (),
    *,
    new_seed: int,
    rigor: Rigor = "full",
    simpler: bool = False,
    remeasure: bool = True,
    to_come: int | None = None,
) -> Decision:
    """The verdict on a candidate, or the next run, including its first.

    Without an `incumbent` the candidate is the baseline. `others`: further codes of the night with two runs or
    more; the one with the lowest id is what the night started with. `new_seed`: one that is not used yet.
    `rigor="none"` is upstream's rule: one run each, the lower is kept. `simpler`: the candidate's train.py has fewer
    nodes (lab.loop.source). `remeasure=False` never runs the incumbent (it crashed when it ran again). `to_come`:
    number of experiments after this one, None if unknown.
    Raises ValueError on a value that is not finite or a pace that is not positive: only valid runs are allowed here.
    """
    codes = [candidate, *([incumbent] if incumbent else []), *others]
    for run in (run for code in codes for run in code.runs):
        if not isfinite(run.value) or (run.pace is not None and not 0 < run.pace < inf):
            raise ValueError(f"val_bpb must be finite and pace positive, got {run}")
    if incumbent is None:
        return _baseline(candidate, rigor, new_seed, to_come)
    fit = Fit([code for code in codes if code.runs], incumbent)
    standing = fit.difference(incumbent, min([incumbent, *others], key=lambda code: code.id))[0]
    if not candidate.runs:
        remeasure = remeasure and rigor == "full" and not _clear(fit, incumbent, others)
        who, seed, reason = _first(candidate, incumbent, new_seed, remeasure, to_come)
        return Decision("again", 0.0, 0.0, fit.sigma, fit.pair, reason, who, seed, standing=standing)
    delta, error = fit.difference(candidate, incumbent)
    if rigor == "none":
        delta, standing = _plain(candidate, incumbent), None
        verdict, who, seed, cause = "keep" if delta < 0 else "discard", "candidate", 0, "upstream's rule"
    else:
        verdict, who, seed, cause = _weigh(fit, candidate, incumbent, new_seed, simpler, remeasure)
    shared = len(candidate.seeds & incumbent.seeds)
    near_miss = verdict == "discard" and delta < 0 and (rigor == "none" or shared >= PAIRS)
    runs = f"{len(candidate.runs)} against {_count(len(incumbent.runs))}, {shared} with the same seed"
    reason = f"{delta:+.6f} ± {error:.6f} bpb, {runs}: {cause}"
    return Decision(verdict, delta, error, fit.sigma, fit.pair, reason, who, seed, near_miss, standing)


def _baseline(candidate: Code, rigor: Rigor, new_seed: int, to_come: int | None) -> Decision:
    """The verdict on the baseline. With few experiments to come, fewer seeds are worth their time."""
    wanted = 1 if rigor == "none" else BASELINE_RUNS if to_come is None else min(BASELINE_RUNS, PAIRS + to_come)
    done = len(candidate.runs) >= wanted
    reason = "baseline" if done else f"the baseline needs {wanted} runs"
    if not candidate.runs:
        return Decision("again", 0.0, 0.0, 0.0, 0.0, reason, seed=new_seed)
    fit = Fit([candidate], candidate)
    error = fit.sigma / sqrt(len(candidate.runs))
    return Decision("keep" if done else "again", 0.0, error, fit.sigma, fit.pair, reason, seed=new_seed)


def _clear(fit: "Fit", incumbent: Code, others: Sequence[Code]) -> bool:
    """Whether it is better than its parent by more than luck could select."""
    parent = next((code for code in others if code.id == incumbent.parent), None)
    delta, error = fit.difference(incumbent, parent) if parent else (0.0, 0.0)
    return delta < -CLEAR * error


def _first(
    candidate: Code, incumbent: Code, new_seed: int, remeasure: bool, to_come: int | None
) -> tuple[Who, int, str]:
    """(who, seed, reason) of the first run of a comparison."""
    wanted = FRESH if to_come is None else min(FRESH, 1 + to_come)
    if remeasure and incumbent.selected and len(incumbent.unselected) < wanted:
        return "incumbent", new_seed, "the incumbent runs with a new seed"
    seeds = incumbent.unselected or sorted(incumbent.seeds)
    return "candidate", seeds[candidate.id % len(seeds)], ""


def _plain(candidate: Code, incumbent: Code) -> float:
    """Difference of means, over the shared seeds if there are any."""
    same = [run.value for run in incumbent.runs if run.seed in candidate.seeds]
    return fmean(r.value for r in candidate.runs) - fmean(same or [r.value for r in incumbent.runs])


def _weigh(
    fit: "Fit", candidate: Code, incumbent: Code, new_seed: int, simpler: bool, remeasure: bool
) -> tuple[str, Who, int, str]:
    """(verdict, who, seed, reason) by the sequential test."""
    delta, error = fit.difference(candidate, incumbent)
    low, high = bounds(2 * fit.variance / error**2, fit.df)
    t, shared = -delta / error, candidate.seeds & incumbent.seeds
    if t > high and len(shared) >= PAIRS:
        return _confirm(fit, candidate, incumbent, high, remeasure, "beyond the noise")
    if t < low and not (simpler and delta < 0):
        return "discard", "candidate", 0, "not better" if delta >= 0 else "the gain is too small"
    run = fit.next_run(candidate, incumbent, new_seed, remeasure) if len(candidate.runs) < CANDIDATE_RUNS else None
    if run:
        return "again", *run, "within the noise"
    if simpler and delta < 0 and len(shared) >= PAIRS:
        return _confirm(fit, candidate, incumbent, 0.0, remeasure, "no worse, and simpler")
    return "discard", "candidate", 0, "still within the noise after the last run"


def _confirm(
    fit: "Fit", candidate: Code, incumbent: Code, bar: float, remeasure: bool, reason: str
) -> tuple[str, Who, int, str]:
    """Keep, unless the machine may be what made the difference: (verdict, who, seed, reason)."""
    shared = sorted(candidate.seeds & incumbent.seeds)
    if all(run.pace is not None for run in candidate.runs + incumbent.runs if run.seed in shared):
        return "keep", "candidate", 0, reason
    changes, missing = _changes(fit, candidate.runs[0].at, incumbent, shared)
    if remeasure and missing and len(changes) < CONTROLS:
        return "again", "incumbent", missing[0], "better; the incumbent repeats a seed, to check the machine"
    delta, error = fit.difference(candidate, incumbent)
    shift = min(0.0, fmean(changes)) if changes else 0.0  # a slower machine earns no credit
    doubt = sqrt(fmean(change**2 for change in changes) / len(changes)) if changes else 0.0
    if shift - delta > bar * hypot(error, doubt):
        return "keep", "candidate", 0, reason
    return "discard", "candidate", 0, f"the machine changed: the incumbent's own scores moved by {fmean(changes):+.6f}"


def _changes(fit: "Fit", since: int, incumbent: Code, shared: list[int]) -> tuple[list[float], list[int]]:
    """How far the incumbent's scores moved since then, by seed, and the seeds that it has not repeated since."""
    changes, missing = [], []
    for seed in shared:
        runs = [(run.at > since, run.value - fit.slope * run.x) for run in incumbent.runs if run.seed == seed]
        before, after = ([value for later, value in runs if later is side] for side in (False, True))
        if before and after:
            changes.append(fmean(after) - fmean(before))
        elif before:
            missing.append(seed)
    return changes, missing


def bounds(pairs: float, df: float) -> tuple[float, float]:
    """Bounds of t with the information of `pairs` pairs of runs: discard below the first, keep above the second.

    The log-likelihood ratio of a gain of GAIN pair sds against none is GAIN * sqrt(pairs) * t - GAIN^2 * pairs / 2."""
    scale = GAIN * sqrt(pairs)
    return max(DISCARD / scale + scale / 2, -WORSE), min(SURE, student(max(LEAST, KEEP / scale + scale / 2), df))


class Fit:
    """The posterior of the model over the runs of `codes`, each with at least one run. The noise of pairs is estimated
    from those close to `about`; the runs of others weigh less, by the square of their distance."""

    def __init__(self, codes: Sequence[Code], about: Code):
        by_code = [code.by_seed for code in codes]
        runs = [run for runs in by_code for run in runs]
        self.codes = {code.id: i for i, code in enumerate(codes)}
        self.seeds = {seed: len(codes) + i for i, seed in enumerate(sorted({run.seed for run in runs}))}
        owner = np.repeat(np.arange(len(codes)), [len(runs) for runs in by_code])
        design = np.zeros((len(runs), len(codes) + len(self.seeds) + 1))
        design[np.arange(len(runs)), owner] = 1
        design[np.arange(len(runs)), [self.seeds[run.seed] for run in runs]] = 1
        design[:, -1] = [run.x for run in runs]
        values = np.array([run.value for run in runs])
        self.scale, self.x = float(values.mean()), max((r for code in codes for r in code.runs), key=lambda r: r.at).x
        values -= self.scale
        # Repeats of the same code and seed at another pace tell the slope alone, and that almost without noise.
        within = [(run.x - mean.x, run.value - mean.value) for code in codes for run, mean in code.repeats]
        self.steep = sum(x * x for x, _ in within), sum(x * value for x, value in within)
        self.variance, self.seed_sd, self.df = (PAIR * self.scale) ** 2 / 2, SEED * self.scale, PRIOR_DF
        self.weights = np.ones(len(runs))
        for _ in range(2):
            self._solve(design, values, [])
            effects = np.abs(self.mean[: len(codes)] - self.mean[self.codes[about.id]])[owner]
            self.weights = (SMALL * self.scale / np.maximum(effects, SMALL * self.scale)) ** 2
        self._estimate_noise(design, values)
        kept = [(self.codes[code.id], self.codes[code.parent]) for code in codes if code.parent in self.codes]
        self._solve(design, values, kept)

    @property
    def sigma(self) -> float:
        return sqrt(self.seed_sd**2 + self.variance)

    @property
    def slope(self) -> float:
        """Of val_bpb on the logarithm of the pace."""
        return float(self.mean[-1])

    @property
    def pair(self) -> float:
        return sqrt(2 * self.variance)

    def _solve(self, design: np.ndarray, values: np.ndarray, kept: list[tuple[int, int]]) -> None:
        """Set `mean` and `cov` of codes, seeds and slope, in this order."""
        slope, slope_sd = SLOPE * self.scale, SLOPE_SD * self.scale
        prior = np.full(design.shape[1], FLAT)
        prior[len(self.codes) : -1] = self.seed_sd**-2
        prior[-1] = slope_sd**-2
        weighted = design.T * (self.weights / self.variance)
        precision = weighted @ design + np.diag(prior)
        precision[-1, -1] += self.steep[0] / (REPEAT * self.scale) ** 2
        for i, j in kept:
            weight = max(KEPT * self.scale, abs(self.mean[i] - self.mean[j])) ** -2
            precision[[i, j], [i, j]] += weight
            precision[[i, j], [j, i]] -= weight
        pull = weighted @ values
        pull[-1] += slope / slope_sd**2 + self.steep[1] / (REPEAT * self.scale) ** 2
        self.cov = np.linalg.inv(precision)
        self.mean = self.cov @ pull

    def _estimate_noise(self, design: np.ndarray, values: np.ndarray) -> None:
        """Variances of runs and seeds from the residuals; a residual's degrees of freedom are 1 - its leverage."""
        codes, close = len(self.codes), self.weights == 1
        free = (1 - ((design @ self.cov) * design).sum(1) / self.variance)[close].sum()
        squares = ((values - design @ self.mean)[close] ** 2).sum()
        seeds = self.mean[codes:-1]
        self.seed_sd = spread(self.seed_sd, float(((seeds - seeds.mean()) ** 2).sum()), len(seeds) - 1)
        self.variance = spread(sqrt(self.variance), float(squares), float(free)) ** 2
        self.df += float(free)

    def _difference(self, one: int, other: int) -> tuple[float, float]:
        """(mean, variance) of the difference of two codes, by index."""
        cov = self.cov
        return float(self.mean[one] - self.mean[other]), float(cov[one, one] + cov[other, other] - 2 * cov[one, other])

    def difference(self, one: Code, other: Code) -> tuple[float, float]:
        """(mean, standard error) of one code minus the other."""
        mean, variance = self._difference(self.codes[one.id], self.codes[other.id])
        doubt = 0.0 if one.work == other.work else hypot(one.doubt, other.doubt)
        return mean, hypot(sqrt(variance), self.slope * doubt)

    def next_run(self, candidate: Code, incumbent: Code, new_seed: int, remeasure: bool) -> tuple[Who, int] | None:
        """(who, seed) of the run that reduces the error most, at the pace of the last run. None if there is none.

        A new seed takes two runs and counts half; the incumbent starts, since later comparisons use its run too. A
        repeat of one of its seeds, once for each, tells the slope if the pace is another."""
        mine, its = self.codes[candidate.id], self.codes[incumbent.id]
        variance, link = self._difference(mine, its)[1], self.cov[mine] - self.cov[its]
        options: dict[tuple[Who, int], float] = {}
        for who, place, seeds in (
            ("candidate", mine, incumbent.seeds - candidate.seeds),
            ("incumbent", its, candidate.seeds - incumbent.seeds if remeasure else ()),
        ):
            for seed in sorted(seeds):
                at, weights = [place, self.seeds[seed], -1], np.array([1, 1, self.x])
                options[who, seed] = (link[at] @ weights) ** 2 / (
                    self.variance + weights @ self.cov[np.ix_(at, at)] @ weights
                )
        times = Counter(run.seed for run in incumbent.runs)
        for run in incumbent.runs if remeasure and incumbent.exact else ():
            if times[run.seed] > 1:
                continue
            x = self.x - run.x
            noise = 2 * (REPEAT * self.scale) ** 2 + x * x * self.cov[-1, -1]
            options["incumbent", run.seed] = (x * link[-1]) ** 2 / noise
        if remeasure:
            options["incumbent", new_seed] = variance**2 / (variance + 2 * self.variance) / 2
        return max(options, key=options.get, default=None)


def spread(prior: float, squares: float, df: float) -> float:
    """The most likely standard deviation, given `squares` with `df` degrees of freedom and a log-normal prior."""
    steps = np.linspace(-4, 4, 161)  # of the logarithm
    cost = df * steps + squares / (2 * prior**2) * np.exp(-2 * steps) + steps**2 / (2 * DOUBT**2)
    return prior * exp(steps[cost.argmin()])


def student(z: float, df: float) -> float:
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


def _count(runs: int) -> str:
    return f"{runs} run{'s' * (runs > 1)}"
