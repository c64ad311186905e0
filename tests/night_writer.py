"""A night without training, for tests that kill it: every step of the journal's protocol, with files for results.

    python night_writer.py FOLDER EXPERIMENTS

`branch` stands in for the git branch, runs/<name>/result.json for a training run's result.
"""

import json
import random
import sys
from pathlib import Path

from lab.files import write_atomic
from lab.loop.journal import Journal, lock


def train(folder: Path, name: str) -> dict:
    """The result of run `name`: read if it is whole, otherwise made; the same number whenever it is made."""
    path = folder / "runs" / name / "result.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(name)
        status = rng.choices(["ok", "crash", "invalid"], [0.8, 0.1, 0.1])[0] if not name.startswith("e0000") else "ok"
        value = rng.gauss(1.0, 0.01) if status == "ok" else None
        write_atomic(path, json.dumps({"status": status, "val_bpb": value}))
    return json.loads(path.read_text())


def night(folder: Path, experiments: int) -> None:
    journal = Journal(folder)
    state = journal.state
    journal.record("start", tag="kill", commit="base")
    while len(state.experiments) < experiments or state.pending:
        write_atomic(folder / "branch", state.head())
        step = state.step()
        if step.action == "propose":
            number = len(state.experiments)
            commit = f"{number:040x}"
            write_atomic(folder / "branch", commit)
            given = {"commit": commit, "source": "s", "fingerprint": f"f{number}", "nodes": 9}
            journal.record("proposal", id=number, agent="search", hypothesis=f"idea {number}", **given)
        elif step.action == "run":
            result = train(folder, step.run)
            measured = {"memory_gb": 1.0, "minutes": 5.0, "reason": ""}
            journal.record("run", id=step.id, who=step.who, run=step.run, seed=step.seed, **result, **measured)
        elif step.action == "judge":
            found = state.judge()
            journal.record("verdict", id=step.id, **vars(found))
        else:
            event = {"keep": "kept", "discard": "discarded", "crash": "crashed"}[step.verdict]
            journal.record(event, id=step.id, reason="")
            journal.write_results()
    write_atomic(folder / "branch", state.head())


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    with lock(directory / "lock"):
        print("locked", flush=True)
        night(directory, int(sys.argv[2]))
