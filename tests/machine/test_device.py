"""NVIDIA GPUs as their driver describes them. The driver is made up; nothing here was run on a real one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lab import preset
from lab.machine import device, hardware

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# The functions of libcuda.so.1 that are called, with their signatures from cuda.h.
DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGet(int *device, int ordinal) { *device = 5; return DEVICE; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA H100", size); return device != 5; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 85045411840; return device != 5; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 132; return attribute != 16 || device != 5; }
"""


def driver(folder: Path, init: int = 0, device: int = 0) -> str:
    """A shared library with these results of cuInit and cuDeviceGet."""
    (folder / "cuda.c").write_text(DRIVER)
    library = folder / "libcuda.so.1"
    flags = [f"-DINIT={init}", f"-DDEVICE={device}", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(["cc", *flags, str(folder / "cuda.c")], check=True)
    return str(library)


@needs_compiler
def test_a_card_is_described_by_its_driver(tmp_path):
    assert device.nvidia(driver(tmp_path)) == device.Card("NVIDIA H100", 85045411840 / 2**30, 132)


@needs_compiler
@pytest.mark.parametrize("results", [{"init": 999}, {"init": 100}, {"device": 101}], ids=str)
def test_a_driver_without_a_usable_card_has_none(tmp_path, results):
    """CUDA_ERROR_UNKNOWN after a failed update; CUDA_ERROR_NO_DEVICE; CUDA_ERROR_INVALID_DEVICE."""
    assert device.nvidia(driver(tmp_path, **results)) is None


def test_without_a_driver_there_is_no_card(tmp_path):
    assert device.nvidia(str(tmp_path / "libcuda.so.1")) is None


@pytest.fixture
def with_card(monkeypatch):
    """A machine with an RTX 4090; MLX is still the one for the CPU."""
    monkeypatch.setattr(device, "nvidia", lambda: device.Card("NVIDIA GeForce RTX 4090", 23.99, 128))
    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    hardware.describe.cache_clear()
    yield
    hardware.describe.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's wheel for CUDA, as far as the package list shows it."""
    (folder / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    (folder / "mlx_cuda_13-0.32.4.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc")
def test_a_card_trains_if_mlx_is_installed_for_it(with_card, tmp_path, monkeypatch):
    assert hardware.hardware().backend == "cpu"
    install(tmp_path, monkeypatch)
    hardware.describe.cache_clear()
    facts = hardware.describe()
    assert (facts["chip"], facts["backend"]) == ("NVIDIA GeForce RTX 4090", "cuda")
    assert hardware.hardware() == preset.Hardware("cuda", facts["memory_gb"], 128, 23.99)
    assert hardware.training_memory_mb() == pytest.approx(0.8 * 23.99 * 1024)


def test_a_training_takes_half_of_a_machine_without_a_card():
    hardware.describe.cache_clear()
    assert hardware.training_memory_mb() == pytest.approx(512 * hardware.describe()["memory_gb"])
