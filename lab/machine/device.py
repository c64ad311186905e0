"""All that differs between the devices that MLX computes on: "cpu", "metal" (an Apple GPU) and "cuda" (an NVIDIA GPU).

`lab.machine.backend.KIND` says which one MLX uses in this process, `lab.machine.hardware.describe` what the machine
has. Attention masks need no difference: `mx.fast.scaled_dot_product_attention` takes "causal" and boolean arrays on
both GPUs, and only the speed of their gradients differs (docs/METAL.md). Standard library only: the guard's process has
no packages. Not run on a Mac or on an NVIDIA GPU.
"""

import ctypes
import re
from dataclasses import dataclass

# Share of the device's memory that a training may take. Other programs share the memory of a CPU and of a Mac; a card
# has its own, of which MLX allocates at most 90 % and a desktop takes some.
MEMORY_SHARE = {"cpu": 0.5, "metal": 0.5, "cuda": 0.8}
# n of the n x n products that measure the peak: large enough to hide the launch of a kernel, at most 0.1 s each.
MATMUL_SIZE = {"cpu": 1024, "metal": 4096, "cuda": 8192}
CORES = {"metal": "GPU cores", "cuda": "SMs"}
# Beginnings of the RuntimeErrors with which MLX reports that memory is full, from reports of its users
# (tests/trial/test_guard.py). Where MLX ends the process instead, the signal says it.
OUT_OF_MEMORY = re.compile(
    r"\[(metal::)?malloc"  # Metal, one array is too large; CUDA, "[malloc_async]"
    r"|\[METAL\] .*(Insufficient Memory|OutOfMemory)"
    r"|cuda\w+\b.* failed: out of memory"
)
SM_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU."""

    name: str
    memory_gb: float
    sms: int  # streaming multiprocessors


def nvidia(library: str = "libcuda.so.1") -> Card | None:
    """The first NVIDIA GPU that the driver lets this process use; None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    handle, sms = ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    calls = (
        (driver.cuInit, 0),
        (driver.cuDeviceGet, ctypes.byref(handle), 0),
        (driver.cuDeviceGetName, name, len(name), handle),
        (driver.cuDeviceTotalMem_v2, ctypes.byref(memory), handle),
        (driver.cuDeviceGetAttribute, ctypes.byref(sms), SM_COUNT, handle),
    )
    if any(call(*arguments) for call, *arguments in calls):  # 0 is success
        return None
    return Card(name.value.decode(errors="replace"), memory.value / 2**30, sms.value)
