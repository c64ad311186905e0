"""The search: its candidates, what it learns from a history, and the Gaussian process that ranks them."""

import dataclasses
import random

import numpy as np
import pytest
from conftest import ROOT
from experiment import SETTINGS, SOURCE, briefing, night

from lab.agents.briefing import Briefing, NoProposal
from lab.agents.evidence import Tried, failures, results
from lab.agents.gaussian import Gaussian, expected_gain
from lab.agents.search import Search
from lab.loop import space
from lab.loop.source import constants, fingerprint, set_constant
from lab.preset import load

CURRENT = {name: item.value for name, item in constants(SOURCE, SETTINGS).items()}


def tried(number: int, verdict: str, delta: float | None, **changes: tuple) -> Tried:
    """An experiment; each change is (value before, value)."""
    values, was = ({name: pair[i] for name, pair in changes.items()} for i in (1, 0))
    return Tried(number, "", verdict, delta, {"form": "set", "values": values, "was": was})


# proposals


def test_search_changes_one_constant_at_first_then_up_to_six_and_never_repeats():
    proposals = night(Search(seed=1), 30, lambda values: (0.001, "discard"))
    sizes = [len(proposal.edit["values"]) for proposal in proposals]
    assert set(sizes[:8]) == {1}
    assert {1, 2, 3} < set(sizes) <= {1, 2, 3, 4, 6}
    assert all(proposal.agent == "search" for proposal in proposals)


def test_the_first_changes_of_the_projects_own_train_py_are_sizes():
    settings = load("offline").settings()
    source = (ROOT / "train.py").read_text()
    first = {
        name
        for seed in range(40)
        for name in Search(seed, startup=99).propose(Briefing(1, source, settings)).edit["values"]
    }
    assert first == {"DEPTH", "WIDTH", "MLP_RATIO", "ROWS", "TOKENS_PER_STEP", "WINDOW"}


def test_search_is_a_function_of_briefing_and_seed():
    def judge(values):
        return values["MATRIX_LR"], "discard"

    first, second = night(Search(seed=4), 13, judge), night(Search(seed=4), 13, judge)
    assert [p.source for p in first] == [p.source for p in second]
    assert [p.source for p in night(Search(seed=5), 3, judge)] != [p.source for p in first[:3]]
    again = Search(seed=4).propose(briefing(1, attempt=1))
    assert again.source != first[0].source


def test_search_prefers_the_side_that_paid():
    one = "MATRIX_LR = 0.02  # Muon\n\n\ndef build_model(v):\n    return MATRIX_LR\n\n\ndef main():\n    pass\n"
    history = [
        tried(number, "discard", 0.02 - value, MATRIX_LR=(0.02, value))
        for number, value in enumerate([0.01, 0.013, 0.016, 0.025, 0.032, 0.04] * 2, 1)
    ]
    brief = Briefing(13, one, {}, history=tuple(history))
    chosen = [Search(seed).propose(brief).edit["values"]["MATRIX_LR"] for seed in range(20)]
    assert sum(value > 0.02 for value in chosen) >= 16


def test_search_puts_gains_together_that_are_too_small_alone():
    """Four constants gain 0.001 each when they move up; the verdict sees only 0.003."""
    up = {"MATRIX_LR": 0.022, "EMBEDDING_LR": 0.33, "FINAL_LR": 0.06, "WEIGHT_DECAY": 0.12}

    def judge(values):
        delta = -0.001 * sum(values[name] > level for name, level in up.items())
        return delta, "keep" if delta < -0.0025 else "discard"

    deltas = [judge({**CURRENT, **p.edit["values"]})[0] for p in night(Search(seed=3), 30, judge)]
    assert min(deltas[:8]) > -0.0015
    assert min(deltas) < -0.0025


def test_search_stays_away_from_a_crash():
    def judge(values):
        return (None, "crash") if values["WIDTH"] > 256 else (0.001, "discard")

    crashes = [p for p in night(Search(seed=2), 30, judge) if p.edit["values"].get("WIDTH", 0) > 256]
    assert len(crashes) <= 3


