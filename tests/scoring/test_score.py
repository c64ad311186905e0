"""The score is right, and a model that cheats is rejected. Real processes, real checkpoints, tiny models."""

import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from lab import preset
from lab.data import shards
from lab.data.stories import stories
from lab.errors import UserError
from lab.files import sealed, sha256
from lab.interface.sample import records
from lab.scoring.score import LOG_BYTES, bits_per_byte, negative_log_likelihood, score_run

HONEST = """
import prepare
from lab.machine.backend import mx, nn
class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = 0.1 * mx.random.normal((vocab_size, vocab_size))
    def __call__(self, tokens):
        return self.table[tokens]
def build_model(vocab_size):
    return Model(vocab_size)
"""

CALL = "        return self.table[tokens]"


LEARNT = list(islice(stories(seed=3), 20))


class Texts:
    def __init__(self, train: list[str], val: list[str]):
        self.identity = {"train": train, "val": val}
        self.train, self.val = lambda: iter(train), lambda: iter(val)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A finished run of `source` on these validation texts, as training would have left it."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))

    def make(
        source: str = HONEST, val=("The cat sat.", "A naïve dog; " * 9, "Ünïcödé 🐱 wörds"), vocab=256, table=None
    ):
        chosen = preset.override(preset.load("offline"), vocab_size=vocab, sequence_length=16)
        prepared, _ = shards.prepare(chosen, Texts(LEARNT, list(val)), ignore)
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        record = {"preset": preset.to_dict(chosen), "tier": "", "prepared": str(prepared.folder)}
        record |= {"minutes": 5.0, "steps": None, "seed": 0}
        (run / "settings.json").write_text(json.dumps(record))
        (run / "train.py").write_text(source)
        save_table(run, prepared.tokenizer.vocab_size, table)
        return run, prepared

    return make


def ignore(*_):
    pass


def save_table(run: Path, size: int, table: np.ndarray | None) -> None:
    from lab.machine.backend import mx

    if table is None:
        table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    mx.save_safetensors(str(run / "checkpoint.safetensors"), {"table": mx.array(table)})


def test_bits_per_byte_by_hand():
    # Two tokens of probability 1/4 and 1/2 over three bytes: (2 + 1) bits / 3 bytes.
    assert bits_per_byte(math.log(4) + math.log(2), 3) == pytest.approx(1.0)


def test_negative_log_likelihood_by_hand():
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32))
    nats = negative_log_likelihood(logits, np.array([[1, 2]]))
    assert nats[0] == pytest.approx([math.log(4), -math.log(0.7)], rel=1e-5)


def test_whole_score_by_hand(make_run):
    """A bigram table over bytes: every term of the sum written out."""
    text = "abca"
    table = np.zeros((257, 257), np.float32)
    table[256, ord("a")], table[ord("a"), ord("b")], table[ord("b"), ord("c")] = 3, 2, 1
    run, _ = make_run(val=[text], table=table)

    def cost(boost):
        return math.log(math.exp(boost) + 256) - boost

    expected = (cost(3) + cost(2) + cost(1) + math.log(257)) / math.log(2) / 4
    score = score_run(run)
    assert score["val_bpb"] == pytest.approx(expected, rel=1e-5)
    assert score["scored_bytes"] == 4
    assert score["documents"] == [[pytest.approx(expected * 4 * math.log(2), rel=1e-4), 4]]


def test_pure_bytes_with_uniform_output_score_log2_of_the_vocabulary(make_run):
    run, prepared = make_run(table=np.full((257, 257), 2.5, np.float32))
    assert prepared.tokenizer.vocab_size == 257
    assert score_run(run)["val_bpb"] == pytest.approx(math.log2(257), rel=1e-6)


@pytest.mark.parametrize("vocab", [256, 300])
def test_every_byte_is_scored_once_whatever_the_vocabulary(make_run, vocab):
    val = ["Ünïcödé 🐱 wörds " * 30, "short", "x", "naïve " * 100]
    run, _ = make_run(val=val, vocab=vocab)
    score = score_run(run)
    assert score["status"] == "ok", score
    assert [size for _, size in score["documents"]] == [len(text.encode()) for text in val]
    assert score["scored_bytes"] == sum(len(text.encode()) for text in val)
    assert sum(nats for nats, _ in score["documents"]) / math.log(2) / score["scored_bytes"] == pytest.approx(
        score["val_bpb"], rel=1e-3
    )


def test_the_score_is_the_same_again_and_the_task_does_not_depend_on_the_vocabulary(make_run):
    run, _ = make_run()
    other, _ = make_run(vocab=300)
    one, again = score_run(run), score_run(run)
    assert one["val_bpb"] == again["val_bpb"]
    assert score_run(other)["task"] == one["task"]


