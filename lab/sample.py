"""Text from a checkpoint: prompt, temperature, top-k, seed, length; piece by piece, so that it can be streamed."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lab.errors import UserError
from lab.model_server import load_model
from lab.run import ROOT
from lab.shards import open_prepared
from lab.tokens import Tokenizer


def last_run() -> Path:
    """The newest run with a checkpoint. Raises UserError when there is none."""
    runs = sorted((ROOT / "runs").glob("*/checkpoint.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no finished run yet; `make train` makes one")
    return runs[-1].parent


Model = Callable[[np.ndarray], np.ndarray]  # (B, T) int32 tokens to (B, T, V) logits


def open_run(run_dir: Path) -> tuple[Model, Tokenizer, int]:
    """Model, tokenizer and context of a run. Raises UserError when it is not whole."""
    from lab.backend import mx

    if not (run_dir / "checkpoint.safetensors").is_file():
        raise UserError(f"{run_dir} has no checkpoint; name a finished run of runs/")
    record = json.loads((run_dir / "settings.json").read_text())
    tokenizer = open_prepared(Path(record["prepared"]), parts=("tokenizer",)).tokenizer
    model = load_model(run_dir.resolve(), tokenizer.vocab_size)
    return lambda tokens: np.array(model(mx.array(tokens))), tokenizer, record["preset"]["task"]["sequence_length"]


def write(
    model: Model,
    tokenizer: Tokenizer,
    length: int,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[str]:
    """Yield the prompt, then text as it is made, until the document ends or `tokens` are made.

    The last `length` tokens are the context. A character is yielded when all its bytes are there."""
    generator = np.random.default_rng(seed)
    ids = tokenizer.encode([prompt])[0].tolist()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield prompt
    for _ in range(tokens):
        context = ids[-length:]
        padded = context + [tokenizer.bos] * (length - len(context))  # one shape; what follows cannot matter
        logits = model(np.array([padded], np.int32))[0, len(context) - 1].astype(np.float64)
        ids.append(choose(logits, temperature, top_k, generator))
        if ids[-1] == tokenizer.bos:
            break
        yield decoder.decode(tokenizer.token_bytes[ids[-1]])
    yield decoder.decode(b"", final=True)


def choose(logits: np.ndarray, temperature: float, top_k: int, generator: np.random.Generator) -> int:
    """A token drawn from (V,) logits; temperature 0 takes the largest."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k and top_k < len(logits):
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    weights = np.exp((logits - logits.max()) / temperature)
    return int(generator.choice(len(weights), p=weights / weights.sum()))
