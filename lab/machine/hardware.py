"""What this machine is and what it can do: chip, memory, GPU cores, matmul peak, and time that counts sleep.

Reading the machine on macOS goes through `_macos_facts`, which is not run on a Mac here: its parsing is tested with
recorded outputs of the commands.
"""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lab import quota
from lab.preset import Hardware

MATMUL_SIZE = 1024  # n of the n x n products that measure the peak; large enough for 95 % of it, a few ms each


def describe() -> dict[str, str | int | float]:
    """Chip name, operating system, memory (GB), CPU and GPU cores, backend. Takes well under a second."""
    mac = platform.system() == "Darwin"
    facts = _macos_facts(output) if mac else _linux_facts()
    backend = "metal" if facts["gpu_cores"] else "cpu"
    system = f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}"
    return facts | {"os": system, "backend": backend}


def hardware() -> Hardware:
    """What the tiers of a preset look at."""
    facts = describe()
    return Hardware(facts["backend"], facts["memory_gb"], facts["gpu_cores"])


def output(*command: str) -> str:
    """What a command prints. Raises OSError or SubprocessError."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
    ).stdout


def _macos_facts(output: Callable[..., str]) -> dict[str, str | int | float]:
    """`output(*command)` runs a command and returns what it prints. Not run on a Mac."""
    sysctl = output("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize", "hw.ncpu").splitlines()
    displays = json.loads(output("system_profiler", "SPDisplaysDataType", "-json"))
    cores = [int(gpu["sppci_cores"]) for gpu in displays["SPDisplaysDataType"] if "sppci_cores" in gpu]
    apple = platform.machine() == "arm64" or sysctl[0].startswith("Apple")
    return {
        "chip": sysctl[0],
        "memory_gb": int(sysctl[1]) / 2**30,
        "cpu_cores": int(sysctl[2]),
        "gpu_cores": max(cores, default=0) if apple else 0,
    }


def _linux_facts() -> dict[str, str | int | float]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        name = re.search(r"model name\s*: (.*)", file.read())
    return {
        "chip": name[1] if name else platform.machine(),
        "memory_gb": min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), quota.memory_limit()) / 2**30,
        "cpu_cores": quota.cores(),
        "gpu_cores": 0,
    }


def matmul_peak(dtype_name: str, repeats: int = 20) -> float:
    """FLOP/s of a warmed square matmul in this dtype, the best of `repeats`: the peak that MFU is measured against."""
    from lab.machine.backend import mx

    dtype = getattr(mx, dtype_name)
    a = mx.random.normal((MATMUL_SIZE, MATMUL_SIZE), key=mx.random.key(0)).astype(dtype)
    b = mx.random.normal((MATMUL_SIZE, MATMUL_SIZE), key=mx.random.key(1)).astype(dtype)
    mx.eval(a, b, a @ b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best


def taken(seconds: float = 0.5) -> float:
    """Share of the processors that other programs take: what is missing when every core is asked for at once."""

    def ask(_: int) -> float:
        begun, own = time.perf_counter(), time.thread_time()
        while time.perf_counter() - begun < seconds:
            np.exp(numbers)  # lets go of Python's lock
        return (time.thread_time() - own) / (time.perf_counter() - begun)

    numbers, cores = np.zeros(1 << 16), describe()["cpu_cores"]
    with ThreadPoolExecutor(cores) as pool:
        return max(0.0, 1 - sum(pool.map(ask, range(cores))) / quota.cpus())  # a quota is no other program


def peak_memory_mb() -> float:
    """The most memory this process has held for arrays, in MB: real bytes of MLX's allocator.

    What lab/training/kernels.py works in on a CPU is not in it: a few chunks of logits for each core."""
    from lab.machine.backend import mx

    return mx.get_peak_memory() / 2**20


def seconds_with_sleep() -> float:
    """A clock that goes on while the machine sleeps, unlike time.perf_counter: the difference is time asleep."""
    on_mac = platform.system() == "Darwin"
    return time.clock_gettime(time.CLOCK_MONOTONIC_RAW if on_mac else time.CLOCK_BOOTTIME)
