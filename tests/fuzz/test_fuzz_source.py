"""Sources and answers of models: a text ends as a valid proposal or as one short reason; an edit does what it says."""

import ast
import json
import math
import time

import pytest
from experiment import SETTINGS, SOURCE, briefing
from hypothesis import assume, example, given
from hypothesis import strategies as st
from values import anything, damaged, is_short, texts

from lab.agents.answers import FORMS, parse_answer
from lab.agents.briefing import Tried, row
from lab.errors import one_line
from lab.loop import space
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import (
    Rejected,
    constants,
    definition,
    fingerprint,
    nodes,
    replace_definition,
    search_replace,
    set_constant,
)

BLOCK = constants(SOURCE, SETTINGS)
MENU = space.menu(SOURCE, SETTINGS)
TARGETS = {"MLP": (), "schedule": ()}
LINES = SOURCE.split("\n")
INSIDE = {line for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
          for line in range(node.lineno, node.end_lineno + 1)}  # fmt: skip
HUGE = "0x" + "f" * 5000
SNIPPETS = (
    f"DEPTH = {HUGE}", f"A = {HUGE}", f"x = f({HUGE})", "DTYPE = '\\ud800'", "DTYPE = '\\x1b[2J'",
    "WINDOW = '\\u202e'", "MATRIX_LR = 1e999", "BETAS = (1e999, 0.9)", "BETAS = ((1e999,), 0.9)", "BETAS = (b'x', 1)",
    "BETAS = (1j, 1)", "BETAS = ({1, 2}, ...)", "BETAS = ([1], {})", "TIED = None", "TIED = ...",
    "DEPTH = 4\nDEPTH = 5", "DEPTH: int = 5", "DEPTH = True", "A = 2**40 * 2**40 * 2**40", "import os", "nonlocal x",
    "return 1", "class MLP: pass", "\x0c", "\ufeff", "x = 1 if", "match x:\n    case 1: 'y'", "lambda: (yield)",
    "async def main(): pass", "del MLP", "global DEPTH", "def f(a, a): pass", "def schedule(progress): return 1.0",
    "print('\\N{BELL}')", "try: pass\nexcept* OSError: pass", "x: 'y' = 1", "*a, b = 1,",
)  # fmt: skip


@st.composite
def edited(draw: st.DrawFn) -> str:
    """The experiment with some lines removed, repeated, swapped or replaced."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 3))):
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(("insert", "insert", "replace", "remove", "swap", "text")))
        if kind in ("insert", "replace"):
            lines[at : at + (kind == "replace")] = draw(st.sampled_from((*SNIPPETS, *LINES))).split("\n")
        elif kind == "remove":
            del lines[min(at, other) : max(at, other)]
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        else:
            cut = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:cut] + draw(texts) + lines[at][cut:]
        lines = lines or [""]
    return "\n".join(lines)


def replaced(line: str) -> str:
    """The experiment with another statement for this constant."""
    name = line.split(" ")[0]
    return "\n".join(line if old.startswith(f"{name} = ") else old for old in LINES)


def recorded(proposal: Proposal) -> dict:
    """A proposal's fields as a journal holds them."""
    line = json.dumps(proposal.record, ensure_ascii=False, allow_nan=False)
    return json.loads(line.encode())


def usable(source: str) -> None:
    """Check a source: it is refused with one short reason, or everything works that a night does with it."""
    try:
        check(source, SOURCE, frozenset(), SETTINGS)
        edit = describe(source, SOURCE, SETTINGS)
    except Rejected as reason:
        is_short(reason)
        return
    ast.parse(source)
    mark = fingerprint(source, SETTINGS)
    assert mark != fingerprint(SOURCE, SETTINGS)
    assert nodes(source, SETTINGS) > 0
    with pytest.raises(Rejected, match="tried before"):
        check(source, SOURCE, {mark}, SETTINGS)
    record = recorded(Proposal(source, in_words(edit), "model", edit))
    assert record["hypothesis"].isprintable()
    tried = Tried(1, record["hypothesis"], "crash", None, record["edit"])
    assert row(tried).isprintable()
    briefing(2, source=source, history=(tried,), tried=frozenset({mark})).menu()


@given(edited())
def test_an_edited_experiment_is_refused_or_usable(source):
    usable(source)


@pytest.mark.parametrize("line", [s for s in SNIPPETS if " = " in s.split("\n")[0]], ids=lambda line: line[:30])
def test_an_unusual_constant_is_refused_or_usable(line):
    usable(replaced(line))
    usable(SOURCE.replace("TIED = ", f"{line}\nTIED = "))


@given(texts | st.text())
def test_any_text_is_refused(source):
    with pytest.raises(Rejected) as caught:
        check(source, SOURCE, frozenset(), SETTINGS)
    is_short(caught.value)


# ---- edits

scalars = st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(max_size=8)


