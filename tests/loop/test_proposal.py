"""Edits, fingerprints, constraints, the gate, and what sloppy or hostile model answers end in."""

import ast
import json
import re
from pathlib import Path

import pytest
from experiment import SETTINGS, SOURCE

from lab import preset
from lab.agents.answers import entries, parse_answer, schema
from lab.loop import space
from lab.loop.proposal import Proposal, check, describe
from lab.loop.source import (
    Rejected,
    constants,
    definition,
    digest,
    fingerprint,
    nodes,
    replace_definition,
    search_replace,
    set_constant,
    skeleton,
)

MENU = space.menu(SOURCE, SETTINGS)
TARGETS = {"MLP": (), "schedule": ()}
SCHEDULE = "def schedule(progress: float) -> float:\n    return 1.0 - progress\n"


def edited(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


# The constants block


def test_constants_are_read_with_value_comment_and_line():
    block = constants(SOURCE, SETTINGS)
    assert (block["MATRIX_LR"].value, block["MATRIX_LR"].comment) == (0.02, "Muon, matrices ± of the blocks")
    assert SOURCE.split("\n")[block["MATRIX_LR"].line - 1].startswith("MATRIX_LR")
    assert (block["BETAS"].value, block["TIED"].value, block["WINDOW"].value) == ((0.8, 0.95), False, "L")
    assert "NAMES" not in block  # computed
    assert constants("A = 2**14  # tokens\nA2 = 1\nA2 = 2\n", {}).keys() == {"A"}  # one with two values has none
    assert constants("A = 2**99999\nB = 9**9**9\nC = SETTINGS.missing\n", {}) == {}


def test_set_constant_changes_the_value_and_nothing_else():
    new = set_constant(SOURCE, "MATRIX_LR", 0.05)
    differing = [(a, b) for a, b in zip(SOURCE.split("\n"), new.split("\n"), strict=True) if a != b]
    assert differing == [
        (
            "MATRIX_LR = SETTINGS.matrix_lr  # Muon, matrices ± of the blocks",
            "MATRIX_LR = 0.05  # Muon, matrices ± of the blocks",
        )
    ]
    assert constants(set_constant(SOURCE, "BETAS", (0.9, 0.95)), SETTINGS)["BETAS"].value == (0.9, 0.95)
    assert set_constant("É = 'é'; LR = (0.1)  # é\n", "LR", 0.2) == "É = 'é'; LR = (0.2)  # é\n"  # byte columns


@pytest.mark.parametrize(("name", "value"), [("MISSING", 1), ("ROWS", float("nan")), ("ROWS", object())])
def test_set_constant_refuses(name, value):
    with pytest.raises(Rejected):
        set_constant(SOURCE, name, value)


def test_replace_definition_takes_decorators_along():
    base = "import functools\n\n\n@functools.cache\ndef f(x):\n    return x\n\n\nA = 1\n"
    new = replace_definition(base, "f", "def f(x):\n    return 2 * x\n")
    assert new == "import functools\n\n\ndef f(x):\n    return 2 * x\n\n\nA = 1\n"
    assert definition(base, "f").startswith("@functools.cache\ndef f")


def test_search_replace_must_match_once():
    assert search_replace("a b c", "b", "d") == "a d c"
    for search in ("x", "", " \n", "B"):
        with pytest.raises(Rejected):
            search_replace("a b b c", search, "y")
    with pytest.raises(Rejected, match="2 times"):
        search_replace("a b b c", "b", "d")


# Fingerprints


def test_fingerprint_ignores_layout_comments_and_docstrings():
    quiet = SOURCE.replace('    """Two linear layers."""\n', "").replace("  # AdamW\n", "\n").replace("0.3", "3e-1")
    assert quiet != SOURCE
    assert fingerprint(quiet) == fingerprint(SOURCE)
    assert fingerprint(edited("relu(self.up(x)) ** 2", "relu(self.up(x)) ** 3")) != fingerprint(SOURCE)


def test_fingerprint_knows_a_setting_from_its_value_only_with_the_settings():
    written_out = set_constant(SOURCE, "MATRIX_LR", SETTINGS["matrix_lr"])
    assert fingerprint(written_out, SETTINGS) == fingerprint(SOURCE, SETTINGS)
    assert fingerprint(written_out) != fingerprint(SOURCE)


def test_a_menu_entry_has_the_fingerprint_of_the_file_it_makes():
    blank, values = skeleton(SOURCE, SETTINGS)
    for name, options in MENU.items():
        for value in options:
            made = fingerprint(set_constant(SOURCE, name, value), SETTINGS)
            assert digest(blank, values | {name: value}) == made


def test_a_file_is_simpler_by_less_code_and_not_by_the_value_of_a_constant():
    for name, options in MENU.items():
        for value in (constants(SOURCE, SETTINGS)[name].value, *options):
            assert nodes(set_constant(SOURCE, name, value), SETTINGS) == nodes(SOURCE, SETTINGS)
    assert nodes(edited("relu(self.up(x)) ** 2", "relu(self.up(x))"), SETTINGS) < nodes(SOURCE, SETTINGS)


# The search space


def test_values_on_the_menu_pass_the_gate_and_are_new():
    assert {"MATRIX_LR", "DEPTH", "WINDOW", "BETAS", "TIED", "ROWS", "WEIGHT_DECAY"} <= MENU.keys()
    assert "DTYPE" not in MENU  # the machine's
    for name, options in MENU.items():
        assert constants(SOURCE, SETTINGS)[name].value not in options
        for value in options[:2]:
            check(set_constant(SOURCE, name, value), SOURCE, frozenset(), SETTINGS)


def test_tried_values_leave_the_menu():
    tried = {fingerprint(set_constant(SOURCE, "ROWS", value), SETTINGS) for value in MENU["ROWS"]}
    assert "ROWS" not in space.menu(SOURCE, SETTINGS, tried)
    one = fingerprint(set_constant(SOURCE, "DEPTH", 5), SETTINGS)
    assert space.menu(SOURCE, SETTINGS, {one})["DEPTH"] == [value for value in MENU["DEPTH"] if value != 5]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ROWS": 6}, "multiple"),
        ({"ROWS": 16}, "multiple"),
        ({"ROWS": 0}, "positive"),
        ({"ROWS": 10**30}, "multiple"),
        ({"TOKENS_PER_STEP": 3000}, "multiple"),
        ({"HEAD_DIM": 96}, "divide"),
        ({"HEAD_DIM": 1}, "even"),
        ({"WIDTH": 250}, "divide"),
        ({"WINDOW": "LX"}, "letters"),
        ({"WINDOW": ""}, "letters"),
        ({"MATRIX_LR": 0.0}, "positive"),
        ({"MATRIX_LR": -0.1}, "positive"),
        ({"MATRIX_LR": 1e300}, "finite"),
        ({"WARMUP": 1.5}, "exceed"),
        ({"WARMUP": 0.6}, "exceed"),
        ({"FINAL_LR": -0.5}, "0 to 1"),
        ({"MOMENTUM": 1.0}, "below 1"),
        ({"BETAS": (0.9, 1.5)}, "below 1"),
        ({"WEIGHT_DECAY": -1.0}, "negative"),
        ({"DEPTH": 0}, "at least 1"),
    ],
)
def test_constraints_have_reasons(changes, word):
    source = SOURCE
    for name, value in changes.items():
        source = set_constant(source, name, value)
    with pytest.raises(Rejected, match=word):
        check(source, SOURCE, frozenset(), SETTINGS)