LATER = "        x = self.table[tokens]\n        return x + "
CHEATS = {
    "depend on later tokens": LATER + "mx.roll(x, -1, axis=1)",
    "the model is not causal": LATER + "x.mean(axis=1, keepdims=True)",
    "rows of the batch": LATER + "x.mean(axis=(0, 1))",
    "other rows of the batch": LATER + "mx.roll(x, 1, axis=0)",
    "not finite": LATER + "mx.array(float('nan'))",
    "not finite ": LATER + "mx.where(mx.arange(x.shape[-1]) == 97, -mx.inf, 0)",
    "have the shape": "        return self.table[tokens][:, :-1]",
    "have the shape ": "        return self.table[tokens][..., :-1]",
    "do not depend on the checkpoint": "        return mx.sin(mx.arange(257.0))[None, None] + 0 * self.table[tokens]",
    "returned tuple": "        return self.table[tokens], 0.1",
    "ZeroDivisionError: division by zero (train.py line 9)": "        return 1 / 0",
    "process died": "        import os; os._exit(3)",
    "keeps state": "        self.calls = getattr(self, 'calls', 0) + 1\n"
    "        return self.table[tokens] + (self.calls > 7) * 0.5 * mx.arange(257.0)",
    "changed by": LATER + "mx.where((mx.arange(tokens.shape[1]) % 4 == 0)[:, None], mx.roll(x, -1, axis=1), 0)",
}


@pytest.mark.parametrize("reason", CHEATS)
def test_a_cheating_model_is_rejected_with_the_reason(make_run, reason):
    # 435 rows in batches of 128: the last batch may be probed too and must have rows enough to catch "changed by"
    run, _ = make_run(HONEST.replace(CALL, CHEATS[reason]), val=["A sentence of the validation text. " * 66] * 3)
    score = score_run(run)
    assert score["status"] == "rejected"
    assert reason.strip() in score["reason"]
    assert "val_bpb" not in score
    assert json.loads((run / "score.json").read_text()) == score


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("self.table = ", "self.other = ", "do not match the checkpoint's, e.g. other"),
        ("return Model(vocab_size)", "return Model(vocab_size + 1)", "do not match the checkpoint's, e.g. table"),
        ("    def __call__", "    def load_weights(self, *a, **k): pass\n    def __call__", "does not have its value"),
        ("def build_model", "def build", "build_model"),
        ("import prepare", "import prepare, no_such_module", "no_such_module"),
    ],
)
def test_a_model_that_does_not_match_its_checkpoint_is_rejected(make_run, old, new, reason):
    run, _ = make_run(HONEST.replace(old, new))
    score = score_run(run)
    assert score["status"] == "rejected"
    assert reason in score["reason"]


def test_what_the_experiment_prints_does_not_disturb_the_score(make_run):
    run, _ = make_run("print('val_bpb: 0.1', flush=True)\n" + HONEST.replace(CALL, "        print(9)\n" + CALL))
    assert score_run(run)["status"] == "ok"


def test_a_damaged_validation_shard_is_an_error(make_run):
    run, prepared = make_run()
    data = bytearray((prepared.folder / "val.npy").read_bytes())
    data[-1] ^= 1
    (prepared.folder / "val.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.*val\.npy"):
        score_run(run)


def test_an_unfinished_run_is_an_error(make_run):
    run, _ = make_run()
    (run / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint\.safetensors"):
        score_run(run)


def test_links_that_training_left_are_not_followed(make_run, tmp_path):
    run, _ = make_run()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (run / "score").symlink_to(precious)
    (run / "score.log").symlink_to(precious / "file")
    (run / "score.json").symlink_to(precious / "file")
    assert score_run(run)["status"] == "ok"
    assert (precious / "file").read_text() == "mine"
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_a_forged_number_in_the_training_record_does_not_count(make_run):
    run, _ = make_run()
    (run / "train.json").write_text('{"val_bpb": 0.1, "num_steps": 3}')
    score = score_run(run)
    result = json.loads((run / "result.json").read_text())
    assert result["val_bpb"] == score["val_bpb"] > 1
    assert result["num_steps"] == 3


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "settings.json"])
def test_a_run_with_a_flipped_bit_is_named_and_not_scored(make_run, name):
    run, _ = make_run()
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(sealed(settings)))
    (run / "train.json").write_text(json.dumps({"status": "ok", "checkpoint": sha256(run / "checkpoint.safetensors")}))
    assert score_run(run)["status"] == "ok"
    content = bytearray((run / name).read_bytes())
    content[-50 if name == "settings.json" else -2] ^= 4
    (run / name).write_bytes(content)
    (run / "score.json").unlink()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        score_run(run)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        records(run)
    assert not (run / "score.json").exists()


def test_a_gigabyte_printed_while_scoring_does_not_fill_the_disk(make_run):
    run, _ = make_run(HONEST + "for _ in range(1024):\n    print('x' * (1 << 20))\n")
    assert score_run(run)["status"] == "rejected"
    assert (run / "score.log").stat().st_size <= LOG_BYTES


def test_a_killed_scoring_leaves_nothing_behind(make_run):
    run, _ = make_run()
    score_run(run)
    before = sorted(path.name for path in run.iterdir())
    killed = "score.ModelProcess.load = lambda *_: os._exit(9)"
    code = f"import os, sys; from pathlib import Path; from lab.scoring import score; {killed}"
    done = subprocess.run([sys.executable, "-c", f"{code}; score.score_run(Path(sys.argv[1]))", run], cwd=ROOT)
    assert done.returncode == 9
    (run / ".score.json.1.tmp").touch()
    score_run(run)
    assert sorted(path.name for path in run.iterdir()) == before
