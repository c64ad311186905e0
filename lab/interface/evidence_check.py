"""What an archive of `make evidence` shows: whether it is whole, and its figures against what was expected there.

An archive comes from someone else, so nothing is unpacked, sizes are limited, and texts are shown on one line. The
digests show damage and careless edits; they cannot show that the figures were measured. Compare the digest of the
archive with the one that its owner published.
"""

import hashlib
import json
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import UserError, one_line
from lab.interface.evidence import CHEATS, EXPERIMENTS, FORMAT, SEEDS, SUMS, digest
from lab.machine.device import CORES
from lab.machine.fit import OUTGROWN, RULE_HOLDS_FOR

LARGEST = 16 << 20  # bytes of one file
FILES = 20
SEED_SPREAD = 0.03  # of val_bpb between two seeds: published runs on Macs differ by as much, ours by 0.018
PREDICTION = 0.05  # of val_bpb around the scaling rule's: its runs scattered by 0.010 bpb, other machines may by more
MFU = {"metal": 15.0, "cuda": 15.0}  # percent, from published training rates on Macs (17 to 25 %); none for a CPU
SUM = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")


@dataclass(frozen=True)
class Line:
    """One expectation, and whether it is met."""

    met: bool
    text: str

    def __str__(self) -> str:
        return f"{'as expected' if self.met else 'NOT EXPECTED':13} {self.text}"


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The evidence of an archive and its digest. Raises UserError, naming the file, unless it is whole."""
    try:
        files = _files(path)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not an archive of `make evidence` ({one_line(error)}); get it again") from None
    if SUMS not in files:
        raise UserError(f"{path}: {SUMS} is missing, so nothing can be checked; get the archive again")
    sums = dict(match.groups()[::-1] for line in files[SUMS].decode(errors="replace").splitlines()
                if (match := SUM.fullmatch(line)))  # fmt: skip
    names = files.keys() - {SUMS}
    for name in sorted(sums.keys() ^ names):
        raise UserError(f"{path}: {name} is {'missing' if name in sums else 'not listed in ' + SUMS}; get it again")
    for name in sorted(names):
        if hashlib.sha256(files[name]).hexdigest() != sums[name]:
            raise UserError(f"{path}: {name} was changed after the archive was written; get it again")
    try:
        evidence = json.loads(files["evidence.json"])
        if evidence["format"] != FORMAT:
            raise UserError(
                f"{path}: format {evidence['format']!r}, not {FORMAT}; check it with the version that wrote it"
            )
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: evidence.json is not that of `make evidence`; get the archive again") from None
    return evidence, digest(files[SUMS])


def _files(path: Path) -> dict[str, bytes]:
    files = {}
    with tarfile.open(path, "r:gz") as archive:
        for entry in archive:
            name = entry.name.removeprefix("evidence/")
            if not entry.isreg() or not re.fullmatch(r"[\w.-]+", name) or entry.size > LARGEST or len(files) == FILES:
                raise UserError(f"{path}: {one_line(entry.name)} does not belong there; get the archive again")
            if name in files:
                raise UserError(f"{path}: {name} is there twice; get the archive again")
            files[name] = archive.extractfile(entry).read()
    return files


def expectations(evidence: dict[str, Any]) -> list[Line]:
    """Every expectation of this machine's tier. Raises UserError for evidence of another shape."""
    try:
        return [*_failures(evidence), *_runs(evidence), *_fit(evidence), *_protection(evidence)]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the evidence is incomplete ({type(error).__name__}: {one_line(error)})") from None


def _failures(evidence: dict[str, Any]) -> list[Line]:
    problems = [f"doctor: {one_line(f['about'])}: {one_line(f['message'])}" for f in evidence["doctor"]
                if f["level"] == "failure"]  # fmt: skip
    failed = [*map(one_line, evidence["failures"]), *problems]
    return [Line(False, text) for text in failed] or [Line(True, "every step was done, and the doctor has no failure")]


