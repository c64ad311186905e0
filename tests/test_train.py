"""The experiment that everyone starts from: mathematics against independent references (whole runs: test_runs.py)."""

import importlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from lab import preset
from lab.machine.backend import mx, nn
from lab.scoring.model_server import load_experiment
from lab.training import kernels
from lab.training import run as lab_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def load_train(tmp_path, monkeypatch):
    """train.py imported with these settings over a tiny model's."""

    def load(**changes):
        settings = {
            "depth": 3,
            "width": 32,
            "head_dim": 16,
            "dtype": "float32",
            "rows": 2,
            "tokens_per_step": 32,
        } | changes
        chosen = preset.override(preset.load("offline"), sequence_length=16)
        values = preset.to_dict(chosen)
        for part in ("model", "batch", "optimizer"):
            values[part] |= {k: v for k, v in settings.items() if k in values[part]}
        (tmp_path / "settings.json").write_text(json.dumps({"preset": values, "prepared": ""}))
        monkeypatch.setenv("AUTORESEARCH_SETTINGS", str(tmp_path / "settings.json"))
        lab_run.settings.cache_clear()
        mx.random.seed(0)
        return load_experiment(ROOT / "train.py")

    yield load
    lab_run.settings.cache_clear()


def tokens(rows: int = 2, length: int = 16, vocabulary: int = 50) -> mx.array:
    return mx.random.randint(0, vocabulary, (rows, length), key=mx.random.key(7))


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_orthogonalize_against_svd(load_train, shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    result = np.array(load_train().orthogonalize(mx.array(matrices)))
    u, _, v = np.linalg.svd(matrices, full_matrices=False)
    values = np.linalg.svd(result, compute_uv=False)
    assert values.max() < 1.3
    assert np.median(values) > 0.7
    alignment = (result * (u @ v)).sum(axis=(1, 2)) / min(shape)
    assert (alignment > 0.85).all()


@pytest.mark.parametrize("kept", [16, 2])
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (2, 32)])
def test_orthogonalize_is_polar_express_in_double_precision(load_train, shape, kept):
    """Singular values from 1 to 1e-5, or few that are not 0: what rounding of the Gram matrix could turn negative."""
    train = load_train()
    u, s, v = np.linalg.svd(np.random.default_rng(0).normal(size=(3, *shape)), full_matrices=False)
    s[:] = np.geomspace(1, 1e-5, s.shape[-1])
    s[:, kept:] = 0
    matrices = ((u * s[:, None]) @ v).astype(np.float32)
    u, s, v = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    s /= np.linalg.norm(s, axis=-1, keepdims=True) * 1.02 + 1e-6
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ v
    assert np.array(train.orthogonalize(mx.array(matrices))) == pytest.approx(expected, abs=3e-3)  # 1e-3 seen


class TF32(np.ndarray):
    """float32 whose products round their factors to the 10 bits of TF32, the default of CUDA and of an M5."""

    def __matmul__(self, other):
        bits = [x.view(np.ndarray).astype(np.float32).view(np.uint32) for x in (self, other)]
        a, b = (((x + 0xFFF + (x >> 13 & 1)) & 0xFFFFE000).view(np.float32) for x in bits)
        return np.matmul(a, b).view(TF32)


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 64, 256), (2, 256, 64)])
def test_a_gpus_orthogonalize_stays_bounded_in_tf32(load_train, monkeypatch, shape):
    """Matrices with a steep spectrum, as gradients have: the Gram form of five steps in one gives 60 and more."""
    train = load_train()
    u, s, v = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    steep = ((u * np.arange(1.0, s.shape[-1] + 1) ** -3) @ v).astype(np.float32)
    exact = np.linalg.svd(np.array(train.orthogonalize(mx.array(steep))), compute_uv=False)
    numpy = SimpleNamespace(linalg=np.linalg, eye=lambda n: np.eye(n, dtype=np.float32).view(TF32))
    monkeypatch.setattr(train, "mx", numpy)
    monkeypatch.setattr(train, "GPU", True)
    rounded = np.linalg.svd(np.array(train.orthogonalize(steep.view(TF32))), compute_uv=False)
    assert rounded.max() < 1.2
    assert rounded == pytest.approx(exact, abs=0.03)


