"""A night that is killed again and again: `kill -9` of the loop, of the training child and of the scorer.

    python benchmarks/kills.py [--kills 20] [--seed N]

A tiny model trains in a fresh clone with real git and the real sandbox. At random moments one of the three is killed,
and the loop is restarted if it died, until each was killed the given number of times. Then the night is finished and
checked: events are numbered without gaps, every run is recorded once and has its result, branch and journal are on the
same commit, results.tsv has every experiment, the user's checkout is unchanged, and no process is left. Linux only;
about four minutes. Writes benchmarks/out/kills.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkout import MINUTES, Checkout  # noqa: E402

from lab.loop.journal import read  # noqa: E402

MARKS = {"loop": "agent_loop.py run", "child": "train.py --run-dir", "scorer": "prepare.py score"}  # in command lines


def processes(folder: Path) -> dict[int, str]:
    """Process ids and command lines of the processes that belong to the clone."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line or "agent_loop.py run --agent search --tag kills" in line:
            lines[int(path.parent.name)] = line
    return lines


def victims(folder: Path, who: str) -> list[int]:
    """The running processes of this kind."""
    return [pid for pid, line in processes(folder).items() if MARKS[who] in line]


def kill_night(checkout: Checkout, kills: int, draw: random.Random) -> dict[str, int]:
    """Run the night until each was killed `kills` times, and return how often the loop was started."""
    flags = ("run", "--agent", "search", "--tag", "kills", "--minutes", MINUTES, "--rigor", "none")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    left, starts, loop = dict.fromkeys(MARKS, kills), 0, None
    while any(left.values()):
        if loop is None or loop.poll() is not None:
            loop = subprocess.Popen(checkout.command("agent_loop.py", *flags), **checkout.where(), **quiet)
            starts += 1
        who = draw.choice([name for name, number in left.items() if number])
        time.sleep(draw.uniform(0, 3))
        until = time.monotonic() + 20
        while not (pids := victims(checkout.folder, who)) and time.monotonic() < until and loop.poll() is None:
            time.sleep(0.01)
        if not pids:
            continue
        time.sleep(draw.uniform(0, 0.5))
        try:
            os.kill(draw.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            continue
        left[who] -= 1
        print(f"killed the {who}; left: {left}", flush=True)
    loop.kill()
    loop.wait()
    return {"starts": starts}


def verify(checkout: Checkout) -> dict[str, int]:
    """Finish the night and check it. Raises AssertionError with what is wrong."""
    checkout.python(
        "agent_loop.py", "run", "--agent", "search", "--tag", "kills", "--minutes", MINUTES, "--rigor", "none",
        "--max-experiments", 0,
    )  # fmt: skip
    journal = checkout.night("kills")
    records = list(read(journal.path))
    runs = [r for r in records if r["event"] == "run"]
    assert [r["n"] for r in records] == list(range(1, len(records) + 1)), "events are not numbered without gaps"
    assert len({r["run"] for r in runs}) == len(runs), "a run is recorded twice"
    results = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (journal.folder / "results").glob("*.json")
    }
    assert set(results) == {r["run"] for r in runs}, "a result is not in the journal"
    assert all(results[r["run"]]["val_bpb"] == r["val_bpb"] for r in runs), "a result changed"
    assert journal.state.pending is None
    assert checkout.git("rev-parse", "autoresearch/kills") == journal.state.head(), "branch and journal disagree"
    rows = (journal.folder / "results.tsv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(journal.state.experiments), "results.tsv does not have every experiment once"
    assert checkout.git("status", "--porcelain") == "", "the user's checkout changed"
    assert checkout.git("rev-list", "--count", "main") == "1"
    time.sleep(1)
    assert not processes(checkout.folder), "a process is left"
    counts = {status: sum(r["status"] == status for r in runs) for status in ("ok", "crash", "invalid")}
    return {"experiments": len(journal.state.experiments) - 1, "runs": len(runs), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        checkout = Checkout(Path(folder))
        report = kill_night(checkout, options.kills, random.Random(options.seed))
        report |= {"kills": options.kills} | verify(checkout)
    out = ROOT / "benchmarks" / "out" / "kills.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"no damage after {options.kills} kills of each: {report}")


if __name__ == "__main__":
    main()
