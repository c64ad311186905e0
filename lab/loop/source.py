"""Reading and editing the experiment's source through its syntax tree.

Covers the constants block, edits in three forms (set a constant, replace a whole definition, replace text that matches
once), and the fingerprint that identifies a repeated experiment. Every function except `read_source` takes and returns
text; bad input raises `Rejected` with one short reason. Nothing is executed; whether an edit is valid is checked
elsewhere (proposal.check, space.broken).
"""

import ast
import functools
import hashlib
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import one_line

MAX_BYTES = 200_000  # upstream's train.py has 26 kB
MAX_DEPTH = 90  # nesting of the syntax tree; far above real code, far below Python's recursion limit
MAX_BITS = 4096  # of an integer; Python refuses to write more than 4300 decimal digits
UPPER_CASE = re.compile(r"[A-Z][A-Z0-9_]*\Z")
ENCODING = re.compile(r"[ \t\f]*#.*?coding[:=]")  # PEP 263: Python would decode the file differently


class Rejected(Exception):
    """A proposal that cannot be tried; the message is one short reason, for the agent and the journal."""


@dataclass(frozen=True)
class Constant:
    name: str
    value: Any  # the literal, or what SETTINGS.key resolves to
    comment: str  # meaning and unit, as written beside it
    line: int  # from 1


