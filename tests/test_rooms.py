"""The rooms of lab/: what train.py may import from them, and the names that the train.py of an old run imports."""

import ast
import json
import subprocess
import sys

from conftest import ROOT

from lab import MOVED
from lab.interface.export import imported_files

OLD_IMPORTS = (
    "from lab.backend import mx, nn\n"
    "from lab.kernels import attention, linear_cross_entropy, softcap\n"
    "from lab.parallel import average, in_shares\n"
)


def test_train_py_imports_these_names_and_no_others():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    found = {
        node.module: {alias.name for alias in node.names}
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("lab", "prepare")
    }
    assert found == {
        "lab.machine.backend": {"GPU", "mx", "nn", "tree_flatten", "tree_map", "tree_unflatten"},
        "lab.training.kernels": {
            "attention",
            "linear_cross_entropy",
            "lookup",
            "relu_squared",
            "rotary_norm",
            "smear",
            "softcap",
            "without_own",
        },
        "lab.training.parallel": {"average", "in_shares"},
        "prepare": {"SETTINGS", "execute"},
    }
    assert not any(isinstance(node, ast.Import) and node.names[0].name.startswith("lab") for node in ast.walk(tree))


def test_an_old_run_finds_the_modules_under_their_old_names():
    code = OLD_IMPORTS + (
        "import importlib, json, sys\n"
        "old = json.loads(sys.argv[1])\n"
        "assert all(importlib.import_module(a) is importlib.import_module(b) for a, b in old.items())\n"
    )
    command = [sys.executable, "-c", code, json.dumps(MOVED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def test_the_export_of_an_old_run_takes_the_modules_along():
    assert imported_files(OLD_IMPORTS) == imported_files(OLD_IMPORTS.replace("lab.backend", "lab.machine.backend"))
    names = {str(path.relative_to(ROOT)) for path in imported_files(OLD_IMPORTS)}
    assert names >= {"lab/__init__.py", "lab/machine/__init__.py", "lab/machine/backend.py", "lab/training/kernels.py"}
