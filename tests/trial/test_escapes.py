"""Attempts to get out of the sandbox (tests/attempts.py), all in one real run for each mechanism of this machine.

Without a sandbox they succeed, which shows that the programs work. With one, what must hold afterwards is the same for
all: no secret was read, no file outside has changed, no server has heard anything, no process was touched.
"""

import json
import os
import re
import sys
import sysconfig
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from textwrap import dedent

import pytest
from attempts import ATTEMPTS, CHECKPOINTS, LEFT, RESOURCES, Attempt
from conftest import ROOT
from outside import FOLDERS, Outside, landlock_version

from lab.trial import guard, sandbox
from lab.trial.guard import Limits
from lab.trial.sandbox import Policy

ALL = [attempt for attempts in ATTEMPTS.values() for attempt in attempts]
LIMITS = Limits(wall_seconds=60, memory_bytes=1 << 30)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the programs use Linux's interfaces")
HARNESS = """
import ctypes, fcntl, json, mmap, os, resource, shutil, signal, socket, struct, subprocess, sys, sysconfig, time
from contextlib import suppress
libc = ctypes.CDLL(None, use_errno=True)

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def call(name, *arguments):
    return libc.syscall(NUMBERS[name], *arguments)

def tell(text):
    told.append(text)

def did():
    told.append("SECRET")

def unshare():
    check(libc.unshare(0x10020000))  # a user namespace and a mount namespace

def send(family, kind, address):
    with socket.socket(family, kind) as end:
        end.settimeout(2)
        end.connect(tuple(address) if isinstance(address, list) else address)
        end.send(NAME.encode())

told = []
for number, (program, names) in json.load(open("world.json")).items():
    if os.fork() == 0:
        signal.alarm(5)
        os.mkdir(number)
        os.chdir(number)
        output = open("told", "w")
        globals().update(names)
        try:
            exec(program)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        output.write("\\n".join(told))
        output.close()
        os._exit(0)
    os.wait()
"""


def run_all(folder: Path, kind: str) -> tuple[dict[str, str], dict[str, str]]:
    """What each attempt has reached under a sandbox of this kind, and what its program has told."""
    with ExitStack() as stack:
        outside = Outside(folder, f"lab{os.getpid()}{kind[0]}", stack)
        tried = {number: attempt for number, attempt in enumerate(ALL) if kind != "none" or attempt.control}
        world = {n: (dedent(attempt.program).strip(), outside.set_up(n, attempt)) for n, attempt in tried.items()}
        (outside.own / "world.json").write_text(json.dumps(world))
        (outside.own / "train.py").write_text(HARNESS)
        policy = Policy((outside.own,), (folder / "repo",), (folder / "repo/val",))
        outcome = guard.run([sys.executable, "train.py"], outside.own, policy, LIMITS, sandbox=kind)
        assert outcome.status == "ok", (outside.own / "run.log").read_text()
        outside.listen_again()
        told = {attempt.name: (outside.own / str(n) / "told").read_text() for n, attempt in tried.items()}
        return {attempt.name: outside.reached(n) for n, attempt in tried.items()}, told


@linux_only
def test_without_a_sandbox_every_program_reaches_what_it_is_after(tmp_path: Path) -> None:
    reached, told = run_all(tmp_path / "x", "none")
    by_the_machine = ("PermissionError", "not implemented", "not supported", "Network is unreachable")
    assert [
        name for name in reached if not reached[name] and not any(map(told[name].__contains__, by_the_machine))
    ] == []
    assert sum(map(bool, reached.values())) > 60


@linux_only
@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_a_sandbox_refuses_what_the_table_says_and_nothing_else_gets_out(kind: str, tmp_path: Path) -> None:
    if fault := sandbox.self_test(kind):
        pytest.skip(f"{kind} does not work here: {fault}")
    reached, _ = run_all(tmp_path / "x", kind)
    known = [attempt for attempt in ALL if kind == "bubblewrap" or attempt.landlock <= landlock_version()]
    open_ = {attempt.name for attempt in known if kind[0] not in attempt.refused}
    assert {attempt.name: reached[attempt.name] for attempt in known if reached[attempt.name]}.keys() == open_, reached


# The profile for macOS: not run on a Mac. Its text is read as sandbox-exec does.

RULE = re.compile(r'\((allow|deny) ([^()"]+)((?:\([a-z-]+ (?:"(?:\\.|[^"\\])*"|[a-z-]+)\)\s*)*)\)')
FILTER = re.compile(r'\(([a-z-]+) "?((?:\\.|[^"\\])*?)"?\)')


def allows(profile: str, operation: str, place: str) -> bool:
    """What the last rule that matches says. Rules of macOS's own system.sb, which the profile imports, are not read."""
    allowed = False
    for effect, operations, filters in RULE.findall(profile):
        named = any(fnmatch(operation, name) for name in ["*" if n == "default" else n for n in operations.split()])
        if named and (not filters or any(matches(kind, value, place) for kind, value in FILTER.findall(filters))):
            allowed = effect == "allow"
    return allowed


def matches(kind: str, value: str, place: str) -> bool:
    within = kind == "subpath" and Path(place).is_relative_to(value)
    return within or (kind in ("literal", "target") and place == value)


@pytest.mark.parametrize("attempt", [a for a in ALL if a.mac], ids=lambda attempt: attempt.name)
def test_the_profile_for_macos_has_a_rule_for_each_attempt(attempt: Attempt, tmp_path: Path) -> None:
    for name in ("own", *FOLDERS.values()):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    policy = Policy((tmp_path / "own",), (tmp_path / "repo",), (tmp_path / "repo/val",))
    profile = sandbox.wrap(["python"], policy, "seatbelt")[2]
    places = {name: str((tmp_path / place / "file").resolve()) for name, place in FOLDERS.items()}
    places["PACKAGES"] = str(Path(sysconfig.get_path("purelib")).resolve() / "x.pth")
    operation, place = attempt.mac
    assert allows(profile, operation, places.get(place, place)) == ("m" not in attempt.refused)
    assert allows(profile, "file-write-data", str((tmp_path / "own/file").resolve()))
    assert allows(profile, "signal", "same-sandbox")


# What docs/SAFETY.md says


def figures() -> list[str]:
    """The table of docs/SAFETY.md."""
    rows = []
    for kind, attempts in ATTEMPTS.items():
        counts = [sum(letter in attempt.refused for attempt in attempts) for letter in "bl"]
        mac = [attempt for attempt in attempts if attempt.mac]
        profile = f"{sum('m' in attempt.refused for attempt in mac)} of {len(mac)}"
        rows.append(f"| {kind} | {len(attempts)} | {counts[0]} | {counts[1]} | {profile} |")
    traps = len(LEFT)
    return [*rows, f"| traps for the loop and the scorer | {traps} | {traps} | {traps} | not run |",
            f"| checkpoints that are none | {len(CHECKPOINTS)} | {len(CHECKPOINTS)} | the same loop | not run |",
            f"| resources | {len(RESOURCES)} | {len(RESOURCES)} | the same guard | not run |"]  # fmt: skip


def test_the_documentation_has_these_figures_and_names_what_is_not_refused() -> None:
    page = " ".join((ROOT / "docs/SAFETY.md").read_text(encoding="utf-8").split())
    assert [row for row in figures() if row not in page] == []
    for name in (attempt.name for attempt in ALL if not {"b", "l"} <= set(attempt.refused)):
        assert name in page
