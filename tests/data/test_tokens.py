import random
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, documents, environment
from tokenizers import decoders, models, pre_tokenizers, trainers

from lab.data.tokens import BOS, SPLIT, WORD, Tokenizer, byte_alphabet, train_tokenizer
from lab.errors import UserError

HOSTILE = [
    "",
    " ",
    "\0",
    "<|bos|>",
    "before <|bos|> after",
    "<|bos|><|bos|>",
    "<|endoftext|>",
    "a\r\nb\rc\n\n\n d\t\te  \u00a0 \u2028\u2029 f",
    "It's, they'LL, don’t; 1234567 3.14 ١٢٣",
    "naïve café — “quotes” … ﬁ ǅ ß İ ı",
    "e\u0301 \u1112\u1161\u11ab \u200b\u200d\ufeff \u202eright to left\u202c",
    "日本語のテキスト。中文，한국어 ไทย עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufffd\uffff",
    "Ġ Ċ Ā ġ the letters that stand for bytes",
    "a" * 5000,
    " " * 3000 + "x",
    "z̷̢̧̛̺̰̪͖̗̲̰̈́̑͐̈́a̸͜l̶̔g̷͛ơ̴",
    "".join(map(chr, range(0x20, 0x3000))),
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(iter([*documents(300), *HOSTILE]), 600)


@pytest.fixture(scope="module")
def pure_bytes() -> Tokenizer:
    return train_tokenizer(iter([]), 256)


@pytest.fixture(params=["bpe", "pure_bytes"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_any_text_comes_back(tokenizer, text):
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint16


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer, text):
    [ids] = tokenizer.encode([text])
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_every_character_comes_back_with_its_bytes(tokenizer):
    text = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)[::7]
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_tokens_that_are_not_utf8_alone_count_their_raw_bytes(tokenizer):
    table = {character: byte for byte, character in enumerate(byte_alphabet())}
    vocabulary = tokenizer.inner.get_vocab()
    broken = 0
    for name, number in vocabulary.items():
        raw = b"" if name == BOS else bytes(table[character] for character in name)
        assert tokenizer.token_bytes[number] == raw
        assert tokenizer.byte_lengths[number] == len(raw)
        broken += raw.decode("utf-8", errors="replace").encode() != raw
    assert broken >= 128  # at least the bytes 128 to 255: decoded they would count three bytes each


def test_a_character_split_over_tokens_counts_its_bytes_once(pure_bytes):
    [ids] = pure_bytes.encode(["€"])
    assert ids.tolist() == [pure_bytes.bos, 0xE2, 0x82, 0xAC]
    assert pure_bytes.byte_lengths[ids].tolist() == [0, 1, 1, 1]
    assert pure_bytes.decode(ids[:2]) == "\ufffd"


def test_bos_comes_first_is_the_last_id_and_never_comes_from_text(tokenizer):
    assert tokenizer.bos == tokenizer.vocab_size - 1
    for ids in tokenizer.encode(HOSTILE):
        assert ids[0] == tokenizer.bos
        assert tokenizer.bos not in ids[1:]
    assert tokenizer.byte_lengths[tokenizer.bos] == 0


def test_vocabulary_is_of_the_size_asked_for(bpe, pure_bytes):
    assert bpe.vocab_size == len(bpe.byte_lengths) == 600
    assert pure_bytes.vocab_size == len(pure_bytes.byte_lengths) == 257
    assert not bpe.is_bytes
    assert pure_bytes.is_bytes


def test_pure_bytes_are_the_bytes_and_what_the_library_makes_of_the_same_json(pure_bytes, tmp_path):
    (tmp_path / "tokenizer.json").write_text(pure_bytes.to_json())
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text, ids in zip(HOSTILE, pure_bytes.encode(HOSTILE), strict=True):
        assert ids[1:].tolist() == list(text.encode())
        assert ids[1:].tolist() == library.encode(text, add_special_tokens=False).ids


def test_bpe_is_what_the_library_makes_of_the_same_json(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json())
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text, ids in zip(HOSTILE, bpe.encode(HOSTILE), strict=True):
        assert ids[1:].tolist() == library.encode(text, add_special_tokens=False).ids


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.to_json() == tokenizer.to_json()
    assert (loaded.vocab_size, loaded.bos, loaded.is_bytes) == (tokenizer.vocab_size, tokenizer.bos, tokenizer.is_bytes)
    assert loaded.token_bytes == tokenizer.token_bytes
    for mine, other in zip(tokenizer.encode(HOSTILE), loaded.encode(HOSTILE), strict=True):
        assert mine.tolist() == other.tolist()


def test_the_same_text_teaches_the_same_tokenizer():
    texts = documents(100)
    assert train_tokenizer(iter(texts), 400).to_json() == train_tokenizer(iter(texts), 400).to_json()


def learned_by_the_library(texts: list[str], vocab_size: int) -> str:
    """What earlier versions wrote to tokenizer.json: words of any length, learned in this process."""
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=byte_alphabet(), show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([BOS])
    return inner.to_str()


def test_ordinary_text_gives_the_tokenizer_of_earlier_versions_to_the_byte(monkeypatch):
    """Prepared data stays valid."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    short = [text for text in HOSTILE if len(text) <= WORD]
    texts = [*documents(300), *short, "x" * WORD, " " * WORD + "y", "日本" * (WORD // 2), "=" * (WORD - 1)]
    assert train_tokenizer(iter(texts), 600).to_json() == learned_by_the_library(texts, 600)


@pytest.mark.parametrize("character", ["a", "=", "日", "é", " ", "\n"], ids=ascii)
def test_a_million_characters_without_a_break_are_learned_in_seconds(character):
    """The library takes ten minutes for them: its time grows with the square of a word."""
    began = time.monotonic()
    train_tokenizer(iter([*documents(100), "once" + character * 1_000_000]), 400)
    assert time.monotonic() - began < 60


def test_an_interrupt_ends_the_learning_at_once(tmp_path):
    """The library does not notice it."""
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("acgt", k=8_000_000)))
    (tmp_path / "b.txt").write_text("once upon a time")
    files = ("--files", tmp_path / "a.txt", "--val-files", tmp_path / "b.txt")
    command = [sys.executable, "prepare.py", "--no-fit", *files]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(tmp_path / "cache"), stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr.readline() == b"training the tokenizer\n"
        time.sleep(2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().split() == [b"stopped"]
        assert process.wait(60) == 130
    assert time.monotonic() - began < 5
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_learning_process_that_is_killed_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="training the tokenizer ended with status 1; free some memory"):
        train_tokenizer(iter(documents(10)), 300)


def test_frequent_words_become_one_token(bpe):
    assert b" the" in bpe.token_bytes
    text = " ".join(documents(20, seed=9))
    assert len(bpe.encode([text])[0]) < 0.6 * len(text.encode())


def test_numbers_are_cut_after_two_digits(bpe):
    assert max(len(token) for token in bpe.token_bytes if token.isdigit()) <= 2


def test_a_vocabulary_larger_than_the_text_can_fill_is_refused():
    with pytest.raises(UserError, match=r"only \d+ distinct tokens to learn, not 5000; use VOCAB=256"):
        train_tokenizer(iter(["once upon a time"]), 5000)


@pytest.mark.parametrize(
    "content", [None, "", "{}", "{", '{"model": 1}'], ids=["missing", "empty", "{}", "cut", "other"]
)
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^cannot read the tokenizer .*tokenizer\.json .*run `make prepare` again$"):
        Tokenizer.load(path)


def test_the_fast_path_for_ascii_is_the_library_to_the_id(bpe):
    """Every ASCII character beside every other, random runs of them, and real stories."""
    draw = np.random.default_rng(0)
    ascii_characters = [chr(i) for i in range(128)]
    pairs = ["".join(a + b for b in ascii_characters) for a in ascii_characters]
    weighted = [*"  \n\n\r\t''\"\"..,!?aaeest012 \x1c\x1f\x0b\x0c", "'re", "'LL", "don't", "  "]
    random = ["".join(draw.choice(weighted, 300)) for _ in range(300)]
    for text in [*pairs, *random, *documents(50)]:
        fast = bpe.encode([text])[0][1:].tolist()
        assert fast == bpe.inner.encode(text, add_special_tokens=False).ids, repr(text)


def test_ascii_and_other_texts_keep_their_order(bpe):
    texts = ["plain", "naïve", "", "plain again", "Ünder", "x"]
    assert [bpe.decode(ids) for ids in bpe.encode(texts)] == texts


def test_documents_without_a_blank_are_not_kept_in_memory(bpe):
    draw = random.Random(0)
    tracemalloc.start()
    for _ in range(6):
        bpe.encode(["".join(draw.choices("abcdefghij", k=300_000))])
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 2e6
