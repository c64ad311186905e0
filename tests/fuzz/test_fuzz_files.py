"""Presets, settings, manifests, texts and a model server's answers: any content is read, or refused in one line."""

import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from values import HOSTILE, anything, damaged, is_short, mangled

from lab import preset
from lab.agents.briefing import NoProposal, task_line
from lab.agents.model import LocalModel
from lab.agents.ollama_client import Client, Server
from lab.agents.server import Refused, Unusable
from lab.data import hub
from lab.data.documents import read_documents
from lab.data.shards import Prepared, Shard, _finished_shards, _manifest
from lab.errors import UserError
from lab.files import sha256
from lab.interface.housekeeping import _prepared
from lab.loop.session import night_settings

OFFLINE = (preset.FOLDER / "offline.toml").read_text(encoding="utf-8")
RECORD = preset.to_dict(preset.load("offline"))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---- presets


def loaded(folder: Path, content: bytes) -> None:
    """Load a preset with this content: it is refused in one line that names it, or valid on every machine."""
    (folder / "mine.toml").write_bytes(content)
    try:
        mine = preset.load("mine", folder)
    except UserError as error:
        is_short(error, 500, "presets/mine.toml")
        return
    for machine in (preset.Hardware("cpu", 8.0, 0), preset.Hardware("metal", 64.0, 40)):
        chosen, _ = preset.adapt(mine, machine)
        preset.validate(chosen, "it")
        assert preset.from_dict(json.loads(json.dumps(preset.to_dict(chosen), allow_nan=False))) == chosen


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf").replace("null", '"null"')


tables = anything.map(toml)
keys = st.sampled_from(sorted(set(re.findall(r"(?m)^\w+(?= = )", OFFLINE)))) | st.just("hardware")


@given(st.lists(st.tuples(keys, tables), min_size=1, max_size=2))
def test_a_preset_with_other_values_is_refused_or_valid(folder, changes):
    text = OFFLINE
    for key, value in changes:
        text = re.sub(rf"(?m)^{key} = .*$", lambda _, line=f"{key} = {value}": line, text)
        text = f"hardware = {value}\n" + text.partition("[[hardware]]")[0] if key == "hardware" else text
    loaded(folder, text.encode("utf-8", "replace"))


@given(mangled(OFFLINE.encode()) | st.binary(max_size=50))
@example(b"a = " + b"[" * 20_000)
@example(b"a = " + b"9" * 5000)
@example(OFFLINE.replace("depth = 4", "depth = 0x" + "f" * 5000).encode())
@example(OFFLINE.replace("softcap = 15.0", "softcap = 1" + "0" * 400).encode())
@example(b'"' + b"x" * 10_000 + b'" = 1')
def test_a_damaged_preset_is_refused_or_valid(folder, content):
    loaded(folder, content)


# ---- settings of a night

SETTINGS = {"preset": RECORD, "tier": "any machine", "fit": None, "prepared": "/data", "minutes": 5.0, "steps": None}
FIT = {"memory_bound_mb": 900.0, "tokens_per_second": 5000.0, "predicted_bpb": 0.8, "batch": {"processes": 1}}


def opened(folder: Path, content: bytes) -> None:
    """Open a night with these settings: they are refused in one line that names them, or complete."""
    path = folder / "settings.json"
    path.write_bytes(content)
    needed = _prepared(path)
    try:
        settings = night_settings(folder, None, None)
    except UserError as error:
        is_short(error, 500, f"{path} is damaged")
        return
    assert needed == Path(settings["prepared"]).resolve()
    assert task_line(settings).isprintable()
    preset.validate(preset.from_dict(settings["preset"]), "it")
    assert 0 < settings["minutes"] * 60 < 1e9
    assert settings["tier"] is None or settings["tier"].isprintable()
    assert settings["steps"] is None or settings["steps"] > 0


@given(damaged(SETTINGS))
@example({key: value for key, value in SETTINGS.items() if key != "minutes"})
@example({key: value for key, value in SETTINGS.items() if key != "tier"})
def test_settings_with_other_values_are_refused_or_complete(folder, record):
    opened(folder, json.dumps(record).encode())


