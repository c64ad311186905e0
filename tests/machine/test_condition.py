"""What is read of the machine's condition, and what it does to a run."""

import dataclasses
from subprocess import CalledProcessError, TimeoutExpired

import pytest

from lab.machine import condition

BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22151267)\t87%; discharging; 6:12 remaining present: true
"""
MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=22151267)\t100%; charged; 0:00 remaining present: true
"""
SWAP = "total = 2048.00M  used = 941.25M  free = 1106.75M  (encrypted)\n"


def mac_condition(**changed: str):
    """What the four commands print on a Mac."""
    said = {
        "vm.swapusage": SWAP,
        "kern.memorystatus_vm_pressure_level": "1\n",
        "com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 0\n",
        "batt": MAINS,
    } | changed
    return condition._macos_condition(lambda *command: said[command[-1]])


def test_a_macs_condition_is_read_from_the_systems_own_words():
    assert mac_condition() == {"swap_mb": 941.25, "memory_pressure": 1, "heat": 0, "power": "AC"}
    hot = {"com.apple.system.thermalpressurelevel": "com.apple.system.thermalpressurelevel 2\n"}
    assert mac_condition(**hot, batt=BATTERY)["heat"] == 2
    assert mac_condition(batt=BATTERY)["power"] == "battery"
    assert mac_condition(batt="Now drawing from 'UPS Power'\n")["power"] is None


# Outputs recorded on people's Macs, each with its source and what it means.
SWAPS = [
    ("total = 1024,00M  used = 379,25M  free = 644,75M  (encrypted)", 379.25),  # Powerlevel9k/powerlevel9k#1108
    ("total = 4096.00M  used = 2743.50M  free = 1352.50M  (encrypted)", 2743.5),  # walles/px#80
    ("total = 1024.00M  used = 2.50M  free = 1021.50M  (encrypted)", 2.5),  # mackerelio/mackerel-agent#84
    ("total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)", 0.0),
    ("", None),
]
SUPPLIES = [
    ("Now drawing from 'AC Power'\n", "AC"),  # an iMac, liquidprompt/liquidprompt#317
    ("Currently drawing from 'AC Power'\n -InternalBattery-0\t54%; charging; 0:51 remaining\n", "AC"),  # before 10.10
    ("Now drawing from 'AC Power'\n -InternalBattery-0\t88%; AC attached; not charging present: true\n", "AC"),
    ("Now drawing from 'AC Power'\n -InternalBattery-0\t90%; charging; (no estimate) present: true\n", "AC"),
    (
        "Now drawing from 'Battery Power'\n -InternalBattery-0\t90%; discharging; (no estimate) present: true\n",
        "battery",
    ),
    # the three above: OS X 10.11.6, imwally/battstat#2
    ("Now drawing from 'UPS Power'\n -Back-UPS ES 700 (id=1234)\t87%; discharging; (no estimate)\n", None),
    ("No power source information\n", None),
]
PRESSURES = [("1\n", 1), ("4\n", 4), ("kern.memorystatus_vm_pressure_level: 2\n", 2), ("", None)]  # exelban/stats#1010
LEVELS = [
    ("com.apple.system.thermalpressurelevel 0\n", 0),
    ("com.apple.system.thermalpressurelevel 3\n", 3),
    ("com.apple.system.thermalpressurelevel: Failed\n", None),
]
RECORDED = [
    *(("vm.swapusage", "swap_mb", *case) for case in SWAPS),
    *(("batt", "power", *case) for case in SUPPLIES),
    *(("kern.memorystatus_vm_pressure_level", "memory_pressure", *case) for case in PRESSURES),
    *(("com.apple.system.thermalpressurelevel", "heat", *case) for case in LEVELS),
]


@pytest.mark.parametrize(("asked", "name", "printed", "value"), RECORDED)
def test_a_recorded_output_is_read_or_is_none(asked, name, printed, value):
    assert mac_condition(**{asked: printed})[name] == value


@pytest.mark.parametrize(
    "error", [FileNotFoundError("pmset"), TimeoutExpired("pmset", 20), CalledProcessError(1, "sysctl")], ids=repr
)
def test_what_a_mac_does_not_report_is_none(error):
    def missing(*command: str) -> str:
        raise error

    assert condition._macos_condition(missing) == dict.fromkeys(("swap_mb", "memory_pressure", "heat", "power"))


