"""The task of karpathy/autoresearch, from a hub on loopback to both scores."""

import json
import re

from conftest import documents
from hub_server import parquet, serve

from lab import preset

CLIMBMIX = preset.load("climbmix")


def test_the_preset_is_upstreams_task():
    """Facts of karpathy/autoresearch: BASE_URL, VAL_SHARD, VOCAB_SIZE, MAX_SEQ_LEN and TIME_BUDGET of prepare.py, the
    number of shards it downloads; depth, width, window and batch of train.py."""
    data, model = CLIMBMIX.data, CLIMBMIX.model
    assert (data.repo, data.val_files) == ("karpathy/climbmix-400b-shuffle", ("shard_06542.parquet",))
    assert data.train_files == tuple(f"shard_{number:05d}.parquet" for number in range(10))
    assert (CLIMBMIX.tokenizer.vocab_size, CLIMBMIX.task) == (8192, preset.Task(2048, 5.0))
    assert (model.depth, model.width, model.window, CLIMBMIX.batch.tokens_per_step) == (8, 8 * 64, "SSSL", 2**19)


def test_it_prepares_from_the_hub_and_states_both_scores(cache, script):
    texts = documents(400)
    files = {name: parquet(texts[i * 35 : i * 35 + 35]) for i, name in enumerate(CLIMBMIX.data.train_files)}
    files |= {CLIMBMIX.data.val_files[0]: parquet(["naïve café 🐱 " * 20, *texts[350:355]])}
    with serve(files, repo=CLIMBMIX.data.repo) as server:
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        done = script("prepare.py", "--preset", "climbmix", "--vocab", 300, "--seq", 64, **hub)
    assert done.returncode == 0, done.stderr
    assert "350 documents" in done.stdout
    run = cache / "run"
    done = script("train.py", "--steps", 2, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert f"by upstream's byte rule: {result['upstream_bpb']:.6f} " in done.stdout
    assert re.search(rf"^val_bpb: +{result['val_bpb']:.6f}$", done.stdout, re.M)
    assert result["upstream_bpb"] < result["val_bpb"]
    scored = script("prepare.py", "score", run)
    assert f"by upstream's byte rule: {result['upstream_bpb']:.6f} " in scored.stdout
