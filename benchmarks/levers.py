"""Whether a local model picks the right lever more often when it is told numbers (lab/agents/compared.py).

    python benchmarks/levers.py record [--minutes 0.3] [--only NAME]     once: two short runs of every case
    python benchmarks/levers.py ask [--model NAME] [--base-url URL] [--draws 3] [--only NAME]

A case is a train.py with one known fault, the incumbent of a night, and one experiment on it that changes nothing that
matters. `record` trains both with the same seed on what `make prepare` prepared last. `ask` asks the model for the next
change, from the usual menu, with and without the numbers of these runs. Right is a change of a constant of the case in
the direction that undoes its fault; chance is the share of right entries in the menus. Writes levers.json (`right` of
`with` and `without`, `chance`, `valid`, `repeats`) to benchmarks/out; the records are beside it.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from lab.agents.briefing import Briefing, NoProposal, Tried, task_line  # noqa: E402
from lab.agents.choose import choose_agent  # noqa: E402
from lab.agents.compared import compared  # noqa: E402
from lab.errors import UserError  # noqa: E402
from lab.files import ROOT, write_atomic  # noqa: E402
from lab.loop.journal import Journal  # noqa: E402
from lab.loop.source import constants, fingerprint, set_constant  # noqa: E402
from lab.preset import from_dict  # noqa: E402
from lab.training.run import recorded  # noqa: E402
from lab.trial.runner import Runner  # noqa: E402

OUT = ROOT / "benchmarks" / "out"
NEUTRAL = {"ROPE_BASE": 12_000.0}  # the experiment beside the incumbent
# Case -> its fault (constant -> factor, or a value for a text or a share), and the direction that undoes it: -1 lower.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "matrix rate too high": ({"MATRIX_LR": 6.0}, {"MATRIX_LR": -1}),
    "matrix rate too low": ({"MATRIX_LR": 0.15}, {"MATRIX_LR": 1}),
    "embedding rate too high": ({"EMBEDDING_LR": 8.0}, {"EMBEDDING_LR": -1}),
    "embedding rate too low": ({"EMBEDDING_LR": 0.1}, {"EMBEDDING_LR": 1}),
    "head's rate too low": ({"UNEMBEDDING_LR": 0.1}, {"UNEMBEDDING_LR": 1}),
    "too few steps": ({"TOKENS_PER_STEP": 8.0}, {"TOKENS_PER_STEP": -1}),
    "too few tokens: deep": ({"DEPTH": 4.0}, {"DEPTH": -1, "WIDTH": -1, "MLP_RATIO": -1}),
    "too few tokens: wide": ({"MLP_RATIO": 4.0}, {"MLP_RATIO": -1, "WIDTH": -1, "DEPTH": -1}),
    "model too small": ({"MLP_RATIO": 0.25}, {"MLP_RATIO": 1, "WIDTH": 1, "DEPTH": 1}),
    "a gate that does nothing": ({"SMEAR_LR": 0.0001}, {"SMEAR_LR": 1}),
    "scalars that do not move": ({"SCALAR_LR": 0.0001}, {"SCALAR_LR": 1}),
    "attention too soft": ({"QK_SCALE": 0.1}, {"QK_SCALE": 1}),
    "logits bounded too tightly": ({"SOFTCAP": 0.1}, {"SOFTCAP": 1}),
    "rate never falls": ({"FINAL_LR": "1.0"}, {"FINAL_LR": -1}),
}


def settings() -> dict[str, Any]:
    found = recorded()
    if found is None:
        raise UserError("nothing is prepared yet; run `make prepare PRESET=tinystories` first")
    return found | {"steps": None, "minutes": found.get("minutes") or found["preset"]["task"]["minutes"]}


def changed(source: str, changes: dict[str, Any], known: dict[str, Any]) -> str:
    """`source` with constants multiplied by a factor, or set to the value in a text."""
    for name, change in changes.items():
        now = constants(source, known)[name].value
        new = type(now)(json.loads(change)) if isinstance(change, str) else type(now)(max(now * change, 1e-9))
        source = set_constant(source, name, max(new, 1) if isinstance(now, int) else new)
    return source


def sources(case: str, known: dict[str, Any]) -> tuple[str, str]:
    """train.py with the fault, and the experiment on it."""
    faulty = changed((ROOT / "train.py").read_text(encoding="utf-8"), CASES[case][0], known)
    name, value = next(iter(NEUTRAL.items()))
    return faulty, set_constant(faulty, name, value)


def record(case: str, minutes: float) -> None:
    """A journal with the incumbent and one experiment, each run once with seed 1."""
    folder, record = OUT / "levers" / case.replace(" ", "-").replace(":", ""), settings() | {"minutes": minutes}
    known = from_dict(record["preset"]).settings()
    if (folder / "journal.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, ROOT, record, "none")
    values = []
    for number, source in enumerate(sources(case, known)):
        runner.preflight(source)
        values.append(runner.run(f"e{number:04d}-r1", source, 1))
        print(f"{case}: {values[-1].status} {values[-1].val_bpb} {values[-1].reason}", flush=True)
    journal = Journal(folder)
    journal.record("start", tag="levers", commit="0" * 40)
    for number, (measured, closing) in enumerate(zip(values, ("kept", "discarded"), strict=True)):
        given = {"commit": "0" * 40, "source": "", "fingerprint": str(number), "nodes": 1}
        journal.record("proposal", id=number, agent="search", hypothesis="neutral", **given)
        journal.record("run", id=number, who="candidate", run=f"e{number:04d}-r1", seed=1, **vars(measured))
        verdict = {"verdict": "keep" if closing == "kept" else "discard", "delta": 0.0, "sigma": 0.007}
        if measured.status == "ok":
            journal.record("verdict", id=number, who="candidate", near_miss=False, reason="", **verdict)
            journal.record(closing, id=number)
        else:
            journal.record("crashed", id=number, reason=measured.reason)


def briefings(case: str, draw: int) -> Iterator[tuple[str, Briefing]]:
    """The same briefing with and without numbers."""
    folder, record = OUT / "levers" / case.replace(" ", "-").replace(":", ""), settings()
    known, state = from_dict(record["preset"]).settings(), Journal(folder).state
    faulty, neutral = sources(case, known)
    name, value = next(iter(NEUTRAL.items()))
    edit = {"form": "set", "values": {name: value}, "was": {name: constants(faulty, known)[name].value}}
    told = Briefing(
        number=2 + draw,
        source=faulty,
        settings=known,
        program=(ROOT / "program.md").read_text(encoding="utf-8"),
        task=task_line(record),
        value=state.incumbent.val_bpb if state.incumbent else None,
        history=[Tried(1, "", "discard", 0.0, edit)],
        measured=compared(folder, state),
        tried=frozenset({fingerprint(neutral, known)}),
    )
    yield "with", told
    yield "without", replace(told, measured=())


def right(case: str, briefing: Briefing, values: dict[str, Any]) -> bool:
    """Whether a change undoes the fault."""
    [(name, value)] = values.items()
    direction = CASES[case][1].get(name, 0)
    return direction * (value - briefing.constants()[name].value) > 0 if direction else False


def ask(model: str, base_url: str, cases: list[str], draws: int) -> dict[str, Any]:
    agent = choose_agent("openai" if base_url else "ollama", model, "", 0.3, print, base_url)
    found: dict[str, list[bool]] = {"with": [], "without": []}
    valid, repeats, chances = [], 0, []
    for case in cases:
        picked: dict[str, set[str]] = {"with": set(), "without": set()}
        for draw in range(draws):
            arms = list(briefings(case, draw))
            random.Random(f"{case} {draw}").shuffle(arms)  # neither arm is always the warm one
            for arm, briefing in arms:
                menu = [(name, value) for name, values in briefing.menu().items() for value in values]
                chances.append(fmean(right(case, briefing, {name: value}) for name, value in menu))
                try:
                    values = agent.propose(briefing).edit["values"]
                except NoProposal as reason:
                    print(f"{case}, {arm}: {reason}")
                    valid.append(False)
                    found[arm].append(False)
                    continue
                valid.append(True)
                repeats += str(values) in picked[arm]
                picked[arm].add(str(values))
                found[arm].append(right(case, briefing, values))
                print(f"{case}, {arm}: {values} {'right' if found[arm][-1] else ''}", flush=True)
    shares = {arm: f"{sum(hits)} of {len(hits)}" for arm, hits in found.items()}
    return {"right": shares, "chance": fmean(chances), "valid": f"{sum(valid)} of {len(valid)}", "repeats": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "ask"))
    parser.add_argument("--minutes", type=float, default=0.3, help="of training per run")
    parser.add_argument("--model", default="", help="the local model; the most capable one by default")
    parser.add_argument("--base-url", default="", help="a server with OpenAI's protocol in place of Ollama")
    parser.add_argument("--draws", type=int, default=3, help="questions about each case, with and without numbers")
    parser.add_argument("--only", choices=CASES, help="one case")
    options = parser.parse_args()
    cases = [options.only] if options.only else list(CASES)
    try:
        if options.what == "record":
            for case in cases:
                record(case, options.minutes)
            return
        result = ask(options.model, options.base_url, cases, options.draws)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_atomic(OUT / "levers.json", json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
