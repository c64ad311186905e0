"""Benchmarks of training on this machine: a table, and a JSON file to compare with other days.

    python benchmarks/bench.py [step cost loader prepare run night] [--rounds N] [--torch-python PATH] [--out DIR]

step     a training step of the tinystories model (vocabulary 4,096, 4 layers, 256 wide, 2^14 tokens), on a CPU with one
         process and with two, compared with the plain MLX step and with PyTorch; all are warm, in random order in each
         round. Reports the median over rounds of the ratio to our faster step, which is the one that fitting
         chooses, and the parts of our step in one process, against the matmul peak
cost     tokens/s and memory as depth, vocabulary and context grow, one at a time, from this machine's tier
loader   time to load the text of one step, as a share of the step, with this machine's tier
prepare  tokenizer and shards of stories, MB/s
run      a complete run with this machine's tier: start-up time, scoring as a share of five minutes, and the share of
         the training loop that is outside the step
night    overhead of the loop between the end of one training and the start of the next, without the agent's time

Writes benchmarks/out/bench.json. Other programs disturb the results: check `spread`, the interquartile range over the
median.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.errors import UserError  # noqa: E402
from lab.files import write_atomic  # noqa: E402

MODEL = {"depth": 4, "width": 256, "head_dim": 64, "softcap": 15.0, "window": "L", "dtype": "float32"}
PRESET = MODEL | {"vocab": 4096, "sequence_length": 256, "rows": 8, "tokens_per_step": 2**14}
STORIES = 12_000  # number of stories for measurements that need text, about 10 MB
STEPS = 40  # of a complete run
BUDGET = 300.0  # seconds of training


class Stepper:
    """benchmarks/stepper.py: a warm training step in a separate process."""

    def __init__(self, kind: str, settings: dict[str, Any], python: str = sys.executable):
        command = [python, str(ROOT / "benchmarks" / "stepper.py"), kind, json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        self.kind = kind
        self.info = self._answer()

    def take(self, steps: int, part: str = "") -> list[float]:
        """Seconds of each of these steps."""
        self.process.stdin.write(f"{steps} {part}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_memory_mb = answer["peak_memory_mb"]
        return answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the {self.kind} stepper failed with status {self.process.wait()}; see its message above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


HAS_BFLOAT16 = """
import torch
cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(torch.cuda.is_available() or cpu)
"""


def step(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from lab.machine.hardware import describe

    facts = describe()
    kinds = {"ours": sys.executable, "ours-2": sys.executable, "plain": sys.executable}
    if facts["backend"] != "cpu" or facts["cpu_cores"] < 2:
        del kinds["ours-2"]
    probe = subprocess.run(
        [options.torch_python, "-c", HAS_BFLOAT16], capture_output=True, encoding="utf-8", errors="replace"
    )
    if probe.returncode:
        print("skipping torch: it is not installed (pip install torch, or --torch-python PATH)")
    else:
        kinds["torch"] = options.torch_python
        if probe.stdout.strip() == "True":
            kinds["torch-bf16"] = options.torch_python
        else:
            print("skipping torch in bfloat16: this processor does not support it, and a step takes minutes")
    batches = {"torch": {"rows": 64}, "torch-bf16": {"rows": 64}}  # the fastest for each
    steppers = [Stepper(kind, PRESET | batches.get(kind, {}), python) for kind, python in kinds.items()]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    parts: dict[str, list[float]] = {part: [] for part in steppers[0].info["parts"]}
    for _ in range(options.rounds):
        for one in random.sample(steppers, len(steppers)):
            seconds[one.kind] += one.take(1)
        for part in parts:
            parts[part] += steppers[0].take(1, part)
    memory = {one.kind: round(one.peak_memory_mb) for one in steppers}
    for one in steppers:
        one.close()
    return _step_report(seconds, parts, memory, steppers[0].info["flops_per_token"])


def _step_report(seconds: dict, parts: dict, memory: dict, flops_per_token: float) -> dict[str, Any]:
    from lab.machine.hardware import matmul_peak

    tokens, one = PRESET["tokens_per_step"], median(seconds["ours"])
    ours = min((kind for kind in seconds if kind.startswith("ours")), key=lambda kind: median(seconds[kind]))
    forward, both = median(parts["forward"]), median(parts["forward and backward"])
    peak = matmul_peak("float32", repeats=60)
    report = {f"{kind}_tokens_per_second": tokens / median(values) for kind, values in seconds.items()}
    for kind in seconds.keys() - {ours}:
        name = kind.replace("-", "_") + "_ratio"  # above 1: ours is faster
        report[name] = median(other / own for other, own in zip(seconds[kind], seconds[ours], strict=True))
    return report | {
        "processes": 2 if ours == "ours-2" else 1,
        "spread": (quantiles(seconds[ours], n=4)[2] - quantiles(seconds[ours], n=4)[0]) / median(seconds[ours]),
        "forward_s": forward,
        "backward_s": both - forward,
        "optimizer_s": median(parts["optimizer"]),
        "matmul_peak_tflops": peak / 1e12,
        "mfu": flops_per_token * tokens / one / peak,
        "peak_memory_mb": memory,
    }


GROWTH = {"depth": (2, 4, 6, 8, 12), "vocab": (256, 1024, 2048, 4096, 8192), "sequence_length": (256, 512, 1024, 2048)}


def cost(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from lab.machine import hardware
    from lab.preset import adapt, load

    preset, _ = adapt(load("tinystories"), hardware.hardware())
    start = preset.settings() | {"vocab": preset.tokenizer.vocab_size}
    measured = {}
    for key, values in GROWTH.items():
        for value in values:
            rows = (
                max(1, start["rows"] * start["sequence_length"] // value) if key == "sequence_length" else start["rows"]
            )
            one = Stepper("ours", start | {key: value, "rows": rows})
            rate = start["tokens_per_step"] / median(one.take(2 * options.rounds))
            measured[f"{key} {value}"] = f"{rate:10,.0f} tokens/s {one.peak_memory_mb:8,.0f} MB"
            one.close()
    return measured


def stories(folder: Path) -> Path:
    """A text file of STORIES built-in stories."""
    from lab.data.stories import story

    path = folder / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(story(0, i) for i in range(STORIES)), encoding="utf-8")
    return path


def _prepared(folder: Path) -> dict[str, str]:
    """The environment with the tinystories preset prepared from stories, with this machine's tier."""
    env = os.environ | {"AUTORESEARCH_CACHE": str(folder / "cache")}
    if not (folder / "cache" / "current.json").is_file():
        command = [sys.executable, "prepare.py", "--no-fit", "--preset", "tinystories", "--files", str(stories(folder))]
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return env


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text, rates = stories(folder), []
    for i in range(min(3, options.rounds)):
        env = os.environ | {"AUTORESEARCH_CACHE": str(folder / f"cache{i}")}
        command = [sys.executable, "prepare.py", "--no-fit", "--preset", "tinystories", "--files", str(text)]
        begun = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rates.append(text.stat().st_size / 1e6 / (time.perf_counter() - begun))
    return {"mb_per_second": median(rates), "mb": text.stat().st_size / 1e6}


