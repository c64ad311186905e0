"""What each part of gpu.py measures: functions of `small` (sizes for a CPU) that return names and values."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench import HAS_BFLOAT16, Stepper  # noqa: E402
from lab.errors import UserError, one_line  # noqa: E402

BASE = {"head_dim": 64, "softcap": 15.0, "window": "L", "dtype": "bfloat16"}
WEB = BASE | {"vocab": 8192, "sequence_length": 2048, "depth": 8, "width": 512}
SIZES = {
    "upstream": WEB | {"rows": 32, "tokens_per_step": 2**19},
    "tinystories": BASE | {"vocab": 4096, "sequence_length": 256, "depth": 4, "width": 256, "rows": 64,
                           "tokens_per_step": 2**14},
    "fineweb": WEB | {"rows": 16, "tokens_per_step": 2**16},
    "windows": WEB | {"rows": 32, "tokens_per_step": 2**19, "window": "SSSL"},  # upstream's; torch has none
}  # fmt: skip
SMALL = {"vocab": 300, "sequence_length": 32, "depth": 2, "width": 64, "rows": 4, "tokens_per_step": 256}
NO_TORCH = ("windows",)
PARTS_OF_STEP = ("forward and backward", "optimizer")  # the forward pass alone would be compiled for this only
BFLOAT16, TF32 = 0.02, 0.004  # relative errors that rounding explains


def sizes(small: bool) -> dict[str, dict[str, Any]]:
    return {name: size | (SMALL | {"dtype": "float32"} if small else {}) for name, size in SIZES.items()}


def device(small: bool) -> dict[str, Any]:
    from importlib.metadata import version

    from lab.machine import hardware
    from lab.machine.backend import KIND

    facts = hardware.describe()
    peaks = {
        f"{dtype}_tflops": hardware.matmul_peak(dtype, repeats=3) / 1e12
        for dtype in ("float32", "bfloat16")[: 2 - small]
    }
    return (
        facts
        | {"mlx": version("mlx"), "mlx_uses": KIND, "memory_for_training_mb": hardware.training_memory_mb()}
        | peaks
    )


def error(got: Any, expected: Any) -> float:
    """Largest difference of two arrays, relative to the largest value."""
    from lab.machine.backend import mx

    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(got - expected).max() / (mx.abs(expected).max() + 1e-9)).item()


def kernels(small: bool) -> dict[str, Any]:
    from lab.machine.backend import mx, nn
    from lab.training import kernels as fused

    fused.GPU = True  # what a GPU would run, also on a CPU
    length, dtype = (64, mx.float32) if small else (1024, mx.bfloat16)
    q, k, v, dy = (mx.random.normal((2, 4, length, 64), key=mx.random.key(i)) for i in range(4))
    found = {}
    for name, window in (("attention", length), ("window", length // 2)):
        mask = fused.window_mask(length, window)

        def plain(q, k, v, mask=mask):
            weights = mx.softmax(mx.where(mask, q @ k.swapaxes(-1, -2) / 8, -1e30), axis=-1)
            return ((weights @ v) * dy).sum()

        def ours(q, k, v, window=window):
            q, k, v = (t.astype(dtype) for t in (q, k, v))
            return (fused.attention(q, k, v, scale=1 / 8, window=window).astype(mx.float32) * dy).sum()

        expected, got = (mx.grad(f, (0, 1, 2))(q, k, v) for f in (plain, ours))
        found[name] = max(error(a, b) for a, b in zip(got, expected, strict=True))
    x, head = mx.random.normal((512, 64)), 0.3 * mx.random.normal((1000, 64))
    targets = mx.random.randint(0, 1000, (512,))

    def plain_loss(x, head):
        return nn.losses.cross_entropy(15 * mx.tanh((x @ head.T) / 15), targets, reduction="mean")

    expected = mx.value_and_grad(plain_loss, (0, 1))(x, head)
    for name, chunk in (("cross-entropy", fused.CHUNK_LOGITS), ("cross-entropy in chunks", 1000 * 100)):
        fused.CHUNK_LOGITS = chunk
        got = mx.value_and_grad(lambda x, h: fused.linear_cross_entropy(x, h, targets, 15.0), (0, 1))(x, head)
        found[name] = max(error(a, b) for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True))
    heads, shares = (2, 4, length, 64), 0.1 * mx.random.normal((256,), key=mx.random.key(5))
    for name, function, inputs in (
        ("smear", fused.smear, (q.reshape(2, length, 256), shares)),
        ("rotary norm", lambda x: fused.rotary_norm(x, 10_000.0), (q,)),
        ("without own", fused.without_own, (q, v)),
        ("relu squared", fused.relu_squared, (q,)),
    ):

        def weighed(*inputs, function=function):
            return (function(*inputs).astype(mx.float32).reshape(heads) * dy).sum()

        cast = tuple(t if t is shares else t.astype(dtype) for t in inputs)
        every = tuple(range(len(inputs)))
        got = [function(*cast), *mx.grad(weighed, every)(*cast)]
        mx.eval(got)
        ours, fused.CUDA = fused.CUDA, False
        expected = [function(*inputs), *mx.grad(weighed, every)(*inputs)]
        mx.eval(expected)
        fused.CUDA = ours
        found[name] = max(error(a, b) for a, b in zip(got, expected, strict=True))
    limits = {name: BFLOAT16 if "cross" not in name else TF32 for name in found}
    return {name: verdict(value, limits[name]) for name, value in found.items()}


def verdict(value: float, limit: float) -> str:
    return f"{value:.2g} ({'ok' if value <= limit else 'TOO FAR'}, limit {limit:g})"


def compiled(small: bool) -> dict[str, Any]:
    """Losses of the same eight steps of both forms of the step, in both dtypes."""
    from benchmarks.stepper import _experiment

    size = sizes(small)["fineweb"] | ({} if small else {"depth": 4, "rows": 8, "tokens_per_step": 2**15})
    losses, passes = {}, size["tokens_per_step"] // size["sequence_length"] // size["rows"]
    for dtype in ("float32", "bfloat16")[: 2 - small]:
        experiment, mx = _experiment(size | {"dtype": dtype})
        experiment.DTYPE = dtype
        for form in (True, False) if experiment.GPU else (False,):
            mx.random.seed(0)
            model = experiment.build_model(size["vocab"])
            step, state = experiment.make_step(model, experiment.MuonAdamW(model), form)
            shape = (passes, size["rows"], size["sequence_length"])
            tokens = mx.random.randint(0, size["vocab"], shape, key=mx.random.key(1))
            taken = losses[f"{dtype} {'compiled' if form else 'plain'}"] = []
            for _ in range(8):
                loss = step(tokens, tokens[..., ::-1], mx.array(0.2), mx.array(0.1))
                mx.eval(loss, state)
                taken.append(loss.item())
    found = {}
    for dtype, limit in (("float32", TF32), ("bfloat16", BFLOAT16)):
        if f"{dtype} compiled" in losses:
            pairs = zip(losses[f"{dtype} compiled"], losses[f"{dtype} plain"], strict=True)
            found[f"{dtype} compiled against plain"] = verdict(max(abs(a - b) / b for a, b in pairs), limit)
    return found | {"losses": losses}


def cross_entropy(small: bool) -> dict[str, Any]:
    from lab.machine.backend import mx
    from lab.training import kernels as fused

    size, found = sizes(small)["upstream"], {}
    count = size["rows"] * size["sequence_length"]
    x, head = mx.random.normal((count, size["width"])), 0.1 * mx.random.normal((size["vocab"], size["width"]))
    x, targets = x.astype(getattr(mx, size["dtype"])), mx.random.randint(0, size["vocab"], (count,))
    for power in (12,) if small else (24, 25, 26, 27, 28, 29, 31):
        fused.CHUNK_LOGITS = 2**power
        both = mx.value_and_grad(lambda x, h: fused.linear_cross_entropy(x, h, targets, 15.0), (0, 1))
        both = mx.compile(both) if fused.GPU else both
        mx.eval(both(x, head))
        mx.reset_peak_memory()
        begun = time.perf_counter()
        for _ in range(3):
            mx.eval(both(x, head))
        found[f"chunks of 2^{power}"] = (
            f"{1000 * (time.perf_counter() - begun) / 3:.1f} ms, {mx.get_peak_memory() / 2**20:,.0f} MB"
        )
    return found


def rows(small: bool) -> dict[str, Any]:
    """Doubling rows at the size of fineweb. Fitting assumes that a doubling adds at most all of the memory, or twice
    what the last one added."""
    size, found, before, growth = sizes(small)["fineweb"], {}, 0.0, 0.0
    for count in (2, 4) if small else (4, 8, 16, 32, 64):
        tokens = max(size["tokens_per_step"], count * size["sequence_length"])
        one = Stepper("ours", size | {"rows": count, "tokens_per_step": tokens})
        rate, bound = tokens / median(one.take(5)), before + (growth or before)
        predicted = f" of {bound:,.0f} predicted" if before else ""
        found[f"{count} rows"] = f"{rate:,.0f} tokens/s, {one.peak_memory_mb:,.0f} MB{predicted}"
        growth = max(one.peak_memory_mb - before, 0) * 2 if before else 0.0
        before = one.peak_memory_mb
        one.close()
    return found


def kinds_of_step(name: str) -> list[str]:
    probe = subprocess.run([sys.executable, "-c", HAS_BFLOAT16], capture_output=True)
    return ["ours", *["torch-bf16"] * (probe.returncode == 0 and name not in NO_TORCH)]


def build(name: str, small: bool) -> dict[str, Any]:
    """Seconds to a first step, ours and torch's at the same time."""

    def first_step(kind: str) -> float:
        begun = time.perf_counter()
        Stepper(kind, sizes(small)[name]).close()
        return time.perf_counter() - begun

    kinds = kinds_of_step(name)
    with ThreadPoolExecutor(len(kinds)) as pool:
        return {f"{kind} s": seconds for kind, seconds in zip(kinds, pool.map(first_step, kinds), strict=True)}


