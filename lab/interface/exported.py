"""A finished model in a folder of its own: what mlx-lm or any program calls. `lab.export` copies this file along.

The experiment has no cache of keys and values, and need not have one: what stands in its place keeps the tokens, and
every answer is computed from them anew. Slower than a cache, and right for whatever an experiment made of the model.
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
    """What is read of config.json."""

    vocab_size: int
    max_position_embeddings: int  # tokens of context
    settings: dict[str, Any]  # SETTINGS of train.py

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class Seen:
    """The tokens so far, where other models keep keys and values."""

    state: Any = ()  # (B, T) int32, once there are some

    def add(self, tokens: mx.array) -> mx.array:
        self.state = mx.concatenate([self.state, tokens], axis=1) if len(self.state) else tokens
        return self.state


class Exported(nn.Module):
    """The model of a folder's train.py. Its last `context` tokens decide."""

    def __init__(self, folder: Path, args: ModelArgs):
        super().__init__()
        self.context = args.max_position_embeddings
        self.experiment = _experiment(folder / "train.py", args.settings).build_model(args.vocab_size)

    def __call__(self, tokens: mx.array, cache: list[Seen] | None = None) -> mx.array:
        """Tokens (B, T) int32 to logits (B, T, V) float32, or those of the last `context` tokens."""
        new = tokens.shape[1]
        seen = (cache[0].add(tokens) if cache else tokens)[:, -self.context :]
        T = seen.shape[1]
        padded = mx.pad(seen, ((0, 0), (0, self.context - T)))  # the trained length: windows depend on it
        return self.experiment(padded)[:, max(0, T - new) : T]

    def make_cache(self) -> list[Seen]:
        return [Seen()]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's names to this module's."""
        return {f"experiment.{name}": value for name, value in weights.items()}


def load(folder: Path) -> Exported:
    """The model of an exported folder with its weights."""
    model = Exported(folder, ModelArgs.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    model.load_weights(list(model.sanitize(mx.load(str(folder / "model.safetensors"))).items()))
    return model


def _experiment(source: Path, settings: dict[str, Any]) -> ModuleType:
    """train.py as a module, with these settings in the place of prepare.py."""
    prepare = sys.modules["prepare"] = ModuleType("prepare")
    prepare.SETTINGS, prepare.execute = SimpleNamespace(**settings), None
    spec = importlib.util.spec_from_file_location("train", source)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
