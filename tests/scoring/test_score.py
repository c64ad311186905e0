"""The score is right, and a model that cheats is rejected. Real processes, real checkpoints, tiny models."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from finished_run import CALL, HONEST, leave, prepare, save_table

from lab.errors import UserError
from lab.files import sealed, sha256
from lab.interface.sample import records
from lab.scoring.score import LOG_BYTES, bits_per_byte, check_rows, negative_log_likelihood, score_run


@pytest.fixture
def make_run(tmp_path):
    """A finished run of `source` on these validation texts."""

    def make(
        source: str = HONEST, val=("The cat sat.", "A naïve dog; " * 9, "Ünïcödé 🐱 wörds"), vocab=256, table=None
    ):
        chosen, prepared = prepare(val, vocab)
        run = leave(tmp_path / f"run{len(list(tmp_path.iterdir()))}", source, chosen, prepared)
        save_table(run, prepared.tokenizer.vocab_size, table)
        return run, prepared

    return make


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


def test_the_score_by_position_is_that_of_each_quarter_of_the_context(make_run):
    """A model whose logits grow along the row: its advantage on repeated text grows too."""
    table = np.zeros((257, 257), np.float32)
    table[ord("a"), ord("a")] = 1
    grows = "        return self.table[tokens] * mx.arange(tokens.shape[1])[None, :, None]"
    run, _ = make_run(HONEST.replace(CALL, grows), val=["a" * 64 * 15], table=table)
    score = score_run(run)
    assert score["positions"] == sorted(score["positions"], reverse=True)
    assert sum(score["positions"]) / 4 == pytest.approx(score["val_bpb"], rel=0.02)


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
    "ZeroDivisionError: division by zero (train.py line 8)": "        return 1 / 0",
    "process died": "        import os; os._exit(3)",
    "keeps state": "        self.calls = getattr(self, 'calls', 0) + 1\n"
    "        return self.table[tokens] + (self.calls > 4) * 0.5 * mx.arange(257.0)",
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
        ("import mx", "import no_such_thing", "no_such_thing"),
    ],
)
def test_a_model_that_does_not_match_its_checkpoint_is_rejected(make_run, old, new, reason):
    run, _ = make_run(HONEST.replace(old, new))
    score = score_run(run)
    assert score["status"] == "rejected"
    assert reason in score["reason"]


class Answers:
    """A model process that always gives these losses, and keeps what it was asked."""

    vocab_size = 2**30

    def __init__(self):
        self.asked = []

    def losses(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        self.asked.append((tokens.copy(), rows))
        return np.zeros(rows[:, 1:].shape)


def test_a_row_is_shown_in_growing_pieces_and_never_before():
    """A process that has seen more of a row could look ahead in what it remembers."""
    rows, seen = np.arange(9 * 7).reshape(9, 7), {}
    model = Answers()
    check_rows(model, rows, np.zeros((9, 6)), batch=4, passes=6)
    for tokens, asked in model.asked:
        assert tokens.shape == (4, 6)
        for place, (shown, row) in enumerate(zip(tokens, asked, strict=True)):
            length = int((shown == row[:-1]).cumprod().sum())
            assert not np.isin(shown[length:], rows).any()  # what follows is noise
            if length:
                assert row[0] // 7 % 4 == place
                seen.setdefault(row[0], []).append(length)
    assert len(seen) == 9
    assert all(sorted(lengths) == lengths and len(lengths) == 6 for lengths in seen.values())
    assert {6, 1} <= {length for lengths in seen.values() for length in lengths}


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


def test_upstreams_byte_rule_by_hand(make_run):
    """Pure bytes, all equally likely. Alone, both bytes of é decode to U+FFFD, which has three."""
    run, _ = make_run(val=["aé"], table=np.zeros((257, 257), np.float32))
    score = score_run(run)
    assert score["val_bpb"] == pytest.approx(3 * math.log2(257) / 3, rel=1e-6)
    assert score["upstream_bpb"] == pytest.approx(3 * math.log2(257) / (1 + 3 + 3), rel=1e-6)


def test_one_checkpoint_by_both_byte_rules(make_run):
    """Upstream decodes every token of the vocabulary, takes the UTF-8 length of that, and 0 for special tokens."""
    run, prepared = make_run(vocab=300)
    score, tokenizer, val = score_run(run), prepared.tokenizer, prepared.val.tolist()
    lengths = {token: len(tokenizer.decode([token]).encode()) for token in val if token != tokenizer.bos}
    bits = score["val_bpb"] * score["scored_bytes"]
    assert score["upstream_bpb"] == pytest.approx(bits / sum(lengths.get(token, 0) for token in val), rel=1e-6)
    assert score["upstream_bpb"] < 0.9 * score["val_bpb"]  # the text is not ASCII


def test_ascii_scores_the_same_by_both_byte_rules(make_run):
    run, _ = make_run(val=["The cat sat on the mat."], vocab=300)
    score = score_run(run)
    assert score["upstream_bpb"] == pytest.approx(score["val_bpb"], rel=1e-9)


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
