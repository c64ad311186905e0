"""Compiled kernels that trainings of a night share, and those that they must not. On a machine without an NVIDIA GPU:
what MLX would compile is written by hand."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
from conftest import ROOT
from finished_run import prepare, record

from lab.machine import hardware
from lab.trial import runner
from lab.trial.runner import Runner

COMPILES = """
import os, sys
from pathlib import Path
folder = Path(os.environ["TMPDIR"], "mlx", "{version}", "ptx")
folder.mkdir(parents=True, exist_ok=True)
print("found", *sorted(path.name for path in folder.iterdir()))
{more}
sys.exit({status})
"""


def doing(more: str, status: int = 0) -> str:
    return COMPILES.format(version=version("mlx"), more=more, status=status)


def compiling(name: str) -> str:
    return doing(f'(folder / "{name}.ptx").write_text("{name}")')


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """On a machine whose GPU is said to be NVIDIA's."""
    machine = hardware.describe() | {"backend": "cuda"}
    monkeypatch.setattr(hardware, "describe", lambda: machine)
    return Runner(tmp_path / "night", ROOT, record(*prepare(["The cat sat."])), "none")


def found(at_work: Runner, source: str) -> list[str]:
    """The kernels that a training with this source started with."""
    at_work.preflight(source)
    log = (at_work.folder / "runs" / "preflight" / "run.log").read_text()
    return next(line for line in log.splitlines() if line.startswith("found")).split()[1:]


def test_a_training_starts_with_the_nights_first_kernels_and_its_own(at_work):
    assert found(at_work, compiling("first")) == []
    assert found(at_work, compiling("first")) == ["first.ptx"]
    assert found(at_work, compiling("second")) == ["first.ptx"]
    assert found(at_work, compiling("second")) == ["first.ptx", "second.ptx"]
    assert found(at_work, compiling("third")) == ["first.ptx"]  # nothing of another experiment's
    again = Runner(at_work.folder, ROOT, at_work.settings, "none")
    assert found(again, compiling("second")) == ["first.ptx", "second.ptx"]


def test_a_kernel_that_a_training_overwrites_stays_as_it_was(at_work):
    found(at_work, compiling("first"))
    found(at_work, doing('(folder / "first.ptx").write_text("bad")'))
    [kernel] = (at_work.folder / "kernels").rglob("*.ptx")
    assert kernel.read_text() == "first"


@pytest.mark.parametrize(
    "more",
    [
        '(folder / "link.ptx").symlink_to("/etc/passwd")',
        '(folder / "folder.ptx").mkdir()',
        'os.mkfifo(folder / "pipe.ptx")',
        'folder.rmdir(); folder.symlink_to("/etc")',
        "(folder / 'large.ptx').open('wb').truncate(1 << 30)",
    ],
)
def test_only_plain_files_of_a_sensible_size_are_kept(at_work, more):
    assert found(at_work, doing(more)) == []
    assert not list(at_work.folder.glob("kernels/*"))


def test_a_training_that_fails_leaves_no_kernels(at_work):
    """It may have been killed while one was written."""
    part = '(folder / "part.ptx").write_text("par")'
    assert found(at_work, doing(part, status=3)) == []
    assert not (at_work.folder / "kernels").exists()


def test_what_a_kill_left_half_way_is_gone_with_the_next_training(at_work):
    found(at_work, compiling("first"))
    found(at_work, compiling("second"))
    half = at_work.folder / "kernels" / "growing"
    half.mkdir()
    (half / "half.ptx").write_text("ha")
    assert found(at_work, compiling("third")) == ["first.ptx"]
    assert not half.exists()
    assert found(at_work, compiling("third")) == ["first.ptx", "third.ptx"]


def test_a_set_grows(at_work):
    found(at_work, compiling("first"))
    grows = doing('(folder / f"{len(list(folder.iterdir()))}.ptx").write_text("")')
    assert found(at_work, grows) == ["first.ptx"]
    assert found(at_work, grows) == ["1.ptx", "first.ptx"]
    assert found(at_work, grows) == ["1.ptx", "2.ptx", "first.ptx"]


def test_kernels_of_the_last_sources_stay(at_work):
    for name in ("first", *map(str, range(10))):
        found(at_work, compiling(name))
    assert {path.stem for path in at_work.folder.glob("kernels/*/*")} == {"first", *map(str, range(2, 10))}


def test_new_kernels_have_their_time_before_a_run_and_not_in_it(at_work, monkeypatch):
    at_work.folder.mkdir()
    (at_work.folder / runner.QUICKEST).write_text("5")
    usual = runner.STARTS * 5 + runner.SLACK_SECONDS
    assert at_work.start_limit() == usual + runner.COMPILE_SECONDS
    at_work.preflight_seconds, limits = 200.0, []

    def train(self, run_dir, source, seed, seconds):
        limits.append(seconds)
        return SimpleNamespace(cpu_seconds=0.0)

    monkeypatch.setattr(runner, "supported", lambda: True)
    monkeypatch.setattr(Runner, "_train", train)
    at_work._measured(at_work.folder, "", 0)
    assert limits == [at_work.settings["minutes"] * 60 + 2 * usual + runner.SLACK_SECONDS]