def test_a_linux_machines_condition(tmp_path):
    for path, text in {
        "proc/meminfo": "MemTotal: 100 kB\nSwapTotal:       2097148 kB\nSwapFree:        1048572 kB\n",
        "proc/pressure/memory": "some avg10=30.00 avg60=1.0\nfull avg10=25.50 avg60=0.00 avg300=0.00 total=0\n",
        "sys/class/power_supply/AC/online": "0\n",
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/BAT0/online": "1\n",
        "sys/class/power_supply/BAT0/type": "Battery\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert condition._linux_condition(tmp_path) == {"swap_mb": 1024.0, "memory_pressure": 4, "power": "battery"}
    (tmp_path / "proc/pressure/memory").unlink()
    assert condition._linux_condition(tmp_path)["memory_pressure"] is None
    nothing = {"swap_mb": None, "memory_pressure": None, "power": None}
    assert condition._linux_condition(tmp_path / "elsewhere") == nothing


def test_this_machine_has_a_condition():
    now = condition.condition()
    assert now.flops > 1e8
    assert abs(now.slept) < 1e6
    assert condition.invalid_reason(now, now, now.flops) == condition.wait_reason(now, now.flops) == ""


WELL = condition.Condition(flops=1e11, slept=50.0, swap_mb=100.0, memory_pressure=1, heat=0, power="AC")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({}, {}, ""),
        ({}, {"slept": 54.0}, ""),
        ({}, {"slept": 60.0}, "slept for 10 s"),
        ({}, {"power": "battery"}, "power source changed from AC to battery"),
        ({"power": "battery"}, {"power": "battery"}, ""),
        ({}, {"heat": 2, "flops": 7e10}, "got hot (thermal pressure 0 to 2) and slow (70 %)"),
        ({}, {"heat": 1, "flops": 7e10}, ""),
        ({}, {"heat": 2}, ""),  # a Mac without a fan is always so: its runs compare with each other
        ({"power": None}, {}, ""),
        ({"heat": None}, {"heat": None}, ""),
        ({}, {"memory_pressure": 4}, "memory pressure critical"),
        ({}, {"memory_pressure": 2}, ""),
        ({}, {"swap_mb": 1200.0}, "swapped 1100 MB"),
        ({}, {"swap_mb": 900.0}, ""),
        ({"swap_mb": None}, {"swap_mb": None}, ""),
        ({"flops": 4e10}, {"flops": 4e10}, "ran at 40 % of its speed"),
        ({"flops": 4e10}, {}, ""),
    ],
)
def test_a_run_in_another_condition_does_not_count(before, after, reason):
    result = condition.invalid_reason(dataclasses.replace(WELL, **before), dataclasses.replace(WELL, **after), 1e11)
    assert reason in result if reason else result == ""


def test_a_run_that_failed_is_its_own_failure_unless_the_machine_slept():
    after = dataclasses.replace(WELL, swap_mb=9000.0, memory_pressure=4, flops=1e9)
    assert condition.invalid_reason(WELL, after, 1e11, "memory") == ""
    assert condition.invalid_reason(WELL, after, 1e11)
    asleep = dataclasses.replace(after, slept=500.0)
    assert "slept" in condition.invalid_reason(WELL, asleep, 1e11, "memory")


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({}, ""),
        ({"heat": 1}, ""),
        ({"heat": 2}, "is hot"),
        ({"memory_pressure": 4}, "memory pressure"),
        ({"flops": 3e10}, "30 % of its speed"),
    ],
)
def test_a_run_waits_for_the_machine(now, reason):
    result = condition.wait_reason(dataclasses.replace(WELL, **now), 1e11)
    assert reason in result if reason else result == ""


def test_what_was_measured_during_a_run_says_more_than_the_moments_around_it():
    assert condition.invalid_reason(WELL, WELL, 1e11, pace=0.4) == "the machine ran at 40 % of its speed"
    slow = dataclasses.replace(WELL, flops=4e10)
    assert condition.invalid_reason(slow, slow, 1e11, pace=0.9) == ""


def test_a_time_limit_on_a_slow_machine_is_not_the_changes_fault():
    slow = dataclasses.replace(WELL, flops=7e10)
    reason = condition.invalid_reason(slow, WELL, 1e11, "timeout")
    assert reason == "it was still running at its time limit, and the machine ran at 70 % of its speed"
    assert condition.invalid_reason(WELL, WELL, 1e11, "timeout") == ""
    assert condition.invalid_reason(slow, slow, 1e11, "crash") == ""
    assert "at 70 %" in condition.invalid_reason(WELL, WELL, 1e11, "timeout", pace=0.7)
