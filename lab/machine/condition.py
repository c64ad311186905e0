"""The condition of the machine at one moment, and what it means for a run: whether it may start and whether it counts.

`_macos_condition` reads a Mac. It has not been run on one: its parsing is tested with recorded outputs.
"""

import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.machine import hardware

SLEPT_SECONDS = 5.0  # asleep for longer: a run does not count
SLOW = 0.5  # of the usual speed before and after a run: the machine is too slow for it to count
LATE = 0.8  # of the usual speed before or after a run that its time limit ended: the machine may have been the cause
THROTTLED = 0.8  # of the matmul speed before the run
HOT = 2  # thermal pressure from which Apple slows the chip down
CRITICAL = 4  # memory pressure at which the system kills processes
SWAPPED_MB = 1024.0  # more swap than before a run: the run waited for the disk


@dataclass(frozen=True)
class Condition:
    """The machine at one moment; None for what the system does not report."""

    flops: float  # FLOP/s of a float32 matmul: lower when the machine is hot or busy
    slept: float  # seconds asleep since boot
    swap_mb: float | None = None
    memory_pressure: int | None = None  # 1 normal, 2 warning, 4 critical
    heat: int | None = None  # thermal pressure: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping
    power: str | None = None  # "AC" or "battery"

    def __str__(self) -> str:
        """What is known, as text."""
        parts = [f"{self.flops / 1e9:,.0f} GFLOP/s"]
        parts += [] if self.heat is None else [f"thermal pressure {self.heat}"]
        parts += [] if self.memory_pressure is None else [f"memory pressure {self.memory_pressure} of 4"]
        parts += [] if self.swap_mb is None else [f"{self.swap_mb:,.0f} MB swapped"]
        return ", ".join([*parts, f"on {self.power}"] if self.power else parts)


def recorded(fields: dict[str, Any]) -> Condition:
    """The condition that a journal holds; other versions know other fields."""
    return Condition(**{name: fields[name] for name in Condition.__dataclass_fields__ if name in fields})


def condition() -> Condition:
    """The condition now. Takes half a second."""
    read = _macos_condition(hardware.output) if platform.system() == "Darwin" else _linux_condition(Path("/"))
    return Condition(hardware.matmul_peak("float32"), hardware.seconds_with_sleep() - time.perf_counter(), **read)


def invalid_reason(
    before: Condition, after: Condition, usual_flops: float, status: str = "ok", pace: float | None = None
) -> str:
    """Why a run between these two moments does not count, or "". `status`: how it ended, as in lab.trial.guard. `pace`:
    speed of the machine during the run as a share of its best, None if it was not measured. A run that did not finish
    counts as a failure in any condition but sleep, or a slow machine at its time limit: it may have used up the memory
    and the processors itself."""
    if (slept := after.slept - before.slept) > SLEPT_SECONDS:
        return f"the machine slept for {slept:.0f} s"
    shares = [pace] if pace else [moment.flops / (usual_flops or moment.flops or 1.0) for moment in (before, after)]
    if status == "timeout" and min(shares) < LATE:
        return f"it was still running at its time limit, and the machine ran at {100 * min(shares):.0f} % of its speed"
    if status != "ok":
        return ""
    if None not in (before.power, after.power) and before.power != after.power:
        return f"the power source changed from {before.power} to {after.power}"
    if (
        after.heat or 0
    ) >= HOT and after.flops < THROTTLED * before.flops:  # a Mac without a fan is always hot in a run
        share = 100 * after.flops / before.flops
        return f"the machine got hot (thermal pressure {before.heat} to {after.heat}) and slow ({share:.0f} %)"
    if after.memory_pressure == CRITICAL:
        return "the machine ran out of memory for other programs (memory pressure critical)"
    if None not in (before.swap_mb, after.swap_mb) and after.swap_mb - before.swap_mb > SWAPPED_MB:
        return f"the machine swapped {after.swap_mb - before.swap_mb:.0f} MB"
    if max(shares) < SLOW:
        return f"the machine ran at {100 * max(shares):.0f} % of its speed"
    return ""


def wait_reason(now: Condition, usual_flops: float) -> str:
    """Why no run should start now, or ""."""
    if now.heat is not None and now.heat >= HOT:
        return f"the machine is hot (thermal pressure {now.heat})"
    if now.memory_pressure == CRITICAL:
        return "memory pressure is critical"
    if now.flops < SLOW * usual_flops:
        return f"the machine runs at {100 * now.flops / usual_flops:.0f} % of its speed"
    return ""


def _decimal(number: str) -> float:
    return float(number.replace(",", "."))  # in the locale of the user


def _macos_condition(output: Callable[..., str]) -> dict[str, str | int | float | None]:
    """`output(*command)` runs a command and returns what it prints. Not run on a Mac."""
    questions = {
        "swap_mb": (("sysctl", "-n", "vm.swapusage"), r"used = (\d+[.,]\d+)M", _decimal),
        "memory_pressure": (("sysctl", "-n", "kern.memorystatus_vm_pressure_level"), r"(\d+)", int),
        "heat": (("notifyutil", "-g", "com.apple.system.thermalpressurelevel"), r"(\d+)\s*$", int),
        "power": (
            ("pmset", "-g", "batt"),
            r"drawing from '(AC|Battery) Power'",
            {"AC": "AC", "Battery": "battery"}.get,
        ),
    }
    values = {}
    for name, (command, pattern, convert) in questions.items():
        try:
            match = re.search(pattern, output(*command))
        except (OSError, subprocess.SubprocessError):  # the thermal level has no documented name: it may disappear
            match = None
        values[name] = convert(match[1]) if match else None
    return values


def _linux_condition(root: Path) -> dict[str, str | int | float | None]:
    """From /proc and /sys below `root`. Heat shows only in the speed."""
    memory = dict(re.findall(r"(\w+):\s+(\d+)", content(root / "proc/meminfo")))
    swap = (int(memory["SwapTotal"]) - int(memory["SwapFree"])) / 1024 if "SwapFree" in memory else None
    # Share of ten seconds in which every process waited for memory.
    full = re.search(r"full avg10=([\d.]+)", content(root / "proc/pressure/memory"))
    supplies = [p.parent for p in root.glob("sys/class/power_supply/*/online")]
    mains = [content(p / "online").strip() for p in supplies if content(p / "type").strip() == "Mains"]
    return {
        "swap_mb": swap,
        "memory_pressure": None if full is None else 4 if float(full[1]) > 20 else 2 if float(full[1]) > 5 else 1,
        "power": None if not mains else "AC" if "1" in mains else "battery",
    }


def content(path: Path) -> str:
    """Text of a kernel file; "" if it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
