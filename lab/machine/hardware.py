"""What this machine is and what it can do: chip, memory, GPU, matmul peak, and time that counts sleep.

`_macos_facts` reads a Mac, and `lab.machine.device.nvidia` an NVIDIA GPU. They are tested with recorded outputs and
with a made-up driver. The second has read an H100, the first has not been run on a Mac.
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
from lab.machine import device
from lab.preset import Hardware

# Commands that print the GPU cores of an Apple chip. The first takes 20 ms (sbryngelson/ANEForge#151).
GPU_CORES = {
    ("ioreg", "-rc", "AGXAccelerator", "-d1"): r'"gpu-core-count" = (\d+)',
    ("system_profiler", "SPDisplaysDataType", "-json"): r'"sppci_cores"\s*:\s*"(\d+)"',
}


@cache
def describe() -> dict[str, str | int | float]:
    """The chip that trains, operating system, memory (GB), CPU cores, backend ("cpu", "metal" or "cuda"), GPU cores
    (SMs of an NVIDIA GPU) and the memory of the GPU (GB; on a Mac all of it). Read once: system_profiler takes a second
    and may hang."""
    mac = platform.system() == "Darwin"
    facts = _macos_facts(output) if mac else _linux_facts()
    backend = "cpu" if not facts["gpu_cores"] else "metal" if mac else "cuda"
    system = f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}"
    return facts | {"os": system, "backend": backend}


def hardware() -> Hardware:
    """What the tiers of a preset depend on."""
    facts = describe()
    return Hardware(*(facts[name] for name in ("backend", "memory_gb", "gpu_cores", "gpu_memory_gb")))


def training_memory_mb() -> float:
    """Memory that a training may take: a share of the GPU's, else of the machine's."""
    facts = describe()
    return device.MEMORY_SHARE[facts["backend"]] * (facts["gpu_memory_gb"] or facts["memory_gb"]) * 1024


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
    memory, cores = int(values[2]) / 2**30 if values else _physical_gb(), on_apple_chip and _macos_gpu_cores(output)
    return {
        "chip": chip,
        "memory_gb": memory,
        "cpu_cores": int(values[3]) if values else os.cpu_count() or 1,
        "gpu_cores": int(cores),
        "gpu_memory_gb": memory if cores else 0.0,
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
    card = device.nvidia() if device.mlx_has_cuda() else None
    return {
        "chip": card.name if card else name[1] if name else platform.machine(),
        "memory_gb": min(_physical_gb(), quota.memory_limit() / 2**30),
        "cpu_cores": quota.cores(),
        "gpu_cores": card.sms if card else 0,
        "gpu_memory_gb": card.memory_gb if card else 0.0,
    }


def matmul_peak(dtype_name: str, repeats: int = 20) -> float:
    """FLOP/s of a warmed square matmul in this dtype, the best of `repeats`: the peak that MFU is measured against."""
    from lab.machine.backend import KIND, mx

    dtype, size = getattr(mx, dtype_name), device.MATMUL_SIZE[KIND]
    a, b = (mx.random.normal((size, size), key=mx.random.key(seed)).astype(dtype) for seed in (0, 1))
    mx.eval(a, b, a @ b)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    del a, b
    mx.clear_cache()  # the process of a night keeps nothing on the GPU while its children train
    return 2 * size**3 / best


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
