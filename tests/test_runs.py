"""Whole runs of train.py, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, edit

from lab.data.stories import stories
from lab.trial.crash import summary


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An environment in which real text is prepared for a small model."""
    folder = tmp_path_factory.mktemp("whole")
    env = os.environ | {"AUTORESEARCH_CACHE": str(folder / "cache")}
    env.pop("AUTORESEARCH_SETTINGS", None)
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t, _ in zip(stories(5), range(900), strict=False))
    )
    done = subprocess.run(
        [
            sys.executable,
            "prepare.py",
            "--no-fit",
            "--preset",
            "offline",
            "--vocab",
            "256",
            "--seq",
            "64",
            "--files",
            folder / "text.jsonl",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    current = folder / "cache" / "current.json"
    preset = json.loads(current.read_text())["preset"]
    preset["model"] |= {"depth": 2, "width": 64, "head_dim": 32}
    preset["batch"] |= {"rows": 8, "tokens_per_step": 512, "processes": 1, "doubling": 1.0}
    edit(current, preset=preset)
    return folder, env


def run_train(prepared, name: str, *flags: str, source: Path = ROOT / "train.py"):
    folder, env = prepared
    done = subprocess.run(
        [sys.executable, source, "--run-dir", folder / name, *flags],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    steps = folder / name / "steps.jsonl"
    return done, [json.loads(line)["loss"] for line in steps.read_text().splitlines()] if steps.exists() else []


def test_a_run_learns_writes_its_records_and_repeats(prepared):
    done, losses = run_train(prepared, "one", "--steps", "40", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1.5
    keys = [line.split(":")[0] for line in done.stdout.split("---\n")[1].splitlines()]
    assert keys == [
        "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
        "num_params_M", "depth",
    ]  # fmt: skip
    folder = prepared[0] / "one"
    result = json.loads((folder / "result.json").read_text())
    assert result["num_steps"] == 40
    assert result["total_tokens"] == 40 * 512
    assert 0 < result["mfu_percent"] < 100
    assert result["peak_memory_mb"] > 1
    assert f"val_bpb:          {result['val_bpb']:.6f}" in done.stdout
    assert result["val_bpb"] < 5
    assert (folder / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert "\r" not in done.stdout

    _, again = run_train(prepared, "again", "--steps", "40", "--seed", "1", "--no-score")
    assert again == losses
    _, other = run_train(prepared, "other", "--steps", "3", "--seed", "2", "--no-score")
    assert other != losses[:3]


def test_a_step_doubles_when_its_share_of_the_budget_is_spent(prepared):
    folder, env = prepared
    record = json.loads((folder / "cache" / "current.json").read_text())
    record["preset"]["batch"] |= {"doubling": 0.5}
    (folder / "doubling.json").write_text(json.dumps(record))
    doubling = folder, env | {"AUTORESEARCH_SETTINGS": str(folder / "doubling.json")}
    done, losses = run_train(doubling, "doubling", "--steps", "8", "--no-score")
    assert done.returncode == 0, done.stderr
    _, usual = run_train(prepared, "usual", "--steps", "8", "--no-score")
    assert losses[:6] == usual[:6]
    steps, others = (
        [json.loads(line) for line in (folder / name / "steps.jsonl").read_text().splitlines()]
        for name in ("doubling", "usual")
    )
    assert [step["tokens"] for step in steps] == [512 * n for n in (1, 2, 3, 4, 5, 6, 8, 10)]
    for step, other in zip(steps[6:], others[6:], strict=True):
        assert step["rate"] == pytest.approx(2**0.5 * other["rate"])


def test_the_budget_is_kept(prepared):
    done, _ = run_train(prepared, "budget", "--minutes", "0.05", "--no-score")
    assert done.returncode == 0
    result = json.loads((prepared[0] / "budget" / "train.json").read_text())
    assert 3.0 <= result["training_seconds"] < 4.5
    assert result["num_steps"] > 5
    assert {"attention.query", "mlp.up", "head"} <= result["updates"].keys()
    assert all(len(ratios) == 2 and 0 <= max(ratios) < 10 for ratios in result["updates"].values())
    assert 1e-4 < result["updates"]["attention.query"][0] < 1


def test_a_failed_run_leaves_no_result_of_an_earlier_one(prepared, tmp_path):
    run_train(prepared, "reused", "--steps", "2")
    assert (prepared[0] / "reused" / "result.json").exists()
    source = tmp_path / "train.py"
    source.write_text((ROOT / "train.py").read_text().replace("batches = run.batches(ROWS, TOKENS_PER_STEP)", "1 / 0"))
    done, _ = run_train(prepared, "reused", "--steps", "2", source=source)
    assert done.returncode == 1
    assert sorted(path.name for path in (prepared[0] / "reused").glob("*.json")) == ["settings.json"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "loss = step(*batch, mx.array(rate), mx.array(decay))",
            "loss = step(*batch, mx.array(rate), mx.array(decay)) * float('nan')",
        ),
        ("MATRIX_LR = SETTINGS.matrix_lr", "MATRIX_LR = 1e6"),
    ],
)
def test_a_diverged_run_fails_fast(prepared, tmp_path, old, new):
    source = tmp_path / "train.py"
    text = (ROOT / "train.py").read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    done, losses = run_train(prepared, f"diverged-{len(new)}", "--steps", "200", source=source)
    assert done.returncode == 1
    assert len(losses) < 50
    crash = summary(done.stderr, tmp_path / "none", "exit 1")
    assert crash.message.startswith("error: the run diverged: the loss is"), done.stderr  # what a night passes on
    assert "Traceback" not in done.stderr
    assert "val_bpb" not in done.stdout


def test_a_crash_keeps_its_traceback(prepared, tmp_path):
    source = tmp_path / "train.py"
    source.write_text((ROOT / "train.py").read_text().replace("batches = run.batches(ROWS, TOKENS_PER_STEP)", "1 / 0"))
    done, _ = run_train(prepared, "crash", "--steps", "2", source=source)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_sample_continues_the_prompt_and_repeats(prepared):
    folder, env = prepared
    run_train(prepared, "sampled", "--steps", "30", "--no-score")
    command = [sys.executable, "prepare.py", "sample", folder / "sampled", "--prompt", "Ünder", "--tokens", "40"]
    texts = [
        subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True).stdout
        for flags in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"])
    ]
    assert all(text.startswith("Ünder") and len(text) > 12 for text in texts)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
