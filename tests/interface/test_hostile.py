"""Hostile texts of models, files and people, and a person's own paths and names, in everything that is shown or sent.

The texts go through the real proposal, journal, state and outputs."""

import html.parser
import io
import json
import re
import warnings
from types import SimpleNamespace

import pytest
from experiment import SOURCE, briefing
from rich.console import Console

from lab import files
from lab.agents.briefing import brief, outcome, row
from lab.agents.model import _menu_prompt
from lab.errors import UserError
from lab.interface import doctor, export, report
from lab.interface.dashboard import View, summary
from lab.loop.journal import Journal
from lab.loop.proposal import Proposal
from lab.loop.source import set_constant
from lab.preset import load, to_dict
from lab.training.run import guarded
from lab.trial.runner import Runner

TEXTS = {
    "script": "<script>alert(1)</script>",
    "end": "</script></pre></table><svg/onload=alert(1)>",
    "attribute": "\" onmouseover=\"alert(1)' onload='alert(1)",
    "url": "javascript:alert(1) <a href=javascript:alert(1)>x",
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b1m",
    "return": "good\rbad",
    "rtl": "\u202egnp.exe\u202c \u2066a\u2069 \u200f",
    "nul": "a\0b\x08c",
    "long": "y" * 20_000,
    "markup": "[/INST] [red]x[/red] :smile: {0} %s $x$ ${title}",
    "cells": "a\tb\nc\td",
    "lines": "a\x85b\u2028c\u2029d\x0be",
    "cjk": "学习率 عربي 🐶",
    "half": "\ud800",
    "template": "$title $$ ${rows}",
    "formula": '=HYPERLINK("x")',
}
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
NIGHT = {"preset": to_dict(load("offline")), "minutes": 5.0}


def a_night(folder, text: str) -> Journal:
    """A night in which everything that may be text is this text."""
    journal = Journal(folder)
    journal.record("start", tag="t", commit="b" * 40)
    for number, status in enumerate(("keep", "keep", "discard", "crash")):
        proposal = Proposal("", text, text, {"form": "set", "values": {"DTYPE": text}, "was": {"DTYPE": text}})
        marks = {"commit": f"{number:040x}", "source": "", "fingerprint": f"f{number}", "nodes": 9}
        journal.record("proposal", id=number, **proposal.record, **marks)
        common = {"delta": -0.01, "error": 0.001, "sigma": 0.01, "pair": 0.001, "near_miss": status == "discard"}
        common |= {"standing": None, "seed": 1, "who": "candidate", "reason": text}
        journal.record("verdict", id=number, verdict="again", **common)
        ok = status != "crash"
        journal.record("run", id=number, who="candidate", run=f"e{number:04d}-r1", seed=1, memory_gb=1.0, minutes=5.0,
                       status="ok" if ok else "crash", val_bpb=1.0 - 0.01 * number if ok else None, reason=text,
                       before={"flops": 1e11, "slept": 0.0, "power": text},
                       after={"flops": 1e11, "slept": 0.0, "power": text})  # fmt: skip
        if ok:
            journal.record("verdict", id=number, verdict=status, **common)
        journal.record({"keep": "kept", "discard": "discarded", "crash": "crashed"}[status], id=number, reason=text)
    journal.record("refused", agent=text, hypothesis=text, fingerprint="f9", reason=text)
    journal.write_results()
    return journal


@pytest.fixture(params=TEXTS)
def text(request) -> str:
    return TEXTS[request.param]


@pytest.fixture
def journal(tmp_path, text) -> Journal:
    return a_night(tmp_path / "n", text)


def test_results_status_and_panel_are_lines_of_printable_text(journal):
    rows = (journal.folder / "results.tsv").read_bytes().decode().split("\n")[:-1]
    assert [len(line.split("\t")) for line in rows] == [5] * 5
    runner = SimpleNamespace(phase=SimpleNamespace(name="", run_dir=None, since=0.0))
    night = SimpleNamespace(folder=journal.folder, journal=journal, idea="", suggestions=None, stop=lambda: "",
                            agent=SimpleNamespace(name="x"), runner=runner)  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system=None).print(View(night, None, Console()).panel())
    for line in (*rows, *summary(night.folder, night.journal.state).split("\n"), *out.getvalue().split("\n")):
        assert line.replace("\t", "").isprintable()
        assert len(line) < 500


