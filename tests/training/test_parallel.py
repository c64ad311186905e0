"""Data-parallel training: the same losses as one process, and an error when a process dies."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import Checkout

from lab.training.parallel import PIECE

STEPS = 5
CLOSE = (
    1e-3  # relative; sums in another order: orthogonalising makes the rounding of small gradients large, 4e-4 measured
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("parallel"))


def train(checkout: Checkout, name: str, processes: int, *launcher: str, script="train.py", rows=8, **model: int):
    """A run of STEPS steps of 512 tokens, then 1,024, in which every process takes its share; (process, its folder)."""
    settings = json.loads((checkout.cache / "current.json").read_text())
    settings["preset"]["batch"] = {"rows": rows, "tokens_per_step": 512, "processes": processes, "doubling": 0.35}
    settings["preset"]["model"] |= model
    path, folder = checkout.cache / f"{name}.json", checkout.cache / name
    path.write_text(json.dumps(settings))
    where = checkout.where()
    where["env"] |= {"AUTORESEARCH_SETTINGS": str(path)}
    command = [*launcher, sys.executable, script, "--steps", str(STEPS), "--run-dir", str(folder)]
    done = subprocess.run(command, **where, capture_output=True, text=True, timeout=120)
    return done, folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(checkout):
    done, folder = train(checkout, "alone", 1)
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_have_the_losses_of_one(checkout, alone, processes):
    done, folder = train(checkout, f"of{processes}", processes, rows=8 // processes)
    assert done.returncode == 0, done.stderr
    assert len(alone) == STEPS
    assert losses(folder) == pytest.approx(alone, rel=CLOSE)
    assert done.stdout.count("val_bpb:") == 1  # one of them speaks
    assert json.loads((folder / "result.json").read_text())["processes"] == processes


def test_a_model_of_many_messages_has_the_same_losses(checkout):
    assert 4 * PIECE < 12 * 256**2  # of gradients; of orthogonalised matrices as many
    (whole, alone), (done, shared) = (train(checkout, f"wide{n}", n, rows=8 // n, width=256, depth=1) for n in (1, 2))
    assert whole.returncode == done.returncode == 0, whole.stderr + done.stderr
    assert losses(shared) == pytest.approx(losses(alone), rel=CLOSE)


def test_passes_and_processes_go_together(checkout, alone):
    done, folder = train(checkout, "passes", 2, rows=2)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(alone, rel=CLOSE)


def test_mlx_launch_has_the_losses_of_one(checkout, alone):
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring", "--"]
    done, folder = train(checkout, "launch", 1, *launcher, rows=4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == pytest.approx(alone, rel=CLOSE)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("way", ["os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_a_dead_process_ends_the_run_with_one_clear_line(checkout, number, way):
    source = (checkout.folder / "train.py").read_text()
    source = source.replace("    for number in run.clock:\n", "    for number in run.clock:\n        die(number)\n")
    die = f"import os\ndef die(step):\n    if step == 2 and os.environ['MLX_RANK'] == '{number}':\n        {way}\n\n\n"
    source = source.replace("def main(run)", die + "def main(run)")
    script = f"dies{number}.py"
    (checkout.folder / script).write_text(source)
    begun = time.monotonic()
    done, folder = train(checkout, f"dead{number}", 2, script=script, rows=4)
    (checkout.folder / script).unlink()
    assert time.monotonic() - begun < 60
    assert done.returncode not in (0, -9)
    if number or "kill" in way:
        end = "was killed by SIGKILL; free memory" if "kill" in way else "failed with exit status 3; its error"
        assert f"error: process {number} of 2 {end}" in done.stderr
    assert not (folder / "checkpoint.safetensors").exists()
    assert not [line for line in command_lines() if str(folder) in line]


@pytest.mark.parametrize(("processes", "rows"), [(2, 16), (1, 3)])
def test_rows_that_do_not_divide_a_step_are_refused(checkout, processes, rows):
    source = (checkout.folder / "train.py").read_text()
    script = f"rows{rows}.py"
    (checkout.folder / script).write_text(source.replace("ROWS = SETTINGS.rows", f"ROWS = {rows}"))
    done, _ = train(checkout, f"rows{rows}", processes, script=script, rows=4)
    (checkout.folder / script).unlink()
    assert done.returncode == 1
    assert re.search(rf"error: 512 tokens per step are not a multiple of the \d+ per pass \({rows} rows", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_failure_of_rank_0_is_the_only_error_printed(checkout):
    source = (checkout.folder / "train.py").read_text()
    script = "diverges.py"
    (checkout.folder / script).write_text(source.replace("loss.item(), tokens", "float('nan'), tokens"))
    done, _ = train(checkout, "diverged", 2, script=script, rows=4)
    (checkout.folder / script).unlink()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[ring]")]  # MLX's own
    assert errors == ["error: the run diverged: the loss is nan at step 0; lower the learning rates"]


def command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(os.getpid()) not in line]
