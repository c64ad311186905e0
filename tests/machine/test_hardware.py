import json
import os
import platform
import subprocess
import sys
import time

import pytest

from lab import preset
from lab.machine import device, hardware


def displays(model: str, cores: str | None, *more: dict) -> str:
    """What `system_profiler SPDisplaysDataType -json` prints on a Mac of Apple's own chips."""
    gpu = {
        "_name": "kHW_" + model.replace(" ", "") + "Item",
        "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
        "spdisplays_ndrvs": [
            {
                "_name": "Color LCD",
                "_spdisplays_display-product-id": "a045",
                "_spdisplays_displayID": "1",
                "_spdisplays_pixels": "2560 x 1600",
                "_spdisplays_resolution": "1440 x 900 @ 60.00Hz",
                "spdisplays_connection_type": "spdisplays_internal",
                "spdisplays_main": "spdisplays_yes",
                "spdisplays_online": "spdisplays_yes",
            }
        ],
        "spdisplays_vendor": "sppci_vendor_Apple",
        "sppci_bus": "spdisplays_builtin",
        "sppci_cores": cores,
        "sppci_device_type": "spdisplays_gpu",
        "sppci_model": model,
    }
    return json.dumps({"SPDisplaysDataType": [{k: v for k, v in gpu.items() if v is not None}, *more]}, indent=2)


INTEL = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "kHW_IntelUHDGraphics630Item",
      "_spdisplays_vram" : "1536 MB",
      "spdisplays_device-id" : "0x3e9b",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_vendor" : "Intel",
      "spdisplays_vram_shared" : "1536 MB",
      "sppci_bus" : "spdisplays_builtin",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Intel UHD Graphics 630"
    },
    {
      "_name" : "kHW_AMDRadeonPro5300MItem",
      "spdisplays_device-id" : "0x7340",
      "spdisplays_vendor" : "sppci_vendor_amd",
      "spdisplays_vram" : "4 GB",
      "sppci_bus" : "spdisplays_pcie_device",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "AMD Radeon Pro 5300M"
    }
  ]
}"""


# `ioreg -rc AGXAccelerator -d1`: head and properties of an M1 Pro in exelban/stats#1094, the count's form in #3047.
IOREG = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x10000087c, registered, matched, active, busy 0>
    {
      "IOMatchedAtBoot" = Yes
      "vendor-id" = <6b100000>
      "IONameMatched" = "gpu,t6000"
      "PerformanceStatistics" = {"TiledSceneBytes"=1572864,"Alloc system memory"=1214005248,"recoveryCount"=0}
      "gpu-core-count" = 16
    }
"""
FAILS = subprocess.CalledProcessError(1, "command")
HANGS = subprocess.TimeoutExpired("system_profiler", 20)


class Mac:
    """Prints what the three commands print on a Mac, or fails, and remembers what was asked."""

    def __init__(self, sysctl: str | Exception, profile: str | Exception, ioreg: str | Exception = ""):
        self.answers = {"sysctl": sysctl, "system_profiler": profile, "ioreg": ioreg}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *command: str) -> str:
        self.asked.append(command)
        if isinstance(answer := self.answers[command[0]], Exception):
            raise answer
        return answer


M1 = Mac("Apple M1\n8589934592\n8\n", displays("Apple M1", "7"))
M4_MAX = Mac("Apple M4 Max\n137438953472\n16\n", displays("Apple M4 Max", "40"))


def as_on_a_mac(monkeypatch, mac: Mac, processor: str = "arm64") -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.3.1", ("", "", ""), processor))
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(hardware, "output", mac)
    hardware.describe.cache_clear()


@pytest.fixture(autouse=True)
def forgotten():
    """What was read of a made-up machine."""
    yield
    hardware.describe.cache_clear()


@pytest.mark.parametrize(
    ("mac", "chip", "memory", "cpu", "gpu"),
    [(M1, "Apple M1", 8.0, 8, 7), (M4_MAX, "Apple M4 Max", 128.0, 16, 40)],
    ids=["M1", "M4 Max"],
)
def test_an_apple_chip_is_read_from_the_systems_own_words(monkeypatch, mac, chip, memory, cpu, gpu):
    as_on_a_mac(monkeypatch, mac)
    assert hardware.describe() == {
        "chip": chip, "memory_gb": memory, "cpu_cores": cpu, "gpu_cores": gpu, "gpu_memory_gb": memory,
        "os": "macOS 15.3.1", "backend": "metal",
    }  # fmt: skip
    assert hardware.hardware() == preset.Hardware("metal", memory, gpu, memory)


def test_these_commands_are_run_once_in_a_process(monkeypatch):
    mac = Mac(M1.answers["sysctl"], M1.answers["system_profiler"])
    as_on_a_mac(monkeypatch, mac)
    facts = hardware.describe()
    mac.answers = dict.fromkeys(mac.answers, HANGS)  # in the middle of a night
    assert hardware.describe() == facts
    assert hardware.hardware() == preset.Hardware("metal", 8.0, 7, 8.0)
    assert mac.asked == [
        ("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize", "hw.ncpu"),
        ("ioreg", "-rc", "AGXAccelerator", "-d1"),
        ("system_profiler", "SPDisplaysDataType", "-json"),
    ]


