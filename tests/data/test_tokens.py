import sys

import numpy as np
import pytest
import tokenizers
from conftest import documents

from lab.data.tokens import BOS, Tokenizer, byte_alphabet, train_tokenizer
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
