"""The search space of the constants block: which values are worth trying, and which are impossible.

The kind of a constant follows from its name and value (`MATRIX_LR = 0.02` is a rate, `ROWS = 64` a power of two), so
that a block changed by an experiment still has a search space. Each kind has a natural scale, on which one step matters
about equally everywhere: rates by their logarithm, shares by the arcsine of their root, which is finer near 0 and 1.
`step` takes a random step on it, `coordinates` says where a value lies, and `allowed_values` lists neighbours for those
who choose from a menu, such as small local models. `broken` names a constraint that would make a run fail. The dtype is
not searched: it depends on the machine.
"""

import functools
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lab.loop.source import Constant, Rejected, constants, digest, skeleton

WINDOWS = ("L", "SL", "SSL", "SSSL", "SSLL", "LSSL", "S")
LETTERS = 4  # layers of a window pattern that the scale tells apart
DISTANCES = (-2.77, -1.39, -0.94, -0.45, 0.45, 0.94, 1.39, 2.77)  # of a menu, in steps: a rate times 1.25, 1.6, 2, 4
HALVINGS = (-2, -1, 1, 2)  # the same for powers of two
LEVERS = {"power": 3, "count": 2, "width": 2, "window": 2}  # by kind: how much oftener than others it is worth a change
LARGEST = 2**40  # larger than any size, rate or count that fits a machine
OWNED = re.compile(r"SEED|MINUTES|BUDGET|SEQUENCE_LENGTH|MAX_SEQ_LEN|VOCAB")  # fixed by the task
SAME_WORK = ("rate", "decay", "momentum")  # kinds that change no operation, only its numbers

# Meaning -> names: ours first, then upstream's. Looked up in the file, then in the settings.
ALIASES = {
    "tokens": ("TOKENS_PER_STEP", "TOTAL_BATCH_SIZE"),
    "rows": ("ROWS", "DEVICE_BATCH_SIZE"),
    "sequence": ("SEQUENCE_LENGTH", "MAX_SEQ_LEN"),
    "width": ("WIDTH", "MODEL_DIM"),
    "head_dim": ("HEAD_DIM",),
    "warmup": ("WARMUP", "WARMUP_RATIO"),
    "warmdown": ("WARMDOWN", "WARMDOWN_RATIO"),
}
KINDS = (  # the first pattern found in the name decides
    ("window", r"WINDOW"),
    ("power", r"^TOKENS_PER_STEP$|BATCH|^ROWS$"),
    ("count", r"^DEPTH$|LAYERS|ASPECT|MLP_RATIO"),
    ("steps", r"STEPS$"),
    ("share", r"^WARM(UP|DOWN)(_RATIO)?$|^DOUBLING$|FINAL|FRAC|SHARE|DROPOUT"),
    ("rate", r"(^|_)LR($|_)|LEARNING_RATE"),
    ("decay", r"DECAY"),
    ("momentum", r"MOMENTUM|BETA"),
    ("magnitude", r"EPS|BASE$|THETA"),
    ("cap", r"CAP$"),
    ("head_dim", r"^HEAD_DIM$"),
    ("width", r"^(WIDTH|MODEL_DIM)$"),
)


class Scale(NamedTuple):
    """The natural scale of a kind of number, in steps."""

    place: Callable[[float], float]  # of a value
    value: Callable[[float], float]  # at a place


def _logarithm(step: float, offset: float = 0.0) -> Scale:
    return Scale(lambda v: math.log(v + offset) / step, lambda x: max(0.0, math.exp(x * step) - offset))


SCALES = {
    "rate": _logarithm(0.5),
    "positive": _logarithm(0.5),
    "magnitude": _logarithm(1.0),
    "decay": _logarithm(0.5, 0.01),
    "steps": _logarithm(0.7),
    "count": _logarithm(0.25, 1),
    "width": _logarithm(0.2),
    "power": _logarithm(math.log(2)),
    "head_dim": _logarithm(math.log(2)),
    "share": Scale(lambda v: math.asin(v**0.5) / 0.15, lambda x: math.sin(min(max(x * 0.15, 0), math.pi / 2)) ** 2),
    "momentum": Scale(lambda v: -math.log(1 - v) / 0.5, lambda x: max(0.0, 1 - math.exp(-x * 0.5))),
    "cap": Scale(  # by its inverse, which is 0 for none
        lambda v: -math.log((1 / v if v else 0.0) + 0.01) / 0.5,
        lambda x: 1 / inverse if (inverse := math.exp(-x * 0.5) - 0.01) > 0.002 else 0.0,
    ),
}