def test_orthogonalize_of_zero_is_zero(load_train):
    assert not np.array(load_train().orthogonalize(mx.zeros((2, 8, 8)))).any()


def test_muon_stacked_by_shape_is_muon_of_each(load_train):
    """The update of a matrix does not depend on what it is stacked with."""
    train = load_train()
    matrices = mx.random.normal((4, 32, 32), key=mx.random.key(1))
    together = np.array(train.orthogonalize(matrices))
    alone = np.concatenate([np.array(train.orthogonalize(matrices[i : i + 1])) for i in range(4)])
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("tokens_per_step", [32, 2**14, 2**15])
def test_adamw_against_its_formula(load_train, tokens_per_step):
    train = load_train(tokens_per_step=tokens_per_step)
    model = train.build_model(50)
    optimizer = train.MuonAdamW(model)
    rate, beta1 = optimizer.adam_rates["head"], train.ADAM_BETAS[0]
    beta2 = train.ADAM_BETAS[1] ** (tokens_per_step / 2**14)  # after 2^14 tokens the same is left whatever the batch
    before, g = np.array(model.head, np.float64), mx.random.normal(model.head.shape, key=mx.random.key(2))
    first = second = 0
    for step in (1, 2):
        gradients = nn.utils.tree_map(mx.zeros_like, model.trainable_parameters()) | {"head": g}
        optimizer.update(model, gradients, mx.array(1.0), mx.array(0.0))
        first, second = beta1 * first + (1 - beta1) * np.array(g), beta2 * second + (1 - beta2) * np.array(g) ** 2
        before -= rate * (first / (1 - beta1**step)) / np.sqrt(second / (1 - beta2**step))
    assert np.array(model.head) == pytest.approx(before, abs=1e-5)


def test_muon_against_its_formula(load_train):
    """Momentum with Nesterov's look ahead, then NorMuon's even rows; orthogonalize has tests of its own."""
    train = load_train()
    model = train.build_model(50)
    optimizer = train.MuonAdamW(model)
    up, m, beta = model.blocks[0].mlp.up, train.MUON_MOMENTUM, train.NORMUON_BETA
    expected, first, second = np.array(up.weight, np.float64), 0.0, 0.0
    for step in range(3):
        g = np.array(mx.random.normal(up.weight.shape, key=mx.random.key(step)))
        gradients = nn.utils.tree_map(mx.zeros_like, model.trainable_parameters())
        gradients["blocks"][0]["mlp"]["up"]["weight"] = mx.array(g)
        optimizer.update(model, gradients, mx.array(1.0), mx.array(0.0))
        first = m * first + (1 - m) * g
        u = np.array(train.orthogonalize(mx.array(m * first + (1 - m) * g)[None])[0], np.float64)
        mean = (u**2).mean(-1, keepdims=True)
        second = beta * second + (1 - beta) * mean
        even = u / np.sqrt(second)
        even *= np.linalg.norm(u) / np.linalg.norm(even)
        expected -= train.MATRIX_LR * (u.shape[0] / u.shape[1]) ** 0.5 * even
    assert np.array(up.weight) == pytest.approx(expected, abs=1e-5)


def test_weight_decay_only_shrinks_what_the_step_shrinks(load_train):
    train = load_train()
    model = train.build_model(50)
    optimizer = train.MuonAdamW(model)
    u_alone = {}
    for decay in (0.0, 0.5):
        mx.random.seed(0)
        model, optimizer = train.build_model(50), None
        optimizer = train.MuonAdamW(model)
        gradients = nn.utils.tree_map(
            lambda p: mx.random.normal(p.shape, key=mx.random.key(3)), model.trainable_parameters()
        )
        start = np.array(model.blocks[0].mlp.up.weight)
        optimizer.update(model, gradients, mx.array(1.0), mx.array(decay))
        u_alone[decay] = (start - np.array(model.blocks[0].mlp.up.weight)) / train.MATRIX_LR
    extra = u_alone[0.5] - u_alone[0.0]
    scale = max(1.0, start.shape[0] / start.shape[1]) ** 0.5
    shrinks = u_alone[0.0] * start > 0
    assert extra[shrinks] == pytest.approx(0.5 * scale * start[shrinks], abs=1e-4)
    assert extra[~shrinks] == pytest.approx(0, abs=1e-4)