# The gate


GATE = [
    (SOURCE, "changes nothing"),
    (SOURCE.replace("# layers", "# many layers"), "changes nothing"),
    ("", "build_model is missing"),
    ("x = 1", "build_model is missing"),
    (SOURCE.replace("def main()", "def start()").replace("    main()", "    start()"), "main is missing"),
    (edited("class MLP", "class Mlp"), "uses MLP, which is not defined"),
    (edited("MOMENTUM = 0.95  # Muon\n", "").replace("rate, ROWS", "MOMENTUM, ROWS"), "uses MOMENTUM"),
    (edited("return 1.0\n", "return half\n"), "uses half"),
    (edited("import math", "import math, flash_attn"), "flash_attn, which is not installed"),
    (edited("import math", "import math\nfrom . import score"), "relative import"),
    (edited("import math", "import math\nimport lab.scoring.score"), "nothing more from lab"),
    (edited("import math", "import math\nimport os"), "environment"),
    (edited("import math", "import math\nfrom subprocess import run as r"), "processes"),
    (edited("import math", "import math\nimport ctypes.util"), "memory"),
    (edited("import math", "import math\nimport socket"), "network"),
    (edited("    rate =", "    open('/etc/passwd')\n    rate ="), "open"),
    (edited("    rate =", "    __import__('os')\n    rate ="), "__import__"),
    (edited("    rate =", "    eval('1')\n    rate ="), "eval"),
    (edited("    rate =", "    mx.random.seed(7)\n    rate ="), "seed"),
    (edited("    rate =", "    run.clock.budget = 1e9\n    rate ="), "budget, which is fixed outside"),
    (edited("    rate =", "    mx.set_wired_limit(1)\n    rate ="), "wired"),
    (edited("TIED = False", "SEED = 3"), "SEED, which is fixed by the task"),
    ("# -*- coding: rot13 -*-\n" + SOURCE, "encoding"),
    (edited("import math", "import math\nreturn 1"), "does not compile"),
    (SOURCE + "\nx = 1\n" * 40_000, "longer than"),
    (SOURCE + "x = " + "(" * 500 + ")" * 500, "does not parse"),
    (SOURCE + "x = " + "-" * 5000 + "1", "does not parse|nested"),
    (SOURCE + "x = 1" + " + 1" * 3000, "does not parse|nested"),
    (SOURCE + "x = " + "1" * 9000, "does not parse"),
    (SOURCE + "\0", "does not parse"),
    (SOURCE + "x = '\ud800'", "does not parse"),
    (SOURCE.replace("\n", "\r"), "carriage"),
    (edited("def schedule", "\tdef schedule"), "does not parse"),
    (edited('"relu²"', "“relu”"), "changes nothing"),  # in a comment: harmless
    (edited("nn.relu", "“nn”.relu"), "does not parse"),
]


