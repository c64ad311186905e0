"""`agent_loop.py run` with its own loop, git, journal, signals, panel and guard; what trains is a child that sleeps.

python quick_night.py FOLDER SECONDS run --agent search ...
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import simulated

import agent_loop
from lab.loop import session
from lab.training.run import guarded
from lab.trial import guard
from lab.trial.runner import Measured, Phase, Skipped
from lab.trial.sandbox import Policy


class Bench(simulated.SimulatedBench):
    """Each run is a process of the real guard; it says on its own output when it has begun."""

    def __init__(self, folder: Path, seconds: str):
        super().__init__()
        self.folder, self.phase = folder, Phase()
        self.code = f"import time; print('begun', flush=True); time.sleep({seconds}); print('done')"

    def run(self, name: str, source: str, seed: int, test: bool = False) -> Measured:
        run_dir = self.folder / "runs" / name
        run_dir.mkdir(parents=True, exist_ok=True)
        command, limits = [sys.executable, "-S", "-c", self.code], guard.Limits(60, 1 << 30)
        outcome = guard.run(command, run_dir, Policy((run_dir,)), limits, sandbox="none", ended=self.ended)
        if outcome.status == "killed" and self.ended():
            raise Skipped
        measured = super().run(name, source, seed, test)
        return measured if outcome.status == "ok" else Measured("crash", None, 0.1, 0.1, outcome.status)


def main(place: str, seconds: str, *arguments: str) -> None:
    folder = Path(place)
    night = simulated.begin(folder)
    parts = night.branch, night.journal, Bench(folder, seconds)
    session.open_night, session.NIGHTS = lambda *_, **__: parts, folder / "repo" / "nights"
    session.held = lambda _: nullcontext()
    sys.argv = ["agent_loop.py", *arguments]
    guarded(agent_loop.command)


if __name__ == "__main__":
    main(*sys.argv[1:])