def step(name: str, small: bool) -> dict[str, Any]:
    """Ours and torch in turn, three times; then the parts of ours."""
    from lab.machine.hardware import matmul_peak

    size = sizes(small)[name]
    kinds = kinds_of_step(name)
    steppers = [Stepper(kind, size) for kind in kinds]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(3):
        for one in steppers:
            seconds[one.kind] += one.take(4)[1:]  # the first brings the other's caches and clocks back
    ours, *torch = (size["tokens_per_step"] / median(seconds[kind]) for kind in kinds)
    parts = {part: median(steppers[0].take(3, part)) for part in PARTS_OF_STEP}
    mfu = 100 * ours * steppers[0].info["flops_per_token"] / matmul_peak(size["dtype"], repeats=5)
    found = {"tokens/s": ours, "MFU %": mfu, "peak MB": steppers[0].peak_memory_mb, "step s": median(seconds["ours"])}
    found |= {f"{part} s": value for part, value in parts.items()}
    if torch:
        found |= {
            "torch tokens/s": torch[0],
            "ours / torch": ours / torch[0],
            "torch peak MB": steppers[1].peak_memory_mb,
        }
    for one in steppers:
        one.close()
    return found


def profile(kind: str, small: bool) -> dict[str, Any]:
    """Kernels of two steps by their share of the time that the GPU is busy. CUPTI sees those of MLX and torch alike."""
    try:
        import torch
    except ImportError:
        return {"skipped": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"skipped": "no NVIDIA GPU"}
    from benchmarks import stepper, torch_reference

    size = sizes(small)["upstream"]
    whole = stepper.ours(size)[0] if kind == "ours" else torch_reference.stepper(size, autocast=True)
    for _ in range(3):
        whole()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        begun = time.perf_counter()
        for _ in range(2):
            whole()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    return kernel_shares(events, wall)


