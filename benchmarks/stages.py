"""What benchmarks/torture.py puts faults into: how each command is started, and what must be true afterwards."""

import hashlib
import json
import os
import random
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkout import Checkout, git
from conftest import ROOT, documents, write_jsonl
from paused import SECONDS, Disk, Started, jump

import agent_loop
from lab.data.shards import open_prepared
from lab.files import sealed, sha256
from lab.loop import session
from lab.loop.journal import Journal, read
from lab.machine.condition import Condition
from lab.training.run import guarded
from lab.trial import guard
from lab.trial.guard import Limits
from lab.trial.runner import Runner
from lab.trial.sandbox import Policy

if TYPE_CHECKING:
    from faults import Fault

EVENTS = 60  # in the journal of a night, before the next one is started

# ---- what is tortured: how it is started, and what must be true afterwards


def digests(paths: Iterator[Path]) -> dict[str, str]:
    return {str(path): sha256(path) for path in paths if path.is_file() and not path.is_symlink()}


@dataclass
class Stage:
    """A command that runs on `disk`. `writes`: how many writes it had when nothing disturbed it."""

    folder: Path
    disk: Disk
    data: "Data | None" = None  # prepared data to copy
    writes: int = 1
    lost: int = 0
    late: bool = False
    shift: float = 0.0  # of the clock, seconds

    def __post_init__(self) -> None:
        """Set up, with one run that succeeds."""

    def possible(self, fault: "Fault") -> bool:
        return self.disk.real or fault.kind != "disk"

    def start(self, stop_at: int = 0, command: Callable[[], None] | None = None) -> Started:
        def function() -> None:
            os.environ["AUTORESEARCH_CACHE"] = str(self.cache)
            os.chdir(ROOT)
            if self.shift:
                jump(self.shift)
            (command or self.command)()

        return Started(function, self.folder, stop_at)

    def must_work(self, command: Callable[[], None] | None = None) -> None:
        ended = self.start(command=command).wait()
        assert ended.status == 0, ended

    def script(self, *arguments: object) -> None:
        sys.argv = [str(argument) for argument in arguments]
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")

    @property
    def cache(self) -> Path:
        return self.disk.folder / "cache"

    @property
    def prepared(self) -> Path:
        return Path(json.loads((self.cache / "current.json").read_text("utf-8"))["prepared"])

    def begin(self, fault: "Fault", draw: random.Random) -> None:
        """Prepare for the next trial, and remember what must not be lost."""

    def theirs(self) -> Any:
        """What belongs to the user and must not change."""

    def command(self) -> None:
        raise NotImplementedError

    def broken(self) -> Iterator[str]:
        raise NotImplementedError


class Data(Stage):
    """`make prepare`, from nothing or from complete data."""

    def __post_init__(self) -> None:
        self.text = write_jsonl(self.folder / "text.jsonl", documents(300))
        self.must_work()
        self.reference = self.folder / "reference"
        shutil.copytree(self.cache, self.reference)
        self.expected = self.contents()

    def begin(self, fault: "Fault", draw: random.Random) -> None:
        shutil.rmtree(self.cache)
        if fault.when != "write" or draw.random() < 0.5:
            shutil.copytree(self.reference, self.cache)
        if fault.name.startswith("shards.jsonl"):  # read to resume only
            (self.prepared / "manifest.json").unlink()

    def theirs(self) -> str:
        return sha256(self.text)

    def command(self) -> None:
        self.script("prepare.py", "-q", "--no-fit", "--preset", "offline", "--vocab", "256", "--seq", "64",
                    "--files", self.text)  # fmt: skip

    def contents(self) -> dict[str, str]:
        unordered = ("shards.jsonl", ".lock")  # the first is complete, but in no fixed order
        return digests(path for path in self.cache.rglob("*") if path.name not in unordered)

    def copy_to(self, cache: Path) -> None:
        """The prepared data, for the smallest of models."""
        shutil.copytree(self.reference, cache)
        record = json.loads((cache / "current.json").read_text("utf-8").replace(str(self.cache), str(cache)))
        del record["check"]
        record["preset"]["model"] |= {"depth": 1, "width": 32, "head_dim": 32}
        record["preset"]["batch"] |= {"rows": 2, "tokens_per_step": 128, "processes": 1}
        (cache / "current.json").write_text(json.dumps(sealed(record)), "utf-8")

    def broken(self) -> Iterator[str]:
        found = self.contents()
        for path in sorted(found.keys() ^ self.expected.keys()):
            yield f"{path} is {'missing' if path in self.expected else 'left behind'}"
        for path in sorted(found.keys() & self.expected.keys()):
            if found[path] != self.expected[path]:
                self.lost += 1
                yield f"{path} has changed"


