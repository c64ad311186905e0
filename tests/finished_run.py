"""A finished run of a small model, as training would have left it, for tests of the scorer."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lab import preset
from lab.data import shards
from lab.data.stories import stories

HONEST = """
from lab.machine.backend import mx, nn
class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = 0.1 * mx.random.normal((vocab_size, vocab_size))
    def __call__(self, tokens):
        return self.table[tokens]
def build_model(vocab_size):
    return Model(vocab_size)
"""
CALL = "        return self.table[tokens]"
LEARNT = list(islice(stories(seed=3), 20))
LENGTH = 16  # tokens of context


class Texts:
    def __init__(self, train: list[str], val: list[str]):
        self.identity = {"train": train, "val": val}
        self.train, self.val = lambda: iter(train), lambda: iter(val)


def prepare(val: Sequence[str], vocab: int = 256, length: int = LENGTH) -> tuple[preset.Preset, shards.Prepared]:
    """These validation texts, prepared in the test's cache."""
    chosen = preset.override(preset.load("offline"), vocab_size=vocab, sequence_length=length)
    return chosen, shards.prepare(chosen, Texts(LEARNT, list(val)), lambda *_: None)[0]


def record(chosen: preset.Preset, prepared: shards.Prepared) -> dict:
    """settings.json of a run."""
    folder = {"preset": preset.to_dict(chosen), "tier": "", "prepared": str(prepared.folder)}
    return folder | {"minutes": 5.0, "steps": None, "seed": 0}


def leave(run: Path, source: str, chosen: preset.Preset, prepared: shards.Prepared) -> Path:
    """A run folder with settings and source, but no checkpoint."""
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(record(chosen, prepared)))
    (run / "train.py").write_text(source)
    return run


def save_table(run: Path, size: int, table: np.ndarray | None = None) -> None:
    from lab.machine.backend import mx

    if table is None:
        table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    mx.save_safetensors(str(run / "checkpoint.safetensors"), {"table": mx.array(table)})
