"""What this project does on one machine, in a small archive that its owner can publish: `make evidence`.

Doctor, fit, two trainings with different seeds, models that cheat (which the scorer must refuse), the sandboxes'
self-tests and a short night in a clone of this checkout. Everything runs as a user would start it, in processes of its
own, and what fails is part of the evidence. The archive holds JSON only, and SHA256SUMS of its files. Paths and the
names of the machine and its user are replaced; findings about network and models are left out.
`lab.interface.evidence_check` reads an archive.
"""

import getpass
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lab.errors import UserError, one_line
from lab.files import ROOT, cache_root, write_atomic
from lab.loop.git import git, run
from lab.machine import hardware
from lab.training.run import recorded
from lab.trial.sandbox import available, self_test

FORMAT = 1
SEEDS = (0, 1)
NIGHT_MINUTES = 0.2  # of each training of the rehearsal night
EXPERIMENTS = 3
TAG = "evidence"
KEPT_STEPS = 300  # of steps.jsonl, evenly spaced
PRIVATE = ("hub", "ollama", "git", "cache")  # findings of the doctor that are about the owner, not the machine
SUMS = "SHA256SUMS"

# A model that cheats: the trained one, with this done to its logits, and the scorer's reason to refuse it.
CHEATS = {
    "looks ahead": ("y + y.mean(axis=1, keepdims=True)", "not causal"),
    "mixes rows": ("y + y.mean(axis=0, keepdims=True)", "other rows"),
    "ignores the checkpoint": ("0 * y", "do not depend on the checkpoint"),
    "returns infinity": ("y / 0", "not finite"),
}
CHEAT = """

_honest_build = build_model

def build_model(vocab_size):
    model = _honest_build(vocab_size)
    honest = type(model)
    def cheat(self, tokens):
        y = honest.__call__(self, tokens)
        return {}
    model.__class__ = type("Cheat", (honest,), {{"__call__": cheat}})
    return model
"""

Log = Callable[[str], None]


def collect(minutes: float | None, log: Log) -> dict[str, bytes]:
    """The files of an archive. `minutes` of training instead of the preset's, and then without a fit: for a quick look.

    Raises UserError if nothing is prepared."""
    if (record := recorded()) is None:
        raise UserError("nothing is prepared yet; run `make evidence PRESET=tinystories`, or PRESET=offline")
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        work = _Work(Path(folder), minutes, log)
        evidence = {"format": FORMAT, "created": f"{datetime.now(UTC):%Y-%m-%d}", "machine": _machine()}
        evidence["commit"], evidence["changed"] = _commit()
        findings = json.loads(work.run("doctor", "prepare.py", "doctor", "--json", allowed=(0, 1)) or "[]")
        evidence["doctor"] = [finding for finding in findings if finding["about"] not in PRIVATE]
        if not minutes:
            work.run("fit", "prepare.py", "--fit")
        evidence["settings"] = settings(recorded() or record)
        evidence["runs"] = [work.train(seed) for seed in SEEDS]
        evidence["cheats"] = {name: work.cheat(name, *CHEATS[name]) for name in CHEATS}
        evidence["sandbox"] = {kind: self_test(kind) for kind in sandbox_kinds()}
        evidence["night"] = work.night()
        evidence["failures"] = work.failures
        return work.files(evidence)


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """Preset, tier and fit, without the names of the owner's own files."""
    own = ("train_files", "val_files") if record["preset"]["data"]["source"] == "files" else ()
    data = {key: value for key, value in record["preset"]["data"].items() if key not in own}
    return {"preset": record["preset"] | {"data": data}, "tier": record["tier"], "fit": record.get("fit")}


def write(files: dict[str, bytes], path: Path) -> str:
    """Write the archive and return its digest: the beginning of SHA256SUMS' own."""
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        for name, content in sorted({**files, SUMS: sums.encode()}.items()):
            entry = tarfile.TarInfo(f"evidence/{name}")  # without owner, group and time
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    write_atomic(path, sink.getvalue())
    return digest(sums.encode())


def digest(sums: bytes) -> str:
    return hashlib.sha256(sums).hexdigest()[:16]