class Train(Stage):
    """`train.py` of a tiny model for two steps, without its score."""

    checkpoint = "checkpoint.safetensors"

    def __post_init__(self) -> None:
        self.run, self.earlier = self.disk.folder / "run", self.disk.folder / "earlier"
        self.data.copy_to(self.cache)
        self.must_work(self.train)
        self.names = {path.name for path in self.run.iterdir()}
        shutil.move(self.run, self.earlier)

    def begin(self, fault: "Fault", draw: random.Random) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def theirs(self) -> dict[str, str]:
        return digests(self.earlier.rglob("*"))

    def command(self) -> None:
        self.train()

    def train(self) -> None:
        self.script("train.py", "-q", "--steps", "2", "--no-score", "--run-dir", self.run)

    def broken(self) -> Iterator[str]:
        if [name for name in (self.checkpoint, "train.json") if not (self.run / name).is_file()]:
            yield "the run has no checkpoint or record"
        elif (self.run / self.checkpoint).stat().st_size != (self.earlier / self.checkpoint).stat().st_size:
            yield "the checkpoint is not whole"
        yield from (f"{name} is left behind" for name in {path.name for path in self.run.iterdir()} - self.names)
        if open_prepared(self.prepared).damaged():
            yield "prepared data has changed"


class Score(Train):
    """`prepare.py score` of a finished run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shutil.copytree(self.earlier, self.run)
        self.must_work()
        self.expected, self.names = self.value(), {path.name for path in self.run.iterdir()}

    def begin(self, fault: "Fault", draw: random.Random) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.earlier, self.run)

    def command(self) -> None:
        self.script("prepare.py", "score", self.run, "--sandbox", "none")

    def value(self) -> float:
        return json.loads((self.run / "result.json").read_text("utf-8"))["val_bpb"]

    def broken(self) -> Iterator[str]:
        yield from super().broken()
        if abs(self.value() - self.expected) > 1e-6:
            yield f"val_bpb is {self.value()}, not {self.expected}"
        if size := [path for path in self.run.rglob("*") if path.is_file() and path.stat().st_size > 64 << 20]:
            yield f"{size[0]} takes {size[0].stat().st_size >> 20} MB"


TRAINS = """
import os, sys, time
with open("checkpoint.safetensors", "wb") as file:
    file.write(os.urandom(100_000))
print("begun", flush=True)
time.sleep(0.05)
"""
PRINTS = """
for _ in range(1024):
    print("x" * (1 << 20))
