"""What a night needs before its first experiment."""

import os
from datetime import datetime

import pytest

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
