"""Run training steps on request in a separate process, so that several kinds can be timed in turn, all warm.

    python benchmarks/stepper.py KIND SETTINGS      KIND: ours, ours-2, plain, torch, torch-bf16; SETTINGS: JSON

For each line `N` on standard input it runs N steps, for `N PART` that part of N steps, and prints their `seconds` and
the `peak_memory_mb` of its processes so far as JSON: resident memory, or what is allocated on a GPU. `ours-2` is two
processes that train together. `plain` is train.py without lab/training/kernels.py: MLX's operations, with glibc and
BLAS threads at their defaults.
"""

import ctypes
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.training import parallel  # noqa: E402

ORDERS = "AUTORESEARCH_STEPPER_ORDERS"  # a pipe through which rank 0 forwards the requests


def ours(settings: dict):
    """(step, parts of the step, FLOPs per token) of train.py on random tokens."""
    experiment, mx = _experiment(settings)
    vocab, rows, length = settings["vocab"], settings["rows"], settings["sequence_length"]
    mx.random.seed(0)
    model = experiment.build_model(vocab)
    optimizer = experiment.MuonAdamW(model)
    step, state = experiment.make_step(model, optimizer, compiled=experiment.GPU)
    passes = settings["tokens_per_step"] // (rows * length * parallel.size())
    inputs, targets = (mx.random.randint(0, vocab, (passes, rows, length)) for _ in range(2))
    rate, decay = mx.array(1.0), mx.array(0.1)
    loss_and_gradients = partial(experiment.nn.value_and_grad(model, experiment.loss_function), model)
    loss, change = partial(experiment.loss_function, model), partial(optimizer.update, model)
    _, gradients = loss_and_gradients(inputs[0], targets[0])
    mx.eval(state, inputs, targets, gradients)
    if experiment.GPU:  # as parts of the compiled step
        loss, loss_and_gradients, change = (
            mx.compile(f, inputs=state, outputs=state) for f in (loss, loss_and_gradients, change)
        )

    def whole():
        loss = step(inputs, targets, rate, decay)
        mx.eval(loss, state)
        return loss

    def forward() -> None:
        for pair in zip(inputs, targets, strict=True):
            mx.eval(loss(*pair))

    def backward() -> None:
        for pair in zip(inputs, targets, strict=True):
            mx.eval(loss_and_gradients(*pair))

    def update() -> None:
        change(gradients, rate, decay)
        mx.eval(state)

    parts = {"forward": forward, "forward and backward": backward, "optimizer": update}
    return whole, parts, experiment.flops_per_token(model)


def _experiment(settings: dict):
    """train.py, with these sizes in its preset."""
    from lab.preset import load, to_dict

    preset = to_dict(load("tinystories"))
    preset["tokenizer"]["vocab_size"] = settings["vocab"]
    preset["task"]["sequence_length"] = settings["sequence_length"]
    for section in ("model", "batch"):
        preset[section] |= {key: settings[key] for key in preset[section] if key in settings}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump({"preset": preset, "prepared": "", "tier": ""}, file)
        file.flush()
        os.environ["AUTORESEARCH_SETTINGS"] = file.name
        import train
    from lab.machine.backend import mx

    return train, mx


def plain(settings: dict):
    os.environ["OPENBLAS_THREAD_TIMEOUT"] = "26"  # OpenBLAS's default
    experiment, mx = _experiment(settings)
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 65536), (-1, 128 << 10), (-2, 0)):  # glibc's defaults, see lab/machine/backend.py
            mallopt(option, value)

    def loss_function(model, inputs, targets):
        logits = (model.hidden(inputs) @ model.head.T).astype(mx.float32)
        logits = experiment.SOFTCAP * mx.tanh(logits / experiment.SOFTCAP)
        return experiment.nn.losses.cross_entropy(logits, targets, reduction="mean")

    def attention(q, k, v, *, scale, window):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    experiment.loss_function, experiment.attention = loss_function, attention
    return ours(settings)


def requests() -> Iterator[tuple[int, str]]:
    """(steps, part) of each line of standard input, part "" for the complete step. Rank 0 forwards the lines: a rank
    that waited in the ring instead would keep a core busy while other kinds are timed."""
    pipe = open(os.environ[ORDERS], "r" if parallel.rank() else "w", encoding="utf-8") if parallel.launched() else None  # noqa: SIM115
    for line in pipe if parallel.rank() else sys.stdin:
        if pipe and parallel.rank() == 0:
            print(line, end="", file=pipe, flush=True)
        count, _, part = line.strip().partition(" ")
        yield int(count), part


def peak_memory_mb() -> float:
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if (backend := sys.modules.get("lab.machine.backend")) and backend.GPU:
        return backend.mx.get_peak_memory() / 2**20
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def serve(step, parts: dict) -> None:
    """Answer each line `N` or `N PART` with the seconds of N steps."""
    for count, part in requests():
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            (parts[part] if part else step)()
            seconds.append(time.perf_counter() - begun)
        peak = peak_memory_mb()
        if parallel.rank() == 0:
            peak *= parallel.size() if parallel.launched() else 1
            print(json.dumps({"seconds": seconds, "peak_memory_mb": peak}), flush=True)


def main() -> None:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    if kind == "ours-2" and not parallel.launched():
        with tempfile.TemporaryDirectory() as folder:
            os.environ[ORDERS] = os.path.join(folder, "orders")
            os.mkfifo(os.environ[ORDERS])
            sys.exit(parallel.launch(2))
    if kind.startswith("torch"):
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from torch_reference import stepper

        step, parts, flops = stepper(settings, autocast=kind == "torch-bf16"), {}, 0.0
    else:
        step, parts, flops = (plain if kind == "plain" else ours)(settings)
    step()  # the first compiles and fills caches
    if parallel.rank() == 0:
        print(json.dumps({"ready": kind, "flops_per_token": flops, "parts": list(parts)}), flush=True)
    serve(step, parts)


if __name__ == "__main__":
    main()
