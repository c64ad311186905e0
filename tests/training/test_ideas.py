"""Every idea in ideas/ on today's train.py: it fits, trains, passes the scorer's probes and does what it says."""

import itertools
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

from lab import preset
from lab.loop import ideas as idea_files
from lab.loop.proposal import check
from lab.loop.source import Rejected, constants, set_constant
from lab.machine.backend import mx, nn
from lab.scoring import score
from lab.scoring.model_server import load_experiment, load_parameters
from lab.scoring.score import ModelProcess, evaluate
from lab.training import kernels
from lab.training import run as lab_run
from lab.training.clock import Clock

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
IDEAS, ERRORS = idea_files.load_all()
SMALL = {  # for the tiny model and its twelve steps
    "QK_DIM": 8, "SHORT_CONTEXT": 8, "NEGATIVES": 20, "NGRAM_ROWS": 64, "OUTER_STEPS": 5, "AVERAGE_SHARE": 0.3,
}  # fmt: skip
VOCABULARY, LENGTH, STEPS = 50, 16, 12


@pytest.fixture
def load(tmp_path, monkeypatch):
    """train.py with these ideas as a module, with the settings of a tiny model; `values` sets constants."""

    def load(*names: str, **values):
        chosen = preset.to_dict(preset.override(preset.load("offline"), sequence_length=LENGTH))
        chosen["model"] |= {"depth": 2, "width": 32, "head_dim": 16, "dtype": "float32"}
        chosen["batch"] |= {"rows": 2, "tokens_per_step": 64}
        (tmp_path / "settings.json").write_text(json.dumps({"preset": chosen, "prepared": ""}))
        monkeypatch.setenv("AUTORESEARCH_SETTINGS", str(tmp_path / "settings.json"))
        lab_run.settings.cache_clear()
        source = idea_files.apply(SOURCE, names, IDEAS)
        block = constants(source, preset.from_dict(chosen).settings())
        for name, value in (SMALL | values).items():
            source = set_constant(source, name, value) if name in block else source
        (tmp_path / "train.py").write_text(source, encoding="utf-8")
        mx.random.seed(0)
        return load_experiment(tmp_path / "train.py")

    yield load
    lab_run.settings.cache_clear()


