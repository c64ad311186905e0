"""Fit a preset to this machine: measure speed and memory of real training steps, then choose the model's size.

    batch       rows per pass and dtype: the fastest with a peak below `training_memory_mb`; never float16, in
                which the gradients of unlikely tokens are 0 unless the loss is scaled
    processes   two on a CPU if they are faster than one; checked again once the size is known
    size        the depth and width with the lowest val_bpb that the scaling rule predicts for the number of tokens
                that the budget allows at the measured speed

Every candidate runs train.py for STEPS steps in its own process, so a crash only excludes that candidate. A larger
batch is measured only if the memory growth so far says that it fits. The search starts from the preset's tier and
leaves it only for a gain beyond the noise of such short measurements. The result is cached by chip, memory, versions,
preset and budget, and measured again once the machine is faster than it was: a busy or hot machine is no lasting
property. Memory and cores are those that a container's limits leave. Not run on a GPU.
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

STEPS = 12  # per candidate; the first two are not counted
SECONDS = 240.0  # timeout of a candidate: on a GPU the first step compiles
FASTER = 1.05  # a batch must be faster by this factor to replace the one before it
BUSY = 0.2  # share of the CPU used by other programs that is reported
OUTGROWN = 1.25  # speed relative to that of the fit: the machine was busy or hot then
BETTER = 0.005  # relative gain that must be predicted for a size to replace the tier's
DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12)
WIDTHS = (0.5, 2.0)  # range, relative to the tier's width
PROMISING = 2  # sizes with the best predictions that are measured too

# bpb = FLOOR + A / N^ALPHA + B / D^BETA, with N parameters of the blocks' matrices and D training tokens: least squares
# over the 25 runs of docs/scaling.csv (benchmarks/sweep.py) with the tier's batch and rate, TinyStories, a vocabulary
# of 2,048, 0.3 to 2.5M tokens. The residuals have a root mean square of 0.010 bpb.
FLOOR, A, ALPHA, B, BETA = 0.45, 3.739, 0.20, 3347.0, 0.70
RULE_HOLDS_FOR = "tinystories"  # other texts have another floor; for them the rule only ranks sizes

Log = Callable[[str], None]


def predicted_bpb(parameters: float, tokens: float) -> float:
    """The scaling rule of TinyStories; its minimum over sizes is used for every text."""
    return FLOOR + A / parameters**ALPHA + B / tokens**BETA


def block_parameters(depth: int, width: int) -> float:
    """Number of parameters in the blocks' matrices: four of attention, two of the MLP."""
    return 12.0 * depth * width**2


@dataclass(frozen=True)
class Measured:
    """Speed and memory of one candidate."""

    preset: Preset
    tokens_per_second: float
    peak_memory_mb: float

    @property
    def bpb(self) -> float:
        """Predicted val_bpb at the end of the preset's budget."""
        return bpb(self.preset, self.tokens_per_second)

    def __str__(self) -> str:
        return f"{named(self.preset)}: {self.tokens_per_second:,.0f} tokens/s, {self.peak_memory_mb:,.0f} MB"


def named(preset: Preset) -> str:
    """The settings that fitting may change, as text."""
    model, batch = preset.model, preset.batch
    processes = f", {batch.processes} processes" if batch.processes > 1 else ""
    return f"depth {model.depth}, width {model.width}, {model.dtype}, {batch.rows} rows a pass{processes}"


