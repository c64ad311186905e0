"""All that differs between the devices that MLX computes on: "cpu", "metal" (an Apple GPU) and "cuda" (an NVIDIA GPU).

`lab.machine.backend.KIND` says which one MLX uses in this process, `lab.machine.hardware.describe` what the machine
has. Attention masks need no difference: `mx.fast.scaled_dot_product_attention` takes "causal" and boolean arrays on
both GPUs, and only the speed of their gradients differs (docs/GPU.md). Standard library only: the guard's process has
no packages. Run on an H100; not run on a Mac.
"""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

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
CUDA_WHEELS = ("mlx-cuda-13", "mlx-cuda-12")  # with one of these MLX uses an NVIDIA GPU
DRIVER = "libcuda.so.1"  # part of the NVIDIA driver
# Device files that a process with an NVIDIA GPU opens: the GPUs, their control, unified memory, and slices of a GPU.
NODES = (
    "nvidia[0-9]*",
    "nvidiactl",
    "nvidia-uvm",
    "nvidia-uvm-tools",
    "nvidia-modeset",
    "nvidia-caps/nvidia-cap*",
    "dxg",
)
SM_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU."""

    name: str
    memory_gb: float
    sms: int  # streaming multiprocessors


def mlx_has_cuda() -> bool:
    """Whether MLX is installed for NVIDIA GPUs."""
    import importlib.metadata  # slow to import, and the guard does not need it

    return any(found for wheel in CUDA_WHEELS for found in importlib.metadata.distributions(name=wheel))


def nodes(folder: Path = Path("/dev")) -> list[Path]:
    """The device files that an experiment needs: those of NVIDIA GPUs, and none if MLX does not use them."""
    return sorted(path for pattern in NODES for path in folder.glob(pattern)) if mlx_has_cuda() else []


def nvidia(library: str = DRIVER) -> Card | None:
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
