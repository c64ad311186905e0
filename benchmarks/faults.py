"""The faults of benchmarks/torture.py: what is done, when, and how a command must end while it stays."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from checkout import git
from paused import Started
from stages import PRINTS, TRAINS, Data, Nights, Score, Stage, Train, Trainer, Whole

from lab.loop.journal import lock

SPACE = ("No space left", "disk is full")  # how a full disk is named

# ---- faults

Undo = Callable[[], Any] | None
Inject = Callable[[Any, Started | None, random.Random], Undo]


class Fault(NamedTuple):
    """`when`: "write" (before a random one), "rest" (nothing runs), "any" of both, or a word in the command line of the
    process that must run then. `then`: how the command ends while the fault stays: "" in any clean way, "works", or a
    refusal with one of these texts."""

    kind: str
    name: str
    stages: tuple[type[Stage], ...]
    when: str
    inject: Inject
    then: str | tuple[str, ...] = ""


def send(*numbers: int, seconds: float = 0.0) -> Inject:
    """Signals to the command, `seconds` apart."""

    def inject(stage: Stage, started: Started, draw: random.Random) -> None:
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(started.pid, number)
            time.sleep(seconds)

    return inject


def signals(word: str, *numbers: int) -> Inject:
    """Signals to the process of the command with this word."""

    def inject(stage: Stage, started: Started, draw: random.Random) -> None:
        time.sleep(draw.uniform(0, 0.05 if isinstance(stage, Nights) and not isinstance(stage, Whole) else 0.5))
        for number in numbers:
            with suppress(ProcessLookupError):
                if pid := started.child(word):
                    os.kill(pid, number)
            time.sleep(0.2)

    return inject


def fill(share: float) -> Inject:
    return lambda stage, started, draw: stage.disk.fill(int(draw.random() * share))


def read_only(stage: Stage, started: Started | None, draw: random.Random) -> Undo:
    return stage.disk.read_only()


def clock(seconds: float) -> Inject:
    """Files stay as new as they were."""

    def inject(stage: Stage, started: Started | None, draw: random.Random) -> Undo:
        stage.shift = seconds
        return lambda: setattr(stage, "shift", 0.0)

    return inject


def damage(find: Callable[[Any], Path], how: Callable[[bytes, random.Random], bytes | None]) -> Inject:
    """Change a file. It is restored afterwards, unless it was replaced."""

    def inject(stage: Stage, started: Started | None, draw: random.Random) -> Undo:
        path = find(stage)
        if not path.exists():
            return None
        before = path.read_bytes()
        after = how(before, draw)
        if after is None:
            path.unlink()
        else:
            with open(path, "r+b") as file:
                file.write(after)
                file.truncate()

        def undo() -> None:
            now = path.read_bytes() if path.exists() else None
            if now == after:
                path.write_bytes(before)
            elif now and after and len(after) == len(before) and now.startswith(after):
                path.write_bytes(before + now[len(after) :])

        return undo

    return inject


def flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit."""
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def lines_cut(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: draw.randrange(len(lines))])


def gone(content: bytes, draw: random.Random) -> None:
    return None


def emptied(content: bytes, draw: random.Random) -> bytes:
    return b""


