"""benchmarks/gpu.py in small, on this CPU: that it works, not what a GPU does."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import gpu, gpu_parts
from benchmarks.bench import Stepper
from lab.errors import UserError
from lab.training import kernels as fused


def benchmark(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_table_of_all_parts_comes_last(tmp_path):
    done = benchmark("kernels", "cross-entropy", "step-tinystories", "rows", "--small", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not any("failed" in values for values in report.values()), report
    own = {"smear", "rotary norm", "without own", "relu squared"}
    assert set(report["kernels"]) == {"attention", "window", "cross-entropy", "cross-entropy in chunks"} | own
    assert all("(ok, " in value for value in report["kernels"].values())
    assert report["step-tinystories"]["tokens/s"] > 0
    assert report["step-tinystories"]["MFU %"] > 0
    assert "predicted" in report["rows"]["4 rows"]
    assert done.stdout.endswith(gpu.table(report) + "\n")


def test_a_wrong_gradient_is_too_far(monkeypatch):
    right = gpu_parts.error
    for name in ("GPU", "CHUNK_LOGITS"):  # the part sets them, for a process of its own
        monkeypatch.setattr(fused, name, getattr(fused, name))
    monkeypatch.setattr(gpu_parts, "error", lambda got, expected: right(1.1 * got, expected))
    assert all("TOO FAR" in value for value in gpu_parts.kernels(small=True).values())


def test_a_part_that_fails_or_hangs_does_not_end_the_others(tmp_path, monkeypatch):
    script = tmp_path / "gpu.py"
    monkeypatch.setattr(gpu, "__file__", str(script))
    script.write_text("import sys; print('lost'); sys.exit('RuntimeError: [metal::malloc] no')")
    assert gpu.run("rows", True, 20) == {"failed": "RuntimeError: [metal::malloc] no"}
    child = tmp_path / "child"
    script.write_text(
        f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); "
        "time.sleep(60)"
    )
    assert gpu.run("rows", True, 2) == {"failed": "not done in 2 s"}
    state = subprocess.run(["ps", "-o", "stat=", "-p", child.read_text()], capture_output=True, text=True).stdout
    assert state.strip()[:1] in ("", "Z")


def test_mlx_that_the_scorer_would_not_find_is_named(tmp_path, monkeypatch):
    gpu_parts.check_scorer(tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="not with PYTHONPATH"):
        gpu_parts.check_scorer(tmp_path)


def test_without_time_nothing_is_begun(tmp_path):
    done = benchmark("rows", "--minutes", "0.1", "--out", tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"rows": {"failed": "no time left"}}


def test_an_unknown_part_is_one_line():
    done = benchmark("row")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there is no part 'row'; choose from kernels" in done.stderr


def test_every_part_has_its_time():
    assert set(gpu.SECONDS) == set(gpu.PARTS)


@pytest.mark.parametrize("name", gpu_parts.SIZES)
def test_sizes_divide(name):
    for small in (True, False):
        size = gpu_parts.sizes(small)[name]
        assert size["tokens_per_step"] % (size["rows"] * size["sequence_length"]) == 0
        assert size["width"] % size["head_dim"] == 0


def test_the_kernels_of_a_trace_by_their_share():
    events = [
        {"cat": "kernel", "name": "product", "dur": 30.0},
        {"cat": "kernel", "name": "product", "dur": 50.0},
        {"cat": "gpu_memcpy", "name": "copy", "dur": 20.0},
        {"cat": "cpu_op", "name": "product", "dur": 1e6},
        {"ph": "M", "name": "process_name"},
    ]
    assert gpu_parts.kernel_shares(events, 0.5) == {
        "busy": "0.000 s of 0.500 s, 3 kernels",
        "1": "80.0 %, 2 x 40 us, product",
        "2": "20.0 %, 1 x 20 us, copy",
    }


def test_a_stepper_that_fails_says_so(capfd):
    with pytest.raises(UserError, match="the ours stepper failed with status 1; see its message above"):
        Stepper("ours", {"vocab": 300})
    assert "KeyError" in capfd.readouterr().err
