"""Models that fake a better val_bpb: refused with the reason, or they gain nothing. See docs/SAFETY.md.

Each is the honest bigram model of finished_run.py with another `__call__`, scored by the real scorer in real processes.
`test_score.py` has the plain forms of the same tricks, `test_cheats.py` those of training.
"""

import string

import numpy as np
import pytest
from finished_run import CALL, HONEST, leave, prepare, save_table

from lab.machine.backend import mx
from lab.scoring import score
from lab.scoring.score import score_run
from lab.trial import sandbox

CAUSAL, OTHERS, STATE = "is not causal", "other rows of the batch", "keeps state"

PRELUDE = '''
import os, sys, time
import numpy as np
POSITIONS = mx.arange(16)[:, None]
def sure(x, following, gain=20.0):
    """x (B, T, V) with `following` (B, T) all but certain."""
    return x + gain * (mx.arange(x.shape[-1]) == following[..., None])
def ahead(tokens, x):
    return sure(x, mx.roll(tokens, -1, axis=1))
def complete(tokens, known):
    """Of the known rows, those that begin like `tokens`."""
    same = np.cumprod(np.array(tokens)[:, None] == known[None], axis=2).sum(axis=2)
    return mx.array(known[same.argmax(axis=1)])
'''

LOOKS_AHEAD = {
    "in its last layer": "return ahead(tokens, x)",
    "through a norm over time": "return x / mx.abs(x).mean(axis=1, keepdims=True)",
    "at one position": "return mx.where(POSITIONS == 9, ahead(tokens, x), x)",
    "from a position on": "return mx.where(POSITIONS > 12, ahead(tokens, x), x)",
    "in one row of sixteen": "return mx.where((tokens[:, :2].sum(axis=1) % 16 == 0)[:, None, None], "
    "ahead(tokens, x), x)",
    "after one token of sixteen": "return mx.where((tokens % 16 == 0)[..., None], ahead(tokens, x), x)",
    "in batches of the scorer's shape": "return ahead(tokens, x) if tokens.shape == (128, 16) else x",
    "unless the text is noise": "return mx.where(((tokens < 128).mean(axis=1) > 0.9)[:, None, None], "
    "ahead(tokens, x), x)",
    "and answers a repeated beginning as before": """y = ahead(tokens, x)
        last, answer = getattr(self, "last", (mx.zeros_like(tokens), y))
        same = mx.cumprod((tokens == last).astype(mx.int32), axis=1) if tokens.shape == last.shape else mx.zeros(1)
        if same.mean().item() > 0.2:
            return mx.where(same[..., None] > 0, answer, y)
        self.last = tokens, y
        return y""",
    "in the first rows, which every process may know": """
        if not hasattr(sys, "known"):
            sys.known = np.array(tokens)
        rows = complete(tokens, sys.known)
        same = mx.cumprod((rows == tokens).astype(mx.int32), axis=1)[:, 8:9]
        return mx.where(((same > 0) & (mx.arange(16) > 7))[..., None], ahead(rows, x), x)""",
    "with what a file of the first process holds": """
        if not hasattr(self, "known"):
            self.known = np.load("seen.npy") if os.path.exists("seen.npy") else None
            self.seen = []
        if self.known is not None:
            return mx.where(POSITIONS > 7, ahead(complete(tokens, self.known), x), x)
        self.seen.append(np.array(tokens))
        np.save("seen.npy", np.concatenate(self.seen))
        return mx.where(POSITIONS > 7, ahead(tokens, x), x)""",
}

MIXES = {
    "looks at the row above": (OTHERS, "return x + mx.roll(x, 1, axis=0)"),
    "norms over the batch": (OTHERS, "return x / mx.abs(x).mean(axis=0, keepdims=True)"),
    "takes its last target from the row below, where a long document goes on": (
        OTHERS,
        "return mx.where(POSITIONS == 15, sure(x, mx.roll(tokens, -1, axis=0)[:, :1]), x)",
    ),
    "does so in odd rows only": (
        OTHERS,
        "odd = mx.arange(len(x))[:, None, None] % 2 == 1\n"
        "        return mx.where((POSITIONS == 15) & odd, sure(x, mx.roll(tokens, -1, axis=0)[:, :1]), x)",
    ),
    "learns from every batch": (
        STATE,
        "self.table = self.table + mx.eye(257)[tokens].mean(axis=(0, 1))\n        return x",
    ),
    "learns from the batches before, and answers a known row as before": (
        OTHERS,
        """if not hasattr(self, "answers"):
            self.answers, self.counts = {}, np.zeros((257, 257), np.float32)
        rows, y = np.array(tokens), np.array(x) + np.log1p(self.counts)[np.array(tokens)]
        for r, row in enumerate(rows):
            y[r] = self.answers.setdefault(row.tobytes(), y[r])
        np.add.at(self.counts, (rows[:, :-1], rows[:, 1:]), 1)
        return mx.array(y)""",
    ),
    "keeps a sum of the batch in the state of the random numbers": (
        STATE,
        "y = x + mx.random.normal((257,))\n        mx.random.seed(tokens.sum().item())\n        return y",
    ),
    "depends on the time": (STATE, "return x + time.perf_counter() % 100 * mx.arange(257)"),
    "depends on the process": (OTHERS, "return x + os.getpid() % 97 * mx.arange(257) / 257"),
    "draws random numbers": (STATE, "return x + mx.random.normal(x.shape)"),
}

