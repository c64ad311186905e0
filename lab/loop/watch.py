"""The run that trains now beside the incumbent's with the same seed: whether it is nearly certain to lose."""

import time
from dataclasses import dataclass
from pathlib import Path

from lab.loop.branch import Branch
from lab.loop.futility import comparable, gap
from lab.loop.history import State
from lab.trial.curve import read_curve

LOOK_SECONDS = 5.0  # between two looks at the curve


@dataclass
class Watch:
    on: bool = False
    lost: float | None = None  # by how much the run that was ended was losing, bits per byte
    looked: float = 0.0  # when the curve was last read

    def losing(self, state: State, branch: Branch, runs: Path, run_dir: Path | None) -> bool:
        """Whether the run in `run_dir` should end, looked at every few seconds. `runs` has the incumbent's."""
        if self.lost is not None:
            return True  # asked again: by the guard, then by the runner
        now, best, step = state.pending, state.incumbent, state.step()
        if not self.on or not run_dir or not now or now.results or step.who == "incumbent":
            return False
        if time.monotonic() < self.looked + LOOK_SECONDS or not best or step.seed not in best.names:
            return False
        self.looked = time.monotonic()
        changed = {*(now.edit or {}).get("values", {}), *(now.edit or {}).get("definitions", ())}
        if not changed or not comparable(changed, branch.source(now.commit)):
            return False
        whole = read_curve(runs / best.names[step.seed] / "steps.jsonl")
        self.lost = gap(read_curve(run_dir / "steps.jsonl"), whole)
        if self.lost is not None:  # from nats per token of training text to bits per byte
            self.lost *= best.val_bpb / float(whole.loss[-len(whole.loss) // 10 :].mean())
        return self.lost is not None
