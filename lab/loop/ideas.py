"""Ideas: changes of train.py that are written already, one TOML file each in ideas/. docs/AGENTS.md shows the format.

An idea adds constants and definitions with names of their own, sets constants, and replaces statements or puts code
beside them, each within a named definition. Statements are compared by syntax, so comments and layout do not count,
and each must occur there exactly once. So an idea fits a train.py that other experiments have changed elsewhere, and
is refused by name where one of them changed what the idea needs. Nothing is executed.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.errors import UserError, one_line
from lab.files import ROOT
from lab.loop.source import UPPER_CASE, Rejected, first_line, is_definition, parse, read_source, set_constant

FOLDER = ROOT / "ideas"
NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
TEXTS = ("claim", "cost", "source")
PLACES = ("replace", "before", "after")
Edit = tuple[int, int, list[str]]  # lines from, up to (from 0), and what takes their place
MAX_TEXT = 200  # characters of a claim, a cost or a source


@dataclass(frozen=True)
class Change:
    """Code in place of, before or after the statements `anchor`, within the definition `scope` ("": anywhere)."""

    scope: str
    place: str
    anchor: str
    code: str


@dataclass(frozen=True)
class Idea:
    name: str
    claim: str  # why it should lower val_bpb
    cost: str  # in time and memory
    source: str  # where it comes from
    excludes: frozenset[str]  # ideas that it cannot be combined with
    add: str  # constants and definitions that it brings
    constants: Mapping[str, Any]  # values that it sets
    changes: tuple[Change, ...]
    names: frozenset[str]  # of what it adds: a source that has them has the idea
    text: str  # of the file


def load_all(folder: Path | None = None) -> tuple[dict[str, Idea], list[str]]:
    """The ideas of a folder by name, and an error in one line for each file that is none. Exclusion is mutual."""
    ideas: dict[str, Idea] = {}
    errors = []
    for path in sorted((folder or FOLDER).glob("*.toml")):
        try:
            ideas[path.stem] = load(path)
        except UserError as error:
            errors.append(str(error))
    for name, idea in list(ideas.items()):
        errors += [f"ideas/{name}.toml: excludes {other}, which is no idea" for other in idea.excludes - ideas.keys()]
        for other in idea.excludes & ideas.keys():
            ideas[other] = replace(ideas[other], excludes=ideas[other].excludes | {name})
    return ideas, errors


def load(path: Path) -> Idea:
    """Raises UserError, with file and cause in one line, unless it is an idea."""
    try:
        return _read(path.stem, read_source(path))
    except (Rejected, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path.parent.name}/{path.name}: {one_line(error)}") from None


def apply(source: str, names: Sequence[str], ideas: Mapping[str, Idea]) -> str:
    """`source` with these ideas, in the order of their names. Raises Rejected with the idea's name and the reason."""
    for name in sorted(names):
        if name not in ideas:
            raise Rejected(f"there is no idea {one_line(name, 60)}; choose one of: {', '.join(ideas) or 'none'}")
        if others := sorted(ideas[name].excludes & present(source, ideas)):
            raise Rejected(f"idea {name} cannot be combined with {others[0]}")
        try:
            source = _with(source, ideas[name])
        except Rejected as reason:
            raise Rejected(f"idea {name}: {reason}") from None
    return source


def present(source: str, ideas: Mapping[str, Idea]) -> set[str]:
    """The ideas that `source` has: all that they add is defined there."""
    defined = _names(parse(source))
    return {name for name, idea in ideas.items() if idea.names <= defined}


def _with(source: str, idea: Idea) -> str:
    """All places are found before the first change is made. The result may still fail the checks of a proposal."""
    for name, value in idea.constants.items():
        source = set_constant(source, name, value)
    tree, lines = parse(source), source.split("\n")
    if taken := sorted(idea.names & _names(tree)):
        raise Rejected(f"{taken[0]} is defined in train.py already")
    edits = [_edit(tree, lines, change) for change in idea.changes]
    edits = [*_additions(tree, lines, idea, min(begin for begin, _, _ in edits)), *edits]
    edits.sort(key=lambda edit: edit[:2])
    if any(following[0] < before[1] for before, following in pairwise(edits)):
        raise Rejected("its changes overlap")
    for begin, end, code in reversed(edits):
        lines[begin:end] = code
    return "\n".join(lines)


def _edit(tree: ast.Module, lines: list[str], change: Change) -> Edit:
    first, last, column = _locate(tree, lines, change)
    begin, end = {"replace": (first - 1, last), "before": (first - 1,) * 2, "after": (last,) * 2}[change.place]
    code = textwrap.indent(_trimmed(change.code), " " * column)
    return begin, end, code.split("\n") if code else []


def _additions(tree: ast.Module, lines: list[str], idea: Idea, first: int) -> Iterator[Edit]:
    """New constants go to the end of the block of constants, definitions before the one with the line `first`, where
    the idea's changes begin."""
    definitions = [node for node in tree.body if is_definition(node)]
    top = _start(definitions[0]) if definitions else 0
    block = [node for node in tree.body if UPPER_CASE.match(_assigned(node)) and node.lineno < top]
    changed = next((node for node in definitions if node.end_lineno > first), None)
    if not block or not changed:
        raise Rejected("train.py has no block of constants above its definitions, or no definition to change")
    at = _start(changed) - 1
    while lines[at - 1].startswith("#"):  # the comment above belongs to it
        at -= 1
    for node in parse(idea.add).body:
        code = idea.add.split("\n")[_start(node) - 1 : node.end_lineno]
        yield (at, at, [*code, "", ""]) if is_definition(node) else (block[-1].end_lineno, block[-1].end_lineno, code)


