"""Updates against weights: the ratio is right, by group, at its moments, and cheap in memory."""

import pytest

from lab.machine.backend import mx, nn
from lab.training.updates import GROUPS, SAMPLE, Updates, group


class Layer(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = mx.random.normal((size, size))


class Model(nn.Module):
    def __init__(self, size: int = 200):
        super().__init__()
        self.blocks = [Layer(size), Layer(size)]
        self.gate = mx.zeros((3,))


def trained(model: Model, steps: int, rates: tuple[float, float]) -> Updates:
    """Every step moves each weight by its block's share of itself."""
    updates = Updates(model)
    for step in range(steps):
        for layer, rate in zip(model.blocks, rates, strict=True):
            layer.weight = layer.weight * (1 + rate)
        updates.look((step + 1) / steps)
    return updates


def test_the_ratio_of_a_group_is_that_of_its_parameters_together():
    same = trained(Model(), 20, (0.01, 0.01)).ratios()
    assert same == {"blocks": [pytest.approx(0.01, rel=0.02)] * 2, "gate": [0.0, 0.0]}
    [early, _] = trained(Model(), 20, (0.01, 0.03)).ratios()["blocks"]
    assert 0.011 < early < 0.029


def test_a_run_too_short_for_a_moment_has_none_of_it():
    assert trained(Model(), 1, (0.01, 0.01)).ratios()["blocks"] == []
    assert len(trained(Model(), 2, (0.01, 0.01)).ratios()["blocks"]) == 1


def test_large_parameters_are_sampled_and_the_sample_is_a_copy():
    updates = trained(Model(700), 2, (0.01, 0.01))
    assert max(value.size for taken in updates.taken for value in taken.values()) <= SAMPLE
    assert updates.ratios()["blocks"] == [pytest.approx(0.01, rel=0.02)]


def test_what_an_experiment_adds_or_removes_in_between_does_not_end_its_run():
    model = Model()
    updates = Updates(model)
    updates.look(0.3)
    model.late, model.gate = mx.ones((2,)), mx.zeros((5,))
    del model.blocks[1]
    updates.look(0.4)
    assert updates.ratios()["blocks"] == [0.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("blocks.0.attention.query.weight", "attention.query"), ("blocks.11.attention.head_gate.weight",
     "attention.head_gate"), ("value_embeddings.layer3", "value_embeddings.layer"), ("head", "head"), ("3", "3")],
)  # fmt: skip
def test_parameters_of_the_same_name_in_every_layer_are_a_group(name, expected):
    assert group(name) == expected


def test_the_largest_groups_are_kept():
    model = Model()
    for number in range(40):
        setattr(model, f"p{chr(97 + number % 26)}{'x' * (number // 26)}", mx.ones((number + 1,)))
    ratios = Updates(model).ratios()
    assert len(ratios) == GROUPS
    assert next(iter(ratios)) == "blocks"
