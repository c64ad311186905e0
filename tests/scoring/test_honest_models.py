"""Unusual but honest models: each trains a few steps and gets a score, with all the scorer's checks.

Each is train.py with some definitions replaced by those at its end. The optimizer is plain gradient descent:
what is tested is that the scorer accepts the model.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, documents
from finished_run import leave, prepare

from lab.machine.backend import mx, nn, tree_flatten, tree_map
from lab.scoring.model_server import load_experiment
from lab.scoring.score import score_run
from lab.training.run import settings

LENGTH, STEPS, ROWS = 64, 3, 4
SIZES = {"depth": 2, "width": 32, "head_dim": 16, "dtype": "float32"}

LAYER = """
class Attention(nn.Module):
    short = False

    def __init__(self, layer):
        super().__init__()
        self.out = Linear(WIDTH, WIDTH, 0.1)
        {}

    def __call__(self, x, value_embedding):
        {}
"""
HEAD = """
class GPT(GPT):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        {}

    def __call__(self, tokens):
        {}

def loss_function(model, inputs, targets):
    return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")
"""


def layer(parameters: str, call: str) -> str:
    """Another sublayer in place of attention."""
    return LAYER.format(parameters, call)


def head(parameters: str, call: str) -> str:
    """Another way from tokens to logits."""
    return HEAD.format(parameters, call)


MODELS = {
    "no attention": layer("pass", "return self.out(x)"),
    "convolution over the last four tokens": layer(
        "self.taps = 0.5 * mx.ones((4, WIDTH))",
        "past = [mx.pad(x, ((0, 0), (k, 0), (0, 0)))[:, : x.shape[1]] for k in range(4)]\n"
        "        return self.out(sum(t * p for t, p in zip(self.taps.astype(x.dtype), past)))",
    ),
    # The decay is one number, learnt fast; with that of the scorer's changed checkpoint the state grows to infinity.
    "recurrence with one decay": layer(
        "self.log_decay = mx.array(-0.01)",
        "steps, decay = [], mx.exp(400 * self.log_decay)\n"
        "        state = mx.zeros_like(x[:, 0])\n"
        "        for t in range(x.shape[1]):\n"
        "            state = decay * state + x[:, t]\n"
        "            steps.append(state)\n"
        "        return self.out(mx.stack(steps, axis=1))",
    ),
    "mixture of experts": """
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Linear(WIDTH, 4, 0.5)
        self.up = mx.random.normal((4, WIDTH, WIDTH)) / WIDTH**0.5
        self.down = mx.random.normal((4, WIDTH, WIDTH)) / WIDTH**0.5

    def __call__(self, x):
        weight = mx.softmax(self.router(x), axis=-1)
        weight = mx.where(weight >= mx.sort(weight, axis=-1)[..., -2:-1], weight, 0)
        hidden = nn.relu(mx.einsum("btc,ech->bteh", x, self.up))
        return mx.einsum("bteh,ehc,bte->btc", hidden, self.down, weight)
""",
    "experts that gather their tokens": """
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Linear(WIDTH, 4, 0.5)
        self.up = mx.random.normal((4, WIDTH, WIDTH)) / WIDTH**0.5

    def __call__(self, x):
        chosen = mx.stop_gradient(mx.argmax(self.router(x), axis=-1))
        rows = x.reshape(-1, 1, WIDTH)
        return mx.gather_mm(rows, self.up, rhs_indices=chosen.reshape(-1)).reshape(x.shape)
""",
    "tied embeddings": head("del self.head", "return softcap(0.1 * self.hidden(tokens) @ self.embedding.T, SOFTCAP)"),
    "heads for more than one token": head(
        "self.second = mx.zeros_like(self.head)",
        "return self.hidden(tokens) @ self.head.T",
    )
    + """
def loss_function(model, inputs, targets):
    x = model.hidden(inputs)
    first = nn.losses.cross_entropy(x @ model.head.T, targets, reduction="mean")
    second = nn.losses.cross_entropy(x[:, :-1] @ model.second.T, targets[:, 1:], reduction="mean")
    return first + 0.3 * second
