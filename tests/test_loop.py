"""The loop as a user runs it: real git, real sandbox, real training of a tiny model, killed and cheated."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, documents, environment, write_jsonl

from lab.journal import HEADER, Journal, read
from lab.sandbox import available

MINUTES = "0.03"
pytestmark = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")


class Checkout:
    """A git repository with the project's files, as a user's clone, and a tiny model prepared."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder / "repo", folder / "cache"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        self.git("init", "--quiet", "-b", "main")
        self.git("add", "-A")
        self.git("-c", "user.name=u", "-c", "user.email=u@localhost", "commit", "--quiet", "-m", "start")
        text = write_jsonl(folder / "text.jsonl", documents(400))
        self.python("prepare.py", "--preset", "offline", "--vocab", "256", "--seq", "64", "--files", text)
        current = self.cache / "current.json"
        record = json.loads(current.read_text())
        record["preset"]["model"] |= {"depth": 2, "width": 64, "head_dim": 32}
        record["preset"]["batch"] |= {"rows": 4, "tokens_per_step": 256}
        current.write_text(json.dumps(record))

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def python(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(self.command(*arguments), **self.where(), capture_output=True, text=True, timeout=240)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def where(self) -> dict:
        return {"cwd": self.folder, "env": environment(self.cache)}

    def night(self, tag: str) -> Journal:
        return Journal(self.folder / "nights" / tag)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("loop"))


def run_loop(checkout: Checkout, tag: str, *flags: object, check: bool = True) -> subprocess.CompletedProcess:
    return checkout.python(
        "agent_loop.py", "run", "--agent", "search", "--tag", tag, "--minutes", MINUTES, *flags, check=check
    )


@pytest.fixture(scope="module")
def finished(checkout):
    """A night of a baseline and two experiments."""
    done = run_loop(checkout, "plain", "--max-experiments", 2)
    return checkout, done


def test_a_night_runs_judges_and_sums_up(finished):
    checkout, done = finished
    journal = checkout.night("plain")
    assert [e.status != "pending" for e in journal.state.experiments] == [True] * 3
    assert len(journal.state.experiments[0].values) >= 2  # the baseline with two seeds
    assert "2 experiments" in done.stdout
    rows = (checkout.folder / "nights/plain/results.tsv").read_text()
    assert rows.startswith(HEADER)
    assert len(rows.splitlines()) == 4
    assert rows.splitlines()[1].split("\t")[3:] == ["keep", "baseline"]


def test_the_users_checkout_is_untouched(finished):
    checkout, _ = finished
    assert checkout.git("status", "--porcelain") == ""
    assert checkout.git("rev-parse", "--abbrev-ref", "HEAD") == "main"
    assert checkout.git("log", "--oneline", "main").count("\n") == 0


def test_branch_and_journal_agree(finished):
    checkout, _ = finished
    journal = checkout.night("plain")
    assert checkout.git("rev-parse", "autoresearch/plain") == journal.state.head()
    names = checkout.git("diff", "--name-only", "main", "autoresearch/plain").split()
    assert set(names) <= {"train.py"}


def test_the_experiment_could_not_read_the_validation_text(finished):
    checkout, _ = finished
    settings = json.loads((checkout.folder / "nights/plain/settings.json").read_text())
    val = (Path(settings["prepared"]) / "val.npy").as_posix()
    peek = f"    getattr(__builtins__, 'op' + 'en')({val!r}, 'rb').read(1)[0]\n"
    assert "nothing is changed" in attempt(checkout, "plain", lambda s: s).stderr
    done = attempt(
        checkout, "plain", lambda s: s.replace("def main(run) -> nn.Module:\n", "def main(run) -> nn.Module:\n" + peek)
    )
    assert "refused" in done.stdout + done.stderr
    assert not any(e.status == "keep" and e.id for e in checkout.night("plain").state.experiments[3:])


def test_status_and_replay(finished):
    checkout, _ = finished
    assert "2 experiments" in checkout.python("agent_loop.py", "status", "--tag", "plain").stdout
    done = checkout.python("agent_loop.py", "replay", "--tag", "plain", 0)
    assert "experiment 0: baseline" in done.stdout
    assert "(ok)" in done.stdout


def test_a_resumed_night_may_not_change_its_task(finished):
    checkout, _ = finished
    done = checkout.python("agent_loop.py", "run", "--tag", "plain", "--agent", "search", "--minutes", 1, check=False)
    assert done.returncode == 1
    assert "choose another --tag" in done.stderr.splitlines()[-1]


