"""What this machine is and what it can do: chip, memory, GPU cores, matmul peak; and how it is doing at a moment.

Reading the machine on macOS goes through `_macos_facts` and `_macos_condition`, which are not run on a Mac here: their
parsing is tested with recorded outputs of the commands.
"""

import json
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lab.preset import Hardware

SLEPT_SECONDS = 5.0  # asleep for longer: a run does not count
SLOW = 0.5  # of the usual matmul speed, before and after a run: the machine is not itself
THROTTLED = 0.8  # of the matmul speed before the run
HOT = 2  # thermal pressure from which Apple slows the chip down
CRITICAL = 4  # memory pressure at which the system ends processes
SWAPPED_MB = 1024.0  # more swap than before a run: it waited for the disk
MATMUL_SIZE = 1024  # n of the n x n products that measure the peak; large enough for 95 % of it, a few ms each


def describe() -> dict[str, str | int | float]:
    """Chip name, operating system, memory (GB), CPU and GPU cores, backend. Takes well under a second."""
    facts = _macos_facts(_output) if platform.system() == "Darwin" else _linux_facts()
    backend = "metal" if facts["gpu_cores"] else "cpu"
    return facts | {"os": f"{platform.system()} {platform.release()}", "backend": backend}


def hardware() -> Hardware:
    """What the tiers of a preset look at."""
    facts = describe()
    return Hardware(facts["backend"], facts["memory_gb"], facts["gpu_cores"])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def _macos_facts(output) -> dict[str, str | int | float]:
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
    with open("/proc/cpuinfo") as file:
        name = re.search(r"model name\s*: (.*)", file.read())
    return {
        "chip": name[1] if name else platform.machine(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpu_cores": 0,
    }


def matmul_peak(dtype_name: str, repeats: int = 20) -> float:
    """FLOP/s of a warmed square matmul in this dtype, the best of `repeats`: the peak that MFU is measured against."""
    from lab.backend import mx

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


@dataclass(frozen=True)
class Condition:
    """The machine at one moment; None is what the system does not tell."""

    flops: float  # FLOP/s of a float32 matmul: what heat and other processes leave
    slept: float  # seconds asleep since it was switched on
    swap_mb: float | None = None
    memory_pressure: int | None = None  # 1 normal, 2 warning, 4 critical
    heat: int | None = None  # thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping
    power: str | None = None  # "AC" or "battery"


def condition() -> Condition:
    """How the machine is now. Takes half a second."""
    read = _macos_condition(_output) if platform.system() == "Darwin" else _linux_condition(Path("/"))
    return Condition(matmul_peak("float32"), seconds_with_sleep() - time.perf_counter(), **read)


def spoiled(before: Condition, after: Condition, usual_flops: float, finished: bool = True) -> str:
    """Why a run between these two moments does not count, or "". One that did not finish counts as its own failure
    however the machine was, unless it slept: memory and processors may be what it took."""
    if (slept := after.slept - before.slept) > SLEPT_SECONDS:
        return f"the machine slept for {slept:.0f} s"
    if not finished:
        return ""
    if None not in (before.power, after.power) and before.power != after.power:
        return f"the power source changed from {before.power} to {after.power}"
    if (after.heat or 0) >= HOT and after.flops < THROTTLED * before.flops:  # a Mac without a fan is always hot then
        share = 100 * after.flops / before.flops
        return f"the machine grew hot (thermal pressure {before.heat} to {after.heat}) and slow ({share:.0f} %)"
    if after.memory_pressure == CRITICAL:
        return "the machine ran out of memory for other programs (memory pressure critical)"
    if None not in (before.swap_mb, after.swap_mb) and after.swap_mb - before.swap_mb > SWAPPED_MB:
        return f"the machine swapped {after.swap_mb - before.swap_mb:.0f} MB"
    if (best := max(before.flops, after.flops)) < SLOW * usual_flops:
        return f"the machine ran at {100 * best / usual_flops:.0f} % of its speed"
    return ""


def unfit(now: Condition, usual_flops: float) -> str:
    """Why no run should start now, or ""."""
    if now.heat is not None and now.heat >= HOT:
        return f"the machine is hot (thermal pressure {now.heat})"
    if now.memory_pressure == CRITICAL:
        return "memory pressure is critical"
    if now.flops < SLOW * usual_flops:
        return f"the machine runs at {100 * now.flops / usual_flops:.0f} % of its speed"
    return ""


def _macos_condition(output) -> dict[str, str | int | float | None]:
    """`output(*command)` runs a command and returns what it prints. Not run on a Mac."""
    questions = {
        "swap_mb": (("sysctl", "-n", "vm.swapusage"), r"used = ([\d.]+)M", float),
        "memory_pressure": (("sysctl", "-n", "kern.memorystatus_vm_pressure_level"), r"(\d+)", int),
        "heat": (("notifyutil", "-g", "com.apple.system.thermalpressurelevel"), r"(\d+)\s*$", int),
        "power": (("pmset", "-g", "batt"), r"'(AC|Battery) Power'", {"AC": "AC", "Battery": "battery"}.get),
    }
    found = {}
    for name, (command, pattern, kind) in questions.items():
        try:
            match = re.search(pattern, output(*command))
        except (OSError, subprocess.SubprocessError):  # the thermal level has no public name: it may go
            match = None
        found[name] = kind(match[1]) if match else None
    return found


def _linux_condition(root: Path) -> dict[str, str | int | float | None]:
    """From /proc and /sys below `root`. Heat shows in the speed only."""
    memory = dict(re.findall(r"(\w+):\s+(\d+)", _content(root / "proc/meminfo")))
    swap = (int(memory["SwapTotal"]) - int(memory["SwapFree"])) / 1024 if "SwapFree" in memory else None
    # Share of ten seconds in which every process waited for memory.
    full = re.search(r"full avg10=([\d.]+)", _content(root / "proc/pressure/memory"))
    supplies = [p.parent for p in root.glob("sys/class/power_supply/*/online")]
    mains = [_content(p / "online").strip() for p in supplies if _content(p / "type").strip() == "Mains"]
    return {
        "swap_mb": swap,
        "memory_pressure": None if full is None else 4 if float(full[1]) > 20 else 2 if float(full[1]) > 5 else 1,
        "power": None if not mains else "AC" if "1" in mains else "battery",
    }


def _content(path: Path) -> str:
    """Text of a file of the kernel's; "" where there is none or it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def peak_memory_mb() -> float:
    """The most memory this process has held for arrays, in MB: real bytes of MLX's allocator."""
    from lab.backend import mx

    return mx.get_peak_memory() / 2**20


def seconds_with_sleep() -> float:
    """A clock that goes on while the machine sleeps, unlike time.perf_counter: the difference is time asleep."""
    on_mac = platform.system() == "Darwin"
    return time.clock_gettime(time.CLOCK_MONOTONIC_RAW if on_mac else time.CLOCK_BOOTTIME)
