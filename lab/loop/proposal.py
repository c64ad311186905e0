"""An agent's proposal, and the checks it must pass before five minutes are spent on it.

A proposal is the whole new train.py, whatever form the agent wrote it in. `check` rejects a source that does not parse,
repeats an experiment, uses undefined names, imports what is not installed, breaks a constraint of the constants, or
does something that is forbidden in train.py. The list of forbidden things only saves runs and gives the agent a reason;
protection is up to the sandbox and the scorer.
"""

import ast
import builtins
import importlib.util
import symtable
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from lab.errors import one_line
from lab.loop.ideas import Idea, present
from lab.loop.source import Constant, Rejected, constants, fingerprint, is_definition, parse, skeleton
from lab.loop.space import OWNED, broken

TITLE_CHANGES = 6  # most that a title lists
REQUIRED = ("build_model", "main")  # called by the scorer and the run
MODULE_NAMES = frozenset(dir(builtins)) | {"__file__", "__name__", "__doc__", "__annotations__", "__spec__"}
FORBIDDEN_MODULES = {
    "os": "the environment and files",
    "pathlib": "files",
    "shutil": "files",
    "tempfile": "files",
    "subprocess": "other processes",
    "multiprocessing": "other processes",
    "signal": "signals",
    "socket": "the network",
    "urllib": "the network",
    "http": "the network",
    "requests": "the network",
    "httpx": "the network",
    "ctypes": "memory",
    "inspect": "the interpreter",
    "importlib": "the interpreter",
    "builtins": "the interpreter",
}
FORBIDDEN_CALLS = {"open", "exec", "eval", "compile", "__import__", "input", "breakpoint"}
SEEDING = {"seed", "key", "default_rng", "RandomState"}  # of a `random` module
FORBIDDEN_ATTRIBUTES = {
    "environ": "reads the environment",
    "getenv": "reads the environment",
    "read_text": "reads files",
    "read_bytes": "reads files",
    "write_text": "writes files",
    "write_bytes": "writes files",
    "set_wired_limit": "calls set_wired_limit, which can panic the machine",
}


@dataclass(frozen=True)
class Proposal:
    """One experiment to run.

    `edit` is what changed, for the history, as returned by `describe`:
    {"form": "set", "values": {name: new}, "was": {name: old}} when only constants differ,
    otherwise {"form": "code", "definitions": [changed names]}, with "ideas": [names] when it brings some from ideas/.
    The search adds "memory" or "screen" (docs/LOOP.md).
    """

    source: str  # the whole new train.py
    hypothesis: str  # why it should help: one line, at most 200 characters
    agent: str  # that proposed it
    edit: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hypothesis", one_line(self.hypothesis) or "no reason given")

    @property
    def title(self) -> str:
        return title(self.edit, self.hypothesis)

    @property
    def record(self) -> dict[str, Any]:
        """Its fields in the journal."""
        return {"agent": self.agent, "hypothesis": self.hypothesis, "edit": self.edit}


def describe(
    source: str, base: str, settings: Mapping[str, Any], ideas: Mapping[str, Idea] | None = None
) -> dict[str, Any]:
    """The `edit` that leads from `base` to `source`. Raises Rejected if either does not parse."""
    (old_blank, old), (blank, new) = skeleton(base, settings), skeleton(source, settings)
    if blank == old_blank and old.keys() == new.keys():
        changed = [name for name in new if new[name] != old[name]]
        return {"form": "set", "values": {n: new[n] for n in changed}, "was": {n: old[n] for n in changed}}
    before, after = _definitions(base), _definitions(source)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    brought = sorted(present(source, ideas or {}) - present(base, ideas or {}))
    return {"form": "code", "definitions": names} | ({"ideas": brought} if brought else {})


def in_words(edit: Mapping[str, Any]) -> str:
    """An edit as a hypothesis, for a change without one."""
    if edit.get("values"):
        was = edit.get("was", {})
        return ", ".join(f"{name} from {was.get(name)} to {value}" for name, value in edit["values"].items())
    if edit.get("ideas"):
        return f"idea {', '.join(edit['ideas'])}"
    return f"changed {', '.join(edit.get('definitions', ())) or 'the top level'}"


def changes(edit: Mapping[str, Any] | None) -> list[str]:
    """What an edit changes: "DEPTH 4 -> 6" for a constant, else the names of the ideas or definitions."""
    edit = edit or {}
    was = edit.get("was", {})
    if edit.get("ideas"):
        return [f"idea {name}" for name in edit["ideas"]]
    values = [f"{name} {_short(was.get(name))} -> {_short(new)}" for name, new in edit.get("values", {}).items()]
    return values + (list(edit.get("definitions", ())) or ["top level"] * (edit.get("form") == "code"))


