"""The time that a run gets besides its budget."""

import pytest
from conftest import ROOT
from finished_run import prepare, record

from lab.trial import runner
from lab.trial.runner import Runner

SLOW = "import time\ntime.sleep(30)\n"


@pytest.fixture
def at_work(tmp_path):
    return Runner(tmp_path / "night", ROOT, record(*prepare(["The cat sat."])), "none")


def test_a_train_py_cannot_give_itself_time_by_a_slow_start(at_work, monkeypatch):
    """A run may take twice its preflight besides the budget; so a preflight may not take as long as it likes."""
    monkeypatch.setattr(runner, "SLACK_SECONDS", 1.0)
    at_work.folder.mkdir()
    (at_work.folder / runner.QUICKEST).write_text("0.2")
    assert at_work.preflight(SLOW).startswith("timeout: still running after 1.6 s")
    assert at_work.start_limit() == pytest.approx(1.6)


def test_the_first_preflight_of_a_night_may_be_slow(at_work):
    assert at_work.start_limit() == runner.PREFLIGHT_SECONDS