def in_repository(*commands: str, back: tuple[str, ...] = ()) -> Inject:
    """What a user may do with git."""

    def inject(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
        for command in commands:
            git(stage.repo, *command.format(branch=stage.branch, worktree=stage.night / "worktree").split())
        return (lambda: git(stage.repo, *back)) if back else None

    return inject


def placed(*names: str) -> Inject:
    """Locks in the user's .git, as a git that was killed leaves them."""

    def inject(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
        paths = [stage.repo / ".git" / name for name in names]
        for path in paths:
            path.touch()
        return lambda: [path.unlink() for path in paths]

    return inject


def locks(stage: Nights, started: Started | None, draw: random.Random) -> None:
    for path in (
        stage.entry / "index.lock",
        stage.entry / "HEAD.lock",
        stage.repo / f".git/refs/heads/{stage.branch}.lock",
    ):
        path.touch()


def worktree_gone(stage: Nights, started: Started | None, draw: random.Random) -> None:
    shutil.rmtree(stage.night / "worktree", ignore_errors=True)


def worktree_pruned(stage: Nights, started: Started | None, draw: random.Random) -> None:
    (stage.night / "worktree" / ".git").unlink(missing_ok=True)
    git(stage.repo, "worktree", "prune")


def worktree_moved(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
    new = stage.disk.folder / "moved"
    git(stage.repo, "worktree", "move", stage.night / "worktree", new)
    return lambda: git(stage.repo, "worktree", "move", new, stage.night / "worktree")


def user_edits(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
    return stage.edit("# another edit of the user\n")


def worktree_edited(stage: Nights, started: Started | None, draw: random.Random) -> None:
    (stage.night / "worktree" / "train.py").write_text(f"edited = {draw.random()}\n")


def second(stage: Nights, started: Started | None, draw: random.Random) -> None:
    """Another loop of the same night, while the first has stopped."""
    ended = stage.start().wait()
    assert ended.status == 0 or (ended.clean and "is held by process" in ended.errors), ended


def held(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
    holder = lock(stage.night / "lock")
    holder.__enter__()
    return lambda: holder.__exit__(None, None, None)


def prints(stage: Nights, started: Started | None, draw: random.Random) -> Undo:
    """A gigabyte on the standard output of a training."""
    Trainer.code = PRINTS
    return lambda: setattr(Trainer, "code", TRAINS)


def prints_in_scoring(stage: Score, started: Started | None, draw: random.Random) -> Undo:
    source = stage.run / "train.py"
    before = source.read_text("utf-8")
    source.write_text(f"{before}\nfor _ in range(1024):\n    print('x' * (1 << 20))\n", "utf-8")
    return lambda: source.write_text(before, "utf-8")


def of_data(name: str) -> Callable[[Stage], Path]:
    return lambda stage: stage.prepared / name


def of_cache(stage: Stage) -> Path:
    return stage.cache / "current.json"


def of_run(name: str) -> Callable[[Train], Path]:
    return lambda stage: stage.run / name


def of_night(name: str) -> Callable[[Nights], Path]:
    return lambda stage: stage.night / name


def of_entry(name: str) -> Callable[[Nights], Path]:
    return lambda stage: stage.entry / name


def newest_result(stage: Nights) -> Path:
    return max((stage.night / "results").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)


def branch_file(stage: Nights) -> Path:
    return stage.repo / ".git/refs/heads" / stage.branch


ALL = (Data, Train, Score, Nights)
BACK = ("switch", "--quiet", "main")
GC = "gc --quiet --prune=now"
CHECKOUT = "checkout --quiet --ignore-other-worktrees {branch}"
YEAR = 365 * 86400.0
TRAINING = "checkpoint.safetensors"  # in the command line of a simulated training
SHARDS = ("train-00000.npy", "val.npy", "tokenizer.json")


def damages(stage: type[Stage], name: str, find: Callable[[Any], Path], hows: tuple, when: str = "rest",
            then: Any = "") -> list[Fault]:  # fmt: skip
    """One fault for each way to damage a file; the command must name it unless told otherwise."""
    then = then or (Path(name.split()[0]).name, "nothing is prepared")
    return [Fault("damage", f"{name}, {how.__name__}", (stage,), when, damage(find, how), then) for how in hows]


def of_user(name: str, inject: Inject, then: Any = "works", kind: str = "git") -> Fault:
    """What a user, a git or a crash of the machine does to repository and worktree, at any moment."""
    return Fault(kind, name, (Nights,), "any", inject, then)


def whole(kind: str, *numbers: int) -> list[Fault]:
    words = {"a real training": "train.py --run-dir", "the scorer": "prepare.py score"}
    words |= {"the scored model": "lab.scoring.model_server"}
    return [Fault(kind, name, (Whole,), word, signals(word, *numbers)) for name, word in words.items()]


ANY_WAY = (flipped, cut, gone)
TWICE = (signal.SIGINT, signal.SIGCONT, signal.SIGINT)

FAULTS = [
    Fault("kill", "the command", ALL, "write", send(signal.SIGKILL)),
    Fault("kill", "a training", (Nights,), TRAINING, signals(TRAINING, signal.SIGKILL)),
    Fault("kill", "the guard", (Nights,), "lab.trial.guard", signals("lab.trial.guard", signal.SIGKILL)),
    Fault("kill", "a real loop that trains", (Whole,), "train.py --run-dir", send(signal.SIGKILL)),
    Fault("kill", "a real loop that scores", (Whole,), "prepare.py score", send(signal.SIGKILL)),
    *whole("kill", signal.SIGKILL),
    Fault("stop", "the command", ALL, "write", send(signal.SIGSTOP, signal.SIGCONT, seconds=0.1)),
    Fault("stop", "a training", (Nights,), TRAINING, signals(TRAINING, signal.SIGSTOP, signal.SIGCONT)),
    *whole("stop", signal.SIGSTOP, signal.SIGCONT),
    Fault("signal", "Ctrl-C", ALL, "write", send(signal.SIGINT)),
    Fault("signal", "Ctrl-C twice", (Nights,), "write", send(*TWICE, seconds=0.02)),
    Fault("signal", "SIGTERM", (Nights,), "write", send(signal.SIGTERM)),
    Fault("signal", "SIGHUP", (Nights,), "write", send(signal.SIGHUP)),
    Fault("disk", "full", ALL, "write", fill(0), SPACE),
    Fault("disk", "nearly full", ALL, "write", fill(64 << 10)),
    Fault("disk", "read-only", ALL, "write", read_only, ("Read-only file system",)),
    Fault("clock", "a year back", (Nights, Train), "rest", clock(-YEAR), "works"),
    Fault("clock", "ten years on", (Nights, Data), "rest", clock(10 * YEAR), "works"),
    *[fault for name in (*SHARDS, "manifest.json", "shards.jsonl")
      for fault in damages(Data, name, of_data(name), ANY_WAY, then="works")],
    *damages(Data, "current.json", of_cache, ANY_WAY, then="works"),
    *[fault for name in ("train-00000.npy", "tokenizer.json", "manifest.json")
      for fault in damages(Train, name, of_data(name), ANY_WAY)],
    *damages(Train, "current.json", of_cache, ANY_WAY),
    *[fault for name in ("val.npy", "tokenizer.json", "manifest.json")
      for fault in damages(Score, name, of_data(name), ANY_WAY)],
    *[fault for name in ("checkpoint.safetensors", "settings.json")
      for fault in damages(Score, f"{name} of a run", of_run(name), ANY_WAY)],
    *damages(Nights, "journal.jsonl", of_night("journal.jsonl"), (flipped, gone), "any"),
    Fault("damage", "journal.jsonl, cut", (Nights,), "any", damage(of_night("journal.jsonl"), cut)),
    Fault("damage", "journal.jsonl, lines cut", (Nights,), "any", damage(of_night("journal.jsonl"), lines_cut)),
    *damages(Nights, "settings.json", of_night("settings.json"), (flipped, cut), "any"),
    *damages(Nights, "manifest.json", of_data("manifest.json"), (flipped, cut), "any"),
    *damages(Nights, "results.tsv", of_night("results.tsv"), ANY_WAY, "any", "works"),
    *damages(Nights, "a recorded result", newest_result, (flipped, cut), then="works"),
    *[fault for name in ("HEAD", "index", "gitdir", "commondir")
      for fault in damages(Nights, f"{name} of the worktree", of_entry(name), (emptied, cut, flipped), "any", "works")],
    *damages(Nights, "file of the branch", branch_file, (emptied, gone), "any", "works"),
    *damages(Nights, "worktree/.git", of_night("worktree/.git"), (emptied, flipped, gone), "any", "works"),
    of_user("index.lock of the user", placed("index.lock")),
    of_user("packed-refs.lock", placed("packed-refs.lock"), ""),
    of_user("locks of the night", locks),
    of_user("a detached HEAD", in_repository("checkout --quiet --detach", back=BACK)),
    of_user("another branch", in_repository("switch --quiet mine", back=BACK)),
    of_user("an edit in the checkout", user_edits),
    of_user("the branch deleted", in_repository("update-ref -d refs/heads/{branch}")),
    of_user("the branch moved", in_repository("update-ref refs/heads/{branch} main")),
    of_user("the branch checked out", in_repository("stash --quiet", CHECKOUT, back=BACK), ("is checked out in",)),
    of_user("gc", in_repository(GC)),
    of_user("reflogs expired, gc", in_repository("reflog expire --expire=now --all", GC)),
    of_user("deleted", worktree_gone, kind="worktree"),
    of_user("removed with git", in_repository("worktree remove --force {worktree}"), kind="worktree"),
    of_user("pruned", worktree_pruned, kind="worktree"),
    of_user("moved", worktree_moved, ("is checked out in",), kind="worktree"),
    of_user("edited", worktree_edited, kind="worktree"),
    Fault("two loops", "at a write", (Nights,), "write", second),
    Fault("two loops", "lock held", (Nights,), "rest", held, ("is held by process",)),
    Fault("a gigabyte", "from a training", (Nights,), "rest", prints, "works"),
    Fault("a gigabyte", "while scoring", (Score,), "rest", prints_in_scoring),
]  # fmt: skip