def test_search_runs_dry_with_a_reason():
    source = "TIED = False  # one switch\n\n\ndef build_model(v):\n    return TIED\n\n\ndef main():\n    pass\n"
    brief = Briefing(1, source, {})
    proposal = Search().propose(brief)
    marks = frozenset({fingerprint(proposal.source, {})})
    with pytest.raises(NoProposal):
        Search().propose(dataclasses.replace(brief, tried=marks))
    with pytest.raises(NoProposal):
        Search().propose(Briefing(1, source.replace("TIED", "Tied"), {}))


def test_search_lives_with_experiments_of_others():
    history = (
        Tried(1, "structure", "keep", -0.1, {"form": "code", "definitions": ["MLP"]}),
        tried(2, "discard", 0.1, OLD_NAME=(2, 3)),
        Tried(3, "type", "discard", 0.1, {"form": "set", "values": {"DEPTH": "x", "TIED": 5}, "was": {}}),
        tried(4, "discard", float("nan"), DEPTH=(4, 5)),
        Tried(5, "none", "crash", None, None),
        tried(6, "invalid", -9.0, DEPTH=(4, 5)),
        tried(7, "discard", 0.01, BETAS=((0.8, 0.95), (0.8, 0.95, 0.9))),
        tried(8, "discard", 0.01, FINAL_LR=(0.05, 7.0)),
        *(tried(number, "discard", 0.01, MATRIX_LR=(0.02, 0.001 * number)) for number in range(9, 14)),
    )
    assert Search().propose(briefing(14, history=history)).edit["form"] == "set"


# what a history says


def test_results_are_relative_to_todays_incumbent():
    history = (
        tried(1, "discard", 0.004, DEPTH=(3, 2)),
        tried(2, "keep", -0.01, DEPTH=(3, 4)),
        tried(3, "crash", None, WIDTH=(256, 512)),
        tried(4, "discard", 0.002, MATRIX_LR=(0.02, 0.04)),
    )
    found = results(history, CURRENT)
    changed = [({n: v for n, v in r.values.items() if v != CURRENT[n]}, r.delta) for r in found]
    assert changed == [
        ({"MATRIX_LR": 0.04}, 0.002), ({"WIDTH": 512}, None), ({}, 0.0), ({"DEPTH": 2}, 0.014), ({"DEPTH": 3}, 0.01),
    ]  # fmt: skip


def test_memory_that_was_short_stays_short_for_what_is_larger():
    [failed] = failures(results((tried(1, "crash", None, WIDTH=(256, 512), MATRIX_LR=(0.02, 0.03)),), CURRENT))
    assert failed.excludes({**CURRENT, "WIDTH": 512})
    assert failed.excludes({**CURRENT, "WIDTH": 640, "DEPTH": 5})
    assert not failed.excludes({**CURRENT, "WIDTH": 512, "ROWS": 4})
    assert not failed.excludes({**CURRENT, "MATRIX_LR": 0.03})


def test_a_failure_of_rates_excludes_what_goes_further():
    [failed] = failures(results((tried(1, "crash", None, MATRIX_LR=(0.02, 0.2)),), CURRENT))
    assert failed.excludes({**CURRENT, "MATRIX_LR": 0.3, "DEPTH": 2})
    assert not failed.excludes({**CURRENT, "MATRIX_LR": 0.1})


def test_a_finished_run_contradicts_a_failure():
    history = (tried(1, "crash", None, WIDTH=(256, 320)), tried(2, "discard", 0.1, WIDTH=(256, 512)))
    assert failures(results(history, CURRENT)) == []


# steps


