"""doctor and clean as commands on this machine, and how doctor reads the output of other machines."""

import io
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from ollama_server import CODER, OllamaServer
from rich.console import Console

from lab import files
from lab.errors import UserError
from lab.interface import doctor, housekeeping
from lab.machine import backend
from lab.machine.device import Card

PMSET = """Battery Power:
 lowpowermode         1
 sleep                1
AC Power:
 lowpowermode         {mode}
 sleep                1
 displaysleep         10
"""


MACBOOK_CHARGED = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=22151267)	100%; charged; 0:00 remaining present: true
"""
MACBOOK_HELD = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=22151267)	80%; AC attached; not charging present: true
"""
MACBOOK_AWAY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22151267)	87%; discharging; 5:20 remaining present: true
"""
MAC_MINI = "Now drawing from 'AC Power'\n"


def ask(cache, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "prepare.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(cache) | more, capture_output=True, text=True, timeout=120)


def test_doctor_looks_at_everything_and_says_how_to_fix_it(tmp_path):
    done = ask(tmp_path, "doctor", "--json", OLLAMA_HOST="127.0.0.1:9", HF_HUB_OFFLINE="1")
    findings = {finding["about"]: finding for finding in json.loads(done.stdout)}
    order = ["machine", "mlx", "tier", "condition", "power", "disk", "cache", "runs", "data", "sandbox", "git", "hub"]
    assert [about for about in findings if about in order] == order
    assert findings["data"]["fix"] == "make prepare PRESET=offline"
    assert findings["ollama"]["level"] == findings["hub"]["level"] == "warning"
    assert all(finding["fix"] for finding in findings.values() if finding["level"] != "ok")
    assert done.returncode == any(finding["level"] == "failure" for finding in findings.values())


def test_doctor_says_which_model_fits(monkeypatch):
    server = OllamaServer(models={"coder:1.5b": CODER, "huge:70b": CODER | {"size": 10**14}})
    try:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        levels = {finding.message.split(",")[0]: finding.level for finding in doctor._ollama()}
    finally:
        server.stop()
    assert levels == {"coder:1.5b": "ok", "huge:70b": "warning"}


def test_a_missing_sandbox_is_a_failure(monkeypatch):
    monkeypatch.setattr("lab.trial.sandbox.available", lambda: "none")
    monkeypatch.setattr("shutil.which", lambda name: None)
    [finding] = doctor._sandbox()
    assert finding.level == "failure"
    assert finding.fix


def test_low_power_mode_on_the_charger_is_warned_of():
    assert [f.level for f in doctor.power_settings(PMSET.format(mode=1))] == ["warning", "ok"]
    assert [f.level for f in doctor.power_settings(PMSET.format(mode=0))] == ["ok"]


@pytest.mark.parametrize(
    ("output", "supply"),
    [
        (MACBOOK_CHARGED, doctor.Supply(False, "battery 100 % charged")),
        (MACBOOK_HELD, doctor.Supply(False, "battery 80 % AC attached")),
        (MACBOOK_AWAY, doctor.Supply(True, "battery 87 % discharging")),
        (MAC_MINI, doctor.Supply(False)),
    ],
)
def test_the_power_supply_of_a_mac_is_read_from_pmset(output, supply):
    assert doctor.macos_supply(output) == supply


@pytest.mark.parametrize(("status", "away"), [("Discharging", True), ("Charging", False), ("Not charging", False)])
def test_the_battery_of_a_mouse_is_not_that_of_the_laptop(tmp_path, status, away):
    supplies = {
        "ACAD": {"type": "Mains", "online": str(int(not away))},
        "BAT0": {"type": "Battery", "capacity": "63", "status": status},
        "hidpp_battery_0": {"type": "Battery", "scope": "Device", "capacity": "5", "status": "Discharging"},
    }
    for name, values in supplies.items():
        folder = tmp_path / "sys/class/power_supply" / name
        folder.mkdir(parents=True)
        for key, value in values.items():
            (folder / key).write_text(value + "\n")
    assert doctor.linux_supply(tmp_path) == doctor.Supply(away, f"battery 63 % {status.lower()}")


def test_a_machine_without_a_battery_is_on_ac_power(tmp_path):
    assert doctor.linux_supply(tmp_path) == doctor.Supply(False, "")


M1 = {
    "chip": "Apple M1", "memory_gb": 8.0, "cpu_cores": 8, "gpu_cores": 7, "gpu_memory_gb": 8.0,
    "os": "macOS 15.3.1", "backend": "metal",
}  # fmt: skip
RTX = {
    "chip": "NVIDIA GeForce RTX 4090", "memory_gb": 64.0, "cpu_cores": 16, "gpu_cores": 128, "gpu_memory_gb": 24.0,
    "os": "Linux 6.8", "backend": "cuda",
}  # fmt: skip


def test_doctor_names_the_tier_of_this_machine_and_why(monkeypatch):
    monkeypatch.setattr(doctor, "_facts", lambda: M1)
    [finding] = doctor._tier()  # nothing is prepared: the default preset
    assert finding.level == "ok"
    assert finding.message.startswith(
        "tinystories, backend metal, memory_gb [0, 12]: first match for metal, 8 GB, 7 GPU cores; rows "
    )


def test_doctor_names_the_card_and_the_tier_of_its_memory(monkeypatch):
    monkeypatch.setattr(doctor, "_facts", lambda: RTX)
    [machine] = doctor._machine()
    assert machine.message.startswith(
        "NVIDIA GeForce RTX 4090, 16 cores, 128 SMs with 24 GB, 64 GB, Linux 6.8, Python "
    )
    [tier] = doctor._tier()
    assert tier.message.startswith(
        "tinystories, backend cuda, gpu_memory_gb [20, 40]: first match for cuda, 64 GB, 128 SMs with 24 GB; depth 8"
    )


@pytest.mark.parametrize(
    ("facts", "card", "level", "fix", "words"),
    [
        (M1, None, "failure", "make clean setup", "MLX does not see the GPU of this machine"),
        (RTX, "NVIDIA GeForce RTX 4090", "failure", "make clean setup", "MLX does not see the GPU of this machine"),
        (RTX | {"backend": "cpu"}, "NVIDIA T4", "warning", "make setup BACKEND=cuda", "does not use the NVIDIA T4"),
        (RTX | {"backend": "cpu"}, None, "ok", "", "MLX 0.32.4 on the CPU"),
    ],
)
def test_doctor_says_when_a_gpu_is_not_used(monkeypatch, facts, card, level, fix, words):
    """MLX is that of this machine, which has no GPU."""
    if backend.GPU:
        pytest.skip("MLX uses a GPU here")
    monkeypatch.setattr(doctor, "_facts", lambda: facts)
    monkeypatch.setattr(doctor, "nvidia", lambda: card and Card(card, 16.0, 40))
    monkeypatch.setattr(doctor.hardware, "matmul_peak", lambda dtype, repeats: 1e11)
    monkeypatch.setattr(backend, "BLAS", "OpenBLAS")
    [finding] = doctor._mlx()
    assert (finding.level, finding.fix) == (level, fix)
    assert words in finding.message


def test_data_prepared_on_another_machine_is_warned_of(prepared, monkeypatch):
    assert [finding.level for finding in doctor._tier()] == ["ok"]
    monkeypatch.setattr(doctor, "_facts", lambda: M1)
    [finding] = doctor._tier()
    assert (finding.level, finding.fix) == ("warning", "make prepare PRESET=offline")
    assert "another machine: backend cpu" in finding.message


@pytest.mark.parametrize(("flops", "level"), [(1.2e11, "ok"), (2e11, "warning")])
def test_a_fit_of_a_busy_moment_is_warned_of(prepared, cache, monkeypatch, flops, level):
    record = json.loads((cache / "current.json").read_text()) | {"fit": {"matmul_flops": 1e11}}
    (cache / "current.json").write_text(json.dumps(record))
    monkeypatch.setattr(doctor.hardware, "matmul_peak", lambda dtype: flops)
    [finding] = doctor._prepared()
    assert finding.level == level
    assert finding.fix == ("make fit" if level == "warning" else "")
    assert ("fitted to this machine when it was 2.0 times slower" in finding.message) == (level == "warning")


def test_doctor_lists_the_parts_of_the_cache(prepared):
    (prepared.parent.parent / "text" / "0123").mkdir(parents=True)
    (prepared.parent.parent / "text" / "0123" / "a.parquet").write_bytes(b"0" * 3_000_000)
    messages = {finding.about: finding.message for finding in doctor._cache()}
    assert re.match(r"text: 1, 3 MB; prepared: 1, \d+ MB; /", messages["cache"])
    assert "with a checkpoint" in messages["runs"]


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_levels_are_coloured_on_a_terminal_unless_asked_not_to(variables, coloured):
    finding = doctor.Finding("warning", "disk", "4 GB free", "make clean-cache")
    with io.StringIO() as shown:
        environ = {"TERM": "xterm-256color"} | variables
        console = Console(file=shown, force_terminal=True, width=20, _environ=environ)
        console.print(doctor.as_text(finding), soft_wrap=True)
        assert ("\x1b[33mwarning" in shown.getvalue()) == coloured
        plain = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert plain == "warning  disk           4 GB free\n                        -> make clean-cache\n"


def test_a_check_that_fails_is_a_finding_and_not_a_traceback(monkeypatch):
    def gone():
        raise PermissionError(13, "Permission denied", "/proc")
        yield

    gone.__name__ = "_disk"
    monkeypatch.setattr(doctor, "_disk", gone)
    findings = [finding for finding in doctor.examine() if finding.about == "disk"]
    assert [finding.level for finding in findings] == ["failure"]


@pytest.fixture
def stock(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    for module in (files, housekeeping):
        monkeypatch.setattr(module, "ROOT", tmp_path / "repo")
    files.register()
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
