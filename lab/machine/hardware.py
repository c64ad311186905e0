"""What this machine is and what it can do: chip, memory, GPU cores, matmul peak, and time that counts sleep.

`_macos_facts` reads a Mac. It has not been run on one: its parsing is tested with recorded outputs.
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from lab import quota
from lab.preset import Hardware

# Commands that print the GPU cores of an Apple chip. The first takes 20 ms (sbryngelson/ANEForge#151).
GPU_CORES = {
    ("ioreg", "-rc", "AGXAccelerator", "-d1"): r'"gpu-core-count" = (\d+)',
    ("system_profiler", "SPDisplaysDataType", "-json"): r'"sppci_cores"\s*:\s*"(\d+)"',
}
MATMUL_SIZE = 1024  # n of the n x n products that measure the peak; large enough for 95 % of it, a few ms each


@cache
def describe() -> dict[str, str | int | float]:
    """Chip name, operating system, memory (GB), CPU and GPU cores, backend. Read once: system_profiler takes a second
    and may hang."""
    mac = platform.system() == "Darwin"
    facts = _macos_facts(output) if mac else _linux_facts()
    backend = "metal" if facts["gpu_cores"] else "cpu"
    system = f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}"
    return facts | {"os": system, "backend": backend}


def hardware() -> Hardware:
    """What the tiers of a preset depend on."""
    facts = describe()
    return Hardware(facts["backend"], facts["memory_gb"], facts["gpu_cores"])


def output(*command: str) -> str:
    """What a command prints. Raises OSError or SubprocessError."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
    ).stdout


def _macos_facts(output: Callable[..., str]) -> dict[str, str | int | float]:
    """`output(*command)` runs a command and returns what it prints. Not run on a Mac."""
    sysctl = _printed(output, "sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize", "hw.ncpu")
    values = re.fullmatch(r"(.+)\n(\d+)\n(\d+)\s*", sysctl)
    chip = values[1] if values else platform.machine()
    on_apple_chip = platform.machine() == "arm64" or chip.startswith("Apple")
    return {
        "chip": chip,
        "memory_gb": int(values[2]) / 2**30 if values else _physical_gb(),
        "cpu_cores": int(values[3]) if values else os.cpu_count() or 1,
        "gpu_cores": _macos_gpu_cores(output) if on_apple_chip else 0,
    }


def _macos_gpu_cores(output: Callable[..., str]) -> int:
    """0 where no command prints them, as on a virtual Mac."""
    for command, pattern in GPU_CORES.items():
        if counts := re.findall(pattern, _printed(output, *command)):
            return max(map(int, counts))
    return 0


def _printed(output: Callable[..., str], *command: str) -> str:
    """What a command prints; "" for one that fails, is missing or hangs."""
    try:
        return output(*command)
    except (OSError, subprocess.SubprocessError):
        return ""


def _physical_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _linux_facts() -> dict[str, str | int | float]:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        name = re.search(r"model name\s*: (.*)", file.read())
    return {
        "chip": name[1] if name else platform.machine(),
        "memory_gb": min(_physical_gb(), quota.memory_limit() / 2**30),
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
    """Share of the processors that other programs use: what a thread on every core at once does not get."""

    def own_share(_: int) -> float:
        begun, own = time.perf_counter(), time.thread_time()
        while time.perf_counter() - begun < seconds:
            np.exp(numbers)  # releases the GIL
        return (time.thread_time() - own) / (time.perf_counter() - begun)

    numbers, cores = np.zeros(1 << 16), describe()["cpu_cores"]
    with ThreadPoolExecutor(cores) as pool:
        return max(0.0, 1 - sum(pool.map(own_share, range(cores))) / quota.cpus())  # a quota is no other program


def peak_memory_mb() -> float:
    """The most memory this process has held for arrays, in MB: real bytes of MLX's allocator.

    What lab/training/kernels.py works in on a CPU is not in it: a few chunks of logits for each core."""
    from lab.machine.backend import mx

    return mx.get_peak_memory() / 2**20


def seconds_with_sleep() -> float:
    """A clock that also counts while the machine sleeps, unlike time.perf_counter: the difference is time asleep."""
    on_mac = platform.system() == "Darwin"
    return time.clock_gettime(time.CLOCK_MONOTONIC_RAW if on_mac else time.CLOCK_BOOTTIME)
