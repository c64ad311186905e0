"""The built-in corpus: short English stories from a grammar of our own, without network.

A story is a plot (lab/data/story_plots.py) told about a cast (drawn from lab/data/story_words.py). The cast is
drawn once and fills the same slots throughout, so names, pronouns, owners, colors, places and sums stay
true to the last line, and a model that remembers more predicts better. The plot's choices vary the
wording; a voice per story keeps its style.

A story depends on (seed, index) alone, on every platform and Python: only `random.Random(int).random()`
is used, whose stream Python guarantees. Not covered: knowledge of the world, long texts, any language
but English.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import NamedTuple

from lab.data import story_plots, story_words

MAX_BYTES = 1400  # of one story; a longer one is told again with fewer details
VOICES = 3  # ways of telling; `[~a|b|c]` lists one wording for each

Draw = Callable[[], float]
Node = tuple  # of str | Choice
PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
ROLES_OF = {"": "H", "f": "F", "r": "R", "q": "Q", "e": "E"}  # pronoun prefix: slot of the name
TOKEN = re.compile(r"\[[~?]|[\[|\]]|<\w+>|[^\[|\]<]+")


class Choice(NamedTuple):
    """Alternatives of a template: by the story's voice ("~"), at random (""), or a detail to omit ("?")."""

    kind: str
    options: tuple[Node, ...]


class Grammar(NamedTuple):
    """Everything compiled: plots to nodes, tables to rows of slots, settings to their slots and spots."""

    plots: tuple[Node, ...]
    tables: tuple[tuple[dict[str, str], ...], ...]
    settings: tuple[tuple[dict[str, str], str, tuple[tuple[str, str], ...]], ...]
    people: tuple[tuple[str, str], ...]


def story(seed: int, index: int) -> str:
    """Story number `index` of `seed`: ASCII, 400 to 1400 bytes, paragraphs separated by one newline.

    Raises ValueError unless 0 <= seed and 0 <= index < 2**64: then no two pairs share a random stream.
    """
    if seed < 0 or not 0 <= index < 1 << 64:
        raise ValueError(f"seed {seed}, index {index}: need seed >= 0 and 0 <= index < 2**64")
    draw = Random((seed << 64) + index).random
    grammar = compile_grammar()
    plot, slots = pick(draw, grammar.plots), cast(draw, grammar)
    detail = draw()
    text = tell(plot, slots, detail, draw)
    while len(text) > MAX_BYTES:
        detail *= 0.6
        text = tell(plot, slots, detail, draw)
    return text


def stories(seed: int, start: int = 0) -> Iterator[str]:
    """Endless: story(seed, start), story(seed, start + 1), ..."""
    while True:
        yield story(seed, start)
        start += 1


def tell(plot: Node, slots: dict[str, str], detail: float, draw: Draw) -> str:
    """One telling of `plot` with a share `detail` of its details; closes up the spaces of omitted parts."""
    pieces: list[str] = []
    expand(plot, int(draw() * VOICES), detail, draw, pieces.append)
    text = "".join(pieces).format_map(slots)
    text = text.replace("    ", " ").replace("  ", " ").replace("  ", " ")
    return text.replace(" \n", "\n").replace("\n ", "\n").replace("\n\n", "\n").strip()


def expand(node: Node, voice: int, detail: float, draw: Draw, emit: Callable[[str], None]) -> None:
    """Emit the literals of `node` in order, one option of every choice."""
    for item in node:
        if item.__class__ is str:
            emit(item)
            continue
        kind, options = item
        if kind != "?" or draw() < detail:
            expand(options[voice if kind == "~" else int(draw() * len(options))], voice, detail, draw, emit)


def pick(draw: Draw, items: tuple):
    """One of `items`, equally likely."""
    return items[int(draw() * len(items))]


def distinct(draw: Draw, items: tuple, count: int) -> list:
    """`count` different ones of `items`, in random order."""
    chosen: list = []
    while len(chosen) < count:
        item = items[int(draw() * len(items))]
        if item not in chosen:
            chosen.append(item)
    return chosen


def cast(draw: Draw, grammar: Grammar) -> dict[str, str]:
    """Slots of one story: who, where, when, what and how many."""
    slots: dict[str, str] = {}
    for table in grammar.tables:
        slots.update(pick(draw, table))
    children(draw, slots)
    places(draw, slots, grammar)
    things(draw, slots, grammar)
    numbers(draw, slots)
    return slots


def children(draw: Draw, slots: dict[str, str]) -> None:
    """Names and pronouns of hero, friend (mostly of the other sex), two more children and elder."""
    taken: set[str] = set()
    hero = "girl" if draw() < 0.5 else "boy"
    other = "boy" if hero == "girl" else "girl"
    for prefix, role in ROLES_OF.items():
        sex = hero if prefix == "" or draw() < (0.25 if prefix == "f" else 0.5) else other
        slots.update(pronouns(prefix, sex))
        name = pick(draw, names(sex)) if role != "E" else elder(draw, sex)
        while name in taken:
            name = pick(draw, names(sex))
        taken.add(name)
        slots[role] = name
    slots["P"] = pick(draw, story_words.PET_NAMES)
    slots["trait"], slots["ftrait"] = trait, _ = distinct(draw, story_words.TRAITS, 2)
    slots["a_trait"] = article(trait)
    slots["like"], slots["flike"] = distinct(draw, story_words.LIKES, 2)


def elder(draw: Draw, sex: str) -> str:
    """A grown-up's title and family name."""
    return pick(draw, story_words.ELDERS[sex]) + " " + pick(draw, story_words.SURNAMES)


