"""Generate text from a checkpoint, streamed piece by piece.

The model runs in a separate process: two runs can be used in turn, and code that an agent wrote stays in a sandbox.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lab.data.shards import open_prepared
from lab.data.tokens import Tokenizer
from lab.errors import CONTROLS, UserError
from lab.files import ROOT
from lab.loop.branch import check_tag
from lab.loop.journal import Journal, read

COLUMN = 40  # least width of a readable column, in characters

Model = Callable[[np.ndarray], np.ndarray]  # (B, T) int32 tokens to (B, T, V) logits


def last_run() -> Path:
    """The newest run with a checkpoint. Raises UserError if there is none."""
    runs = sorted((ROOT / "runs").glob("*/checkpoint.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no finished run yet; start one with `make train`")
    return runs[-1].parent


def best_run(tag: str) -> Path:
    """The first valid run of the best experiment of a night. Raises UserError if there is none."""
    folder = ROOT / "nights" / check_tag(tag)
    if not (folder / "journal.jsonl").is_file():
        there = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/journal.jsonl"))) or "none"
        raise UserError(f"there is no night {tag}; there are: {there}")
    best = Journal(folder).state.incumbent
    if not best:
        raise UserError(f"night {tag} has kept nothing yet; `make agent TAG={tag}` resumes it")
    valid = [r["run"] for r in read(folder / "journal.jsonl") if r["event"] == "run" and r["status"] == "ok"]
    runs = [folder / "runs" / name for name in valid if name.startswith(f"e{best.id:04d}-")]
    complete = [run for run in runs if (run / "checkpoint.safetensors").is_file()]
    if not complete:
        raise UserError(f"the checkpoint of experiment {best.id} is missing; run: agent_loop.py replay {best.id}")
    return complete[0]


@dataclass(frozen=True)
class Opened:
    """A run with its model loaded."""

    run_dir: Path
    model: Model
    tokenizer: Tokenizer
    length: int  # tokens of context
    result: dict[str, Any]  # its score, {} without one

    def write(self, **options: Any) -> Iterator[str]:
        """See `write`."""
        return write(self.model, self.tokenizer, self.length, **options)

    @property
    def title(self) -> str:
        within = self.run_dir.is_relative_to(ROOT)
        name = str(self.run_dir.relative_to(ROOT) if within else self.run_dir)
        return f"{name}\nval_bpb {self.result['val_bpb']:.6f}" if "val_bpb" in self.result else f"{name}\nnot scored"


@contextmanager
def opened(run_dir: Path, sandbox: str) -> Iterator[Opened]:
    """A run with its model loaded in a sandbox of this kind. Raises UserError if the run is incomplete or fails."""
    from lab.scoring.score import Rejected, model_process

    run_dir = run_dir.resolve()
    settings, tokenizer = records(run_dir)
    length = settings["preset"]["task"]["sequence_length"]
    try:
        with model_process(run_dir, tokenizer.vocab_size, sandbox, start=TIMEOUT_MAX, seconds=TIMEOUT_MAX) as model:
            model.load(run_dir / "checkpoint.safetensors")
            yield Opened(run_dir, model.logits, tokenizer, length, result(run_dir))
    except Rejected as reason:
        raise UserError(f"{run_dir}: {reason}") from None


def records(run_dir: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Settings and tokenizer of a run with a checkpoint. Raises UserError if the run is incomplete."""
    from lab.scoring.score import finished

    settings = finished(run_dir)
    return settings, open_prepared(Path(settings["prepared"]), parts=("tokenizer",)).tokenizer


def result(run_dir: Path) -> dict[str, Any]:
    """The record of a scored run, with val_bpb and task; {} for one that is not scored."""
    try:
        score = json.loads((run_dir / "score.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(score, dict) and score.get("status") == "ok" and isinstance(score.get("task"), str)
    return score if whole and isinstance(score.get("val_bpb"), float) else {}


def confinement(run_dir: Path) -> str:
    """The kind of sandbox for a run: none for the user's own runs, which were trained without one."""
    from lab.trial.sandbox import available

    return available() if ROOT / "nights" in run_dir.resolve().parents else "none"


def compare(runs: list[Opened], console: Console, **options: Any) -> None:
    """Generate from the same prompt and seed: streamed in columns if there is room, otherwise one after the other."""
    if len({run.result["task"] for run in runs if run.result}) > 1:
        console.print("different tasks: these val_bpb are not comparable", highlight=False)
    if not console.is_terminal or console.width < len(runs) * COLUMN:
        for run in runs:
            console.print(Text(run.title, style="bold"))
            for piece in run.write(**options):
                print(piece, end="", flush=True)
            print("\n")
        return
    texts = [""] * len(runs)
    with Live(console=console) as live:
        for pieces in zip_longest(*(run.write(**options) for run in runs), fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            live.update(_columns([run.title for run in runs], texts))


def _columns(titles: list[str], texts: list[str]) -> Table:
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(Text(title), ratio=1)
    table.add_row(*map(Text, texts))
    return table


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
    """Yield the prompt, then the generated text, until the document ends or after `tokens` tokens.

    The last `length` tokens are the context. A character is yielded when all its bytes are there; control characters
    and those that change the direction of text are replaced."""
    generator = np.random.default_rng(seed)
    ids = tokenizer.encode([prompt])[0].tolist()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield prompt
    for _ in range(tokens):
        context = ids[-length:]
        padded = context + [tokenizer.bos] * (length - len(context))  # one shape; the model is causal
        logits = model(np.array([padded], np.int32))[0, len(context) - 1].astype(np.float64)
        ids.append(choose(logits, temperature, top_k, generator))
        if ids[-1] == tokenizer.bos:
            break
        yield decoder.decode(tokenizer.token_bytes[ids[-1]]).translate(CONTROLS)
    yield decoder.decode(b"", final=True)


def choose(logits: np.ndarray, temperature: float, top_k: int, generator: np.random.Generator) -> int:
    """A token drawn from (V,) logits; temperature 0 takes the largest. Raises UserError if they are not finite."""
    if not np.isfinite(logits).all():
        raise UserError("the logits of the model are not finite: the training failed; choose another run")
    if temperature == 0:
        return int(logits.argmax())
    if top_k and top_k < len(logits):
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    with np.errstate(over="ignore", under="ignore"):  # at a temperature near 0
        weights = np.exp((logits - logits.max()) / temperature)
    return int(generator.choice(len(weights), p=weights / weights.sum()))