@dataclass
class Fitting:
    """One search. `measure(preset)` trains a candidate and returns None if it failed."""

    memory_mb: float  # limit for a training
    measure: Callable[[Preset], Measured | None]
    log: Log

    def batch(self, start: Measured, dtypes: Iterable[str]) -> Measured:
        """Choose the fastest dtype, then the fastest number of rows per pass."""
        best = start
        for dtype in dtypes:
            best = self._faster(best, with_model(best.preset, dtype=dtype))
        best = self._rows(best, 0.5)
        return self._rows(best, 2) if best.preset.batch.rows >= start.preset.batch.rows else best

    def processes(self, start: Measured, count: int) -> Measured:
        """Use `count` processes, which share the rows of a pass, if that is faster."""
        rows = max(1, start.preset.batch.rows * start.preset.batch.processes // count)
        return self._faster(start, _with_batch(start.preset, rows=rows, processes=count))

    def _rows(self, best: Measured, factor: float) -> Measured:
        """Multiply the rows per pass by `factor` as long as that is faster and fits the memory."""
        growth = best.peak_memory_mb  # at most this much more for twice the rows
        while True:
            candidate = _with_batch(best.preset, rows=int(best.preset.batch.rows * factor))
            if factor > 1 and best.peak_memory_mb + growth > self.memory_mb:
                self.log(f"  {named(candidate)}: skipped, could take {best.peak_memory_mb + growth:,.0f} MB")
                return best
            faster = self._faster(best, candidate)
            if faster is best:
                return best
            best, growth = faster, max(faster.peak_memory_mb - best.peak_memory_mb, 0) * 2 or growth

    def _faster(self, best: Measured, candidate: Preset) -> Measured:
        if candidate == best.preset or not possible(candidate):
            return best
        measured = self.attempt(candidate)
        return measured if measured and measured.tokens_per_second > FASTER * best.tokens_per_second else best

    def attempt(self, candidate: Preset) -> Measured | None:
        """Measure a candidate and log it. None if it failed or exceeds the memory limit."""
        measured = self.measure(candidate)
        if measured and measured.peak_memory_mb > self.memory_mb:
            self.log(f"  {measured}: exceeds the limit of {self.memory_mb:,.0f} MB")
            return None
        self.log(f"  {measured or f'{named(candidate)}: failed'}")
        return measured

    def size(self, start: Measured) -> Measured:
        """Choose the size with the lowest predicted val_bpb among the start, two sizes that show the cost of layers
        and width, and the PROMISING best predictions based on these."""
        model = start.preset.model
        shallow = with_model(start.preset, depth=max(1, model.depth // 2))
        wide = with_model(start.preset, width=model.width + model.head_dim)
        sizes = [start] + [one for size in (shallow, wide) if self._fits(start, size) and (one := self.attempt(size))]
        cost = token_seconds(sizes)
        for size in sorted(self._sizes(start), key=lambda size: bpb(size, 1 / cost(size)))[:PROMISING]:
            if all(size != one.preset for one in sizes) and (one := self.attempt(size)):
                sizes.append(one)
        best = min(sizes, key=lambda one: one.bpb)
        return best if best.bpb < (1 - BETTER) * start.bpb else start

    def _sizes(self, start: Measured) -> list[Preset]:
        step = start.preset.model.head_dim
        low, high = (int(bound * start.preset.model.width) for bound in WIDTHS)
        widths = range(max(step, low - low % step), high + 1, step)
        sizes = [with_model(start.preset, depth=depth, width=width) for depth in DEPTHS for width in widths]
        return [size for size in sizes if self._fits(start, size)]

    def _fits(self, start: Measured, size: Preset) -> bool:
        """Whether it fits the memory if memory grows with the operations per token."""
        return operations(size) * start.peak_memory_mb <= self.memory_mb * operations(start.preset)


def bpb(preset: Preset, tokens_per_second: float) -> float:
    """Predicted val_bpb at the end of the preset's budget at this speed."""
    parameters = block_parameters(preset.model.depth, preset.model.width)
    return predicted_bpb(parameters, tokens_per_second * preset.task.minutes * 60)


def token_seconds(measured: list[Measured]) -> Callable[[Preset], float]:
    """Returns a function that estimates seconds per token for any size, from a cost per operation and a cost per layer:
    relative least squares, or the operations alone where a cost would be negative."""
    seconds = np.array([1 / one.tokens_per_second for one in measured])
    terms = np.array([(operations(one.preset), one.preset.model.depth) for one in measured])
    each, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)
    if min(each) < 0 or len(measured) < 2:
        each = np.array([np.mean(seconds / terms[:, 0]), 0.0])
    return lambda preset: float(each @ (operations(preset), preset.model.depth))


def operations(preset: Preset) -> float:
    """FLOPs per training token: 6 per parameter of a matrix product, 12 per channel and position of the context,
    ignoring attention windows."""
    model, context = preset.model, preset.task.sequence_length
    products = block_parameters(model.depth, model.width) + preset.tokenizer.vocab_size * model.width
    return 6 * products + 12 * model.width * context * model.depth


def with_model(preset: Preset, **changes: Any) -> Preset:
    return replace(preset, model=replace(preset.model, **changes))


def _with_batch(preset: Preset, **changes: int) -> Preset:
    return replace(preset, batch=replace(preset.batch, **changes))


def possible(preset: Preset) -> bool:
    """Whether these rows and processes divide the tokens of a step."""
    batch = preset.batch
    together = batch.rows * preset.task.sequence_length * batch.processes
    return batch.rows > 0 and batch.tokens_per_step % together == 0


def train_shortly(preset: Preset, prepared: Path) -> Measured | None:
    """Run STEPS steps of train.py with this preset. None if that fails or takes longer than SECONDS."""
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
    """Tokens per second over a budget, estimated from a few steps: medians of usual and of doubled steps, weighted by
    their shares of the budget."""
    seconds: dict[int, list[float]] = {}
    for before, after in pairwise(steps):
        seconds.setdefault(after["tokens"] - before["tokens"], []).append(after["seconds"] - before["seconds"])
    usual, *doubled = (tokens / median(each) for tokens, each in sorted(seconds.items()))
    return batch.doubling * usual + (1 - batch.doubling) * doubled[0] if doubled else usual


def fit(preset: Preset, prepared: Path, log: Log) -> dict[str, Any] | None:
    """Find the settings that fit this machine and cache them with the figures of every candidate. `preset` is already
    adapted by its tier. None if even that preset fails."""
    why: list[str] = []

    def note(line: str) -> None:
        why.append(line.strip())
        log(line)

    facts = hardware.describe()
    on_gpu = facts["backend"] != "cpu"
    bound = hardware.training_memory_mb()
    dtypes = DTYPES if on_gpu else ("float32",)
    peaks = {dtype: hardware.matmul_peak(dtype) / 1e12 for dtype in dtypes}
    speeds = ", ".join(f"{dtype} {peak:.2f} TFLOP/s" for dtype, peak in peaks.items())
    note(f"fitting {preset.name} to {facts['chip']}: matmul {speeds}; memory limit {bound:,.0f} MB")
    if (taken := hardware.taken()) > BUSY:
        note(f"  other programs use {100 * taken:.0f} % of the CPU; the fit is for the rest")
    search = Fitting(bound, lambda candidate: train_shortly(candidate, prepared), note)
    if (start := search.attempt(preset)) is None:
        log("  training with the tier's own settings fails; they are used without a fit")
        return None
    best = search.batch(start, [dtype for dtype in dtypes if dtype != "float16"])
    if several := not on_gpu and facts["cpu_cores"] > 1:
        best = search.processes(best, 2)
    best = search.size(best)
    if several:
        best = search.processes(best, 1 if best.preset.batch.processes > 1 else 2)
    rule = (
        f"predicted val_bpb {best.bpb:.3f} (scaling rule of TinyStories)"
        if preset.name == RULE_HOLDS_FOR
        else f"sized by the scaling rule of {RULE_HOLDS_FOR}"
    )
    note(f"chosen: {best}, {rule}")
    result = {
        "key": key(preset),
        "model": {name: getattr(best.preset.model, name) for name in ("depth", "width", "dtype")},
        "batch": {name: getattr(best.preset.batch, name) for name in ("rows", "processes")},
        "tokens_per_second": best.tokens_per_second,
        "peak_memory_mb": best.peak_memory_mb,
        "memory_bound_mb": bound,
        "predicted_bpb": best.bpb,
        "matmul_flops": min(peaks["float32"] * 1e12, hardware.matmul_peak("float32")),  # it may be busy by now
        "why": why,
    }
    _path(preset).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_path(preset), json.dumps(result, indent=1))
    return result


def key(preset: Preset) -> dict[str, Any]:
    """What a fit depends on: the machine, MLX, this module, and all of the preset that affects speed or memory."""
    facts = hardware.describe()
    parts = {name: facts[name] for name in ("chip", "memory_gb", "cpu_cores", "gpu_cores", "gpu_memory_gb", "backend")}
    parts |= {name: to_dict(preset)[name] for name in ("tokenizer", "task", "model", "batch")}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return parts | {"mlx": importlib.metadata.version("mlx"), "code": code[:16]}


def times_as_fast(record: dict[str, Any]) -> float:
    """Speed of the machine now relative to that of the fit. Takes a fraction of a second."""
    return hardware.matmul_peak("float32") / record["matmul_flops"]


def most_rows(record: dict[str, Any]) -> int:
    """Rows per pass that fit the memory limit if all memory grows with them."""
    rows = record["batch"]["rows"]
    return max(rows, int(rows * record["memory_bound_mb"] / record["peak_memory_mb"]))


def _path(preset: Preset) -> Path:
    digest = hashlib.sha256(json.dumps(key(preset), sort_keys=True).encode()).hexdigest()
    return cache_root() / "fit" / f"{preset.name}-{digest[:12]}.json"


def fitted(preset: Preset, prepared: Path, wanted: bool | None, log: Log) -> tuple[Preset, dict[str, Any] | None]:
    """Returns the preset with the settings that fit this machine, and the record of the fit; the preset unchanged and
    None if `wanted` is False or its own settings fail. None measures if no fit is cached or the machine has become
    faster; True always measures."""
    if wanted is False:
        return preset, None
    record = None if wanted else _cached(preset)
    if record and (times := times_as_fast(record)) > OUTGROWN:
        log(f"this machine is {times:.1f} times as fast as when it was fitted; measuring again")
        record = None
    record = record or fit(preset, prepared, log)
    if record is None:
        return preset, None
    model, batch = replace(preset.model, **record["model"]), replace(preset.batch, **record["batch"])
    return replace(preset, model=model, batch=batch), record


def _cached(preset: Preset) -> dict[str, Any] | None:
    try:
        return json.loads(_path(preset).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
