"""Everything that decides a result and that an experiment may not edit.

Its packages follow the flow: data, machine, training, scoring, trial, loop, agents, interface. See
docs/ARCHITECTURE.md.
"""

import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType, TracebackType

# Old name -> new name of modules that the train.py of an old run or export imports.
MOVED = {
    "lab.backend": "lab.machine.backend",
    "lab.kernels": "lab.training.kernels",
    "lab.parallel": "lab.training.parallel",
}


if cache := os.environ.get("AUTORESEARCH_CACHE"):  # the same folder for a child that starts elsewhere
    os.environ["AUTORESEARCH_CACHE"] = os.path.abspath(os.path.expanduser(cache))


class _Moved(MetaPathFinder, Loader):
    """Imports a module of MOVED by its old name: the same module object, not a copy."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return importlib.import_module(MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = importlib.util.find_spec(MOVED[module.__spec__.name])


sys.meta_path.append(_Moved())


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught  # Ctrl-C while the imports run, before lab.training.run.guarded is active