class _Work:
    """Runs the commands, and remembers what failed and what they left."""

    def __init__(self, folder: Path, minutes: float | None, log: Log):
        self.folder, self.minutes, self.log = folder, minutes, log
        self.failures: list[str] = []
        self.left: dict[str, list[Any]] = {}  # name of a .jsonl file -> its records

    def run(self, about: str, *command: object, cwd: Path = ROOT, allowed: tuple[int, ...] = (0,)) -> str:
        """What a command prints, "" if it fails."""
        begun = time.monotonic()
        self.log(f"{about} ...")
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode in allowed:
            self.log(f"{about}: done in {time.monotonic() - begun:.0f} s")
            return done.stdout
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        self.failures.append(f"{about}: {one_line(lines[-1])}")
        self.log(f"{about}: failed: {one_line(lines[-1])}")
        return ""

    def train(self, seed: int) -> dict[str, Any]:
        """The result of a training with this seed, {} if it failed."""
        folder = self.folder / f"seed{seed}"
        budget = ("--minutes", self.minutes) if self.minutes else ()
        if not self.run(f"training, seed {seed}", "train.py", "--seed", seed, "--run-dir", folder, *budget):
            return {}
        steps = _jsonl(folder / "steps.jsonl")
        self.left[f"steps-seed{seed}.jsonl"] = steps[:: max(1, len(steps) // KEPT_STEPS)]
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))

    def cheat(self, name: str, expression: str, reason: str) -> str:
        """Why the scorer refuses the first trained model with this cheat, "" if it does not."""
        trained, cheating = self.folder / f"seed{SEEDS[0]}", self.folder / f"cheat-{name.split()[0]}"
        if not (trained / "result.json").is_file():
            return ""
        shutil.copytree(trained, cheating)
        with open(cheating / "train.py", "a", encoding="utf-8") as source:
            source.write(CHEAT.format(expression))
        self.run(f"a model that {name}", "prepare.py", "score", cheating, "--batches", 1, allowed=(0, 1))
        refused = json.loads((cheating / "score.json").read_text(encoding="utf-8")).get("reason", "")
        if reason not in refused:
            self.failures.append(f"a model that {name} was not refused for it: {refused or 'accepted'}")
        return refused

    def night(self) -> dict[str, Any]:
        """How a night of EXPERIMENTS ended, in a clone, so that this checkout gets no branch."""
        clone = self.folder / "clone"
        run(ROOT, "clone", "--quiet", str(ROOT), str(clone))
        command = ("agent_loop.py", "run", "--agent", "search", "--tag", TAG, "--max-experiments", EXPERIMENTS)
        minutes = self.minutes or NIGHT_MINUTES
        self.run(f"a night of {EXPERIMENTS} experiments", *command, "--minutes", minutes, cwd=clone)
        journal = _jsonl(clone / "nights" / TAG / "journal.jsonl")
        self.left["journal.jsonl"] = [{k: v for k, v in one.items() if k != "source"} for one in journal]
        ends = [one["event"] for one in journal if one["event"] in ("kept", "discarded", "crashed")]
        return {"sandbox": available(), "experiments": len(ends), "ends": ends}

    def files(self, evidence: dict[str, Any]) -> dict[str, bytes]:
        replace = scrubber([self.folder])
        lines = {name: "".join(json.dumps(replace(one)) + "\n" for one in ones) for name, ones in self.left.items()}
        texts = lines | {"evidence.json": json.dumps(replace(evidence), indent=1)}
        return {name: text.encode() for name, text in texts.items()}


def scrubber(folders: list[Path]) -> Callable[[Any], Any]:
    """A function that replaces these folders, those of the user, and the names of machine and user in all texts of a
    JSON value. Keys stay."""
    places = {str(folder): "WORK" for folder in folders} | {str(ROOT): "CHECKOUT", str(cache_root()): "CACHE"}
    places |= {str(Path.home()): "HOME", tempfile.gettempdir(): "TMP"}
    places |= {os.path.realpath(place): word for place, word in places.items()}
    names = {platform.node(): "MACHINE", platform.node().partition(".")[0]: "MACHINE", Path.home().name: "USER"}
    with suppress(OSError, KeyError):  # no entry for this user
        names[getpass.getuser()] = "USER"
    patterns = [(re.escape(place), word) for place, word in sorted(places.items(), key=lambda item: -len(item[0]))]
    patterns += [(rf"\b{re.escape(name)}\b", word) for name, word in names.items() if name]

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, str):
            for pattern, word in patterns:
                value = re.sub(pattern, word, value, flags=re.IGNORECASE)
        return value

    return replace


def _machine() -> dict[str, Any]:
    return hardware.describe() | {"python": platform.python_version(), "mlx": version("mlx")}


def _commit() -> tuple[str, bool]:
    """The commit of this checkout, and whether files differ from it."""
    return git(ROOT, "rev-parse", "HEAD").strip(), bool(
        git(ROOT, "status", "--porcelain", "--untracked-files=no").strip()
    )


def sandbox_kinds() -> tuple[str, ...]:
    return ("seatbelt",) if sys.platform == "darwin" else ("bubblewrap", "landlock")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file, [] without one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