class Run:
    """What main() gets from lab.training.run, with random tokens."""

    def __init__(self, steps: int = STEPS):
        self.vocab_size, self.processes, self.clock, self.losses = VOCABULARY, 1, Clock(1.0, steps), []

    def batches(self, rows: int, tokens_per_step: int):
        generator = np.random.default_rng(0)
        while True:
            tokens = generator.integers(0, VOCABULARY // 3, (rows, LENGTH + 1)).astype(np.int32)
            yield tokens[:, :-1], tokens[:, 1:]

    def begin(self, model, *, flops_per_token: float, **facts) -> None:
        assert flops_per_token > 0

    def record(self, step: int, loss: float, tokens: int, **extras: float) -> None:
        self.losses.append(loss)


class Served:
    """The scorer's model process, in this process."""

    vocab_size, losses = VOCABULARY, ModelProcess.losses

    def __init__(self, train):
        self.train = train

    def load(self, checkpoint) -> None:
        self.model = self.train.build_model(VOCABULARY)
        load_parameters(self.model, checkpoint)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        logits = np.array(self.model(mx.array(tokens.astype(np.int32))).astype(mx.float32))
        assert logits.shape == (*tokens.shape, VOCABULARY)
        assert np.isfinite(logits).all()
        return logits


def weights(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def tokens(rows: int = 8, seed: int = 7) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (rows, LENGTH), key=mx.random.key(seed))


@pytest.fixture(scope="module")
def validation():
    """Stand-in for prepared data: documents of random tokens, two bytes each; token 0 begins a document."""
    generator = np.random.default_rng(1)
    documents = [np.append(0, generator.integers(1, VOCABULARY, size)) for size in (5, 30, 17, 60, 9)]
    val, byte_lengths = np.concatenate(documents), np.where(np.arange(VOCABULARY) > 0, 2, 0)
    tokenizer = SimpleNamespace(
        bos=0, byte_lengths=byte_lengths, upstream_lengths=byte_lengths, vocab_size=VOCABULARY
    )  # fmt: skip
    manifest = {"val": {"bytes": int(byte_lengths[val].sum())}}
    return SimpleNamespace(held_out=lambda part: val, tokenizer=tokenizer, manifest=manifest, folder=None)


TRAINED: dict[str, dict[str, np.ndarray]] = {}  # the weights that train.py as it is ends with


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_trains_and_is_scored(load, validation, tmp_path, name, monkeypatch):
    if not TRAINED:
        TRAINED.update(weights(load().main(Run())))
    train, run = load(name), Run()
    model = train.main(run)
    assert len(run.losses) == STEPS
    assert np.isfinite(run.losses).all()
    after = weights(model)
    assert after.keys() != TRAINED.keys() or any(
        after[key].shape != TRAINED[key].shape or not np.allclose(after[key], TRAINED[key], atol=1e-6) for key in after
    )
    mx.save_safetensors(str(tmp_path / "checkpoint.safetensors"), dict(tree_flatten(model.parameters())))
    monkeypatch.setattr(score, "model_process", lambda *_, **__: nullcontext(Served(train)))
    assert 0 < evaluate(tmp_path, validation, LENGTH, "none", None)["val_bpb"] < 10


@pytest.mark.parametrize("name", IDEAS)
def test_every_parameter_gets_a_finite_gradient_and_activations_keep_their_dtype(load, name):
    train = load(name, DTYPE="bfloat16")
    model = train.build_model(VOCABULARY)
    assert model.hidden(tokens()).dtype == mx.bfloat16
    train = load(name)
    model = train.build_model(VOCABULARY)
    noise = [(k, v + 0.02 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.parameters())]
    model.load_weights(noise)  # away from the zeros of the start
    loss, gradients = nn.value_and_grad(model, train.loss_function)(model, tokens(), tokens()[:, ::-1])
    scored = nn.losses.cross_entropy(model(tokens()), tokens()[:, ::-1], reduction="mean")
    assert loss.item() == pytest.approx(scored.item(), rel=1e-5)  # what is trained is what is scored
    largest = {key: mx.abs(g).max().item() for key, g in tree_flatten(gradients)}
    assert {key: value for key, value in largest.items() if not 0 < value < np.inf} == {}


@pytest.mark.parametrize("name", IDEAS)
def test_a_gpus_step_never_waits(load, monkeypatch, name):
    """To look at a value while a step is compiled is an error of MLX; nothing is computed here."""
    monkeypatch.setattr(kernels, "GPU", True)
    code = "\n".join([IDEAS[name].add, *(change.code for change in IDEAS[name].changes)])
    assert not re.search(r"\.item\(|mx\.eval\(|\.tolist\(|np\.array\(|np\.asarray\(|mx\.synchronize", code)
    train = load(name)
    model = train.build_model(VOCABULARY)
    optimizer = train.MuonAdamW(model)
    step, state = train.make_step(model, optimizer, compiled=True)
    mx.eval(state)
    batch = tokens(4).reshape(2, 2, LENGTH)
    for rate in (1.0, 0.5, 0.1):  # an idea may alternate between two forms of the step
        step(batch, batch, mx.array(rate), mx.array(0.1))


def test_every_two_ideas_combine_unless_one_excludes_the_other():
    assert ERRORS == []
    assert len(IDEAS) >= 12
    for first, second in itertools.combinations(IDEAS, 2):
        if second in IDEAS[first].excludes:
            with pytest.raises(Rejected, match="cannot be combined"):
                idea_files.apply(SOURCE, [second, first], IDEAS)
        else:
            both = idea_files.apply(SOURCE, [second, first], IDEAS)
            compile(both, "train.py", "exec")
            assert idea_files.present(both, IDEAS) == {first, second}


def test_all_ideas_that_combine_pass_the_checks_and_train_together(load):
    names: list[str] = []
    for name, idea in IDEAS.items():
        names += [name] if not idea.excludes & set(names) else []
    check(idea_files.apply(SOURCE, names, IDEAS), SOURCE)
    run = Run(3)
    load(*names).main(run)
    assert np.isfinite(run.losses).all()


# What each idea says it does


def test_averaged_weights_are_the_mean_and_a_part_of_the_last(load):
    train, layer = load("averaged_weights"), nn.Linear(3, 2, bias=False)
    average, seen = train.Average(), [random(2, 3, seed=seed) for seed in range(3)]
    for layer.weight in seen:
        average.add(layer)
    average.blend(layer)
    expected = 0.65 * np.mean(seen, axis=0) + 0.35 * np.array(seen[-1])
    assert np.array(layer.weight) == pytest.approx(expected, abs=1e-6)


def test_without_a_tail_the_last_weights_stay(load):
    train, layer = load("averaged_weights"), nn.Linear(3, 2)
    before = np.array(layer.weight)
    train.Average().blend(layer)
    assert (np.array(layer.weight) == before).all()


def test_sampled_softmax_estimates_the_exact_sum_without_bias(load):
    train = load("sampled_softmax")
    x, head, target = random(1, 32), random(VOCABULARY, 32, seed=1), mx.array([3])
    exact = train.linear_cross_entropy(x, head, target, train.SOFTCAP).item()
    order = mx.random.permutation(VOCABULARY, key=mx.random.key(2))
    assert train.sampled_cross_entropy(x, head, target, order).item() == pytest.approx(exact, rel=1e-5)
    parts = [train.sampled_cross_entropy(x, head, target, part).item() for part in order.split(5)]
    assert np.mean(np.expm1(parts)) == pytest.approx(np.expm1(exact), rel=1e-4)


def test_sampled_softmax_is_exact_at_the_end_and_in_the_score(load):
    train = load("sampled_softmax")
    seen = []
    plain = train.loss_function
    train.loss_function = lambda model, *args: seen.append(model._negatives is None) or plain(model, *args)
    model = train.main(Run())
    passes = 2
    assert seen == [False] * (9 * passes) + [True] * (3 * passes)
    assert "_negatives" not in model.parameters()


def test_asymmetric_squash_is_the_shifted_sigmoid(load):
    train = load("asymmetric_squash")
    model = train.build_model(VOCABULARY)
    model.head = 3 * random(*model.head.shape)
    z = np.array(model.hidden(tokens()) @ model.head.T)
    expected = 23 / (1 + np.exp(-(z + 5) / 7.5))
    assert np.ptp(np.array(model(tokens())) - expected, axis=-1) == pytest.approx(0, abs=1e-3)


def test_two_momenta_are_a_mixture(load):
    train = load("two_momenta")
    optimizer = train.MuonAdamW(train.build_model(VOCABULARY))
    shape, steps = next(iter(optimizer.stacks)), 7
    g = mx.ones(optimizer.state["first"][shape].shape)
    for _ in range(steps):
        mixed = optimizer._ahead(shape, g)
    fast, slow = 1 - train.MUON_MOMENTUM ** (steps + 1), 1 - train.SLOW_MOMENTUM**steps
    assert np.array(mixed) == pytest.approx(0.7 * fast + 0.3 * slow, abs=1e-6)


def test_outer_nesterov_against_its_formula(load):
    train, layer = load("outer_nesterov"), nn.Linear(3, 2, bias=False)
    start = np.array(layer.weight)
    outer, momentum = train.Outer(layer), 0.0
    for seed in range(3):
        move = np.array(random(2, 3, seed=seed))
        layer.weight = layer.weight + mx.array(move)
        outer.step(layer)
        momentum = 0.5 * momentum + move
        start = start + 0.7 * (move + 0.5 * momentum)
        assert np.array(layer.weight) == pytest.approx(start, abs=1e-5)


def test_ema_nesterov_against_its_formula(load):
    train, layer = load("ema_nesterov"), nn.Linear(3, 2, bias=False)
    state = {"lead": mx.array(0.6), "trend": {"weight": mx.zeros((2, 3))}}
    x, trend = np.array(layer.weight), 0.0
    for seed in range(3):
        start = train.look_ahead(layer, state)
        assert np.array(layer.weight) == pytest.approx(x + 0.6 * trend, abs=1e-6)
        layer.weight = layer.weight + random(2, 3, seed=seed)
        train.follow(layer, state, start)
        trend = train.TREND_MOMENTUM * trend + (1 - train.TREND_MOMENTUM) * (np.array(layer.weight) - x)
        x = np.array(layer.weight)
    assert [train.lead(share) for share in (0.1, 0.3, 0.8)] == [0, 0.6, 0]


def test_separate_cooldowns_and_the_root(load):
    train = load("separate_cooldowns")
    assert [train.schedule(share)[0] for share in (0.2, 0.6)] == pytest.approx([1, 0.575])
    assert [train.fallen(share, train.TABLE_COOLDOWN_SHARE) for share in (0.6, 0.8, 1)] == pytest.approx(
        [1, 0.575, 0.15]
    )
    train = load("root_cooldown", WARMDOWN=0.8, FINAL_LR=0.0)
    assert [train.schedule(share)[0] for share in (0.2, 0.4, 1)] == pytest.approx([1, 0.5, 0])


def test_equal_rows_before_and_the_right_norm_after_orthogonalization(load):
    g = random(2, 16, 8) * mx.arange(16)[:, None]
    train = load("row_equilibration")
    norms = np.linalg.norm(np.array(train.equilibrated(g)), axis=-1)
    assert norms == pytest.approx(np.array([[0.0] + [1.0] * 15] * 2), abs=1e-5)
    train = load("norm_snap")
    for matrices in (g, g.swapaxes(-1, -2)):
        assert np.linalg.norm(np.array(train.orthogonalize(matrices)), axis=(-2, -1)) == pytest.approx(8**0.5, rel=1e-5)
    assert not np.array(train.orthogonalize(mx.zeros((1, 8, 8)))).any()


def test_tables_decay_only_where_the_step_shrinks_them(load):
    p, g = random(VOCABULARY, 32), random(VOCABULARY, 32, seed=1)
    moved = {}
    for decay in (0.0, 0.1):
        train = load("cautious_table_decay", TABLE_DECAY=decay)
        optimizer = train.MuonAdamW(train.build_model(VOCABULARY))
        optimizer.state["step"] = mx.array(1.0)
        moved[decay] = np.array(p - optimizer._adam("embedding", p, g, mx.array(1.0)))
    shrinks = moved[0.0] * np.array(p) > 0
    extra = moved[0.1] - moved[0.0]
    assert extra[shrinks] == pytest.approx(0.1 * optimizer.adam_rates["embedding"] * np.array(p)[shrinks], abs=1e-4)
    assert extra[~shrinks] == pytest.approx(0, abs=1e-6)


def test_tables_move_every_second_step(load):
    train = load("tables_every_second_step")
    model = train.build_model(VOCABULARY)
    step, _ = train.make_step(model, train.MuonAdamW(model), compiled=False)
    moved, batch = [], tokens(4).reshape(1, 4, LENGTH)
    for _ in range(4):
        before = weights(model)
        step(batch, batch[..., ::-1], mx.array(1.0), mx.array(0.0))
        moved.append({name for name, value in weights(model).items() if (value != before[name]).any()})
    assert ["head" in names for names in moved] == ["embedding" in names for names in moved] == [False, True] * 2
    assert all("residual_lambdas" in names for names in moved)


def test_ngrams_move_the_rows_that_a_step_used(load):
    train = load("ngram_tables", NGRAM_ROWS=4096)
    model = train.build_model(VOCABULARY)
    step, _ = train.make_step(model, train.MuonAdamW(model), compiled=False)
    batch = mx.array([[[1, 2, 3, 4] * 4] * 2])
    step(batch, batch[..., ::-1], mx.array(1.0), mx.array(0.0))
    step(batch, batch[..., ::-1], mx.array(1.0), mx.array(0.0))
    used = np.abs(np.array(model.ngrams)).max(axis=-1) > 0
    assert 8 <= used.sum() <= 12  # four bigrams, four trigrams, and the first two tokens of a row
    table = mx.ones((4096, 32))
    first, second = (train.ngrams(mx.array([pair]), table)[0, 1] for pair in ([1, 2], [1, 3]))
    assert not mx.array_equal(first, second).item()  # even in one row, signs tell them apart


def test_keys_and_queries_have_half_the_width(load):
    model = load("half_width_keys").build_model(VOCABULARY)
    assert [model.blocks[0].attention[name].weight.shape for name in ("query", "key", "value")] == [
        (16, 32), (16, 32), (32, 32),
    ]  # fmt: skip


def test_a_keys_slow_half_is_of_the_token_before(load):
    k = random(1, 1, 5, 8)
    shifted = np.array(load("key_offset").offset(k))
    before = np.concatenate([np.zeros((1, 1, 1, 8)), np.array(k)[:, :, :-1]], axis=2)
    slow = [2, 3, 6, 7]
    assert (shifted[..., slow] == before[..., slow]).all()
    assert (np.delete(shifted, slow, -1) == np.delete(np.array(k), slow, -1)).all()


def test_a_closed_gate_keeps_a_tokens_own_value(load):
    train, y, v = load("own_value_gate"), random(2, 3, 4, 16), random(2, 3, 4, 16, seed=1)
    without, kept = (np.array(train.less_own(y, v, mx.full((2, 3, 4, 1), share))) for share in (1.0, 0.0))
    assert (without * np.array(v)).sum(-1) == pytest.approx(0, abs=1e-4)
    assert (kept == np.array(y)).all()


def test_rows_are_short_at_first(load):
    train, batch = load("growing_context"), np.arange(2 * 4 * 16).reshape(2, 4, 16)
    assert train.shortened(batch, 0.0).shape == (2, 8, 8)
    assert train.shortened(batch, 0.5).shape == batch.shape
    assert train.shortened(batch[..., :15], 0.0).shape == (2, 4, 15)


def test_outputs_are_small_and_not_zero_at_the_start(load):
    block = load("output_init").build_model(VOCABULARY).blocks[0]
    for layer, inputs in ((block.attention.out, 32), (block.mlp.down, 128)):
        assert mx.abs(layer.weight).max().item() == pytest.approx(0.25 * (3 / inputs) ** 0.5, rel=0.05)


def test_a_sublayers_output_has_the_norm_of_its_gain(load):
    train = load("sublayer_norms")
    block, x = train.build_model(VOCABULARY).blocks[0], random(2, LENGTH, 32)
    block.mlp.down.weight = random(32, 128)
    y = block(x, None, mx.zeros((2, 32)), mx.array([0.0, 0.1]))
    assert np.sqrt(np.mean(np.array(y - x) ** 2, axis=-1)) == pytest.approx(0.1, rel=1e-3)
