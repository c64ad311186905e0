"""What the sandboxes let through for an NVIDIA GPU: with the names of its device files, and with real devices in their
place. On an H100 MLX computes in Landlock with these rules; bubblewrap was not installed there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.machine import device
from lab.trial import sandbox
from lab.trial.landlock import IOCTL, READ, READ_FILE, TRUNCATE, WRITE_FILE, grants
from lab.trial.sandbox import Policy

# /dev of a machine with two cards and slices of them, and its other files.
CARDS = (
    "nvidia0",
    "nvidia1",
    "nvidiactl",
    "nvidia-modeset",
    "nvidia-uvm",
    "nvidia-uvm-tools",
    "nvidia-caps/nvidia-cap1",
)
OTHERS = ("null", "kmsg", "mem", "sda", "dri/renderD128", "fuse", "nvidia-caps-imex-channels/channel0", "nvme0")
FUSE = Path("/dev/fuse")  # a device that anybody may open and no sandbox grants


@pytest.fixture
def machine(tmp_path, monkeypatch):
    for name in (*CARDS, *OTHERS):
        (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / name).touch()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(device, "mlx_has_cuda", lambda: True)
    return tmp_path


def test_only_the_files_of_nvidia_gpus_are_devices(machine):
    assert {str(path.relative_to(machine / "dev")) for path in device.nodes(machine / "dev")} == set(CARDS)


def test_without_cuda_no_device_is_let_through(machine, monkeypatch):
    monkeypatch.setattr(device, "mlx_has_cuda", lambda: False)
    assert device.nodes(machine / "dev") == []


def rules(machine: Path, kind: str, monkeypatch) -> list[str]:
    found = device.nodes(machine / "dev")
    monkeypatch.setattr(device, "nodes", lambda: found)
    return sandbox.wrap(["python"], Policy((machine / "run",)), kind)


def test_bubblewrap_binds_them_as_devices_over_its_own_dev(machine, monkeypatch):
    words = rules(machine, "bubblewrap", monkeypatch)
    bound = [words[index + 1 : index + 3] for index, word in enumerate(words) if word == "--dev-bind"]
    assert sorted(bound) == [[str(path)] * 2 for path in device.nodes()]
    assert words.index("--dev-bind") > words.index("--dev")
    assert words.index("--dev-bind") < words.index("--remount-ro")


def test_landlock_grants_use_of_them_and_names_of_threads(machine, monkeypatch):
    encoded = next(word for word in rules(machine, "landlock", monkeypatch) if word.startswith("[["))
    granted = list(grants([(Path(path), mode) for path, mode in json.loads(encoded)]))
    cards = [(path, rights) for path, rights in granted if (machine / "dev") in path.parents]
    assert sorted(cards) == [(path, READ_FILE | WRITE_FILE | IOCTL) for path in device.nodes()]
    assert (Path("/proc/self/task"), READ | WRITE_FILE | TRUNCATE) in granted
    assert [rights for path, rights in granted if path == Path("/proc")] == [READ]


def test_without_a_card_threads_keep_their_names():
    assert Path("/proc/self/task") not in dict(grants([(Path("/usr"), "read")]))


CHILD = """
import os, threading
def attempt(action):
    try:
        action()
        return "yes"
    except OSError:
        return "no"
def rename():
    open(f"/proc/self/task/{threading.get_native_id()}/comm", "w").write("cuda")
answers = [attempt(lambda: os.close(os.open("/dev/fuse", os.O_RDWR)))]
thread = threading.Thread(target=lambda: answers.append(attempt(rename)))
thread.start(); thread.join()
answers.append(attempt(lambda: open("/proc/1/comm", "w").write("x")))
answers.append(attempt(lambda: os.close(os.open("/dev/kmsg", os.O_RDONLY))))
print(*answers)
"""


@pytest.mark.skipif(not os.access(FUSE, os.R_OK | os.W_OK), reason="no /dev/fuse")
@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
@pytest.mark.parametrize("granted", [True, False])
def test_a_child_uses_the_device_that_is_let_through_and_no_other(tmp_path, monkeypatch, kind, granted):
    if fault := sandbox.self_test(kind):
        pytest.skip(f"{kind} does not work here: {fault}")
    monkeypatch.setattr(device, "nodes", lambda: [FUSE] if granted else [])
    policy = Policy((tmp_path,))
    child = subprocess.run(
        sandbox.wrap([sys.executable, "-I", "-S", "-c", CHILD], policy, kind),
        env=sandbox.environment(os.environ, policy), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    opened, renamed, *others = child.stdout.split()
    assert opened == ("yes" if granted else "no"), child.stderr
    assert renamed == "yes" or not granted
    assert others[1] == "no"
    if kind == "landlock":  # in bubblewrap process 1 is its own
        assert others[0] == "no"


SOCKETS = """
import socket
for family in (socket.AF_UNIX, socket.AF_INET):
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            socket.socket(family, kind).close()
            print(family.name, kind.name)
        except PermissionError:
            pass
        except OSError:  # the internet has no such kind
            print(family.name, kind.name)
"""


@pytest.mark.parametrize(("granted", "allowed"), [(True, ["AF_UNIX SOCK_SEQPACKET"]), (False, [])])
def test_landlock_allows_a_local_socket_of_packets_with_a_gpu(tmp_path, monkeypatch, granted, allowed):
    """The driver does not start without one: CUDA error 304 on an H100, and none with it."""
    if fault := sandbox.self_test("landlock"):
        pytest.skip(f"landlock does not work here: {fault}")
    monkeypatch.setattr(device, "nodes", lambda: [Path("/dev/null")] if granted else [])
    policy = Policy((tmp_path,))
    child = subprocess.run(
        sandbox.wrap([sys.executable, "-I", "-S", "-c", SOCKETS], policy, "landlock"),
        env=sandbox.environment(os.environ, policy), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (child.stderr, child.stdout.splitlines()) == ("", allowed)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("status", "fault"), [(0, False), (304, True)])
def test_the_self_test_opens_the_gpu(tmp_path, monkeypatch, status, fault):
    """CUDA error 304 is what the driver reports where it cannot name its threads or open a local socket."""
    (tmp_path / "cuda.c").write_text(f"int cuInit(unsigned flags) {{ return {status}; }}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "cuda.so", tmp_path / "cuda.c"], check=True)
    monkeypatch.setattr(device, "DRIVER", str(tmp_path / "cuda.so"))
    monkeypatch.setattr(device, "nodes", lambda: [Path("/dev/null")])
    sandbox.self_test.cache_clear()
    said = sandbox.self_test("none")
    sandbox.self_test.cache_clear()
    assert ("cannot use the GPU (CUDA error 304)" in said) == fault


def test_kernel_caches_are_those_of_the_child(tmp_path):
    given = {
        "MLX_PTX_CACHE_DIR": "/home/u/ptx",
        "CUDA_CACHE_PATH": "/home/u/.nv",
        "CUDA_VISIBLE_DEVICES": "1",
        "TMPDIR": "/tmp",
    }
    assert sandbox.environment(given, Policy((tmp_path,))) == {
        "CUDA_VISIBLE_DEVICES": "1", "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
