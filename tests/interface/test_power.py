"""What `pmset` printed on people's Macs, each output with its source, and what doctor makes of it."""

import pytest

from lab.interface.doctor import Supply, macos_supply, power_settings

# alfredapp/low-power-mode-workflow#6, a MacBook Pro M1 Max, macOS 14: powermode 0 automatic, 1 low, 2 high (#4).
M1_MAX = """Battery Power:
 Sleep On Power Button 1
 powermode            1
 standby              1
 ttyskeepawake        1
 hibernatemode        3
 powernap             1
AC Power:
 Sleep On Power Button 1
 powermode            {mode}
 standby              1
 sleep                {sleep}
"""
INTEL = """Battery Power:
 lidwake              1
 hibernatefile        /var/vm/sleepimage
 displaysleep         2
 sleep                1
AC Power:
 lidwake              1
 hibernatefile        /var/vm/sleepimage
 displaysleep         30
 networkoversleep     0
 sleep                0
 disksleep            10
"""  # a MacBook Pro of 2020
DESKTOP = "AC Power:\n womp                 1\n sleep                0\n autorestart          0\n"
WITH_UPS = DESKTOP + "UPS Power:\n sleep                15\n lowpowermode         1\n"
SETTINGS = {
    "M1 Max, automatic": (M1_MAX.format(mode=0, sleep=1), ["ok"], "after 1 min idle"),
    "M1 Max, low": (M1_MAX.format(mode=1, sleep=0), ["warning", "ok"], "never when idle"),
    "M1 Max, high": (M1_MAX.format(mode=2, sleep=0), ["ok"], "never when idle"),
    "Intel": (INTEL, ["ok"], "never when idle"),
    "desktop": (DESKTOP, ["ok"], "never when idle"),
    "desktop with a UPS": (WITH_UPS, ["ok"], "never when idle"),
    "virtual": ("", ["ok"], "never when idle"),
    "a word": ("AC Power:\n sleep                never\n", ["ok"], "never when idle"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_recorded_settings_are_read(name):
    printed, levels, idle = SETTINGS[name]
    findings = list(power_settings(printed))
    assert [finding.level for finding in findings] == levels
    assert idle in str(vars(findings[-1]))


@pytest.mark.parametrize(
    ("printed", "supply"),
    [
        (" -InternalBattery-0 \t90%; discharging; (no estimate) present: true", (True, "battery 90 % discharging")),
        (" -InternalBattery-0 \t89%; discharging; 4:47 remaining present: true", (True, "battery 89 % discharging")),
        (" -Back-UPS ES 700 (id=1234)\t87%; discharging; (no estimate)", (True, "")),
        ("", (True, "")),
    ],
)  # the first two: OS X 10.11.6, imwally/battstat#2
def test_recorded_supplies_are_read(printed, supply):
    source = "UPS" if "UPS" in printed else "Battery"
    assert macos_supply(f"Now drawing from '{source} Power'\n{printed}\n") == Supply(*supply)


def test_a_mac_without_power_sources_is_on_the_mains():
    assert macos_supply("No power source information\n") == Supply(False)
