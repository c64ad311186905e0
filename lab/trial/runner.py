"""One training run of the loop: sandboxed training, the score, and whether the machine was fit throughout.

The files that the child leaves in its run directory are not trusted: before scoring, train.py and settings.json are
restored, and the scorer runs from the night's worktree in a separate process.
"""

import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import hypot, inf, log, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lab.data.shards import HELD_OUT, PARTS, open_prepared
from lab.errors import UserError, one_line
from lab.files import remove, sealed, without_places, write_atomic
from lab.machine import hardware
from lab.machine.condition import SLEPT_SECONDS, Condition, condition, invalid_reason, wait_reason
from lab.machine.speed import Watch, supported
from lab.show import silent
from lab.trial import guard, kernel_store
from lab.trial.crash import read_bytes
from lab.trial.curve import read_curve
from lab.trial.guard import Limits
from lab.trial.sandbox import Policy, grammar

MEMORY_SHARE = 0.7  # of the machine's memory that a run may take
RECORDS = (
    "train.py",
    "settings.json",
    "steps.jsonl",
    "train.json",
    "score.json",
    "test.json",
    "result.json",
    "run.log",
    "score.log",
)
WRITTEN = ("train.py", "settings.json", "steps.jsonl", "train.json", "run.log", "checkpoint.safetensors")  # by training
RECORD_BYTES = 8 << 20  # a larger record is removed with the checkpoint
SLACK_SECONDS = 10.0  # for starting and saving, added to the budget and twice the preflight
PREFLIGHT_SECONDS = 900.0  # of a night's first, which compiles every kernel, some minutes with an NVIDIA GPU
COMPILE_SECONDS = 240.0  # more on an NVIDIA GPU, for kernels that no source of the night has needed so far
STARTS = 3.0  # times the night's quickest preflight that a later one may take, besides the slack
PREFLIGHT_STEPS = 2
QUICKEST = "quickest_start.json"  # in the folder of the night, for when it is resumed
ECHO_BYTES, ECHO_CHARS = 8 << 10, 200  # shown of a run's output, and of each line
ROOM_BYTES = 1 << 30  # with less free before a run, a full disk is not the run's fault
SCORE_SECONDS = 1000.0  # the model's process has 900 (lab.scoring.score)
WAIT_SECONDS = 600.0  # at most, for a hot or busy machine before a run
TIMED_SECONDS = 6.0  # of training, to measure a speed: of a GPU before and after a run, or of two sources in turn
TIMED_MINUTES = 1.0  # least budget of a run that is worth it
ROUNDS = 4  # of timing two sources in turn
TURN_ERROR = 0.006  # of the logarithm of that, besides what the rounds show: some seconds stand for a whole run
UNLIKELY = 9.0  # logarithm of a speed over another, from which on the steps recorded by a run are not believed
RECENT_SECONDS = 30.0  # the speed after a run is also the one before the next, if that follows this soon
FULL = re.compile(r"^disk: |No space left on device|\[write\] Unable to write")


@dataclass(frozen=True)
class Measured:
    """One run. status: ok, crash, or invalid (caused by the machine: run again). val_bpb is None unless ok."""

    status: str
    val_bpb: float | None
    memory_gb: float
    minutes: float
    reason: str
    before: dict[str, Any] | None = None  # lab.machine.condition.Condition at the start and the end
    after: dict[str, Any] | None = None
    spoiled: bool = False  # a "crash" caused by the machine: it says nothing about the change
    tokens: int | None = None  # trained on, as the run recorded it; None: unknown
    speed: float | None = None  # of the machine during the run, in a unit of its own; None: not measured
    pace: float | None = None  # the same, relative to the first run of the night
    test_bpb: float | None = None  # of the text that no verdict looks at; None: not scored


class Skipped(Exception):
    """A person ended the experiment during this run."""


@dataclass(frozen=True)
class Phase:
    """What a runner is doing ("" for nothing) and since when; `run_dir` is set while it trains."""

    name: str = ""
    run_dir: Path | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass
class Runner:
    """Runs experiments: `folder` of the night, `worktree` with the source, `settings` as train.py reads them."""

    folder: Path
    worktree: Path
    settings: dict[str, Any]
    sandbox: str
    preflight_seconds: float = 0.0
    log: Callable[[str], None] = print
    echo: Callable[[str], None] = silent  # called with each line that training and scorer print
    ended: Callable[[], bool] = lambda: False  # whether a person has ended the experiment at hand
    phase: Phase = field(default_factory=Phase)
    free: int = 0  # bytes on the disk before the run
    usual_flops: float = 0.0  # the best so far of the probes before and after runs
    best_speed: float = 0.0  # of the machine during a run so far
    first_speed: float | None = None  # what counts as pace 1; None: the speed of the first run
    reference: str = ""  # train.py that is timed on a GPU before and after each run
    timed: tuple[float, float | None] = (-RECENT_SECONDS, None)  # when that was last, and tokens/s

    def preflight(self, source: str) -> str:
        """Two real steps and one scored batch. Returns why they failed, "" if they did not."""
        self.check_data()
        run_dir = self._empty("preflight")
        self.free = shutil.disk_usage(run_dir).free
        with self._in_phase("preflight"):
            outcome = self._train(run_dir, source, 0, self.start_limit(), "--steps", str(PREFLIGHT_STEPS))
            if outcome.status == "ok":
                self.preflight_seconds = outcome.seconds
                write_atomic(self.folder / QUICKEST, json.dumps(min(outcome.seconds, self._quickest())))
                reason = self._score(run_dir, source, 0, PREFLIGHT_STEPS, "--batches", "1").get("reason", "")
            else:
                reason = failure(outcome)
        return self._checked(reason, run_dir) if reason else ""

    def start_limit(self) -> float:
        """Seconds for a preflight. A run may take twice its preflight besides the budget, so the source must not decide
        how long that is."""
        return min(PREFLIGHT_SECONDS, self._usual_start() + COMPILE_SECONDS * self._compiles())

    def _usual_start(self) -> float:
        return STARTS * self._quickest() + SLACK_SECONDS

    def _quickest(self) -> float:
        """Seconds of the night's quickest preflight, infinite before the first."""
        path = self.folder / QUICKEST
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else inf

    def run(self, name: str, source: str, seed: int, test: bool = False) -> Measured:
        """Train this source for the budget and score it; with `test`, also on the text that no verdict looks at. Raises
        Skipped if `ended` during the training or before."""
        self.check_data()
        run_dir = self._empty(name)
        with self._in_phase("waiting for the machine"):
            before = self._wait_until_fit()
        self.free = shutil.disk_usage(run_dir).free
        began = time.monotonic()
        outcome, speed = self._measured(run_dir, source, seed)
        with self._in_phase("scoring"):
            after = self._condition()
            score = self._score(run_dir, source, seed) if outcome.status == "ok" else {}
            tested = self._score(run_dir, source, seed, None, "--text", "test") if test and score.get("val_bpb") else {}
        cost = (outcome.peak_memory_mb / 1024, (time.monotonic() - began) / 60)
        conditions = (vars(before), vars(after))
        if outcome.stopped_seconds > SLEPT_SECONDS:
            reason = f"the training was stopped for {outcome.stopped_seconds:.0f} s"
            return Measured("invalid", None, *cost, reason, *conditions)
        if speed:
            self.first_speed, self.best_speed = self.first_speed or speed, max(self.best_speed, speed)
        share, pace = (speed / self.best_speed, speed / self.first_speed) if speed else (None, None)
        if reason := invalid_reason(before, after, self.usual_flops, outcome.status, share):
            return Measured("invalid", None, *cost, reason, *conditions)
        if score.get("status") == "ok":
            known = {"tokens": self._tokens(run_dir), "speed": speed, "pace": pace, "test_bpb": tested.get("val_bpb")}
            return Measured("ok", score["val_bpb"], *cost, "", *conditions, **known)
        reason = self._checked(score.get("reason") or failure(outcome), run_dir)
        for path in leftovers(run_dir):  # they may fill the disk
            remove(path, self.folder)
        return Measured("crash", None, *cost, reason, *conditions)

    def _measured(self, run_dir: Path, source: str, seed: int) -> tuple[guard.Outcome, float | None]:
        """Train for the budget. Also returns the speed of the machine meanwhile."""
        start = min(self.preflight_seconds, self._usual_start())  # the preflight has compiled the kernels
        limit = self.settings["minutes"] * 60 + 2 * start + SLACK_SECONDS
        if supported():
            with Watch() as watch, self._in_phase("training", run_dir):
                outcome = self._train(run_dir, source, seed, limit)
            return outcome, watch.speed(outcome.cpu_seconds)
        before = self._timed(RECENT_SECONDS)
        with self._in_phase("training", run_dir):
            outcome = self._train(run_dir, source, seed, limit)
        after = self._timed(0.0)
        return outcome, sqrt(before * after) if before and after else None

    def _checked(self, reason: str, run_dir: Path) -> str:
        """`reason`, if the change may be the cause. Raises UserError if the prepared data is damaged or the disk was
        full before the run: then the failure says nothing about the change."""
        self.check_data(PARTS)
        if self.free >= ROOM_BYTES or not FULL.search(reason):
            return without_places(reason)  # it is sent to agents, and shown in the report
        for path in leftovers(run_dir):
            remove(path, self.folder)
        raise UserError(
            f"the disk is full: {self.free / 1e6:,.0f} MB were free in {self.folder} before the run {run_dir.name}; "
            "free disk space, then run the same command again, which repeats this run"
        )

    def check_data(self, parts: tuple[str, ...] = ()) -> None:
        """Raise UserError if the prepared data is missing or these parts of it are damaged."""
        try:
            open_prepared(Path(self.settings["prepared"]), parts)
        except UserError as error:
            preset = self.settings["preset"]
            make = f"make prepare PRESET={preset['name']} VOCAB={preset['tokenizer']['vocab_size']}"
            files = " with the same FILES" * (preset["data"]["source"] == "files")
            raise UserError(f"{str(error).partition('; ')[0]}; run `{make}`{files}, then run again") from None

    @contextmanager
    def _in_phase(self, name: str, run_dir: Path | None = None) -> Iterator[None]:
        self.phase = Phase(name, run_dir)
        try:
            yield
        finally:
            self.phase = Phase()

    def _train(self, run_dir: Path, source: str, seed: int, seconds: float, *flags: str) -> guard.Outcome:
        sent = self._sent(run_dir.name, source, seed)
        prepared = Path(self.settings["prepared"])
        hidden = tuple(path for part in HELD_OUT if (path := prepared / f"{part}.npy").exists())
        policy = Policy((run_dir,), readable=(self.worktree, prepared, sent), hidden=(*hidden, *grammar(self.worktree)))
        env = os.environ | {"AUTORESEARCH_SETTINGS": str(sent / "settings.json")}
        command = [sys.executable, str(sent / "train.py"), "--run-dir", str(run_dir), "--no-score", *flags]
        limits = Limits(seconds, self._memory())
        if self._compiles():
            kernel_store.lend(self.folder / "kernels", run_dir, source)
        outcome = guard.run(command, run_dir, policy, limits, sandbox=self.sandbox, env=env, ended=self.ended)
        if self._compiles() and outcome.status == "ok":
            kernel_store.keep(self.folder / "kernels", run_dir, source)
        self._disarm(run_dir)
        remove(sent, self.folder)
        self._echo(read_bytes(run_dir / "run.log", ECHO_BYTES).decode(errors="replace"))
        if outcome.status == "killed" and self.ended():
            for path in leftovers(run_dir):
                remove(path, self.folder)
            raise Skipped
        return outcome

    def _compiles(self) -> bool:
        """Whether a training's first step compiles kernels for minutes."""
        return hardware.describe()["backend"] == "cuda"

    def _memory(self) -> int:
        return int(hardware.describe()["memory_gb"] * MEMORY_SHARE * 2**30)

    def _disarm(self, run_dir: Path) -> None:
        """Keep the plain files that a training writes, and nothing else: links, FIFOs and folders could stand where
        the loop and the scorer write, or be closed to them."""
        run_dir.chmod(0o755)
        for path in run_dir.iterdir():
            if path.name in WRITTEN and stat.S_ISREG(path.lstat().st_mode):
                path.chmod(0o644)
            else:
                remove(path, self.folder)

    def _echo(self, printed: str) -> None:
        for line in printed.splitlines():
            self.echo(f"| {one_line(line, ECHO_CHARS)}")

    def _sent(self, name: str, source: str, seed: int) -> Path:
        """A folder with what the child reads: the source, its settings, and links to the worktree's fixed files."""
        sent = self.folder / "sent" / name
        remove(sent, self.folder)
        sent.mkdir(parents=True)
        (sent / "train.py").write_text(source, encoding="utf-8")
        (sent / "settings.json").write_text(json.dumps(self.settings | {"seed": seed}), encoding="utf-8")
        for part in ("lab", "prepare.py", "presets"):
            (sent / part).symlink_to(self.worktree / part)
        return sent

    def _score(self, run_dir: Path, source: str, seed: int, steps: int | None = None, *flags: str) -> dict[str, Any]:
        """score.json of a scorer in a separate process, which is started once more if it was killed.

        The guard bounds what the model's process takes, and ends all of them when the loop ends."""
        write_atomic(run_dir / "train.py", source)
        write_atomic(run_dir / "settings.json", json.dumps(sealed(self.settings | {"seed": seed, "steps": steps})))
        scratch = self.folder / "scoring"
        scorer = [sys.executable, str(self.worktree / "prepare.py"), "score", str(run_dir), "--sandbox", self.sandbox]
        written = run_dir / ("test.json" if "--text" in flags else "score.json")
        for _ in range(2):
            remove(scratch, self.folder)
            scratch.mkdir()
            written.unlink(missing_ok=True)
            limits = Limits(SCORE_SECONDS, self._memory())
            outcome = guard.run([*scorer, *flags], scratch, Policy((scratch, run_dir)), limits, sandbox="none")
            self._echo(read_bytes(scratch / "run.log", ECHO_BYTES).decode(errors="replace"))
            if written.is_file():
                return json.loads(written.read_text(encoding="utf-8"))
            if outcome.status not in ("killed", "memory"):
                break
        return {"status": "rejected", "reason": f"scoring failed: {failure(outcome)}"}

    def _empty(self, name: str) -> Path:
        """An empty folder for a run of this name."""
        run_dir = self.folder / "runs" / name
        remove(run_dir, self.folder)
        run_dir.mkdir(parents=True)
        return run_dir

    def _timed(self, recent: float) -> float | None:
        """Tokens/s of some seconds of training with the reference, no older than `recent`; None if that fails."""
        if not self.reference or self.settings["minutes"] < TIMED_MINUTES:
            return None
        if time.monotonic() > self.timed[0] + recent:
            with self._in_phase("timing the machine"):
                speed = self._tokens_per_second(self.reference)
            self.timed = (time.monotonic(), speed)
        return self.timed[1]

    def timed_in_turn(self, source: str, other: str) -> tuple[float | None, float | None]:
        """log of a source's tokens/s over another's, timed in turn, with its standard error; None where that fails.

        The order is reversed in every other round, so that a machine that becomes slower favours neither."""
        ratios = []
        with self._in_phase("timing the change against the incumbent"):
            for turn in range(ROUNDS):
                order = (source, other) if turn % 2 == 0 else (other, source)
                speeds = {one: self._tokens_per_second(one) for one in order}
                if not all(speeds.values()):
                    return None, None
                ratios.append(log(speeds[source] / speeds[other]))
        ratio, error = fmean(ratios), hypot(TURN_ERROR, stdev(ratios) / sqrt(ROUNDS))
        return (ratio, error) if max(abs(ratio), error) < UNLIKELY else (None, None)

    def _tokens_per_second(self, source: str) -> float | None:
        """Of some seconds of training; None if that fails."""
        run_dir = self._empty("reference")
        limit = self.start_limit() + TIMED_SECONDS + SLACK_SECONDS
        outcome = self._train(run_dir, source, 0, limit, "--minutes", str(TIMED_SECONDS / 60))
        speed = read_curve(run_dir / "steps.jsonl").speed if outcome.status == "ok" else None
        for path in leftovers(run_dir):
            remove(path, self.folder)
        return speed

    def _tokens(self, run_dir: Path) -> int | None:
        tokens = read_curve(run_dir / "steps.jsonl").tokens
        return int(tokens[-1]) if len(tokens) and tokens[-1] >= 1 else None

    def _condition(self) -> Condition:
        now = condition()
        self.usual_flops = max(self.usual_flops, now.flops)
        return now

    def _wait_until_fit(self) -> Condition:
        """The machine's condition once it is fit for a run, or after WAIT_SECONDS in any case."""
        begun, logged = time.monotonic(), False
        while reason := wait_reason(now := self._condition(), self.usual_flops):
            if self.ended():
                raise Skipped
            if time.monotonic() - begun > WAIT_SECONDS:
                break
            if not logged:
                self.log(f"waiting: {reason}")
            logged = True
            time.sleep(WAIT_SECONDS / 20)
        return now


def leftovers(run_dir: Path) -> list[Path]:
    """The files of a run other than its small records: checkpoint, scratch folders, and whatever fills the disk."""
    return [path for path in run_dir.iterdir() if path.name not in RECORDS or path.lstat().st_size > RECORD_BYTES]


def failure(outcome: guard.Outcome) -> str:
    """Why a run failed, in one line."""
    crash = outcome.crash
    if crash is None:
        return f"{outcome.status}: stopped from outside"
    kind = f"{crash.type}: " * (crash.type != outcome.status)
    where = f" at train.py line {crash.line}: {crash.source}" if crash.line else ""
    return f"{outcome.status}: {kind}{crash.message}{where}"[:300]