def test_a_short_window_is_a_naive_mask(load_train):
    train = load_train(window="SL", depth=2)
    attention = train.build_model(50).blocks[0].attention
    assert attention.short
    attention.out.weight = mx.eye(32)
    attention.head_gate.weight = 0.3 * mx.random.normal((2, 32), key=mx.random.key(6))
    x = mx.random.normal((2, 16, 32), key=mx.random.key(5))
    result = np.array(attention(x, None))

    heads, T, half = 2, 16, 8
    q, k, v = (
        np.array(f(x)).reshape(2, T, heads, 16).transpose(0, 2, 1, 3)
        for f in (attention.query, attention.key, attention.value)
    )

    def rotate(t):  # plain rotary embedding, first half of the channels against the second
        angle = np.arange(T)[:, None] * train.ROPE_BASE ** -(np.arange(8) / 8)
        a, b = t[..., :8], t[..., 8:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

    def normed(t):
        return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-6) * train.QK_SCALE

    scores = normed(rotate(q)) @ normed(rotate(k)).swapaxes(-1, -2) / math.sqrt(16)
    for i in range(T):
        for j in range(T):
            if j > i or j <= i - half:
                scores[..., i, j] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    y -= (y * v).sum(-1, keepdims=True) / (v * v).sum(-1, keepdims=True) * v  # nothing of a token's own value
    gate = 2 / (1 + np.exp(-np.array(x) @ np.array(attention.head_gate.weight).T))  # (2, T, heads)
    expected = (y.transpose(0, 2, 1, 3) * gate[..., None]).reshape(2, T, 32)
    assert result == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("changes", [{}, {"window": "SSSL", "depth": 5}, {"softcap": 0.0}, {"depth": 1}])
def test_every_parameter_gets_gradient(load_train, changes):
    train = load_train(**changes)
    model = train.build_model(50)
    noise = [(k, v + 0.02 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.parameters())]
    model.load_weights(noise)  # away from the zeros of the start
    _, gradients = nn.value_and_grad(model, train.loss_function)(model, tokens(8), tokens(8)[:, ::-1])
    without = [name for name, g in tree_flatten(gradients) if not mx.abs(g).max().item() > 0]
    assert without == []


@pytest.mark.parametrize("dtype", preset.DTYPES)
def test_activations_have_the_dtype_and_parameters_and_logits_are_float32(load_train, dtype, monkeypatch):
    train = load_train(dtype=dtype, window="SL")
    model = train.build_model(50)
    seen = []
    for kind in (train.Linear, train.Block, train.MLP, train.Attention):
        original = kind.__call__

        def spy(self, x, *rest, original=original):
            result = original(self, x, *rest)
            seen.extend([x.dtype, result.dtype])
            return result

        monkeypatch.setattr(kind, "__call__", spy)
    logits = model(tokens())
    assert set(seen) == {getattr(mx, dtype)}
    assert logits.dtype == mx.float32
    assert {v.dtype for _, v in tree_flatten(model.parameters())} == {mx.float32}


def test_accumulated_passes_are_one_large_batch(load_train):
    train = load_train()
    losses, weights = [], []
    for passes in (1, 4):
        mx.random.seed(0)
        model = train.build_model(50)
        step, _ = train.make_step(model, train.MuonAdamW(model), compiled=False)
        x, y = tokens(8).reshape(passes, 8 // passes, 16), tokens(8)[:, ::-1].reshape(passes, 8 // passes, 16)
        losses.append([step(x, y, mx.array(1.0), mx.array(0.0)).item() for _ in range(3)])
        weights.append(np.array(model.head))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert weights[0] == pytest.approx(weights[1], abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"window": "SL", "depth": 2}, {"softcap": 0.0}])
