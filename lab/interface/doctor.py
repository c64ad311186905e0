"""Check that this machine is ready for a night: one line per finding, with the command that fixes it.

A check yields findings and changes nothing. A check that fails to run is a finding too.
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
from lab.errors import INTERRUPTED, UserError, printable
from lab.files import ROOT, cache_root
from lab.interface import housekeeping
from lab.machine import hardware
from lab.machine.condition import condition, content, wait_reason
from lab.machine.device import CORES, nvidia
from lab.machine.fit import OUTGROWN, times_as_fast

LOW_DISK_GB, NO_DISK_GB = 5.0, 1.0  # a night of 100 experiments leaves about a gigabyte of checkpoints
HUB_SECONDS = 2.0
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "failure"]
    about: str
    message: str
    fix: str = ""  # one command, or one thing to do


def end_at_interrupt() -> None:
    """Make Ctrl-C end this process at once; safe because it leaves nothing behind. A KeyboardInterrupt in the middle of
    an import loses the interpreter's import lock, and threads that import then wait forever (CPython 3.11)."""

    def end(*_: object) -> None:
        os.write(2, b"\nstopped\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)


def examine() -> Iterator[Finding]:
    """All findings, in the order in which a night needs them. Network checks run in parallel with the others."""
    with contextlib.suppress(Exception):  # becomes a finding later; it changes os.environ, so it comes before threads
        import lab.agents.ollama_client  # noqa: F401
    network_checks = (_hub, _ollama, _openai)
    checks = (_machine, _mlx, _tier, _condition, _power, _disk, _cache, _prepared, _sandbox, _git, *network_checks)
    with ThreadPoolExecutor() as pool:
        submitted = {check: pool.submit(_findings, check) for check in network_checks}
        for check in checks:
            yield from submitted[check].result() if check in submitted else _findings(check)


def _findings(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # a broken machine is what the doctor looks for
        message = f"check failed: {type(error).__name__}: {error}"
        return [Finding("failure", check.__name__.strip("_"), message, "make clean setup")]


@cache
def _facts() -> dict[str, Any]:
    """Cached: on a Mac it takes a second."""
    return hardware.describe()


def _machine() -> Iterator[Finding]:
    facts = _facts()
    message = f"{facts['chip']}, {facts['cpu_cores']} cores, {_gpu(facts)}, {facts['memory_gb']:.0f} GB, {facts['os']}"
    yield Finding("ok", "machine", f"{message}, Python {platform.python_version()}")


def _gpu(facts: dict[str, Any]) -> str:
    """The GPU in a few words."""
    if not facts["gpu_cores"]:
        return "no GPU"
    memory = f" with {facts['gpu_memory_gb']:.0f} GB" if facts["backend"] == "cuda" else ""
    return f"{facts['gpu_cores']} {CORES[facts['backend']]}{memory}"


def _mlx() -> Iterator[Finding]:
    from lab.machine.backend import BLAS, KIND, mx

    peak = hardware.matmul_peak("float32", repeats=5) / 1e9
    device = {"cpu": "the CPU", "metal": "Metal", "cuda": "CUDA"}[KIND]
    device += f" ({mx.device_info()['architecture']})" if KIND != "cpu" else f", {BLAS}"
    message = f"MLX {mx.__version__} on {device}, {peak:,.0f} GFLOP/s float32"
    if _facts()["backend"] != KIND:
        yield Finding("failure", "mlx", f"{message}: MLX does not see the GPU of this machine", "make clean setup")
    elif KIND == "cpu" and (card := nvidia()):
        message = f"{message}: MLX is installed for the CPU and does not use the {card.name}"
        yield Finding("warning", "mlx", message, "make setup BACKEND=cuda")
    elif "slow" in BLAS:
        yield Finding("warning", "mlx", message, "use a Mac or x86-64: there is no fast BLAS package here")
    else:
        yield Finding("ok", "mlx", message)


def _tier() -> Iterator[Finding]:
    from lab.training.run import DEFAULT_PRESET, recorded

    record = recorded() or {"preset": {"name": DEFAULT_PRESET}, "tier": None}
    chosen, facts = preset.load(record["preset"]["name"]), _facts()
    here = preset.Hardware(facts["backend"], facts["memory_gb"], facts["gpu_cores"], facts["gpu_memory_gb"])
    tier = next((tier for tier in chosen.hardware if tier.matches(here)), None)
    name = str(tier) if tier else ""
    detected = f"{here.backend}, {here.memory_gb:.0f} GB, {_gpu(facts)}"
    sets = ", ".join(f"{key} {value}" for key, value in tier.set.items()) if tier else "the preset as written"
    message = f"{chosen.name}, {name or 'none'}: {'first match' if tier else 'no match'} for {detected}; {sets}"
    if record["tier"] in (None, name):
        yield Finding("ok", "tier", message)
    else:
        message = f"{message}; the data was prepared for another machine: {record['tier'] or 'no tier'}"
        yield Finding("warning", "tier", message, f"make prepare PRESET={chosen.name}")


def _condition() -> Iterator[Finding]:
    now = condition()
    load = os.getloadavg()[0]
    message = f"{now}, load {load:.1f}"
    if reason := wait_reason(now, now.flops):
        yield Finding("warning", "condition", f"{message}: {reason}", "let it cool down, or close other programs")
    elif load > 0.5 * (os.cpu_count() or 1):
        yield Finding("warning", "condition", f"{message}: other programs use the CPU", "close them before a night")
    else:
        yield Finding("ok", "condition", message)


@dataclass(frozen=True)
class Supply:
    on_battery: bool
    battery: str = ""  # charge and state, "" without a battery


def _power() -> Iterator[Finding]:
    mac = sys.platform == "darwin"  # not run on a Mac
    supply = macos_supply(hardware.output("pmset", "-g", "batt")) if mac else linux_supply(Path("/"))
    message = f"on {'battery' if supply.on_battery else 'AC'} power, {supply.battery or 'no battery'}"
    if supply.on_battery:
        yield Finding("warning", "power", f"{message}; a night needs AC power", "plug in the charger")
    else:
        yield Finding("ok", "power", message)
    if mac:
        yield from power_settings(hardware.output("pmset", "-g", "custom"))
    elif supply.battery:
        message = "this laptop may sleep when idle or closed, and a night does not prevent that"
        yield Finding("warning", "sleep", message, "systemd-inhibit --what=idle:sleep:handle-lid-switch make agent")


def macos_supply(output: str) -> Supply:
    """From the output of `pmset -g batt`. Not run on a Mac."""
    battery = re.search(r"InternalBattery.*?(\d+)%; ([a-zA-Z ]+?)(?:;| present)", output)
    away = re.search(r"drawing from '(Battery|UPS) Power'", output)
    return Supply(bool(away), f"battery {battery[1]} % {battery[2]}" if battery else "")


def linux_supply(root: Path) -> Supply:
    """From /sys below `root`: the machine's own batteries, not those of a mouse."""
    batteries = {}
    for folder in sorted(root.glob("sys/class/power_supply/*")):
        kind, scope, charge, state = (content(folder / n).strip() for n in ("type", "scope", "capacity", "status"))
        if kind == "Battery" and scope != "Device":
            batteries[folder.name] = (charge, state.lower())
    text = ", ".join(f"battery {charge} % {state}" for charge, state in batteries.values())
    return Supply(any(state == "discharging" for _, state in batteries.values()), text)


def power_settings(output: str) -> Iterator[Finding]:
    """From the output of `pmset -g custom`."""
    on_charger = re.split(r"\n\S", output.partition("AC Power:")[2] or output)[0]  # as far as the next section
    values = dict(re.findall(r"(\S+) +(\d+)$", on_charger, re.M))
    if values.get("powermode", values.get("lowpowermode")) == "1":  # powermode 2 is high power
        yield Finding(
            "warning", "low power mode", "on, even on the charger: runs are slower", "sudo pmset -c lowpowermode 0"
        )
    idle = int(values.get("sleep", "0"))
    sleeps = f"after {idle} min idle, but not while a night runs (caffeinate)" if idle else "never when idle"
    yield Finding("ok", "sleep", f"on the charger {sleeps}; keep the lid open or connect a display")


def _disk() -> Iterator[Finding]:
    root = cache_root()
    while not root.exists():
        root = root.parent
    free = min(shutil.disk_usage(path).free for path in (root, ROOT)) / 1e9
    fix = "make clean-cache, or set AUTORESEARCH_CACHE to another disk"
    level = "failure" if free < NO_DISK_GB else "warning" if free < LOW_DISK_GB else "ok"
    yield Finding(level, "disk", f"{free:.0f} GB free", "" if level == "ok" else fix)


def _cache() -> Iterator[Finding]:
    sizes: dict[str, list[int]] = {}
    for entry in housekeeping.listing():
        sizes.setdefault(entry.name.partition("/")[0], []).append(entry.bytes)
    parts = [f"{part}: {len(each)}, {sum(each) / 1e6:,.0f} MB" for part, each in sizes.items()]
    yield Finding("ok", "cache", f"{'; '.join(parts) or 'empty'}; {cache_root()}")
    runs = housekeeping.runs()
    spare = sum(run.bytes for run in runs if not run.kept) / 1e6
    message = f"{len(runs)} with a checkpoint, {sum(run.bytes for run in runs) / 1e6:,.0f} MB"
    yield Finding("ok", "runs", message + (f"; `make clean-runs ALL=1` would free {spare:,.0f} MB" if spare else ""))


def _prepared() -> Iterator[Finding]:
    from lab.training.run import recorded

    current = recorded()
    if not current:
        yield Finding("warning", "data", "no data is prepared yet", "make prepare PRESET=offline")
        return
    chosen = preset.from_dict(current["preset"])
    if not (Path(current["prepared"]) / "manifest.json").is_file():
        yield Finding("failure", "data", f"{current['prepared']} is missing", f"make prepare PRESET={chosen.name}")
        return
    fit = current.get("fit")
    message = f"{chosen.name}, vocabulary {chosen.tokenizer.vocab_size}, context {chosen.task.sequence_length}"
    message = f"{message}, depth {chosen.model.depth}, width {chosen.model.width}" + ", fitted to this machine" * bool(
        fit
    )
    if fit and (times := times_as_fast(fit)) > OUTGROWN:
        message = f"{message} when it was {times:.1f} times slower"
        yield Finding("warning", "data", message, "make fit")
    else:
        yield Finding("ok", "data", message)


def _sandbox() -> Iterator[Finding]:
    from lab.trial.sandbox import available, self_test

    kind = available()
    if kind != "none":
        yield Finding("ok", "sandbox", f"{kind}; self-test passed: no network, no access to other files")
        return
    mac = sys.platform == "darwin"
    message = "; ".join(f"{kind}: {self_test(kind)}" for kind in (("seatbelt",) if mac else ("bubblewrap", "landlock")))
    fix = "allow unprivileged user namespaces" if shutil.which("bwrap") else "sudo apt-get install bubblewrap"
    fix = "run the night from a plain Terminal, outside any other sandbox" if mac else fix
    yield Finding("failure", "sandbox", f"none works, so an agent's code could do whatever you can ({message})", fix)


def _git() -> Iterator[Finding]:
    from lab.loop.git import git

    try:
        changed = git(ROOT, "status", "--porcelain", "--untracked-files=no").splitlines()
        head = git(ROOT, "log", "-1", "--format=%h %s")
    except UserError as error:
        yield Finding("failure", "git", f"{error}; a night keeps its history in git", "git clone the project again")
        return
    if changed:
        message = f"{len(changed)} changed files; a night starts from the last commit, {head}"
        yield Finding("warning", "git", message, "git commit -am '...', if the night should start with them")
    else:
        yield Finding("ok", "git", f"clean, at {head}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants
    from huggingface_hub.utils import httpx

    from lab.data.hub import check_endpoint, endpoint
    from lab.training.run import DEFAULT_PRESET

    message = "not reachable; you can use the offline preset, your own files and data that is already prepared"
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
            raise ValueError("unexpected JSON")
    except UserError as error:
        yield Finding("warning", "hub", str(error), f"unset it, {offline}")
    except (httpx.HTTPError, httpx.InvalidURL):
        yield Finding("warning", "hub", f"{where} is {message}", f"check the network, {offline}")
    except (ValueError, TypeError) as error:
        message = f"{where} does not answer like a hub ({error})"
        yield Finding("warning", "hub", message, f"correct HF_ENDPOINT, {offline}")
    else:
        yield Finding("ok", "hub", f"{where} answers ({reply.status_code})")


def _ollama() -> Iterator[Finding]:
    from lab.agents.briefing import NoProposal
    from lab.agents.model import model_memory_gb
    from lab.agents.ollama_client import Server

    alone = "search alone makes the proposals"
    try:
        server = Server(patience=0.0)
        models = server.models()
    except NoProposal as reason:
        yield Finding("warning", "ollama", f"{reason}; {alone}", "ollama serve")
        return
    except UserError as reason:
        yield Finding("warning", "ollama", f"{reason}; {alone}", "set OLLAMA_HOST to the address of the Ollama server")
        return
    for reason in server.unread.values():
        yield Finding("warning", "ollama", reason, "update Ollama, or pull the model again")
    if not server.local:
        message = f"train.py and the briefing are sent to {server.host}"
        yield Finding("warning", "ollama", message, "unset OLLAMA_HOST to keep them on this machine")
    if all(model.remote for model in models):
        yield Finding("warning", "ollama", "the server has no local model", "ollama pull qwen2.5-coder:1.5b")
    room = model_memory_gb()
    for model in models:
        if model.remote:
            message = f"{model.name} runs at {model.remote}; used only if you name it"
            yield Finding("ok", "ollama", f"{message}, and then train.py is sent there")
            continue
        size = model.bytes / 2**30
        fits = size <= room or not server.local
        message = (
            f"{model.name}, {size:.1f} GB: {'fits' if fits else f'larger than {room:.0f} GB, the room for a model'}"
        )
        yield Finding("ok" if fits else "warning", "ollama", message, "" if fits else "ollama pull qwen2.5-coder:1.5b")


def _openai() -> Iterator[Finding]:
    """Servers that a night uses where Ollama is absent."""
    from lab.agents.openai_client import USUAL_PORTS, found

    servers = list(found())
    for server in servers:
        names = [model.name for model in server.models() if model.completes]
        frees = f"{server.manager}, which frees its memory before a run" if server.manager else ""
        message = f"{server.host} has {', '.join(names[:5])}{' ...' * (len(names) > 5)}"
        if frees:
            yield Finding("ok", "openai", f"{message}; {frees}")
        else:
            fix = "choose a model that leaves room for training, or use Ollama"
            yield Finding("warning", "openai", f"{message}; it keeps its model in memory during every run", fix)
    if not servers:
        yield Finding("ok", "openai", f"no server on the ports {', '.join(map(str, USUAL_PORTS))}; none is needed")


def as_json(findings: list[Finding]) -> str:
    return json.dumps([vars(finding) for finding in findings], indent=1)


def as_text(finding: Finding) -> Text:
    """One line, and a second one with the fix."""
    shown = (f"{finding.level:8}", STYLES[finding.level]), f" {finding.about:14} {printable(finding.message)}"
    return Text.assemble(*shown).append(f"\n{'':23} -> {printable(finding.fix)}" if finding.fix else "")