def kernel_shares(events: list[dict[str, Any]], wall: float) -> dict[str, str]:
    """A line for each of the slowest kernels of a trace, and how much of `wall` seconds the GPU was busy."""
    taken: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            taken.setdefault(event["name"], []).append(event["dur"] / 1e6)
    busy = sum(map(sum, taken.values()))
    order = sorted(taken, key=lambda name: -sum(taken[name]))
    lines = {}
    for place, name in enumerate(order[:40], 1):
        share, each = 100 * sum(taken[name]) / busy, 1e6 * median(taken[name])
        lines[str(place)] = f"{share:.1f} %, {len(taken[name])} x {each:.0f} us, {name[:160]}"
    return {"busy": f"{busy:.3f} s of {wall:.3f} s, {sum(map(len, taken.values()))} kernels"} | lines


def script(folder: Path, *arguments: object) -> str:
    """A command of this project on a cache of its own; its output."""
    env = os.environ | {"AUTORESEARCH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{arguments[0]}: {one_line((done.stderr.strip().splitlines() or ['failed'])[-1])}")
    return done.stdout


def prepared(folder: Path, small: bool) -> None:
    from lab.data.stories import story

    text = folder / "stories.txt"
    text.write_text("\n<|endoftext|>\n".join(story(0, i) for i in range(300 if small else 12_000)), encoding="utf-8")
    flags = ("--vocab", 300, "--seq", 32) if small else ()
    script(folder, "prepare.py", "--no-fit", "--preset", "tinystories", "--files", text, *flags)


