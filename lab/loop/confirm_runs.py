"""The runs of the confirmation (lab.loop.confirm): the winner, its baseline, and the winner without each change.

`night` is an agent_loop.Night, whose journal records them.
"""

from typing import Any

from lab.errors import UserError
from lab.loop import confirm
from lab.trial.runner import Measured

OTHER_SECONDS = 30.0  # of a run besides training
RECORDED = ("status", "val_bpb", "test_bpb", "tokens", "speed", "pace", "memory_gb", "minutes", "reason")


def run_seconds(night: Any) -> float:
    return 60 * night.runner.settings["minutes"] + OTHER_SECONDS


def time_to_confirm(night: Any) -> str:
    """A reason to end the experiments: the time until the deadline is just enough to confirm what was kept."""
    needed = confirm.runs_left(night.journal.state) * run_seconds(night)
    return "time to confirm the winner" if night.deadline and night.deadline.seconds < needed else ""


def confirm_winner(night: Any) -> str:
    """Run the winner and the baseline with new seeds, then the winner without each change; return why it ended."""
    while trial := confirm.next_trial(night.journal.state):
        late = night.deadline and night.deadline.seconds < run_seconds(night)
        if reason := night.stop() or ("end time reached" if late else ""):
            return reason
        name = f"{trial.name}-r{confirm.attempts(night.journal.state, trial) + 1}"
        result = night.kept_result(name, lambda trial=trial, name=name: _run(night, trial, name))
        night.journal.record("confirmation", **trial._asdict(), run=name, **{key: result.get(key) for key in RECORDED})
        night.log_run(name, result)
    return "done"


def _run(night: Any, trial: confirm.Trial, name: str) -> Any:
    state = night.journal.state
    chosen = state.experiments[trial.id]
    source, what = night.branch.source(chosen.commit), chosen.title
    if trial.without is not None:
        change = state.experiments[trial.without]
        what = f"without {change.title}"
        known = confirm.without_values(source, change.edit or {}, night.settings)
        try:
            source = known or night.branch.taken_back(source, change.commit)
        except UserError as reason:
            return Measured("crash", None, 0.0, 0.0, f"cannot be taken back alone: {reason}")
    night.log(f"run {name}, seed {trial.seed}: {what}")
    return night.train(name, source, trial.seed, test=True)