@pytest.mark.parametrize("reach", [0.25, 1.0, 2.5])
def test_a_step_is_another_value_of_the_same_type_and_its_size_grows_with_the_reach(reach):
    draw = random.Random(0)
    for name, value in CURRENT.items():
        if space.coordinates(name, value):
            steps = [space.step(name, CURRENT, SETTINGS, reach, draw) for _ in range(50)]
            assert value not in steps
            assert {type(step) for step in steps} == {type(value)}
    far = [abs(np.log(space.step("MATRIX_LR", CURRENT, SETTINGS, reach, draw) / 0.02)) for _ in range(200)]
    assert np.mean(far) == pytest.approx(0.4 * reach, rel=0.25)


def test_steps_keep_to_what_a_constant_means():
    draw = random.Random(0)
    depths = {space.step("DEPTH", {"DEPTH": 8}, {}, 1.0, draw) for _ in range(200)}
    assert {5, 6, 7, 9, 10, 11} <= depths
    widths = {space.step("WIDTH", CURRENT, SETTINGS, 1.0, draw) for _ in range(100)}
    assert all(width % 64 == 0 for width in widths)
    rows = {space.step("ROWS", {"ROWS": 24}, {}, 1.0, draw) for _ in range(100)}
    assert {12, 48} <= rows <= {3, 6, 12, 48, 96, 192}
    assert all(0 <= space.step("WARMUP", {"WARMUP": 0.0}, {}, 1.0, draw) <= 1 for _ in range(100))


# the process


def test_the_process_learns_which_coordinates_matter():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(60, 5)) * 3
    values = np.sin(points[:, 0] / 2) + 0.05 * points[:, 1]
    process = Gaussian(points[:40], values[:40], np.zeros(40))
    mean, sd = process.predict(points[40:])
    assert np.abs(mean - values[40:]).mean() < 0.4 * np.abs(values[40:] - values[:40].mean()).mean()
    assert process.lengths[0] < min(process.lengths[2:])
    assert (sd > 0).all()


def test_the_gradient_is_that_of_the_posterior():
    draw = np.random.default_rng(1)
    points = draw.normal(size=(20, 3))
    process = Gaussian(points, points[:, 0] ** 2, np.full(20, 0.01))
    lengths, slope = process.lengths, process._gradient()
    for i in range(3):
        up, down = lengths.copy(), lengths.copy()
        up[i], down[i] = up[i] * np.exp(1e-4), down[i] * np.exp(-1e-4)
        assert slope[i] == pytest.approx((process._fit(up) - process._fit(down)) / 2e-4, rel=1e-3, abs=1e-4)


def test_noise_that_is_known_or_not_does_not_fool_the_process():
    draw = np.random.default_rng(2)
    points, noise = np.repeat(np.linspace(-3, 3, 10), 5)[:, None], draw.normal(size=50)
    for variance in (np.zeros(50), np.ones(50)):
        mean, _ = Gaussian(points, 0.5 * points[:, 0] + noise, variance).predict(points[::5])
        assert np.abs(mean - 0.5 * points[::5, 0]).mean() < 0.5


def test_the_expected_gain_is_that_of_simulated_values():
    values = np.random.default_rng(3).normal(0.3, 0.5, 200_000)
    gain = expected_gain(np.array([0.3]), np.array([0.5]), 0.1)[0]
    assert gain == pytest.approx(np.maximum(0.1 - values, 0).mean(), rel=0.02)


def test_a_constant_of_the_experiment_is_set_as_proposed():
    proposal = Search(seed=7).propose(briefing())
    source = SOURCE
    for name, value in proposal.edit["values"].items():
        source = set_constant(source, name, value)
    assert fingerprint(source, SETTINGS) == fingerprint(proposal.source, SETTINGS)


def test_constants_that_are_lists_in_a_journal_are_tuples_again():
    tried = Tried(1, "", "discard", 0.1, {"values": {"A": [[1, 2], [3, 4]]}, "was": {"A": [[1, 2], [3, 5]]}})
    assert tried.edit["values"] == {"A": ((1, 2), (3, 4))}
    assert space.coordinates("A", ((1.0, 2.0), (3.0, 4.0))) == ()
