"""The last experiments in numbers, against the incumbent at the same seed: what a model is told beside the verdicts.

The numbers are those that runs leave on disk: steps.jsonl and train.json by the experiment's process, score.json by the
scorer. The first two are not trusted: their size is limited and only numbers and plain names are passed on.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lab.loop.history import Experiment, State
from lab.loop.journal import read
from lab.trial.crash import read_bytes

EXPERIMENTS = 4  # last ones that are compared
SHARES = (0.1, 0.3, 1.0)  # of the tokens that both runs saw
WINDOW = 0.05  # of these tokens: steps over which a loss is averaged
UPDATES = 4  # groups of parameters that are listed
LARGEST = 12  # groups of which these are chosen: a few scalars move by chance
STEPS_BYTES, RECORD_BYTES = 4 << 20, 1 << 20
NAME = re.compile(r"[A-Za-z_][\w.]{0,39}")
LEGEND = (
    "loss: nats at 10, 30 and 100 % of the tokens that both runs saw. speed: tokens/s. memory: peak. context: bits per "
    "byte in each quarter of the context. updates: update/weight of a step early and late in the run."
)


@dataclass(frozen=True)
class Traces:
    """The numbers of one run; what was not recorded is missing."""

    losses: list[tuple[float, float]] = field(default_factory=list)  # (tokens, nats per token)
    speed: float = 0.0  # tokens per second
    memory: float = 0.0  # MB
    positions: list[float] = field(default_factory=list)  # bits per byte in each quarter of the context
    updates: dict[str, list[float]] = field(default_factory=dict)  # group -> update/weight at each moment

    def loss(self, tokens: float) -> float:
        """Mean loss of the steps around this number of tokens."""
        near = [loss for seen, loss in self.losses if abs(seen - tokens) <= WINDOW * tokens]
        return fmean(near) if near else min(self.losses, key=lambda step: abs(step[0] - tokens))[1]


def compared(folder: Path, state: State) -> list[str]:
    """A legend, the incumbent and the last experiments with traces, a line each, oldest first; [] without any."""
    if not state.incumbent or not (folder / "runs").is_dir():
        return []
    runs = [record for record in read(folder / "journal.jsonl") if record["event"] == "run"]
    last = [e for e in state.tried_out if e.runs and not (e.spoiled or e.skipped)][-EXPERIMENTS:]
    lines = [line for e in last for line in _line(folder, runs, e, state.experiments[e.parent])]
    own = traces(folder / "runs" / next((r["run"] for r in runs if r["run"].startswith(_prefix(state.incumbent))), ""))
    return [LEGEND, _standing(own), *lines] if lines else []


def traces(run: Path) -> Traces:
    """What a run left on disk."""
    trained, score = (_record(run / name) for name in ("train.json", "score.json"))
    losses = []
    for line in read_bytes(run / "steps.jsonl", STEPS_BYTES).splitlines():
        step = _parsed(line)
        if _number(step.get("tokens")) and _number(step.get("loss")):
            losses.append((step["tokens"], step["loss"]))
    updates = trained.get("updates")
    known = {key: _numbers(values) for key, values in (updates if isinstance(updates, dict) else {}).items()}
    return Traces(
        losses,
        trained["tokens_per_second"] if _number(trained.get("tokens_per_second")) else 0.0,
        trained["peak_memory_mb"] if _number(trained.get("peak_memory_mb")) else 0.0,
        _numbers(score.get("positions")),
        {key: values for key, values in known.items() if NAME.fullmatch(key) and values},
    )


def _line(folder: Path, runs: list[dict[str, Any]], e: Experiment, parent: Experiment) -> Iterator[str]:
    """The experiment against its incumbent at the same seed, if both left traces."""
    at_seed = {r["seed"]: r["run"] for r in runs if r["run"].startswith(_prefix(parent)) and r["status"] == "ok"}
    own = [r for r in runs if r["run"].startswith(_prefix(e)) and r["status"] != "invalid" and r["seed"] in at_seed]
    if not own:
        return
    mine, theirs = traces(folder / "runs" / own[0]["run"]), traces(folder / "runs" / at_seed[own[0]["seed"]])
    if parts := list(_differences(mine, theirs)):
        yield f"{e.id:4d} {'; '.join(parts)}"


def _differences(mine: Traces, theirs: Traces) -> Iterator[str]:
    if mine.losses and theirs.losses:
        most = min(mine.losses[-1][0], theirs.losses[-1][0])
        yield "loss " + " ".join(f"{mine.loss(share * most) - theirs.loss(share * most):+.3f}" for share in SHARES)
    if mine.speed and theirs.speed:
        yield f"speed x{mine.speed / theirs.speed:.2f}"
    if mine.memory and theirs.memory:
        yield f"memory x{mine.memory / theirs.memory:.2f}"
    if mine.positions and len(mine.positions) == len(theirs.positions):
        changes = (a - b for a, b in zip(mine.positions, theirs.positions, strict=True))
        yield "context " + " ".join(f"{change:+.3f}" for change in changes)
    if mine.updates and theirs.updates:
        largest = [group for at, group in enumerate(mine.updates) if at < LARGEST or group not in theirs.updates]
        changed = sorted(largest, key=lambda group: -_distance(mine.updates[group], theirs.updates.get(group)))
        shown = [f"{group} {_ratios(mine.updates[group], theirs.updates.get(group))}" for group in changed[:UPDATES]]
        yield f"updates {', '.join(shown)}"


def _standing(own: Traces) -> str:
    """The incumbent's own numbers."""
    parts = []
    if own.losses:
        most = own.losses[-1][0]
        parts.append("loss " + " ".join(f"{own.loss(share * most):.3f}" for share in SHARES))
        parts.append(f"{most / 1e6:.2f} M tokens")
    parts += [f"speed {own.speed:.0f}"] * bool(own.speed) + [f"memory {own.memory:.0f} MB"] * bool(own.memory)
    parts += ["context " + " ".join(f"{value:.3f}" for value in own.positions)] * bool(own.positions)
    shown = [f"{group} {_ratios(values, None)}" for group, values in list(own.updates.items())[: 2 * UPDATES]]
    parts += [f"updates {', '.join(shown)}"] * bool(shown)
    return f"incumbent {'; '.join(parts)}"


def _ratios(mine: list[float], theirs: list[float] | None) -> str:
    own = "/".join(f"{value:.2g}" for value in mine)
    return own if theirs is None else f"{own} (was {'/'.join(f'{value:.2g}' for value in theirs)})"


def _distance(mine: list[float], theirs: list[float] | None) -> float:
    """How much a group's updates changed; a group that the incumbent does not have comes first."""
    if not theirs or len(mine) != len(theirs):
        return math.inf
    return max(abs(math.log((a + 1e-9) / (b + 1e-9))) for a, b in zip(mine, theirs, strict=True))


def _prefix(e: Experiment) -> str:
    return f"e{e.id:04d}-"


def _record(path: Path) -> dict[str, Any]:
    return _parsed(read_bytes(path, RECORD_BYTES))


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def _numbers(values: Any) -> list[float]:
    return values[:8] if isinstance(values, list) and all(map(_number, values)) else []
