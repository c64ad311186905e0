"""An exported model, as mlx-lm or any other program calls it. `lab.interface.export` copies this file.

The experiment needs no key-value cache: the cache here holds the tokens, and every answer is computed from all of them.
This is slower, but correct for any model that an experiment may define.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from lab.machine.backend import mx, nn


@dataclass
class ModelArgs:
    """The keys of config.json that are read."""

    vocab_size: int
    max_position_embeddings: int  # tokens of context
    settings: dict[str, Any]  # SETTINGS of train.py

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class TokenCache:
    """The tokens so far, in place of keys and values."""

    state: Any = ()  # (B, T) int32 after the first call

    def add(self, tokens: mx.array) -> mx.array:
        self.state = mx.concatenate([self.state, tokens], axis=1) if len(self.state) else tokens
        return self.state


class Exported(nn.Module):
    """The model of a folder's train.py. It sees the last `context` tokens."""

    def __init__(self, folder: Path, args: ModelArgs):
        super().__init__()
        self.context = args.max_position_embeddings
        self.experiment = _experiment(folder / "train.py", args.settings).build_model(args.vocab_size)

    def __call__(self, tokens: mx.array, cache: list[TokenCache] | None = None) -> mx.array:
        """Tokens (B, T) int32 to logits (B, T, V) float32, or those of the last `context` tokens."""
        new = tokens.shape[1]
        tokens = (cache[0].add(tokens) if cache else tokens)[:, -self.context :]
        T = tokens.shape[1]
        padded = mx.pad(tokens, ((0, 0), (0, self.context - T)))  # the trained length: windows depend on it
        return self.experiment(padded)[:, max(0, T - new) : T]

    def make_cache(self) -> list[TokenCache]:
        return [TokenCache()]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename the checkpoint's weights to the names of this module."""
        return {f"experiment.{name}": value for name, value in weights.items()}


def load(folder: Path) -> Exported:
    """The model of an exported folder with its weights."""
    model = Exported(folder, ModelArgs.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    model.load_weights(list(model.sanitize(mx.load(str(folder / "model.safetensors"))).items()))
    return model.eval()


def _experiment(source: Path, settings: dict[str, Any]) -> ModuleType:
    """train.py as a module, with these settings in place of prepare.py."""
    prepare = sys.modules["prepare"] = ModuleType("prepare")
    prepare.SETTINGS, prepare.execute = SimpleNamespace(**settings), None
    spec = importlib.util.spec_from_file_location("train", source)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
