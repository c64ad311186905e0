"""val_bpb: bits per byte of the fixed validation documents, computed outside the experiment.

The scorer gets logits from the model server (the experiment's code, in its own process) and does the rest itself:
log-softmax, nats of every target, raw bytes of every token. Documents are packed into rows without cropping, so every
byte is scored exactly once whatever the vocabulary; special tokens are not counted; nats are kept per document, so that
two models can be compared on the same documents. A model is rejected, with the reason, unless:

- its parameters are the checkpoint's, and the logits depend on them;
- logits have the shape (rows, tokens, vocabulary) and are finite;
- a logit does not change when later tokens change (the model is causal), nor when other rows change;
- the same tokens get the same logits at the end of scoring as at the start (the model keeps no state).

The probes use one of the scored batches, chosen at random in each scoring, and random cuts in each of its rows.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.data.batches import document_starts, pack
from lab.data.shards import Prepared, open_prepared
from lab.errors import UserError
from lab.files import ROOT, remove, sha256, write_atomic
from lab.preset import read_record
from lab.scoring.model_server import read_frame, write_frame
from lab.trial.crash import read_bytes

LOGIT_BYTES = 64 * 2**20  # per batch of float32 logits: bounds the memory of scoring
BATCH_TOKENS = 2048  # per batch at most: the probes cost five batches
TOLERANCE = 1e-3  # of a logit; the same kernels on the same shapes agree to the bit, so this is generous
LOG_BYTES = 16 << 20  # of what the model prints
SECONDS = 900.0  # after which the model's process is killed


class Rejected(Exception):
    """The model gets no score; the message is the reason."""


@dataclass
class ModelProcess:
    """The other end of lab.scoring.model_server."""

    process: subprocess.Popen
    vocab_size: int

    def load(self, checkpoint: Path) -> None:
        """Raises Rejected when the checkpoint does not match the model."""
        self._send({"vocab_size": self.vocab_size, "checkpoint": str(checkpoint)})
        self._answer(2**20, None)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(B, T) tokens to (B, T, vocab_size) logits. Raises Rejected for another shape or values not finite."""
        expected = (*tokens.shape, self.vocab_size)
        self._send(tokens.astype(np.int32))
        logits = self._answer(4 * math.prod(expected) + 2**20, expected)
        if not isinstance(logits, np.ndarray) or logits.shape != expected:
            shape = logits.shape if isinstance(logits, np.ndarray) else logits
            raise Rejected(f"the logits have the shape {shape}, not (rows, tokens, vocabulary) = {expected}")
        if not np.isfinite(logits).all():
            raise Rejected("the logits are not finite")
        return logits

    def _send(self, request: dict[str, Any] | np.ndarray) -> None:
        with contextlib.suppress(BrokenPipeError):  # _answer reports a process that died
            write_frame(self.process.stdin, request)

    def _answer(self, limit: int, expected: tuple[int, ...] | None) -> dict[str, Any] | np.ndarray:
        try:
            answer = read_frame(self.process.stdout, limit)
        except EOFError:
            raise Rejected(f"the model's process died (exit status {self.process.wait()})") from None
        except ValueError as error:
            raise Rejected(f"the model's process sent {error}, not logits of the shape {expected}") from None
        if isinstance(answer, dict) and answer.get("status") != "ok":
            raise Rejected(f"the model failed: {answer.get('reason')}")
        return answer


