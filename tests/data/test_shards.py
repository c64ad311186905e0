import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, documents, environment, refusal, run_script, write_jsonl

from lab.data.shards import Prepared, held_out_documents, open_prepared
from lab.data.tokens import Tokenizer
from lab.errors import UserError

SEED = 20  # of the moments of the kills


def prepare(cache: Path, text: Path, *flags: object, vocab: int = 256) -> subprocess.CompletedProcess:
    arguments = ("--preset", "offline", "--vocab", vocab, "--files", text, *flags)
    return run_script(cache, "prepare.py", *arguments)


def prepared_in(cache: Path) -> Prepared:
    return open_prepared(Path(json.loads((cache / "current.json").read_text())["prepared"]))


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a prepared folder but the journal of finished shards, which has no fixed order."""
    paths = [path for path in folder.iterdir() if path.name not in ("shards.jsonl", ".lock")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: what a rewrite changes even when the content is the same."""
    paths = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def nothing_to_trust(cache: Path) -> bool:
    return not (cache / "current.json").exists() and not list(cache.rglob("manifest.json"))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    """12 MB: a whole shard and a part, each document different."""
    return numbered(tmp_path_factory.mktemp("long") / "long.jsonl", 12)


def numbered(path: Path, megabytes: int) -> Path:
    texts = documents(1000)
    size = sum(map(len, texts))
    return write_jsonl(path, [f"{n}. {text}" for n in range(-(-megabytes * 1_000_000 // size)) for text in texts])


# ---- what is written


def test_shards_are_uint16_and_every_document_starts_with_bos(prepared):
    data = open_prepared(prepared)
    for tokens in [*data.train, data.val]:
        assert tokens.dtype == np.uint16
        assert tokens.ndim == 1
        assert tokens[0] == data.tokenizer.bos == 299
        assert tokens.max() == data.tokenizer.bos


def test_shards_hold_the_text_train_and_val_apart(prepared, text_file):
    data = open_prepared(prepared)
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]

    def decoded(tokens: np.ndarray) -> list[str]:
        starts = [*np.flatnonzero(tokens == data.tokenizer.bos).tolist(), len(tokens)]
        return [data.tokenizer.decode(tokens[a:b]) for a, b in pairwise(starts)]

    train, val = [text for shard in data.train for text in decoded(shard)], decoded(data.val)
    assert set(train).isdisjoint(val)
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in the order of the file
    assert 5 <= len(val) <= 40  # 1 in 20 of 400


def test_the_manifest_counts_what_is_there(prepared):
    data = open_prepared(prepared)
    entries = [*zip(data.manifest["train"], data.train, strict=True), (data.manifest["val"], data.val)]
    for entry, tokens in entries:
        assert entry["tokens"] == len(tokens)
        assert entry["documents"] == (tokens == data.tokenizer.bos).sum()
        assert entry["bytes"] == data.tokenizer.byte_lengths[tokens].sum()
    assert data.manifest["totals"]["tokens"] == sum(len(tokens) for tokens in data.train)
    assert data.manifest["vocab_size"] == data.tokenizer.vocab_size == 300


def test_a_second_preparation_rewrites_nothing(prepared, cache, text_file):
    before = identity(prepared)
    again = prepare(cache, text_file, vocab=300)
    assert again.returncode == 0
    assert "rebuilt" not in again.stdout
    assert again.stderr == ""
    assert identity(prepared) == before
    assert len(list((cache / "prepared").iterdir())) == 1


def test_changed_text_is_prepared_beside_the_old(prepared, cache, text_file, tmp_path):
    before = contents(prepared)
    other = write_jsonl(tmp_path / text_file.name, documents(300, seed=8))
    assert prepare(cache, other, vocab=300).returncode == 0
    assert contents(prepared) == before
    assert prepared_in(cache).folder != prepared


def test_several_shards_hold_the_documents_in_order(cache, long_text):
    done = prepare(cache, long_text)
    assert done.returncode == 0, done.stderr
    data = prepared_in(cache)
    assert [entry["name"] for entry in data.manifest["train"]] == [f"train-{n:05d}.npy" for n in range(2)]
    text = bytes(np.concatenate(data.train)[:-1].astype(np.int32).clip(max=255).astype(np.uint8))  # 256 becomes 255
    numbers = [int(part.split(b".", 1)[0]) for part in text.split(b"\xff")[1:]]
    assert numbers == sorted(numbers)
    assert len(numbers) == data.manifest["totals"]["documents"]


# ---- killed at any moment


class Started:
    """prepare.py in a process group of its own."""

    def __init__(self, cache: Path, text: Path, vocab: int):
        options = ["--no-fit", "--preset", "offline", "--vocab", str(vocab), "--files", str(text)]
        command = [sys.executable, "prepare.py", *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(cache), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def alone_and_killed(self) -> bool:
        """SIGKILL the one process that the user started, as the system does when memory runs out. Was it running?"""
        os.kill(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def survivors(self, patience: float = 10.0) -> list[str]:
        """Processes of the group that are still there, zombies apart, after at most `patience` seconds."""
        until = time.monotonic() + patience
        while (left := self._group()) and time.monotonic() < until:
            time.sleep(0.05)
        return left

    def _group(self) -> list[str]:
        listed = subprocess.run(
            ["ps", "-Aww", "-o", "pgid=,stat=,command="], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return [row[2] for row in rows if row[0] == str(self.process.pid) and not row[1].startswith("Z")]


def killed_at_random(folder: Path, text: Path, vocab: int, kills: int) -> list[str]:
    """Kill `kills` preparations, up to four in a row in one cache before one may finish. Returns what went wrong."""
    begun = time.monotonic()
    assert prepare(folder / "undisturbed", text, vocab=vocab).returncode == 0
    duration = time.monotonic() - begun
    expected = contents(prepared_in(folder / "undisturbed").folder)
    moments, wrong, killed = random.Random(SEED), [], 0
    for number in range(4 * kills):
        cache = folder / f"killed{number}"
        for _ in range(min(4, kills - killed)):
            moment = moments.uniform(0.1, 0.8) * duration
            started = Started(cache, text, vocab)
            time.sleep(moment)
            if not started.alone_and_killed():
                duration *= 0.8  # it was done before: the machine is faster now, or earlier ones had left it little
                break
            killed += 1
            wrong += [f"killed at {moment:.2f} s, left running: {line}" for line in started.survivors()]
        done = prepare(cache, text, vocab=vocab)
        if done.returncode or "Traceback" in done.stderr:
            wrong.append(f"cannot go on: {done.stderr}")
        else:
            left = contents(prepared_in(cache).folder)
            wrong += [name for name, digest in expected.items() if left.get(name) != digest]
        if killed == kills:
            return wrong
    raise AssertionError(f"only {killed} of {kills} preparations were still running when they were to be killed")


def test_killed_while_shards_are_written_then_run_again_gives_the_same(tmp_path, long_text):
    assert killed_at_random(tmp_path, long_text, vocab=256, kills=6) == []


def test_killed_while_the_tokenizer_is_learnt_then_run_again_gives_the_same(tmp_path):
    text = write_jsonl(tmp_path / "stories.jsonl", documents(600))
    assert killed_at_random(tmp_path, text, vocab=300, kills=4) == []


def test_leftovers_of_a_killed_preparation_are_removed_by_the_next(prepared, cache, text_file):
    (prepared / "manifest.json").unlink()
    leftover = prepared / ".train-00000.npy.999999.tmp"  # the name that lab.files.write_atomic gives
    leftover.write_bytes(b"half a shard")
    ended, running = (cache / f".current.json.{pid}.tmp" for pid in (99999999, os.getpid()))
    ended.touch()
    running.touch()
    assert prepare(cache, text_file, vocab=300).returncode == 0
    assert [path.exists() for path in (leftover, ended, running)] == [False, False, True]


def test_a_torn_line_in_the_journal_of_shards_is_done_again(prepared, cache, text_file):
    before = contents(prepared)
    journal = prepared / "shards.jsonl"
    (prepared / "manifest.json").unlink()
    journal.write_bytes(journal.read_bytes()[:-20])
    assert prepare(cache, text_file, vocab=300).returncode == 0
    assert contents(prepared) == before


# ---- damaged on the disk


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = [
    ("train-00000.npy", flip_a_byte),
    ("train-00000.npy", truncate),
    ("val.npy", truncate),
    ("tokenizer.json", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_file_is_named_and_rebuilt(prepared, cache, text_file, name, damage):
    before = contents(prepared)
    damage(prepared / name)
    assert open_prepared(prepared, parts=()).damaged() == [name]
    done = prepare(cache, text_file, vocab=300)
    assert done.returncode == 0, done.stderr
    assert f"rebuilt damaged files: {name}\n" in done.stdout
    assert contents(prepared) == before


@pytest.mark.parametrize("content", [b"", b'{"train": [', b"{}"])
def test_a_damaged_manifest_is_rebuilt(prepared, cache, text_file, content):
    before = contents(prepared)
    (prepared / "manifest.json").write_bytes(content)
    done = prepare(cache, text_file, vocab=300)
    assert done.returncode == 0, done.stderr
    assert contents(prepared) == before


@pytest.mark.parametrize("key", ["val_text_sha256", "bytes"])
def test_a_manifest_with_another_character_is_damaged(prepared, key):
    path = prepared / "manifest.json"
    start, value, rest = path.read_text().partition(f'"{key}": ')
    at = next(n for n, character in enumerate(rest) if character.isdigit())
    path.write_text(f"{start}{value}{rest[:at]}{(int(rest[at]) + 1) % 10}{rest[at + 1 :]}")
    with pytest.raises(UserError, match=r"damaged in .*: manifest\.json; `make prepare` rebuilds it$"):
        open_prepared(prepared, parts=())


@pytest.mark.parametrize("damage", [lambda text: b"\xff" + text, lambda text: text.replace(b"bytes", b"bytez")])
def test_a_damaged_journal_of_shards_is_not_trusted(prepared, cache, text_file, damage):
    before, journal = contents(prepared), prepared / "shards.jsonl"
    (prepared / "manifest.json").unlink()
    journal.write_bytes(damage(journal.read_bytes()))
    assert prepare(cache, text_file, vocab=300).returncode == 0
    assert contents(prepared) == before


@pytest.mark.parametrize("part", ["val.npy", "tokenizer.json"])
def test_scored_data_that_is_damaged_is_not_opened(prepared, part):
    flip_a_byte(prepared / part)
    with pytest.raises(UserError, match=rf"damaged in .*: {part}; `make prepare` rebuilds it$"):
        open_prepared(prepared, parts=("val", "tokenizer"))


@pytest.mark.parametrize(("name", "damage"), [DAMAGE[0], DAMAGE[3]])
def test_training_on_damaged_data_is_refused_in_one_line(prepared, script, tmp_path, name, damage):
    damage(prepared / name)
    line = refusal(script("train.py", "--steps", 1, "--run-dir", tmp_path / "run"))
    assert name in line
    assert "make prepare" in line
    assert not (tmp_path / "run" / "train.json").exists()


# ---- bad input: one line, nothing that a later run trusts


def parquet(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


BAD = {
    "empty.parquet": (lambda path: path.write_text(""), "empty"),
    "empty.txt": (lambda path: path.write_text(""), "empty"),
    "binary.txt": (lambda path: path.write_bytes(random.Random(0).randbytes(100_000)), "binary"),
    "binary.jsonl": (lambda path: path.write_bytes(random.Random(0).randbytes(100_000)), "binary.jsonl"),
    "binary.parquet": (lambda path: path.write_bytes(random.Random(0).randbytes(100_000)), "binary.parquet"),
    "picture.png": (lambda path: path.write_bytes(b"\x89PNG"), "unknown file type"),
    "column.parquet": (lambda path: parquet(path, story=["a story"] * 100), "no column 'text'"),
    "numbers.parquet": (lambda path: parquet(path, text=[1, 2, 3]), "holds int64, not text"),
    "field.jsonl": (lambda path: path.write_text('{"story": "a"}\n'), "line 1: no field 'text'"),
    "blank.txt": (lambda path: path.write_text("\n \n\n\t\n" * 1000), "no"),
    "nulls.parquet": (lambda path: parquet(path, text=pa.array([None, "", " "] * 100, pa.string())), "no"),
    "huge.txt": (lambda path: path.write_text("once upon a time " * 600_000), "no validation document"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_and_leave_nothing(cache, tmp_path, name):
    write, reason = BAD[name]
    write(tmp_path / name)
    line = refusal(prepare(cache, tmp_path / name))
    assert reason in line
    assert name in line
    assert nothing_to_trust(cache)


def test_a_huge_document_among_others_is_prepared(cache, tmp_path):
    huge = "once upon a time " * 600_000  # 10 MB: more than a shard
    assert prepare(cache, write_jsonl(tmp_path / "mixed.jsonl", [*documents(200), huge])).returncode == 0
    data = prepared_in(cache)
    assert data.manifest["totals"]["bytes"] > len(huge)
    assert sum(len(shard) for shard in data.train) == data.manifest["totals"]["tokens"]


def test_a_validation_document_too_large_to_score_is_refused(cache, tmp_path, text_file):
    huge = write_jsonl(tmp_path / "huge.jsonl", ["once upon a time " * 60_000])
    line = refusal(prepare(cache, text_file, "--val-files", huge))
    assert "no validation document fits in val_bytes" in line
    assert nothing_to_trust(cache)


def test_a_pattern_that_matches_nothing_is_named(cache, tmp_path):
    assert f"no file matches '{tmp_path}/*.parquet'" in refusal(prepare(cache, tmp_path / "*.parquet"))
    assert not cache.exists()


def test_one_pattern_of_many_that_matches_nothing_is_named(cache, tmp_path, text_file):
    assert "absent*.jsonl" in refusal(prepare(cache, f"{text_file} {tmp_path}/absent*.jsonl"))


def test_text_too_small_for_the_vocabulary_is_refused(cache, text_file):
    line = refusal(prepare(cache, text_file, vocab=60_000))
    assert "distinct tokens to learn, not 60000; use VOCAB=256" in line
    assert nothing_to_trust(cache)


def test_a_failed_preparation_leaves_the_last_good_one_current(prepared, cache, tmp_path):
    before = (cache / "current.json").read_bytes()
    (tmp_path / "empty.txt").write_text("")
    refusal(prepare(cache, tmp_path / "empty.txt"))
    assert (cache / "current.json").read_bytes() == before


# ---- the disk


@pytest.fixture
def small_disk(cache) -> Iterator[Callable[[str], None]]:
    """The cache is a disk of its own, 64 KB, changed by calling with mount options."""

    def mount(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", *options, str(cache)], capture_output=True, text=True)

    cache.mkdir()
    if sys.platform != "linux" or mount("-t", "tmpfs", "-o", "size=64k", "tmpfs").returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")

    def remount(options: str) -> None:
        assert mount("-o", f"remount,{options}").returncode == 0

    yield remount
    subprocess.run(["umount", "--lazy", str(cache)], check=True)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """1 MB of text, and what it gives where there is room for it."""
    folder = tmp_path_factory.mktemp("roomy")
    text = write_jsonl(folder / "stories.jsonl", documents(1200))
    assert prepare(folder / "cache", text).returncode == 0
    return text, contents(prepared_in(folder / "cache").folder)


@pytest.mark.parametrize("size", ["4k", "1m"], ids=["tokenizer", "shard"])
def test_a_full_disk_is_one_error_and_preparation_resumes_when_there_is_space(cache, small_disk, roomy, size):
    text, expected = roomy
    small_disk(f"size={size}")
    assert "No space left on device" in refusal(prepare(cache, text))
    assert nothing_to_trust(cache)
    assert list(cache.rglob("*.tmp")) == []
    small_disk("size=64m")
    assert prepare(cache, text).returncode == 0
    assert contents(prepared_in(cache).folder) == expected


def test_a_read_only_cache_is_one_line(cache, small_disk, text_file):
    small_disk("ro")
    line = refusal(prepare(cache, text_file))
    assert "Read-only file system" in line
    assert "AUTORESEARCH_CACHE" in line


# ---- memory


def test_memory_is_flat_in_the_size_of_the_text(tmp_path):
    def peak(megabytes: int) -> float:
        text = numbered(tmp_path / f"{megabytes}.jsonl", megabytes)
        command = [
            sys.executable,
            "prepare.py",
            "--no-fit",
            "--preset",
            "tinystories",
            "--vocab",
            "256",
            "--files",
            str(text),
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path / f"cache{megabytes}"), **quiet)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert prepared_in(tmp_path / f"cache{megabytes}").manifest["totals"]["bytes"] > 0.85e6 * megabytes
        return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KB here

    assert peak(60) - peak(10) < 35  # MB: shards that wait for a worker, not the 50 MB more of text


# ---- the rule for what is scored, and the task


def scored(documents: list[str], limit: int) -> list[str]:
    return held_out_documents(documents, limit)[0]


def test_the_first_whole_documents_that_fit_are_scored():
    assert scored(["aaaa", "bbb", "cc", "d"], 7) == ["aaaa", "bbb"]
    assert scored(["aaaa", "bbb"], 100) == ["aaaa", "bbb"]


def test_a_document_that_does_not_fit_ends_the_list_even_if_a_later_one_would():
    assert scored(["aaaa", "bbbbbb", "c"], 7) == ["aaaa"]


def test_too_long_documents_at_the_start_are_passed_over():
    assert scored(["too long", "too long too", "aaaa", "bbbbbb", "c"], 7) == ["aaaa"]


def test_the_limit_counts_utf8_bytes():
    assert scored(["éé", "é"], 5) == ["éé"]
    assert scored(["€", "a"], 3) == ["€"]


def test_an_endless_source_is_read_no_further_than_needed():
    val, test = held_out_documents((f"story {n}" for n in count(100)), 90)
    assert (len(val), len(test)) == (10, 10)


def test_as_much_text_again_that_no_verdict_looks_at_follows_without_what_is_scored():
    val, test = held_out_documents(["aaaa", "bbb", "ends it", "aaaa", "ccc", "bbb", "dddd", "eeee"], 7)
    assert (val, test) == (["aaaa", "bbb"], ["ccc", "dddd"])
    assert held_out_documents(["aaaa", "bbb"], 7) == (["aaaa", "bbb"], [])


@pytest.mark.parametrize("documents", [[], ["too long"]])
def test_no_document_that_fits_is_refused(documents):
    with pytest.raises(UserError, match="no validation document fits in val_bytes = 7"):
        held_out_documents(documents, 7)


def test_data_of_an_earlier_version_gets_its_test_text_while_it_is_in_use(tmp_path):
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", documents(600, seed)) for seed in (1, 2)]
    assert prepare(tmp_path / "cache", files[0], "--val-files", files[1]).returncode == 0
    data = prepared_in(tmp_path / "cache")
    assert data.manifest["test"]["documents"] > 1
    before, manifest = identity(data.folder), data.folder / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in record.items() if key not in ("test", "check")}))
    (data.folder / "test.npy").unlink()
    assert not prepared_in(tmp_path / "cache").has_test
    assert prepare(tmp_path / "cache", files[0], "--val-files", files[1]).returncode == 0
    assert json.loads(manifest.read_text()) == record
    assert identity(data.folder)["train-00000.npy"] == before["train-00000.npy"]


def test_the_task_does_not_depend_on_the_vocabulary(prepared, text_file, tmp_path):
    assert prepare(tmp_path / "bytes", text_file, vocab=256).returncode == 0
    bpe, pure_bytes = open_prepared(prepared), prepared_in(tmp_path / "bytes")
    assert len(bpe.val) < len(pure_bytes.val)
    assert bpe.fingerprint(256, 5.0) == pure_bytes.fingerprint(256, 5.0)


def test_the_task_depends_on_context_minutes_steps_and_text(prepared, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", documents(300, seed=8))
    assert prepare(tmp_path / "other", other, vocab=300).returncode == 0
    data = open_prepared(prepared)
    tasks = [
        data.fingerprint(256, 5.0),
        data.fingerprint(512, 5.0),
        data.fingerprint(256, 0.2),
        data.fingerprint(256, 5.0, steps=10),
        prepared_in(tmp_path / "other").fingerprint(256, 5.0),
    ]
    assert len(set(tasks)) == len(tasks)
    assert data.fingerprint(256, 5) == tasks[0]


def test_training_text_beyond_what_is_scored_does_not_change_the_task(tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", documents(20, seed=9))
    for name, many in (("few", 100), ("more", 200)):
        text = write_jsonl(tmp_path / f"{name}.jsonl", documents(many))
        assert prepare(tmp_path / name, text, "--val-files", val).returncode == 0
    few, more = prepared_in(tmp_path / "few"), prepared_in(tmp_path / "more")
    assert few.manifest["totals"]["documents"] == 100
    assert more.manifest["totals"]["documents"] == 200
    assert few.fingerprint(256, 5.0) == more.fingerprint(256, 5.0)


def test_the_tokenizer_is_learnt_from_training_text_alone(tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", ["xylophone quetzal " * 20] * 20)
    text = write_jsonl(tmp_path / "text.jsonl", documents(200))
    assert prepare(tmp_path / "cache", text, "--val-files", val, vocab=800).returncode == 0
    tokenizer = Tokenizer.load(prepared_in(tmp_path / "cache").folder / "tokenizer.json")
    assert b" the" in tokenizer.token_bytes
    assert not [token for token in tokenizer.token_bytes if b"ylo" in token or b"quetz" in token]
