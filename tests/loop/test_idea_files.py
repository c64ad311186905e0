"""Files of ideas: what they may hold, where their changes go, and every refusal in one line."""

import re

import pytest
from conftest import ROOT
from experiment import SETTINGS, SOURCE

from lab.errors import UserError
from lab.loop.ideas import apply, load, load_all, present
from lab.loop.proposal import check
from lab.loop.source import Rejected

HEAD = 'claim = "more depth in time"\ncost = "none"\nsource = "2401.00001"\n'
ADD = "add = '''\nGAIN = 0.5  # of the update\n\n\ndef scaled(x):\n    return GAIN * x\n'''\n"
CHANGE = """
[[change]]
in = "MLP.__call__"
replace = "return self.down(nn.relu(self.up(x))**2)"
code = '''
x = self.up(x)  # twice as wide
return scaled(self.down(x))
'''
"""
CODE = f"{HEAD}{ADD}{CHANGE}"


@pytest.fixture
def written(tmp_path):
    """Write files of ideas and load them: written(one=..., two=...)."""

    def written(**files: str):
        for name, text in files.items():
            (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        return load_all(tmp_path)

    return written


def change(scope: str, code: str, **places: str) -> str:
    place = "".join(f"{key} = '''{anchor}'''\n" for key, anchor in places.items())
    return f"\n[[change]]\nin = '{scope}'\n{place}code = '''{code}'''\n"


def test_an_idea_goes_where_it_belongs_and_leaves_the_rest_as_it_is(written):
    ideas, errors = written(gain=CODE)
    assert errors == []
    source = apply(SOURCE, ["gain"], ideas)
    check(source, SOURCE, settings=SETTINGS)
    old = '        return self.down(nn.relu(self.up(x)) ** 2)  # squared: "relu²"\n'
    new = "        x = self.up(x)  # twice as wide\n        return scaled(self.down(x))\n"
    expected = SOURCE.replace(old, new).replace(
        "NAMES = [DEPTH, WIDTH]\n", "NAMES = [DEPTH, WIDTH]\nGAIN = 0.5  # of the update\n"
    )
    expected = expected.replace("class MLP", "def scaled(x):\n    return GAIN * x\n\n\nclass MLP")
    assert source == expected
    assert present(source, ideas) == {"gain"}
    assert present(SOURCE, ideas) == set()


def test_code_goes_before_after_and_into_nested_blocks_and_constants_are_set(written):
    changes = change("schedule", "progress = progress * GAIN", before="if progress < 1 - WARMDOWN:\n    return 1.0")
    changes += change("schedule", "pass", after="if progress < 1 - WARMDOWN:\n    return 1.0")
    changes += change("schedule", "return 2.0\n", replace="return 1.0")
    ideas, _ = written(one=f"{HEAD}{ADD}\n[set]\nDEPTH = 7\nBETAS = [0.9, 0.95]\n{changes}")
    with pytest.raises(Rejected, match="idea one: its changes overlap"):
        apply(
            SOURCE,
            ["one"],
            {"one": ideas["one"].__class__(**vars(ideas["one"]) | {"changes": ideas["one"].changes * 2})},
        )
    lines = apply(SOURCE, ["one"], ideas).split("\n")
    at = lines.index("    progress = progress * GAIN")
    assert lines[at : at + 4] == [
        "    progress = progress * GAIN", "    if progress < 1 - WARMDOWN:", "        return 2.0", "    pass",
    ]  # fmt: skip
    assert "DEPTH = 7  # layers" in lines
    assert "BETAS = (0.9, 0.95)  # AdamW" in lines


def test_a_train_py_that_changed_elsewhere_still_fits(written):
    ideas, _ = written(gain=CODE)
    moved = SOURCE.replace("2 layers", "three").replace("DEPTH = SETTINGS.depth", "DEPTH = 3")
    moved = moved.replace("class MLP(nn.Module):", "class MLP(nn.Module):\n    # moved\n\n    size = 3\n")
    assert "return scaled(" in apply(moved, ["gain"], ideas)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (change("MLP.forward", "pass", after="return 1"), "there is no definition MLP.forward"),
        (
            change("MLP.__call__", "pass", after="return 1"),
            "MLP.__call__ has no `return 1`; an earlier change may be why",
        ),
        (change("", "pass", before="super().__init__()\nself.up = 1"), "train.py has no `super"),
        (change("", "GAIN = 1", after="import math") * 2, "GAIN is defined in train.py already"),
        ("\n[set]\nNOTHING = 3\n" + CHANGE, "there is no top-level constant NOTHING"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(written, changes, reason):
    ideas, errors = written(bad=f"{HEAD}{ADD}{changes}")
    assert errors == []
    source = SOURCE.replace("TIED = False", "TIED = False\nGAIN = 3") if "already" in reason else SOURCE
    with pytest.raises(Rejected) as refused:
        apply(source, ["bad"], ideas)
    assert str(refused.value).startswith(f"idea bad: {reason}")


def test_an_anchor_must_be_there_once_and_have_its_lines_for_itself(written):
    ideas, _ = written(one=f"{HEAD}{ADD}{change('main', 'pass', after='rate = 1')}")
    for body, reason in (
        ("rate = 1\n    rate = 1", "main has more than one `rate = 1`"),
        ("if DEPTH: rate = 1", "shares a line with other code"),
        ("rate = 1; DEPTH", "shares a line with other code"),
    ):
        with pytest.raises(Rejected, match=reason):
            apply(SOURCE.replace("    run(build_model", f"    {body}\n    run(build_model"), ["one"], ideas)


def test_ideas_that_exclude_each_other_are_refused_in_either_order(written):
    one = CODE.replace("source =", 'excludes = ["two"]\nsource =')
    two = CODE.replace("GAIN", "SIZE").replace("scaled", "sized").replace('"MLP.__call__"', '"schedule"')
    two = two.replace("return self.down(nn.relu(self.up(x))**2)", "return 1.0")
    ideas, errors = written(one=one, two=two)
    assert errors == []
    assert ideas["two"].excludes == {"one"}
    with pytest.raises(Rejected, match="idea two cannot be combined with one"):
        apply(SOURCE, ["two", "one"], ideas)
    with pytest.raises(Rejected, match="idea one cannot be combined with two"):
        apply(apply(SOURCE, ["two"], ideas), ["one"], ideas)
    with pytest.raises(Rejected, match="there is no idea three; choose one of: one, two"):
        apply(SOURCE, ["three"], ideas)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("claim = ", "Invalid value (at end of document)"),
        (CODE.replace('cost = "none"\n', ""), "cost must be one line of at most 200 characters"),
        (CODE.replace('"none"', '"""a\nb"""'), "cost must be one line"),
        (CODE.replace('"none"', f'"{"x" * 201}"'), "cost must be one line"),
        (f"gain = 1\n{CODE}", "unknown key gain; the keys are add, change, claim, cost, excludes, set, source"),
        (f'{HEAD}excludes = "x"\n{ADD}{CHANGE}', "excludes must be a list"),
        (f'{HEAD}excludes = ["bad"]\n{ADD}{CHANGE}', "excludes must be a list of other ideas"),
        (f"{HEAD}{CHANGE}", "add must bring a constant or a definition"),
        (HEAD + "add = 'import os'\n" + CHANGE, "add may hold constants and definitions alone, not line 1 of it"),
        (HEAD + "add = 'A = '\n" + CHANGE, "add does not parse"),
        (HEAD + "add = 3\n" + CHANGE, "add must be a string"),
        (f"{HEAD}{ADD}", "it must have at least one [[change]]"),
        (f"{HEAD}{ADD}change = [3]\n", "change 1 must be a table"),
        (f"{HEAD}{ADD}[[change]]\ncode = 'pass'\n", "change 1 must have code, and one of replace, before, after"),
        (f"{HEAD}{ADD}[[change]]\nafter = 'pass'\n", "change 1 must have code"),
        (HEAD + ADD + change("", "pass", after="x", before="y"), "change 1 must have code, and one of"),
        (HEAD + ADD + CHANGE + change("", "pass", after="x ="), "change 2: after does not parse"),
        (HEAD + ADD + change("", "x =", after="x"), "change 1: code does not parse"),
        (HEAD + ADD + change("", "x", after="# x"), "change 1: after must be one or more statements"),
        (f"{HEAD}{ADD}[[change]]\nline = 3\ncode = ''\nafter = 'x'\n", "change 1: unknown key line"),
        (f"{HEAD}{ADD}[[change]]\nin = 3\ncode = ''\nafter = 'x'\n", "change 1: in must be a string"),
    ],
)
def test_a_file_that_is_no_idea_is_an_error_in_one_line_and_the_others_load(written, tmp_path, text, reason):
    ideas, errors = written(bad=text, good=CODE)
    assert list(ideas) == ["good"]
    assert len(errors) == 1
    assert errors[0].startswith(f"{tmp_path.name}/bad.toml: {reason}")
    assert "\n" not in errors[0]


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, content in (("latin.toml", "größer".encode("latin-1")), ("Upper.toml", CODE.encode())):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{tmp_path.name}/{name}: .*(is not UTF-8|must be lower-case letters)"):
            load(tmp_path / name)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match="is not a regular file"):
        load(tmp_path / "folder.toml")
    assert load_all(tmp_path / "none") == ({}, [])


def test_an_unknown_excluded_idea_is_an_error(written):
    ideas, errors = written(one=CODE.replace("source =", 'excludes = ["gone"]\nsource ='))
    assert errors == ["ideas/one.toml: excludes gone, which is no idea"]
    assert list(ideas) == ["one"]


def test_the_idea_of_the_documentation_fits(written):
    text = re.search(r"```toml\n(.*?)```", (ROOT / "docs/AGENTS.md").read_text(encoding="utf-8"), re.S)[1]
    ideas, errors = written(example=text, an_idea_that_does_the_same=CODE)
    assert errors == []
    source = apply((ROOT / "train.py").read_text(encoding="utf-8"), ["example"], ideas)
    compile(source, "train.py", "exec")
    assert "WARMDOWN = 0.8  #" in source