@given(st.sampled_from(sorted(BLOCK)), scalars | st.tuples(scalars, scalars) | st.lists(scalars, max_size=2))
@example("BETAS", (math.inf, 0.9))
@example("DTYPE", "\ud800")
@example("MATRIX_LR", -0.0)
def test_a_constant_that_is_set_has_its_value_and_the_others_theirs(name, value):
    try:
        new = set_constant(SOURCE, name, value)
    except Rejected:
        assert not isinstance(value, bool | int | str)
        return
    block = constants(new, SETTINGS)
    if name in block:  # not inf, which is written 1e309 or not at all
        assert repr(block[name].value) == repr(value)
    assert {key: item.value for key, item in block.items() if key != name} == {
        key: item.value for key, item in BLOCK.items() if key != name
    }
    assert block.get(name, BLOCK[name]).comment == BLOCK[name].comment
    same = repr(value) == repr(BLOCK[name].value)
    assert (fingerprint(new, SETTINGS) == fingerprint(SOURCE, SETTINGS)) == same
    if name in block and not same and value != BLOCK[name].value:
        was = {name: BLOCK[name].value}
        assert describe(new, SOURCE, SETTINGS) == {"form": "set", "values": {name: value}, "was": was}
        back = set_constant(new, name, BLOCK[name].value)
        assert fingerprint(back, SETTINGS) == fingerprint(SOURCE, SETTINGS)


comments = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10)
layouts = st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(("comment", "line", "blank", "spaces")), comments)


@given(st.lists(layouts, max_size=8))
def test_comments_and_layout_do_not_change_the_fingerprint(changes):
    lines = list(LINES)
    for at, kind, text in changes:
        if at + 1 in INSIDE:
            continue
        if kind == "spaces":
            lines[at] = lines[at].replace(" = ", "  =   ").replace(", ", " ,  ") if "#" not in lines[at] else lines[at]
        else:
            lines[at] += {"comment": f"  # {text}", "line": f"\n# {text}", "blank": "\n \t"}[kind]
    source = "\n".join(lines)
    assume(not source.startswith("#"))
    assert fingerprint(source, SETTINGS) == fingerprint(SOURCE, SETTINGS)
    assert nodes(source, SETTINGS) == nodes(SOURCE, SETTINGS)


@given(st.sampled_from(["MLP", "schedule", "main"]), texts, st.integers(0, 3))
def test_a_definition_that_is_replaced_is_there_once_and_the_rest_stays(name, text, blank):
    code = "\n" * blank + f"def {name}(x):\n    return {text!r}\n" + "\n" * blank
    new = replace_definition(SOURCE, name, code)
    assert definition(new, name) == code.strip("\n")
    assert replace_definition(new, name, definition(SOURCE, name)) == SOURCE


@given(st.integers(0, len(SOURCE)), st.integers(0, 60), texts)
def test_text_is_replaced_where_it_occurs_once(start, size, new):
    old = SOURCE[start : start + size]
    try:
        assert search_replace(SOURCE, old, new) == SOURCE[:start] + new + SOURCE[start + size :]
        assert SOURCE.count(old) == 1
    except Rejected:
        assert SOURCE.count(old) != 1 or not old.strip()


# ---- answers

ANSWERS = (
    {"reason": "faster", "change": "MATRIX_LR = 0.04"},
    {"constant": "BETAS", "value": [0.9, 0.95]},
    {"reason": "faster", "edits": [{"search": "TIED = False", "replace": "TIED = True"}]},
)
CODE = "def schedule(progress: float) -> float:\n    return 1.0 - progress\n"
FRAMES = ("{}", "```json\n{}\n```", "Sure: {} I hope", "<think>(</think>{}", "{}{}", "```python\n{}```\n", "```\n{}")
records = st.sampled_from(ANSWERS).flatmap(damaged) | anything
answers = records.map(json.dumps) | edited() | st.just(CODE)
UNPRINTABLE = {"search": "DTYPE = SETTINGS.dtype", "replace": r"DTYPE = '\ud800'"}


@given(st.sampled_from(FORMS), st.sampled_from(FRAMES), answers, st.integers(0, 10_000))
@example("definition", "{}", "```python\n" * 15_000, 10**6)
@example("definition", "{}", f"```python\ndef schedule(p):\n    return {HUGE}\n```", 10**6)
@example("replace", "{}", json.dumps({"edits": [UNPRINTABLE]}), 10**6)
@example("menu", "{}", '{"constant": "ROWS", "value": 1e400}', 10**6)
def test_an_answer_is_a_valid_proposal_or_one_short_reason(form, frame, text, end):
    text = frame.replace("{}", text)[:end]
    begun = time.process_time()
    try:
        proposal = parse_answer(text, form, SOURCE, SETTINGS, TARGETS if form == "definition" else MENU)
    except Rejected as reason:
        is_short(reason)
    else:
        check(proposal.source, SOURCE, frozenset(), SETTINGS)
        assert recorded(proposal)["hypothesis"].isprintable()
    assert time.process_time() - begun < 2


@given(st.text() | texts, st.integers(1, 300))
def test_one_line_is_one_printable_line(text, limit):
    line = one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert one_line(line, limit) == line
    line.encode()
