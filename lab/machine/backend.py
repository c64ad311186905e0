"""The only module that imports MLX, after loading a fast BLAS for it.

On Linux the mlx wheel contains the reference BLAS (4 GFLOPS on two cores where OpenBLAS reaches 150). A library in the
global namespace before mlx is loaded replaces it, so OpenBLAS is loaded first. On macOS MLX uses Metal and Accelerate,
on an NVIDIA GPU cuBLAS, and nothing is done here. Importing this module does both; all other modules import `mx` and
`nn` from it, and `KIND`, the device that MLX computes on in this process: "cpu", "metal" or "cuda".
"""

import ctypes
import errno
import glob
import importlib.util
import mmap
import os
import platform
from pathlib import Path

from lab import quota
from lab.machine.device import MEMORY_SHARE

HEAP = 2**30  # bytes
HUGE_PAGE = 2**21


def _load_gfortran(mlx_libraries: Path) -> None:
    """OpenBLAS needs libgfortran.so.5. If the system has none, load the copy in the mlx wheel, which differs only in
    the name stored in it, from memory under the name that OpenBLAS needs."""
    try:
        ctypes.CDLL("libgfortran.so.5", mode=ctypes.RTLD_GLOBAL)
        return
    except OSError:
        [quadmath] = glob.glob(str(mlx_libraries / "libquadmath*"))
        [gfortran] = glob.glob(str(mlx_libraries / "libgfortran*"))
    ctypes.CDLL(quadmath, mode=ctypes.RTLD_GLOBAL)
    bundled = os.path.basename(gfortran).encode()
    library = Path(gfortran).read_bytes().replace(bundled, b"libgfortran.so.5".ljust(len(bundled), b"\0"))
    with open(os.memfd_create("libgfortran.so.5"), "wb", closefd=False) as file:
        file.write(library)
        ctypes.CDLL(f"/proc/self/fd/{file.fileno()}", mode=ctypes.RTLD_GLOBAL)


def _load_blas() -> str:
    """Load OpenBLAS for MLX's CPU backend. Returns a description of the library that multiplies matrices."""
    if platform.system() != "Linux":
        return "Accelerate"
    spec = importlib.util.find_spec("ngsolve_openblas")
    if spec is None or spec.origin is None:
        return "reference BLAS (slow: no OpenBLAS package for this processor)"
    libraries = Path(spec.origin).parent.parent / "mlx_cpu.libs"
    if not libraries.is_dir():
        return "cuBLAS"
    _load_gfortran(libraries)
    # Idle BLAS threads spin for 2^n cycles; the default, 26, takes a core from everything between two products.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "8")
    [library] = glob.glob(str(Path(spec.origin).parent / "libopenblas*.so*"))
    blas = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    blas.openblas_set_num_threads(min(blas.openblas_get_num_threads(), quota.cores()))  # it knows no quotas
    return f"OpenBLAS ({Path(library).name})"


def _keep_memory() -> None:
    """Make glibc keep freed memory. By default every large array of every step is new pages from the kernel, and the
    first access to them costs more than the arithmetic (51,000 page faults per step of tinystories; with this, 5,600).
    The first HEAP bytes are huge pages, if the kernel has them."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in (  # numbers of malloc.h
        (-4, 0),  # M_MMAP_MAX: large arrays come from the heap too
        (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: freed memory stays
        (-2, 2**28),  # M_TOP_PAD: the heap grows by 256 MB
        (-8, 1),  # M_ARENA_MAX: one heap for all threads
    ):
        libc.mallopt(option, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(HEAP):  # never accessed: this only moves the end of the heap
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(start, block + HEAP - start, mmap.MADV_HUGEPAGE)
        libc.free(block)


BLAS = _load_blas()
_keep_memory()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402


def _kind() -> str:
    """MLX built for CUDA calls CUDA available on machines without a GPU too."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() and mx.device_count(mx.gpu) else "cpu"


KIND = _kind()
GPU = KIND != "cpu"
if KIND == "cuda":  # beyond it MLX frees its cache and waits for kernels, where it would else run out of memory
    mx.set_memory_limit(int(MEMORY_SHARE[KIND] * mx.device_info()["total_memory"]))
if not GPU:  # also where MLX is built for CUDA and no GPU is there
    mx.set_default_device(mx.cpu)

__all__ = ["BLAS", "GPU", "KIND", "mx", "nn", "save", "tree_flatten", "tree_map", "tree_unflatten"]


def save(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file. Raises OSError where MLX has a RuntimeError, and leaves no part of the file then."""
    open(path, "wb").close()  # says why it cannot be opened
    try:
        mx.save_safetensors(str(path), arrays)
    except RuntimeError as error:
        path.unlink()
        if not str(error).startswith("[write]"):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
