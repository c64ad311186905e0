"""Kernels that a training on an NVIDIA GPU has compiled, for later trainings of the night.

MLX compiles each fused kernel at its first use, 3 to 4 s each and some 50 of them in a step (H100), and keeps them in
TMPDIR. That folder is new for every process of an experiment, because what one experiment leaves there another would
run. So a training starts with copies of two sets: the kernels of the night's first source, which is the user's own
train.py, and those that its own source has compiled before, in its preflight. Standard library only.
"""

import hashlib
import shutil
import stat
from importlib.metadata import version
from pathlib import Path

from lab.files import remove

FIRST, GROWING = "first", "growing"  # names of sets; others are those of sources
KEPT = 8  # sources besides the first
BYTES = 1 << 29  # of kernels that one training may leave


def lend(store: Path, run_dir: Path, source: str) -> None:
    """Copy the kernels that a training of `source` may start with to where MLX looks for them in `run_dir`."""
    for kernels in (store / FIRST, store / _name(source)):
        if kernels.is_dir():
            shutil.copytree(kernels, _in_use(run_dir), dirs_exist_ok=True)


def keep(store: Path, run_dir: Path, source: str) -> None:
    """Add what a training of `source` that ended well has compiled to its set: one that was killed may have left a part
    of a kernel. Only plain files count: a training may leave anything. The oldest sets are removed."""
    compiled = _plain_files(_in_use(run_dir))
    kernels, growing = store / (_name(source) if (store / FIRST).is_dir() else FIRST), store / GROWING
    known = {path.name for one in (store / FIRST, kernels) if one.is_dir() for path in one.iterdir()}
    if not (new := [path for path in compiled if path.name not in known]):
        return
    remove(growing, store)
    if kernels.is_dir():
        shutil.copytree(kernels, growing)
    growing.mkdir(parents=True, exist_ok=True)
    for path in new:
        shutil.copyfile(path, growing / path.name, follow_symlinks=False)
    remove(kernels, store)  # a set is whole or missing, also after a kill
    growing.rename(kernels)
    others = sorted((path for path in store.iterdir() if path.name != FIRST), key=lambda path: path.stat().st_mtime)
    for path in others[:-KEPT]:
        remove(path, store)


def _name(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _in_use(run_dir: Path) -> Path:
    """MLX's default, in the TMPDIR that `lab.trial.sandbox.environment` gives a training."""
    return run_dir / "tmp" / "mlx" / version("mlx") / "ptx"


def _plain_files(folder: Path) -> list[Path]:
    """Files directly in `folder`, none if a part of its path is a link or there is too much."""
    parts = [folder, *folder.parents[:3]]  # up to tmp
    if any(part.is_symlink() or not part.is_dir() for part in parts):
        return []
    states = {path: path.lstat() for path in folder.iterdir()}
    files = [path for path, state in states.items() if stat.S_ISREG(state.st_mode)]
    return files if sum(states[path].st_size for path in files) <= BYTES else []
