"""Ideas as proposals: which are left, who draws them, and how they stand in briefing, menu and history."""

import dataclasses
import json
import sys

import pytest
from experiment import SETTINGS, SOURCE, briefing, outcome
from ollama_server import OllamaServer

from lab.agents import ideas as drawn
from lab.agents.answers import parse_answer
from lab.agents.briefing import Tried, brief, row
from lab.agents.choose import choose_agent
from lab.agents.command import Command
from lab.agents.memory import MISSES
from lab.agents.model import IDEAS, LocalModel
from lab.agents.ollama_client import Server
from lab.agents.search import Search
from lab.errors import UserError
from lab.loop import ideas as idea_files
from lab.loop.history import Experiment, State
from lab.loop.ledger import Effect
from lab.loop.proposal import describe
from lab.loop.source import Rejected, fingerprint, set_constant
from lab.preset import load as load_preset
from lab.preset import to_dict

NAMES = [f"idea{number}" for number in range(6)]
FILE = """claim = "claim of {0}"
cost = "none"
source = "2401.00001"
{1}
add = "GAIN_{0} = 2.0  # of the rate"

[[change]]
in = "main"
before = "run(build_model, rate, ROWS, TOKENS_PER_STEP)"
code = "rate = rate * GAIN_{0}"
"""


@pytest.fixture
def known(tmp_path):
    """Six ideas; the last excludes the first."""
    for name in NAMES:
        text = FILE.format(name.upper(), 'excludes = ["idea0"]' if name == "idea5" else "")
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    ideas, errors = idea_files.load_all(tmp_path)
    assert errors == []
    return ideas


def alone(number: int, name: str, verdict: str = "discard") -> Tried:
    return Tried(number, f"idea {name}: why", verdict, 0.01, {"form": "code", "definitions": ["main"], "ideas": [name]})


def left(brief) -> list[str]:
    return [idea.name for idea in brief.untried_ideas()]


def test_what_was_tried_refused_kept_or_excluded_is_not_offered_again(known):
    assert left(briefing(ideas=known)) == NAMES
    tried = [alone(1, "idea1"), alone(2, "idea2", "crash"), alone(3, "idea3", "invalid")]
    together = Tried(4, "", "discard", 0.1, {"form": "code", "definitions": ["main"], "ideas": ["idea3", "idea4"]})
    assert left(briefing(ideas=known, history=(*tried, together))) == ["idea0", "idea3", "idea4", "idea5"]
    refused = fingerprint(idea_files.apply(SOURCE, ["idea3"], known), SETTINGS)
    assert left(briefing(ideas=known, tried=frozenset({refused}))) == [n for n in NAMES if n != "idea3"]
    kept = idea_files.apply(SOURCE, ["idea0"], known)
    assert left(briefing(ideas=known, source=kept)) == ["idea1", "idea2", "idea3", "idea4"]
    gone = SOURCE.replace("run(build_model, rate, ROWS, TOKENS_PER_STEP)", "run(build_model)")
    assert left(briefing(ideas=known, source=gone)) == []


def test_search_draws_its_share_of_ideas_each_once_and_as_a_function_of_briefing_and_seed(known):
    history, proposals = [], []
    for number in range(1, 46):
        now = briefing(number, ideas=known, history=tuple(history))
        proposal = Search(seed=1).propose(now)
        assert proposal.source == Search(seed=1).propose(now).source
        history.append(outcome(number, proposal))
        proposals.append(proposal)
    ideas = [p for p in proposals if "ideas" in p.edit]
    assert sorted(name for p in ideas for name in p.edit["ideas"]) == NAMES
    first = ideas[0]
    assert first.agent == "search"
    assert first.hypothesis == f"idea {first.edit['ideas'][0]}: claim of {first.edit['ideas'][0].upper()}"
    assert proposals.index(ideas[2]) > 3  # not all at once
    assert [p.source for p in proposals if p not in ideas][:3]  # constants in between


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 30), (1.0, 100)])
def test_the_share_of_draws(known, share, count):
    drawings = [drawn.draw(briefing(number, ideas=known), 0, share) for number in range(1, 101)]
    assert abs(len([d for d in drawings if d]) - count) <= (12 if 0 < share < 1 else 0)
    assert drawn.draw(briefing(1), 0, 1.0) is None  # without ideas


def remembered(name: str, change: float, night: str = "old") -> tuple[Effect, float]:
    low, high = change - 1e-3, change + 1e-3
    return Effect(night, 1, "2026-11-01", "task", "M4", "keep", {}, {}, change, low, high, 4, (name,)), 1.0


def test_what_gained_in_earlier_nights_comes_at_once_and_what_lost_there_last(known):
    memory = [remembered("idea3", -0.003), remembered("idea1", -0.009), remembered("idea2", 0.02),
              remembered("idea4", -0.0005)]  # fmt: skip
    history, proposals = [], []
    for number in range(1, 9):
        now = briefing(number, ideas=known, history=tuple(history), memory=memory)
        proposals.append(drawn.draw(now, 0, 1.0))
        history += [outcome(number, proposals[-1], "keep")] if proposals[-1] else []
        if number < 3:
            assert drawn.draw(now, 0, 0.0).source == proposals[-1].source
    order = [name for p in proposals if p for name in p.edit["ideas"]]
    assert order[:2] == ["idea1", "idea3"]
    assert order[-1] == "idea2"
    assert sorted(order) == NAMES
    assert [p.edit.get("memory") for p in proposals[:3]] == ["old", "old", None]
    assert "-0.00900 (-0.01000 to -0.00800) idea idea1 [night old]" in briefing(1, memory=memory).render(5000)


