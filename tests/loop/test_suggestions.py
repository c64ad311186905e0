"""A person's hand on a night: suggestions are taken next and exactly once, a skip ends the experiment at hand."""

import json
import subprocess

import pytest
from checkout import git
from conftest import ROOT, Script, refusal
from processes_left import needs_proc, none_left
from rich.console import Console
from simulated import begin
from test_stop import begun, night

import agent_loop
from lab.agents.briefing import brief
from lab.agents.hybrid import Hybrid
from lab.agents.propose import propose
from lab.agents.search import Search
from lab.errors import UserError
from lab.interface.dashboard import View, summary
from lab.interface.plot import picture
from lab.interface.report import collect, page, suggestions
from lab.loop.journal import HEADER, Journal, read
from lab.loop.proposal import Proposal, describe, title
from lab.loop.source import set_constant
from lab.loop.suggestions import ask_to_skip
from lab.loop.suggestions import read as understood
from lab.trial.runner import Measured, Phase, Skipped

DEEPER = {"form": "set", "values": {"DEPTH": 6}, "was": {"DEPTH": 4}}
SOURCE = (ROOT / "train.py").read_text()


@pytest.fixture
def quiet(tmp_path):
    """A night with its baseline, whose runs all score 1."""
    n = begin(tmp_path)
    n.said = []
    n.log = n.said.append
    n.runner.run = lambda name, source, seed: Measured("ok", 1.0, 0.1, 5.0, "")
    assert n.go(0) == "done"
    return n


def suggest(n, text: str) -> None:
    n.suggestions.add(understood(text))


def rows(n) -> list[str]:
    return (n.folder / "results.tsv").read_text().removeprefix(HEADER).splitlines()


# ---- how a suggestion is read


CONSTANTS = ("MATRIX_LR=0.03", "MATRIX_LR = 0.03, DEPTH=3", "adam_betas=(0.8, 0.9)", "WINDOW=SL;TOKENS_PER_STEP=2**13")
WORDS = ("a longer warm-down", "MATRIX_LR", "try DEPTH=3", "is DEPTH == 3 best?")


@pytest.mark.parametrize(
    ("text", "form"), [*((text, "constants") for text in CONSTANTS), *((text, "words") for text in WORDS)]
)
def test_a_suggestion_is_constants_or_words(text, form):
    assert understood(text).form == form


@pytest.mark.parametrize(
    ("text", "reason"), [(" ", "is empty"), ("gone.patch", "gone.patch is missing"), ("so " * 400, "at most 500")]
)
def test_a_suggestion_that_is_neither_is_one_line(text, reason):
    with pytest.raises(UserError, match=reason):
        understood(text)


@pytest.mark.parametrize(
    ("edit", "why", "shown"),
    [(DEEPER, "because", "DEPTH 4 -> 6: because"),
     (DEEPER, "sampled: DEPTH from 4 to 6", "DEPTH 4 -> 6: sampled"),
     ({"form": "code", "definitions": ["MLP"]}, "changed MLP", "MLP"),
     ({"form": "code", "definitions": []}, "why\nnot", "top level: why not"),
     (None, "baseline", "baseline")],
)  # fmt: skip
def test_the_edit_comes_first_and_the_reason_after_it(edit, why, shown):
    assert title(edit, why) == shown


# ---- taken next, judged as any other


def test_constants_are_taken_next_and_shown_everywhere(quiet):
    suggest(quiet, "MATRIX_LR=0.031 DEPTH=3")
    suggest(quiet, "ROPE_BASE=1234.0")
    assert quiet.go(3) == "done"
    first, second, third = quiet.journal.state.experiments[1:]
    assert (first.agent, first.edit["values"]) == ("suggestion", {"DEPTH": 3, "MATRIX_LR": 0.031})
    assert (second.agent, second.edit["values"], third.agent) == ("suggestion", {"ROPE_BASE": 1234.0}, "search")
    assert first.status in ("keep", "discard")
    assert first.results
    what = "MATRIX_LR 0.02 -> 0.031: suggested"
    assert any(line.startswith("experiment 1: DEPTH 4 -> 3, MATRIX_LR") and what in line for line in quiet.said)
    assert rows(quiet)[1].endswith(what)
    assert git(quiet.branch.repository, "log", "-1", "--format=%s", first.commit).endswith(what)
    assert what in page(collect(quiet.folder), None).replace("&gt;", ">")
    assert quiet.suggestions.waiting({}) == quiet.suggestions.refused() == []


