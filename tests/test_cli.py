import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, refusal

IMPORT_EVERYTHING = """
import os, pkgutil, sys

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate", "shutil.", "tempfile.")
OUTSIDE = ("subprocess.", "os.system", "os.posix_spawn", "os.fork", "socket.", "urllib.")
violations = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[2], int):
        if arguments[2] & WRITING:
            violations.append((event, str(arguments[0])))
    elif event.startswith(CHANGING + OUTSIDE) and event not in ("socket.__new__",):
        violations.append((event, str(arguments)[:200]))

sys.addaudithook(watch)
import lab
for module in sorted(info.name for info in pkgutil.walk_packages(lab.__path__, "lab.")):
    if not module.endswith("__main__"):
        __import__(module)
import prepare, train
sys.stdout.flush()
assert violations == [], violations
hub = [name for name in ("datasets", "huggingface_hub", "fsspec") if name in sys.modules]
assert hub == [], hub
"""


def test_importing_does_nothing(tmp_path):
    home, workplace = tmp_path / "home", tmp_path / "workplace"
    for folder in (home, workplace):
        folder.mkdir()
    home.chmod(0o555)
    variables = {k: v for k, v in environment(tmp_path).items() if not k.startswith(("AUTORESEARCH", "XDG", "HF"))}
    variables |= {"HOME": str(home), "TMPDIR": str(workplace), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_EVERYTHING]
    done = subprocess.run(command, cwd=workplace, env=variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [*home.iterdir(), *workplace.iterdir()] == []


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ("prepare.py --help", ["--preset", "--vocab", "--seq", "--files", "--val-files", "score", "sample"]),
        ("prepare.py score --help", ["RUN_DIR", "val_bpb"]),
        ("prepare.py sample --help", ["--prompt", "--tokens", "--temperature", "--top-k", "--seed", "--count"]),
        ("prepare.py sample --help", ["--tag", "--chat", "--export"]),
        ("train.py --help", ["--minutes", "--steps", "--seed", "--run-dir", "--no-score"]),
    ],
)
def test_help_lists_the_options_and_does_nothing(script, cache, command, mentions):
    shown = script(*command.split())
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [word for word in mentions if word not in shown.stdout] == []
    for option in re.findall(r"^  --[\w-]+.*(?:\n {3,}.*)*", shown.stdout, re.M):
        assert re.search(r" {2,}\S+ \S+", option), f"no help for {option}"
    assert not cache.exists()


@pytest.mark.parametrize(
    "command",
    [
        "prepare.py --presett offline",
        "prepare.py --vocab 1.5",
        "prepare.py --files",
        "prepare.py scores",
        "prepare.py score",
        "prepare.py sample absent",
        "prepare.py sample --tokens 0",
        "train.py --minute 5",
        "train.py --minutes 0",
        "train.py --minutes nan",
        "train.py --minutes inf",
        "train.py --steps 0",
        "train.py --seed -1",
    ],
)
def test_a_wrong_flag_is_explained_with_exit_status_2(script, cache, command):
    done = script(*command.split())
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert not cache.exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--vocab 299", "tokenizer.vocab_size"),
        ("--vocab 65537", "tokenizer.vocab_size"),
        ("--seq 0", "task.sequence_length"),
        ("--seq 4", "task.sequence_length"),
    ],
)
def test_impossible_values_of_flags_are_refused_in_one_line(script, cache, text_file, flags, reason):
    assert reason in refusal(script("prepare.py", "--preset", "offline", "--files", text_file, *flags.split()))
    assert not cache.exists()


def test_validation_files_without_training_files_are_refused(script, cache):
    assert "--val-files (VAL_FILES=) needs --files" in refusal(script("prepare.py", "--val-files", "x.txt"))
    assert not cache.exists()


@pytest.mark.parametrize(("name", "length"), [("fineweb", 512), ("offline", 128), ("tinystories", 512)])
def test_another_context_is_prepared_with_every_preset(script, text_file, name, length):
    done = script("prepare.py", "--preset", name, "--vocab", 256, "--seq", length, "--files", text_file)
    assert (done.returncode, done.stderr.splitlines()[2:]) == (0, [])


def test_training_before_anything_is_prepared_is_refused(script, tmp_path):
    line = refusal(script("train.py", "--steps", 1, "--run-dir", tmp_path / "run"))
    assert "nothing is prepared yet; run `make prepare PRESET=offline`" in line
    assert not (tmp_path / "run").exists()


def test_training_after_the_data_was_removed_is_refused(prepared, script, tmp_path):
    shutil.rmtree(prepared)
    line = refusal(script("train.py", "--steps", 1, "--run-dir", tmp_path / "run"))
    assert f"nothing is prepared in {prepared}; run `make prepare`" in line


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_current_json_is_one_error(script, cache, tmp_path, content):
    cache.mkdir()
    (cache / "current.json").write_text(content)
    assert "make prepare" in refusal(script("train.py", "--steps", 1, "--run-dir", tmp_path / "run"))


@pytest.mark.parametrize("command", ["score", "sample"])
def test_a_folder_that_is_not_a_run_is_refused(script, tmp_path, command):
    (tmp_path / "empty").mkdir()
    line = refusal(script("prepare.py", command, tmp_path / "empty"))
    assert "runs/" in line


def test_prepare_prints_a_summary(prepared, script, text_file):
    done = script("prepare.py", "--preset", "offline", "--vocab", 300, "--files", text_file)
    assert re.fullmatch(
        r"prepared offline, vocabulary 300: \d+ documents, [\d.]+ MB, [\d.]+M tokens; "
        rf"validation: \d+ documents, [\d,]+ bytes\n{re.escape(str(prepared))}\n",
        done.stdout,
    )


# ---- make