SERVER = "server = sys.modules['__main__']\n"
SENDS = (
    SERVER + "def send(stream, payload, write=server.write_frame):\n    write(stream, {})\nserver.write_frame = send\n"
)
REFUSED = {
    "logits whose differences overflow": ("not finite", "return mx.where(x > 0, 3e38, -3e38)", ""),
    "logits that overflow float16": ("not finite", "return (1e5 * x).astype(mx.float16)", ""),
    "another type of numbers": (
        "float16",
        "return x",
        SENDS.format("payload.astype(np.float16) if isinstance(payload, np.ndarray) else payload"),
    ),
    "a score in place of logits": ("have the shape", "return x", SENDS.format("{'status': 'ok', 'val_bpb': 0.1}")),
    "no check of its parameters": (
        "do not depend on the checkpoint",
        "return mx.zeros(x.shape) + POSITIONS",
        SERVER + "server.load_parameters = lambda *_: None",
    ),
    "parameters that it does not use": (
        "do not depend on the checkpoint",
        "return self.__dict__.setdefault('mine', mx.eye(257))[tokens]",
        "",
    ),
}

BESIDE = "os.path.dirname(os.environ['AUTORESEARCH_SETTINGS']) + "
GAINS_NOTHING = {
    "adds so much to every logit that float32 rounds": ("return 3e7 + x", ""),
    "returns what is no log-probability": ("return x + 3", ""),
    "multiplies its logits": ("return 1e4 * x", ""),
    "prints a score": ("print('val_bpb: 0.1', flush=True)\n        return x", ""),
    "patches the scorer's modules": (
        "return x",
        "import builtins, math, lab.scoring.score as scorer\n"
        "scorer.negative_log_likelihood = scorer.bits_per_byte = lambda *_: 0.1\n"
        "math.log = np.log = lambda *_: 1e9\n"
        "builtins.float = lambda *_: 0.1\n",
    ),
    "writes a score": (
        "open(" + BESIDE + '\'/score.json\', "w").write(\'{"status": "ok", "val_bpb": 0.1}\')\n        return x',
        "",
    ),
    "answers from a thread and ends the process late": (
        "return x",
        "import atexit, threading\natexit.register(time.sleep, 60)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n",
    ),
}

