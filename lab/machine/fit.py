"""What fits this machine: measured speed and memory of real training steps, and the size that five minutes pay for.

    batch       of a few rows per pass and dtypes, the fastest whose peak stays below MEMORY_SHARE of the memory; never
                float16, in which the gradients of unlikely tokens are 0 unless the loss is scaled
    processes   two on a CPU, where they are faster than one; asked again once the size is known
    size        the depth and width for which the scaling rule predicts the lowest val_bpb from the tokens that the
                budget buys at the measured speed

Every candidate is train.py itself for STEPS steps in a process of its own, so one that dies costs nothing but its name
in the reasons. A larger batch is tried only when the growth seen so far says that it stays in bounds. The preset's tier
is where the search starts, and stands unless another candidate is better by more than the noise of so short a
measurement. The result is cached by chip, memory, versions, preset and budget, until the machine turns out to be faster
than it was then: what other programs or heat took from one measurement is not kept. Not run on a Mac.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lab.files import ROOT, cache_root, write_atomic
from lab.machine import hardware
from lab.preset import DTYPES, Batch, Preset, to_dict

MEMORY_SHARE = 0.5  # of the machine's memory that a training may take
STEPS = 12  # of a candidate; the first two are not counted
SECONDS = 240.0  # after which a candidate is given up: on Metal the first step compiles
FASTER = 1.05  # a batch must be faster by this factor to replace the one before it
TAKEN = 0.2  # of the processors, by other programs: worth a line
OUTGROWN = 1.25  # times as fast as when it was fitted: the machine was busy or hot then
BETTER = 0.005  # relative: a size must be predicted to be this much better than the tier's
DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12)
WIDTHS = (0.5, 2.0)  # of the tier's, the narrowest and the widest that are considered
TRIED = 2  # sizes that are measured besides, the most promising ones

# bpb = FLOOR + A / N^ALPHA + B / D^BETA, with N parameters of the blocks' matrices and D training tokens: least squares
# over the 25 runs of docs/scaling.csv (benchmarks/sweep.py) with the tier's batch and rate, TinyStories, a vocabulary
# of 2,048, 0.3 to 2.5M tokens. The residuals have a root mean square of 0.010 bpb.
FLOOR, A, ALPHA, B, BETA = 0.45, 3.739, 0.20, 3347.0, 0.70
RULE_HOLDS_FOR = "tinystories"  # other texts have another floor: there it only compares sizes

Log = Callable[[str], None]


def predicted_bpb(parameters: float, tokens: float) -> float:
    """The scaling rule, for TinyStories; its minimum over sizes is used for every text."""
    return FLOOR + A / parameters**ALPHA + B / tokens**BETA


def block_parameters(depth: int, width: int) -> float:
    """Of the matrices of the blocks: four of attention, two of the MLP."""
    return 12.0 * depth * width**2


@dataclass(frozen=True)
class Measured:
    """One candidate as it trained."""

    preset: Preset
    tokens_per_second: float
    peak_memory_mb: float

    @property
    def bpb(self) -> float:
        """Predicted after the preset's budget."""
        return bpb(self.preset, self.tokens_per_second)

    def __str__(self) -> str:
        return f"{named(self.preset)}: {self.tokens_per_second:,.0f} tokens/s, {self.peak_memory_mb:,.0f} MB"


def named(preset: Preset) -> str:
    """What fitting may change, in words."""
    model, batch = preset.model, preset.batch
    processes = f", {batch.processes} processes" if batch.processes > 1 else ""
    return f"depth {model.depth}, width {model.width}, {model.dtype}, {batch.rows} rows a pass{processes}"