def made(target: str, *variables: str) -> list[list[str]]:
    """The words of the script calls that `make -n` shows."""
    command = ["make", "-n", "-o", ".venv/.ready", target, *variables]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in shown.stdout.replace("\\\n", " ").splitlines() if re.search(r"\w\.py", line)]
    return [words[1:] for words in lines]  # without the interpreter


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ([], []),
        (["PRESET=fineweb", "SEQ=512"], ["--preset", "fineweb", "--seq", "512"]),
        (["VOCAB=256"], ["--vocab", "256"]),
        (["PRESET=offline", "FILES=my text/*.jsonl"], ["--preset", "offline", "--files", "my text/*.jsonl"]),
        (
            ["FILES=a/*.txt b/*.txt", "VAL_FILES=v.jsonl"],
            ["--files", "a/*.txt b/*.txt", "--val-files", "v.jsonl"],
        ),
    ],
)
def test_make_prepare_passes_its_variables_on(variables, flags):
    assert made("prepare", *variables) == [["prepare.py", *flags]]


@needs_make
def test_make_train_passes_its_variables_on():
    variables = ["MINUTES=0.2", "STEPS=3", "SEED=0", "RUN_DIR=my runs/a"]
    flags = ["--minutes", "0.2", "--steps", "3", "--seed", "0", "--run-dir", "my runs/a"]
    assert made("train", *variables)[-1] == ["train.py", *flags]


@needs_make
@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        (["PRESET=offline"], ["--preset", "offline"]),
        (["PRESET=offline", "VOCAB=256", "SEQ=128"], ["--preset", "offline", "--vocab", "256", "--seq", "128"]),
        (["FILES=a.txt"], ["--files", "a.txt"]),
        (["VOCAB=256"], ["--vocab", "256"]),
        (["SEQ=512"], ["--seq", "512"]),
    ],
)
def test_make_train_prepares_what_is_asked_for_first(variables, flags):
    assert made("train", *variables) == [["prepare.py", *flags], ["train.py"]]


@needs_make
def test_a_smoke_run_does_not_measure_what_fits():
    prepare, train = made("train", "PRESET=offline", "MINUTES=0.2")
    assert prepare == ["prepare.py", "--preset", "offline", "--no-fit"]
    assert train == ["train.py", "--minutes", "0.2"]
    assert made("prepare", "NO_FIT=1")[0][-1] == "--no-fit"
    assert made("fit", "PRESET=offline") == [["prepare.py", "--preset", "offline", "--fit"]]
    assert made("fit") == [["prepare.py", "--fit"]]


@needs_make
def test_make_train_alone_trains_on_what_was_prepared_last():
    default, train = made("train")  # the default preset only where nothing is prepared yet
    assert default[-1:] == ["prepare.py"]
    assert train == ["train.py"]


@needs_make
@pytest.mark.parametrize(("variable", "flag"), [("Q=1", "--quiet"), ("V=1", "--verbose")])
def test_make_passes_verbosity_on(variable, flag):
    assert made("train", "PRESET=offline", variable) == [
        ["prepare.py", "--preset", "offline", flag],
        ["train.py", flag],
    ]
    assert made("agent", variable)[-1] == ["agent_loop.py", "run", flag]


@needs_make
def test_make_score_passes_the_run_on():
    assert made("score") == [["prepare.py", "score", "runs/latest"]]
    assert made("score", "RUN=runs/my run") == [["prepare.py", "score", "runs/my run"]]


@needs_make
def test_make_sample_passes_its_variables_on():
    variables = {
        "PROMPT": "The dog", "TOKENS": "100", "TEMPERATURE": "0", "TOP_K": "0", "SEED": "0", "COUNT": "3",
    }  # fmt: skip
    [words] = made("sample", "RUN=runs/a", *(f"{key}={value}" for key, value in variables.items()))
    assert words[:3] == ["prepare.py", "sample", "runs/a"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {f"--{key.lower().replace('_', '-')}": value for key, value in variables.items()}


@needs_make
def test_make_sample_takes_two_runs_a_night_a_chat_and_a_folder():
    assert made("sample", "RUN=runs/a", "AGAINST=my runs/b") == [["prepare.py", "sample", "runs/a", "my runs/b"]]
    assert made("sample", "TAG=nov24", "EXPORT=my model") == [
        ["prepare.py", "sample", "--tag", "nov24", "--export", "my model"]
    ]
    assert made("sample", "CHAT=1") == [["prepare.py", "sample", "--chat"]]


@needs_make
@pytest.mark.parametrize("prompt", ["The dog's bone", 'She said "no"', "a $$HOME b", "`date`", "a; b"])
def test_make_sample_takes_any_prompt(prompt):
    [words] = made("sample", f"PROMPT={prompt}")
    assert words == ["prepare.py", "sample", "--prompt", prompt.replace("$$", "$")]


@needs_make
@pytest.mark.parametrize("target", ["agent", "status", "report", "sample"])
@pytest.mark.parametrize("tag", ["a b", "a; b", "..", "`date`"])
def test_make_passes_a_tag_on_as_one_word(target, tag):
    words = made(target, f"TAG={tag}")[-1]
    assert words[-2:] == ["--tag", tag]


@needs_make
def test_make_clean_runs_lists_by_default():
    assert made("clean-runs") == [["prepare.py", "clean", "--runs"]]
    assert made("clean-runs", "NAMES=runs/a runs/b") == [["prepare.py", "clean", "--runs", "runs/a", "runs/b"]]
    assert made("clean-runs", "ALL=1") == [["prepare.py", "clean", "--runs", "--yes"]]


@needs_make
def test_make_without_a_target_is_help():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "prepare", "train", "score", "sample", "test"):
        assert re.search(rf"^{target} ", shown, re.M)
    assert not os.path.lexists(Path(ROOT) / "help")