def _runs(evidence: dict[str, Any]) -> list[Line]:
    runs = [run for run in evidence["runs"] if run]
    lines = [Line(len(runs) == len(SEEDS), f"{len(runs)} of {len(SEEDS)} trainings have a score")]
    if len(runs) == len(SEEDS) and _whole(evidence, runs):
        scores = [float(run["val_bpb"]) for run in runs]
        spread = (max(scores) - min(scores)) / min(scores)
        text = f"val_bpb {' and '.join(f'{score:.4f}' for score in scores)}: seeds differ by {100 * spread:.1f} %"
        lines.append(Line(spread <= SEED_SPREAD, f"{text}, at most {100 * SEED_SPREAD:g} % expected"))
    backend = evidence["machine"]["backend"]
    for run in runs:
        if backend in MFU:
            text = f"MFU {run['mfu_percent']:.1f} %, at least {MFU[backend]:g} % expected of {backend}"
            lines.append(Line(run["mfu_percent"] >= MFU[backend], text))
        if run["slept_seconds"] > 5:
            lines.append(Line(False, f"the machine slept for {run['slept_seconds']:.0f} s during a training"))
    return lines


def _fit(evidence: dict[str, Any]) -> list[Line]:
    settings, runs = evidence["settings"], [run for run in evidence["runs"] if run]
    if not (fit := settings.get("fit")) or not runs:
        return []
    peak, rate = max(run["peak_memory_mb"] for run in runs), max(run["tokens_per_second"] for run in runs)
    times = rate / fit["tokens_per_second"]
    lines = [
        Line(peak <= fit["memory_bound_mb"], f"peak {peak:,.0f} MB, limit of the fit {fit['memory_bound_mb']:,.0f} MB"),
        Line(1 / OUTGROWN <= times <= OUTGROWN, f"{rate:,.0f} tokens/s, {times:.2f} times what the fit measured"),
    ]
    if settings["preset"]["name"] == RULE_HOLDS_FOR and _whole(evidence, runs):
        predicted, best = fit["predicted_bpb"], min(run["val_bpb"] for run in runs)
        off = (best - predicted) / predicted
        text = f"val_bpb {best:.3f}, predicted {predicted:.3f} by the scaling rule ({100 * off:+.1f} %)"
        lines.append(Line(off <= PREDICTION, text))
    return lines


def _whole(evidence: dict[str, Any], runs: list[dict[str, Any]]) -> bool:
    """Whether the trainings used the whole budget; MINUTES= may have shortened them."""
    return runs[0]["training_seconds"] >= 0.99 * 60 * evidence["settings"]["preset"]["task"]["minutes"]


def _protection(evidence: dict[str, Any]) -> list[Line]:
    refused = sum(expected in evidence["cheats"].get(name, "") for name, (_, expected) in CHEATS.items())
    working = [one_line(kind) for kind, fault in evidence["sandbox"].items() if not fault]
    night = evidence["night"]
    return [
        Line(refused == len(CHEATS), f"{refused} of {len(CHEATS)} cheating models are refused for their cheat"),
        Line(bool(working), f"sandbox: {', '.join(working) or 'none works'}"),
        Line(night["experiments"] >= EXPERIMENTS, f"{night['experiments']} experiments of the night were judged"),
    ]


def row(evidence: dict[str, Any], name: str) -> str:
    """The row for the table in docs/COMPARISON.md."""
    machine, preset = evidence["machine"], evidence["settings"]["preset"]
    runs = [run for run in evidence["runs"] if run]
    cores = f", {machine['gpu_cores']} {CORES[machine['backend']]}" if machine["backend"] in CORES else ""
    memory = machine["gpu_memory_gb"] or machine["memory_gb"]
    best = max(runs, key=lambda run: run["tokens_per_second"], default=None)
    figures = (
        [", ".join(f"{run['val_bpb']:.4f}" for run in runs), f"{best['tokens_per_second']:,.0f}",
         f"{best['mfu_percent']:.0f} %", f"{best['peak_memory_mb']:,.0f}"] if best else ["", "", "", ""]
    )  # fmt: skip
    cells = [f"{machine['chip']}{cores}, {memory:.0f} GB", machine["backend"], f"{preset['name']}, {_minutes(runs)}"]
    cells += [*figures, evidence["commit"][:9] + "+" * bool(evidence["changed"]), name]
    return "| " + " | ".join(one_line(cell).replace("|", "/") for cell in cells) + " |"


def _minutes(runs: list[dict[str, Any]]) -> str:
    return f"{runs[0]['training_seconds'] / 60:.3g} min" if runs else "no training"