@dataclass
class Fitting:
    """One search for what fits. `measure(preset)` trains a candidate; None is one that failed."""

    memory_mb: float  # that a training may take
    measure: Callable[[Preset], Measured | None]
    log: Log

    def batch(self, start: Measured, dtypes: Iterable[str]) -> Measured:
        """The fastest dtype and rows per pass, one after the other."""
        best = start
        for dtype in dtypes:
            best = self._faster(best, with_model(best.preset, dtype=dtype))
        best = self._rows(best, 0.5)
        return self._rows(best, 2) if best.preset.batch.rows >= start.preset.batch.rows else best

    def processes(self, start: Measured, count: int) -> Measured:
        """That many processes, which share the rows of a pass, if they are faster at this size."""
        rows = max(1, start.preset.batch.rows * start.preset.batch.processes // count)
        return self._faster(start, _with_batch(start.preset, rows=rows, processes=count))

    def _rows(self, best: Measured, factor: float) -> Measured:
        """Change the rows per pass by this factor for as long as that is faster and stays within the memory."""
        growth = best.peak_memory_mb  # at most this much more for twice the rows
        while True:
            candidate = _with_batch(best.preset, rows=int(best.preset.batch.rows * factor))
            if factor > 1 and best.peak_memory_mb + growth > self.memory_mb:
                self.log(f"  {named(candidate)}: not tried, could take {best.peak_memory_mb + growth:,.0f} MB")
                return best
            found = self._faster(best, candidate)
            if found is best:
                return best
            best, growth = found, max(found.peak_memory_mb - best.peak_memory_mb, 0) * 2 or growth

    def _faster(self, best: Measured, candidate: Preset) -> Measured:
        if candidate == best.preset or not possible(candidate):
            return best
        found = self.tried(candidate)
        return found if found and found.tokens_per_second > FASTER * best.tokens_per_second else best

    def tried(self, candidate: Preset) -> Measured | None:
        found = self.measure(candidate)
        if found and found.peak_memory_mb > self.memory_mb:
            self.log(f"  {found}: over the bound of {self.memory_mb:,.0f} MB")
            return None
        self.log(f"  {found or f'{named(candidate)}: failed'}")
        return found

    def size(self, start: Measured) -> Measured:
        """The size with the lowest predicted val_bpb: the start, two that show what layers and width cost, and the
        TRIED most promising ones by that."""
        model = start.preset.model
        shallow = with_model(start.preset, depth=max(1, model.depth // 2))
        wide = with_model(start.preset, width=model.width + model.head_dim)
        found = [start] + [one for size in (shallow, wide) if self._fits(start, size) and (one := self.tried(size))]
        cost = token_seconds(found)
        for size in sorted(self._sizes(start), key=lambda size: bpb(size, 1 / cost(size)))[:TRIED]:
            if all(size != one.preset for one in found) and (one := self.tried(size)):
                found.append(one)
        best = min(found, key=lambda one: one.bpb)
        return best if best.bpb < (1 - BETTER) * start.bpb else start

    def _sizes(self, start: Measured) -> list[Preset]:
        step = start.preset.model.head_dim
        low, high = (int(bound * start.preset.model.width) for bound in WIDTHS)
        widths = range(max(step, low - low % step), high + 1, step)
        sizes = [with_model(start.preset, depth=depth, width=width) for depth in DEPTHS for width in widths]
        return [size for size in sizes if self._fits(start, size)]

    def _fits(self, start: Measured, size: Preset) -> bool:
        """Whether it stays within the memory if that grows with the operations of a token."""
        return operations(size) * start.peak_memory_mb <= self.memory_mb * operations(start.preset)


def bpb(preset: Preset, tokens_per_second: float) -> float:
    """Predicted after the preset's budget at this speed."""
    parameters = block_parameters(preset.model.depth, preset.model.width)
    return predicted_bpb(parameters, tokens_per_second * preset.task.minutes * 60)


def token_seconds(measured: list[Measured]) -> Callable[[Preset], float]:
    """Seconds of a token of any size: so many for an operation, so many for a layer whatever its width. Relative least
    squares; where that makes one of them negative, operations alone."""
    seconds = np.array([1 / one.tokens_per_second for one in measured])
    terms = np.array([(operations(one.preset), one.preset.model.depth) for one in measured])
    each, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)
    if min(each) < 0 or len(measured) < 2:
        each = np.array([np.mean(seconds / terms[:, 0]), 0.0])
    return lambda preset: float(each @ (operations(preset), preset.model.depth))


def operations(preset: Preset) -> float:
    """FLOPs of a training token: 6 per parameter of a product, 12 per channel and position of the context, as if no
    layer had a window."""
    model, context = preset.model, preset.task.sequence_length
    products = block_parameters(model.depth, model.width) + preset.tokenizer.vocab_size * model.width
    return 6 * products + 12 * model.width * context * model.depth


def with_model(preset: Preset, **changes: Any) -> Preset:
    return replace(preset, model=replace(preset.model, **changes))


def _with_batch(preset: Preset, **changes: int) -> Preset:
    return replace(preset, batch=replace(preset.batch, **changes))


def possible(preset: Preset) -> bool:
    """Whether a step can be shared out in these rows and processes."""
    batch = preset.batch
    together = batch.rows * preset.task.sequence_length * batch.processes
    return batch.rows > 0 and batch.tokens_per_step % together == 0


def train_shortly(preset: Preset, prepared: Path) -> Measured | None:
    """STEPS steps of train.py with this preset; None when it fails or takes SECONDS."""
    with tempfile.TemporaryDirectory(prefix="fit-") as folder:
        settings, run = Path(folder, "settings.json"), Path(folder, "run")
        settings.write_text(
            json.dumps({"preset": to_dict(preset), "prepared": str(prepared), "tier": ""}), encoding="utf-8"
        )
        command = [sys.executable, str(ROOT / "train.py"), "--steps", str(STEPS), "--no-score", "--run-dir", str(run)]
        env = os.environ | {"AUTORESEARCH_SETTINGS": str(settings)}
        try:
            subprocess.run(command, env=env, capture_output=True, timeout=SECONDS, check=True)
            steps = [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
            record = json.loads((run / "train.json").read_text(encoding="utf-8"))
        except (OSError, subprocess.SubprocessError, ValueError):
            return None
    return Measured(preset, speed(steps[2:], preset.batch), record["peak_memory_mb"])


def speed(steps: list[dict[str, Any]], batch: Batch) -> float:
    """Tokens per second over a budget, from a few of its steps: medians, of usual and of doubled ones for the shares of
    the budget that they have."""
    seconds: dict[int, list[float]] = {}
    for before, after in pairwise(steps):
        seconds.setdefault(after["tokens"] - before["tokens"], []).append(after["seconds"] - before["seconds"])
    usual, *doubled = (tokens / median(each) for tokens, each in sorted(seconds.items()))
    return batch.doubling * usual + (1 - batch.doubling) * doubled[0] if doubled else usual


def fit(preset: Preset, prepared: Path, log: Log) -> dict[str, Any] | None:
    """Search for what fits this machine and cache it, with every candidate's figures. `preset` is adapted by its tier.
    None when that itself fails."""
    why: list[str] = []

    def tell(line: str) -> None:
        why.append(line.strip())
        log(line)

    facts = hardware.describe()
    on_metal = facts["backend"] == "metal"
    bound = MEMORY_SHARE * facts["memory_gb"] * 1024
    dtypes = DTYPES if on_metal else ("float32",)
    peaks = {dtype: hardware.matmul_peak(dtype) / 1e12 for dtype in dtypes}
    told = ", ".join(f"{dtype} {peak:.2f} TFLOP/s" for dtype, peak in peaks.items())
    tell(f"fitting {preset.name} to {facts['chip']}: matmul {told}; at most {bound:,.0f} MB")
    if (taken := hardware.taken()) > TAKEN:
        tell(f"  other programs take {100 * taken:.0f} % of the processors; this is for what they leave")
    search = Fitting(bound, lambda candidate: train_shortly(candidate, prepared), tell)
    if (start := search.tried(preset)) is None:
        log("  the tier's own setting fails: nothing is fitted")
        return None
    best = search.batch(start, [dtype for dtype in dtypes if dtype != "float16"])
    if several := not on_metal and facts["cpu_cores"] > 1:
        best = search.processes(best, 2)
    best = search.size(best)
    if several:
        best = search.processes(best, 1 if best.preset.batch.processes > 1 else 2)
    rule = (
        f"predicted val_bpb {best.bpb:.3f} by the rule of TinyStories"
        if preset.name == RULE_HOLDS_FOR
        else f"sized by what {RULE_HOLDS_FOR} needs"
    )
    tell(f"chosen: {best}, {rule}")
    result = {
        "key": key(preset),
        "model": {name: getattr(best.preset.model, name) for name in ("depth", "width", "dtype")},
        "batch": {name: getattr(best.preset.batch, name) for name in ("rows", "processes")},
        "tokens_per_second": best.tokens_per_second,
        "peak_memory_mb": best.peak_memory_mb,
        "memory_bound_mb": bound,
        "predicted_bpb": best.bpb,
        "matmul_flops": min(peaks["float32"] * 1e12, hardware.matmul_peak("float32")),  # it may have become busy
        "why": why,
    }
    _path(preset).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_path(preset), json.dumps(result, indent=1))
    return result


def key(preset: Preset) -> dict[str, Any]:
    """What a fit depends on: the machine, MLX, this module, and all of the preset that costs time or memory."""
    facts = hardware.describe()
    parts = {name: facts[name] for name in ("chip", "memory_gb", "cpu_cores", "gpu_cores", "backend")}
    parts |= {name: to_dict(preset)[name] for name in ("tokenizer", "task", "model", "batch")}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return parts | {"mlx": importlib.metadata.version("mlx"), "code": code[:16]}


def times_as_fast(found: dict[str, Any]) -> float:
    """The machine now, beside what it was when this was fitted. Takes a fraction of a second."""
    return hardware.matmul_peak("float32") / found["matmul_flops"]


def most_rows(found: dict[str, Any]) -> int:
    """Rows per pass that stay within the bound, if all of the memory grows with them."""
    rows = found["batch"]["rows"]
    return max(rows, int(rows * found["memory_bound_mb"] / found["peak_memory_mb"]))


def _path(preset: Preset) -> Path:
    digest = hashlib.sha256(json.dumps(key(preset), sort_keys=True).encode()).hexdigest()
    return cache_root() / "fit" / f"{preset.name}-{digest[:12]}.json"


def fitted(preset: Preset, prepared: Path, wanted: bool | None, log: Log) -> tuple[Preset, dict[str, Any] | None]:
    """`preset` with what fits this machine, and the record of it; as it is, and None, if `wanted` is False or even that
    setting fails. None measures when nothing is cached or the machine has become faster, True measures anew."""
    if wanted is False:
        return preset, None
    found = None if wanted else _cached(preset)
    if found and (times := times_as_fast(found)) > OUTGROWN:
        log(f"this machine is {times:.1f} times as fast as when it was fitted: measuring again")
        found = None
    found = found or fit(preset, prepared, log)
    if found is None:
        return preset, None
    model, batch = replace(preset.model, **found["model"]), replace(preset.batch, **found["batch"])
    return replace(preset, model=model, batch=batch), found


def _cached(preset: Preset) -> dict[str, Any] | None:
    try:
        return json.loads(_path(preset).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
