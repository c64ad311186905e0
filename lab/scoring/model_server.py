"""The scored model in a separate process: tokens in, logits out.

The code of an experiment runs here, never in the scorer, so it cannot change the computation of the score, and it gets
no text but the tokens of each request. `python -m lab.scoring.model_server RUN_DIR` imports RUN_DIR/train.py, builds
the model and answers requests on its standard streams, one frame each way: 8 bytes of length, then a numpy .npy payload
(tokens; logits) or JSON (commands; answers). What the experiment prints goes to standard error.
"""

import importlib.util
import io
import json
import os
import struct
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np


def write_frame(stream: BinaryIO, payload: bytes | dict[str, Any] | np.ndarray) -> None:
    """Send JSON, bytes or an array."""
    if isinstance(payload, dict):
        payload = json.dumps(payload).encode()
    if isinstance(payload, np.ndarray):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(payload))
        stream.write(struct.pack(">Q", len(header.getvalue()) + payload.nbytes) + header.getvalue())
        stream.write(memoryview(np.ascontiguousarray(payload)).cast("B"))
    else:
        stream.write(struct.pack(">Q", len(payload)) + payload)
    stream.flush()


def read_frame(stream: BinaryIO, limit: int) -> dict[str, Any] | np.ndarray:
    """The next frame. Raises EOFError if the other side has ended, ValueError for one of more than `limit` bytes."""
    [size] = struct.unpack(">Q", _exactly(stream, 8))
    if size > limit:
        raise ValueError(f"a frame of {size} bytes")
    payload = _exactly(stream, size)
    if payload[:6] == b"\x93NUMPY":
        file = io.BytesIO(payload)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            raise ValueError("an array that is not in C order or holds objects")
        return np.frombuffer(payload, dtype, offset=file.tell()).reshape(shape)
    return json.loads(payload)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def load_experiment(source: Path) -> ModuleType:
    """Import a recorded train.py under the name `train`, without running it."""
    spec = importlib.util.spec_from_file_location("train", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def load_model(run_dir: Path, vocab_size: int, checkpoint: Path | None = None) -> Any:
    """The model of a run with its checkpoint's parameters, for evaluation. Raises ValueError when they differ."""
    os.environ["AUTORESEARCH_SETTINGS"] = str(run_dir / "settings.json")
    model = load_experiment(run_dir / "train.py").build_model(vocab_size)
    load_parameters(model, checkpoint or run_dir / "checkpoint.safetensors")
    model.eval()  # no dropout, fixed statistics
    return model


def load_parameters(model: Any, checkpoint: Path) -> None:
    """Replace every parameter by the checkpoint's. Raises ValueError when names, shapes or values differ."""
    from lab.machine.backend import mx, tree_flatten

    saved = mx.load(str(checkpoint))
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    if shapes != {name: value.shape for name, value in saved.items()}:
        different = sorted(set(shapes.items()) ^ {(n, v.shape) for n, v in saved.items()})
        raise ValueError(f"the model's parameters do not match the checkpoint's, e.g. {different[0][0]}")
    model.load_weights(list(saved.items()), strict=True)
    for name, value in tree_flatten(model.parameters()):
        if not mx.array_equal(value, saved[name], equal_nan=True).item():
            raise ValueError(f"the parameter {name} does not have its value from the checkpoint")


def serve(run_dir: Path, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until they end: a command loads a checkpoint, an array of tokens returns logits."""
    from lab.machine.backend import mx

    model = None
    while True:
        try:
            request = read_frame(requests, 2**40)
        except EOFError:
            return
        try:
            if isinstance(request, dict):
                model = load_model(run_dir, request["vocab_size"], Path(request["checkpoint"]))
                write_frame(answers, {"status": "ok"})
            else:
                logits = model(mx.array(request))
                if not isinstance(logits, mx.array):
                    raise TypeError(f"the model returned {type(logits).__name__}, not an array of logits")
                write_frame(answers, np.array(logits.astype(mx.float32), copy=False))
        except Exception as error:  # the experiment's code may raise anything; the scorer gets it as the answer
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith("train.py")]
            where = f" (train.py line {frames[-1].lineno})" if frames else ""
            write_frame(answers, {"status": "error", "reason": f"{type(error).__name__}: {error}{where}"[:400]})


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), sys.stdin.buffer, channel)
