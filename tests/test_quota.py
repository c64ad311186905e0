"""Quotas of containers: recorded trees of control groups, and a real group where this machine allows one."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import quota

GB = 2**30
V2_MOUNT = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "{number} 31 0:{number} {root} /sys/fs/cgroup/{name} ro,nosuid master:9 - cgroup cgroup rw,{name}\n"
UNLIMITED_V1 = "9223372036854771712\n"


def v2(group: str, root: str = "/", **files: str) -> dict[str, str]:
    """The files of a machine with the unified hierarchy; `files`: name with __ for / and _ for . -> content."""
    return {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": V2_MOUNT.format(root=root), **files}


def v1(groups: dict[str, str], root: str = "/") -> dict[str, str]:
    names = list(groups)
    lines = [f"{number}:{name}:{group}\n" for number, (name, group) in enumerate(groups.items(), 2)]
    mounts = [V1_MOUNT.format(number=32 + at, name=name, root=root) for at, name in enumerate(names)]
    return {
        "proc/self/cgroup": "".join([*lines, "1:name=systemd:/x\n", "0::/\n"]),
        "proc/self/mountinfo": "".join(mounts),
    }


CG = "sys/fs/cgroup"
# As recorded, shortened: Docker 28 and Podman 5 with --cpus and --memory, Kubernetes 1.31, a systemd slice, SLURM, LXC.
TREES = {
    "bare metal": ({}, math.inf, math.inf),
    "no limit (v2)": (
        v2("/user.slice/user-1000.slice/session-2.scope") | {
            f"{CG}/user.slice/cpu.max": "max 100000\n", f"{CG}/user.slice/memory.max": "max\n",
            f"{CG}/user.slice/user-1000.slice/memory.high": "max\n"},
        math.inf, math.inf),
    "docker (v2, own namespace)": (
        v2("/") | {f"{CG}/cpu.max": "150000 100000\n", f"{CG}/memory.max": f"{2 * GB}\n", f"{CG}/memory.high": "max\n"},
        1.5, 2 * GB),
    "podman (v2, memory.high)": (
        v2("/") | {f"{CG}/cpu.max": "max 100000\n", f"{CG}/memory.max": f"{8 * GB}\n",
                   f"{CG}/memory.high": f"{6 * GB}\n"},
        math.inf, 6 * GB),
    "kubernetes (v2, host's namespace)": (
        v2("/kubepods.slice/pod1.slice/cri-1.scope", "/kubepods.slice/pod1.slice/cri-1.scope")
        | {f"{CG}/cpu.max": "50000 100000\n", f"{CG}/memory.max": f"{GB}\n"},
        0.5, GB),
    "systemd slice above (v2)": (
        v2("/user.slice/user-1000.slice/app.scope") | {
            f"{CG}/user.slice/user-1000.slice/cpu.max": "300000 100000\n",
            f"{CG}/user.slice/user-1000.slice/app.scope/cpu.max": "max 100000\n",
            f"{CG}/user.slice/memory.max": f"{4 * GB}\n",
            f"{CG}/user.slice/user-1000.slice/app.scope/memory.max": f"{16 * GB}\n"},
        3.0, 4 * GB),
    "outside the namespace (v2)": (
        v2("/../../other") | {f"{CG}/cpu.max": "200000 100000\n", f"{CG}/memory.max": f"{GB}\n"}, 2.0, GB),
    "docker (v1, host's namespace)": (
        v1({"cpu,cpuacct": "/docker/1f", "memory": "/docker/1f"}, "/docker/1f") | {
            f"{CG}/cpu,cpuacct/cpu.cfs_quota_us": "250000\n", f"{CG}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            f"{CG}/memory/memory.limit_in_bytes": f"{3 * GB}\n"},
        2.5, 3 * GB),
    "slurm (v1)": (
        v1({"memory": "/slurm/uid_0/job_1", "cpu": "/"}) | {
            f"{CG}/cpu/cpu.cfs_quota_us": "-1\n", f"{CG}/cpu/cpu.cfs_period_us": "100000\n",
            f"{CG}/memory/memory.limit_in_bytes": UNLIMITED_V1,
            f"{CG}/memory/slurm/uid_0/memory.limit_in_bytes": UNLIMITED_V1,
            f"{CG}/memory/slurm/uid_0/job_1/memory.limit_in_bytes": f"{5 * GB}\n"},
        math.inf, 5 * GB),
    "hidden (masked /sys)": (v2("/docker/1f"), math.inf, math.inf),
    "damaged": (
        {"proc/self/cgroup": "nonsense\n0::/\n", "proc/self/mountinfo": "nonsense\n" + V2_MOUNT.format(root="/"),
         f"{CG}/cpu.max": "\n", f"{CG}/memory.max": "much\n"},
        math.inf, math.inf),
    "a mount with a blank in its path": (
        {"proc/self/cgroup": "0::/a\n",
         "proc/self/mountinfo": "29 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n",
         "my groups/a/memory.max": f"{GB}\n"},
        math.inf, GB),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_limits_are_read_from_the_control_groups(tmp_path, name):
    files, cpus, memory = TREES[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert quota.cpu_limit(tmp_path) == cpus
    assert quota.memory_limit(tmp_path) == (memory if memory < math.inf else pytest.approx(memory))


@contextmanager
def group(controller: str, **limits: object):
    """The folder of a real control group (version 1, as root) with these limits."""
    folder = Path("/sys/fs/cgroup", controller, f"autoresearch-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this machine allows no control group of version 1")
    try:
        for name, value in limits.items():
            (folder / f"{controller}.{name}").write_text(str(value))
        yield folder
    finally:
        folder.rmdir()


def inside(folder: Path, expression: str, setup: str = ""):
    """An expression's value in a process that has joined the group."""
    join = f"open('{folder}/cgroup.procs', 'w').write(str(os.getpid()))"
    code = f"import json, os, sys\nfrom lab.machine import hardware\n{join}\n{setup}\nprint(json.dumps({expression}))"
    env = {name: text for name, text in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=env))


