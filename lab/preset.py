"""Presets: presets/NAME.toml, parsed strictly into frozen dataclasses.

A preset defines the text, the tokenizer, the task and the settings that `train.py` starts from. Its `[[hardware]]`
tiers adapt these settings to the machine; the first one that matches applies. A tier may set keys of [model],
[batch], [optimizer] and [tokenizer] only: text, split, context length, scored bytes and minutes never depend on the
machine. Unknown keys, wrong types and invalid values raise a UserError that names the file, the key and what is valid.
"""

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from lab.errors import UserError, one_line
from lab.files import ROOT, unsealed

FOLDER = ROOT / "presets"
BYTES_VOCAB = 256  # a vocabulary of this size is raw bytes: 256 byte tokens plus the special one, nothing trained
BACKENDS = ("cpu", "metal", "cuda")
LONGEST_MINUTES = 7 * 24 * 60 + 1  # of a run: a week
LARGEST = 2**63  # of any integer, as in TOML
DTYPES = ("float32", "bfloat16", "float16")
SETTINGS = ("model", "batch", "optimizer")  # sections whose keys train.py reads as SETTINGS
TIERED = (*SETTINGS, "tokenizer")  # sections that a hardware tier may set


@dataclass(frozen=True)
class Data:
    """The source of the text, and how much of it is used."""

    source: str  # "hub", "stories" (built in) or "files" (the user's own)
    train_bytes: int  # most UTF-8 bytes of training text, whole documents
    val_bytes: int  # most UTF-8 bytes of validation text to score, whole documents
    repo: str = ""  # hub dataset
    train_files: tuple[str, ...] = ()  # hub: names in the repo, read in this order as far as needed; files: paths
    val_files: tuple[str, ...] = ()  # the same; empty with source "files": a share is held out by hash
    val_documents: tuple[int, ...] = (0, 0)  # hub: half-open range of documents of val_files[0]; (0, 0): all
    train_from: int = 0  # hub: first training document of train_files[0]
    text_field: str = "text"  # column or JSON field


@dataclass(frozen=True)
class Tokenizer:
    vocab_size: int  # special tokens included; 256 means raw bytes (257 with the special token)


@dataclass(frozen=True)
class Task:
    sequence_length: int  # tokens of context
    minutes: float = 5.0  # training time; another value is another task


@dataclass(frozen=True)
class Model:
    depth: int  # layers
    width: int  # residual stream, channels
    head_dim: int  # channels per attention head
    window: str  # attention per layer, repeated over the depth: L full context, S half of it
    softcap: float  # tanh limits the logits to +-softcap; 0 means no limit
    dtype: str  # of activations: float32, bfloat16 or float16


@dataclass(frozen=True)
class Batch:
    tokens_per_step: int  # tokens per optimizer step
    rows: int  # sequences per forward and backward pass; the rest of a step is accumulated
    processes: int = 1  # that train data-parallel on this machine, each its share of a step (lab/training/parallel.py)
    doubling: float = 1.0  # share of the time budget after which a step has twice the tokens; 1 means never


@dataclass(frozen=True)
class Optimizer:
    matrix_lr: float  # Muon, for the matrices of the blocks
    embedding_lr: float  # AdamW, token and value embeddings
    unembedding_lr: float  # AdamW, output head
    scalar_lr: float  # AdamW, per-layer scalars
    weight_decay: float  # Muon, cautious, decays to 0 over the run
    warmup: float  # share of the time budget over which rates rise from 0
    warmdown: float  # share of the time budget over which rates fall
    final_lr: float  # rate at the end, as a share of the full rate


@dataclass(frozen=True)
class Tier:
    """One [[hardware]] entry: the condition on the machine, and the values it sets."""

    when: dict[str, Any]
    set: dict[str, Any]

    def matches(self, hardware: "Hardware") -> bool:
        """Whether `hardware` has this backend and is within every half-open range [low, high)."""
        for key, required in self.when.items():
            value = getattr(hardware, key)
            if not (value == required if isinstance(required, str) else required[0] <= value < required[1]):
                return False
        return True

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.when.items()) or "any machine"


@dataclass(frozen=True)
class Hardware:
    """The properties of the machine that a tier can test."""

    backend: str  # one of BACKENDS
    memory_gb: float  # of the whole machine
    gpu_cores: int  # of an Apple GPU, SMs of an NVIDIA GPU, 0 without one
    gpu_memory_gb: float = 0.0  # of the graphics card; on a Mac that of the whole machine; 0 without a GPU


@dataclass(frozen=True)
class Preset:
    name: str
    data: Data
    tokenizer: Tokenizer
    task: Task
    model: Model
    batch: Batch
    optimizer: Optimizer
    hardware: tuple[Tier, ...] = field(default=(), compare=False)

    def settings(self) -> dict[str, Any]:
        """SETTINGS of `train.py`: every key of [model], [batch] and [optimizer], and the context length."""
        values = {key: value for part in SETTINGS for key, value in dataclasses.asdict(getattr(self, part)).items()}
        return values | {"sequence_length": self.task.sequence_length}


