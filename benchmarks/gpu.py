"""Everything that has to be seen on a GPU, in one run of at most eight minutes; the table comes last.

    python benchmarks/gpu.py [PART ...] [--minutes 8] [--small] [--out DIR]

at once, before anything is timed: kernels are built at their first use, for minutes, and kept
  kernels      fused attention, windows, cross-entropy and our own kernels, and their gradients, against plain float32
  compiled     the losses of a compiled step against the plain one's, in float32 and bfloat16
  seeds        built-in stories to val_bpb: the same seed twice, another seed, and cheating models
  sandbox      two training steps and a scored batch in each kind of sandbox of this machine
  build-SIZE   a first step, ours and PyTorch's
then one after the other
  device       what it is, and the peaks of a matrix product
  step-SIZE    tokens/s, MFU, memory and the parts of a step; beside torch_reference.py in turn, if torch is there
  profile      the kernels of a step at upstream's size by their time, from torch's profiler; profile-torch: torch's
  long         two minutes of training on built-in stories, to val_bpb
  rows         tokens/s and memory as the rows of a pass double; memory against the bound that `make fit` predicts
  cross-entropy  seconds and memory for chunks of 2^24 to 2^29 logits
  fit          `make fit` on built-in stories

Each part is a process of its own, which may fail or run out of memory, and gets the time that is left. --small, the
default without a GPU, takes sizes for a CPU: it shows that the script works, not what a GPU does. MLX must be installed
for this Python: the scorer's process gets neither PYTHONPATH nor LD_LIBRARY_PATH.
On an H100 device, kernels and profile have run, and step-upstream in an earlier form (docs/GPU.md).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench import table  # noqa: E402
from benchmarks.gpu_parts import PARTS  # noqa: E402
from lab.errors import UserError, one_line  # noqa: E402
from lab.files import write_atomic  # noqa: E402

SECONDS = {  # after which a part is given up, and so what must be left for it to begin
    "kernels": 60, "compiled": 200, "seeds": 240, "sandbox": 240,
    "build-upstream": 200, "build-fineweb": 200, "build-tinystories": 200,
    "device": 30, "step-upstream": 90, "profile": 60, "step-fineweb": 80, "step-tinystories": 60, "long": 200,
    "profile-torch": 60, "rows": 80, "cross-entropy": 40, "step-windows": 60, "fit": 200,
}  # fmt: skip
AT_ONCE = ("kernels", "compiled", "seeds", "sandbox", "build-upstream", "build-fineweb", "build-tinystories")


def run(part: str, small: bool, seconds: float) -> dict[str, Any]:
    """What a part measured, in a process of its own."""
    command = [sys.executable, __file__, part, "--one", *["--small"] * small]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        printed, said = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds:.0f} s"}
    finally:
        with suppress(ProcessLookupError):  # its own children too: they hold the GPU
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        return {"failed": one_line((said.strip().splitlines() or [f"status {child.returncode}"])[-1], 300)}
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(SECONDS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU (default without a GPU)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder for gpu.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"there is no part {unknown[0]!r}; choose from {', '.join(SECONDS)}")
    if options.one:
        print(json.dumps(PARTS[options.parts[0]](options.small)))
        return
    from lab.machine.hardware import describe

    small, deadline, report = (
        options.small or describe()["backend"] == "cpu",
        time.monotonic() + 60 * options.minutes,
        {},
    )

    def timed(part: str) -> dict[str, Any]:
        begun = time.monotonic()
        left = deadline - begun
        found = run(part, small, min(left, SECONDS[part])) if left > 15 else {"failed": "no time left"}
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
        return found

    parts = options.parts or list(SECONDS)
    first = [part for part in parts if part in AT_ONCE]
    with ThreadPoolExecutor(1 if small else len(AT_ONCE)) as pool:
        report |= zip(first, pool.map(timed, first), strict=True)
    report |= {part: timed(part) for part in parts if part not in AT_ONCE}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "gpu.json", json.dumps(report, indent=1))
    print(table(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as error_:
        sys.exit(f"error: {error_}")