@contextlib.contextmanager
def model_process(run_dir: Path, vocab_size: int, sandbox: str, seconds: float = SECONDS) -> Iterator[ModelProcess]:
    """A running model server of `run_dir` in a sandbox of this kind; killed after `seconds`."""
    from lab.trial.sandbox import Policy, bound, environment, wrap

    scratch = run_dir / "score"  # the only folder the model may write
    for path in (scratch, run_dir / "score.log", *run_dir.glob(".*.tmp")):  # training may have left anything, links too
        remove(path, run_dir)
    scratch.mkdir()
    policy = Policy(writable=(scratch,), readable=(ROOT, run_dir))
    server = [sys.executable, "-m", "lab.scoring.model_server", str(run_dir)]
    command = bound(wrap(server, policy, sandbox), LOG_BYTES)
    variables = environment(os.environ, policy) | {"PYTHONPATH": str(ROOT)}
    Path(variables["TMPDIR"]).mkdir(exist_ok=True)
    with open(run_dir / "score.log", "wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, cwd=scratch, env=variables, start_new_session=True, **pipes)
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        yield ModelProcess(process, vocab_size)
    finally:
        watch.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def score_run(run_dir: Path, sandbox: str = "none", batches: int | None = None) -> dict[str, Any]:
    """Score the checkpoint of a run, write score.json (and result.json if there is a training record) and return the
    score: status "ok" with val_bpb, or "rejected" with a reason. `sandbox`, a kind of lab.trial.sandbox, confines the
    model's process. `batches` scores only so many batches, as a preflight: status "tried", no val_bpb.

    Raises UserError for an incomplete run."""
    begun = time.perf_counter()
    settings = finished(run_dir)
    prepared = open_prepared(Path(settings["prepared"]), parts=("val", "tokenizer"))
    length = settings["preset"]["task"]["sequence_length"]
    score = {"task": prepared.fingerprint(length, settings["minutes"], settings["steps"])}
    try:
        with model_process(run_dir, prepared.tokenizer.vocab_size, sandbox) as model:
            checkpoint = run_dir / "checkpoint.safetensors"
            score |= {"status": "ok"} | evaluate(model, prepared, length, checkpoint, batches)
    except Rejected as reason:
        score |= {"status": "rejected", "reason": str(reason)}
    score["scoring_seconds"] = round(time.perf_counter() - begun, 2)
    write_atomic(run_dir / "score.json", json.dumps(score))
    if trained := _trained(run_dir / "train.json"):
        result = trained | {key: value for key, value in score.items() if key != "documents"}
        write_atomic(run_dir / "result.json", json.dumps(result, indent=1))
    return score


def finished(run_dir: Path) -> dict[str, Any]:
    """The settings of a run. Raises UserError if it is not finished, or if settings or checkpoint are damaged."""
    for name in ("settings.json", "train.py", "checkpoint.safetensors"):
        if not (run_dir / name).is_file() or (run_dir / name).is_symlink():
            raise UserError(
                f"{run_dir} has no {name}, so it is not a finished run; choose another in runs/ or nights/TAG/runs/"
            )
    checkpoint = run_dir / "checkpoint.safetensors"
    written = _trained(run_dir / "train.json").get("checkpoint")  # missing in runs of earlier versions
    if written and written != sha256(checkpoint):
        raise UserError(f"{checkpoint} is damaged; restore it, or train again")
    return read_record(run_dir / "settings.json", "restore it, or train again")


def _trained(path: Path) -> dict[str, Any]:
    """The training record, {} if it cannot be read. It is not trusted: the score's keys override it."""
    try:
        record = json.loads(read_bytes(path, 1 << 20))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def evaluate(
    model: ModelProcess, prepared: Prepared, length: int, checkpoint: Path, batches: int | None = None
) -> dict[str, Any]:
    """Bits per byte of the validation documents, with the counts it is computed from. Raises Rejected."""
    bos = prepared.tokenizer.bos
    bounds = document_starts(prepared.val, bos)
    packed = pack(bounds, length)
    index, rows = packed.index, packed.take(prepared.val, bos)
    batch = batch_rows(length, model.vocab_size)
    probes = np.random.default_rng()  # unpredictable: an experiment cannot know which batches are probed

    inputs = [rows[at : at + batch, :-1] for at in range(0, len(rows), batch)][:batches]
    first = _check_checkpoint(model, checkpoint, inputs[0])
    probed = int(probes.integers(len(inputs)))
    nats = np.zeros(len(bounds) - 1)
    counted = np.zeros(len(bounds) - 1, np.int64)
    scored_tokens = 0
    for number, tokens in enumerate(inputs):
        logits = model.logits(tokens)
        if number == probed:
            _check_independence(model, tokens, logits, probes)
        at = slice(number * batch, number * batch + len(tokens))
        targets, places = rows[at, 1:], index[at, 1:]
        lengths = np.where(places < 0, 0, prepared.tokenizer.byte_lengths[targets])
        scored = lengths > 0
        losses = negative_log_likelihood(logits, targets)[scored]
        documents = np.searchsorted(bounds, places[scored], side="right") - 1
        nats += np.bincount(documents, losses, len(nats))
        counted += np.bincount(documents, lengths[scored], len(nats)).astype(np.int64)
        scored_tokens += int(scored.sum())
    if not np.allclose(model.logits(inputs[0]), first, atol=TOLERANCE):
        raise Rejected("the model keeps state: the same tokens got other logits at the end of scoring")
    if batches is not None:
        return {"status": "tried"}
    if counted.sum() != prepared.manifest["val"]["bytes"]:
        raise AssertionError(f"{counted.sum()} bytes scored of {prepared.manifest['val']['bytes']}")
    return {
        "val_bpb": bits_per_byte(nats.sum(), int(counted.sum())),
        "scored_bytes": int(counted.sum()),
        "scored_tokens": scored_tokens,
        "documents": [[round(n, 4), int(b)] for n, b in zip(nats.tolist(), counted, strict=True)],
    }


def batch_rows(length: int, vocab_size: int) -> int:
    """Rows of `length` tokens in one batch of scoring."""
    return max(1, min(BATCH_TOKENS, LOGIT_BYTES // (4 * vocab_size)) // length)


def bits_per_byte(nats: float, size: int) -> float:
    """Nats over `size` bytes of text, in bits per byte."""
    return float(nats / math.log(2) / size)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, T, V) float32 logits and (B, T) targets to (B, T) nats."""
    top = logits.max(axis=-1)
    total = np.exp(logits - top[..., None]).sum(axis=-1)
    return np.log(total) + top - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _check_checkpoint(model: ModelProcess, checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """Reject a model that ignores its checkpoint. Leaves the checkpoint loaded and returns its logits."""
    from lab.machine.backend import mx, save

    changed = checkpoint.with_name("changed.safetensors")
    remove(changed, checkpoint.parent)  # training may have left a link there
    try:
        # Reversed, halved and shifted: the same shapes and about the same magnitudes, other values.
        saved = mx.load(str(checkpoint))
        save(changed, {k: (v[..., ::-1] * 0.5 + 0.01).astype(v.dtype) for k, v in saved.items()})
        model.load(changed)
        other = model.logits(tokens)
    finally:
        changed.unlink(missing_ok=True)
    model.load(checkpoint)
    logits = model.logits(tokens)
    if np.allclose(logits, other, atol=TOLERANCE):
        raise Rejected("the logits do not depend on the checkpoint")
    return logits


def _check_independence(
    model: ModelProcess, tokens: np.ndarray, logits: np.ndarray, generator: np.random.Generator
) -> None:
    """Reject logits that depend on later tokens or on other rows."""
    noise = generator.choice(tokens.ravel(), tokens.shape)
    cuts = generator.integers(1, tokens.shape[1], len(tokens))
    earlier = np.arange(tokens.shape[1]) < cuts[:, None]
    if len(tokens) == 1:  # there is no other row: add one
        tokens, noise = np.repeat(tokens, 2, axis=0), np.repeat(noise, 2, axis=0)
        logits = model.logits(tokens)
        earlier = np.repeat(earlier, 2, axis=0)
    kept = np.zeros(tokens.shape, bool)
    kept[::2] = True
    _compare(model.logits(np.where(kept, tokens, noise)), logits, kept, "logits depend on other rows of the batch")
    _compare(
        model.logits(np.where(earlier, tokens, noise)),
        logits,
        earlier,
        "the model is not causal: logits depend on later tokens",
    )


def _compare(probe: np.ndarray, logits: np.ndarray, same: np.ndarray, reason: str) -> None:
    gap = np.abs(probe[same] - logits[same]).max()
    if not gap <= TOLERANCE:
        raise Rejected(f"{reason} (one changed by {gap:.2g})")