def test_an_idea_is_suggested_by_its_name(quiet):
    assert understood("averaged_weights").form == "idea"
    suggest(quiet, "averaged_weights")
    assert quiet.go(1) == "done"
    taken = quiet.journal.state.experiments[1]
    assert (taken.agent, taken.edit["ideas"], taken.title) == (
        "suggestion", ["averaged_weights"], "idea averaged_weights: suggested"
    )  # fmt: skip


def patch(n, change) -> str:
    """A patch of the incumbent's train.py as `diff -u` writes it."""
    old, new = n.folder / "old.py", n.folder / "new.py"
    old.write_text(SOURCE)
    new.write_text(change(SOURCE))
    return subprocess.run(["diff", "-u", old, new], capture_output=True, text=True, check=False).stdout


def squared_to_cubed(source: str) -> str:
    return source.replace("return self.down(relu_squared(self.up(x)))", "return self.down(self.up(x) ** 3)")


@pytest.mark.parametrize("kind", ["wider.patch", "mine.py"])
def test_a_file_is_what_it_was_when_it_was_suggested(quiet, tmp_path, kind):
    file = tmp_path / kind
    file.write_text(patch(quiet, squared_to_cubed) if kind == "wider.patch" else squared_to_cubed(SOURCE))
    suggest(quiet, str(file))
    file.write_text("changed since")
    quiet.go(1)
    done = quiet.journal.state.experiments[1]
    assert quiet.branch.source(done.commit) == squared_to_cubed(SOURCE)
    assert rows(quiet)[1].endswith(f"MLP: suggested: {file}")


class Model:
    """An agent that reads words."""

    name = "ollama"

    def __init__(self):
        self.wishes = []

    def propose(self, briefing):
        self.wishes.append(briefing.wish)
        assert briefing.wish in briefing.render(20_000)
        source = set_constant(briefing.source, "WARMDOWN", 0.7)
        return Proposal(source, "more decay", self.name, describe(source, briefing.source, briefing.settings))

    def tell(self, proposal, outcome):
        pass


def test_words_go_to_the_model_whoever_has_the_turn(quiet):
    model = Model()
    quiet.agent = Hybrid(Search(), model, share=0.0)
    suggest(quiet, "a longer warm-down")
    quiet.go(1)
    assert model.wishes == ["a longer warm-down"]
    done = quiet.journal.state.experiments[1]
    assert (done.agent, done.title.partition(": ")[2]) == ("ollama", "suggested: a longer warm-down; more decay")


def test_the_panel_says_what_is_next(quiet):
    quiet.runner.phase = Phase()
    view = View(quiet, None, Console(width=100))
    assert "next" not in dict(view.rows())
    suggest(quiet, "DEPTH=3")
    suggest(quiet, "a longer warm-down")
    assert dict(view.rows())["next"] == "suggested: DEPTH=3 (and 1 more)"


# ---- refused


REFUSED = {
    "LEARNING=3": "has no constant LEARNING; it has: ",
    "DEPTH=4": "changes nothing",
    "DEPTH=deep": "DEPTH must be int, not str",
    "HEAD_DIM=100": "does not divide",
    "SEED=3": "no constant SEED",
    "a longer warm-down": "no model reads words in this night",
}


def test_refused_suggestions_are_moved_with_their_reasons_and_the_night_goes_on(quiet):
    for text in REFUSED:
        suggest(quiet, text)
    quiet.go(1)
    assert quiet.journal.state.experiments[1].agent == "search"
    assert quiet.suggestions.waiting({}) == []
    refused = {each.text: each.reason for each in quiet.suggestions.refused()}
    assert list(refused) == list(REFUSED)
    shown, reported = summary(quiet.folder, quiet.journal.state), suggestions(collect(quiet.folder))
    for text, reason in REFUSED.items():
        assert reason in refused[text]
        assert f"suggested, refused: {text} ({refused[text]})" in shown
        assert any(reason in line for line in reported)