def test_ideas_that_earlier_nights_praised_wrongly_cost_a_few_experiments(known):
    memory, history = [remembered(name, -0.01) for name in NAMES], []
    for number in range(1, 7):
        proposal = drawn.draw(briefing(number, ideas=known, history=tuple(history), memory=memory), 0, 0.0)
        history += [outcome(number, proposal, "discard")] if proposal else []
    assert len(history) == MISSES


def test_several_ideas_are_one_proposal_and_what_does_not_fit_is_refused(known):
    both = drawn.proposal(briefing(ideas=known), ["idea1", "idea2"], "search")
    assert both.edit == {"form": "code", "definitions": ["main"], "ideas": ["idea1", "idea2"]}
    assert both.hypothesis == "idea idea1, idea2: claim of IDEA1; claim of IDEA2"
    with pytest.raises(Rejected, match="idea idea5 cannot be combined with idea0"):
        drawn.proposal(briefing(ideas=known), ["idea0", "idea5"], "search")
    with pytest.raises(Rejected, match="there is no idea other"):
        drawn.proposal(briefing(ideas=known), ["other"], "search")


def test_an_edit_that_has_an_idea_says_so_whoever_made_it(known):
    kept = idea_files.apply(SOURCE, ["idea0"], known)
    edit = describe(idea_files.apply(kept, ["idea1"], known), kept, SETTINGS, known)
    assert edit["ideas"] == ["idea1"]
    assert "ideas" not in describe(set_constant(SOURCE, "DEPTH", 5), SOURCE, SETTINGS, known)
    assert row(Tried(3, "idea idea1: claim", "keep", -0.01, edit)) == "   3 keep     -0.01000 [idea idea1]"
    assert row(Tried(3, "faster", "keep", -0.01, edit)) == "   3 keep     -0.01000 [idea idea1] faster"


def test_the_briefing_names_ideas_in_its_bound_and_files_that_are_none(known):
    wide = briefing(ideas=known, idea_errors=["ideas/x.toml: claim must be one line"], history=(alone(1, "idea2"),))
    text = wide.render(8000)
    assert "idea1: claim of IDEA1" in text
    assert "idea2: claim" not in text
    assert "ideas/x.toml: claim must be one line" in text
    many = dataclasses.replace(wide, ideas={name: dataclasses.replace(i, claim="c" * 190) for name, i in known.items()})
    short = many.render(2000)
    assert "idea0, idea1, idea3, idea4, idea5" in short
    assert len(short.encode()) / 2.5 <= 2000
    assert "Ideas" not in briefing().render(8000)


def test_a_small_model_picks_an_idea_from_its_menu(known):
    server = OllamaServer(answer=lambda request: json.dumps({"reason": "new", "change": pick(request)}))

    def pick(request) -> str:
        offered.extend(request["format"]["properties"]["change"]["enum"])
        return next(entry for entry in offered if entry.startswith("idea = "))

    offered: list[str] = []
    try:
        agent = LocalModel(Server(server.url, patience=1.0, answer_seconds=1.0, log=print))
        proposal = agent.propose(briefing(ideas=known))
    finally:
        server.stop()
    names = [entry.split("'")[1] for entry in offered if entry.startswith("idea = ")]
    assert len(names) == IDEAS
    assert proposal.edit["ideas"] == names[:1]
    assert proposal.hypothesis == "new"
    prompt = server.chats()[0]["messages"][-1]["content"]
    assert all(f"idea = '{name}': claim of {name.upper()}" in prompt for name in names)
    assert "not tried yet" not in prompt


@pytest.mark.parametrize("change", ["idea = 'idea1'", "idea = idea0", "idea = 'nothing'"])
def test_an_idea_that_is_not_on_the_menu_is_refused(known, change):
    with pytest.raises(Rejected, match="not on the menu"):
        parse_answer(json.dumps({"change": change}), "menu", SOURCE, SETTINGS, {"idea": ["idea0"]}, ideas=known)


def test_a_coding_command_finds_the_files_of_the_ideas(tmp_path, known):
    code = """
import pathlib, tomllib
idea = tomllib.loads(pathlib.Path("ideas/idea3.toml").read_text())
path = pathlib.Path("train.py")
text = path.read_text().replace("NAMES = [", idea["add"] + "\\nNAMES = [")
path.write_text(text.replace("    run(", "    " + idea["change"][0]["code"] + "\\n    run("))
"""
    script = tmp_path / "apply.py"
    script.write_text(code)
    proposal = Command(f"{sys.executable} {script}").propose(briefing(ideas=known))
    assert proposal.edit["ideas"] == ["idea3"]


def test_the_briefing_of_a_night_has_the_ideas_of_the_checkout(known, tmp_path, monkeypatch):
    monkeypatch.setattr(idea_files, "FOLDER", tmp_path)
    (tmp_path / "bad.toml").write_text("claim = 3\n")
    baseline = Experiment(0, "none", "baseline", "c", "f", 1, baseline=True, status="keep")
    night = {"preset": to_dict(load_preset("offline")), "minutes": 5}
    now = brief(State(experiments=[baseline]), night, SOURCE)
    assert list(now.ideas) == NAMES
    assert now.idea_errors == [f"{tmp_path.name}/bad.toml: claim must be one line of at most 200 characters"]


def test_a_damaged_file_is_an_error_before_a_night_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(idea_files, "FOLDER", tmp_path)
    (tmp_path / "bad.toml").write_text("claim = 3\n")
    with pytest.raises(UserError) as error:
        choose_agent("search", "", "", 0.3, print)
    text = f"{tmp_path.name}/bad.toml: claim must be one line of at most 200 characters; fix or remove the file"
    assert str(error.value) == text


def test_drawing_is_spread_over_seeds(known):
    first = {drawn.draw(briefing(1, ideas=known), seed, 1.0).edit["ideas"][0] for seed in range(20)}
    assert len(first) >= 4
