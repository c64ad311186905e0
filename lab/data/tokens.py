"""Tokenizers: byte-level BPE from the `tokenizers` library, and pure bytes.

Either is one tokenizer.json. The special token <|bos|> starts every document and is the last id; it is never produced
from text, even by a text that contains its name. Every token knows its raw bytes: bits per byte counts those, never
decoded text, because a token that is not valid UTF-8 on its own would decode to the three bytes of U+FFFD.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lab.errors import UserError
from lab.files import ROOT
from lab.preset import BYTES_VOCAB

BOS = "<|bos|>"
# GPT-4's split (contractions, words, numbers, punctuation, blanks) with numbers of at most two digits: a small
# vocabulary has no room for a thousand three-digit numbers.
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

ASCII_SPLIT = re.compile(  # the same split of ASCII text, for Python's own engine
    SPLIT.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII
)
WORDS = 200_000  # distinct words that are cached
WORD = 1000  # characters. Longer words are split for learning, which takes time quadratic in the length of a word

_SPLIT = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0-255 in byte-level BPE (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


class Tokenizer:
    """Text to token ids and back. `vocab_size` counts the special token, whose id is `bos`."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        self.inner.encode_special_tokens = True  # "<|bos|>" in a text is text
        self.vocab_size = inner.get_vocab_size()
        self.bos = inner.token_to_id(BOS)
        self.is_bytes = self.vocab_size == BYTES_VOCAB + 1
        self._words: dict[str, tuple[int, ...]] = {}  # word -> ids, a cache

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError if the file is missing or damaged."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"cannot read the tokenizer {path} ({error}); run `make prepare` again") from None

    def to_json(self) -> str:
        return self.inner.to_str()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint16 array per document, BOS first."""
        if self.is_bytes:
            raw = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            plain = iter(self._encode_plain([text for text in texts if text.isascii()]))
            others = iter(self._encode_library([text for text in texts if not text.isascii()]))
            raw = [next(plain if text.isascii() else others) for text in texts]
        arrays = [np.empty(len(ids) + 1, np.uint16) for ids in raw]
        for array, ids in zip(arrays, raw, strict=True):
            array[0] = self.bos
            array[1:] = ids
        return arrays

    def _encode_library(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for ASCII texts, three times as fast: the library encodes every distinct word once."""
        split = [ASCII_SPLIT.findall(text) for text in texts]
        if len(self._words) > WORDS:
            self._words.clear()
        new = list(set(chain.from_iterable(split)) - self._words.keys())
        self._words |= zip(new, map(tuple, self._encode_library(new)), strict=True)
        ids = [np.fromiter(chain.from_iterable(map(self._words.__getitem__, words)), np.uint16) for words in split]
        for word in new:
            if len(word) > WORD:  # rarely a word: text without blanks, which does not occur again
                del self._words[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these tokens, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The raw bytes of every token; b"" for the special one."""
        value = {character: byte for byte, character in enumerate(byte_alphabet())}
        names = [self.inner.id_to_token(i) for i in range(self.vocab_size)]
        return [b"" if name == BOS else bytes(value[c] for c in name) for name in names]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: raw bytes of each token, 0 for the special one."""
        return np.array([len(token) for token in self.token_bytes], np.int64)

    @cached_property
    def upstream_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of each token by the rule of karpathy/autoresearch's `evaluate_bpb`, which decodes
        each token on its own, so that U+FFFD for bytes that are not UTF-8 counts as three."""
        return np.array([len(token.decode(errors="replace").encode()) for token in self.token_bytes], np.int64)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer of `vocab_size` tokens; 256 means pure bytes, with nothing to learn.

    Raises UserError if the text is too small to fill the vocabulary."""
    if vocab_size == BYTES_VOCAB:
        return Tokenizer(_untrained(models.BPE(dict(zip(byte_alphabet(), range(256), strict=True)), [])))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(_learn_in_child(list(texts), vocab_size)))
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"the text has only {tokenizer.vocab_size} distinct tokens to learn, not {vocab_size}; use VOCAB=256"
        )
    return tokenizer


def _untrained(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence([_SPLIT, _BYTES])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BOS])
    return inner


def _learn_in_child(texts: list[str], vocab_size: int) -> str:
    """tokenizer.json of `_learn` from a process of its own, which Ctrl-C ends: the library does not return for it."""
    command = [sys.executable, "-m", __name__, str(vocab_size)]
    content = json.dumps(texts).encode()
    done = subprocess.run(command, cwd=ROOT, input=content, stdout=subprocess.PIPE, process_group=0, check=False)
    if done.returncode:
        raise UserError(f"training the tokenizer ended with status {done.returncode}; free some memory and run again")
    return done.stdout.decode()


def _learn(texts: list[str], vocab_size: int) -> str:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([_SPLIT, pre_tokenizers.FixedLength(WORD), _BYTES])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=byte_alphabet(), show_progress=False, special_tokens=[]
    )
    inner.train_from_iterator(texts, trainer)
    return _untrained(inner.model).to_str()


if __name__ == "__main__":
    sys.stdout.buffer.write(_learn(json.load(sys.stdin), int(sys.argv[1])).encode())