def check_scorer(folder: Path) -> None:
    """Raise UserError if the scorer's process, which gets few variables, could not import MLX."""
    from lab.trial.sandbox import Policy, environment

    env = environment(os.environ, Policy((folder,)))
    if subprocess.run([sys.executable, "-c", "import mlx.core"], env=env, capture_output=True).returncode:
        raise UserError(
            "the scorer cannot import mlx: install it for this Python, not with PYTHONPATH or LD_LIBRARY_PATH"
        )


def trained(folder: Path, run: str, *flags: object) -> dict[str, Any]:
    """The result of a training in this folder."""
    script(folder, "train.py", "--run-dir", folder / run, *flags)
    return json.loads((folder / run / "result.json").read_text(encoding="utf-8"))


def seeds(small: bool) -> dict[str, Any]:
    from lab.interface.evidence import CHEATS, _Work

    steps = ("--steps", 2 if small else 150)
    with tempfile.TemporaryDirectory(prefix="gpu-") as name, ThreadPoolExecutor(1 if small else 8) as pool:
        folder = Path(name)
        check_scorer(folder)
        prepared(folder, small)
        found = {"seed0 val_bpb": trained(folder, "seed0", *steps)["val_bpb"]}
        work = _Work(folder, None, lambda line: None)
        cheats = list(CHEATS)[: 1 if small else None]
        again = pool.submit(trained, folder, "again", *steps)
        other = pool.submit(trained, folder, "seed1", *steps, "--seed", 1)
        refused = [pool.submit(work.cheat, cheat, *CHEATS[cheat]) for cheat in cheats]
        found |= {"again val_bpb": again.result()["val_bpb"], "seed1 val_bpb": other.result()["val_bpb"]}
        found |= {
            f"a model that {cheat}": one.result() or "NOT REFUSED" for cheat, one in zip(cheats, refused, strict=True)
        }
        losses = [(folder / run / "steps.jsonl").read_text(encoding="utf-8").splitlines() for run in ("seed0", "again")]
    same = [json.loads(a)["loss"] == json.loads(b)["loss"] for a, b in zip(*losses, strict=True)]
    found["steps with the same loss, same seed"] = f"{sum(same)} of {len(same)}"
    return found | {"same seed differs by": abs(found["seed0 val_bpb"] - found["again val_bpb"])}


def long(small: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        prepared(Path(name), small)
        result = trained(Path(name), "long", *(("--steps", 3) if small else ("--minutes", 2)))
    keys = ("val_bpb", "tokens_per_second", "mfu_percent", "peak_memory_mb", "startup_seconds", "scoring_seconds")
    return {key: result[key] for key in (*keys, "num_steps")}


def sandbox(small: bool) -> dict[str, Any]:
    """Why each kind of sandbox does not work here, or why an experiment fails in it, "" if none does."""
    from lab.interface.evidence import sandbox_kinds
    from lab.loop.session import night_settings
    from lab.trial.runner import Runner
    from lab.trial.sandbox import self_test

    found, source = {}, (ROOT / "train.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        prepared(Path(name), small)
        os.environ["AUTORESEARCH_CACHE"] = str(Path(name) / "cache")
        for kind in sandbox_kinds():
            folder = Path(name) / kind
            folder.mkdir()
            settings = night_settings(folder, preset=None, minutes=1)
            refused = self_test(kind)
            failed = "" if refused else Runner(folder, ROOT, settings, kind).preflight(source)
            found[kind] = refused or failed or "ok"
    return found


def fit(small: bool) -> dict[str, Any]:
    if small:
        return {"skipped": "a minute on a CPU; `make fit`"}
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        prepared(Path(name), small)
        lines = [line for line in script(Path(name), "prepare.py", "--fit").splitlines() if "tokens/s" in line]
        return {"candidates": len(lines) - 1, "chosen": lines[-1]}


PARTS = {"device": device, "kernels": kernels, "compiled": compiled, "rows": rows, "cross-entropy": cross_entropy,
         "seeds": seeds, "long": long, "sandbox": sandbox, "fit": fit}  # fmt: skip
PARTS |= {"profile": partial(profile, "ours"), "profile-torch": partial(profile, "torch")}
PARTS |= {f"step-{name}": partial(step, name) for name in SIZES}
PARTS |= {f"build-{name}": partial(build, name) for name in SIZES if name not in NO_TORCH}
