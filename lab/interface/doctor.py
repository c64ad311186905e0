"""What of this machine serves a night and what does not: one line a finding, with the one command that mends it.

Each check returns its findings; none changes anything. A check that cannot be made is a finding too.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from lab import network, preset
from lab.errors import INTERRUPTED, UserError
from lab.files import ROOT, cache_root
from lab.interface import housekeeping
from lab.machine import hardware
from lab.machine.condition import condition, content, unfit
from lab.machine.fit import OUTGROWN, times_as_fast

LOW_DISK_GB, NO_DISK_GB = 5.0, 1.0  # a night of 100 experiments leaves about a gigabyte of checkpoints
HUB_SECONDS = 2.0
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "failure"]
    about: str
    told: str
    mend: str = ""  # the one command, or the one thing to do


def end_at_interrupt() -> None:
    """From now on Ctrl-C ends this process at once, for one that leaves nothing behind. KeyboardInterrupt in the middle
    of an import loses the interpreter's import lock, and threads that import then wait for ever (CPython 3.11)."""

    def end(*_: object) -> None:
        os.write(2, b"\nstopped\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which a night needs them. Who is asked over a network is asked meanwhile."""
    with contextlib.suppress(Exception):  # is a finding then; it hides variables as it is imported, so before threads
        import lab.agents.ollama_client  # noqa: F401
    checks = (_machine, _mlx, _tier, _condition, _power, _disk, _cache, _prepared, _sandbox, _git, _hub, _ollama)
    with ThreadPoolExecutor() as pool:
        asked = {check: pool.submit(_findings, check) for check in (_hub, _ollama)}
        for check in checks:
            yield from asked[check].result() if check in asked else _findings(check)


def _findings(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # whatever is broken here is what is looked for
        told = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding("failure", check.__name__.strip("_"), told, "make clean setup")]


@cache
def _facts() -> dict[str, Any]:
    """Asking a Mac takes a second."""
    return hardware.describe()


def _machine() -> Iterator[Finding]:
    facts = _facts()
    gpu = f", {facts['gpu_cores']} GPU cores" if facts["gpu_cores"] else ", no Apple GPU"
    told = f"{facts['chip']}, {facts['cpu_cores']} cores{gpu}, {facts['memory_gb']:.0f} GB, {facts['os']}"
    yield Finding("ok", "machine", f"{told}, Python {platform.python_version()}")


def _mlx() -> Iterator[Finding]:
    from lab.machine.backend import BLAS, mx

    peak = hardware.matmul_peak("float32", repeats=5) / 1e9
    device = f"Metal ({mx.device_info()['architecture']})" if mx.metal.is_available() else "the CPU"
    told = f"MLX {mx.__version__} on {device}, {BLAS}, {peak:,.0f} GFLOP/s float32"
    if _facts()["backend"] == "metal" and not mx.metal.is_available():
        yield Finding("failure", "mlx", f"{told}: this Mac has a GPU that MLX does not see", "make clean setup")
    elif "slow" in BLAS:
        yield Finding("warning", "mlx", told, "run on a Mac or on x86-64: there is no fast BLAS package for this one")
    else:
        yield Finding("ok", "mlx", told)


def _tier() -> Iterator[Finding]:
    from lab.training.run import DEFAULT_PRESET, recorded

    record = recorded() or {"preset": {"name": DEFAULT_PRESET}, "tier": None}
    chosen, facts = preset.load(record["preset"]["name"]), _facts()
    here = preset.Hardware(facts["backend"], facts["memory_gb"], facts["gpu_cores"])
    tier = next((tier for tier in chosen.hardware if tier.matches(here)), None)
    words = str(tier) if tier else ""
    seen = f"{here.backend}, {here.memory_gb:.0f} GB, {here.gpu_cores} GPU cores"
    sets = ", ".join(f"{key} {value}" for key, value in tier.set.items()) if tier else "the preset as written"
    told = f"{chosen.name}, {words or 'none'}: {'the first that fits' if tier else 'no tier fits'} {seen}; {sets}"
    if record["tier"] in (None, words):
        yield Finding("ok", "tier", told)
    else:
        told = f"{told}; what is prepared is for another machine: {record['tier'] or 'no tier'}"
        yield Finding("warning", "tier", told, f"make prepare PRESET={chosen.name}")


def _condition() -> Iterator[Finding]:
    now = condition()
    load = os.getloadavg()[0]
    told = f"{now}, load {load:.1f}"
    if reason := unfit(now, now.flops):
        yield Finding("warning", "condition", f"{told}: {reason}", "let it cool down, or close other programs")
    elif load > 0.5 * (os.cpu_count() or 1):
        yield Finding("warning", "condition", f"{told}: other programs are busy", "close them before a night")
    else:
        yield Finding("ok", "condition", told)


@dataclass(frozen=True)
class Supply:
    on_battery: bool
    battery: str = ""  # its charge and what it does, "" for none


def _power() -> Iterator[Finding]:
    mac = sys.platform == "darwin"  # not run on a Mac
    supply = macos_supply(hardware.output("pmset", "-g", "batt")) if mac else linux_supply(Path("/"))
    told = f"on {'battery' if supply.on_battery else 'AC'} power, {supply.battery or 'no battery'}"
    if supply.on_battery:
        yield Finding("warning", "power", f"{told}: a night needs the charger", "plug it in")
    else:
        yield Finding("ok", "power", told)
    if mac:
        yield from power_settings(hardware.output("pmset", "-g", "custom"))
    elif supply.battery:
        told = "this laptop may sleep when it is idle or closed, and a night does not keep it awake"
        yield Finding("warning", "sleep", told, "systemd-inhibit --what=idle:sleep:handle-lid-switch make agent")


def macos_supply(told: str) -> Supply:
    """What `pmset -g batt` prints. Not run on a Mac."""
    battery = re.search(r"InternalBattery.*?(\d+)%; ([a-zA-Z ]+?)(?:;| present)", told)
    return Supply("'Battery Power'" in told, f"battery {battery[1]} % {battery[2]}" if battery else "")


def linux_supply(root: Path) -> Supply:
    """From /sys below `root`: the batteries of the machine itself, not those of its mice."""
    found = {}
    for folder in sorted(root.glob("sys/class/power_supply/*")):
        kind, scope, charge, does = (content(folder / n).strip() for n in ("type", "scope", "capacity", "status"))
        if kind == "Battery" and scope != "Device":
            found[folder.name] = (charge, does.lower())
    told = ", ".join(f"battery {charge} % {does}" for charge, does in found.values())
    return Supply(any(does == "discharging" for _, does in found.values()), told)


def power_settings(told: str) -> Iterator[Finding]:
    """Findings in what `pmset -g custom` prints."""
    on_charger = told.partition("AC Power:")[2] or told
    values = dict(line.split()[:2] for line in on_charger.splitlines() if len(line.split()) == 2)
    if values.get("lowpowermode") == "1":
        yield Finding(
            "warning", "low power mode", "on, also on the charger: runs are slower", "sudo pmset -c lowpowermode 0"
        )
    idle = int(values.get("sleep", "0"))
    sleeps = f"after {idle} min idle, but not while a night runs (caffeinate)" if idle else "never when idle"
    yield Finding("ok", "sleep", f"on the charger {sleeps}; an open lid or a display is needed")


def _disk() -> Iterator[Finding]:
    root = cache_root()
    while not root.exists():
        root = root.parent
    free = min(shutil.disk_usage(path).free for path in (root, ROOT)) / 1e9
    mend = "make clean-cache, or set AUTORESEARCH_CACHE to another disk"
    level = "failure" if free < NO_DISK_GB else "warning" if free < LOW_DISK_GB else "ok"
    yield Finding(level, "disk", f"{free:.0f} GB free", "" if level == "ok" else mend)


def _cache() -> Iterator[Finding]:
    sizes: dict[str, list[int]] = {}
    for entry in housekeeping.listing():
        sizes.setdefault(entry.name.partition("/")[0], []).append(entry.bytes)
    parts = [f"{part} {len(each)} in {sum(each) / 1e6:,.0f} MB" for part, each in sizes.items()]
    yield Finding("ok", "cache", f"{', '.join(parts) or 'empty'}; {cache_root()}")
    runs = housekeeping.runs()
    spare = sum(run.bytes for run in runs if not run.kept) / 1e6
    told = f"{len(runs)} with a checkpoint, {sum(run.bytes for run in runs) / 1e6:,.0f} MB"
    yield Finding("ok", "runs", told + (f"; `make clean-runs ALL=1` would free {spare:,.0f} MB" if spare else ""))


def _prepared() -> Iterator[Finding]:
    from lab.training.run import recorded

    current = recorded()
    if not current:
        yield Finding("warning", "data", "nothing is prepared yet", "make prepare PRESET=offline")
        return
    chosen = preset.from_dict(current["preset"])
    if not (Path(current["prepared"]) / "manifest.json").is_file():
        yield Finding("failure", "data", f"{current['prepared']} is gone", f"make prepare PRESET={chosen.name}")
        return
    found = current.get("fit")
    told = f"{chosen.name}, vocabulary {chosen.tokenizer.vocab_size}, context {chosen.task.sequence_length}"
    told = f"{told}, depth {chosen.model.depth}, width {chosen.model.width}{', fitted to this machine' * bool(found)}"
    if found and (times := times_as_fast(found)) > OUTGROWN:
        told = f"{told} when that was {times:.1f} times slower"
        yield Finding("warning", "data", told, "make fit")
    else:
        yield Finding("ok", "data", told)


def _sandbox() -> Iterator[Finding]:
    from lab.trial.sandbox import available, self_test

    kind = available()
    if kind != "none":
        yield Finding("ok", "sandbox", f"{kind}; its self-test holds: no network, no foreign files")
        return
    mac = sys.platform == "darwin"
    told = "; ".join(f"{kind}: {self_test(kind)}" for kind in (("seatbelt",) if mac else ("bubblewrap", "landlock")))
    mend = "permit unprivileged user namespaces" if shutil.which("bwrap") else "sudo apt-get install bubblewrap"
    mend = "run the night from a plain Terminal, outside any other sandbox" if mac else mend
    yield Finding("failure", "sandbox", f"none holds, and an agent's code could do what you can ({told})", mend)


def _git() -> Iterator[Finding]:
    from lab.loop.git import git

    try:
        changed = git(ROOT, "status", "--porcelain", "--untracked-files=no").splitlines()
        head = git(ROOT, "log", "-1", "--format=%h %s")
    except UserError as error:
        yield Finding("failure", "git", f"{error}: the night keeps its history in git", "git clone the project anew")
        return
    if changed:
        told = f"{len(changed)} changed files; a night begins at the last commit, {head}"
        yield Finding("warning", "git", told, "git commit -am '...', if the night should begin with them")
    else:
        yield Finding("ok", "git", f"clean, at {head}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants
    from huggingface_hub.utils import httpx

    from lab.data.hub import check_endpoint, endpoint
    from lab.training.run import DEFAULT_PRESET

    told = "not reachable: only the offline preset, your own files and what is prepared can be used"
    offline = "or: make prepare PRESET=offline"
    if constants.HF_HUB_OFFLINE:
        yield Finding("warning", "hub", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return
    where, url = endpoint(), f"{constants.ENDPOINT}/api/datasets/{preset.load(DEFAULT_PRESET).data.repo}"
    try:
        check_endpoint()
        with network.explained():
            own = network.is_this_machine(url)
            client = httpx.Client(timeout=HUB_SECONDS, follow_redirects=True, trust_env=not own)
        reply = client.get(url)
        if reply.is_success and "id" not in reply.json():
            raise ValueError("JSON of another shape")
    except UserError as error:
        yield Finding("warning", "hub", str(error), f"unset it, {offline}")
    except (httpx.HTTPError, httpx.InvalidURL):
        yield Finding("warning", "hub", f"{where} is {told}", f"check the network, {offline}")
    except (ValueError, TypeError) as error:
        told = f"{where} does not answer as a hub ({error})"
        yield Finding("warning", "hub", told, f"correct HF_ENDPOINT, {offline}")
    else:
        yield Finding("ok", "hub", f"{where} answers ({reply.status_code})")


def _ollama() -> Iterator[Finding]:
    from lab.agents.briefing import NoProposal
    from lab.agents.ollama import MEMORY_SHARE
    from lab.agents.ollama_client import Server

    alone = "the search proposes alone"
    try:
        server = Server(patience=0.0)
        models = server.models()
    except NoProposal as reason:
        yield Finding("warning", "ollama", f"{reason}: {alone}", "ollama serve")
        return
    except UserError as reason:
        yield Finding("warning", "ollama", f"{reason}: {alone}", "set OLLAMA_HOST to where the Ollama server is")
        return
    for reason in server.unread.values():
        yield Finding("warning", "ollama", reason, "update Ollama, or pull the model anew")
    if not server.local:
        told = f"train.py and the briefing leave this machine for {server.host}"
        yield Finding("warning", "ollama", told, "unset OLLAMA_HOST, if they should stay here")
    if all(model.remote for model in models):
        yield Finding("warning", "ollama", "a server without a model of its own", "ollama pull qwen2.5-coder:1.5b")
    room = _facts()["memory_gb"] * MEMORY_SHARE
    for model in models:
        if model.remote:
            told = f"{model.name} runs at {model.remote}: asked only if you name it"
            yield Finding("ok", "ollama", f"{told}, and then train.py leaves this machine")
            continue
        size = model.bytes / 2**30
        fits = size <= room or not server.local
        told = f"{model.name}, {size:.1f} GB: {'fits' if fits else f'more than {room:.0f} GB of this memory'}"
        yield Finding("ok" if fits else "warning", "ollama", told, "" if fits else "ollama pull qwen2.5-coder:1.5b")


def as_json(findings: list[Finding]) -> str:
    return json.dumps([vars(finding) for finding in findings], indent=1)


def as_text(finding: Finding) -> Text:
    """One line, and a second one with what mends it."""
    text = Text.assemble((f"{finding.level:8}", STYLES[finding.level]), f" {finding.about:14} {finding.told}")
    return text.append(f"\n{'':23} -> {finding.mend}" if finding.mend else "")
