import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import refusal

from lab import preset
from lab.errors import UserError
from lab.preset import Hardware

NAMES = ["climbmix", "fineweb", "offline", "tinystories"]
CPU = Hardware("cpu", 16.0, 0)
MACS = [  # (memory in GB, GPU cores) that Apple sells
    (8, 7), (8, 8), (16, 8), (16, 10), (24, 10), (32, 10), (16, 14), (18, 14), (32, 16), (36, 18), (24, 20), (48, 20),
    (32, 24), (36, 30), (64, 32), (96, 38), (128, 40), (64, 48), (192, 60), (192, 76), (512, 80),
]  # fmt: skip
CARDS = [("RTX 3050", 8, 20), ("RTX 3060", 12, 28), ("T4", 15, 40), ("RTX 4090", 24, 128), ("RTX 5090", 32, 170),
         ("L40S", 45, 142), ("H100", 80, 132), ("H200", 139, 132)]  # (name, memory in GB, SMs)  # fmt: skip
MACHINES = [CPU, *(Hardware("metal", float(memory), cores) for memory, cores in MACS)]
ALL_MACHINES = [*MACHINES, *(Hardware("cuda", 64.0, sms, float(memory)) for _, memory, sms in CARDS)]


def changed(folder: Path, edit) -> preset.Preset:
    """Load the offline preset after `edit` of its text, under the name "mine"."""
    text = (preset.FOLDER / "offline.toml").read_text()
    edited = edit(text)
    assert edited != text
    (folder / "mine.toml").write_text(edited)
    return preset.load("mine", folder)


def setting(key: str, value: str):
    """An edit that gives a key of the file another value."""
    return lambda text: re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text, count=1)


def adding(section: str, line: str):
    return lambda text: text.replace(f"[{section}]\n", f"[{section}]\n{line}\n", 1)


def tier(when: str, changes: str):
    """An edit that puts a tier before all others."""
    return lambda text: text.replace("[[hardware]]", f"[[hardware]]\nwhen = {when}\nset = {changes}\n[[hardware]]", 1)


def message(folder: Path, edit) -> str:
    with pytest.raises(UserError) as refused:
        changed(folder, edit)
    assert "\n" not in str(refused.value)
    assert "mine.toml" in str(refused.value)
    return str(refused.value)


def test_four_presets_are_shipped():
    assert preset.names() == NAMES