def loader(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from lab.data.batches import Batches
    from lab.data.shards import open_prepared

    env = _prepared(folder)
    record = json.loads((Path(env["AUTORESEARCH_CACHE"]) / "current.json").read_text(encoding="utf-8"))
    preset, prepared = record["preset"], open_prepared(Path(record["prepared"]))
    length, batch = preset["task"]["sequence_length"], preset["batch"]
    batches = Batches(prepared.train, prepared.tokenizer.bos, length, batch["rows"], 0)
    passes, seconds = batch["tokens_per_step"] // (batch["rows"] * length), []
    for _ in range(500):
        begun = time.perf_counter()
        for _ in range(passes):
            next(batches)
        seconds.append(time.perf_counter() - begun)
    one = Stepper("ours", preset["model"] | batch | {"vocab": prepared.tokenizer.vocab_size, "sequence_length": length})
    taken = median(one.take(4 * options.rounds))
    one.close()
    return {"seconds_per_step": sum(seconds) / len(seconds), "step_seconds": taken, "share": sum(seconds) / 500 / taken}


# Wraps the step so that it also evaluates, and prints the share of the loop's time outside it: an upper bound, since in
# a real run the next batch is prepared while the device works.
TIMED = """
import time
inside, moments = [], []
def timed(make_step):
    def make(*args, **kwargs):
        step, state = make_step(*args, **kwargs)
        def run_step(*batch):
            begun = time.perf_counter()
            loss = step(*batch)
            mx.eval(loss, state)
            moments.append((begun, time.perf_counter()))
            return loss
        return run_step, state
    return make
make_step = timed(make_step)
import atexit
atexit.register(lambda: print("outside", 1 - sum(b - a for a, b in moments[2:]) / (moments[-1][1] - moments[1][1])))
"""


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    env, results, outside = _prepared(folder) | {"PYTHONPATH": str(ROOT)}, [], []
    source = (
        (ROOT / "train.py")
        .read_text(encoding="utf-8")
        .replace('if __name__ == "__main__":', TIMED + '\nif __name__ == "__main__":')
    )
    for name, script in (("plain", ROOT / "train.py"), ("timed", folder / "train.py")):
        if name == "timed":
            script.write_text(source, encoding="utf-8")
        for number in range(min(3, options.rounds)):
            run_dir = folder / f"{name}{number}"
            command = [sys.executable, str(script), "--steps", str(STEPS), "--run-dir", str(run_dir)]
            command += ["--no-score"] if name == "timed" else []
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                raise UserError(f"the run failed: {done.stderr.strip()[-300:]}")
            if name == "timed":
                outside.append(float(done.stdout.rpartition("outside ")[2]))
            else:
                results.append(json.loads((run_dir / "result.json").read_text(encoding="utf-8")))
    return {
        "startup_s": median(r["startup_seconds"] for r in results),
        "tokens_per_second": median(r["tokens_per_second"] for r in results),
        "scoring_s": median(r["scoring_seconds"] for r in results),
        "scoring_share": median(r["scoring_seconds"] for r in results) / BUDGET,
        "outside_step_share": median(outside),
    }


def night(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Three experiments of the search in a clone of this checkout."""
    env, clone, minutes = _prepared(folder), folder / "clone", 0.1
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    command = [sys.executable, "agent_loop.py", "run", "--agent", "search", "--tag", "bench", "--rigor", "none"]
    begun = time.perf_counter()
    command += ["--max-experiments", "3", "--minutes", str(minutes)]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"the night failed: {done.stderr.strip()[-300:]}")
    wall = time.perf_counter() - begun
    lines = (clone / "nights" / "bench" / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    runs = sum(json.loads(line)["event"] == "run" for line in lines)
    return {"seconds_outside_training_per_run": (wall - runs * minutes * 60) / runs, "runs": runs}


MEASURES = {"step": step, "cost": cost, "loader": loader, "prepare": prepare, "run": run, "night": night}


def keys(report: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The most important figures, under stable names."""
    named = {
        "step.torch_ratio": ("step", "torch_ratio"),
        "step.plain_ratio": ("step", "plain_ratio"),
        "loader.share": ("loader", "share"),
        "outside_step.share": ("run", "outside_step_share"),
        "scoring.share": ("run", "scoring_share"),
        "startup_s": ("run", "startup_s"),
    }
    return {name: report[part][key] for name, (part, key) in named.items() if key in report.get(part, {})}


def table(report: dict[str, dict[str, Any]]) -> str:
    """One line for each number or text of each part."""
    lines = []
    for part, values in report.items():
        for key, value in values.items():
            if not isinstance(value, dict):
                lines.append(f"{part:16} {key:36} {f'{value:,.4g}' if isinstance(value, float) else value}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"one of {', '.join(MEASURES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (default %(default)s)")
    parser.add_argument("--torch-python", default=sys.executable, help="Python with torch (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder for bench.json")
    options = parser.parse_args()
    if unknown := [m for m in options.measures if m not in MEASURES]:
        raise UserError(f"there is no measure {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    if options.rounds < 2:
        raise UserError("--rounds must be at least 2")
    folder, report = Path(tempfile.mkdtemp(prefix="bench-")), {}
    try:
        for name in options.measures or MEASURES:
            print(f"measuring {name}", flush=True)
            report[name] = MEASURES[name](options, folder)
            print(table({name: report[name]}), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "bench.json", json.dumps(keys(report) | {"all": report}, indent=1))
    print(options.out / "bench.json")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
