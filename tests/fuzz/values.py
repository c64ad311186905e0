"""Inputs that several of these tests use: any JSON, and damage to a valid record or file."""

import copy
import math
from typing import Any

from hypothesis import strategies as st

HOSTILE = (
    "<script>alert(1)</script>", "</script>", '" onload="x', "\x1b[2J\x1b]0;t\x07", "a\rb", "\u202egnp", "\0",
    "[/INST]", "a\tb\nc", "x" * 5000, "\ud800", "\x85\u2028",
)  # fmt: skip
texts = st.text(max_size=20) | st.sampled_from(HOSTILE)
numbers = (
    st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**400, -1, 0, 1e308, math.nan, math.inf, 2**63])
)
plain = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    plain, lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3), max_leaves=6
)


def places(record: Any, at: tuple = ()) -> list[tuple]:
    """The path of every value in a record, the record itself left out."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path for key, value in items for path in ((*at, key), *places(value, (*at, key)))]


@st.composite
def damaged(draw: st.DrawFn, record: Any) -> Any:
    """A copy of a record in which some values are replaced by others, or missing."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        if not (known := places(record)):
            break
        *outer, last = draw(st.sampled_from(known))
        parent = record
        for key in outer:
            parent = parent[key]
        if draw(st.integers(0, 3)) == 0:
            del parent[last]
        else:
            parent[last] = draw(anything)
    return record


@st.composite
def mangled(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with a few bytes changed, inserted, repeated or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        kind = draw(st.sampled_from(("replace", "replace", "repeat", "cut")))
        new = draw(st.binary(max_size=20)) if kind == "replace" else content[start:end] * 2
        content = content[:start] if kind == "cut" else content[:start] + new + content[end:]
    return content


def is_short(error: BaseException, limit: int = 250, start: str = "") -> None:
    """Check that an error's message is one printable line that starts with this text."""
    assert str(error).startswith(start)
    assert str(error).isprintable()
    assert 0 < len(str(error)) <= limit
