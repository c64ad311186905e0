"""The search space of the constants block: which values are worth trying, and which are impossible.

The kind of a constant follows from its name and value (`MATRIX_LR = 0.02` is a rate, `ROWS = 64` a power of two), so
that a block changed by an experiment still has a search space. `allowed_values` lists neighbours of the current value;
`broken` names a constraint that would make a run fail. The sampler and small local models choose from these menus, so
they cannot propose an impossible batch. The dtype is not searched: it depends on the machine.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lab.loop.source import Constant, Rejected, constants, digest, skeleton

RATE_FACTORS = (0.5, 0.63, 0.8, 1.25, 1.6, 2.0)  # a third of an octave apart
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOMENTA = (0.5, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 0.999)
WINDOWS = ("L", "SL", "SSL", "SSSL", "SSSSL", "S")
LARGEST = 2**40  # larger than any size, rate or count that fits a machine
OWNED = re.compile(r"SEED|MINUTES|BUDGET|SEQUENCE_LENGTH|MAX_SEQ_LEN|VOCAB")  # fixed by the task
SAME_WORK = ("rate", "decay", "momentum")  # kinds that change no operation, only its numbers
NEIGHBOURS = 3  # grid values offered on either side of the current one

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


def kind(constant: Constant) -> str:
    """The kind of quantity that a constant is: by its name, then by its type."""
    value, named = constant.value, _named(constant.name)
    if isinstance(value, bool):
        return "switch"
    if named and isinstance(value, str) == (named == "window"):
        return named
    if isinstance(value, int):
        power = value >= 8 and value & (value - 1) == 0
        return "power" if power or constant.name in ALIASES["rows"] else "count"
    return "positive" if isinstance(value, float) and value > 0 else "fixed"


@functools.cache
def _named(name: str) -> str:
    """The kind that a name stands for, or ""."""
    return next((this for this, pattern in KINDS if re.search(pattern, name)), "")


def allowed_values(name: str, block: Mapping[str, Constant], settings: Mapping[str, Any]) -> list[Any]:
    """Values worth trying for one constant, with the others unchanged: ascending, without the current value."""
    constant = block[name]
    values = {key: item.value for key, item in block.items()}
    options = {option for option in _candidates(constant) if option != constant.value}
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


def _candidates(constant: Constant) -> list[Any]:
    """Neighbours of the current value by kind, before any constraint."""
    value, this = constant.value, kind(constant)
    if OWNED.search(constant.name):
        return []
    if isinstance(value, tuple):
        return _one_changed(constant)
    if this == "switch":
        return [not value]
    if this == "window":
        return list(WINDOWS)
    if this == "share":
        return _near(SHARES, value)
    if this == "momentum":
        return _near(MOMENTA, value)
    if this == "decay":
        return [0.0, *(_scaled(value, RATE_FACTORS) if value else (0.01, 0.05, 0.1, 0.2))]
    if this == "magnitude":
        return _scaled(value, (0.1, 0.3, 3.0, 10.0))
    if this == "cap":
        return [0.0, *(_scaled(value, RATE_FACTORS) if value else (10.0, 15.0, 20.0, 30.0))]
    if this == "steps":
        return [round(option) for option in _scaled(value, (0.25, 0.5, 2.0, 4.0))]
    if this in ("rate", "positive"):
        return _scaled(value, RATE_FACTORS)
    if this == "head_dim":
        return [32, 64, 128]
    if this == "width":
        return [value + step for step in (-128, -64, -32, 32, 64, 128) if value + step >= 32]
    if this == "power":
        return [value // 4, value // 2, value * 2, value * 4]
    if this == "count":
        return [value + step for step in (-2, -1, 1, 2, 4) if value + step >= 0]
    return []


def _one_changed(constant: Constant) -> list[tuple[Any, ...]]:
    """A tuple's neighbours: one component changed, the others kept."""
    options = []
    for index, item in enumerate(constant.value):
        for option in _candidates(Constant(constant.name, item, "", 0)) if type(item) in (int, float) else ():
            options.append((*constant.value[:index], option, *constant.value[index + 1 :]))
    return options


def _near(grid: tuple[float, ...], value: float) -> list[float]:
    below = [item for item in grid if item < value - 1e-9]
    above = [item for item in grid if item > value + 1e-9]
    return below[-NEIGHBOURS:] + above[:NEIGHBOURS]


def _scaled(value: float, factors: tuple[float, ...]) -> list[float]:
    """`value` times each factor, to two significant digits: 0.025, not 0.025000000000000001."""
    return [float(f"{value * factor:.2g}") for factor in factors]