def test_a_patch_of_another_text_or_of_several_files_is_refused(quiet, tmp_path):
    other = patch(quiet, lambda source: source.replace("DEPTH = ", "DEPTHS = "))
    (tmp_path / "a.patch").write_text(other.replace("DEPTH = ", "HEIGHT = "))
    (tmp_path / "b.patch").write_text(other + other)
    for name in ("a", "b"):
        suggest(quiet, str(tmp_path / f"{name}.patch"))
    quiet.go(1)
    reasons = [refused.reason for refused in quiet.suggestions.refused()]
    assert "does not fit the incumbent's train.py" in reasons[0]
    assert "several files" in reasons[1]


def test_a_damaged_file_does_not_end_the_night(quiet):
    suggest(quiet, "DEPTH=3")
    [path] = (quiet.folder / "suggestions").glob("*.json")
    path.write_text("{half")
    quiet.go(1)
    assert "damaged" in quiet.suggestions.refused()[0].reason


# ---- exactly once


@pytest.mark.parametrize(
    ("moment", "text"),
    [("in the checks", "DEPTH=3"), ("before the journal", "DEPTH=3"), ("after the journal", "DEPTH=3"),
     ("after the journal", "LEARNING=3")],
)  # fmt: skip
def test_a_kill_neither_loses_nor_repeats_a_suggestion(quiet, monkeypatch, moment, text):
    def killed(*_, **__):
        raise KeyboardInterrupt

    suggest(quiet, text)
    with monkeypatch.context() as patched:
        if moment == "before the journal":
            patched.setattr(quiet.journal, "record", killed)
        elif moment == "after the journal":
            patched.setattr(quiet.suggestions, "settle", lambda taken: taken and killed())
        else:
            patched.setattr("lab.agents.propose.proposed", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet.go(1)
    quiet.journal = Journal(quiet.folder)
    quiet.go(2 - len(quiet.journal.state.settled))
    events = [record for record in read(quiet.journal.path) if record.get("suggestion")]
    assert [record["event"] for record in events] == ["refused" if text.startswith("LEARN") else "proposal"]
    assert len(quiet.suggestions.refused()) == (text == "LEARNING=3")
    assert quiet.suggestions.waiting({}) == []


def test_try_leaves_suggestions_to_the_night(quiet):
    suggest(quiet, "DEPTH=3")
    alone = agent_loop.Night(quiet.folder, quiet.branch, quiet.journal, quiet.runner, "full", Search(), quiet.log)
    alone.go(1, final=False)
    assert quiet.journal.state.experiments[1].agent == "search"
    assert len(quiet.suggestions.waiting(quiet.journal.state.suggestions)) == 1


# ---- skip


def test_a_skipped_experiment_is_discarded_and_its_runs_stay(quiet):
    def run(name, source, seed):
        if name.startswith("e0001-r2"):
            ask_to_skip(quiet.folder, 1, "skipped: too slow")
            assert quiet.runner.ended()
            raise Skipped
        return Measured("ok", 0.9 if name.startswith("e0001") else 1.0, 0.1, 5.0, "")

    quiet.runner.run = run
    quiet.go(2)
    skipped, after = quiet.journal.state.experiments[1:]
    assert (skipped.status, skipped.reason, len(skipped.results)) == ("discard", "skipped: too slow", 1)
    assert after.status in ("keep", "discard")
    assert not after.skipped
    assert Journal(quiet.folder).state.experiments[1] == skipped
    assert rows(quiet)[1].split("\t")[3] == "discard"
    assert quiet.journal.state.head() == quiet.journal.state.incumbent.commit
    assert brief(quiet.journal.state, quiet.runner.settings, "").history[0].verdict == "invalid"  # nothing was learnt
    assert skipped.fingerprint in quiet.journal.state.tried


def test_an_experiment_skipped_before_its_first_run_has_no_number(quiet):
    ask_to_skip(quiet.folder, 1, "skipped")
    quiet.go(1)
    assert quiet.journal.state.experiments[1].runs == 0
    assert rows(quiet)[1].split("\t")[1:4] == ["0.000000", "0.0", "discard"]
    assert picture(quiet.journal.state, "n", narrow=True)


def test_a_skip_of_another_experiment_ends_nothing(quiet):
    ask_to_skip(quiet.folder, 7, "skipped")
    (quiet.folder / "suggestions").mkdir()
    quiet.go(1)
    assert not quiet.journal.state.experiments[1].skipped
    (quiet.folder / "skip.json").write_text("{half")
    assert quiet.skip_reason() == ""


def test_neither_the_baseline_nor_a_settled_experiment_can_be_skipped(quiet, tmp_path):
    with pytest.raises(ValueError, match="does not follow"):
        quiet.journal.record("skipped", id=0, reason="skipped")
    (tmp_path / "other").mkdir()
    journal = Journal(tmp_path / "other")
    journal.record("start", tag="t", commit="b" * 40)
    given = {"commit": "c" * 40, "source": "", "fingerprint": "f", "nodes": 9}
    journal.record("proposal", id=0, agent="none", hypothesis="baseline", **given)
    with pytest.raises(ValueError, match="does not follow"):
        journal.record("skipped", id=0, reason="skipped")


@needs_proc
def test_skip_ends_the_run_at_once_and_leaves_no_process(tmp_path):
    folder, seconds = tmp_path / "repo/nights/n", "100 if 'e0001' in __import__('os').getcwd() else 0.1"
    with night(tmp_path, seconds, ("--max-experiments", 1), stdout=subprocess.PIPE) as process:
        begun(tmp_path, "e0001-r1")
        ask_to_skip(folder, 1, "skipped: seen enough")
        shown, _ = process.communicate(timeout=60)
    assert b"experiment 1: skipped: seen enough" in shown
    assert none_left(tmp_path)
    assert "done" not in (tmp_path / "runs/e0001-r1/run.log").read_text()
    assert [e.status for e in Journal(folder).state.experiments] == ["keep", "discard"]


# ---- the commands


@pytest.fixture
def commands(quiet, monkeypatch, capsys):
    """`agent_loop.py ARGUMENTS` on the quiet night, in this process; returns what it printed."""
    monkeypatch.setattr("lab.loop.session.NIGHTS", quiet.folder.parent)
    monkeypatch.setattr("lab.agents.suggested.ROOT", quiet.branch.repository)
    settings = {"preset": quiet.runner.settings["preset"], "minutes": 5.0, "prepared": "p"}
    (quiet.folder / "settings.json").write_text(json.dumps(settings))

    def call(*arguments: str) -> str:
        agent_loop.command.main(arguments, standalone_mode=False)
        return capsys.readouterr().out

    return call


def test_suggest_says_what_it_understood_and_refuses_what_cannot_be(quiet, commands):
    assert commands("suggest", "DEPTH=3") == "night n: DEPTH=3: constants, taken when the night is resumed\n"
    assert "words" in commands("suggest", "--tag", "n", "a longer warm-down")
    assert "suggested, waiting: a longer warm-down" in commands("status")
    for text, reason in (("DEPT=3", "no constant DEPT"), ("DEPTH=4", "changes nothing"), ("x.patch", "is missing")):
        with pytest.raises(UserError, match=reason):
            commands("suggest", text)
    assert [each.text for each in quiet.suggestions.waiting({})] == ["DEPTH=3", "a longer warm-down"]


def test_skip_says_what_it_ends(quiet, commands):
    with pytest.raises(UserError, match="no experiment at hand"):
        commands("skip")
    quiet.stop = lambda: "stopped"
    propose(quiet)
    shown = commands("skip", "-m", "seen enough")
    title = quiet.journal.state.pending.title
    assert shown == f"night n: experiment 1 ({title}) ends when the night is resumed\n"
    assert quiet.skip_reason() == "skipped: seen enough"


def test_a_night_that_is_not_there_is_one_line(script: Script):
    for command in (("suggest", "DEPTH=3"), ("skip",)):
        assert "there is no night" in refusal(script("agent_loop.py", *command, "--tag", "never-was"))