@pytest.mark.parametrize(("source", "word"), GATE, ids=range(len(GATE)))
def test_the_gate_refuses_with_one_short_reason(source, word):
    with pytest.raises(Rejected, match=word) as caught:
        check(source, SOURCE, frozenset(), SETTINGS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_gate_refuses_what_was_tried():
    new = set_constant(SOURCE, "DEPTH", 5)
    check(new, SOURCE, frozenset(), SETTINGS)
    with pytest.raises(Rejected, match="tried before"):
        check(new, SOURCE, {fingerprint(new, SETTINGS)}, SETTINGS)


def test_the_gate_holds_nothing_against_a_change_that_the_base_does_itself():
    base = edited("import math", "import math\nimport os").replace("    rate =", "    os.environ['A']\n    rate =")
    check(set_constant(base, "DEPTH", 5), base, frozenset(), SETTINGS)
    with pytest.raises(Rejected, match="environment"):
        check(base.replace("    rate =", "    os.environ['B']\n    rate ="), base, frozenset(), SETTINGS)


def test_deleting_code_that_nothing_uses_is_an_experiment():
    base = SOURCE + "\n\ndef unused():\n    return 1\n"
    check(SOURCE, base, frozenset(), SETTINGS)
    assert describe(SOURCE, base, SETTINGS) == {"form": "code", "definitions": ["unused"]}


def test_describe_says_which_constants_changed():
    new = set_constant(set_constant(SOURCE, "DEPTH", 5), "TIED", True)
    assert describe(new, SOURCE, SETTINGS) == {
        "form": "set",
        "values": {"DEPTH": 5, "TIED": True},
        "was": {"DEPTH": 4, "TIED": False},
    }


def test_a_hypothesis_is_one_short_printable_line():
    proposal = Proposal(SOURCE, "a\n\tb\x1b[31m \ud800 " + "c" * 500, "x")
    assert proposal.hypothesis.isprintable()
    assert len(proposal.hypothesis) <= 200
    assert Proposal(SOURCE, " \n", "x").hypothesis == "no reason given"


# Answers. Each is (form, text, None for a proposal or a word of the reason).


def pick(change: object, **more: object) -> str:
    return json.dumps({"reason": "faster", "change": change, **more})


def pairs(*edits: object) -> str:
    return json.dumps({"reason": "faster", "edits": list(edits)})


def pair(search: object, replace: object) -> dict[str, object]:
    return {"search": search, "replace": replace}


def fenced(code: str, language: str = "python") -> str:
    return f"It should help.\n```{language}\n{code}\n```\n"


GOOD = "MATRIX_LR = 0.04"
MENU_ANSWERS = [
    (pick(GOOD), None),
    (f"```json\n{pick(GOOD)}\n```", None),
    (f"Sure! Here is my answer: {pick(GOOD)} I hope it helps.", None),
    (f"<think>What about {{DEPTH}}?</think>\n{pick(GOOD)}", None),
    (pick(GOOD).replace(",", ",\r\n"), None),
    (pick("WINDOW = 'SSSL'"), None),
    (pick("BETAS = (0.9, 0.95)"), None),
    (pick("TIED = True"), None),
    (pick(" MATRIX_LR=0.04 "), None),
    (json.dumps({"constant": "MATRIX_LR", "value": 0.04}), None),
    (json.dumps({"constant": "DEPTH", "value": 5.0}), None),
    (json.dumps({"constant": "BETAS", "value": [0.9, 0.95]}), None),
    (json.dumps({"change": GOOD}), None),
    (json.dumps({"reason": 7, "change": GOOD}), None),
    (json.dumps({"reason": "x\u0000\u202e\n" + "y" * 5000, "change": GOOD}), None),
    (pick(GOOD, path="../../etc/passwd", confidence=float(9)), None),
    ("", "empty"),
    (" \n\t", "empty"),
    ("<think>It is hard, and", "empty"),
    ("<think>\n</think>", "empty"),
    ("I would raise the learning rate.", "no JSON"),
    ("{", "cut off"),
    (pick(GOOD)[:-9], "cut off"),
    ('{"reason": "' + "so " * 400, "cut off"),
    ("{'reason': 'x', 'change': 'y'}", "not valid JSON"),
    ("{“reason”: “x”, “change”: “DEPTH = 5”}", "not valid JSON"),
    (f"{pick(GOOD)} {pick('DEPTH = 5')}", "not valid JSON"),
    ('{"change": "DEPTH = 5", "change": "DEPTH = 6"}', "duplicate key"),
    ('{"constant": "MATRIX_LR", "value": NaN}', "NaN is not allowed"),
    ('{"constant": "MATRIX_LR", "value": -Infinity}', "not allowed"),
    ('{"constant": "MATRIX_LR", "value": 1e999}', "finite"),
    ('{"constant": "ROWS", "value": 1' + "0" * 300 + "}", "not on the menu"),
    ('{"constant": "ROWS", "value": 1' + "0" * 5000 + "}", "not valid JSON"),
    ('{"a":' * 30_000 + "1" + "}" * 30_000, "longer than|not valid JSON"),
    ('{"a":' * 3000 + "1" + "}" * 3000, "not valid JSON|names no"),
    ("[" * 5000 + "{}" + "]" * 5000, "names no"),
    ("[1, 2]", "no JSON"),
    ("null", "no JSON"),
    ("{}", "names no"),
    ('["DEPTH = 5"]', "no JSON"),
    (pick(["DEPTH = 5"]), "names no"),
    (pick({"name": "DEPTH", "value": 5}), "names no"),
    (pick(None), "names no"),
    (pick(5), "names no"),
    (pick(""), "not on the menu"),
    (pick("DEPTH"), "not on the menu"),
    (pick("DEPTH = 4"), "not on the menu"),
    (pick("DEPTH = 5; import os"), "not on the menu"),
    (pick("DEPTH = 10**9"), "not on the menu"),
    (pick("SEED = 1"), "not on the menu"),
    (pick("../../etc/passwd = 1"), "not on the menu"),
    (pick("TOKENS_PER_STEP = 100"), "not on the menu"),
    (pick("\x00 = \x00"), "not on the menu"),
    (pick("MATRIX_LR = ０.０４"), "not on the menu"),
    (json.dumps({"constant": "MATRIX_LR", "value": "0.04"}), "must be float"),
    (json.dumps({"constant": "TIED", "value": 1}), "must be bool"),
    (json.dumps({"constant": "ROWS", "value": True}), "must be int"),
    (json.dumps({"constant": "BETAS", "value": [[]]}), "not on the menu"),
    (json.dumps({"constant": "MISSING", "value": 1}), "not on the menu"),
    (json.dumps({"constant": ["ROWS"], "value": 1}), "names no"),
    ("x" * 1_000_000, "longer than"),
]
CODE_ANSWERS = [
    (fenced(SCHEDULE), None),
    (SCHEDULE, None),
    (fenced(SCHEDULE, ""), None),
    (fenced(SCHEDULE).replace("\n", "\r\n"), None),
    (f"<thinking>```python\nx\n```</thinking>{fenced(SCHEDULE)}", None),
    (fenced('def schedule(progress):\n    """Say ```so``` here."""\n    return 1 - progress'), None),
    (fenced(definition(SOURCE, "schedule")), "changes nothing"),
    ("", "empty"),
    ("Make it cosine.", "does not parse"),
    ("```", "cut off"),
    (f"```python\n{SCHEDULE}", "cut off"),
    (fenced(SCHEDULE) + fenced(SCHEDULE), "2 fenced"),
    (fenced(""), "one function or class"),
    (fenced(SOURCE), "one function or class"),
    (fenced("import os\n" + SCHEDULE), "one function or class"),
    (fenced("def schedule(p):\n    return 1\n\n\ndef schedule(p):\n    return 2"), "one function or class"),
    (fenced("schedule = lambda p: 1"), "one function or class"),
    (fenced("def main():\n    pass"), "not requested"),
    (fenced("def warmup(p):\n    return 1"), "not requested"),
    (fenced(SCHEDULE.replace("1.0", "half")), "uses half"),
    (fenced("def schedule(p):\n    import torch_that_is_missing\n    return 1"), "not installed"),
    (fenced("def schedule(p):\n    return open('x')"), "open"),
    (fenced(SCHEDULE.replace("    ", "")), "does not parse"),
    (fenced(SCHEDULE.replace("-", "−")), "does not parse"),
    (fenced("def schedule(p):\n    return (" + "(" * 3000), "does not parse"),
    (fenced("def schedule(p):\n    return " + "not " * 4000 + "p"), "does not parse|nested"),
    (fenced("def schedule(p):\n    return 1\x00"), "does not parse"),
    (fenced("--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-x\n+y", "diff"), "does not parse"),
    (fenced("def schedule(p):\n    return 1\n" * 5000), "longer than|one function"),
]
PAIR_ANSWERS = [
    (pairs(pair("DEPTH = SETTINGS.depth", "DEPTH = 6")), None),
    (pairs(pair("** 2)", "** 3)"), pair("TIED = False", "TIED = True")), None),
    (f"```json\n{pairs(pair('TIED = False', 'TIED = True'))}\n```", None),
    (pairs(pair("DEPTH = 4", "DEPTH = 6")), "occurs 0 times"),
    (pairs(pair("SETTINGS", "S")), "times, not once"),
    (pairs(pair("TIED = False", "TIED = True"), pair("TIED = False", "TIED = 1")), "occurs 0 times"),
    (pairs(pair("", "x = 1")), "empty"),
    (pairs(pair("\n", "\n\n")), "empty"),
    (pairs(pair("TIED = False", "TIED = False")), "changes nothing"),
    (pairs(pair("TIED = False", "TIED = False  # no")), "changes nothing"),
    (pairs(pair("ROWS = SETTINGS.rows", "ROWS = 7")), "multiple"),
    (pairs(pair("def schedule(progress: float) -> float:\n", "")), "does not compile"),
    (pairs(pair("class MLP(nn.Module):", "class FFN(nn.Module):")), "uses MLP"),
    (pairs(pair("def main() -> None:", "def run_all() -> None:")), "main is missing"),
    (pairs(), "list of 1 to"),
    (pairs(*[pair("a", "b")] * 99), "list of 1 to"),
    (pairs(pair(1, 2)), "texts"),
    (pairs(pair(None, "x")), "texts"),
    (pairs(["TIED = False", "TIED = True"]), "texts"),
    (json.dumps({"edits": "TIED"}), "list of 1 to"),
    (json.dumps({"edits": {"search": "a", "replace": "b"}}), "list of 1 to"),
    (json.dumps({"path": "../x", "content": SOURCE}), "list of 1 to"),
    (pairs(pair("TIED = False", "TIED = '\ud800'")), "does not parse"),
    (pairs(pair("TIED = False", "X = " + "9" * 300_000)), "longer than"),
    ("<<<<<<< SEARCH\nTIED = False\n=======\nTIED = True\n>>>>>>> REPLACE", "no JSON"),
]
ANSWERS = [
    *(("menu", *answer) for answer in MENU_ANSWERS),
    *(("definition", *answer) for answer in CODE_ANSWERS),
    *(("replace", *answer) for answer in PAIR_ANSWERS),
]


@pytest.mark.parametrize(("form", "text", "word"), ANSWERS, ids=[f"{a[0]}-{n}" for n, a in enumerate(ANSWERS)])
def test_every_answer_ends_in_a_proposal_or_a_short_reason(form, text, word):
    menu = TARGETS if form == "definition" else MENU
    if word is None:
        proposal = parse_answer(text, form, SOURCE, SETTINGS, menu)
        check(proposal.source, SOURCE, frozenset(), SETTINGS)
        assert proposal.hypothesis.isprintable()
        return
    with pytest.raises(Rejected, match=word) as caught:
        parse_answer(text, form, SOURCE, SETTINGS, menu)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_schema_and_parser_agree_on_every_entry():
    allowed = schema("menu", MENU)["properties"]["change"]["enum"]
    assert allowed == entries(MENU)
    for change in allowed[::3]:
        proposal = parse_answer(pick(change), "menu", SOURCE, SETTINGS, MENU)
        ((name, value),) = proposal.edit["values"].items()
        assert change == f"{name} = {value!r}"


# The real experiment


@pytest.fixture(scope="module")
def real():
    """The repository's own train.py with the offline preset's settings on a CPU."""
    chosen, _ = preset.adapt(preset.load("offline"), preset.Hardware("cpu", 16.0, 0))
    return (Path(__file__).parents[2] / "train.py").read_text(encoding="utf-8"), chosen.settings()


def test_the_real_experiment_breaks_no_constraint_and_has_a_space(real):
    source, settings = real
    values = {name: item.value for name, item in constants(source, settings).items()}
    menu = space.menu(source, settings)
    assert space.broken(values, settings) is None
    assert {"DEPTH", "WIDTH", "MATRIX_LR", "WEIGHT_DECAY", "WARMDOWN", "ROWS"} <= menu.keys()
    for name in list(menu)[::4]:
        check(set_constant(source, name, menu[name][0]), source, frozenset(), settings)


def test_every_setting_that_the_real_experiment_takes_is_known(real):
    source, settings = real
    for name in re.findall(r"^([A-Z_]+) = SETTINGS\.\w+", source, re.MULTILINE):
        assert name in constants(source, settings), name


def test_the_real_experiments_definitions_can_be_replaced_whole(real):
    source, _ = real
    for name in (node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        assert replace_definition(source, name, definition(source, name)) == source