def title(edit: Mapping[str, Any] | None, hypothesis: str) -> str:
    """An experiment in one line: what it changes, then why. A reason that repeats the change is left out."""
    why = hypothesis.replace(in_words(edit), "").strip(" :;,") if edit else hypothesis
    what = changes(edit)
    more = f" and {len(what) - TITLE_CHANGES} more" if len(what) > TITLE_CHANGES else ""
    return one_line(": ".join(filter(None, (", ".join(what[:TITLE_CHANGES]) + more, why))), 300)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def check(
    source: str, base: str, tried: AbstractSet[str] = frozenset(), settings: Mapping[str, Any] | None = None
) -> None:
    """Raise Rejected with a short reason unless `source` is a valid experiment that differs from `base` and all earlier
    ones.

    `tried` holds fingerprints made with the same `settings`. What `base` does already is allowed in `source`.
    """
    settings = settings or {}
    tree, base_tree = parse(source), parse(base)
    mark = fingerprint(source, settings)
    if mark == fingerprint(base, settings):
        raise Rejected("changes nothing")
    if mark in tried:
        raise Rejected("was tried before")
    _compiles(tree)
    _keep_required(tree)
    for reason in [*_undefined(source, base), *_imports(tree, base_tree), *_forbidden(tree, base_tree)]:
        raise Rejected(reason)
    _check_constants(constants(source, settings), constants(base, settings), settings)


def _check_constants(
    block: Mapping[str, Constant], before: Mapping[str, Constant], settings: Mapping[str, Any]
) -> None:
    for name in block.keys() | before.keys():
        was, now = (table[name].value if name in table else None for table in (before, block))
        if OWNED.search(name) and was != now:
            raise Rejected(f"changes {name}, which is fixed by the task")
    reason = broken({name: item.value for name, item in block.items()}, settings)
    if reason:
        raise Rejected(reason)


def _compiles(tree: ast.Module) -> None:
    """Some errors appear only when compiling: `return` outside a function, a name both local and global."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(tree, "train.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Rejected(f"does not compile: {one_line(str(error), 100)}") from None


def _keep_required(tree: ast.Module) -> None:
    present = {node.name for node in tree.body if is_definition(node)}
    for name in REQUIRED:
        if name not in present:
            raise Rejected(f"{name} is missing; keep its definition")


def _definitions(source: str) -> dict[str, str]:
    """name -> syntax of each top-level definition."""
    return {node.name: ast.dump(node) for node in parse(source).body if is_definition(node)}


def _undefined(source: str, base: str) -> Iterator[str]:
    """Global names that are used but not defined, such as a name that was deleted while still in use."""
    for name in sorted(_undefined_names(source) - _undefined_names(base)):
        yield f"uses {one_line(name, 60)}, which is not defined"


def _undefined_names(source: str) -> set[str]:
    top = symtable.symtable(source, "train.py", "exec")
    used: set[str] = set()
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables = [top]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                defined |= {symbol.get_name()} if symbol.is_declared_global() and symbol.is_assigned() else set()
    return used - defined - MODULE_NAMES


def _imports(tree: ast.Module, base: ast.Module) -> Iterator[str]:
    """Modules that the base does not import and that are not installed, relative, part of lab, or forbidden."""
    known = _modules(base)
    for module in sorted(_modules(tree) - known):
        top = module.split(".")[0]
        if not top:
            yield "uses a relative import; import modules by their full name"
        elif top == "lab":
            yield f"imports {module}: train.py may import nothing more from lab"
        elif top in FORBIDDEN_MODULES:
            yield f"imports {module}: train.py may not access {FORBIDDEN_MODULES[top]}"
        elif not any(name.split(".")[0] == top for name in known) and not _installed(top):
            yield f"imports {one_line(module, 60)}, which is not installed"


def _modules(tree: ast.Module) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


def _installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _forbidden(tree: ast.Module, base: ast.Module) -> Iterator[str]:
    """Forbidden operations that the source contains more often than the base."""
    yield from sorted((Counter(_forbidden_uses(tree)) - Counter(_forbidden_uses(base))).keys())


def _forbidden_uses(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FORBIDDEN_CALLS:
            yield f"calls {node.id}()"
        elif isinstance(node, ast.Attribute) and node.attr in SEEDING and _is_random(node.value):
            yield "sets the seed, which is fixed outside train.py"
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            yield FORBIDDEN_ATTRIBUTES[node.attr]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_laboratory(node.value):
            yield f"replaces {node.attr}, which is fixed outside train.py"


def _is_laboratory(node: ast.expr) -> bool:
    name = getattr(node, "attr", "") or getattr(node, "id", "")
    return name == "clock" or (isinstance(node, ast.Name) and name in ("prepare", "lab", "time"))


def _is_random(node: ast.expr) -> bool:
    return "random" in (getattr(node, "attr", ""), getattr(node, "id", ""))
