"""`make setup` chooses between the CPU and an NVIDIA GPU; what it would run is shown, not run."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
LOCKS = ("requirements.txt", "requirements-cuda.txt")
linux = pytest.mark.skipif(os.uname().sysname != "Linux", reason="CUDA is for Linux")


@pytest.fixture
def folder(tmp_path):
    """A fresh clone, as far as `make setup` looks at it."""
    for name in ("Makefile", *LOCKS):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def planned(folder: Path, *variables: str, driver: str = "") -> subprocess.CompletedProcess:
    """`make -n setup` where nvidia-smi reports this driver, "" for none."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if driver:
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{driver}\n")
        (programs / "nvidia-smi").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "BACKEND"} | {
        "PATH": f"{programs}:{os.environ['PATH']}"
    }
    return subprocess.run(["make", "-n", "setup", *variables], cwd=folder, env=env, capture_output=True, text=True)


def lock(planned: subprocess.CompletedProcess) -> set[str]:
    assert planned.returncode == 0, planned.stderr
    return set(re.findall(r"-r (\S+?\.txt)", planned.stdout))


@linux
@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("", "requirements.txt"),
        ("echo 580.105.08", "requirements-cuda.txt"),
        ("echo 580.65.06; echo 580.65.06", "requirements-cuda.txt"),  # two GPUs
        ("echo 575.57.08", "requirements.txt"),  # too old for CUDA 13
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
            "requirements.txt",
        ),
        ("exit 127", "requirements.txt"),
    ],
)
def test_cuda_is_chosen_where_the_driver_is_new_enough(folder, driver, expected):
    assert lock(planned(folder, driver=driver)) == {expected}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backend_decides_whatever_is_found(folder, backend):
    expected = {"cpu": "requirements.txt", "cuda": "requirements-cuda.txt"}[backend]
    assert lock(planned(folder, f"BACKEND={backend}", driver="echo 580.105.08")) == {expected}


def test_another_backend_is_refused(folder):
    done = planned(folder, "BACKEND=rocm")
    assert done.returncode == 2
    assert "BACKEND must be cpu or cuda, not rocm" in done.stderr


@pytest.mark.parametrize(("stamp", "backend"), [(".ready", "cpu"), (".ready-cuda", "cuda")])
def test_what_was_set_up_stays(folder, stamp, backend):
    """Whatever the driver is now; only BACKEND changes it, and then in a new environment."""
    (folder / ".venv").mkdir()
    (folder / ".venv" / stamp).touch()
    found = "echo 580.105.08" if backend == "cpu" else ""
    assert "Nothing to be done" in planned(folder, driver=found).stdout
    other = "cuda" if backend == "cpu" else "cpu"
    assert f"if [ -e .venv/{stamp} ]; then rm -rf .venv; fi" in planned(folder, f"BACKEND={other}").stdout


def pinned(name: str) -> dict[str, set[str]]:
    """Package -> its versions in a lock."""
    versions: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.M):
        versions.setdefault(package, set()).add(version)
    return versions


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_hashes(name):
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
        assert re.search(r"\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_locks_differ_in_the_backend_alone():
    cpu, cuda = map(pinned, LOCKS)
    only_cpu, only_cuda = cpu.keys() - cuda.keys(), cuda.keys() - cpu.keys()
    assert only_cpu == {"mlx-cpu", "ngsolve-openblas"}
    assert {name for name in only_cuda if not name.startswith("nvidia-")} == {"mlx-cuda-13"}
    assert {"nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-cublas"} <= only_cuda
    assert all(cpu[name] == cuda[name] for name in cpu.keys() & cuda.keys())
    assert cpu["mlx"] == cuda["mlx-cuda-13"] == cpu["mlx-cpu"]


def test_the_locks_are_of_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, extra in zip(LOCKS, ("cpu", "cuda"), strict=True):
        asked = [*project["dependencies"], *extras["dev"], *extras[extra]]
        assert {re.match(r"[\w-]+", one)[0] for one in asked} <= pinned(name).keys()
        for package, version in re.findall(r"^([\w-]+)(?:\[\w+\])?==([\d.]+)", "\n".join(asked), re.M):
            assert pinned(name)[package] == {version}
