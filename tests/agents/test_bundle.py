"""Small changes tested together: the design, and how the search works through it."""

import dataclasses
import itertools
import json

import pytest
from experiment import SETTINGS, SOURCE, briefing
from simulated import SimulatedBench, begin

from lab.agents.bundle import ROWS, Design, latest, near_misses
from lab.agents.evidence import Tried
from lab.agents.search import Search
from lab.loop.source import fingerprint, set_constant

CHANGES = [{f"C{place}": True} for place in range(ROWS)]
EFFECTS = [-0.001 if place in (1, 4, 5, 9) else 0.0005 for place in range(ROWS)]


def missed(number: int, name: str, was, value) -> Tried:
    edit = {"form": "set", "values": {name: value}, "was": {name: was}}
    return Tried(number, "", "discard", -0.0005, edit, 0.0004)


NEAR_MISSES = (
    missed(1, "MATRIX_LR", 0.02, 0.025),
    missed(2, "BETAS", (0.8, 0.95), (0.8, 0.97)),
    missed(3, "FINAL_LR", 0.05, 0.1),
)


def test_every_change_is_in_half_of_the_rows_and_every_pair_in_a_quarter():
    rows = [set(row) for row, addition in Design(CHANGES).steps() if addition]
    assert len(rows) == ROWS
    for one, other in itertools.combinations([name for change in CHANGES for name in change], 2):
        assert sum(one in row for row in rows) == 6
        assert sum({one, other} <= row for row in rows) == 3


@pytest.mark.parametrize("count", [7, 9, 11])
def test_what_looks_good_is_what_is_better(count):
    design = Design(CHANGES[:count])
    measured = {
        number: sum(effect for change, effect in zip(CHANGES, EFFECTS, strict=True) if change.keys() & row.keys())
        for number, (row, addition) in enumerate(design.steps())
        if addition
    }
    good = Design(CHANGES[:count], measured).good()
    assert good == [CHANGES[place] for place in (1, 4, 5, 9) if place < count]


def play(history: tuple[Tried, ...], tried: frozenset[str], count: int) -> list:
    """The next proposals; every run is as good as the number of constants it changes."""
    proposals = []
    for number in range(len(history) + 1, len(history) + 1 + count):
        proposal = Search().propose(briefing(number, history=history, tried=tried))
        edit = json.loads(json.dumps(proposal.edit))  # as read from the journal
        history += (Tried(number, proposal.hypothesis, "discard", -1e-4 * len(edit["values"]), edit, 0.001),)
        tried |= {fingerprint(proposal.source, SETTINGS)}
        proposals.append(proposal)
    return proposals


def test_near_misses_start_a_design_that_ends_in_one_proposal_and_goes_on_after_an_interruption():
    proposals = play(NEAR_MISSES, frozenset(), ROWS + 2)
    screened = [proposal for proposal in proposals if "screen" in proposal.edit]
    changes = screened[0].edit["screen"]["changes"]
    assert proposals[: len(screened)] == screened
    assert len(screened) in (ROWS - 1, ROWS)  # a row that is impossible is left out
    assert changes[:3] == [{"MATRIX_LR": 0.025}, {"BETAS": (0.8, 0.97)}, {"FINAL_LR": 0.1}]
    bundle = proposals[len(screened)]
    assert "screen" not in bundle.edit
    assert set(bundle.edit["values"]) <= {name for change in changes for name in change}
    assert len(bundle.edit["values"]) >= 5  # all of them were good


def test_a_kept_change_ends_a_design_and_uses_up_its_near_misses():
    edit = Search().propose(briefing(4, history=NEAR_MISSES)).edit
    started = (*NEAR_MISSES, Tried(4, "", "discard", 0.001, edit, 0.001))
    assert latest(started).following == 1
    kept = Tried(5, "", "keep", -0.01, {"form": "set", "values": {"DEPTH": 5}, "was": {"DEPTH": 4}})
    assert latest((*started, kept)) is None
    assert near_misses((*started, kept)) == near_misses(started) == []
    assert len(near_misses(NEAR_MISSES)) == 3


def test_a_row_of_a_design_runs_once_and_is_not_kept_however_good_it_looks(tmp_path):
    class Good(SimulatedBench):
        def run(self, name, source, seed):
            measured = super().run(name, source, seed)
            return measured if name.startswith("e0000") else dataclasses.replace(measured, val_bpb=0.8)

    class Screening:
        name = "search"

        def propose(self, brief):
            proposal = Search().propose(brief)
            addition = {"screen": {"row": 10, "changes": [{"DEPTH": 5}]}} if brief.number == 1 else {}
            return dataclasses.replace(proposal, edit=proposal.edit | addition)

        def tell(self, proposal, outcome):
            pass

    night = begin(tmp_path)
    night.runner, night.agent = Good(), Screening()
    night.go(2)
    _, screened, other = night.journal.state.experiments
    assert (screened.status, screened.runs, screened.near_miss) == ("discard", 1, False)
    assert screened.edit["screen"]["row"] == 10
    assert (other.status, other.runs) != ("discard", 1)


def test_a_design_leaves_the_source_valid():
    proposal = Search().propose(briefing(4, history=NEAR_MISSES))
    source = SOURCE
    for name, value in proposal.edit["values"].items():
        source = set_constant(source, name, value)
    assert fingerprint(source, SETTINGS) == fingerprint(proposal.source, SETTINGS)