def test_a_gpus_compiled_step_is_the_cpus(load_train, monkeypatch, settings):
    train = load_train(**{"depth": 1} | settings)
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "GPU", compiled)
        mx.random.seed(0)
        model = train.build_model(50)
        step, _ = train.make_step(model, train.MuonAdamW(model), compiled)
        x = tokens(4).reshape(2, 2, 16)  # two passes
        y = x[..., ::-1]
        results.append([step(x, y, mx.array(rate), mx.array(0.1)).item() for rate in (1, 0.5, 0.1)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


VIEWS = {"Broadcast", "Transpose", "ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten", "Slice"}  # no kernels


def kernels_of(outputs: list, tmp_path: Path) -> Counter:
    """The operations that compute these arrays, by name, before any of it is computed; a fused one counts once."""
    mx.export_to_dot(str(tmp_path / "graph.dot"), *(value for _, value in tree_flatten(outputs)))
    names = re.findall(r'label ="(\w+)[^"]*", shape=rectangle', (tmp_path / "graph.dot").read_text())
    return Counter(name for name in names if name not in VIEWS)


def gpu_step(train, compiled: bool = True, passes: int = 1):
    """make_step as a GPU runs it, as a call that returns everything a step computes."""
    model = train.build_model(50)
    optimizer = train.MuonAdamW(model)
    step, state = train.make_step(model, optimizer, compiled)
    mx.eval(state)
    batch = tokens(4).reshape(passes, 4 // passes, 16)
    return lambda rate=1.0: [step(batch, batch, mx.array(rate), mx.array(0.1)), state]


def test_compiling_halves_the_kernels_of_gpu_step(load_train, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "GPU", True)
    count = {}
    for depth in (2, 4):
        train = load_train(depth=depth, dtype="bfloat16")
        for compiled in (False, True):
            count[depth, compiled] = kernels_of(gpu_step(train, compiled)(), tmp_path).total()
    assert count[4, True] < 0.55 * count[4, False]
    # MLX without a GPU shows norms, rope and attention by their parts, so that a layer counts for more than on a GPU.
    assert (count[4, True] - count[2, True]) / 2 < 200  # a layer


def test_a_gpus_step_is_traced_once_whatever_the_rates_and_never_waits(load_train, monkeypatch):
    monkeypatch.setattr(kernels, "GPU", True)
    train, traced = load_train(depth=1), []
    plain = train.loss_function
    monkeypatch.setattr(train, "loss_function", lambda *args: traced.append(len(args)) or plain(*args))
    take = gpu_step(train, passes=2)
    take()  # to look at a value while compiling is an error of MLX
    assert len(traced) == 1  # both passes
    for rate in (1.0, 0.5, 0.1):
        mx.eval(take(rate))
    assert len(traced) == 1


def test_muons_products_do_not_grow_with_the_layers(load_train, tmp_path):
    products = []
    for depth in (2, 6):
        train = load_train(depth=depth)
        model = train.build_model(50)
        optimizer = train.MuonAdamW(model)
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        mx.eval(gradients, model.parameters(), optimizer.state)
        optimizer.update(model, gradients, mx.array(1.0), mx.array(0.1))
        products.append(kernels_of([model.parameters(), optimizer.state], tmp_path)["Matmul"])
    plain, gram = 5 * 3, 1 + 5 + 4 + 8 + 1  # of the square shape; of the three long ones, the Gram matrix collected
    assert products == [plain + 3 * gram] * 2


def test_schedule(load_train):
    train = load_train(warmup=0.1, warmdown=0.5, final_lr=0.1)
    rates = [train.schedule(p)[0] for p in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.55, 0.1])
    assert train.schedule(1.0)[1] == 0


def test_importing_trains_nothing_and_builds_no_model(load_train, capsys):
    module = load_train()
    assert importlib.util.find_spec("train") is not None
    assert not any(isinstance(value, mx.array | nn.Module) for value in vars(module).values())
    assert capsys.readouterr().out == ""
