"""The three forms of a language model's answer; each becomes a proposal or one short reason for refusal.

- menu: JSON that picks one entry of a menu of constants and values, and of ideas; code writes the edit. For small
  models.
- definition: one named function or class, whole, in a fenced block. From about 7 billion parameters.
- replace: JSON with search/replace pairs, each of which must match once. From about 32 billion parameters.

`schema` constrains decoding; `parse_answer` does not rely on it. Text is only parsed, never run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

from lab.errors import one_line
from lab.loop.ideas import Idea, apply
from lab.loop.proposal import Proposal, check, describe, in_words
from lab.loop.source import (
    Rejected,
    constants,
    is_definition,
    parse,
    replace_definition,
    search_replace,
    set_constant,
)
from lab.loop.space import coerce

FORMS = ("menu", "definition", "replace")
IDEA = "idea"  # the menu's name for ideas; lower case, so never a constant's
MAX_ANSWER = 200_000  # characters; a longer answer repeats itself
MAX_PAIRS = 8  # search/replace pairs of one proposal
REASON = {"type": "string", "maxLength": 160}
THINKING = re.compile(r"<(think|thinking)>.*?(</\1>|\Z)", re.DOTALL)
OPENS, CLOSES = re.compile(r"[ \t]*```[^`]*"), re.compile(r"[ \t]*```[ \t]*")  # whole lines around a block

Menu = Mapping[str, Sequence[Any]]


class NoAnswer(Rejected):
    """The model gave no answer in the requested form."""


def schema(form: str, menu: Menu) -> dict[str, Any] | None:
    """JSON schema of an answer, with the reason first, so that it precedes the change; None where it is not JSON."""
    if form == "menu":
        change = {"type": "string", "enum": entries(menu)}
        return _object(reason=REASON, change=change)
    if form == "replace":
        text = {"type": "string", "maxLength": 6000}
        pairs = {"type": "array", "minItems": 1, "maxItems": MAX_PAIRS, "items": _object(search=text, replace=text)}
        return _object(reason=REASON, edits=pairs)
    return None


def entries(menu: Menu) -> list[str]:
    """The menu as the strings a model chooses from: "MATRIX_LR = 0.025"."""
    return [f"{name} = {value!r}" for name, values in menu.items() for value in values]


def parse_answer(
    text: str,
    form: str,
    source: str,
    settings: Mapping[str, Any],
    menu: Menu,
    *,
    tried: AbstractSet[str] = frozenset(),
    agent: str = "model",
    ideas: Mapping[str, Idea] | None = None,
) -> Proposal:
    """The checked proposal that an answer means. Raises Rejected, with one short reason, for every other answer.

    `menu` holds the values on offer (form menu) or, as its keys, the definitions that may be replaced.
    """
    if len(text) > MAX_ANSWER:
        raise Rejected(f"the answer is longer than {MAX_ANSWER // 1000} kB")
    plain = THINKING.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if not plain:
        raise NoAnswer("the answer is empty")
    read = {"menu": partial(_pick, ideas=ideas or {}), "definition": _define, "replace": _replace}[form]
    new, reason = read(plain, source, settings, menu)
    check(new, source, tried, settings)
    edit = describe(new, source, settings, ideas)
    return Proposal(new, reason or in_words(edit), agent, edit)


def _pick(
    text: str, source: str, settings: Mapping[str, Any], menu: Menu, ideas: Mapping[str, Idea]
) -> tuple[str, str]:
    """The menu's entry that the answer names; a separate {"constant", "value"} is accepted too."""
    answer = _json_object(text)
    change = answer.get("change")
    if isinstance(change, str):
        name, _, wanted = (part.strip() for part in change.partition("="))
        values = [value for value in menu.get(name, ()) if repr(value) == wanted]
    elif isinstance(answer.get("constant"), str):
        name, wanted, block = answer["constant"], answer.get("value"), constants(source, settings)
        values = [coerce(block[name], wanted)] if name in block else []
        values = [value for value in values if value in menu.get(name, ())]
    else:
        raise Rejected('the answer names no "change"')
    if not values:
        raise Rejected(f"not on the menu: {one_line(f'{name} = {wanted}', 80)}")
    new = apply(source, values[:1], ideas) if name == IDEA else set_constant(source, name, values[0])
    return new, _reason(answer)


def _define(text: str, source: str, settings: Mapping[str, Any], menu: Menu) -> tuple[str, str]:
    """The one definition in the answer's fenced code, and the prose before it as the reason."""
    blocks = _fenced(text)
    if not blocks and "```" in text:
        raise Rejected("the fenced block is cut off")
    if len(blocks) > 1:
        raise Rejected(f"{len(blocks)} fenced blocks; one is expected")
    code = blocks[0] if blocks else text
    body = parse(code).body
    named = [node.name for node in body if is_definition(node)]
    if len(body) != 1 or len(named) != 1:
        raise Rejected("the code must be exactly one function or class")
    if named[0] not in menu:
        raise Rejected(f"replaces {one_line(named[0], 60)}, which was not requested")
    return replace_definition(source, named[0], code), text.partition("```")[0] if blocks else ""


def _fenced(text: str) -> list[str]:
    """The fenced blocks that are closed. Line by line: a search would take time quadratic in the open ones."""
    blocks, block = [], None
    for line in text.split("\n"):
        if block is None:
            block = "" if OPENS.fullmatch(line) else None
        elif CLOSES.fullmatch(line):
            blocks.append(block)
            block = None
        else:
            block += f"{line}\n"
    return blocks


def _replace(text: str, source: str, settings: Mapping[str, Any], menu: Menu) -> tuple[str, str]:
    """Search/replace pairs, each applied to what the ones before it left; none is skipped."""
    answer = _json_object(text)
    edits = answer.get("edits")
    if not isinstance(edits, list) or not 1 <= len(edits) <= MAX_PAIRS:
        raise Rejected(f'"edits" must be a list of 1 to {MAX_PAIRS} search/replace pairs')
    for edit in edits:
        search, replace = (edit.get(key) if isinstance(edit, dict) else None for key in ("search", "replace"))
        if not isinstance(search, str) or not isinstance(replace, str):
            raise Rejected('an edit must have the texts "search" and "replace"')
        source = search_replace(source, search, replace)
    return source, _reason(answer)


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object in an answer: bare, fenced, or with prose around it."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0:
        raise NoAnswer("the answer has no JSON object")
    if end < start:
        raise Rejected("the JSON is cut off")
    try:
        answer = json.loads(
            text[start : end + 1], object_pairs_hook=_no_duplicates, parse_constant=_no_constant, strict=False
        )
    except (ValueError, RecursionError) as error:
        raise Rejected(f"not valid JSON: {one_line(str(error), 80)}") from None
    return answer


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("duplicate key")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _reason(answer: Mapping[str, Any]) -> str:
    reason = answer.get("reason")
    return reason if isinstance(reason, str) else ""


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