@functools.lru_cache(maxsize=16)  # one proposal is parsed a dozen times
def parse(source: str) -> ast.Module:
    """The syntax tree of `source`, to be read only. Raises Rejected for what is not plain, reasonably sized Python."""
    if len(source) > MAX_BYTES or len(source.encode("utf-8", "replace")) > MAX_BYTES:
        raise Rejected(f"is longer than {MAX_BYTES // 1000} kB")
    if any(ENCODING.match(line) for line in source.split("\n", 2)[:2]):
        raise Rejected("declares a source encoding; write plain UTF-8")
    if "\r" in source:
        raise Rejected("has carriage returns; end lines with a newline alone")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an invalid escape sequence
            tree = ast.parse(source)
    except SyntaxError as error:
        raise Rejected(f"does not parse: {one_line(error.msg, 100)} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise Rejected(f"does not parse: {one_line(error, 100)}") from None
    if _depth(tree) > MAX_DEPTH:
        raise Rejected("is nested too deeply")
    if any(isinstance(node, ast.Constant) and _is_too_long(node.value) for node in ast.walk(tree)):
        raise Rejected(f"has an integer of more than {MAX_BITS} bits")
    return tree


def read_source(path: Path, otherwise: str | None = None) -> str:
    """The content of a regular UTF-8 file of reasonable size, without byte order mark and carriage returns. For any
    other file returns `otherwise`, or raises Rejected without it."""
    try:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
            return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        problem = "is not a regular file" if not stat.S_ISREG(status.st_mode) else "is too long"
    except FileNotFoundError:
        problem = "is missing"
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    if otherwise is None:
        raise Rejected(f"{path.name} {problem}")
    return otherwise


def constants(source: str, settings: Mapping[str, Any]) -> dict[str, Constant]:
    """Top-level `UPPER_CASE = value  # comment` where the value is a literal or `SETTINGS.key`, in file order."""
    lines = source.split("\n")
    return {
        name: Constant(name, value, _comment(lines, node), node.lineno)
        for name, (node, value) in _assigned(parse(source), settings).items()
    }


def exact(value: Any) -> Any:
    """A constant's value as read from JSON, which has no tuples."""
    return tuple(map(exact, value)) if isinstance(value, list) else value


def set_constant(source: str, name: str, value: Any) -> str:
    """`source` with one top-level constant set to a literal; only the value's text changes."""
    matches = [node for node in parse(source).body if _target(node) == name]
    if len(matches) != 1:
        raise Rejected(f"there is {'no' if not matches else 'more than one'} top-level constant {name}")
    try:
        if ast.literal_eval(repr(value)) != value:
            raise ValueError
    except (ValueError, SyntaxError, TypeError):
        raise Rejected(f"{name} cannot be {one_line(repr(value), 40)}") from None
    node = matches[0].value
    return _splice(source, node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, repr(value))


def replace_definition(source: str, name: str, new_code: str) -> str:
    """`source` with one top-level function or class, decorators included, replaced by its new text."""
    new = parse(new_code).body
    if len(new) != 1 or not is_definition(new[0]) or new[0].name != name:
        raise Rejected(f"the code must be the definition of {name} alone")
    old = [node for node in parse(source).body if is_definition(node) and node.name == name]
    if len(old) != 1:
        raise Rejected(f"there is {'no' if not old else 'more than one'} top-level definition {name}")
    lines = source.split("\n")  # whole lines: a comment may follow the last one
    return "\n".join([*lines[: first_line(old[0]) - 1], new_code.strip("\n"), *lines[old[0].end_lineno :]])


def search_replace(source: str, search: str, replace: str) -> str:
    """`source` with `search` replaced where it occurs, which must be exactly once."""
    if not search.strip():
        raise Rejected("the search text is empty")
    count = source.count(search)
    if count != 1:
        raise Rejected(f"the search text occurs {count} times, not once: {one_line(search, 60)}")
    return source.replace(search, replace)


def definition(source: str, name: str) -> str:
    """The text of one top-level function or class, decorators included."""
    for node in parse(source).body:
        if is_definition(node) and node.name == name:
            return "\n".join(source.split("\n")[first_line(node) - 1 : node.end_lineno])
    raise Rejected(f"there is no top-level definition {name}")


def uses(source: str, name: str) -> set[str]:
    """A top-level name and all top-level names that it uses, directly or through others."""
    tree = parse(source)
    parts = {node.name: node for node in tree.body if is_definition(node)}
    parts |= {target: node.value for node in tree.body if (target := _target(node))}
    found, open_names = set(), [name]
    while open_names:
        this = open_names.pop()
        if this in parts and this not in found:
            found.add(this)
            open_names += [node.id for node in ast.walk(parts[this]) if isinstance(node, ast.Name)]
    return found


def fingerprint(source: str, settings: Mapping[str, Any] | None = None) -> str:
    """Digest of what the source does: without comments, docstrings and layout, constants by value.

    With `settings`, `SETTINGS.key` equals the literal that it stands for.
    """
    return digest(*skeleton(source, settings or {}))


def skeleton(source: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(digest of the program without the values of its constants, those values): what `digest` combines.

    So a menu of changed constants is compared with the whole history without parsing once per entry.
    """
    return _skeleton(source, tuple(settings.items()))


@functools.lru_cache(maxsize=16)
def _skeleton(source: str, settings: tuple[tuple[str, Any], ...]) -> tuple[str, dict[str, Any]]:
    tree = parse.__wrapped__(source)  # not the cached tree: this one is changed
    assigned = _assigned(tree, dict(settings))
    for node, _ in assigned.values():
        node.value = ast.Constant(None)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, [item for item in block if not _is_text(item)])
    text = ast.dump(tree, annotate_fields=False)
    return hashlib.sha256(text.encode()).hexdigest(), {name: value for name, (_, value) in assigned.items()}


def digest(blank: str, values: Mapping[str, Any]) -> str:
    """The fingerprint of a skeleton with these constants."""
    return hashlib.sha256(f"{blank} {sorted(values.items())!r}".encode()).hexdigest()


def nodes(source: str, settings: Mapping[str, Any]) -> int:
    """Size of the syntax tree, without the values of constants: neither is 0.03 simpler than SETTINGS.matrix_lr."""
    tree = parse(source)
    return _size(tree) - sum(_size(node.value) for node, _ in _assigned(tree, settings).values())


def _size(tree: ast.AST) -> int:
    return sum(1 for _ in ast.walk(tree))


def is_definition(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def first_line(node: ast.AST) -> int:
    """Line number of a definition's first decorator, or of itself."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _target(node: ast.stmt) -> str | None:
    """The UPPER_CASE name that a top-level statement assigns, if it assigns exactly one."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target = node.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) and UPPER_CASE.match(target.id) else None


def _assigned(tree: ast.Module, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (statement, value) of the constants; a name assigned twice is left out."""
    assigned: dict[str, tuple[Any, Any]] = {}
    names = [_target(node) for node in tree.body]
    for node, name in zip(tree.body, names, strict=True):
        if name and names.count(name) == 1:
            try:
                assigned[name] = (node, _value(node.value, settings))
            except (ValueError, KeyError, TypeError, ArithmeticError):
                continue  # computed, so not a constant that can be set
    return assigned


def _value(node: ast.expr, settings: Mapping[str, Any]) -> Any:
    """A literal, SETTINGS.key, or small integer arithmetic as 2**14. Raises ValueError or KeyError otherwise."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "SETTINGS":
        return settings[node.attr]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.Mult):
        left, right = _value(node.left, settings), _value(node.right, settings)
        if not (type(left) is int and type(right) is int and 0 <= left <= 2**40 and 0 <= right <= 2**40):
            raise ValueError("not a small integer")
        if isinstance(node.op, ast.Mult):
            return left * right
        if right > 40:
            raise ValueError("too large")
        return left**right
    value = ast.literal_eval(node)
    if value is None or not _is_plain(value):
        raise ValueError("not a constant's type")
    return value


def _is_plain(value: Any) -> bool:
    """Whether a journal can hold this value. Raises ValueError for a text that is not Unicode."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        value.encode()
    return value is None or isinstance(value, bool | int | float | str)


def _is_too_long(value: Any) -> bool:
    return type(value) is int and value.bit_length() > MAX_BITS


def _comment(lines: list[str], node: ast.stmt) -> str:
    """The comment after a statement; offsets of the syntax tree count UTF-8 bytes."""
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    return rest.partition("#")[2].strip()


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring or another string that does nothing."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _depth(tree: ast.AST) -> int:
    """Nesting of the tree, counted without recursion."""
    depth, level = 0, [tree]
    while level and depth <= MAX_DEPTH:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _splice(source: str, line: int, column: int, end_line: int, end_column: int, text: str) -> str:
    """`source` with a range replaced; lines from 1, columns in UTF-8 bytes, as the syntax tree counts."""
    lines = source.encode().split(b"\n")
    head = b"\n".join([*lines[: line - 1], lines[line - 1][:column]])
    tail = b"\n".join([lines[end_line - 1][end_column:], *lines[end_line:]])
    return (head + text.encode() + tail).decode()
