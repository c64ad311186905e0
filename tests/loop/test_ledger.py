"""The ledger over nights: what is written, and how little a wrong one costs."""

import dataclasses
import random

import pytest
from experiment import SETTINGS, briefing
from simulated import begin

from lab.agents.evidence import Tried
from lab.agents.memory import MISSES, suggestions
from lab.agents.search import Search
from lab.errors import UserError
from lab.loop import ledger
from lab.loop.history import Experiment
from lab.loop.ledger import Effect
from lab.loop.source import fingerprint

HERE = ("tinystories", "M4")


def line(number: int, change: float, night: str = "old", verdict: str = "keep", **values) -> Effect:
    was = {"DEPTH": 4, "MATRIX_LR": 0.02, "FINAL_LR": 0.05}
    return Effect(night, number, "2026-11-01", *HERE, verdict, values, was, change, change - 1e-4, change + 1e-4, 4)


def trusted(*lines: Effect) -> list[tuple[Effect, float]]:
    return [(one, one.trust(*HERE)) for one in lines]


def test_a_night_writes_its_changes_of_constants_and_keeps_those_of_other_nights(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.agents.ideas.draw", lambda *_: None)
    night = begin(tmp_path)
    path = night.folder.parent / ledger.FILE
    other = line(1, -0.01, DEPTH=5)
    ledger.update(path, "old", [other])
    night.go(2)
    first, *mine = ledger.read(path)
    assert first == other
    settled = night.journal.state.experiments[1:]
    assert [one.id for one in mine] == [e.id for e in settled] == [1, 2]
    for one, e in zip(mine, settled, strict=True):
        assert one.values == e.edit["values"]
        assert one.effect == pytest.approx(e.delta, abs=1e-6)
        assert one.high - one.low == pytest.approx(2 * 1.96 * e.error, abs=2e-6)
        assert (one.runs, one.night, one.verdict) == (len(e.results), "n", e.status)
    path.unlink()  # forgotten: only the night at hand is written again
    night.go(1)
    assert {one.night for one in ledger.read(path)} == {"n"}


def test_an_idea_has_a_line_and_lines_of_before_have_none(tmp_path):
    tried = Experiment(
        1,
        "search",
        "idea squash: it claims",
        "c" * 40,
        "",
        5,
        {"form": "code", "definitions": ["f"], "ideas": ["squash"]},
    )
    tried.status, tried.delta, tried.error, tried.parent = "discard", 0.004, 0.001, 0
    code = dataclasses.replace(tried, id=2, hypothesis="squash, and more")
    path = tmp_path / ledger.FILE
    ledger.update(path, "n", ledger.effects("n", *HERE, [dataclasses.replace(tried, id=0, baseline=True), tried, code]))
    (found,) = ledger.read(path)
    assert (found.id, found.values, found.ideas, found.effect) == (1, {}, ("squash",), 0.004)
    path.write_text(path.read_text().replace(', "ideas": ["squash"]', ""))
    assert ledger.read(path)[0].ideas == ()
    assert list(suggestions([(found, 1.0)], ())) == []


def test_a_line_keeps_its_day(tmp_path):
    path = tmp_path / ledger.FILE
    ledger.update(path, "old", [line(1, -0.01, DEPTH=5)])
    ledger.update(path, "old", [dataclasses.replace(line(1, -0.012, DEPTH=5), date="2027-01-01")])
    assert [(one.date, one.effect) for one in ledger.read(path)] == [("2026-11-01", -0.012)]


@pytest.mark.parametrize("text", ["{}\n", "not json\n", '{"night": "a", "more": 1}\n'])
def test_a_damaged_line_is_named(tmp_path, text):
    path = tmp_path / ledger.FILE
    ledger.update(path, "old", [line(1, -0.01, DEPTH=5)])
    path.write_text(path.read_text() + text)
    with pytest.raises(UserError, match=r"line 2 is damaged; remove the line, or the file"):
        ledger.read(path)


def test_what_was_found_elsewhere_counts_less():
    assert line(1, -0.01).trust(*HERE) == 1
    assert line(1, -0.01).trust("tinystories", "M1") == line(1, -0.01).trust("fineweb", "M4") == 0.5
    assert line(1, -0.01).trust("fineweb", "M1") == 0.25


MEMORY = trusted(
    line(1, -0.004, DEPTH=5), line(2, 0.002, verdict="discard", DEPTH=6), line(3, -0.003, MATRIX_LR=0.03),
    line(4, -0.001, DEPTH=6),
)  # fmt: skip


def test_the_whole_of_an_earlier_night_comes_first_then_its_clear_gains():
    assert list(suggestions(MEMORY, ())) == [
        ("old", {"DEPTH": 6, "MATRIX_LR": 0.03}),
        ("old", {"DEPTH": 5}),
        ("old", {"MATRIX_LR": 0.03}),
        ("old", {"DEPTH": 6}),
    ]
    proposal = Search().propose(briefing(1, memory=MEMORY))
    assert proposal.edit["values"] == {"DEPTH": 6, "MATRIX_LR": 0.03}
    assert proposal.edit["memory"] == "old"


def test_a_kept_suggestion_settles_its_night():
    kept = Tried(1, "", "keep", -0.01, {"form": "set", "values": {}, "was": {}, "memory": "old"})
    assert list(suggestions(MEMORY, (kept,))) == []
    assert len(list(suggestions([*MEMORY, *trusted(line(1, -0.001, "older", DEPTH=7))], (kept,)))) == 2


def test_a_wrong_memory_costs_a_few_experiments():
    names = ("MATRIX_LR", "EMBEDDING_LR", "SCALAR_LR", "MOMENTUM", "FINAL_LR", "WARMDOWN")
    draw = random.Random(0)
    lines = trusted(*(line(n, -0.001 * n, **{name: draw.uniform(0.01, 0.4)}) for n, name in enumerate(names, 1)))
    history, marks, remembered = (), frozenset(), 0
    for number in range(1, 8):
        proposal = Search().propose(briefing(number, history=history, tried=marks, memory=lines))
        remembered += "memory" in proposal.edit
        history += (Tried(number, "", "discard", 0.01, proposal.edit),)
        marks |= {fingerprint(proposal.source, SETTINGS)}
    assert remembered == MISSES


def test_values_that_do_not_fit_the_experiment_are_left_out():
    odd = trusted(line(1, -0.01, DEPTH="x"), line(2, -0.01, GONE=3), line(3, -0.01, WIDTH=100))
    proposal = Search().propose(briefing(1, memory=odd))
    assert "memory" not in proposal.edit or set(proposal.edit["values"]) <= {"DEPTH", "WIDTH"}
    assert proposal.edit["values"].get("WIDTH") != 100  # HEAD_DIM does not divide it


def test_the_briefing_shows_the_largest_clear_effects():
    unclear = dataclasses.replace(line(5, -0.5, DEPTH=9), high=0.1)
    elsewhere = dataclasses.replace(line(6, -0.02, FINAL_LR=0.1), machine="M1")
    text = briefing(1, memory=trusted(*(one for one, _ in MEMORY), unclear, elsewhere)).render(5000)
    assert "-0.00400 (-0.00410 to -0.00390) DEPTH 4 -> 5 [night old]" in text
    assert "FINAL_LR 0.05 -> 0.1 [night old, on another task or machine]" in text
    assert "-> 9" not in text
