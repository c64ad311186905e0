"""Rows of tokens for training and scoring: best-fit packing of documents.

A row has sequence_length + 1 tokens: inputs are all but the last, targets all but the first. It starts at the
beginning of a document or, for documents longer than a row, where the previous piece of that document ended (pieces
overlap by the one token that is the last target of one and the first input of the next). The remaining space takes the
longest whole document that fits, again and again. The final gap is filled with the beginning of another document in
training, and padded and not scored in validation. So every token is a target exactly once per epoch, except in these
fillings, and a short document is never split.

Best-fit packing: arXiv 2404.10830. The search for the longest fitting document is one integer operation (one bit per
available length), not a loop over documents.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """`index` (N, sequence_length + 1) int64: the position of each token in the flat array; -1 is padding."""

    index: np.ndarray

    def take(self, tokens: np.ndarray, padding: int) -> np.ndarray:
        """(N, sequence_length + 1) int32 tokens."""
        return np.where(self.index < 0, padding, tokens[self.index]).astype(np.int32)


def document_starts(tokens: np.ndarray, bos: int) -> np.ndarray:
    """(documents + 1,) start positions of the documents, then the end."""
    return np.append(np.flatnonzero(tokens == bos), len(tokens))


def pack(bounds: np.ndarray, sequence_length: int, generator: np.random.Generator | None = None) -> Rows:
    """Pack the documents between `bounds` into rows.

    With a `generator` (training): random order, gaps filled with beginnings of documents. Without (scoring): fixed
    order, gaps padded."""
    starts, lengths = _pieces(bounds, sequence_length)
    size = sequence_length + 1
    order = np.arange(len(starts)) if generator is None else generator.permutation(len(starts))
    is_start = np.isin(starts, bounds)
    whole = order[lengths[order] == size]
    openers = order[(lengths[order] < size) & ~is_start[order]]
    available = _Available(order[(lengths[order] < size) & is_start[order]], lengths)
    documents = [] if generator is None else generator.permutation(len(bounds) - 1).tolist()
    fillings = _Fillings(bounds, documents)

    piece_starts, piece_lengths = [starts[whole]], [lengths[whole]]
    more_starts: list[int] = []
    more_lengths: list[int] = []
    opening = iter(openers.tolist())
    while (piece := next(opening, None)) is not None or (piece := available.longest(size)) is not None:
        gap = size
        while piece is not None:
            more_starts.append(int(starts[piece]))
            more_lengths.append(int(lengths[piece]))
            gap -= more_lengths[-1]
            piece = available.longest(gap)
        if gap:
            more_starts.append(-1 if generator is None else fillings.next(gap))
            more_lengths.append(gap)
    piece_starts.append(np.array(more_starts, np.int64))
    piece_lengths.append(np.array(more_lengths, np.int64))
    index = _ranges(np.concatenate(piece_starts), np.concatenate(piece_lengths)).reshape(-1, size)
    return Rows(index if generator is None else index[generator.permutation(len(index))])


class _Available:
    """Unpacked documents by length; `longest(limit)` removes and returns a longest one of at most `limit` tokens."""

    def __init__(self, pieces: np.ndarray, lengths: np.ndarray):
        self.by_length: dict[int, list[int]] = {}
        for piece, length in zip(pieces.tolist(), lengths[pieces].tolist(), strict=True):
            self.by_length.setdefault(length, []).append(piece)
        self.lengths = sum(1 << length for length in self.by_length)  # bit n: a document of n tokens is available

    def longest(self, limit: int) -> int | None:
        length = (self.lengths & ((2 << limit) - 1)).bit_length() - 1
        if length < 1:
            return None
        pieces = self.by_length[length]
        if len(pieces) == 1:
            self.lengths ^= 1 << length
        return pieces.pop()


class _Fillings:
    """Beginnings of documents: takes turns among those that are long enough."""

    def __init__(self, bounds: np.ndarray, documents: list[int]):
        self.starts, self.lengths, self.documents, self.at = bounds[:-1], np.diff(bounds), documents, 0

    def next(self, gap: int) -> int:
        for _ in range(len(self.documents)):
            document = self.documents[self.at]
            self.at = (self.at + 1) % len(self.documents)
            if self.lengths[document] >= gap:
                return int(self.starts[document])
        return -1  # no document is that long: padding


def _pieces(bounds: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of the pieces of at most sequence_length + 1 tokens, overlapping by one token."""
    lengths = np.diff(bounds)
    counts = np.maximum(1, -(-(lengths - 1) // sequence_length))
    number = np.arange(counts.sum()) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # index of the piece in its document
    starts = np.repeat(bounds[:-1], counts) + number * sequence_length
    return starts, np.minimum(np.repeat(bounds[1:], counts) - starts, sequence_length + 1)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for every piece, concatenated; -1 for all of a piece with start -1."""
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    begin = np.repeat(starts, lengths)
    return np.where(begin < 0, -1, begin + offsets)


class Batches:
    """Endless training batches: (inputs, targets), each (rows, sequence_length) int32.

    Each epoch goes through the shards in a new order and packs one at a time. The same seed gives the same batches.
    `epoch` counts from 1."""

    def __init__(self, shards: list[np.ndarray], bos: int, sequence_length: int, rows: int, seed: int):
        self.shards, self.bos, self.sequence_length, self.rows = shards, bos, sequence_length, rows
        self.generator = np.random.default_rng(seed)
        self.epoch = 0
        self._batches = self._generate()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        return next(self._batches)

    def _generate(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rest = np.empty((0, self.sequence_length + 1), np.int32)
        while True:
            self.epoch += 1
            for number in self.generator.permutation(len(self.shards)):
                tokens = np.asarray(self.shards[number])
                rows = pack(document_starts(tokens, self.bos), self.sequence_length, self.generator)
                packed = np.concatenate([rest, rows.take(tokens, self.bos)])
                whole = len(packed) - len(packed) % self.rows
                for at in range(0, whole, self.rows):
                    batch = packed[at : at + self.rows]
                    yield batch[:, :-1], batch[:, 1:]
                rest = packed[whole:]
