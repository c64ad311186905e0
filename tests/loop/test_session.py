"""What a night needs before its first experiment."""

import os
from datetime import datetime

import pytest
from conftest import edit
from simulated import begin

from lab.errors import UserError
from lab.loop import session
from lab.loop.session import tonight


@pytest.mark.parametrize(
    ("last", "now", "tag"),
    [
        ("2026-11-23 23:50", "2026-11-24 00:30", "nov23"),  # the machine restarted after midnight: the night is resumed
        ("2026-11-23 08:00", "2026-11-24 00:30", "nov24"),
        ("2026-11-24 06:30", "2026-11-24 22:00", "nov24"),
        (None, "2026-11-24 00:30", "nov24"),
    ],
)
def test_the_default_tag_is_todays_or_that_of_the_night_running_past_midnight(tmp_path, last, now, tag):
    if last:
        journal = tmp_path / "nov23" / "journal.jsonl"
        journal.parent.mkdir()
        journal.touch()
        os.utime(journal, 2 * (datetime.fromisoformat(last).timestamp(),))
    now = datetime.fromisoformat(now)
    assert tonight(tmp_path, now) == tag
    (tmp_path / "nov24").mkdir()
    assert tonight(tmp_path, now) == "nov24"


@pytest.fixture
def night(tmp_path, prepared, monkeypatch):
    """A night of two experiments, and a function that opens it again, as the next command does."""
    n = begin(tmp_path)
    n.rigor = "none"  # the fewest runs
    n.go(2)
    monkeypatch.setattr(session, "ROOT", n.branch.repository)
    n.reopen = lambda: session.open_night(n.folder, preset=None, minutes=None, sandbox="none")
    n.reopen()
    return n


def test_opening_a_night_mends_what_follows_from_its_journal(night):
    results = (night.folder / "results.tsv").read_text()
    (night.folder / "results.tsv").write_text("commit\n")
    for leftover in (night.folder / ".settings.json.1.tmp", night.folder / "results" / ".e0001-r1.json.1.tmp"):
        leftover.touch()
    night.reopen()
    assert (night.folder / "results.tsv").read_text() == results
    assert list(night.folder.rglob(".*.tmp")) == []


@pytest.mark.parametrize("lines", [0, 1, 9])
def test_a_journal_that_lost_its_end_is_named(night, lines):
    """An older copy would give the results of its missing experiments to other changes."""
    whole = night.journal.path.read_bytes().splitlines(keepends=True)
    night.journal.path.write_bytes(b"".join(whole[:lines]))
    with pytest.raises(UserError, match=r"journal\.jsonl has no run e000\d-r\d"):
        night.reopen()
    assert night.journal.path.read_bytes() == b"".join(whole[:lines])
    night.journal.path.write_bytes(b"".join(whole[:-2]))  # a kill before the verdict
    night.reopen()


def test_settings_of_a_night_with_a_flipped_bit_are_named(night):
    path = night.folder / "settings.json"
    whole = path.read_text()
    changed = whole.replace('"matrix_lr": 0.03', '"matrix_lr": 0.07')
    assert changed != whole
    path.write_text(changed)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        night.reopen()
    edit(path)
    night.reopen()


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_a_night_whose_branch_is_lost_is_opened_at_the_journals_commit(night, how):
    reference = night.branch.repository / ".git/refs/heads/autoresearch/n"
    reference.unlink() if how == "deleted" else reference.write_text("")
    branch, journal, _ = night.reopen()
    branch.reset(journal.state.head())
    assert branch.head == journal.state.head()
