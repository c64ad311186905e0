"""val_bpb: bits per byte of the fixed validation documents, computed outside the experiment.

The scorer gets logits from the model server (the experiment's code, in its own process) and does the rest itself:
log-softmax, nats of every target, raw bytes of every token. Documents are packed into rows without cropping, so every
byte is scored exactly once whatever the vocabulary; special tokens are not counted; nats are kept per document, so that
two models can be compared on the same documents. A model is rejected, with the reason, unless:

- its parameters are the checkpoint's, and the logits depend on them;
- logits are float32, have the shape (rows, tokens, vocabulary), and give finite losses;
- the first of them come within START_SECONDS, which leaves no time to train;
- the same tokens get the same logits at the end of scoring as at the start;
- a second process gives every row the same losses. It has not seen the rows, gets each among other rows, and most of
  them only up to a random token, random tokens after that. So no loss can depend on later tokens, on other rows or on
  what the model has seen or stored before: the second process could not know it.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lab.data.batches import document_starts, pack
from lab.data.shards import Prepared, open_prepared
from lab.errors import UserError, one_line
from lab.files import ROOT, remove, sha256, write_atomic
from lab.preset import read_record
from lab.scoring.model_server import read_frame, write_frame
from lab.trial.crash import read_bytes

LOGIT_BYTES = 64 * 2**20  # per batch of float32 logits: bounds the memory of scoring
QUARTERS = 4  # of the context, for the score by position
BATCH_TOKENS = 2048  # per batch at most
TOLERANCE = 1e-3  # nats; the same kernels on the same shapes agree to the bit, so this is generous
CHECKS = 64  # of rows, at least: long rows are few
WHOLE = 8  # one row in about so many is checked without a cut: only there can the last token be checked
# To the first logits, in which kernels are compiled: for an NVIDIA GPU some seconds each
START_SECONDS = {"cpu": 45.0, "metal": 45.0, "cuda": 120.0}
SECONDS = 900.0  # for all logits after that
REASON_CHARS = 400  # the model's process writes a part of it
NEEDED = ("settings.json", "train.py", "checkpoint.safetensors")  # of a run
KEEPS_STATE = "the model keeps state or draws random numbers: the same tokens got other logits at the end of scoring"
NOT_CAUSAL = "the model is not causal: logits depend on later tokens"
NOT_ALONE = "logits depend on other rows of the batch, on earlier batches or on the process"
UPSTREAM_REPO = "karpathy/climbmix-400b-shuffle"  # the text of karpathy/autoresearch
LOG_BYTES = 16 << 20  # of what the model prints


class Rejected(Exception):
    """The model gets no score; the message is the reason."""


class ModelProcess:
    """The other end of lab.scoring.model_server. It has `start` seconds for its first logits, then `seconds` for all
    others."""

    def __init__(self, process: subprocess.Popen, vocab_size: int, start: float, seconds: float):
        self.process, self.vocab_size, self.seconds = process, vocab_size, seconds
        self.started = False
        self._allow(start)

    def load(self, checkpoint: Path) -> None:
        """Raises Rejected when the checkpoint does not match the model."""
        self._send({"vocab_size": self.vocab_size, "checkpoint": str(checkpoint)})
        self._answer(2**20, None)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) tokens to (B, T, vocab_size) float32 logits. Raises Rejected for anything else."""
        expected = (*tokens.shape, self.vocab_size)
        self._send(tokens.astype(np.int32))
        logits = self._answer(4 * math.prod(expected) + 2**20, expected)
        if not isinstance(logits, np.ndarray) or logits.shape != expected:
            shape = getattr(logits, "shape", logits)
            raise Rejected(f"the logits have the shape {shape}, not (rows, tokens, vocabulary) = {expected}")
        if logits.dtype != np.float32:
            raise Rejected(f"the logits are {logits.dtype}, not float32")
        if not np.isfinite(logits).all():
            raise Rejected("the logits are not finite")
        if not self.started:
            self.started = True
            self._allow(self.seconds)
        return logits

    def losses(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(N, T) nats of the targets of (N, T + 1) rows, with (B, T) tokens in place of their inputs; those after the
        first N fill the batch. Raises Rejected."""
        losses = negative_log_likelihood(self.logits(tokens)[: len(rows)], rows[:, 1:])
        if not np.isfinite(losses).all():
            raise Rejected("the losses are not finite: the logits are too far apart")
        return losses

    def end(self) -> None:
        self._watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()

    def _allow(self, seconds: float) -> None:
        """Kill the process in so many seconds, unless it is allowed others before."""
        if self.started:
            self._watch.cancel()
        self._allowed, self._until = seconds, time.monotonic() + seconds
        self._watch = threading.Timer(seconds, self.process.kill)
        self._watch.start()

    def _send(self, request: dict[str, Any] | np.ndarray) -> None:
        with contextlib.suppress(BrokenPipeError):  # _answer reports a process that died
            write_frame(self.process.stdin, request)

    def _answer(self, limit: int, expected: tuple[int, ...] | None) -> dict[str, Any] | np.ndarray:
        try:
            answer = read_frame(self.process.stdout, limit)
        except EOFError:
            status = self.process.wait()
            if time.monotonic() > self._until:
                what = "all logits" if self.started else "its first logits"
                raise Rejected(f"the model did not compute {what} within {self._allowed:g} s") from None
            raise Rejected(f"the model's process died (exit status {status})") from None
        except ValueError as error:
            raise Rejected(f"the model's process sent {error}, not logits of the shape {expected}") from None
        if isinstance(answer, dict) and answer.get("status") != "ok":
            raise Rejected(f"the model failed: {answer.get('reason')}")
        return answer


@contextlib.contextmanager
def model_process(
    run_dir: Path,
    vocab_size: int,
    sandbox: str,
    start: float | None = None,
    seconds: float = SECONDS,
    also: tuple[Path, ...] = (),
    hidden: tuple[Path, ...] = (),
) -> Iterator[ModelProcess]:
    """A running model server of `run_dir` in a sandbox of this kind.

    It may read source, settings and checkpoint of the run and the files `also`, but nothing else that the training or
    an earlier model process left in `run_dir`: those could hold what it must not know. `hidden` is out of its reach
    wherever it is."""
    from lab.machine.hardware import describe
    from lab.trial.sandbox import Policy, bound, environment, grammar, wrap

    scratch = run_dir / "score"  # the only folder the model may write
    for path in (scratch, run_dir / "score.log", *run_dir.glob(".*.tmp")):  # training may have left anything, links too
        remove(path, run_dir)
    scratch.mkdir()
    given = (ROOT, *(run_dir / name for name in NEEDED), *also)
    policy = Policy(writable=(scratch,), readable=given, hidden=(*hidden, *grammar(ROOT)))
    server = [sys.executable, "-m", "lab.scoring.model_server", str(run_dir)]
    command = bound(wrap(server, policy, sandbox), LOG_BYTES)
    variables = environment(os.environ, policy) | {"PYTHONPATH": str(ROOT)}
    Path(variables["TMPDIR"]).mkdir(exist_ok=True)
    with open(run_dir / "score.log", "wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, cwd=scratch, env=variables, start_new_session=True, **pipes)
    model = ModelProcess(process, vocab_size, start or START_SECONDS[describe()["backend"]], seconds)
    try:
        yield model
    finally:
        model.end()


def score_run(run_dir: Path, sandbox: str = "none", batches: int | None = None, part: str = "val") -> dict[str, Any]:
    """Score the checkpoint of a run, write score.json (and result.json if there is a training record) and return the
    score: status "ok" with val_bpb, or "rejected" with a reason. `sandbox`, a kind of lab.trial.sandbox, confines the
    model's process. `batches` scores only so many batches, as a preflight: status "tried", no val_bpb. `part`: "val",
    or "test" for the text that no verdict looks at, whose score is written to test.json only.

    Raises UserError for an incomplete run."""
    begun = time.perf_counter()
    settings = finished(run_dir)
    prepared = open_prepared(Path(settings["prepared"]), parts=("val", "tokenizer"))
    if not prepared.manifest.get(part):
        raise UserError(
            f"{prepared.folder} has no {part} text: its source has no more documents, or run `make prepare`"
        )
    length = settings["preset"]["task"]["sequence_length"]
    score = {"task": prepared.fingerprint(length, settings["minutes"], settings["steps"])}
    try:
        score |= {"status": "ok"} | evaluate(run_dir, prepared, length, sandbox, batches, part)
    except Rejected as reason:
        score |= {"status": "rejected", "reason": one_line(reason, REASON_CHARS)}
    score["scoring_seconds"] = round(time.perf_counter() - begun, 2)
    if part == "test":
        write_atomic(run_dir / "test.json", json.dumps(score))
        return score
    write_atomic(run_dir / "score.json", json.dumps(score))
    if trained := _trained(run_dir / "train.json"):
        result = trained | {key: value for key, value in score.items() if key != "documents"}
        write_atomic(run_dir / "result.json", json.dumps(result, indent=1))
    return score


def finished(run_dir: Path) -> dict[str, Any]:
    """The settings of a run. Raises UserError if it is not finished, or if settings or checkpoint are damaged."""
    for name in NEEDED:
        if not (run_dir / name).is_file() or (run_dir / name).is_symlink():
            raise UserError(
                f"{run_dir} has no {name}, so it is not a finished run; choose another in runs/ or nights/TAG/runs/"
            )
    checkpoint = run_dir / "checkpoint.safetensors"
    written = _trained(run_dir / "train.json").get("checkpoint")  # missing in runs of earlier versions
    if written and written != sha256(checkpoint):
        raise UserError(f"{checkpoint} is damaged; restore it, or train again")
    return read_record(run_dir / "settings.json", "restore it, or train again", of_run=True)


def _trained(path: Path) -> dict[str, Any]:
    """The training record, {} if it cannot be read. It is not trusted: the score's keys override it."""
    try:
        record = json.loads(read_bytes(path, 1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def evaluate(
    run_dir: Path, prepared: Prepared, length: int, sandbox: str, batches: int | None, part: str = "val"
) -> dict[str, Any]:
    """Bits per byte of the documents of a part, with the counts it is computed from. Raises Rejected."""
    bos, vocab_size = prepared.tokenizer.bos, prepared.tokenizer.vocab_size
    text = prepared.held_out(part)
    bounds = document_starts(text, bos)
    packed = pack(bounds, length)
    batch = batch_rows(length, vocab_size)
    rows = packed.take(text, bos)[: batch * batches if batches else None]
    changed = _changed(run_dir / "checkpoint.safetensors")
    try:
        start = partial(model_process, run_dir, vocab_size, sandbox, also=(changed,), hidden=(prepared.folder,))
        losses = _checked_losses(
            start, run_dir / "checkpoint.safetensors", changed, rows, batch, preflight=bool(batches)
        )
    finally:
        changed.unlink(missing_ok=True)
    return {"status": "tried"} if batches else _bits(prepared, part, rows, packed.index, bounds, losses)


def _checked_losses(
    start: Callable[[], contextlib.AbstractContextManager[ModelProcess]],
    checkpoint: Path,
    changed: Path,
    rows: np.ndarray,
    batch: int,
    preflight: bool,
) -> np.ndarray:
    """(N, T) nats of every target of (N, T + 1) rows, after all checks. Raises Rejected.

    In a preflight one process does it all: to start another would take longer than the rest."""
    with start() as model:
        model.load(checkpoint)
        losses = _losses(model, rows, batch)
        if preflight:
            check_rows(model, rows, losses, batch)
            check_dependence(model, checkpoint, changed, (batch, losses.shape[1]))
            return losses
    with start() as other:
        check_dependence(other, checkpoint, changed, (batch, losses.shape[1]))
        check_rows(other, rows, losses, batch, math.ceil(CHECKS / len(rows)))
    return losses


def _bits(
    prepared: Prepared, part: str, rows: np.ndarray, index: np.ndarray, bounds: np.ndarray, losses: np.ndarray
) -> dict[str, Any]:
    """The score from the nats of every target of the rows."""
    targets, places = rows[:, 1:], index[:, 1:]
    lengths = np.where(places < 0, 0, prepared.tokenizer.byte_lengths[targets])
    scored = lengths > 0
    documents = np.searchsorted(bounds, places[scored], side="right") - 1
    nats = np.bincount(documents, losses[scored], len(bounds) - 1)
    counted = np.bincount(documents, lengths[scored], len(bounds) - 1).astype(np.int64)
    position = np.broadcast_to(QUARTERS * np.arange(losses.shape[1]) // losses.shape[1], losses.shape)[scored]
    quarters = [np.bincount(position, weights[scored], QUARTERS) for weights in (losses, lengths)]
    upstream_bytes = int(prepared.tokenizer.upstream_lengths[targets][scored].sum())
    if counted.sum() != prepared.manifest[part]["bytes"]:
        raise AssertionError(f"{counted.sum()} bytes scored of {prepared.manifest[part]['bytes']}")
    return {
        "val_bpb": bits_per_byte(nats.sum(), int(counted.sum())),
        "upstream_bpb": bits_per_byte(nats.sum(), upstream_bytes),  # for comparison with its numbers alone
        "scored_bytes": int(counted.sum()),
        "scored_tokens": int(scored.sum()),
        "positions": [round(bits_per_byte(n, max(1, int(size))), 5) for n, size in zip(*quarters, strict=True)],
        "documents": [[round(n, 4), int(b)] for n, b in zip(nats.tolist(), counted, strict=True)],
    }


def by_upstreams_rule(repo: str, score: dict[str, Any]) -> list[str]:
    """A line with the score by upstream's byte rule, if the text is upstream's."""
    if repo != UPSTREAM_REPO or "upstream_bpb" not in score:
        return []
    return [f"by upstream's byte rule: {score['upstream_bpb']:.6f} (see docs/PRESETS.md#climbmix)"]


def batch_rows(length: int, vocab_size: int) -> int:
    """Rows of `length` tokens in one batch of scoring."""
    return max(1, min(BATCH_TOKENS, LOGIT_BYTES // (4 * vocab_size)) // length)


def bits_per_byte(nats: float, size: int) -> float:
    """Nats over `size` bytes of text, in bits per byte."""
    return float(nats / math.log(2) / size)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, T, V) float32 logits and (B, T) targets to (B, T) nats.

    Only differences of logits count: log(total) + top would round the loss away where the logits are large."""
    with np.errstate(over="ignore"):
        below = logits - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(below).sum(axis=-1)) - np.take_along_axis(below, targets[..., None], axis=-1)[..., 0]


def _losses(model: ModelProcess, rows: np.ndarray, batch: int) -> np.ndarray:
    """(N, T) nats of every target of (N, T + 1) rows. Raises Rejected if they change from one call to another."""
    batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    # The last batch is filled: a kernel may round otherwise for another shape.
    *losses, again = [model.losses(np.resize(b[:, :-1], (batch, b.shape[1] - 1)), b) for b in [*batches, batches[0]]]
    if np.abs(again - losses[0]).max() > TOLERANCE:
        raise Rejected(KEEPS_STATE)
    return np.concatenate(losses)


def check_rows(model: ModelProcess, rows: np.ndarray, losses: np.ndarray, batch: int, passes: int = 1) -> None:
    """Reject losses that depend on more than the tokens before the target.

    In each pass every row comes once, at its place in the batch, as kernels may round otherwise elsewhere, but among
    other rows; up to a random cut, with random tokens after it; and never cut where the model has seen more of it."""
    generator = np.random.default_rng()
    length = losses.shape[1]
    batches = np.full((math.ceil(len(rows) / batch), batch), -1)  # -1: noise fills the last batch
    batches.flat[: len(rows)] = np.arange(len(rows))
    for cuts in np.sort(generator.integers(1, length + length // WHOLE + 2, (passes, len(rows))), axis=0):
        for some in generator.permuted(batches, axis=0):
            kept = np.arange(length) < np.append(cuts, 0)[some, None]
            tokens = generator.integers(model.vocab_size, size=kept.shape)
            tokens[kept] = rows[some, :-1][kept]
            if (gap := _gap(model, tokens, rows[some], losses[some], kept)) > TOLERANCE:
                tokens[some >= 0] = rows[some[some >= 0], :-1]
                later = _gap(model, tokens, rows[some], losses[some], kept) <= TOLERANCE
                raise Rejected((NOT_CAUSAL if later else NOT_ALONE) + f" (a loss changed by {gap:.2g} nats)")


def _gap(model: ModelProcess, tokens: np.ndarray, rows: np.ndarray, losses: np.ndarray, kept: np.ndarray) -> float:
    """How far the kept losses of the rows are from `losses` at most."""
    return float(np.abs(model.losses(tokens, rows) - losses)[kept].max())


def _changed(checkpoint: Path) -> Path:
    """A checkpoint of the same shapes and about the same magnitudes with other values: reversed, halved, shifted."""
    from lab.machine.backend import mx, save

    path = checkpoint.with_name("changed.safetensors")
    remove(path, checkpoint.parent)  # training may have left a link there
    try:
        saved = mx.load(str(checkpoint))
    except RuntimeError:
        raise Rejected("the checkpoint is damaged") from None
    values = {k: v[..., ::-1] if v.ndim else v for k, v in saved.items()}
    save(path, {k: (v * 0.5 + 0.01).astype(v.dtype) for k, v in values.items()})
    return path


def check_dependence(model: ModelProcess, checkpoint: Path, changed: Path, shape: tuple[int, int]) -> None:
    """Reject a model that ignores its checkpoint. Leaves the checkpoint loaded, and has shown the model no text."""
    tokens, other = np.random.default_rng().integers(model.vocab_size, size=shape), None
    with contextlib.suppress(Rejected):  # no fault: other parameters may give no logits at all
        model.load(changed)
        other = model.logits(tokens)
    model.load(checkpoint)
    if other is not None and np.allclose(model.logits(tokens), other, rtol=0, atol=TOLERANCE):
        raise Rejected("the logits do not depend on the checkpoint")