def places(draw: Draw, slots: dict[str, str], grammar: Grammar) -> None:
    """The town, four of its spots as phrases (s) and nouns (p), four of its people (r), their goods (g)."""
    land, suffix, spots = pick(draw, grammar.settings)
    slots.update(land)
    slots["town"] = pick(draw, story_words.TOWN_FIRST) + " " + suffix
    slots["daypart"] = pick(draw, ("morning", "afternoon", "day"))
    (slots["s1"], slots["p1"]), (slots["s2"], slots["p2"]), (slots["s3"], slots["p3"]), (slots["s4"], slots["p4"]) = (
        distinct(draw, spots, 4)
    )
    slots["s1_cap"], slots["s2_cap"] = capital(slots["s1"]), capital(slots["s2"])
    for number, (person, good) in zip("1234", distinct(draw, grammar.people, 4), strict=True):
        slots["r" + number], slots["g" + number], slots["a_g" + number] = person, good, article(good)


def things(draw: Draw, slots: dict[str, str], grammar: Grammar) -> None:
    """The key thing (its kind comes from the table of things) with color and mark, and a second thing."""
    color, color2 = distinct(draw, story_words.COLORS, 2)
    second = pick(draw, grammar.tables[0])["noun"]
    slots["color"], slots["a_color"], slots["mark"] = color, article(color), pick(draw, story_words.MARKS)
    slots["thing"] = thing = color + " " + slots["noun"]
    slots["thing2"] = thing2 = color2 + " " + second
    slots["a_thing"], slots["a_thing2"] = article(thing), article(thing2)


def numbers(draw: Draw, slots: dict[str, str]) -> None:
    """Counts as words: n = m + rest, sum = n + m, m_less = m - 1 (at least two of everything)."""
    n = 6 + int(draw() * 4)
    m = 3 + int(draw() * (n - 4))
    word = story_words.NUMBERS
    slots.update(n=word[n], m=word[m], rest=word[n - m], sum=word[n + m], m_less=word[m - 1])
    slots.update({capital(slot): capital(slots[slot]) for slot in ("n", "m", "sum", "m_less")})
    slots.update(many=word[3 + int(draw() * 3)], age=word[7 + int(draw() * 5)])


def names(sex: str) -> list[str]:
    """First names of children."""
    return story_words.GIRLS if sex == "girl" else story_words.BOYS


@cache
def pronouns(prefix: str, sex: str) -> dict[str, str]:
    """Slots {he} {him} {his} {himself} {He} {Him} {His} and {child}, each behind the character's prefix."""
    forms = dict(zip(PRONOUNS["boy"], PRONOUNS[sex], strict=True))
    lower = {prefix + slot: form for slot, form in forms.items()}
    upper = {capital(prefix + slot): capital(form) for slot, form in forms.items()}
    return lower | upper | {prefix + "child": sex}


def article(phrase: str) -> str:
    """`phrase` with a or an in front."""
    return ("an " if phrase[0] in "aeiou" or phrase.startswith("honest") else "a ") + phrase


def capital(phrase: str) -> str:
    """`phrase` with its first letter in upper case."""
    return phrase[0].upper() + phrase[1:]


@cache
def compile_grammar() -> Grammar:
    """Parse plots and tables once."""
    settings = []
    for line in story_words.SETTINGS.strip().split("\n"):
        land, suffix, *spots = line.split("|")
        pairs = tuple((spot, spot[spot.index("the ") :]) for spot in spots)
        settings.append(({"land": land, "a_land": article(land)}, suffix, pairs))
    return Grammar(
        plots=tuple(parse(text) for text in story_plots.PLOTS.values()),
        tables=tuple(table_rows(text) for text in story_words.TABLES),
        settings=tuple(settings),
        people=tuple(tuple(line.split("|")) for line in story_words.ROLES.split("\n")),
    )


def table_rows(text: str) -> tuple[dict[str, str], ...]:
    """Rows as slots, each with its capitalised form; a column headed `a:x` fills {a_x} as well."""
    header, *lines = text.strip().split("\n")
    rows = []
    for line in lines:
        row: dict[str, str] = {}
        for column, value in zip(header.split("|"), line.split("|"), strict=True):
            slot = column.removeprefix("a:")
            row[slot], row[capital(slot)] = value, capital(value)
            if slot != column:
                row["a_" + slot] = article(value)
        rows.append(row)
    return tuple(rows)


def parse(text: str) -> Node:
    """Compile a template: line ends are spaces, `/` is a line end."""
    tokens = TOKEN.findall(re.sub(r"\s*/\s*", "\f", text).replace("\n", " ").replace("\f", "\n"))
    node, closing = parse_until(iter([re.sub(" +", " ", token) for token in tokens]))
    if closing:
        raise ValueError(f"unbalanced {closing!r} in a template: {text[:60]}")
    return node


def parse_until(tokens: Iterator[str]) -> tuple[Node, str]:
    """Items up to the next `|` or `]` that is not inside a choice, and that token ("" at the end)."""
    items: list[str | Choice] = []
    for token in tokens:
        if token in ("|", "]"):
            return tuple(items), token
        if token[0] == "[":
            items.append(parse_choice(tokens, token[1:]))
        elif token[0] == "<":
            items.extend(rule(token[1:-1]))
        else:
            items.append(token)
    return tuple(items), ""


def parse_choice(tokens: Iterator[str], kind: str) -> Choice:
    """The options up to the closing bracket."""
    options, closing = [], "|"
    while closing == "|":
        option, closing = parse_until(tokens)
        options.append(option)
    if closing != "]" or (kind == "~" and len(options) != VOICES):
        raise ValueError(f"a choice is not closed, or not one wording a voice: {options}")
    return Choice(kind, tuple(options))


@cache
def rule(name: str) -> Node:
    """A shared rule, compiled."""
    return parse(story_plots.RULES[name])