def test_two_loops_of_one_tag_are_refused(finished):
    checkout, _ = finished
    from lab.journal import lock

    with lock(checkout.folder / "nights/plain/lock"):
        done = run_loop(checkout, "plain", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


# --- cheats, each through the whole step of `try`


def attempt(checkout: Checkout, tag: str, change) -> subprocess.CompletedProcess:
    """`try` with a changed train.py in the night's worktree."""
    path = checkout.folder / "nights" / tag / "worktree" / "train.py"
    path.write_text(change(path.read_text()))
    return checkout.python("agent_loop.py", "try", "--tag", tag, "-m", "cheat", check=False)


def in_main(code: str):
    """Run `code` before training, in the real run and in the preflight."""
    head = '    """Train for as long as the run\'s clock allows and return the model."""\n'
    return lambda s: s.replace(head, head + "".join(f"    {line}\n" for line in code.splitlines()))


def in_loop(code: str):
    """Run `code` in the training loop after the preflight's two steps."""
    at = "        rate, decay = schedule(run.clock.progress)\n"
    indented = "".join(f"            {line}\n" for line in code.splitlines())
    return lambda s: s.replace(at, f"        if number == 4:\n{indented}" + at)


BUILTIN = "vars(__import__('mlx.core').core) and "
OPEN = "__builtins__.__dict__['op' 'en'] if hasattr(__builtins__, '__dict__') else __builtins__['op' 'en']"
CHEATS = {
    "prints a number": (in_main("print('---\\nval_bpb:          0.100000', flush=True)"), ("keep", "discard")),
    "non-causal": (
        lambda s: s.replace('mask = window_mask(T, max(1, T // 2)) if self.short else "causal"', "mask = None"),
        ("refused",),
    ),
    "sets the seed": (in_main("mx.random.seed(3)"), ("refused",)),
    "opens a socket": (in_main("import socket"), ("refused",)),
    "reads the environment": (in_main("import os; os.environ['X'] = '1'"), ("refused",)),
    "touches the laboratory": (in_main("import lab.score"), ("refused",)),
    "writes outside": (in_main(f"({OPEN})('../../worktree/lab/score.py', 'a').write('x')"), ("refused",)),
    "hangs silently": (in_loop("while True: pass"), ("crash",)),
    "ignores the budget": (in_loop("run.clock.budget = 1e9"), ("crash",)),
    "prints a lot": (in_loop("for _ in range(400): print('x' * 10**6)"), ("crash",)),
    "freezes the clock": (
        in_loop("import time; time.perf_counter = lambda t=time.perf_counter(): t"),
        ("crash", "refused"),
    ),
    "forges its result": (
        in_loop(
            "import json\n"
            f"for name in ('score', 'result'): ({OPEN})(str(run.directory / (name + '.json')), 'w')"
            ".write(json.dumps({'status': 'ok', 'val_bpb': 0.1}))"
        ),
        ("keep", "discard"),
    ),
}


@pytest.fixture(scope="module")
def cheated(checkout):
    """A night with a baseline only."""
    run_loop(checkout, "cheats", "--max-experiments", 0)
    return checkout


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_gets_nothing(cheated, cheat):
    change, allowed = CHEATS[cheat]
    worktree = cheated.folder / "nights/cheats/worktree"
    cheated_source = change((worktree / "train.py").read_text())
    assert cheated_source != (worktree / "train.py").read_text(), "the cheat changes nothing"
    before = len(cheated.night("cheats").state.experiments)
    done = attempt(cheated, "cheats", change)
    state = cheated.night("cheats").state
    ended = state.experiments[-1].status if len(state.experiments) > before else "refused"
    assert ended in allowed, done.stdout + done.stderr
    values = [value for e in state.experiments for value in e.values]
    assert min(values) > 1.0  # no forged number was ever taken
    checkout_lab = (ROOT / "lab" / "score.py").read_text()
    assert (worktree / "lab" / "score.py").read_text() == checkout_lab
    shutil.copy(cheated.folder / "train.py", worktree / "train.py")  # a refused edit stays there to be mended


# --- kills


def test_killed_at_random_moments_nothing_is_lost_or_doubled(checkout):
    draw = random.Random(int(os.environ.get("KILL_SEED", "5")))
    command = checkout.command(
        "agent_loop.py", "run", "--agent", "search", "--tag", "kills", "--minutes", MINUTES, "--max-experiments", 1
    )
    for _ in range(4):
        loop = subprocess.Popen(
            command, **checkout.where(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(1, 14))
        victims = [loop.pid] + [int(p) for p in children(loop.pid)]
        os.kill(draw.choice(victims), signal.SIGKILL)
        time.sleep(0.3)
        if loop.poll() is None:
            os.kill(loop.pid, signal.SIGKILL)
        loop.wait()
    run_loop(checkout, "kills", "--max-experiments", 0)
    journal = checkout.night("kills")
    records = list(read(journal.path))
    assert [r["n"] for r in records] == list(range(1, len(records) + 1))
    runs = [r["run"] for r in records if r["event"] == "run"]
    assert len(runs) == len(set(runs))
    assert journal.state.pending is None
    assert checkout.git("rev-parse", "autoresearch/kills") == journal.state.head()
    assert checkout.git("status", "--porcelain") == ""
    rows = (checkout.folder / "nights/kills/results.tsv").read_text().splitlines()
    assert len(rows) == 1 + len(journal.state.experiments)


def children(pid: int) -> list[str]:
    """Descendants of a process (Linux)."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return own + [c for child in own for c in children(int(child))]