"""


class Trainer(Runner):
    """Trains nothing, but in a process that the guard watches."""

    code = TRAINS

    def preflight(self, source: str) -> str:
        self.check_data()
        self.preflight_seconds = 1.0
        return ""

    def _condition(self) -> Condition:
        return Condition(flops=1e11, slept=0.0)

    def _train(self, run_dir: Path, source: str, seed: int, seconds: float, *flags: str) -> guard.Outcome:
        self.free = shutil.disk_usage(run_dir).free
        command = [sys.executable, "-S", "-c", self.code]
        return guard.run(command, run_dir, Policy((run_dir,)), Limits(SECONDS, 1 << 30), sandbox="none")

    def _score(self, run_dir: Path, source: str, seed: int, *more: Any) -> dict[str, Any]:
        better, noise = (random.Random(text).random() for text in (source, f"{source} {seed}"))
        return {"status": "ok", "val_bpb": 1.0 - 0.01 * better + 0.001 * noise}


class Nights(Stage):
    """`agent_loop.py run` for one experiment, in a repository with the user's own branches, worktree and edits."""

    flags = ("--agent", "search", "--rigor", "none", "--max-experiments", "1")

    def __post_init__(self) -> None:
        self.repo, self.number, self.recorded = self.disk.folder / "repo", 0, []
        self.clone()
        if not self.cache.exists():
            self.data.copy_to(self.cache)
        git(self.repo, "branch", "mine")
        git(self.repo, "worktree", "add", "--quiet", "-b", "theirs", self.disk.folder / "theirs")
        (self.repo / "notes.txt").write_text("not committed\n")
        (self.repo / "staged.txt").write_text("staged\n")
        git(self.repo, "add", "staged.txt")
        self.edit("# an edit of the user\n")
        self.next()

    def clone(self) -> None:
        self.repo.mkdir()
        shutil.copy(ROOT / "train.py", self.repo)
        (self.repo / ".gitignore").write_text("nights/\n")
        git(self.repo, "init", "--quiet", "-b", "main")
        git(self.repo, "add", "-A")
        git(self.repo, "commit", "--quiet", "-m", "start")

    def edit(self, text: str) -> Callable[[], None]:
        path, before = self.repo / "train.py", (self.repo / "train.py").read_text("utf-8")
        path.write_text(before + text, "utf-8")
        return lambda: path.write_text(before, "utf-8")

    def next(self) -> None:
        self.number += 1
        self.tag = f"n{self.number}"
        self.night = self.repo / "nights" / self.tag
        self.branch = f"autoresearch/{self.tag}"

    def begin(self, fault: "Fault", draw: random.Random) -> None:
        self.shortened = fault.name.endswith("cut") and "journal" in fault.name
        if len(self.recorded) > EVENTS:
            self.next()
        self.remember()
        if fault.when != "write" and not self.recorded:
            self.must_work()
            self.remember()

    def command(self) -> None:
        session.ROOT = self.repo
        session.NIGHTS = self.repo / "nights"
        session.Runner, session.chosen_sandbox = Trainer, lambda wanted: "none"
        sys.argv = ["agent_loop.py", "run", "--tag", self.tag, *self.flags]
        guarded(agent_loop.command)

    @property
    def entry(self) -> Path:
        """The night's folder in .git/worktrees."""
        return Path(git(self.night / "worktree", "rev-parse", "--absolute-git-dir"))

    @property
    def journal(self) -> Path:
        return self.night / "journal.jsonl"

    def lines(self) -> list[bytes]:
        return self.journal.read_bytes().splitlines(keepends=True) if self.journal.exists() else []

    def remember(self) -> None:
        self.recorded = [line for line in self.lines() if line.endswith(b"\n")]

    def theirs(self) -> Any:
        refs = git(self.repo, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
        refs = [ref for ref in refs if not ref.startswith("refs/heads/autoresearch/")]
        own = [self.repo / ".git" / name for name in ("HEAD", "index", "index.lock", "config", "packed-refs.lock")]
        files = [path for path in self.repo.iterdir() if path.name not in (".git", "nights")]
        return refs, digests(iter(own + files)), digests((self.disk.folder / "theirs").glob("*"))

    def broken(self) -> Iterator[str]:
        journal, records = Journal(self.night), list(read(self.journal))
        runs = {record["run"]: record for record in records if record["event"] == "run"}
        if len(runs) != sum(record["event"] == "run" for record in records):
            yield "a run is recorded twice"
        before = [json.loads(line) for line in self.recorded]
        lost = [
            r["run"] for r in before if r["event"] == "run" and runs.get(r["run"], {}).get("val_bpb") != r["val_bpb"]
        ]
        self.lost += len(lost)
        if lost:
            yield f"results are lost: {lost}"
        elif self.lines()[: len(before)] != self.recorded and not self.shortened:  # events that lead to no run may go
            yield "recorded events are missing or have changed"
        for name, run in runs.items():
            kept = json.loads((self.night / "results" / f"{name}.json").read_text("utf-8"))
            if kept["val_bpb"] != run["val_bpb"]:
                yield f"the result of {name} has changed"
        yield from self._unlike(journal)
        yield from (f"{path} is left behind" for path in self.night.rglob(".*.tmp"))

    def _unlike(self, journal: Journal) -> Iterator[str]:
        """Whatever does not follow from the journal."""
        copy = self.folder / "copy"
        copy.mkdir(exist_ok=True)
        shutil.copy(journal.path, copy)
        Journal(copy).write_results()
        if (copy / "results.tsv").read_bytes() != (self.night / "results.tsv").read_bytes():
            yield "results.tsv is not what the journal says"
        worktree, head = self.night / "worktree", journal.state.head()
        if journal.state.pending or head != journal.state.incumbent.commit:
            yield "an experiment is pending"
        if {git(self.repo, "rev-parse", f"refs/heads/{self.branch}"), git(worktree, "rev-parse", "HEAD")} != {head}:
            yield "the branch is not on the incumbent's commit"
        source = (worktree / "train.py").read_bytes()
        proposed = [r["source"] for r in read(journal.path) if r["event"] == "proposal" and r["commit"] == head]
        if hashlib.sha256(source).hexdigest() != proposed[-1] or git(worktree, "status", "--porcelain"):
            yield "the worktree does not have the incumbent's source"


class Whole(Nights):
    """A night as a user runs it, with real training in the sandbox."""

    flags = (*Nights.flags, "--minutes", "0.02")

    def clone(self) -> None:
        self.checkout = Checkout(self.folder)
        self.repo = self.checkout.folder

    @property
    def cache(self) -> Path:
        return self.checkout.cache

    def command(self) -> None:
        os.chdir(self.repo)
        os.execv(sys.executable, [sys.executable, "agent_loop.py", "run", "--tag", self.tag, *self.flags])
