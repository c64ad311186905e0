"""`prepare.py sample` as a user types it: one run, two of them, a chat, and an export that stands on its own."""

import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from checkout import Checkout
from conftest import documents, environment

from lab.data.tokens import Tokenizer, train_tokenizer
from lab.interface.export import portable_tokenizer
from lab.interface.sample import opened

CONTEXT = 64
LOGITS = """
import numpy as np
from model import load
from lab.machine.backend import mx
model, tokens = load(), mx.array(np.load("tokens.npy"))
cache = model.make_cache()
text = [model(tokens[:, :70], cache=cache)] + [model(tokens[:, i : i + 1], cache=cache) for i in range(70, 80)]
np.savez("logits.npz", whole=model(tokens[:, :64]), short=model(tokens[:, :20]), text=mx.concatenate(text[1:], axis=1))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone with two runs of a model with a short window: `a` is scored, `b` is not."""
    checkout = Checkout(tmp_path_factory.mktemp("sample"))
    current = checkout.cache / "current.json"
    record = json.loads(current.read_text())
    record["preset"]["model"]["window"] = "SL"
    current.write_text(json.dumps(record))
    checkout.python("train.py", "--steps", 30, "--run-dir", "runs/a")
    checkout.python("train.py", "--steps", 5, "--seed", 1, "--run-dir", "runs/b", "--no-score")
    return checkout


def sample(checkout, *flags: object, **more) -> subprocess.CompletedProcess:
    command = checkout.command("prepare.py", "sample", *flags)
    return subprocess.run(command, **checkout.where(), capture_output=True, text=True, timeout=60, **more)


