"""Documents from local files, stories and a loopback hub: the same text for the same identity, or one clear line."""

import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_reader import READ, Forks, environment, fetch, preset, refused
from hub_server import REVISION, Fault, parquet, serve

from lab.data.corpus import open_corpus
from lab.errors import UserError
from lab.preset import Data

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Story {i}: " + "once upon a time " * 5 + str(i) for i in range(400)]


def local(*paths: Path, val: Sequence[Path] = (), **more: object) -> Data:
    settings = {"train_bytes": 10**9, "val_bytes": 10**6, "val_files": tuple(map(str, val)), **more}
    return Data(source="files", train_files=tuple(map(str, paths)), **settings)


def lines(texts: Sequence[str | None]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaint(data: Data) -> str:
    """The one line that is raised, by the time both sides have been read."""

    def read_both() -> None:
        corpus = open_corpus(data)
        list(corpus.train()), list(corpus.val())

    with pytest.raises(UserError) as raised:
        read_both()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- local files


def test_every_format_gives_the_same_documents(tmp_path):
    paths = [
        write(tmp_path / "a.parquet", parquet(TEXTS, rows_per_group=70)),
        write(tmp_path / "b.jsonl", "\ufeff" + lines(TEXTS)),
        write(tmp_path / "c.txt", "<|endoftext|>".join(TEXTS)),
        write(tmp_path / "d.txt", "\n<|endoftext|>\n".join(TEXTS) + "\n"),
        write(tmp_path / "e.txt", "\r\n\r\n \r\n".join(TEXTS)),
    ]
    for path in paths:
        corpus = open_corpus(local(path))
        assert sorted([*corpus.train(), *corpus.val()]) == sorted(TEXTS), path


def test_blank_lines_divide_only_without_the_separator(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\nstill one<|endoftext|>two")
    assert list(open_corpus(local(path, val=[path])).val()) == ["one\n\nstill one", "two"]


def test_held_out_share_is_fixed_by_the_text(tmp_path):
    doubled = write(tmp_path / "a.jsonl", lines(TEXTS + TEXTS[::-1]))
    corpus = open_corpus(local(doubled))
    train, val = list(corpus.train()), list(corpus.val())
    assert not set(train) & set(val)
    assert len(train) + len(val) == 800
    assert 20 <= len(val) <= 70  # 40 expected of 800, in pairs
    other = open_corpus(local(write(tmp_path / "b.txt", "\n\n".join(sorted(TEXTS)))))
    assert set(other.val()) == set(val)


def test_training_documents_that_occur_in_validation_are_dropped(tmp_path):
    train = write(tmp_path / "train.jsonl", lines(TEXTS))
    val = write(tmp_path / "val.parquet", parquet([*TEXTS[10:20], "only here"]))
    corpus = open_corpus(local(train, val=[val]))
    assert list(corpus.train()) == TEXTS[:10] + TEXTS[20:]
    assert list(corpus.val()) == [*TEXTS[10:20], "only here"]


def test_files_in_order_up_to_train_bytes(tmp_path):
    paths = [write(tmp_path / name, lines(part)) for name, part in (("b.jsonl", TEXTS[:5]), ("a.jsonl", TEXTS[5:10]))]
    val = write(tmp_path / "val.txt", "something else")
    size = sum(len(text.encode()) for text in TEXTS[:7])
    for limit, count in ((size, 7), (size + 1, 7), (size - 1, 6), (1, 1)):
        assert list(open_corpus(local(*paths, val=[val], train_bytes=limit)).train()) == TEXTS[:count]


def test_null_and_blank_documents_are_skipped(tmp_path):
    texts = ["one", None, "", " \n\t", "two"]
    val = write(tmp_path / "val.txt", "something else")
    for path in (write(tmp_path / "a.jsonl", lines(texts)), write(tmp_path / "a.parquet", parquet(texts))):
        assert list(open_corpus(local(path, val=[val])).train()) == ["one", "two"]
        assert list(open_corpus(local(path, val=[val])).train()) == ["one", "two"]  # can be read again


def test_identity_changes_with_the_text_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(TEXTS))
    first = open_corpus(local(path)).identity
    assert json.loads(json.dumps(first)) == first
    os.utime(path, (1, 1))
    assert open_corpus(local(path)).identity == first
    assert open_corpus(local(path, train_bytes=5)).identity != first
    write(path, lines(TEXTS[::-1]))
    assert open_corpus(local(path)).identity != first


def test_one_huge_document(tmp_path):
    huge = "once upon " * 10_000_000
    val = write(tmp_path / "val.txt", "something else")
    for path in (write(tmp_path / "a.jsonl", lines([huge, "two"])), write(tmp_path / "a.txt", huge + "\n\ntwo")):
        documents = open_corpus(local(path, val=[val])).train()
        assert len(next(documents)) in (len(huge), len(huge) - 1)
        assert next(documents) == "two"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    texts = (f"{i} " + random.Random(i).randbytes(500).hex() for i in range(40_000))  # 40 MB
    path = tmp_path / f"a.{kind}"
    with open(path, "wb") as file:
        if kind == "parquet":
            pq.write_table(pa.table({"text": list(texts)}), file)  # one row group
        else:
            file.writelines((lines([text]) if kind == "jsonl" else text + "\n\n").encode() for text in texts)
    allocated = pa.total_allocated_bytes()
    peak_arrow = 0
    tracemalloc.start()
    for count, _ in enumerate(open_corpus(local(path)).train()):
        if count % 1000 == 0:
            peak_arrow = max(peak_arrow, pa.total_allocated_bytes() - allocated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 37_000
    assert peak < 10e6
    assert peak_arrow < 16e6


TWICE = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
EMPTY = pa.table({"text": pa.array([], pa.string())})


def tables(*groups: pa.Table) -> bytes:
    """A parquet file of one row group for each table."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)
    return buffer.getvalue()


def of_type(kind: pa.DataType) -> bytes:
    return tables(pa.table({"text": pa.array(TEXTS).cast(kind)}))


def rows(*texts: str) -> str:
    """JSON lines that json.dumps does not write."""
    return "".join(line + "\n" for line in texts)


KINDS = {
    "dictionary.parquet": tables(pa.table({"text": pa.array(TEXTS).dictionary_encode()})),
    "large.parquet": of_type(pa.large_string()),
    "view.parquet": of_type(pa.string_view()),
    "no-rows-first.parquet": tables(EMPTY, pa.table({"text": TEXTS}), EMPTY),
    "dotted.parquet": tables(pa.table({"text.more": ["not this"] * 400, "text": TEXTS})),
    "nested-beside.parquet": tables(pa.table({"meta": [{"text": "not this"}] * 400, "text": TEXTS})),
    "nan.jsonl": rows(*(f'{{"text": "{text}", "score": NaN, "least": -Infinity}}' for text in TEXTS)),
    "twice.jsonl": rows(*(f'{{"text": 1, "text": "{text}"}}' for text in TEXTS)),  # the last one, as in every parser
    "separators.jsonl": rows(*(f'{{"text": "{text}", "not a line": "\x85\u2028\u2029"}}' for text in TEXTS)),
    "CAPITALS.JSONL": lines(TEXTS),
    "Mac.txt": "\r\r".join(TEXTS),
    "mark.TXT": "\ufeff" + "\n\n".join(TEXTS),
}


@pytest.mark.parametrize("name", KINDS)
def test_unusual_files_give_the_same_documents(tmp_path, name):
    corpus = open_corpus(local(write(tmp_path / name, KINDS[name])))
    assert sorted([*corpus.train(), *corpus.val()]) == sorted(TEXTS)


@pytest.mark.parametrize("at", [0, (1 << 22) - 5, (1 << 22) + 1])
def test_the_separator_is_found_wherever_it_is(tmp_path, at):
    path = write(tmp_path / "a.txt", "x" * at + "\n\n<|endoftext|>two")
    assert list(open_corpus(local(path, val=[path])).val())[-1] == "two"


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """Half of it would be prepared under the name of the other half."""
    path = write(tmp_path / "a.txt", "\n\n".join(TEXTS * 100))
    val = write(tmp_path / "val.jsonl", lines(["something else"]))
    for change in (lambda: write(path, "\n\n".join(TEXTS)), lambda: os.utime(path, (1, 1)), path.unlink):
        corpus = open_corpus(local(path, val=[val]))
        documents = corpus.train()
        next(documents)
        change()
        with pytest.raises(UserError, match=r"a\.txt changed while it was read; run again once it is complete"):
            list(documents)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: not a regular file" in complaint(local(tmp_path / "pipe.jsonl"))


BAD = {
    "twice.parquet": (tables(TWICE), "2 columns are named 'text'; rename one"),
    "nested.parquet": (tables(pa.table({"text": [{"a": "b"}]})), "column 'text' holds struct<a: string>, not text"),
    "inner.parquet": (tables(pa.table({"row": [{"text": "b"}]})), "no column 'text'; set text_field to one of row"),
    "list.parquet": (tables(pa.table({"text": [["a"]]})), "column 'text' holds list<element: string>, not text"),
    "null.parquet": (tables(pa.table({"text": pa.nulls(9)})), "column 'text' holds null, not text"),
    "bytes.parquet": (of_type(pa.binary()), "column 'text' holds binary, not text"),
    "codes.parquet": (tables(pa.table({"text": pa.array([1, 2]).dictionary_encode()})), "holds int64, not text"),
    "nan.jsonl": ('{"text": NaN}\n', "line 1: field 'text' is not text"),
    "wide.txt": ("one\n\ntwo".encode("utf-16"), "a binary file or UTF-16 text; convert it to UTF-8"),
    "wide.jsonl": (lines(TEXTS).encode("utf-16"), "not UTF-8 text"),
    "packed.jsonl.gz": (b"\x1f\x8b", "packed.jsonl.gz: compressed; decompress it first"),
    "packed.txt.zst": (b"\x28\xb5\x2f\xfd", "packed.txt.zst: compressed; decompress it first"),
    "renamed.jsonl": (gzip.compress(lines(TEXTS).encode()), "not UTF-8 text"),
    "whole.json": (json.dumps({"text": "a"}, indent=1), "line 1: not JSON; each line must be one JSON object"),
    "digits.jsonl": ('{"text": "a", "n": ' + "9" * 5000 + "}\n", "line 1: not JSON"),
    "deep.jsonl": ("[" * 100_000 + "\n", "line 1: not JSON"),
    "column.parquet": (
        parquet(TEXTS, "body", id=list(range(400))),
        "no column 'text'; set text_field to one of body, id",
    ),
    "number.parquet": (parquet(TEXTS, "body", text=list(range(400))), "column 'text' holds int64, not text"),
    "cut.parquet": (parquet(TEXTS)[:-100], "damaged or truncated"),
    "body.parquet": (parquet(TEXTS)[:8] + b"\xff" * 2000 + parquet(TEXTS)[2008:], "damaged or truncated"),
    "notparquet.parquet": (b"<html>" * 100, "damaged or truncated"),
    "field.jsonl": ('{"body": "a", "id": 1}\n', "line 1: no field 'text'; set text_field to one of body, id"),
    "number.jsonl": ('{"text": "a"}\n{"text": 1}\n', "line 2: field 'text' is not text"),
    "bad.jsonl": ('{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "array.json": ('[{"text": "a"}]', "line 1: not a JSON object"),
    "surrogate.jsonl": ('{"text": "a \\ud800"}\n', "line 1: contains an unpaired surrogate"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin-1"), "not UTF-8"),
    "latin.txt": ("héllo".encode("latin-1"), "not UTF-8"),
    "binary.txt": (b"PK\x03\x04\x00\x00abc", "a binary file"),
    "empty.txt": (b"", "the file is empty"),
    "empty.parquet": (b"", "the file is empty"),
    "blank.txt": (b"\n \n\n", "no training document"),
    "nulls.parquet": (parquet([None, None]), "no training document"),
    "norows.parquet": (parquet([]), "no training document"),
    "picture.png": (b"abc", "unknown file type"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line(tmp_path, name):
    content, expected = BAD[name]
    message = complaint(local(write(tmp_path / name, content)))
    assert name in message
    assert expected in message


def test_missing_and_unreadable_files(tmp_path):
    assert "FILES=" in complaint(local())
    assert "gone.txt: cannot be read (No such file" in complaint(local(tmp_path / "gone.txt"))
    (tmp_path / "folder.txt").mkdir()
    assert "folder.txt: cannot be read (Is a directory" in complaint(local(tmp_path / "folder.txt"))


def test_too_few_documents_to_hold_one_out(tmp_path):
    for count in (1, 2):
        path = write(tmp_path / "few.jsonl", lines(["one", "two"][:count]))
        message = complaint(local(path))
        assert "few.jsonl" in message
        assert "VAL_FILES=" in message or "training" in message


# ---- stories


def test_stories_are_capped_repeatable_and_disjoint():
    data = Data(source="stories", train_bytes=300_000, val_bytes=20_000)
    corpus = open_corpus(data)
    train = list(corpus.train())
    val = list(itertools.islice(corpus.val(), 20))
    assert 290_000 < sum(len(text.encode()) for text in train) <= 300_000
    assert not set(train) & set(val)
    again = open_corpus(data)
    assert list(again.train()) == train
    assert again.identity == corpus.identity == json.loads(json.dumps(corpus.identity))
    assert open_corpus(Data(source="stories", train_bytes=5, val_bytes=5)).identity != corpus.identity


# ---- hub: in processes of their own, because HF_ENDPOINT is read when huggingface_hub is imported

ROWS = [f"Row {i}: " + random.Random(i).randbytes(450).hex() for i in range(10_000)]
BIG = parquet(ROWS, rows_per_group=100)  # 9.3 MB in 100 row groups


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[Forks]:
    with serve({"big.parquet": BIG}) as server:
        forks = Forks(server, tmp_path_factory.mktemp("forks"))
        yield forks
        forks.process.stdin.close()
        assert forks.process.wait(10) == 0


@pytest.fixture
def hub(forks) -> Forks:
    """The forks with a well-behaved server of big.parquet, whose record is empty."""
    forks.server.files, forks.server.token = {"big.parquet": BIG}, ""
    forks.server.faults.clear()
    forks.server.requests.clear()
    return forks


def expected_train(limit: int = 300_000) -> list[str]:
    sizes = itertools.accumulate(len(text) for text in ROWS[200:])
    return [text for text, size in zip(ROWS[200:], sizes, strict=False) if size <= limit]


def test_hub_fetches_what_is_asked_and_keeps_it(tmp_path):
    with serve({"big.parquet": BIG}) as server:
        first = fetch(server, tmp_path)
        assert first["train"] == expected_train()
        assert first["val"] == ROWS[100:150]
        assert first["identity"]["revision"] == REVISION
        assert first["labels"] == ["fetching train text", "fetching val text"]
        assert first["last"][0][1] <= first["last"][0][2] == 300_000
        assert server.sent("big.parquet") < 0.5 * len(BIG)
        asked = len(server.requests)
        assert not {*os.listdir(tmp_path)} - {"cache", "home"}
        assert not list(tmp_path.glob("cache/text/*/.*"))
        again = fetch(server, tmp_path)
        assert len(server.requests) == asked
    offline = fetch(server, tmp_path, {"HF_HUB_OFFLINE": "1"})  # the server is gone
    assert first["identity"] == again["identity"] == offline["identity"]
    assert (first["train"], first["val"]) == (again["train"], again["val"]) == (offline["train"], offline["val"])


def test_hub_reads_on_in_the_next_file_and_drops_what_is_in_validation(hub, tmp_path):
    files = {"a.parquet": parquet(ROWS[:100]), "b.parquet": parquet([*ROWS[90:300], None, ""]), "c.parquet": BIG}
    files["val.parquet"] = parquet(ROWS[150:160])
    names = {"train_files": ["a.parquet", "b.parquet", "c.parquet"], "val_files": ["val.parquet"]}
    hub.server.files = files
    got = fetch(hub, tmp_path, val_documents=[0, 0], train_from=0, train_bytes=200_000, **names)
    assert hub.server.sent("c.parquet") == 0
    wanted = ROWS[:100] + ROWS[90:150] + ROWS[160:300]
    size = itertools.accumulate(len(text) for text in wanted)
    assert got["train"] == [text for text, size in zip(wanted, size, strict=True) if size <= 200_000]
    assert got["val"] == ROWS[150:160]
    assert got["identity"]["train"]["files"] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/api/datasets/owner/stories", status=500, times=2),
        Fault("/resolve/", status=500, skip=4, times=3),
        Fault("/resolve/", cut=5000, skip=6, times=1),
        Fault("/resolve/", cut=1000, skip=6, times=8),  # outlasts the client library's own attempts
    ],
    ids=["500-info", "500-file", "cut", "cut-often"],
)
def test_hub_failures_that_pass_are_survived(hub, tmp_path, fault):
    hub.server.faults.append(fault)
    got = fetch(hub, tmp_path)
    assert fault.times == 0
    assert got["train"] == expected_train()
    assert got["val"] == ROWS[100:150]


HUB_FAILURES = {
    "no-repo": (Fault("/api/datasets/", status=404), "owner/stories, big.parquet: not found"),
    "no-file": (Fault("/resolve/", status=404), "owner/stories, big.parquet: not found"),
    "401": (Fault("/api/datasets/", status=401), "HF_TOKEN"),
    "403": (Fault("/resolve/", status=403), "HF_TOKEN"),
    "503": (Fault("/resolve/", status=503, skip=4), "answers 503"),
    "cut": (Fault("/resolve/", cut=1000, skip=6), "cannot be reached"),
    "html": (Fault("/resolve/", content=b"<html>" * 100_000), "not a complete parquet file"),
}


@pytest.mark.parametrize("name", HUB_FAILURES)
def test_a_hub_failure_is_one_line_and_a_later_fetch_succeeds(hub, tmp_path, name):
    fault, expected = HUB_FAILURES[name]
    hub.server.faults.append(fault)
    message = refused(hub, tmp_path)
    assert expected in message
    assert "owner/stories" in message
    assert "PRESET=offline" in message
    assert "FILES=" in message
    hub.server.faults.clear()
    assert fetch(hub, tmp_path)["train"] == expected_train()


def test_hub_wrong_names(hub, tmp_path):
    hub.server.files = {"big.parquet": parquet(TEXTS, "body", id=list(range(400)))}
    assert "no column 'text'; set text_field to one of body, id" in refused(hub, tmp_path)
    assert "owner/stories, gone.parquet: not found" in refused(hub, tmp_path, val_files=["gone.parquet"])
    assert "no train document" in refused(hub, tmp_path, text_field="body", train_from=9999)


def test_hub_unreachable_and_offline(tmp_path):
    closed = "http://127.0.0.1:9"
    message = refused(closed, tmp_path)
    assert "http://127.0.0.1:9 (HF_ENDPOINT) cannot be reached" in message
    assert "PRESET=offline or FILES=" in message
    with serve({"big.parquet": BIG}) as server:
        assert "HF_HUB_OFFLINE" in refused(server, tmp_path, {"HF_HUB_OFFLINE": "1"})
        assert not server.requests


def test_hub_token(hub, tmp_path):
    hub.server.token = "secret"
    assert "HF_TOKEN" in refused(hub, tmp_path)
    assert "HF_TOKEN" in refused(hub, tmp_path, {"HF_TOKEN": "wrong"})
    assert fetch(hub, tmp_path, {"HF_TOKEN": "secret"})["val"] == ROWS[100:150]


def test_hub_killed_fetch_resumes(hub, tmp_path):
    server = hub.server
    command = [*preset(train_bytes=2_000_000), "pause"]
    child = subprocess.Popen(command, env=environment(server, tmp_path), stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "pausing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    shards = {path: path.read_bytes() for path in tmp_path.glob("cache/text/*/*.parquet")}
    assert len(shards) >= 4
    asked = len(server.requests)
    resumed = fetch(hub, tmp_path, train_bytes=2_000_000)
    spent = sum(request.sent for request in server.requests[asked:])
    assert all(path.read_bytes() == content for path, content in shards.items())
    asked = len(server.requests)
    whole = fetch(hub, tmp_path / "other", train_bytes=2_000_000)
    assert spent < sum(request.sent for request in server.requests[asked:])
    assert resumed["train"] == whole["train"] == expected_train(2_000_000)
    assert resumed["identity"] == whole["identity"]
    names = [{path.name for path in (tmp_path / at).glob("cache/text/*/*")} for at in (".", "other")]
    assert names[0] == names[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_hub_damaged_shard_is_named_and_fetched_again(hub, tmp_path, damage):
    first = fetch(hub, tmp_path)
    (shard,) = tmp_path.glob("cache/text/*/train-00002.parquet")
    content = shard.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    shard.unlink() if damage == "remove" else shard.write_bytes(flipped if damage == "flip" else content[:middle])
    again = fetch(hub, tmp_path)
    assert "train-00002.parquet is damaged: fetching it again" in again["labels"]
    assert (again["train"], again["val"]) == (first["train"], first["val"])


def test_hub_cache_that_cannot_be_written(tmp_path):
    write(tmp_path / "cache", "a file where the folder should be")
    with serve({"big.parquet": BIG}) as server:
        assert "AUTORESEARCH_CACHE" in refused(server, tmp_path)


def test_hub_that_hangs_is_given_up(tmp_path):
    slow = READ.replace("hub.SHARD_BYTES", "hub.TIMEOUT = 0.3; hub.SHARD_BYTES")
    with serve({"big.parquet": BIG}, faults=[Fault("/api/datasets/", seconds=2)]) as server:
        command = preset()
        command[2] = slow
        began = time.monotonic()
        done = subprocess.run(command, env=environment(server, tmp_path), capture_output=True, text=True, timeout=60)
        assert "cannot be reached" in done.stderr
        assert time.monotonic() - began < 15