M1_MAX = "Apple M1 Max\n34359738368\n10\n"
PRO = displays("Apple M3 Pro", "14").replace("kHW_AppleM3ProItem", "Apple M3 Pro")  # timmo001/system-bridge#3408
NAMELESS = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "spdisplays_display",
      "spdisplays_device-id" : "0x1111",
      "spdisplays_ndrvs" : [ { "_name" : "Unknown Display", "_spdisplays_pixels" : "1920 x 1080" } ]
    }
  ]
}"""  # QEMU's Bochs adapter, from a comment in a public Go program
RECORDED = {  # sysctl, system_profiler, ioreg -> GPU cores
    "ioreg": (M1_MAX, HANGS, IOREG, 16),
    "no ioreg": (M1_MAX, displays("Apple M1 Max", "32"), FileNotFoundError("ioreg"), 32),
    "M3 Pro, macOS 15": ("Apple M3 Pro\n19327352832\n11\n", PRO, "", 14),
    "GitHub's virtual Mac": ("Apple M1 (Virtual)\n7516192768\n3\n", "", "", 0),  # modular/rules_mojo#56: empty
    "virtual, as JSON": ("Apple M1 (Virtual)\n7516192768\n3\n", '{\n  "SPDisplaysDataType" : [\n\n  ]\n}', "", 0),
    "developer kit": ("Apple processor\n17179869184\n8\n", displays("Apple A12Z", None), "", 0),  # archspec#38
    "QEMU": ("Apple M2\n8589934592\n4\n", NAMELESS, "", 0),
    "profiler hangs": (M1_MAX, HANGS, FAILS, 0),
    "profiler is cut": (M1_MAX, displays("Apple M1", "8")[:40], "", 0),
    "a word for a number": (M1_MAX, displays("Apple M1", "eight"), '"gpu-core-count" = <08>', 0),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_mac_is_described(monkeypatch, name):
    sysctl, profile, ioreg, cores = RECORDED[name]
    as_on_a_mac(monkeypatch, Mac(sysctl, profile, ioreg))
    facts = hardware.describe()
    assert (facts["chip"], facts["gpu_cores"]) == (sysctl.splitlines()[0], cores)
    assert facts["memory_gb"] * 2**30 == int(sysctl.splitlines()[1])
    assert facts["backend"] == ("metal" if cores else "cpu")


@pytest.mark.parametrize("sysctl", [FAILS, HANGS, "", "Apple M1\n", "\n\n\n", "Apple M1\n8 GB\n8\n"], ids=repr)
def test_a_mac_that_says_nothing_is_described_by_what_python_knows(monkeypatch, sysctl):
    as_on_a_mac(monkeypatch, Mac(sysctl, FAILS, IOREG))
    facts = hardware.describe()
    assert (facts["chip"], facts["cpu_cores"], facts["gpu_cores"]) == ("arm64", os.cpu_count(), 16)
    assert facts["memory_gb"] > 0.1


def test_the_macs_get_the_tiers_made_for_them(monkeypatch):
    offline = preset.load("offline")
    as_on_a_mac(monkeypatch, M1)
    small, words = preset.adapt(offline, hardware.hardware())
    assert "memory_gb [0, 12]" in words
    as_on_a_mac(monkeypatch, M4_MAX)
    large, words = preset.adapt(offline, hardware.hardware())
    assert "gpu_cores [24, 48]" in words
    assert large.model.width > small.model.width
    assert large.model.dtype == small.model.dtype == "bfloat16"


def test_an_intel_mac_has_no_metal_backend(monkeypatch):
    as_on_a_mac(monkeypatch, Mac("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz\n17179869184\n12\n", INTEL), "x86_64")
    facts = hardware.describe()
    assert (facts["backend"], facts["gpu_cores"], facts["memory_gb"], facts["cpu_cores"]) == ("cpu", 0, 16.0, 12)


def test_under_rosetta_there_is_no_metal_backend(monkeypatch):
    as_on_a_mac(monkeypatch, Mac("VirtualApple @ 2.50GHz\n17179869184\n8\n", displays("Apple M1", "8")), "x86_64")
    assert hardware.hardware() == preset.Hardware("cpu", 16.0, 0)


def test_a_display_adapter_without_cores_beside_the_gpu_is_passed_over(monkeypatch):
    profile = displays("Apple M2 Ultra", "76", {"_name": "DisplayLink", "sppci_model": "DisplayLink"})
    as_on_a_mac(monkeypatch, Mac("Apple M2 Ultra\n206158430208\n24\n", profile))
    assert hardware.hardware() == preset.Hardware("metal", 192.0, 76, 192.0)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_linux_facts_are_those_of_this_machine():
    facts = hardware.describe()
    with open("/proc/meminfo", encoding="utf-8") as file:
        kilobytes = int(file.readline().split()[1])
    assert facts["memory_gb"] == pytest.approx(kilobytes / 2**20, rel=0.05)
    assert facts["cpu_cores"] == len(os.sched_getaffinity(0))
    assert facts["chip"]
    assert (facts["backend"], facts["gpu_cores"]) == ("cpu", 0)
    assert facts["os"].startswith("Linux ")
    assert hardware.hardware() == preset.Hardware("cpu", facts["memory_gb"], 0)


def test_the_matmul_peak_and_the_memory_it_took_are_real():
    peak = hardware.matmul_peak("float32", repeats=2)
    assert 1e8 < peak < 1e15
    assert hardware.peak_memory_mb() >= 3 * 4 * device.MATMUL_SIZE["cpu"] ** 2 / 2**20


def test_the_clock_that_counts_sleep_runs_at_the_same_speed():
    awake, all_along = time.perf_counter(), hardware.seconds_with_sleep()
    time.sleep(0.05)
    assert hardware.seconds_with_sleep() - all_along == pytest.approx(time.perf_counter() - awake, abs=0.01)


def test_what_other_programs_take_of_the_processors_is_seen():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.5)  # until all of them have started
        assert 0.4 < hardware.taken() < 1
    finally:
        for program in busy:
            program.kill()
            program.wait()