SECTIONS = {"data": Data, "tokenizer": Tokenizer, "task": Task, "model": Model, "batch": Batch, "optimizer": Optimizer}


def names(folder: Path = FOLDER) -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: Path = FOLDER) -> Preset:
    """The preset `name` as written, without a tier. Raises UserError if it is missing or invalid."""
    if name not in names(folder):
        raise UserError(f"no preset {one_line(repr(name), 80)} in presets/; choose one of: {', '.join(names(folder))}")
    path = folder / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib raises more than its own error
        raise UserError(f"presets/{path.name} is not valid TOML ({one_line(error)}); fix that line") from None
    where = f"presets/{path.name}"
    _check_keys(where, content, [*SECTIONS, "hardware"])
    parts = {key: _section(where, key, kind, content.get(key, {})) for key, kind in SECTIONS.items()}
    entries = content.get("hardware", [])
    if not isinstance(entries, list):
        raise UserError(f"{where}: hardware must be [[hardware]] tables")
    tiers = tuple(_tier(where, number, entry) for number, entry in enumerate(entries, 1))
    preset = Preset(name, **parts, hardware=tiers)
    for index in range(-1, len(tiers)):
        validate(_apply(preset, tiers[index]) if index >= 0 else preset, where)
    return preset


def adapt(preset: Preset, hardware: Hardware) -> tuple[Preset, str]:
    """`preset` with the first matching tier applied, and a description of that tier ("" if none matches)."""
    for tier in preset.hardware:
        if tier.matches(hardware):
            return _apply(preset, tier), str(tier)
    return preset, ""


