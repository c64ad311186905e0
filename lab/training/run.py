"""One training run: its directory, seed, clock and records, all outside the experiment.

`execute(experiment)` is what `python train.py` calls. It reads the flags, opens the prepared data, creates the run
directory with settings and source, calls `experiment(run)`, which trains and returns the model, writes the checkpoint
and the training record, and then scores the checkpoint in a separate process. Exit status: 0 with a val_bpb, 1 for a
diverged, crashed or rejected run, 2 for a wrong command line, 130 for Ctrl-C.
"""

import errno
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from lab.data.batches import Batches
from lab.data.shards import open_prepared
from lab.errors import INTERRUPTED, UserError, printable
from lab.files import ROOT, cache_root, register, sealed, sha256, without_places, write_atomic
from lab.machine import hardware
from lab.machine.fit import OUTGROWN, RULE_HOLDS_FOR, most_rows
from lab.preset import from_dict, load, read_record, to_dict
from lab.show import (
    MINUTES,
    NORMAL,
    QUIET,
    SEED,
    VERBOSE,
    NewFolder,
    Reading,
    Training,
    examples,
    outlast_reader,
    verbosity_options,
    working,
)
from lab.training import parallel
from lab.training.clock import Clock
from lab.trial.sandbox import bound

DEFAULT_PRESET = "tinystories"
SMOOTHING = 0.9  # of the displayed loss


def current_path() -> Path:
    """The record of what was prepared last: what `python train.py` trains on."""
    return cache_root() / "current.json"


def recorded() -> dict[str, Any] | None:
    """Settings of this process: $AUTORESEARCH_SETTINGS if set, else what was prepared last, None without either."""
    path = Path(os.environ.get("AUTORESEARCH_SETTINGS") or current_path())
    return read_record(path, "`make prepare` writes a new one") if path.is_file() else None


@cache
def settings() -> SimpleNamespace:
    """SETTINGS of train.py: the preset, adapted to this machine when it was prepared."""
    record = recorded()
    return SimpleNamespace(**(from_dict(record["preset"]) if record else load(DEFAULT_PRESET)).settings())


