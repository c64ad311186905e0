"""What of this machine serves a night and what does not: one line a finding, with the one command that mends it.

Each check returns its findings; none changes anything. A check that cannot be made is a finding too.
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import machine
from lab.condition import condition, unfit
from lab.errors import UserError
from lab.files import cache_root

ROOT = Path(__file__).resolve().parent.parent
LOW_DISK_GB, NO_DISK_GB = 5.0, 1.0  # a night of 100 experiments leaves about a gigabyte of checkpoints
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "failure"]
    about: str
    told: str
    mend: str = ""  # the one command, or the one thing to do


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which a night needs them."""
    for check in (_machine, _mlx, _condition, _disk, _prepared, _sandbox, _git, _hub, _ollama):
        try:
            yield from check()
        except Exception as error:  # whatever is broken here is what is looked for
            told = f"could not be looked at: {type(error).__name__}: {error}"
            yield Finding("failure", check.__name__.strip("_"), told, "make clean setup")


def _machine() -> Iterator[Finding]:
    facts = machine.describe()
    gpu = f", {facts['gpu_cores']} GPU cores" if facts["gpu_cores"] else ", no Apple GPU"
    told = f"{facts['chip']}, {facts['cpu_cores']} cores{gpu}, {facts['memory_gb']:.0f} GB, {facts['os']}"
    yield Finding("ok", "machine", f"{told}, Python {platform.python_version()}")


def _mlx() -> Iterator[Finding]:
    from lab.backend import BLAS, mx

    version = mx.__version__
    peak = machine.matmul_peak("float32") / 1e9
    told = f"MLX {version} on {'Metal' if mx.metal.is_available() else 'the CPU'}, {BLAS}, {peak:,.0f} GFLOP/s float32"
    if machine.describe()["backend"] == "metal" and not mx.metal.is_available():
        yield Finding("failure", "mlx", f"{told}: this Mac has a GPU that MLX does not see", "make clean setup")
    elif "slow" in BLAS:
        yield Finding("warning", "mlx", told, "run on a Mac or on x86-64: there is no fast BLAS package for this one")
    else:
        yield Finding("ok", "mlx", told)


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
    if now.power == "battery":
        yield Finding("warning", "power", "on battery: a night needs the charger", "plug it in")
    elif now.power:
        yield Finding("ok", "power", "on AC power")
    if sys.platform == "darwin":  # not run on a Mac
        yield from power_settings(machine.output("pmset", "-g", "custom"))


def power_settings(told: str) -> Iterator[Finding]:
    """Findings in what `pmset -g custom` prints."""
    on_charger = told.partition("AC Power:")[2] or told
    values = dict(line.split()[:2] for line in on_charger.splitlines() if len(line.split()) == 2)
    if values.get("lowpowermode") == "1":
        yield Finding(
            "warning", "low power mode", "on, also on the charger: runs are slower", "sudo pmset -c lowpowermode 0"
        )
    yield Finding("ok", "sleep", "caffeinate keeps it awake while a night runs; an open lid or a display is needed")


def _disk() -> Iterator[Finding]:
    root = cache_root()
    while not root.exists():
        root = root.parent
    free = min(shutil.disk_usage(path).free for path in (root, ROOT)) / 1e9
    mend = "make clean-cache, or set AUTORESEARCH_CACHE to another disk"
    level = "failure" if free < NO_DISK_GB else "warning" if free < LOW_DISK_GB else "ok"
    yield Finding(level, "disk", f"{free:.0f} GB free", "" if level == "ok" else mend)


def _prepared() -> Iterator[Finding]:
    from lab.run import recorded

    folders = sorted((cache_root() / "prepared").glob("*/manifest.json"))
    size = sum(f.stat().st_size for folder in folders for f in folder.parent.iterdir() if f.is_file()) / 1e6
    current = recorded()
    if not current:
        yield Finding("warning", "data", "nothing is prepared yet", "make prepare PRESET=offline")
        return
    if not (Path(current["prepared"]) / "manifest.json").is_file():
        yield Finding(
            "failure", "data", f"{current['prepared']} is gone", f"make prepare PRESET={current['preset']['name']}"
        )
        return
    preset, tier = current["preset"], current["tier"] or "no tier"
    told = (
        f"{preset['name']}, vocabulary {preset['tokenizer']['vocab_size']}, depth {preset['model']['depth']}, width "
        f"{preset['model']['width']} ({tier}); {len(folders)} prepared, {size:,.0f} MB in {cache_root()}"
    )
    yield Finding("ok", "data", told)


def _sandbox() -> Iterator[Finding]:
    from lab.sandbox import available, self_test

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
    from lab.branch import git

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
    import httpx
    from huggingface_hub import constants

    told = "not reachable: only the offline preset, your own files and what is prepared can be used"
    mend = "check the network, or: make prepare PRESET=offline"
    if constants.HF_HUB_OFFLINE:
        yield Finding("warning", "hub", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return
    try:
        status = httpx.head(constants.ENDPOINT, timeout=HUB_SECONDS, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        yield Finding("warning", "hub", told, mend)
        return
    yield Finding("ok", "hub", f"{constants.ENDPOINT} answers ({status})")


def _ollama() -> Iterator[Finding]:
    from lab.agents import NoProposal
    from lab.agents.ollama import MEMORY_SHARE
    from lab.agents.ollama_client import Server

    server = Server(patience=0.0)
    try:
        models = server.models()
    except NoProposal:
        yield Finding("warning", "ollama", f"no server at {server.host}: the search proposes alone", "ollama serve")
        return
    if not models:
        yield Finding("warning", "ollama", "a server without a model", "ollama pull qwen2.5-coder:1.5b")
    room = machine.describe()["memory_gb"] * MEMORY_SHARE
    for model in models:
        size = model.bytes / 2**30
        fits = size <= room or not server.local
        told = f"{model.name}, {size:.1f} GB: {'fits' if fits else f'more than {room:.0f} GB of this memory'}"
        yield Finding("ok" if fits else "warning", "ollama", told, "" if fits else "ollama pull qwen2.5-coder:1.5b")


def tell(findings: list[Finding], as_json: bool) -> str:
    """The findings as lines for a person, or as JSON."""
    if as_json:
        return json.dumps([vars(finding) for finding in findings], indent=1)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:8} {finding.about:14} {finding.told}")
        lines += [f"{'':23} -> {finding.mend}"] if finding.mend else []
    return "\n".join(lines)