def kind(constant: Constant) -> str:
    """The kind of quantity that a constant is: by its name, then by its type."""
    value, named = constant.value, _named(constant.name)
    if isinstance(value, bool):
        return "switch"
    if named and isinstance(value, str) == (named == "window"):
        return named
    if isinstance(value, int):
        return "power" if value >= 16 and value & (value - 1) == 0 else "count"
    return "positive" if isinstance(value, float) and value > 0 else "fixed"


@functools.cache
def _named(name: str) -> str:
    """The kind that a name stands for, or ""."""
    return next((this for this, pattern in KINDS if re.search(pattern, name)), "")


def allowed_values(name: str, block: Mapping[str, Constant], settings: Mapping[str, Any]) -> list[Any]:
    """Values worth trying for one constant, with the others unchanged: ascending, without the current value."""
    constant = block[name]
    values = {key: item.value for key, item in block.items()}
    options = {option for option in _options(constant, values, settings) if option != constant.value}
    return sorted(option for option in options if broken(values | {name: option}, settings) is None)


def menu(source: str, settings: Mapping[str, Any], tried: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Per constant, the allowed values whose file is not in `tried` (fingerprints); no empty entries."""
    block, tried = constants(source, settings), frozenset(tried)
    blank, values = skeleton(source, settings)
    offered = {name: allowed_values(name, block, settings) for name in block}
    for name, options in offered.items():
        offered[name] = [value for value in options if digest(blank, values | {name: value}) not in tried]
    return {name: options for name, options in offered.items() if options}


def coerce(constant: Constant, value: Any) -> Any:
    """`value` in the constant's own type (1 for 1.0, a list for a tuple). Raises Rejected for another type."""
    current = constant.value
    if isinstance(current, float) and type(value) is int and abs(value) < LARGEST:
        return float(value)
    if type(current) is int and type(value) is float and value.is_integer():
        return int(value)
    if isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(current):
        raise Rejected(f"{constant.name} must be {type(current).__name__}, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise Rejected(f"{constant.name} must be finite")
    return value


def broken(values: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first constraint that these constants break, in words, or None. Unknown constants are not checked."""
    for reason, holds in _rules(values, settings):
        if not holds:
            return reason
    return None


def _rules(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterable[tuple[str, bool]]:
    part = {meaning: _look_up(names, values, settings) for meaning, names in ALIASES.items()}
    tokens, rows, sequence = part["tokens"], part["rows"], part["sequence"]
    for meaning in ("tokens", "rows", "sequence", "width", "head_dim"):
        size = part[meaning]
        yield f"{ALIASES[meaning][0]} must be positive", size is None or size > 0
    if tokens and rows and sequence:
        per_pass = rows * sequence * settings.get("processes", 1)
        yield f"{tokens} tokens per step is not a multiple of the {per_pass} per pass", tokens % per_pass == 0
    if part["head_dim"]:
        yield f"head_dim {part['head_dim']} must be even", part["head_dim"] % 2 == 0
    if part["head_dim"] and part["width"]:
        divides = part["width"] % part["head_dim"] == 0
        yield f"head_dim {part['head_dim']} does not divide width {part['width']}", divides
    if part["warmup"] is not None and part["warmdown"] is not None:
        yield "warmup and warmdown together exceed the run", part["warmup"] + part["warmdown"] <= 1 + 1e-9
    for name, value in values.items():
        yield from _own_rules(name, value)


def same_work(values: Iterable[str]) -> bool:
    """Whether changes of these constants leave what is computed for a token as it is."""
    kinds = {name: _named(name) for name in values}
    return all(kind in SAME_WORK or (kind == "share" and "WARM" in name) for name, kind in kinds.items())


def _own_rules(name: str, value: Any) -> Iterable[tuple[str, bool]]:
    """Constraints on one constant by itself."""
    this = kind(Constant(name, value, "", 0))
    if this == "window":
        yield f"{name} must be made of the letters S and L", value != "" and set(value) <= set("SL")
    numbers = list(_numbers(value))
    if not all(abs(v) < LARGEST for v in numbers):
        yield f"{name} must be finite and below {LARGEST}", False
    elif this in ("rate", "magnitude"):
        yield f"{name} must be positive", all(v > 0 for v in numbers)
    elif this == "share":
        yield f"{name} must lie in 0 to 1", all(0 <= v <= 1 for v in numbers)
    elif this == "momentum":
        yield f"{name} must lie in 0 to below 1", all(0 <= v < 1 for v in numbers)
    elif this in ("decay", "cap", "steps"):
        yield f"{name} must not be negative", all(v >= 0 for v in numbers)
    elif name == "DEPTH":
        yield "DEPTH must be at least 1", all(v >= 1 for v in numbers)


def _numbers(value: Any) -> Iterable[float]:
    """The numbers in a constant, those in a nested tuple too."""
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
    elif type(value) in (int, float):
        yield value


def _look_up(names: Iterable[str], values: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
    for name in names:
        value = values.get(name, settings.get(name.lower()))
        if type(value) in (int, float):
            return value
    return None


def step(name: str, values: Mapping[str, Any], settings: Mapping[str, Any], reach: float, draw: random.Random) -> Any:
    """Another value for one constant: a normal step of `reach` on its scale, or any other of its options."""
    constant = Constant(name, values[name], "", 0)
    if isinstance(constant.value, tuple):
        index = draw.choice([i for i, item in enumerate(constant.value) if coordinates(name, item)])
        item = step(name, {**values, name: constant.value[index]}, settings, reach, draw)
        return (*constant.value[:index], item, *constant.value[index + 1 :])
    if kind(constant) not in SCALES:
        return draw.choice(_options(constant, values, settings))
    distance, head_dim = draw.gauss(0, reach) or reach, _head_dim(values, settings)
    while True:  # until it is another value; the other way at the end of a scale
        for option in (_moved(constant, distance, head_dim), _moved(constant, -distance, head_dim)):
            if option != constant.value:
                return option
        distance *= 2


def weight(name: str) -> int:
    """How often a constant is worth a change, relative to others. Sizes decide most in a fixed time, rates less; what
    only looks like a size, by its value, is none."""
    return LEVERS.get(_named(name), 1)


def takes_memory(name: str, value: Any) -> bool:
    """Whether a run takes more memory with a larger value. Tokens per step do not: they come in passes."""
    return kind(Constant(name, value, "", 0)) in ("count", "power", "width") and name not in ALIASES["tokens"]


@functools.lru_cache(maxsize=10_000, typed=True)
def coordinates(name: str, value: Any) -> tuple[float, ...]:
    """Where a constant's value lies on its scale, in steps; () if it is not searched."""
    this = kind(Constant(name, value, "", 0))
    if OWNED.search(name):
        return ()
    if isinstance(value, tuple):
        if any(isinstance(item, tuple) for item in value):
            return ()  # a table, such as the coefficients of a polynomial: its numbers belong together
        return tuple(place for item in value for place in coordinates(name, item))
    if this == "switch":
        return (2.0 * value,)
    if this == "window":
        return tuple(float(letter == "L") for letter in (value * LETTERS)[:LETTERS])
    try:
        return (SCALES[this].place(value),)
    except (KeyError, TypeError, ValueError, ArithmeticError):  # no number, or none that its kind allows
        return ()


def _options(constant: Constant, values: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Any]:
    """Neighbours of the current value by kind, before any constraint."""
    value, this = constant.value, kind(constant)
    if not coordinates(constant.name, value):
        return []
    if isinstance(value, tuple):
        return _one_changed(constant, values, settings)
    if this == "switch":
        return [not value]
    if this == "window":
        return [option for option in map(_as_long(value), WINDOWS) if _unrolled(option) != _unrolled(value)]
    head_dim = _head_dim(values, settings)
    distances = HALVINGS if this in ("power", "head_dim") else DISTANCES
    return [_moved(constant, distance, head_dim, digits=2) for distance in distances]


def _moved(constant: Constant, distance: float, head_dim: int, digits: int = 3) -> Any:
    """The value `distance` steps away on the constant's scale, in its own type."""
    value, this = constant.value, kind(constant)
    if this in ("power", "head_dim"):
        doublings = max(-20, min(20, round(distance)))
        option = value << doublings if doublings > 0 else max(1, value >> -doublings)
        return option if this == "power" else max(32, min(256, option))
    scale = SCALES[this]
    option = scale.value(min(scale.place(value) + distance, 60.0))  # no overflow
    if this == "width":
        return max(1, round(option / head_dim)) * head_dim
    if isinstance(value, int):
        return round(option)
    if this == "momentum":
        return round(1 - float(f"{1 - option:.{digits}g}"), 6)
    return float(f"{option:.{digits}g}")


def _one_changed(constant: Constant, values: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A tuple's neighbours: one component changed, the others kept."""
    options = []
    for index, item in enumerate(constant.value):
        for option in _options(Constant(constant.name, item, "", 0), values, settings):
            options.append((*constant.value[:index], option, *constant.value[index + 1 :]))
    return options


def _as_long(pattern: str) -> Callable[[str], str]:
    """Repeats a shorter window pattern to the length of `pattern` where that is a multiple of its own."""
    return lambda option: option * (len(pattern) // len(option)) if len(pattern) % len(option) == 0 else option


def _unrolled(pattern: str) -> str:
    """A window pattern over twelve layers: equal ones are the same."""
    return (pattern * 12)[:12]


def _head_dim(values: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The unit of widths."""
    found = _look_up(ALIASES["head_dim"], values, settings)
    return int(found) if found and found > 0 else 32
