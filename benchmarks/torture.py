"""Faults injected into prepare, train, score and nights: nothing recorded may be lost, and what is wrong is named.

    python benchmarks/torture.py [--faults 300] [--seed N] [--only TEXT]

A trial starts a command, stops it (SIGSTOP) just before one of its writes, chosen at random, injects a fault of
benchmarks/faults.py, and lets the command continue; some faults come while a training runs, or while nothing does. Then
must hold:

- the command succeeds, was killed, or ends with one line that says what is wrong, and a nonzero status;
- a damaged input is named in that line, and never used;
- once the fault is removed, the same command succeeds;
- what was recorded before is there, unchanged, and so are the user's branches and files (see stages.py);
- no process and no temporary file is left.

Everything is real (git, journal, guard, prepare.py, train.py, scorer), except that the trainings of "Nights" are
processes that write a checkpoint, and their score follows from source and seed; "Whole" is a night with real training.
Full and read-only disks are real: a tmpfs that is filled, and a bind mount that is made read-only, in a mount namespace
of this process; without permission for that they are left out. Only the clock is simulated, inside the process. Linux.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import FAULTS, Fault  # noqa: E402
from paused import Disk, Ended, in_namespace  # noqa: E402
from processes_left import MARK, marked  # noqa: E402
from stages import Data, Stage  # noqa: E402

# ---- the driver


def trial(stage: Stage, fault: Fault, draw: random.Random) -> Iterator[str]:
    """Inject one fault, and say what is broken afterwards. One that came too late is not counted."""
    stage.begin(fault, draw)
    started, ended = None, None
    if fault.when == "write" or (fault.when == "any" and draw.random() < 0.5):
        started = stage.start(draw.randint(1, stage.writes))
        ended = started.wait()
    elif fault.when not in ("rest", "any"):
        started = stage.start()
        started.child(fault.when)
    stage.late = bool(ended and fault.when == "write")
    if stage.late:
        return
    undo = fault.inject(stage, started, draw)
    theirs = stage.theirs()
    if started and not ended and not (ended := started.go_on()).clean:
        yield f"it ended with {ended}"
    if fault.then or not started:
        yield from judged(fault, stage.start().wait())
    if stage.theirs() != theirs:
        yield "what is not ours has changed"
    if undo:
        undo()
    theirs = stage.theirs()
    yield from resumed(stage)
    if stage.theirs() != theirs:
        yield "what is not ours has changed after the fault"


def resumed(stage: Stage) -> Iterator[str]:
    """Run the command once more, and say what is broken."""
    started = stage.start()
    ended = started.wait()
    stage.writes = started.count.value or stage.writes
    if ended.status:
        yield f"it does not go on: {ended}"
    try:
        yield from stage.broken()
    except Exception as error:  # whatever cannot be read or parsed any more
        yield f"{type(error).__name__}: {error}"
    until = time.monotonic() + 10
    while (left := marked(os.environ[MARK])) and time.monotonic() < until:
        time.sleep(0.02)
    if left:
        yield f"processes are left: {left}"


def judged(fault: Fault, ended: Ended) -> Iterator[str]:
    """Whether the command ended as it must while the fault is there."""
    if not ended.clean:
        yield f"with the fault it ended with {ended}"
    elif fault.then == "works" and ended.status:
        yield f"it must work in spite of the fault: {ended}"
    elif fault.kind == "disk" and not ended.status:
        pass  # what the command removed has made room
    elif isinstance(fault.then, tuple) and not any(text in ended.errors for text in fault.then):
        yield f"the fault is not named: {ended}"


def deck(only: str) -> list[tuple[type[Stage], Fault]]:
    """Each fault with each of its stages; those that come at a random write several times."""
    pairs = [
        (stage, fault) for fault in FAULTS for stage in fault.stages for _ in range(4 if fault.when == "write" else 1)
    ]
    return [(stage, fault) for stage, fault in pairs if only in f"{stage.__name__} {fault.kind}: {fault.name}".lower()]


@dataclass
class Suite:
    """The stages, set up when they are needed, and what was found."""

    folder: Path
    stages: dict[type[Stage], Stage] = field(default_factory=dict)
    injected: Counter = field(default_factory=Counter)
    broken: list[dict[str, str]] = field(default_factory=list)
    lost: int = 0

    def stage(self, kind: type[Stage]) -> Stage:
        if kind not in self.stages:
            folder = self.folder / kind.__name__.lower()
            folder.mkdir()
            data = None if kind is Data else self.stage(Data)
            self.stages[kind] = kind(folder, Disk(folder / "disk"), data)
        return self.stages[kind]

    def run(self, pairs: list[tuple[type[Stage], Fault]], faults: int, seed: int) -> None:
        """Inject so many faults, in a random order in which every fault comes before any comes again."""
        order, number = random.Random(seed), 0
        while sum(self.injected.values()) < faults:
            for kind, fault in order.sample(pairs, len(pairs)):
                number += 1
                if sum(self.injected.values()) < faults and (stage := self.stage(kind)).possible(fault):
                    self.inject(stage, fault, random.Random(f"{seed} {number}"))

    def inject(self, stage: Stage, fault: Fault, draw: random.Random) -> None:
        begun, name = time.process_time() + sum(os.times()[2:4]), f"{type(stage).__name__} {fault.kind}: {fault.name}"
        try:
            wrong = list(trial(stage, fault, draw))
        except Exception:
            wrong = [traceback.format_exc()]
        seconds = time.process_time() + sum(os.times()[2:4]) - begun
        self.injected[fault.kind] += not stage.late
        self.broken += [{"kind": fault.kind, "fault": name, "what": what} for what in wrong]
        result = "came too late" if stage.late else "; ".join(wrong) or "ok"
        print(f"{sum(self.injected.values()):4d}  {seconds:4.1f} s CPU  {name}: {result}", flush=True)
        if wrong:
            self.give_up(type(stage))

    def give_up(self, kind: type[Stage]) -> None:
        """What is broken may break later trials: they get another."""
        stage = self.stages.pop(kind)
        self.lost += stage.lost
        stage.folder.rename(stage.folder.with_name(f"{stage.folder.name}-broken-{len(self.broken)}"))

    def table(self) -> Iterator[str]:
        """Figures by kind of fault."""
        wrong = Counter(entry["kind"] for entry in self.broken)
        yield f"{'kind':<12} {'injected':>9} {'broken':>7}"
        for kind in sorted(self.injected):
            yield f"{kind:<12} {self.injected[kind]:9d} {wrong[kind]:7d}"
        total = sum(self.injected.values())
        yield f"{total} faults injected, {self.lost} results lost, {len(self.broken)} invariants broken"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=300, help="how many to inject (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", metavar="WORD", help="only faults whose line contains this, as in 'nights disk'"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder for torture.json")
    options = parser.parse_args()
    if not (pairs := deck(options.only.lower())):
        sys.exit(f"error: no fault contains {options.only!r}; leave --only out to see all")
    if not Path("/proc/self").is_dir():
        sys.exit("error: make torture reads /proc; run it on Linux")
    in_namespace()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    os.environ[MARK], suite = str(folder), Suite(folder)
    try:
        suite.run(pairs, options.faults, options.seed)
    finally:
        print(*suite.table(), sep="\n")
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"seed": options.seed, "injected": suite.injected, "lost": suite.lost, "broken": suite.broken}
        (options.out / "torture.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if suite.broken:
        sys.exit(f"error: something is broken; what was left is in {folder}")
    for stage in suite.stages.values():
        stage.disk.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
