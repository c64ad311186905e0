"""What is read of a curve that an experiment wrote."""

import json
import os

import pytest

from lab.trial.curve import read_curve


def test_a_curve_and_its_speed(tmp_path):
    path = tmp_path / "steps.jsonl"
    steps = [{"seconds": max(0.0, 0.5 * i - 1), "tokens": 100 * i, "loss": 7.0 - i / 10} for i in range(1, 41)]
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    curve = read_curve(path)
    assert len(curve.seconds) == len(curve.tokens) == len(curve.loss) == 40
    assert curve.speed == pytest.approx(200.0)
    assert 8 <= len(read_curve(path, 10).loss) <= 12


@pytest.mark.parametrize("lines", [b"", b"{}\n", b'{"seconds": 1, "tokens": 5, "loss": 2}\n' * 5, b"\xff\n[1]\nnull\n"])
def test_without_steps_there_is_no_speed(tmp_path, lines):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(lines)
    assert read_curve(path).speed is None
    assert read_curve(tmp_path / "missing").speed is None


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1e300", '"x"', "null", "[]"])
def test_values_that_are_no_measurements_are_skipped(tmp_path, value):
    path = tmp_path / "steps.jsonl"
    good = '{"seconds": 1.0, "tokens": 5, "loss": 2.0}\n'
    path.write_text(f'{good}{{"seconds": 1.0, "tokens": {value}, "loss": 2.0}}\n{good}')
    assert len(read_curve(path).loss) == 2


def test_links_are_not_followed(tmp_path):
    (tmp_path / "real").write_text('{"seconds": 1.0, "tokens": 5, "loss": 2.0}\n')
    os.symlink(tmp_path / "real", tmp_path / "steps.jsonl")
    assert len(read_curve(tmp_path / "steps.jsonl").loss) == 0
