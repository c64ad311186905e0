"""Archives of `make evidence`: what is in them, who is not, and what a changed one is refused for.

The whole collection takes minutes; `make evidence MINUTES=0.05` runs it."""

import gzip
import io
import json
import platform
import re
import tarfile
from pathlib import Path

import pytest
from checkout import MINUTES, Checkout

from lab import preset
from lab.errors import UserError
from lab.interface import evidence, evidence_check

MACHINE = {
    "chip": "Apple M4 Max", "memory_gb": 128.0, "cpu_cores": 16, "gpu_cores": 40, "gpu_memory_gb": 128.0,
    "os": "macOS 26.1", "backend": "metal", "python": "3.12.1", "mlx": "0.32.4",
}  # fmt: skip
RUN = {
    "val_bpb": 0.7, "mfu_percent": 22.0, "slept_seconds": 0.0, "peak_memory_mb": 9000.0, "tokens_per_second": 80_000.0,
    "training_seconds": 300.1, "seed": 0,
}  # fmt: skip
FIT = {"memory_bound_mb": 65_536.0, "tokens_per_second": 78_000.0, "predicted_bpb": 0.69}
GOOD = {
    "format": evidence.FORMAT,
    "machine": MACHINE,
    "commit": "0123456789abcdef",
    "changed": False,
    "doctor": [{"level": "ok", "about": "mlx", "message": "fine", "fix": ""}],
    "settings": {"preset": {"name": "tinystories", "task": {"minutes": 5.0}}, "fit": FIT},
    "runs": [RUN, RUN | {"val_bpb": 0.71, "seed": 1}],
    "cheats": {name: f"the model: {reason}" for name, (_, reason) in evidence.CHEATS.items()},
    "sandbox": {"seatbelt": ""},
    "night": {"sandbox": "seatbelt", "experiments": 3, "ends": ["discarded", "kept", "discarded"]},
    "failures": [],
}


def written(folder: Path, content: dict = GOOD, **more: bytes) -> Path:
    path = folder / "evidence.tar.gz"
    evidence.write({"evidence.json": json.dumps(content).encode(), "journal.jsonl": b"{}\n", **more}, path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def rewritten(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def not_expected(content: dict) -> list[str]:
    return [line.text for line in evidence_check.expectations(content) if not line.met]


def test_a_whole_archive_shows_what_was_expected(tmp_path):
    path = tmp_path / "evidence.tar.gz"
    digest = evidence.write({"evidence.json": json.dumps(GOOD).encode()}, path)
    assert evidence_check.read(path) == (GOOD, digest)
    assert not_expected(GOOD) == []
    assert evidence_check.row(GOOD, digest) == (
        "| Apple M4 Max, 40 GPU cores, 128 GB | metal | tinystories, 5 min | 0.7000, 0.7100 | 80,000 | 22 % | 9,000 | "
        f"012345678 | {digest} |"
    )
    with tarfile.open(path) as archive:
        assert {(entry.uname, entry.gname, entry.mtime) for entry in archive} == {("", "", 0)}


def without(name: str):
    return lambda files: {key: content for key, content in files.items() if key != f"evidence/{name}"}


CHANGES = {
    "journal.jsonl was changed": lambda files: files | {"evidence/journal.jsonl": b"{} \n"},
    "evidence.json was changed": lambda files: files | {
        "evidence/evidence.json": files["evidence/evidence.json"].replace(b"0.71", b"0.61")
    },
    "journal.jsonl is missing": without("journal.jsonl"),
    "SHA256SUMS is missing": without("SHA256SUMS"),
    "more.json is not listed": lambda files: files | {"evidence/more.json": b"{}"},
    "../more.json does not belong there": lambda files: files | {"../more.json": b"{}"},
    "b/c does not belong there": lambda files: files | {"evidence/b/c": b""},
}  # fmt: skip


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_archive_is_refused_by_name(tmp_path, reason):
    path = written(tmp_path)
    rewritten(path, CHANGES[reason](members(path)))
    with pytest.raises(UserError) as refused:
        evidence_check.read(path)
    assert f"{path}: " in str(refused.value)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [
    lambda content: b"",
    lambda content: content[:100],
    lambda content: content[:-40],
    lambda content: b"hello" * 100,
    lambda content: gzip.compress(b"hello"),
    lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
])  # fmt: skip
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"evidence\.tar\.gz: .*again"):
        evidence_check.read(path)