def on_a_terminal(checkout, columns: int, *flags: object, typed: tuple[str, ...] = ()) -> str:
    """What a terminal of this width shows; each of `typed` is typed at a prompt of its own."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    where = checkout.where() | {"env": environment(checkout.cache, TERM="xterm-256color")}
    command = checkout.command("prepare.py", "sample", *flags)
    child = subprocess.Popen(command, **where, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, answers = b"", list(typed)
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while select.select([ours], [], [], 60)[0] and (data := os.read(ours, 1 << 16)):
            shown += data
            if answers and shown.endswith(b"> "):
                os.write(ours, answers.pop(0).encode())
    os.close(ours)
    assert child.wait(timeout=30) == 0, shown
    return shown.decode(errors="replace")


def test_two_runs_are_shown_one_after_the_other_without_a_terminal(checkout):
    flags = ("--tokens", 30, "--prompt", "The dog", "--seed", 3)
    shown = sample(checkout, "runs/a", "runs/b", *flags).stdout
    alone = [sample(checkout, run, *flags).stdout for run in ("runs/a", "runs/b")]
    score = json.loads((checkout.folder / "runs/a/result.json").read_text())["val_bpb"]
    assert shown == f"runs/a\nval_bpb {score:.6f}\n{alone[0]}\nruns/b\nnot scored\n{alone[1]}\n"
    assert alone[0] != alone[1]


@pytest.mark.parametrize(("columns", "together"), [(120, True), (60, False)])
def test_a_wide_terminal_shows_two_runs_side_by_side(checkout, columns, together):
    shown = on_a_terminal(checkout, columns, "runs/a", "runs/b", "--tokens", 10)
    assert any("runs/a" in line and "runs/b" in line for line in shown.splitlines()) == together
    assert "val_bpb" in shown
    assert "not scored" in shown


@pytest.mark.parametrize(
    "flags", [("runs/a",) * 3, ("runs/a", "runs/b", "--chat"), ("runs/a", "runs/b", "--export", "x")]
)
def test_too_many_runs_are_refused(checkout, flags):
    done = sample(checkout, *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_a_night_that_is_not_there_is_refused(checkout):
    assert "there is no night x; there are: none" in sample(checkout, "--tag", "x").stderr


# ---- chat


def test_a_piped_chat_gives_the_continuations_and_nothing_else(checkout):
    typed = "/temperature 0\nThe dog\n"
    done = sample(checkout, "runs/a", "--chat", "--tokens", 10, input=typed)
    whole = sample(checkout, "runs/a", "--prompt", "The dog", "--tokens", 20, "--temperature", 0).stdout
    text = done.stdout.rstrip("\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert text
    assert whole.startswith("The dog" + text)


def test_commands_of_a_chat(checkout):
    typed = "Tom was sad.\n/retry\n\n/new\n/temperature -1\n/whatever\n/quit\nnot read\n"
    done = sample(checkout, "runs/a", "--chat", "--tokens", 5, "--seed", 1, input=typed)
    same = sample(checkout, "runs/a", "--chat", "--tokens", 5, "--seed", 1, input="Tom was sad.\n").stdout
    assert done.returncode == 0
    assert done.stdout.startswith(same.rstrip("\n"))
    assert done.stdout != same
    assert "needs a number of at least 0" in done.stderr
    assert "/new /retry /temperature" in done.stderr


def test_a_chat_on_a_terminal_shows_its_commands_and_ends_with_ctrl_d(checkout):
    shown = on_a_terminal(checkout, 120, "runs/a", "--chat", "--tokens", 5, typed=("The cat\n", "\x04"))
    assert shown.count("> ") == 2
    assert "/new /retry /temperature" in shown
    assert "Traceback" not in shown


def test_ctrl_c_ends_a_continuation_and_not_the_chat(checkout):
    command = checkout.command("prepare.py", "sample", "runs/a", "--chat", "--tokens", 10**6, "--temperature", 0)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **checkout.where(), **pipes) as chat:
        chat.stdin.write(b"The cat\nThe dog\n")
        chat.stdin.flush()
        for _ in range(2):
            assert chat.stdout.read(3)  # it writes
            chat.send_signal(signal.SIGINT)
            assert chat.stdout.readline()
            time.sleep(0.1)
        rest, errors = chat.communicate(b"/quit\n", timeout=30)
    assert (chat.returncode, rest, errors) == (0, b"", b"")


# ---- export


@pytest.fixture(scope="module")
def exported(checkout):
    folder = checkout.folder.parent / "exported"
    done = sample(checkout, "runs/a", "--export", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_exported_model_answers_as_the_run_does_from_its_folder_alone(checkout, exported, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, (1, 80), np.int32)
    np.save(exported / "tokens.npy", tokens)
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("AUTORESEARCH", "PYTHON"))}
    done = subprocess.run([sys.executable, "-c", LOGITS], cwd=exported, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = np.load(exported / "logits.npz")
    with opened(checkout.folder / "runs/a", "none") as run:
        expected = run.model(tokens[:, :CONTEXT])
        last = [run.model(tokens[:, end - CONTEXT : end])[:, -1:] for end in range(71, 81)]
    assert np.array_equal(got["whole"], expected)
    assert np.allclose(got["short"], expected[:, :20], atol=1e-5)
    assert np.allclose(got["text"], np.concatenate(last, axis=1), atol=1e-5)


def test_an_export_tells_what_it_is(checkout, exported):
    config = json.loads((exported / "config.json").read_text())
    result = json.loads((checkout.folder / "runs/a/result.json").read_text())
    assert {key: config[key] for key in ("val_bpb", "task")} == {key: result[key] for key in ("val_bpb", "task")}
    assert (config["vocab_size"], config["max_position_embeddings"]) == (257, CONTEXT)
    assert config["constants"]["DEPTH"] == config["settings"]["depth"] == 2
    assert str(round(result["val_bpb"], 6)) in (exported / "README.md").read_text()
    assert f"{result['num_params'] / 1e6:.2f}M parameters" in (exported / "README.md").read_text()
    assert "its tokens are the 256 bytes" in (exported / "README.md").read_text()
    assert (exported / "train.py").read_text() == (checkout.folder / "runs/a/train.py").read_text()


def test_an_export_names_no_folder_user_or_machine(checkout, exported):
    private = {str(checkout.folder.parent), str(checkout.cache), str(Path.home()), sys.prefix}
    private |= {name for name in [socket.gethostname()] if len(name) > 5}
    for path in [path for path in exported.rglob("*") if path.is_file() and path.suffix != ".pyc"]:
        content = path.read_bytes()
        assert [text for text in private if text.encode() in content] == [], path


def test_the_readmes_program_writes_what_sample_writes(checkout, exported):
    program = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    text = subprocess.run([sys.executable, "-c", program], cwd=exported, capture_output=True, text=True)
    expected = sample(checkout, "runs/a", "--tokens", 100, "--temperature", 0).stdout
    assert text.returncode == 0, text.stderr
    assert text.stdout == expected


def test_a_folder_that_is_there_is_not_written_to(checkout, exported):
    before = sorted(exported.iterdir())
    done = sample(checkout, "runs/a", "--export", exported)
    assert f"error: {exported} already exists; choose a new folder" in done.stderr
    assert sorted(exported.iterdir()) == before


@pytest.mark.parametrize("size", [256, 300])
def test_other_tools_read_the_tokenizer(tmp_path, size):
    tokenizer = train_tokenizer(iter(documents(50)), size)
    (tmp_path / "tokenizer.json").write_text(portable_tokenizer(tokenizer))
    other = Tokenizer.load(tmp_path / "tokenizer.json").inner
    for text in ("Once upon a time", "Ünder 12 naïve\n\n  dogs' 🐶"):
        assert other.encode(text).ids == tokenizer.encode([text])[0].tolist()
        assert other.decode(other.encode(text).ids) == text


def test_mlx_lm_generates_what_sample_does(checkout, exported):
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed; the export is tested without it")
    model, tokenizer = mlx_lm.load(str(exported), trust_remote_code=True)
    text = mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=50)
    expected = sample(checkout, "runs/a", "--tokens", 50, "--temperature", 0).stdout
    assert expected.removeprefix("Once upon a time").removeprefix(" ") == f"{text}\n"  # mlx-lm drops a first space


# ---- clean


def test_of_the_users_runs_the_newest_the_best_and_the_latest_stay_whole(checkout):
    runs = checkout.folder / "runs"
    score = json.loads((runs / "a/score.json").read_text())
    for number in range(8):  # copies of a real run, oldest first; the second is the best, the fourth of another task
        path = shutil.copytree(runs / "a", runs / f"copy{number}")
        other = {1: {"val_bpb": 0.5}, 3: {"task": "another"}}.get(number, {"val_bpb": 9.0})
        (path / "score.json").write_text(json.dumps(score | other))
        os.utime(path / "checkpoint.safetensors", (1000 + number, 1000 + number))
    (runs / "latest").symlink_to("copy0")
    (runs / "copy2" / "notes.md").write_text("the user's")
    made = checkout.python("prepare.py", "clean", "--runs").stdout
    assert sum("(kept: " in line for line in made.splitlines()) == 8
    text = checkout.python("prepare.py", "clean", "--runs", "--yes").stdout.splitlines()[-1]
    assert text.startswith("removed 2, ")
    gone = {
        path.parent.name for path in runs.glob("*/train.py") if not (path.parent / "checkpoint.safetensors").exists()
    }
    assert gone == {"copy2", "copy4"}
    assert {path.name for path in (runs / "copy4").iterdir()} >= {
        "train.py",
        "result.json",
        "steps.jsonl",
        "score.json",
    }
    assert "error: " in sample(checkout, "runs/copy4").stderr
