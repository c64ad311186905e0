"""A night of 1,000 experiments: does anything grow that should not?

    python benchmarks/soak.py [--experiments 1000]

The loop, its checks, git, the journal, the search agent and the report are real; a training takes no time, and its
score is noise around a value that one change in ten lowers. After every hundred experiments the process reports its
memory and open files, the size of the night and of the repository, the CPU time of an experiment (git's included) and
of its proposal, and what it takes to open the journal again and to write the report, each in a process of its own. The
last hundred is compared with the second, because the first warms up. Writes benchmarks/out/soak.json. Exit status 1 if
memory, open files or the time of an experiment grew by more than LIMITS. Reads /proc (Linux).
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from simulated import SimulatedBench, begin  # noqa: E402

from lab.agents.briefing import Briefing  # noqa: E402
from lab.agents.search import Search  # noqa: E402
from lab.interface import report  # noqa: E402
from lab.loop.journal import Journal  # noqa: E402
from lab.loop.proposal import Proposal  # noqa: E402
from lab.show import silent  # noqa: E402
from lab.trial.runner import Measured  # noqa: E402

HUNDRED = 100
# More than in the second hundred; seconds of CPU for an experiment and for its proposal. The search agent fits its
# densities to all experiments, so a proposal takes longer with their number.
LIMITS = {"memory_mb": 40.0, "open_files": 0, "seconds": 0.05, "proposing_s": 0.5}


class Bench(SimulatedBench):
    """One source in ten is better than the one before."""

    def run(self, name: str, source: str, seed: int) -> Measured:
        self.names.clear()
        draw = random.Random(source)
        gain = 0.01 * draw.random() * (draw.random() < 0.1)
        return Measured("ok", 1.0 - gain + random.Random(seed).gauss(0, 0.007), 0.1, 5.0, "")


class Timed(Search):
    """Adds up the CPU time of its proposals."""

    seconds = 0.0

    def propose(self, briefing: Briefing) -> Proposal:
        begun = time.process_time()
        try:
            return super().propose(briefing)
        finally:
            self.seconds += time.process_time() - begun


def cpu() -> float:
    return time.process_time() + sum(os.times()[2:4])


def apart(function: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, peak MB) of a function in a process of its own."""
    pid = os.fork()
    if not pid:
        function()
        os._exit(0)
    _, status, used = os.wait4(pid, 0)
    assert not status
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def files(folder: Path) -> tuple[int, float]:
    """(number, MB on the disk) of the files in a folder."""
    sizes = [path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_dir()]
    return len(sizes), sum(sizes) / 1e6


def soak(folder: Path, experiments: int) -> Iterator[dict[str, float]]:
    """Figures after every hundred experiments."""
    night = begin(folder)
    night.log, night.runner, night.agent = silent, Bench(), Timed()
    report.ROOT = night.branch.repository
    night.go(0, final=False)
    for done in range(HUNDRED, experiments + 1, HUNDRED):
        begun, night.agent.seconds = cpu(), 0.0
        assert night.go(HUNDRED, final=False) == "done"
        proposing = night.agent.seconds / HUNDRED
        seconds = (cpu() - begun) / HUNDRED - proposing
        opening, _ = apart(lambda: Journal(night.folder))
        reporting, memory = apart(lambda: report.write_report(night.folder))
        number, size = files(night.branch.repository / ".git")
        yield {
            "experiments": done,
            "seconds": seconds,
            "proposing_s": proposing,
            "memory_mb": int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * resource.getpagesize() / 2**20,
            "open_files": len(os.listdir("/proc/self/fd")),
            "night_mb": files(night.folder)[1],
            "git_files": number,
            "git_mb": size,
            "open_journal_s": opening,
            "report_s": reporting,
            "report_mb": memory,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experiments", type=int, default=1000, help="a multiple of 100, at least 200 (%(default)s)")
    options = parser.parse_args()
    if options.experiments < 2 * HUNDRED:
        sys.exit("error: --experiments must be at least 200: the last hundred is compared with the second")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for row in soak(Path(folder), options.experiments):
            if not rows:
                print(*row, sep="  ")
            cells = (f"{value:>{len(key)}.{0 if isinstance(value, int) else 2}f}" for key, value in row.items())
            print(*cells, sep="  ", flush=True)
            rows.append(row)
    out = ROOT / "benchmarks" / "out" / "soak.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    grown = [f"{key} by {more:.2f}" for key in LIMITS if (more := rows[-1][key] - rows[1][key]) > LIMITS[key]]
    if grown:
        sys.exit(f"error: grew from the second hundred to the last: {', '.join(grown)}")
    print("flat: memory, open files and time of an experiment, from the second hundred to the last")


if __name__ == "__main__":
    main()
