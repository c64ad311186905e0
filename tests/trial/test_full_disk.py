"""A full disk: one clear error, no traceback, no experiment that counts as a crash; with free space the run works."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest
from checkout import MINUTES, Checkout
from conftest import refusal

from lab.trial import guard
from lab.trial.sandbox import Policy, available

NIGHT = ("agent_loop.py", "run", "--agent", "search", "--tag", "full", "--minutes", MINUTES, "--rigor", "none")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def small_disk(checkout, request):
    """A folder of the checkout on its own disk; a call with another size changes that."""
    folder = checkout.folder / request.param
    folder.mkdir(exist_ok=True)

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0

    if sys.platform != "linux" or not mount("-t", "tmpfs", "-o", "size=200k", "tmpfs"):
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", ["runs"], indirect=True)
def test_a_checkpoint_that_does_not_fit_is_one_error_and_leaves_nothing(checkout, small_disk):
    line = refusal(checkout.python("train.py", "--steps", 2, "-q", check=False))
    assert "No space left on device" in line
    assert list((checkout.folder / "runs").glob("*/*checkpoint*")) == []
    assert list((checkout.folder / "runs").glob("*/.checkpoint*")) == []
    assert small_disk("64m")
    assert "val_bpb:" in checkout.python("train.py", "--steps", 2, "-q").stdout
    used = int(subprocess.check_output(["du", "-sk", checkout.folder / "runs"]).split()[0])
    assert small_disk(f"{used + 50}k")
    assert "No space left on device" in refusal(checkout.python("prepare.py", "score", "runs/latest", check=False))


@pytest.mark.parametrize("left", ["0", "8k"])
@pytest.mark.parametrize("small_disk", ["printed"], indirect=True)
def test_a_log_that_does_not_fit_is_a_full_disk_and_not_a_killed_run(checkout, small_disk, left):
    run_dir = checkout.folder / "printed" / "run"
    assert small_disk("200k")
    run_dir.mkdir()
    with suppress(OSError):
        (checkout.folder / "printed" / "filler").write_bytes(bytes(1 << 20))
    if left != "0":
        os.truncate(checkout.folder / "printed" / "filler", 190 << 10)
    command = [sys.executable, "-S", "-c", "print('x' * 300_000)"]
    outcome = guard.run(command, run_dir, Policy((run_dir,)), guard.Limits(60, 1 << 30), sandbox="none")
    assert outcome.status == "disk"
    assert "No space left on device" in outcome.crash.message


@pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")
@pytest.mark.parametrize("small_disk", ["nights"], indirect=True)
def test_a_night_on_a_full_disk_ends_with_an_error_and_resumes_with_free_space(checkout, small_disk):
    assert small_disk("64m")
    checkout.python(*NIGHT, "--max-experiments", 0)
    used = int(subprocess.check_output(["du", "-sk", checkout.folder / "nights"]).split()[0])
    assert small_disk(f"{used + 200}k")  # room for the records of a run, not for another checkpoint
    done = checkout.python(*NIGHT, "--max-experiments", 1, check=False)
    assert (done.returncode, checkout.night("full").state.refused) == (1, 0)
    assert "error: the disk is full: " in done.stderr.splitlines()[-1], done.stderr
    assert small_disk("64m")
    checkout.python(*NIGHT, "--max-experiments", 1)
    assert checkout.night("full").state.counts()["crash"] == 0