@given(mangled(json.dumps(SETTINGS).encode()))
@example(b"[" * 100_000)
@example(b"\xff\xfe")
def test_damaged_settings_are_refused_or_complete(folder, content):
    opened(folder, content)


# ---- prepared data

SHARD = {"name": "train-00000.npy", "documents": 1, "bytes": 1, "tokens": 2, "sha256": "0"}
MANIFEST = {"preset": "offline", "vocab_size": 257, "tokenizer": {"name": "tokenizer.json", "sha256": "0"},
            "val": SHARD | {"name": "val.npy"}, "val_text_sha256": "0", "train": [SHARD],
            "totals": {"documents": 1, "bytes": 1, "tokens": 2}}  # fmt: skip


def read(folder: Path, content: bytes) -> None:
    """Read a manifest with this content: it is refused in one line, or names files of its own folder alone."""
    (folder / "manifest.json").write_bytes(content)
    try:
        manifest = _manifest(folder)
    except UserError as error:
        is_short(error, 500, f"damaged in {folder}: manifest.json; `make prepare` rebuilds it")
        return
    prepared = Prepared(folder, manifest)
    assert all("/" not in name and name.isprintable() for name in prepared.damaged())
    assert len(prepared.fingerprint(64, 5.0)) == 12
    totals, val = manifest["totals"], manifest["val"]
    assert f"{manifest['vocab_size']} {totals['documents']:,} {totals['bytes'] / 1e6:.1f} {totals['tokens'] / 1e6:.1f}"
    assert f"{val['documents']:,} {val['bytes']:,}"


@given(damaged(MANIFEST).map(lambda record: json.dumps(record).encode()) | mangled(json.dumps(MANIFEST).encode()))
@example(b"[" * 100_000)
@example(json.dumps(MANIFEST | {"val": SHARD | {"name": "../../x"}}).encode())
def test_a_damaged_manifest_is_refused_or_complete(folder, content):
    read(folder, content)


@given(st.lists(damaged(SHARD).map(lambda record: json.dumps(record).encode()) | st.binary(max_size=30), max_size=4))
@example([b"\xff"])
@example([b"[" * 100_000])
@example([json.dumps(SHARD | {"name": "a" * 300}).encode()])
@example([json.dumps(SHARD | {"name": "\0"}).encode()])
def test_the_record_of_a_preparation_that_was_interrupted_may_be_damaged(folder, lines):
    (folder / SHARD["name"]).write_bytes(b"whole")
    whole = SHARD | {"sha256": sha256(folder / SHARD["name"])}
    for content in (lines, [*lines, json.dumps(whole).encode()]):
        (folder / "shards.jsonl").write_bytes(b"\n".join(content))
        done = _finished_shards(folder)
    assert done == {SHARD["name"]: Shard(**whole)}


HUB = {"identity": {"source": "hub"}, "val": [{"name": "val-0.parquet", "sha256": "0"}], "train": []}


@given(damaged(HUB).map(lambda record: json.dumps(record).encode()) | mangled(json.dumps(HUB).encode()))
@example(b"[" * 100_000)
@example(json.dumps(HUB | {"train": [{"name": "../outside", "sha256": "0"}]}).encode())
def test_a_damaged_record_of_a_download_is_fetched_again_and_removes_no_other_file(folder, content):
    (folder / "outside").write_bytes(b"the user's")
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "manifest.json").write_bytes(content)
    found = hub._complete(folder / "hub", lambda label, done, total: None)
    assert found is None or found.keys() >= {"identity", "val", "train"}
    assert (folder / "outside").exists()


# ---- texts

DOCUMENTS = ["one", "two\nlines", "ünï 🐶", "x" * 300, '{"text": 1}', "<|bos|>"]


def parquet(documents: list[str]) -> bytes:
    pq.write_table(pa.table({"text": documents}), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


FILES = {
    ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode(),
    ".txt": "<|endoftext|>".join(DOCUMENTS).encode(),
    ".parquet": parquet(DOCUMENTS),
}


@given(st.sampled_from(sorted(FILES)).flatmap(lambda kind: st.tuples(st.just(kind), mangled(FILES[kind]))))
@example((".jsonl", b'{"text": "\\ud800"}\n'))
def test_a_damaged_text_file_is_read_or_refused(folder, damage):
    kind, content = damage
    path = folder / f"a{kind}"
    path.write_bytes(content)
    try:
        for text in read_documents([str(path)], "text"):
            assert text.encode()
            assert not text.isspace()
    except UserError as error:
        is_short(error, 500, str(path))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=5))
