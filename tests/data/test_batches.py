"""Packing and batches: every token a target once, documents whole where they fit, the same seed the same batches."""

import time
from itertools import islice, pairwise

import numpy as np
import pytest

from lab.data.batches import Batches, document_starts, pack

BOS = 99


def corpus(lengths: list[int]) -> np.ndarray:
    """Documents of these lengths, <|bos|> included; all other tokens are distinct numbers from 100 on."""
    tokens, value = [], 100
    for length in lengths:
        tokens += [BOS, *range(value, value + length - 1)]
        value += length - 1
    return np.array(tokens, np.uint16)


def random_lengths(seed: int, count: int, longest: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


@pytest.mark.parametrize(
    "lengths", [[5], [1], [9], [10], [8, 8, 8], [40], [2, 3, 4, 30, 5], random_lengths(0, 400, 40)]
)
def test_scoring_rows_hold_every_target_exactly_once(lengths):
    tokens = corpus(lengths)
    rows = pack(document_starts(tokens, BOS), 8)
    index = rows.index
    assert index.shape[1] == 9
    targets = index[:, 1:].ravel()
    scored = targets[(targets >= 0) & (tokens[targets] != BOS)]
    assert sorted(scored.tolist()) == np.flatnonzero(tokens != BOS).tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_target_follows_its_own_predecessor_or_starts_a_document(seed):
    tokens = corpus(random_lengths(seed, 300, 60))
    for generator in (None, np.random.default_rng(seed)):
        index = pack(document_starts(tokens, BOS), 16, generator).index
        before, after = index[:, :-1], index[:, 1:]
        real = after >= 0
        follows = after == before + 1
        starts = tokens[np.maximum(after, 0)] == BOS
        assert (follows | starts | ~real).all()


def test_training_rows_start_at_a_document_or_where_its_last_piece_ended():
    tokens = corpus(random_lengths(3, 500, 50))
    bounds = document_starts(tokens, BOS)
    index = pack(bounds, 16, np.random.default_rng(0)).index
    first = index[:, 0]
    owner = np.searchsorted(bounds, first, side="right") - 1
    assert ((first - bounds[owner]) % 16 == 0).all()


def test_training_covers_every_target_and_repeats_few():
    tokens = corpus(random_lengths(4, 2000, 50))
    index = pack(document_starts(tokens, BOS), 64, np.random.default_rng(0)).index
    targets = index[:, 1:].ravel()
    inner = tokens != BOS
    counts = np.bincount(targets[targets >= 0], minlength=len(tokens))
    assert (counts[inner] >= 1).all()
    assert (counts[inner] > 1).mean() < 0.05
    assert (targets < 0).sum() == 0


def slow_best_fit(lengths: list[int], size: int) -> int:
    """Rows that plain best-fit-decreasing needs: the independent reference."""
    left = sorted(lengths, reverse=True)
    rows = 0
    while left:
        rows, gap = rows + 1, size
        while fitting := [length for length in left if length <= gap]:
            gap -= max(fitting)
            left.remove(max(fitting))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_as_few_rows_as_a_plain_slow_packer(seed):
    lengths = random_lengths(seed, 300, 17)
    tokens = corpus(lengths)
    assert len(pack(document_starts(tokens, BOS), 16).index) == slow_best_fit(lengths, 17)


def test_short_documents_are_never_cut():
    tokens = corpus(random_lengths(6, 400, 17))
    bounds = document_starts(tokens, BOS)
    index = pack(bounds, 16).index
    for start, end in pairwise(bounds):
        [row] = np.unique(np.where(np.isin(index, np.arange(start, end)))[0])
        assert np.isin(np.arange(start, end), index[row]).all()


def test_same_seed_same_batches_other_seed_others():
    shards = [corpus(random_lengths(i, 200, 40)) for i in range(3)]

    def take(seed):
        return [x for x, _ in (next(b) for b in [Batches(shards, BOS, 16, 4, seed)] for _ in range(60))]

    one, same, other = take(0), take(0), take(1)
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_batches_are_shifted_by_one_int32_and_go_on_after_an_epoch():
    batches = Batches([corpus([30, 12])], BOS, 8, 16, seed=0)  # fewer rows in an epoch than in a batch
    inputs, targets = next(batches)
    assert inputs.shape == targets.shape == (16, 8)
    assert inputs.dtype == np.int32
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert batches.epoch > 1


def test_packing_is_fast():
    tokens = np.full(4_000_000, 7, np.uint16)
    tokens[np.cumsum(np.random.default_rng(0).integers(60, 350, 19_000))] = BOS
    tokens[0] = BOS
    begun = time.process_time()
    rows = pack(document_starts(tokens, BOS), 256, np.random.default_rng(0))
    per_row = (time.process_time() - begun) / len(rows.index)
    assert per_row < 200e-6, f"{per_row * 1e6:.0f} us a row"


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (3, 1), (16, 1), (4, 2), (2, 3)])
def test_the_text_of_a_seed_does_not_depend_on_rows_or_processes(rows, processes):
    """So two codes with the same seed see the same text in the same order, whatever they change."""
    shards = [corpus(random_lengths(seed, 60, 30)) for seed in (1, 2)]
    expected = list(islice(Batches(shards, BOS, 8, 1, seed=5), 240))  # beyond the first epoch
    shares = [islice(Batches(shards, BOS, 8, rows, seed=5), rank, None, processes) for rank in range(processes)]
    found = [
        row for _ in range(240 // (rows * processes)) for share in shares for row in zip(*next(share), strict=True)
    ]
    for (inputs, targets), (wanted, following) in zip(found, expected, strict=False):
        assert (inputs == wanted[0]).all()
        assert (targets == following[0]).all()
    assert len(found) == 240