def test_a_real_memory_limit_is_the_machines_memory():
    with group("memory", limit_in_bytes=GB) as folder:
        assert inside(folder, "hardware.describe()")["memory_gb"] == 1


def test_a_real_quota_is_the_number_of_cores_and_no_other_program():
    with group("cpu", cfs_period_us=100_000, cfs_quota_us=10_000) as folder:
        cores, share = inside(folder, "[hardware.describe()['cpu_cores'], hardware.taken()]")
    assert cores == 1
    assert share < 0.6  # 0.9 and more if the quota counted as another program, however busy the machine is


def test_a_real_set_of_cores_is_the_number_of_cores():
    with group("cpuset", mems=0, cpus=min(os.sched_getaffinity(0))) as folder:
        assert inside(folder, "hardware.describe()")["cpu_cores"] == 1


def test_blas_and_kernels_take_no_more_threads_than_the_quota_pays_for():
    setup = "from threadpoolctl import threadpool_info; from lab.training import kernels"
    blas = "next(l['num_threads'] for l in threadpool_info() if 'ngsolve' in l['filepath'])"
    with group("cpu", cfs_period_us=100_000, cfs_quota_us=90_000) as folder:
        assert inside(folder, f"[{blas}, kernels._threads()]", setup) == [1, 1]


def test_the_kernel_ends_the_training_and_not_the_loop_at_a_containers_memory_limit(tmp_path):
    setup = f"from pathlib import Path; from lab.trial import guard; here = Path('{tmp_path}')"
    hog = "[sys.executable, '-S', '-c', 'x = bytearray(1 << 30); print(len(x))']"
    run = f"guard.run({hog}, here, guard.Policy((here,)), guard.Limits(60, 4 << 30), sandbox='none').status"
    with group("memory", limit_in_bytes=200 << 20) as folder:
        assert inside(folder, run, setup) == "memory"