""",
    "another width in each layer": """
class MLP(nn.Module):
    made = 0

    def __init__(self):
        super().__init__()
        MLP.made += 1
        self.up = Linear(WIDTH, 16 * MLP.made, 0.1)
        self.down = Linear(16 * MLP.made, WIDTH, 0.1)

    def __call__(self, x):
        return self.down(nn.gelu(self.up(x)))
""",
    "mixed precision": """
DTYPE = "bfloat16"

def build_model(vocab_size):
    model = GPT(vocab_size)
    for number, block in enumerate(model.blocks):
        block.set_dtype((mx.bfloat16, mx.float16)[number % 2])
    model.head = model.head.astype(mx.bfloat16)
    return model
""",
    "retrieval over its own context": head(
        "self.trust = mx.array(2.0)",
        "T = tokens.shape[1]\n"
        "        earlier = mx.arange(T)[:, None] > mx.arange(T)[None]\n"
        "        match = (tokens[:, :, None] == tokens[:, None]) & earlier\n"
        "        last = mx.argmax(mx.where(match, mx.arange(T), -1), axis=-1)\n"
        "        after = mx.take_along_axis(tokens, mx.minimum(last + 1, T - 1), axis=1)\n"
        "        vocabulary = mx.arange(self.head.shape[0])\n"
        "        found = (after[..., None] == vocabulary) & match.any(axis=-1)[..., None]\n"
        "        return self.hidden(tokens) @ self.head.T + self.trust * found",
    ),
    "embeddings composed of a token's bytes": head(
        "self.bytes = mx.arange(4 * vocab_size).reshape(vocab_size, 4) % 256\n"
        "        self.byte_embedding = mx.random.normal((256, WIDTH))\n"
        "        self.freeze(keys=['bytes'], recurse=False)",
        "x = self.byte_embedding[self.bytes[tokens]].mean(axis=2)\n"
        "        for block in self.blocks:\n"
        "            x = block(x, None, self.smear[:2])\n"
        "        return norm(x) @ self.head.T",
    ),
    "dropout": head("self.dropout = nn.Dropout(0.2)", "return self.dropout(self.hidden(tokens)) @ self.head.T"),
    "batch norm with running statistics": head(
        "self.norm = nn.BatchNorm(WIDTH)", "return self.norm(self.hidden(tokens)) @ self.head.T"
    ),
    "mixture of softmaxes": head(
        "self.other = 0.1 * mx.random.normal(self.head.shape)",
        "x = self.hidden(tokens)\n"
        "        logits = mx.stack([x @ self.head.T, x @ self.other.T])\n"
        "        return mx.logsumexp(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=0)",
    ),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A short validation text in 300 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        chosen, prepared = prepare(documents(12), vocab=300, length=LENGTH)
    return replace(chosen, model=replace(chosen.model, **SIZES)), prepared


def train(run, prepared) -> None:
    """A few steps of gradient descent, and the checkpoint."""
    experiment = load_experiment(run / "train.py")
    model = experiment.build_model(prepared.tokenizer.vocab_size)
    step = nn.value_and_grad(model, experiment.loss_function)
    tokens = np.concatenate(prepared.train)[: ROWS * (LENGTH + 1)].reshape(ROWS, -1).astype(np.int32)
    for _ in range(STEPS):
        loss, gradients = step(model, mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]))
        model.update(tree_map(lambda p, g: p - 0.01 * g, model.trainable_parameters(), gradients))
    assert math.isfinite(loss.item())
    mx.save_safetensors(str(run / "checkpoint.safetensors"), dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize("name", MODELS)
def test_an_honest_model_is_accepted(task, tmp_path, monkeypatch, name):
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    run = leave(tmp_path / "run", source + MODELS[name], *task)
    monkeypatch.setenv("AUTORESEARCH_SETTINGS", str(run / "settings.json"))
    settings.cache_clear()
    train(run, task[1])
    settings.cache_clear()
    score = score_run(run)
    assert score["status"] == "ok", score["reason"]
    assert 0 < score["val_bpb"] < 12