def test_briefings_are_lines_of_printable_text(journal, text):
    state = journal.state
    told = brief(state, NIGHT, SOURCE, refused=text).render(20_000)
    source = set_constant(SOURCE, "DTYPE", text.encode("utf-8", "replace").decode())
    menu = _menu_prompt(briefing(source=source), briefing(source=source).menu(), [], 4000)
    for line in (*told.split("\n"), *menu.split("\n"), *(row(outcome(e)) for e in state.experiments)):
        assert line.isprintable()
        assert len(line) < 2000


class Page(html.parser.HTMLParser):
    """The elements of a page, and the attributes that run code or load something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.active = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            loads = name in ("src", "href", "action", "srcset") and not (value or "").startswith(
                "data:image/png;base64,"
            )
            self.active += [(tag, name)] * (name.startswith("on") or loads)


def test_a_report_has_the_same_elements_whatever_the_texts_are(tmp_path, text, monkeypatch):
    monkeypatch.setattr(report, "picture", lambda *_: b"\x89PNG")  # tested below; most of the time
    pages = []
    for name, words in (("plain", "wider"), ("hostile", text)):
        lines = {number: [f"# {words} {number}", "x = 1"] for number in range(4)}
        monkeypatch.setattr(report, "_sources", lambda _, lines=lines: lines)
        pages.append(report.page(report.collect(a_night(tmp_path / name, words).folder), None))
        (tmp_path / f"{name}.html").write_text(pages[-1], encoding="utf-8")
    plain, hostile = map(Page, pages)
    assert hostile.tags == plain.tags
    assert hostile.active == plain.active == []
    assert UNSEEN.findall(pages[1]) == []


def test_a_plot_shows_any_text_without_a_word(tmp_path, text, capsys):
    journal = a_night(tmp_path / "n", text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.picture(journal.state, "a$b_c^$").startswith(b"\x89PNG")
    assert capsys.readouterr() == ("", "")


def test_an_error_is_one_printable_line(text, capsys):
    def fail(standalone_mode: bool) -> None:
        raise UserError(f"{text}: cannot be read")

    with pytest.raises(SystemExit) as ended:
        guarded(SimpleNamespace(main=fail))
    assert str(ended.value).startswith("error: ")
    assert str(ended.value).isprintable()
    assert len(str(ended.value)) < 5100


def test_a_finding_of_the_doctor_is_printable(text):
    told = doctor.as_text(doctor.Finding("warning", "ollama", text, text)).plain
    assert told.replace("\n", "", 1).isprintable()


def test_an_exported_readme_and_configuration_hold_any_name(text):
    others = dict.fromkeys(("score", "parameters", "dtypes", "bos", "token", "merges", "context", "vocabulary"), "")
    told = export.README.format(name=export.title(text), **others)
    assert UNSEEN.findall(told) == []
    assert told.startswith("# ")
    told.encode()


# ---- what a person did not choose to tell


def test_a_failure_names_no_folder_of_the_users(prepared, tmp_path, monkeypatch):
    """A real child that fails with a path in its message, as in a traceback of Python or of MLX."""
    home = tmp_path / "alice-secret"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(files, "ROOT", home / "autoresearch")
    settings = json.loads((prepared.parents[1] / "current.json").read_text()) | {"minutes": 1.0}
    (folder := home / "autoresearch" / "nights" / "n").mkdir(parents=True)
    runner = Runner(folder, folder, settings, "none")
    reason = runner.preflight(f"open({str(home / 'data')!r})\n")
    assert "FileNotFoundError" in reason
    assert "'~/data'" in reason
    assert "alice" not in reason
    reason = runner.preflight("import os\nraise ValueError(os.getcwd())\n")
    assert "/nights/n/runs/preflight" in reason
    assert "alice" not in reason