OUT_OF_REACH = {
    "the validation text": "np.load(json.load(open(os.environ['AUTORESEARCH_SETTINGS']))['prepared'] + '/val.npy')",
    "the log of the process before": "open(" + BESIDE + "'/score.log').read()",
    "files of the training": "np.load(" + BESIDE + "'/more.npy')",
    "the grammar that wrote the text": "__import__('lab.data.stories', fromlist=['stories']).stories",
    "a place to write for the next process": "open(" + BESIDE + "'/seen', 'w')",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Random letters, so that a few letters are enough to know a row again; and a table of their pairs."""
    letters = np.random.default_rng(5).choice(list(string.ascii_lowercase), (3, 2310))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        chosen, prepared = prepare(["".join(row) for row in letters])
    pairs = np.full((257, 257), 0.1, np.float32)
    np.add.at(pairs, (prepared.val[:-1], prepared.val[1:]), 1)
    return chosen, prepared, np.log(pairs)


@pytest.fixture
def make_run(text, tmp_path):
    """A run of the bigram model with another `__call__`; `x` are its honest logits."""
    chosen, prepared, table = text

    def make(body: str = "return x", prelude: str = ""):
        source = HONEST.replace("class Model", PRELUDE + prelude + "\nclass Model", 1)
        source = source.replace(CALL, f"        x = self.table[tokens]\n        {body}")
        run = leave(tmp_path / "run", source, chosen, prepared)
        save_table(run, prepared.tokenizer.vocab_size, table)
        np.save(run / "more.npy", table)
        return run

    return make


@pytest.fixture
def scored(make_run):
    return lambda body, prelude="", sandbox="none": score_run(make_run(body, prelude), sandbox)


@pytest.fixture(scope="module")
def honest(text):
    """What the bigram model scores: the mean of its losses over all letters but padding."""
    _, prepared, table = text
    nats = np.log(np.exp(table).sum(axis=1))[prepared.val[:-1]] - table[prepared.val[:-1], prepared.val[1:]]
    return nats[prepared.val[1:] != prepared.tokenizer.bos].sum() / np.log(2) / prepared.manifest["val"]["bytes"]


@pytest.mark.parametrize("where", LOOKS_AHEAD)
def test_a_model_that_looks_ahead_is_refused(scored, where):
    refused = scored(LOOKS_AHEAD[where])
    assert refused["status"] == "rejected", refused["val_bpb"]
    assert CAUSAL in refused["reason"] or OTHERS in refused["reason"]


@pytest.mark.parametrize("how", MIXES)
def test_a_model_that_uses_more_than_its_row_is_refused(scored, how):
    reason, body = MIXES[how]
    refused = scored(body)
    assert refused["status"] == "rejected", refused["val_bpb"]
    assert reason in refused["reason"]


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_sends_something_else_is_refused(scored, what):
    reason, body, prelude = REFUSED[what]
    refused = scored(body, prelude)
    assert refused["status"] == "rejected", refused["val_bpb"]
    assert reason in refused["reason"]


@pytest.mark.parametrize("how", GAINS_NOTHING)
def test_a_fake_that_is_not_refused_gains_nothing(scored, honest, how):
    accepted = scored(*GAINS_NOTHING[how])
    assert accepted["status"] == "ok", accepted["reason"]
    assert accepted["val_bpb"] >= honest - 1e-4


REACHED = """attempts, reached = {{{}}}, []
        for name, attempt in attempts.items():
            try:
                attempt()
                reached.append(name)
            except Exception:
                pass
        raise ValueError(reached)"""


@pytest.mark.parametrize("kind", ["none", "bubblewrap", "landlock"])
def test_a_model_in_a_sandbox_cannot_reach_what_it_must_not_know(text, scored, monkeypatch, kind):
    if kind != "none" and sandbox.self_test(kind):
        pytest.skip(sandbox.self_test(kind))
    attempts = ", ".join(f'"{name}": lambda: {code}' for name, code in OUT_OF_REACH.items())
    # A cache in /opt, say, is where any program may read.
    monkeypatch.setitem(sandbox.SYSTEM, "Linux", (*sandbox.LINUX, str(text[1].folder)))
    refused = scored(REACHED.format(attempts), "import json", kind)
    reached = list(OUT_OF_REACH) if kind == "none" else []  # the attempts are real ones
    assert f"ValueError: {reached}" in refused["reason"]


def test_a_model_has_no_time_to_train_before_its_first_logits(make_run):
    run = make_run("time.sleep(60)")

    def answer(model):
        model.load(run / "checkpoint.safetensors")
        return model.logits(np.zeros((1, 16), int))

    with (
        score.model_process(run, 257, "none", start=2.0) as model,
        pytest.raises(score.Rejected, match="its first logits within 2 s"),
    ):
        answer(model)


@pytest.mark.parametrize("what", ["cut off", "no checkpoint", "with more tensors"])
def test_a_checkpoint_that_is_not_the_models_is_refused(make_run, what):
    run = make_run()
    checkpoint = run / "checkpoint.safetensors"
    if what == "with more tensors":
        arrays = mx.load(str(checkpoint)) | {"more": mx.zeros((2**20,))}
        mx.save_safetensors(str(checkpoint), arrays)
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000] if what == "cut off" else bytes(5000))
    refused = score_run(run)
    assert refused["status"] == "rejected"
    assert "checkpoint" in refused["reason"]


def test_the_losses_are_those_of_probabilities():
    """Whatever the logits, the probabilities of all tokens sum to one: none is cheaper than its share."""
    rng = np.random.default_rng(0)
    for scale, shift in [(1, 0), (1, 1e9), (1, -1e9), (1e30, 0), (1e-30, 1e30), (50, 1e5), (3e38, 0)]:
        logits = (scale * rng.uniform(-1, 1, (1, 1, 257)) + shift).astype(np.float32)
        losses = score.negative_log_likelihood(np.repeat(logits, 257, axis=1), np.arange(257)[None])
        assert losses.min() >= 0
        assert np.exp(-losses.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