@pytest.mark.parametrize("hardware", ALL_MACHINES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_preset_is_valid_on_every_machine(name, hardware):
    loaded = preset.load(name)
    adapted, _ = preset.adapt(loaded, hardware)
    preset.validate(adapted, name)
    assert (adapted.data, adapted.task) == (loaded.data, loaded.task)
    assert adapted.task.minutes == 5.0


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_gets_its_own_tier_in_float32(name):
    adapted, tier_in_words = preset.adapt(preset.load(name), CPU)
    assert adapted.model.dtype == "float32"
    assert adapted.batch.tokens_per_step < preset.load(name).batch.tokens_per_step
    assert "backend cpu" in tier_in_words


def test_a_larger_mac_gets_at_least_as_large_a_model():
    sizes = [preset.adapt(preset.load("offline"), machine)[0].model for machine in MACHINES[1:]]
    by_cores = sorted(zip((machine.gpu_cores for machine in MACHINES[1:]), (m.width for m in sizes), strict=True))
    assert [width for _, width in by_cores] == sorted(width for _, width in by_cores)
    assert by_cores[-1][1] > by_cores[0][1]


def test_a_card_gets_the_tier_of_its_own_memory():
    """Not of the machine's."""
    tinystories = preset.load("tinystories")
    tiers = [preset.adapt(tinystories, Hardware("cuda", 64.0, sms, float(memory)))[1] for _, memory, sms in CARDS]
    assert tiers == [
        "",
        *[f"backend cuda, gpu_memory_gb {r}" for r in ["[10, 20]"] * 2 + ["[20, 40]"] * 2 + ["[40, 1000]"] * 3],
    ]
    widths = [preset.adapt(preset.load("climbmix"), machine)[0].model.width for machine in ALL_MACHINES[-8:]]
    assert widths == sorted(widths)


def test_unknown_preset_names_those_there_are(script, cache):
    line = refusal(script("prepare.py", "--preset", "tinystorys"))
    assert "'tinystorys'" in line
    assert "climbmix, fineweb, offline, tinystories" in line
    assert not cache.exists()


@pytest.mark.parametrize(
    ("section", "line", "suggestion"),
    [
        ("model", "dept = 4", "depth"),
        ("model", "soft_cap = 4.0", "softcap"),
        ("batch", "token_per_step = 4", "tokens_per_step"),
        ("data", "val_byte = 4", "val_bytes"),
        ("optimizer", "matrix_rl = 4.0", "matrix_lr"),
        ("task", "minute = 4", "minutes"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_one(tmp_path, section, line, suggestion):
    error = message(tmp_path, adding(section, line))
    assert f"[{section}]: unknown key {line.split()[0]!r}; did you mean {suggestion!r}?" in error


def test_a_misspelt_section_is_refused_with_the_right_one(tmp_path):
    assert "'optimiser'; did you mean 'optimizer'?" in message(
        tmp_path, lambda text: text.replace("[optimizer]", "[optimiser]")
    )


def test_a_key_unlike_any_other_is_refused_with_the_list(tmp_path):
    assert "known keys: depth, width" in message(tmp_path, adding("model", "xyzzy = 1"))


def test_a_missing_key_is_named(tmp_path):
    assert "[model]: missing key 'depth'; add it" in message(tmp_path, lambda text: text.replace("depth = 4\n", "", 1))


@pytest.mark.parametrize("content", [b"[data\n", b"x = = 1", b"\xff\xfe"], ids=["cut", "syntax", "not UTF-8"])
def test_a_file_that_is_not_toml_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"^presets/mine\.toml is not valid TOML .*$"):
        preset.load("mine", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("depth", "4.0", "int"),
        ("depth", '"4"', "int"),
        ("depth", "true", "int"),
        ("softcap", "true", "float"),
        ("softcap", '"15"', "float"),
        ("window", "4", "str"),
        ("dtype", "[]", "str"),
        ("vocab_size", "1024.5", "int"),
        ("source", "1", "str"),
        ("train_bytes", "3e7", "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path, key, value, kind):
    assert f"{key} must be {kind}, not " in message(tmp_path, setting(key, value))


@pytest.mark.parametrize("line", ['train_files = "one"', "train_files = [1]", "val_documents = [1.0, 2.0]"])
def test_a_list_of_the_wrong_type_is_refused(tmp_path, line):
    assert "must be a list of" in message(tmp_path, adding("data", line))


def test_a_whole_number_is_a_float_too(tmp_path):
    assert changed(tmp_path, setting("softcap", "20")).model.softcap == 20.0


IMPOSSIBLE = [
    ("source", '"web"'),
    ("train_bytes", "0"),
    ("train_bytes", "-1"),
    ("val_bytes", "0"),
    ("vocab_size", "0"),
    ("vocab_size", "255"),
    ("vocab_size", "257"),
    ("vocab_size", "299"),
    ("vocab_size", "65537"),
    ("sequence_length", "0"),
    ("sequence_length", "-256"),
    ("sequence_length", "7"),
    ("depth", "0"),
    ("width", "0"),
    ("width", "-256"),
    ("width", "200"),
    ("head_dim", "0"),
    ("head_dim", "-64"),
    ("head_dim", "48"),
    ("head_dim", "1"),
    ("window", '""'),
    ("window", '"SX"'),
    ("window", '"l"'),
    ("softcap", "-1.0"),
    ("softcap", "nan"),
    ("softcap", "inf"),
    ("dtype", '"float64"'),
    ("dtype", '"fp32"'),
    ("tokens_per_step", "0"),
    ("tokens_per_step", "-16384"),
    ("tokens_per_step", "10000"),
    ("rows", "0"),
    ("rows", "-64"),
    ("rows", "128"),
    ("matrix_lr", "0"),
    ("embedding_lr", "-0.1"),
    ("unembedding_lr", "0.0"),
    ("scalar_lr", "nan"),
    ("matrix_lr", "inf"),
    ("weight_decay", "-0.1"),
    ("weight_decay", "inf"),
    ("warmup", "-0.1"),
    ("warmup", "0.6"),
    ("warmdown", "1.1"),
    ("warmdown", "nan"),
    ("final_lr", "-0.1"),
    ("final_lr", "1.5"),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(tmp_path, key, value):
    error = message(tmp_path, setting(key, value))
    aliases = {
        "train_bytes": "data.*_bytes", "val_bytes": "data.*_bytes", "rows": "batch.tokens_per_step",
        "width": "width", "warmup": "warmup", "warmdown": "warmdown",
    }  # fmt: skip
    if value in ("nan", "inf"):
        assert f"{key} must be a finite number" in error
    else:
        assert aliases.get(key, "optimizer.*_lr" if key.endswith("_lr") and key != "final_lr" else key) in error


@pytest.mark.parametrize("minutes", ["0", "-5", "nan", "inf"])
def test_impossible_minutes_are_refused(tmp_path, minutes):
    error = message(tmp_path, adding("task", f"minutes = {minutes}"))
    assert (
        "minutes must be a finite number" if minutes in ("nan", "inf") else "task.minutes must be positive"
    ) in error


@pytest.mark.parametrize(
    "line",
    [
        "val_documents = [20, 10]",
        "val_documents = [5]",
        "val_documents = [1, 2, 3]",
        "val_documents = [-1, 5]",
        "train_from = -1",
        'text_field = ""',
    ],
)
def test_an_impossible_range_of_documents_is_refused(tmp_path, line):
    assert line.split()[0] in message(tmp_path, adding("data", line))


def test_a_hub_preset_needs_a_repository_and_files(tmp_path):
    assert "repo" in message(tmp_path, setting("source", '"hub"'))


@pytest.mark.parametrize(
    "key",
    ["train_bytes = 5", "source = 'hub'", "val_bytes = 5", "sequence_length = 8", "minutes = 1.0"],
)
def test_a_tier_may_not_touch_text_or_task(tmp_path, key):
    error = message(tmp_path, tier('{ backend = "cpu" }', f"{{ {key} }}"))
    assert "hardware tier 1" in error
    assert f"sets {key.split()[0]!r}; a tier may set only depth, width" in error


@pytest.mark.parametrize(
    ("when", "changes"),
    [
        ('{ backend = "mtal" }', "{ depth = 4 }"),
        ("{ backend = 1 }", "{ depth = 4 }"),
        ('{ memory = "8" }', "{ depth = 4 }"),
        ("{ memory_gb = 8 }", "{ depth = 4 }"),
        ("{ memory_gb = [8] }", "{ depth = 4 }"),
        ("{ memory_gb = [12, 8] }", "{ depth = 4 }"),
        ('{ gpu_cores = ["a", "b"] }', "{ depth = 4 }"),
        ("5", "{ depth = 4 }"),
        ("{ }", "{ depth = 4.5 }"),
        ("{ }", "{ depth = 0 }"),
        ("{ }", "{ rows = 100 }"),
        ("{ }", "5"),
        ("{ }", '["depth"]'),
    ],
)
def test_an_impossible_tier_is_refused_when_the_file_is_loaded(tmp_path, when, changes):
    message(tmp_path, tier(when, changes))


@pytest.mark.parametrize("line", ["hardware = 5", 'hardware = "cpu"', "model = 5", "batch = []"])
def test_a_section_that_is_no_table_is_refused(tmp_path, line):
    section = line.split()[0]
    without = lambda text: re.sub(rf"(?ms)^\[\[?{section}\]\]?.*?(?=^\[(?!\[?{section})|\Z)", "", text)  # noqa: E731
    message(tmp_path, lambda text: line + "\n" + without(text))


def test_the_first_tier_that_matches_wins(tmp_path):
    first = tier("{ memory_gb = [0, 100] }", "{ depth = 2 }")
    second = tier("{ memory_gb = [0, 10] }", "{ depth = 3, width = 128 }")  # put before the first
    mine = changed(tmp_path, lambda text: second(first(text)))
    assert preset.adapt(mine, Hardware("cpu", 8.0, 0))[0].model == replace(mine.model, depth=3, width=128)
    assert preset.adapt(mine, Hardware("cpu", 16.0, 0))[0].model == replace(mine.model, depth=2)
    assert preset.adapt(mine, Hardware("cpu", 10.0, 0))[0].model.depth == 2  # ranges are half open
    assert preset.adapt(mine, Hardware("cpu", 200.0, 0))[1] == "backend cpu"


def test_without_a_matching_tier_the_preset_is_as_written():
    mine = replace(preset.load("offline"), hardware=())
    assert preset.adapt(mine, CPU) == (mine, "")


def test_vocabulary_override_changes_the_vocabulary_only():
    loaded = preset.load("tinystories")
    assert preset.override(loaded, vocab_size=256) == replace(loaded, tokenizer=preset.Tokenizer(256))
    assert preset.override(loaded) == loaded


@pytest.mark.parametrize("length", [64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("machine", [CPU, MACHINES[1], MACHINES[-1], *ALL_MACHINES[-8::3]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_context_override_keeps_the_tokens_of_a_pass(name, machine, length):
    adapted, _ = preset.adapt(preset.load(name), machine)
    mine = preset.override(adapted, sequence_length=length)
    preset.validate(mine, name)
    assert mine.task == replace(adapted.task, sequence_length=length)
    assert mine.batch.tokens_per_step == adapted.batch.tokens_per_step
    before = adapted.batch.rows * adapted.task.sequence_length
    assert mine.batch.rows * length == before or mine.batch.rows == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("machine", [CPU, MACHINES[1], MACHINES[-1]], ids=str)
def test_a_record_gives_the_same_preset_back(name, machine):
    adapted, _ = preset.adapt(preset.load(name), machine)
    record = json.loads(json.dumps(preset.to_dict(adapted)))
    assert preset.from_dict(record) == adapted
    assert preset.from_dict(record).settings() == adapted.settings()


def test_a_tampered_record_is_refused():
    record = preset.to_dict(preset.load("offline"))
    record["model"]["depth"] = "4"
    with pytest.raises(UserError, match="depth must be int"):
        preset.from_dict(record)


def test_settings_hold_every_tiered_key_and_the_context():
    loaded = preset.load("offline")
    settings = loaded.settings()
    assert settings["sequence_length"] == loaded.task.sequence_length
    assert settings["matrix_lr"] == loaded.optimizer.matrix_lr
    assert not {"vocab_size", "train_bytes", "val_bytes", "minutes"} & settings.keys()


def test_a_tier_may_choose_the_vocabulary_and_the_user_has_the_last_word(tmp_path):
    adapted, _ = preset.adapt(preset.load("tinystories"), CPU)
    assert adapted.tokenizer.vocab_size == 2048 != preset.load("tinystories").tokenizer.vocab_size
    assert preset.override(adapted, vocab_size=4096).tokenizer.vocab_size == 4096