class Run:
    """What an experiment gets: `vocab_size`, `seed`, `clock`, `batches`. It must call `begin` and `record`.

    Each of `processes` ranks has one; only rank 0, which `leads`, prints and writes."""

    def __init__(self, directory: Path, record: dict[str, Any], source: Path, started: float, verbosity: int = NORMAL):
        self.directory, self.record_settings, self.started = directory, record, started
        self.verbosity = verbosity
        self.preset = from_dict(record["preset"])
        self.seed = record["seed"]
        self.prepared = open_prepared(Path(record["prepared"]), parts=("train", "tokenizer"))
        self.vocab_size = self.prepared.tokenizer.vocab_size
        self.processes, self.leads = parallel.size(), parallel.rank() == 0
        self.clock = Clock(record["minutes"], record["steps"], parallel.from_rank_0 if self.processes > 1 else None)
        if self.processes > 1:
            self._agree(source)
        self.display = Training(verbosity)
        self.facts: dict[str, Any] = {}
        self.tokens = 0
        self.smooth = 0.0
        if not self.leads:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "train.py").exists() and not (directory / "settings.json").exists():
            raise UserError(f"{directory} has a train.py, but is not a run's folder; choose another --run-dir")
        shutil.copyfile(source, directory / "train.py")
        write_atomic(directory / "settings.json", json.dumps(sealed(record), indent=1))
        stale = ("steps.jsonl", "checkpoint.safetensors", "train.json", "score.json", "result.json")
        for path in [*map(directory.joinpath, stale), *directory.glob(".*.tmp")]:  # of an earlier run in this folder
            path.unlink(missing_ok=True)

    def _agree(self, source: Path) -> None:
        """Raise UserError unless every rank has the same preset, text and source."""
        same = (
            json.dumps(to_dict(self.preset))
            + source.read_text(encoding="utf-8")
            + self.prepared.manifest["val_text_sha256"]
        )
        digest = int(hashlib.sha256(same.encode()).hexdigest()[:6], 16)  # fits a float32
        if parallel.from_rank_0(float(digest)) != digest:
            raise UserError(
                "settings, prepared text or train.py differ from those of rank 0; copy its checkout and its cache here"
            )

    def batches(self, rows: int, tokens_per_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (inputs, targets), each (rows, sequence_length) int32; the same seed gives the same batches.

        Each of n ranks gets every n-th batch. Raises UserError for more rows than fit in memory, and if
        `tokens_per_step` is not a multiple of the tokens in one batch of every rank."""
        tokenizer = self.prepared.tokenizer
        length = self.preset.task.sequence_length
        if (fit := self.record_settings.get("fit")) and rows > (most := most_rows(fit)):
            raise UserError(
                f"{rows} rows per pass may need more than the {fit['memory_bound_mb']:,.0f} MB available for training; "
                f"use at most {most}, or measure this machine again with `make fit`"
            )
        if tokens_per_step % (per_pass := rows * length * self.processes):
            raise UserError(
                f"{tokens_per_step} tokens per step are not a multiple of the {per_pass} per pass ({rows} rows of "
                f"{length} tokens in {self.processes} process{'es' * (self.processes > 1)}); use fewer rows"
            )
        self.data = Batches(self.prepared.train, tokenizer.bos, length, rows, self.seed)
        return islice(self.data, parallel.rank(), None, self.processes)

    def begin(self, model: Any, *, flops_per_token: float, **facts: Any) -> None:
        """Print what will be trained and run the model on one batch of the scorer's size, before the clock starts.

        `facts` are kept in the run's record. Raises whatever the model raises."""
        from lab.machine.backend import mx, tree_flatten
        from lab.scoring.score import batch_rows
        from lab.training.updates import Updates

        length, dtype = self.preset.task.sequence_length, self.preset.model.dtype
        rows = batch_rows(length, self.vocab_size)
        logits = model(mx.zeros((rows, length), mx.int32))
        if logits.shape != (rows, length, self.vocab_size):
            raise UserError(
                f"the logits of build_model's model have shape {logits.shape}; expected (B, T, vocab_size) = "
                f"{(rows, length, self.vocab_size)}"
            )
        mx.eval(logits)
        peak = hardware.matmul_peak(dtype) * self.processes
        mx.reset_peak_memory()  # on a GPU the probe may take more than the training
        if not self.leads:
            return
        parameters = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
        self.updates = Updates(model)
        self.facts = facts | {"num_params": parameters, "matmul_peak": peak, "processes": self.processes}
        self.flops_per_token = flops_per_token
        if self.verbosity > QUIET:
            self._introduce(peak, parameters, facts)
        self.facts["startup_seconds"] = time.perf_counter() - self.started

    def _introduce(self, peak: float, parameters: int, facts: dict[str, Any]) -> None:
        from lab.machine.backend import BLAS, KIND

        dtype, length = self.preset.model.dtype, self.preset.task.sequence_length
        budget = f"{self.clock.steps} steps" if self.clock.steps else f"{self.clock.budget / 60:g} minutes"
        chip = hardware.describe()
        where = f" ({BLAS})" if KIND == "cpu" else ""
        print(
            f"preset {self.preset.name}, vocabulary {self.vocab_size}, context {length}, seed {self.seed}, {budget}\n"
            f"machine {chip['chip']}, {chip['backend']}{where}, tier: {self.record_settings['tier'] or 'none'}"
            f"{', fitted' * bool(self.record_settings.get('fit'))}, "
            f"{dtype} matmul peak {peak / 1e12:.2f} TFLOP/s, {self.processes} process{'es' * (self.processes > 1)}\n"
            f"model {parameters / 1e6:.2f}M parameters, " + ", ".join(f"{k} {v}" for k, v in facts.items()),
            flush=True,
        )
        if KIND == "cuda":
            print("the first step compiles its kernels: minutes at first use, later seconds", flush=True)

    def record(self, step: int, loss: float, tokens: int, **extras: float) -> None:
        """Log a step: `loss` in nats per token, `tokens` it trained on. Raises UserError if the loss diverged."""
        self.tokens += tokens
        if not self.leads:
            return
        elapsed = max(self.clock.elapsed, 1e-9)
        rate = self.tokens / (time.perf_counter() - self.clock.begun)
        entry = {"step": step, "seconds": round(elapsed, 3), "loss": loss, "tokens": self.tokens}
        entry |= {"tokens_per_second": round(rate, 1)} | extras
        with open(self.directory / "steps.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if not loss < 2 * math.log(self.vocab_size) + 1:  # log(V) is the loss of guessing; `not` catches NaN
            raise UserError(f"the run diverged: the loss is {loss:.3g} at step {step}; lower the learning rates")
        self.updates.look(self.clock.progress)
        self.smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        shown = self.smooth / (1 - SMOOTHING ** (step + 1))
        figures = (rate, self._mfu(rate), hardware.peak_memory_mb(), self.data.epoch, self.clock.remaining)
        self.display.show(Reading(step, self.clock.progress, shown, *figures))

    def compared_with_fit(self, result: dict[str, Any]) -> list[str]:
        """Lines that compare the run with its fit: the prediction, which is for the whole budget on TinyStories, and
        whether the run was much faster than the fit was with as many processes."""
        fit, lines = self.record_settings.get("fit"), []
        if not fit:
            return lines
        whole = not self.clock.steps and self.clock.budget == self.preset.task.minutes * 60
        if self.preset.name == RULE_HOLDS_FOR and whole:
            predicted, measured = fit["predicted_bpb"], result["val_bpb"]
            lines += [f"predicted {predicted:.3f} by the scaling rule of TinyStories, measured {measured:.3f}"]
        times = result["tokens_per_second"] / fit["tokens_per_second"]
        if self.processes == fit["batch"]["processes"] and times > OUTGROWN:
            lines += [f"trained {times:.1f} times as fast as when this machine was fitted; `make fit` measures again"]
        return lines

    def finish(self, model: Any, training_seconds: float) -> None:
        """Write the checkpoint, then the training record."""
        from lab.machine.backend import save, tree_flatten

        if not self.leads:
            return
        temporary = self.directory / ".checkpoint.safetensors"
        save(temporary, dict(tree_flatten(model.parameters())))
        checkpoint = temporary.replace(self.directory / "checkpoint.safetensors")
        rate = self.tokens / (training_seconds + self.clock.billed_from - self.clock.begun)
        self.facts |= {
            "status": "ok",
            "training_seconds": training_seconds,
            "total_seconds": time.perf_counter() - self.started,
            "num_steps": self.clock.step,
            "total_tokens": self.tokens,
            "tokens_per_second": rate,
            "mfu_percent": self._mfu(rate),
            "peak_memory_mb": hardware.peak_memory_mb() * self.processes,
            "epochs": self.data.epoch,
            "slept_seconds": self.clock.slept,
            "final_loss": self.smooth / (1 - SMOOTHING ** max(1, self.clock.step)),
            "seed": self.seed,
            "updates": self.updates.ratios(),
            "checkpoint": sha256(checkpoint),
        }
        write_atomic(self.directory / "train.json", json.dumps(self.facts, indent=1))

    def _mfu(self, rate: float) -> float:
        return 100 * rate * self.flops_per_token / self.facts["matmul_peak"]


def execute(experiment: Callable[[Run], Any], source: str) -> None:
    """Run `experiment` as a command; `source` is its file. Steps and exit status: see the module's docstring."""
    started = time.perf_counter()

    @click.command(
        help="Train for the preset's five minutes on what was prepared last, then score. To experiment, edit the file.",
        epilog=examples("train.py", "train.py --minutes 0.2", "train.py --steps 10 --seed 1 --run-dir runs/smoke"),
    )
    @click.option(
        "--minutes",
        type=MINUTES,
        help="Minutes of training instead of the preset's. Results do not compare with those of another budget.",
    )
    @click.option(
        "--steps",
        type=click.IntRange(1, 10**9),
        help="Train for exactly this many steps. Results do not compare with those of another budget.",
    )
    @click.option("--seed", type=SEED, help="Seed of parameters and batches.  [default: 0]")
    @click.option("--run-dir", type=NewFolder(), help="Folder of the run.  [default: a new one in runs/]")
    @click.option("--score/--no-score", default=True, help="Score the checkpoint after training.")
    @verbosity_options("Print only the summary and errors.", "Print every step and the scorer's output.")
    def command(
        minutes: float | None, steps: int | None, seed: int | None, run_dir: Path | None, score: bool, verbosity: int
    ) -> None:
        outlast_reader()  # minutes of training are not lost to `| head -1`
        record = recorded()
        if record is None:
            raise UserError("nothing is prepared yet; run `make prepare PRESET=offline` (no network) or another preset")
        if "AUTORESEARCH_SETTINGS" not in os.environ:
            register()
        record["minutes"] = minutes or record.get("minutes") or record["preset"]["task"]["minutes"]
        record["steps"] = steps or record.get("steps")
        record["seed"] = seed if seed is not None else record.get("seed", 0)
        processes = record["preset"]["batch"]["processes"]
        if processes > 1 and not parallel.launched():
            sys.exit(parallel.launch(processes))
        directory = run_dir or (new_directory(record["preset"]["name"]) if parallel.rank() == 0 else Path())
        run = Run(directory, record, Path(source), started, verbosity)
        _train(run, experiment)
        if score and run.leads:
            _score(run, started)

    guarded(command)


def guarded(command: click.Command) -> None:
    """Run a command line. An error of the user or the system is printed in one line, a bug keeps its traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the shell
        stream.reconfigure(errors="replace")  # a C locale cannot encode "±"
    try:
        command.main(standalone_mode=False)
    except UserError as error:
        sys.exit(f"error: {printable(error)}")
    except click.ClickException as error:
        error.message = printable(error.message)
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        if parallel.rank() == 0:
            print("stopped", file=sys.stderr)  # click has ended the line
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, RuntimeError) and parallel.lost_peer(error):
            sys.exit(parallel.LOST_PEER)
        if isinstance(error, OSError) and (error.filename or error.errno):
            sys.exit(f"error: {printable(system_error(error))}")
        if Path(sys.argv[0]).name != "train.py":  # whose bugs are the user's or the agent's
            report_bug()
        raise
    finally:
        _flush()


def _flush() -> None:
    """Write what is still buffered. If nobody reads it, end silently with status 1, as click does for a later write."""
    try:
        sys.stdout and sys.stdout.flush()
    except BrokenPipeError:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())  # Python flushes it once more
        sys.exit(1)


def system_error(error: OSError) -> str:
    """An error of the system in one line: what failed, where, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free disk space, or set AUTORESEARCH_CACHE to another folder"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = f"allow access there{_elsewhere(os.path.abspath(error.filename)) if where else ''}"
    else:
        remedy = "fix or remove it"
    return f"{error.strerror}{where}; {remedy}, then run again: finished work is kept"


def _elsewhere(path: str) -> str:
    """What can be done about a path that cannot be written, besides allowing it."""
    if Path(path).is_relative_to(os.path.abspath(cache_root())):
        return ", or set AUTORESEARCH_CACHE to another folder"
    return ", or clone the project into a folder that you can write to" * Path(path).is_relative_to(ROOT)


def report_bug() -> None:
    """Write the details of the exception being handled to a file, and print where to report it."""
    attach = f" and attach {(path := cache_root() / 'bug.txt')}"
    details = f"{shlex.join(sys.argv)}\nPython {sys.version}, {platform.platform()}\n{traceback.format_exc()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, without_places(details).encode(errors="replace"))
    except OSError:
        attach = ""
    print(f"this is a bug; report it where you cloned this from (git remote -v){attach}", file=sys.stderr)


def new_directory(name: str) -> Path:
    """A new folder in runs/ for a run that starts now; runs/latest points to it."""
    runs = ROOT / "runs"
    directory = runs / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{os.getpid()}"
    directory.mkdir(parents=True)
    link = runs / f".latest-{os.getpid()}"
    link.symlink_to(directory.name)
    link.replace(runs / "latest")
    return directory


def _train(run: Run, experiment: Callable[[Run], Any]) -> None:
    from lab.machine.backend import mx

    mx.random.seed(run.seed)
    with run.display:
        model = experiment(run)
    mx.eval(model.parameters())
    run.finish(model, run.clock.elapsed)
    del model
    mx.clear_cache()  # the scorer's process needs the memory


def _score(run: Run, started: float) -> None:
    """Score in a separate process; print the comparison with the fit, then upstream's summary block."""
    from lab.scoring.score import by_upstreams_rule

    directory = run.directory
    # No sandbox: the same code has just trained without one, and no sandbox has been run with a GPU.
    command = bound([sys.executable, str(ROOT / "prepare.py"), "score", str(directory), "--sandbox", "none"])
    with working("scoring", run.verbosity):
        scoring = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if scoring.returncode:
        raise UserError(
            scoring.stderr.strip().removeprefix("error: ") or f"the scorer failed with exit status {scoring.returncode}"
        )
    if run.verbosity == VERBOSE:
        print(scoring.stdout, end="")
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    result["total_seconds"] = time.perf_counter() - started
    write_atomic(directory / "result.json", json.dumps(result, indent=1))
    if run.verbosity > QUIET:
        for line in [*run.compared_with_fit(result), *by_upstreams_rule(run.preset.data.repo, result)]:
            print(line)
    print(summary(result))


def summary(result: dict[str, Any]) -> str:
    """The result in upstream's format: the same keys in the same order."""
    return f"""---
val_bpb:          {result["val_bpb"]:.6f}
training_seconds: {result["training_seconds"]:.1f}
total_seconds:    {result["total_seconds"]:.1f}
peak_vram_mb:     {result["peak_memory_mb"]:.1f}
mfu_percent:      {result["mfu_percent"]:.2f}
total_tokens_M:   {result["total_tokens"] / 1e6:.1f}
num_steps:        {result["num_steps"]}
num_params_M:     {result["num_params"] / 1e6:.1f}
depth:            {result["depth"]}"""