def _locate(tree: ast.Module, lines: list[str], change: Change) -> tuple[int, int, int]:
    """First line, last line (from 1) and column of the statements that a change is about."""
    scope, wanted = _scope(tree, change.scope), [ast.dump(node) for node in parse(_trimmed(change.anchor)).body]
    runs = list(_runs(scope, wanted))
    where, what = change.scope or "train.py", one_line(change.anchor, 60)
    if len(runs) != 1:
        raise Rejected(f"{where} has {'no' if not runs else 'more than one'} `{what}`; an earlier change may be why")
    first, last = _start(runs[0][0]), runs[0][-1].end_lineno
    rest = lines[last - 1].encode()[runs[0][-1].end_col_offset :].decode().strip()
    if lines[first - 1].encode()[: runs[0][0].col_offset].strip() or (rest and not rest.startswith("#")):
        raise Rejected(f"`{what}` in {where} shares a line with other code")
    return first, last, runs[0][0].col_offset


def _scope(tree: ast.Module, dotted: str) -> ast.AST:
    node: ast.AST = tree
    for name in filter(None, dotted.split(".")):
        found = [child for child in node.body if is_definition(child) and child.name == name]
        if len(found) != 1:
            raise Rejected(f"there is {'no' if not found else 'more than one'} definition {dotted}")
        node = found[0]
    return node


def _runs(scope: ast.AST, wanted: list[str]) -> Iterator[list[ast.stmt]]:
    """Statements in a row, anywhere in `scope`, whose syntax is `wanted`."""
    for node in ast.walk(scope):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            for at in range(len(block) - len(wanted) + 1) if isinstance(block, list) else ():
                run = block[at : at + len(wanted)]
                if all(ast.dump(node) == dump for node, dump in zip(run, wanted, strict=True)):
                    yield run


def _start(node: ast.stmt) -> int:
    return first_line(node) if is_definition(node) else node.lineno


def _names(tree: ast.Module) -> set[str]:
    """What is defined or assigned at the top level."""
    return {node.name if is_definition(node) else _assigned(node) for node in tree.body} - {""}


def _assigned(node: ast.stmt) -> str:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else ""


def _trimmed(code: str) -> str:
    return textwrap.dedent(code).strip("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file; every error is Rejected


@cache  # a night reads all of them before each experiment
def _read(name: str, text: str) -> Idea:
    table = tomllib.loads(text)
    if not NAME.match(name):
        raise Rejected("the name must be lower-case letters, digits and underscores")
    _only(table, {*TEXTS, "excludes", "add", "set", "change"})
    for key in TEXTS:
        if not isinstance(table.get(key), str) or not 0 < len(table[key].strip()) <= MAX_TEXT or "\n" in table[key]:
            raise Rejected(f"{key} must be one line of at most {MAX_TEXT} characters")
    excludes, constants, changes = (_typed(table, *rule) for rule in (("excludes", []), ("set", {}), ("change", [])))
    if not all(isinstance(other, str) for other in excludes) or name in excludes:
        raise Rejected("excludes must be a list of other ideas")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in constants.items()}
    texts, add = (table[key].strip() for key in TEXTS), _addition(_typed(table, "add", ""))
    made = tuple(_change(number, entry) for number, entry in enumerate(changes, 1))
    if not made:
        raise Rejected("it must have at least one [[change]]")
    return Idea(name, *texts, frozenset(excludes), add, values, made, frozenset(_names(parse(add))), text)


def _addition(code: str) -> str:
    code = _trimmed(code)
    body = _code("add", code).body
    for node in body:
        if not is_definition(node) and not UPPER_CASE.match(_assigned(node)):
            raise Rejected(f"add may hold constants and definitions alone, not line {node.lineno} of it")
    if not body:
        raise Rejected("add must bring a constant or a definition, by which the idea is recognised in train.py")
    return code


def _change(number: int, entry: Any) -> Change:
    what = f"change {number}"
    if not isinstance(entry, dict):
        raise Rejected(f"{what} must be a table")
    _only(entry, {"in", "code", *PLACES}, f"{what}: ")
    places = [key for key in PLACES if key in entry]
    if len(places) != 1 or "code" not in entry:
        raise Rejected(f"{what} must have code, and one of {', '.join(PLACES)}")
    scope, anchor, code = (_typed(entry, key, "", f"{what}: ") for key in ("in", places[0], "code"))
    if not _code(f"{what}: {places[0]}", _trimmed(anchor)).body:
        raise Rejected(f"{what}: {places[0]} must be one or more statements")
    _code(f"{what}: code", _trimmed(code))
    return Change(scope, places[0], anchor, code)


def _code(what: str, text: str) -> ast.Module:
    try:
        return parse(text)
    except Rejected as reason:
        raise Rejected(f"{what} {reason}") from None


def _only(table: Mapping[str, Any], known: set[str], where: str = "") -> None:
    for key in sorted(table.keys() - known):
        raise Rejected(f"{where}unknown key {one_line(key, 40)}; the keys are {', '.join(sorted(known))}")


def _typed(table: Mapping[str, Any], key: str, default: Any, where: str = "") -> Any:
    value = table.get(key, default)
    if type(value) is not type(default):
        kinds = {str: "a string", list: "a list", dict: "a table"}
        raise Rejected(f"{where}{key} must be {kinds[type(default)]}")
    return value
