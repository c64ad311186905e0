"""One training run of the loop: sandboxed training, the score, and whether the machine was fit throughout.

The files that the child leaves in its run directory are not trusted: before scoring, train.py and settings.json are
restored, and the scorer runs from the night's worktree in a separate process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.data.shards import PARTS, open_prepared
from lab.errors import UserError, one_line
from lab.files import remove, sealed, write_atomic
from lab.machine import hardware
from lab.machine.condition import SLEPT_SECONDS, Condition, condition, invalid_reason, wait_reason
from lab.show import silent
from lab.trial import guard
from lab.trial.crash import read_bytes
from lab.trial.guard import Limits
from lab.trial.sandbox import Policy, bound

MEMORY_SHARE = 0.7  # of the machine's memory that a run may take
RECORDS = (
    "train.py",
    "settings.json",
    "steps.jsonl",
    "train.json",
    "score.json",
    "result.json",
    "run.log",
    "score.log",
)
RECORD_BYTES = 8 << 20  # a larger record is removed with the checkpoint
SLACK_SECONDS = 10.0  # for starting and saving, added to the budget and twice the preflight
PREFLIGHT_SECONDS = 240.0  # includes a cold compile of every kernel
PREFLIGHT_STEPS = 2
ECHO_BYTES, ECHO_CHARS = 8 << 10, 200  # shown of a run's output, and of each line
ROOM_BYTES = 1 << 30  # with less free before a run, a full disk is not the run's fault
WAIT_SECONDS = 600.0  # at most, for a hot or busy machine before a run
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
    phase: Phase = field(default_factory=Phase)
    free: int = 0  # bytes on the disk before the run
    usual_flops: float = 0.0  # the best so far of the probes before and after runs

    def preflight(self, source: str) -> str:
        """Two real steps and one scored batch. Returns why they failed, "" if they did not."""
        self.check_data()
        run_dir = self._empty("preflight")
        with self._in_phase("preflight"):
            outcome = self._train(run_dir, source, 0, PREFLIGHT_SECONDS, "--steps", str(PREFLIGHT_STEPS))
            if outcome.status == "ok":
                self.preflight_seconds = outcome.seconds
                reason = self._score(run_dir, source, 0, PREFLIGHT_STEPS, "--batches", "1").get("reason", "")
            else:
                reason = failure(outcome)
        return self._checked(reason, run_dir) if reason else ""

    def run(self, name: str, source: str, seed: int) -> Measured:
        """Train this source for the budget and score it."""
        self.check_data()
        run_dir = self._empty(name)
        with self._in_phase("waiting for the machine"):
            before = self._wait_until_fit()
        begun = time.monotonic()
        budget = self.settings["minutes"] * 60
        with self._in_phase("training", run_dir):
            outcome = self._train(run_dir, source, seed, budget + 2 * self.preflight_seconds + SLACK_SECONDS)
        with self._in_phase("scoring"):
            after = self._condition()
            score = self._score(run_dir, source, seed) if outcome.status == "ok" else {}
        cost = (outcome.peak_memory_mb / 1024, (time.monotonic() - begun) / 60)
        conditions = (vars(before), vars(after))
        if outcome.stopped_seconds > SLEPT_SECONDS:
            reason = f"the training was stopped for {outcome.stopped_seconds:.0f} s"
            return Measured("invalid", None, *cost, reason, *conditions)
        if reason := invalid_reason(before, after, self.usual_flops, outcome.status == "ok"):
            return Measured("invalid", None, *cost, reason, *conditions)
        if score.get("status") == "ok":
            return Measured("ok", score["val_bpb"], *cost, "", *conditions)
        reason = self._checked(score.get("reason") or failure(outcome), run_dir)
        for path in leftovers(run_dir):  # they may fill the disk
            remove(path, self.folder)
        return Measured("crash", None, *cost, reason, *conditions)

    def _checked(self, reason: str, run_dir: Path) -> str:
        """`reason`, if the change may be the cause. Raises UserError if the prepared data is damaged or the disk was
        full before the run: then the failure says nothing about the change."""
        self.check_data(PARTS)
        if self.free >= ROOM_BYTES or not FULL.search(reason):
            return reason
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
        self.free = shutil.disk_usage(run_dir).free
        sent = self._sent(run_dir.name, source, seed)
        prepared = Path(self.settings["prepared"])
        policy = Policy((run_dir,), readable=(self.worktree, prepared, sent), hidden=(prepared / "val.npy",))
        env = os.environ | {"AUTORESEARCH_SETTINGS": str(sent / "settings.json")}
        command = [sys.executable, str(sent / "train.py"), "--run-dir", str(run_dir), "--no-score", *flags]
        limits = Limits(seconds, int(hardware.describe()["memory_gb"] * MEMORY_SHARE * 2**30))
        outcome = guard.run(command, run_dir, policy, limits, sandbox=self.sandbox, env=env)
        remove(sent, self.folder)
        self._echo(read_bytes(run_dir / "run.log", ECHO_BYTES).decode(errors="replace"))
        return outcome

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
        """score.json of a scorer in a separate process, which is started once more if it was killed."""
        write_atomic(run_dir / "train.py", source)
        write_atomic(run_dir / "settings.json", json.dumps(sealed(self.settings | {"seed": seed, "steps": steps})))
        scorer = [sys.executable, str(self.worktree / "prepare.py"), "score", str(run_dir), "--sandbox", self.sandbox]
        for _ in range(2):
            (run_dir / "score.json").unlink(missing_ok=True)
            done = subprocess.run(
                bound([*scorer, *flags]),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                cwd=self.worktree,
                start_new_session=True,
            )
            self._echo(done.stdout + done.stderr)
            if (run_dir / "score.json").is_file():
                return json.loads((run_dir / "score.json").read_text(encoding="utf-8"))
        line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"status": "rejected", "reason": f"scoring failed: {line[:200]}"}

    def _empty(self, name: str) -> Path:
        """An empty folder for a run of this name."""
        run_dir = self.folder / "runs" / name
        remove(run_dir, self.folder)
        run_dir.mkdir(parents=True)
        return run_dir

    def _condition(self) -> Condition:
        now = condition()
        self.usual_flops = max(self.usual_flops, now.flops)
        return now

    def _wait_until_fit(self) -> Condition:
        """The machine's condition once it is fit for a run, or after WAIT_SECONDS in any case."""
        begun, logged = time.monotonic(), False
        while reason := wait_reason(now := self._condition(), self.usual_flops):
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