def override(preset: Preset, *, vocab_size: int | None = None, sequence_length: int | None = None) -> Preset:
    """An adapted `preset` with another vocabulary or context; `rows` changes to keep the tokens of a pass."""
    if vocab_size is not None:
        preset = dataclasses.replace(preset, tokenizer=Tokenizer(vocab_size))
    if sequence_length is not None:
        rows = max(1, preset.batch.rows * preset.task.sequence_length // max(1, sequence_length))
        per_pass = rows * max(1, sequence_length) * preset.batch.processes
        processes = preset.batch.processes if preset.batch.tokens_per_step % per_pass == 0 else 1
        preset = dataclasses.replace(
            preset,
            task=dataclasses.replace(preset.task, sequence_length=sequence_length),
            batch=dataclasses.replace(preset.batch, rows=rows, processes=processes),
        )
    return preset


def from_dict(values: dict[str, Any]) -> Preset:
    """The inverse of `to_dict`."""
    parts = {key: _section("recorded preset", key, kind, values[key]) for key, kind in SECTIONS.items()}
    return Preset(values["name"], **parts)


def to_dict(preset: Preset) -> dict[str, Any]:
    """A record of a preset for JSON files, without its tiers."""
    return {"name": preset.name} | {key: dataclasses.asdict(getattr(preset, key)) for key in SECTIONS}


def read_record(path: Path, remedy: str, of_run: bool = False) -> dict[str, Any]:
    """Settings as written by `make prepare`, or by a night and a run (`of_run`), which add the minutes.

    Raises UserError for a damaged file."""
    try:
        record = {"tier": None, "fit": None, "steps": None, "seed": 0} | unsealed(json.loads(path.read_bytes()))
        preset = from_dict(record["preset"])
        validate(preset, "preset")
        minutes = record["minutes"] if of_run else record.get("minutes") or 1.0
        kinds = {"tier": str | None, "fit": dict | None, "steps": int | None, "seed": int, "prepared": str}
        if all(isinstance(record[key], kind) for key, kind in kinds.items()) and 0 < minutes < LONGEST_MINUTES:
            return record | {"preset": to_dict(preset)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        pass
    raise UserError(f"{path} is damaged; {remedy}") from None


def validate(preset: Preset, where: str) -> None:
    """Raises UserError for an invalid value; names the key and what is valid."""
    data, task, model, batch, rates = preset.data, preset.task, preset.model, preset.batch, preset.optimizer
    per_pass = max(1, batch.rows * task.sequence_length * batch.processes)
    documents, vocabulary = data.val_documents, preset.tokenizer.vocab_size
    rules = [
        (data.source in ("hub", "stories", "files"), "data.source", "must be hub, stories or files"),
        (
            data.source != "hub" or (data.repo and data.train_files and data.val_files),
            "data.repo, train_files and val_files",
            'are required with source = "hub"',
        ),
        (
            documents == (0, 0) or (len(documents) == 2 and 0 <= documents[0] < documents[1]),
            "data.val_documents",
            "must be [first, end] with 0 <= first < end",
        ),
        (data.train_from >= 0, "data.train_from", "must not be negative"),
        (data.text_field != "", "data.text_field", "must name a column"),
        (data.train_bytes > 0 and data.val_bytes > 0, "data.*_bytes", "must be positive"),
        (
            vocabulary == BYTES_VOCAB or 300 <= vocabulary <= 2**16,
            "tokenizer.vocab_size",
            "must be 256 (raw bytes) or 300 to 65536",
        ),
        (task.sequence_length >= 8, "task.sequence_length", "must be at least 8"),
        (task.minutes > 0, "task.minutes", "must be positive"),
        (model.depth > 0 and model.width > 0, "model.depth and model.width", "must be positive"),
        (
            model.head_dim > 0 and model.head_dim % 2 == 0 and model.width % model.head_dim == 0,
            "model.head_dim",
            f"must be even and divide width {model.width}",
        ),
        (
            model.window != "" and set(model.window) <= set("SL"),
            "model.window",
            "must consist of the letters S and L",
        ),
        (model.softcap >= 0, "model.softcap", "must be positive, or 0 to disable it"),
        (model.dtype in DTYPES, "model.dtype", f"must be one of {', '.join(DTYPES)}"),
        (
            batch.rows > 0 and batch.tokens_per_step > 0 and batch.tokens_per_step % per_pass == 0,
            "batch.tokens_per_step",
            f"must be a multiple of rows x sequence_length x processes = {per_pass}",
        ),
        (batch.processes > 0, "batch.processes", "must be positive"),
        (0 <= batch.doubling <= 1, "batch.doubling", "must be a share of the run, 0 to 1"),
        (
            all(value > 0 for key, value in vars(rates).items() if key.endswith("_lr") and key != "final_lr"),
            "optimizer.*_lr",
            "must be positive",
        ),
        (rates.weight_decay >= 0, "optimizer.weight_decay", "must not be negative"),
        (
            rates.warmup >= 0 and rates.warmdown >= 0 and rates.warmup + rates.warmdown <= 1,
            "optimizer.warmup and optimizer.warmdown",
            "must be shares of the run, 0 to 1, and add up to at most 1",
        ),
        (0 <= rates.final_lr <= 1, "optimizer.final_lr", "must be a share of the full rate, 0 to 1"),
    ]
    for valid, key, requirement in rules:
        if not valid:
            raise UserError(f"{where}: {key} {requirement}")


def _apply(preset: Preset, tier: Tier) -> Preset:
    changes = {}
    for part in TIERED:
        current = getattr(preset, part)
        values = {key: value for key, value in tier.set.items() if hasattr(current, key)}
        changes[part] = dataclasses.replace(current, **values)
    return dataclasses.replace(preset, **changes)


def _tier(where: str, number: int, entry: dict[str, Any]) -> Tier:
    where = f"{where}, hardware tier {number}"
    _check_keys(where, entry, ["when", "set"])
    when, changes = entry.get("when", {}), entry.get("set", {})
    for name, table in (("when", when), ("set", changes)):
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} must be a table of keys")
    _check_keys(f"{where}, when", when, [f.name for f in dataclasses.fields(Hardware)])
    allowed = {f.name: f.type for part in TIERED for f in dataclasses.fields(SECTIONS[part])}
    for key in changes:
        if key not in allowed:
            raise UserError(f"{where}: sets {one_line(repr(key), 80)}; a tier may set only {', '.join(allowed)}")
    for key, value in when.items():
        if key == "backend" and value not in BACKENDS:
            raise UserError(f"{where}: backend must be one of {', '.join(BACKENDS)}, not {one_line(repr(value), 80)}")
        is_range = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        if key != "backend" and not (is_range and value[0] < value[1]):
            raise UserError(f"{where}: {key} must be [low, high] with low < high, not {one_line(repr(value), 80)}")
    return Tier(when, {key: _typed(where, key, allowed[key], value) for key, value in changes.items()})


def _section(where: str, section: str, kind: type, values: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_keys(f"{where} [{section}]", values, list(fields))
    for name, spec in fields.items():
        if name not in values and spec.default is dataclasses.MISSING:
            raise UserError(f"{where} [{section}]: missing key {name!r}; add it")
    return kind(**{k: _typed(f"{where} [{section}]", k, fields[k].type, v) for k, v in values.items()})


def _check_keys(where: str, values: dict[str, Any], known: list[str]) -> None:
    import difflib

    if not isinstance(values, dict):
        raise UserError(f"{where} must be a table of keys")
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {one_line(repr(key), 80)}; {hint}")


def _typed(where: str, key: str, kind: Any, value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) else (value,)
    if any(type(number) is int and abs(number) >= LARGEST for number in numbers):
        raise UserError(f"{where}: {key} must be below 2^63")
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if isinstance(value, list | tuple) and all(type(item) is inner for item in value):
            return tuple(value)
        raise UserError(f"{where}: {key} must be a list of {inner.__name__}")
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a finite number, not {value}")
    if type(value) is not kind:
        shown = one_line(repr(value), 80)
        raise UserError(f"{where}: {key} must be {kind.__name__}, not {type(value).__name__} {shown}")
    return value