def test_a_missing_archive_and_one_of_another_format(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        evidence_check.read(tmp_path / "evidence.tar.gz")
    with pytest.raises(UserError, match="format 99, not 1"):
        evidence_check.read(written(tmp_path, GOOD | {"format": 99}))
    with pytest.raises(UserError, match="is not that of"):
        evidence_check.read(written(tmp_path, {"machine": {}}))


SLOW, FIRST = RUN | {"tokens_per_second": 20_000.0}, dict(list(GOOD["cheats"].items())[1:])
MISSED = {
    "training, seed 1: diverged": {"failures": ["training, seed 1: diverged"]},
    "doctor: mlx: MLX does not see the GPU": {
        "doctor": [{"level": "failure", "about": "mlx", "message": "MLX does not see the GPU"}]
    },
    "1 of 2 trainings have a score": {"runs": [RUN, {}]},
    "seeds differ by 14.3 %": {"runs": [RUN, RUN | {"val_bpb": 0.8}]},
    "MFU 9.0 %, at least 15 % expected of metal": {"runs": [RUN, RUN | {"mfu_percent": 9.0}]},
    "slept for 60 s": {"runs": [RUN, RUN | {"slept_seconds": 60.0}]},
    "peak 70,000 MB": {"runs": [RUN, RUN | {"peak_memory_mb": 70_000.0}]},
    "0.26 times what the fit measured": {"runs": [SLOW, SLOW]},
    "predicted 0.690 by the scaling rule (+8.7 %)": {"runs": [RUN | {"val_bpb": 0.75}] * 2},
    "3 of 4 cheating models": {"cheats": FIRST},
    "sandbox: none works": {"sandbox": {"seatbelt": "writes outside"}},
    "2 experiments of the night": {"night": GOOD["night"] | {"experiments": 2}},
}


@pytest.mark.parametrize("reason", MISSED)
def test_what_was_not_expected_is_said(reason):
    missed = not_expected(GOOD | MISSED[reason])
    assert len(missed) == 1
    assert reason in missed[0]


def test_evidence_of_another_shape_is_one_line():
    for key in ("runs", "doctor", "night", "sandbox", "machine"):
        with pytest.raises(UserError, match="incomplete"):
            evidence_check.expectations(GOOD | {key: 7})


def test_a_short_run_makes_no_prediction():
    runs = [RUN | {"val_bpb": bpb, "training_seconds": 6.0} for bpb in (2.0, 2.3)]
    assert not_expected(GOOD | {"runs": runs}) == []


def test_names_and_folders_are_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "Jane Doe"))
    monkeypatch.setenv("LOGNAME", "jdoe")
    monkeypatch.setattr(platform, "node", lambda: "Janes-MacBook-Pro.local")
    replace = evidence.scrubber([tmp_path / "project"])
    texts = [
        f"{tmp_path}/Jane Doe/x",
        f"{tmp_path}/project/y",
        "by jdoe on janes-macbook-pro",
        f"{evidence.ROOT}/z",
        "JDOE",
    ]
    assert replace({"jdoe": [*texts, 3, None]}) == {
        "jdoe": ["HOME/x", "WORK/y", "by USER on MACHINE", "CHECKOUT/z", "USER", 3, None]
    }


def test_names_of_the_owners_files_are_left_out():
    presets = {name: preset.to_dict(preset.load(name)) for name in ("tinystories", "offline")}
    own = presets["offline"]["data"] | {
        "source": "files",
        "train_files": ["/home/jdoe/diary.txt"],
        "val_files": ["/x/y.txt"],
    }
    mine = {"preset": presets["offline"] | {"data": own}, "tier": "", "prepared": "/home/jdoe/.cache/z", "fit": None}
    assert not {"diary", "y.txt", "jdoe"} & set(re.findall(r"diary|y\.txt|jdoe", json.dumps(evidence.settings(mine))))
    hub = evidence.settings({"preset": presets["tinystories"], "tier": "", "prepared": "/p"})
    assert hub["preset"]["data"]["train_files"] == ("tinystories_gpt4_clean.parquet",)


def test_the_scorer_refuses_a_trained_model_that_cheats(tmp_path):
    """Two real trainings, of which one is changed as `make evidence` does."""
    checkout = Checkout(tmp_path)
    run = tmp_path / "seed0"
    checkout.python("train.py", "--minutes", MINUTES, "--run-dir", run)
    work = evidence._Work(tmp_path, float(MINUTES), lambda line: None)
    for name in ("looks ahead", "returns infinity"):
        expression, reason = evidence.CHEATS[name]
        assert reason in work.cheat(name, expression, reason)
    assert "accepted" in (work.cheat("is honest", "y", "any reason") or work.failures[-1])
    assert len(work.failures) == 1