@example(["\ufeffone", "\x85", "a\u2028b"])
def test_texts_are_read_as_they_were_written(folder, documents):
    documents = [text for text in documents if not text.isspace()]
    assume(documents)
    written = {
        ".jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents).encode(),
        ".parquet": parquet(documents),
    }
    for kind, content in written.items():
        (folder / f"b{kind}").write_bytes(content)
        assert list(read_documents([str(folder / f"b{kind}")], "text")) == documents


# ---- a model server's answers

ENTRY = {"name": "m:1b", "model": "m:1b", "size": 10**9, "details": {"parameter_size": "1B"}}
SHOWN = {"model_info": {"general.parameter_count": 10**9, "x.context_length": 4096}, "capabilities": ["completion"],
         "details": {"parameter_size": "1B"}}  # fmt: skip
PART = {"model": "m:1b", "message": {"role": "assistant", "content": "{}"}, "done": True, "prompt_eval_count": 9}


def server(*replies: bytes, status: int = 200) -> Server:
    """A server whose answers to /api/tags, /api/show and everything else are these bytes."""
    places = dict(zip(("/api/tags", "/api/show"), replies, strict=False))
    made = Server("127.0.0.1:1", patience=0.0)
    transport = httpx.MockTransport(
        lambda request: httpx.Response(status, content=places.get(request.url.path, replies[-1]))
    )
    made.client = made.control = Client(made.url, transport=transport)
    return made


def packed(record: object) -> bytes:
    return json.dumps(record).encode()


entries = damaged({"models": [ENTRY]}).map(packed) | st.binary(max_size=30)
shown = st.just(packed(SHOWN)) | damaged(SHOWN).map(packed)
parts = damaged(PART).map(packed) | st.binary(max_size=30)


@given(entries | st.just(packed({"models": [ENTRY]})), shown, st.sampled_from((200, 404, 500)))
@example(b"[" * 100_000, b"{}", 200)
@example(packed({"models": [ENTRY]}), packed(SHOWN | {"model_info": {"general.parameter_count": 10**400}}), 200)
@example(packed({"models": [ENTRY]}), packed(SHOWN | {"model_info": {"x.context_length": 10**400}}), 200)
@example(packed({"models": [ENTRY | {"size": 10**400}]}), packed(SHOWN), 200)
@example(packed({"models": [ENTRY | {"size": float("nan")}]}), packed(SHOWN), 200)
@example(packed({"models": [ENTRY | {"name": 5, "model": 5}]}), packed(SHOWN), 200)
@example(b"<title>" * 100_000, b"", 500)
def test_a_server_with_any_list_of_models_gives_one_or_one_line(listed, details, status):
    asked = server(listed, details, status=status)
    try:
        model = LocalModel(server=asked, memory_gb=8.0).choose()
    except (UserError, NoProposal) as error:
        is_short(error, 1000)
        return
    assert model.name.isprintable()
    assert model.parameters >= 0
    assert 0 <= model.context < 2**63
    assert f"{model.bytes / 2**30:.1f}"


@given(st.lists(parts, max_size=3), st.sampled_from((200, 200, 404, 500)))
@example([b"[" * 100_000], 200)
def test_a_server_with_any_stream_gives_an_answer_or_one_line(lines, status):
    asked = server(b"{}", b"{}", b"\n".join(lines), status=status)
    with suppress(UserError):
        try:
            answer = asked.ask("m:1b", "system", "prompt", {})
        except (NoProposal, Unusable, Refused) as error:
            is_short(error, 1000)
        else:
            assert isinstance(answer.text, str)
            assert answer.prompt_tokens is None or answer.prompt_tokens > 0


@pytest.mark.parametrize("text", HOSTILE)
def test_a_server_that_answers_hostile_text_is_one_printable_line(text):
    with pytest.raises((UserError, NoProposal)) as caught:
        server(text.encode("utf-8", "replace")).models()
    is_short(caught.value, 1000)
