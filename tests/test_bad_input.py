"""Bad input is one line with its cause and what to do, and is never stored."""

import json

import click
import numpy as np
import pytest
from checkout import Checkout
from conftest import refusal

from lab.errors import UserError
from lab.interface.sample import choose
from lab.show import MINUTES
from lab.training.clock import Clock
from lab.training.run import guarded

RUN = ("agent_loop.py", "run", "--agent", "search", "--max-experiments", 0, "--tag")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("text", ["nan", "inf", "1e300", "-0", "-nan", "-inf", "1e999", "0x1"])
def test_invalid_numbers_of_minutes(text):
    with pytest.raises(click.BadParameter):
        MINUTES.convert(text, None, None)


@pytest.mark.parametrize("command", [("train.py",), (*RUN, "wrong")], ids=["train", "agent"])
def test_invalid_minutes_are_refused_and_not_stored(checkout, command):
    done = checkout.python(*command, "--minutes=nan", check=False)
    assert done.returncode == 2
    assert "Error: Invalid value for '--minutes'" in done.stderr
    assert not (checkout.folder / "nights" / "wrong").exists()


def test_a_budget_shorter_than_a_step_is_one_line(checkout):
    line = refusal(checkout.python("train.py", "--minutes", "1e-12", check=False))
    assert line == "error: 1e-12 minutes end before the first step; increase --minutes"


def test_steps_count_however_short_the_minutes_are():
    assert list(Clock(1e-12, 3)) == [0, 1, 2]


DAMAGED = {"empty": "", "list": "[]", "cut": '{"preset": {'}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_settings_of_a_night_are_one_line(checkout, content):
    path = checkout.folder / "nights" / "damaged" / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    line = refusal(checkout.python(*RUN, "damaged", check=False))
    assert line.endswith("settings.json is damaged; restore it, or choose another --tag")


def test_invalid_minutes_in_settings_of_a_night_are_one_line(checkout):
    path = checkout.folder / "nights" / "timeless" / "settings.json"
    path.parent.mkdir(parents=True)
    record = json.loads((checkout.cache / "current.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"minutes": float("nan")}), encoding="utf-8")
    assert "is damaged" in refusal(checkout.python(*RUN, "timeless", check=False))


@pytest.mark.parametrize("temperature", ["nan", "inf"])
def test_a_temperature_that_is_not_finite_is_refused(checkout, temperature):
    done = checkout.python("prepare.py", "sample", f"--temperature={temperature}", check=False)
    assert done.returncode == 2
    assert "Error: Invalid value for '--temperature'" in done.stderr


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_an_extreme_temperature_gives_a_token(temperature):
    logits = np.array([1.0, 2.0, 3.0])
    assert choose(logits, temperature, 2, np.random.default_rng(0)) in (1, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_one_line(value):
    with pytest.raises(UserError, match="not finite"):
        choose(np.array([0.0, value]), 0.8, 0, np.random.default_rng(0))


@pytest.mark.parametrize("command", [("score", "runs/latest"), ("sample",), ("clean", "--runs", "x")], ids=str)
def test_a_link_to_itself_is_refused_as_a_run(checkout, command):
    (checkout.folder / "runs").mkdir(exist_ok=True)
    latest = checkout.folder / "runs" / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to("latest")
    done = checkout.python("prepare.py", *command, check=False)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    assert "rror: " in done.stderr


def test_a_bug_keeps_its_traceback_and_says_what_to_attach(cache, capsys, monkeypatch):
    @click.command()
    def broken() -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("sys.argv", ["prepare.py"])
    with pytest.raises(ZeroDivisionError):
        guarded(broken)
    assert f"this is a bug; report it where you cloned this from (git remote -v) and attach {cache}/bug.txt" in (
        capsys.readouterr().err
    )
    assert "ZeroDivisionError: of ours" in (cache / "bug.txt").read_text(encoding="utf-8")
