"""doctor and clean, as commands on this machine, and what they make of other machines' words."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from ollama_server import CODER, OllamaServer

from lab import doctor, housekeeping
from lab.errors import UserError

PMSET = """Battery Power:
 lowpowermode         1
 sleep                1
AC Power:
 lowpowermode         {mode}
 sleep                1
 displaysleep         10
"""


def ask(cache, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "prepare.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(cache) | more, capture_output=True, text=True, timeout=120)


def test_doctor_looks_at_everything_and_says_how_to_mend_it(tmp_path):
    done = ask(tmp_path, "doctor", "--json", OLLAMA_HOST="127.0.0.1:9", HF_HUB_OFFLINE="1")
    findings = {finding["about"]: finding for finding in json.loads(done.stdout)}
    assert {"machine", "mlx", "condition", "disk", "data", "sandbox", "git", "hub", "ollama"} <= findings.keys()
    assert findings["data"]["mend"] == "make prepare PRESET=offline"
    assert findings["ollama"]["level"] == findings["hub"]["level"] == "warning"
    assert all(finding["mend"] for finding in findings.values() if finding["level"] != "ok")
    assert done.returncode == any(finding["level"] == "failure" for finding in findings.values())


def test_doctor_says_which_model_fits(monkeypatch):
    server = OllamaServer(models={"coder:1.5b": CODER, "huge:70b": CODER | {"size": 10**14}})
    try:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        told = {finding.told.split(",")[0]: finding.level for finding in doctor._ollama()}
    finally:
        server.stop()
    assert told == {"coder:1.5b": "ok", "huge:70b": "warning"}


def test_a_missing_sandbox_is_a_failure(monkeypatch):
    monkeypatch.setattr("lab.sandbox.available", lambda: "none")
    monkeypatch.setattr("shutil.which", lambda name: None)
    [finding] = doctor._sandbox()
    assert finding.level == "failure"
    assert finding.mend


def test_low_power_mode_on_the_charger_is_warned_of():
    assert [f.level for f in doctor.power_settings(PMSET.format(mode=1))] == ["warning", "ok"]
    assert [f.level for f in doctor.power_settings(PMSET.format(mode=0))] == ["ok"]


def test_what_cannot_be_looked_at_is_a_finding_and_no_traceback(monkeypatch):
    def gone():
        raise PermissionError(13, "Permission denied", "/proc")
        yield

    gone.__name__ = "_disk"
    monkeypatch.setattr(doctor, "_disk", gone)
    told = [finding for finding in doctor.examine() if finding.about == "disk"]
    assert [finding.level for finding in told] == ["failure"]


@pytest.fixture
def stock(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(housekeeping, "ROOT", tmp_path / "repo")
    for name, size in (("a", 100), ("b", 3000), ("night", 10), ("current", 20)):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        (tmp_path / "prepared" / name / "shard.npy").write_bytes(b"0" * (size - 2))
        (tmp_path / "prepared" / name / "manifest.json").write_text("{}")
    (tmp_path / "prepared" / "making").mkdir()
    (tmp_path / "text" / "0123").mkdir(parents=True)
    (tmp_path / "repo/nights/nov24").mkdir(parents=True)
    for path, name in ((tmp_path / "current.json", "current"), (tmp_path / "repo/nights/nov24/settings.json", "night")):
        path.write_text(json.dumps({"prepared": str(tmp_path / "prepared" / name)}))
    return tmp_path


def test_the_listing_has_sizes_largest_first_and_who_needs_what(stock):
    entries = housekeeping.listing()
    assert [(e.name, e.bytes) for e in entries][:2] == [("prepared/b", 3000), ("prepared/a", 100)]
    assert {e.name: e.kept for e in entries if e.kept} == {
        "prepared/current": "for the next training", "prepared/night": "for night nov24"
    }  # fmt: skip


def test_what_is_in_use_is_never_removed(stock):
    assert housekeeping.remove((), everything=True).startswith("removed 2,")
    assert sorted(path.name for path in (stock / "prepared").iterdir()) == ["current", "making", "night"]
    assert (stock / "text/0123").exists()  # a download may not be had again
    with pytest.raises(UserError, match=r"is kept \(for night nov24\); nothing was removed"):
        housekeeping.remove(("prepared/night",), everything=False)
    with pytest.raises(UserError, match="there is no prepared/x; there are: prepared/"):
        housekeeping.remove(("prepared/x",), everything=False)


def test_one_is_removed_by_name(stock):
    housekeeping.remove(("prepared/a",), everything=False)
    assert not (stock / "prepared/a").exists()
    assert (stock / "prepared/b").exists()


def test_listing_alone_removes_nothing(tmp_path):
    (tmp_path / "prepared/a").mkdir(parents=True)
    done = ask(tmp_path, "clean")
    assert "prepared/a" in done.stdout
    assert (tmp_path / "prepared/a").exists()
