"""The loop as a user runs it: real git, real sandbox, real training of a tiny model, killed at any moment."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from checkout import MINUTES, Checkout, attempt, run_loop

from lab.loop.journal import HEADER, lock, read
from lab.trial.sandbox import available

pytestmark = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("loop"))


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


def test_the_settings_of_a_run_name_its_seed(finished):
    checkout, _ = finished
    seeds = {}
    for run in (checkout.folder / "nights/plain/runs").glob("e*"):
        settings, record = (json.loads((run / name).read_text()) for name in ("settings.json", "train.json"))
        assert settings["seed"] == record["seed"], run.name
        seeds[run.name] = settings["seed"]
    assert len(set(seeds.values())) > 1, seeds


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


def test_trying_nothing_is_refused(finished):
    checkout, _ = finished
    done = attempt(checkout, "plain", lambda source: source)
    assert done.returncode == 1
    assert "is unchanged; edit it" in done.stderr


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
    with lock(checkout.folder / "nights/plain/lock"):
        done = run_loop(checkout, "plain", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_what_a_night_kept_can_be_sampled_and_exported(finished):
    checkout, _ = finished
    best = checkout.night("plain").state.incumbent
    text = checkout.python("prepare.py", "sample", "--tag", "plain", "--prompt", "The dog", "--tokens", 5).stdout
    assert text.startswith("The dog")
    checkout.python("prepare.py", "sample", "--tag", "plain", "--export", checkout.folder.parent / "best")
    config = json.loads((checkout.folder.parent / "best/config.json").read_text())
    assert config["val_bpb"] == best.values[0]


def test_cleaning_takes_checkpoints_of_what_was_not_kept_and_nothing_else(finished):
    checkout, _ = finished
    night = checkout.folder / "nights/plain"
    kept = {f"e{e.id:04d}" for e in checkout.night("plain").state.experiments if e.status == "keep"}

    def whole() -> set[str]:
        return {path.parent.name for path in (night / "runs").glob("*/checkpoint.safetensors")}

    before, records = whole(), sorted((night / "runs").glob("*/train.py"))
    listed = checkout.python("prepare.py", "clean", "--runs").stdout
    assert {line.split()[2] for line in listed.splitlines()} == {f"nights/plain/runs/{name}" for name in before}
    assert "  (kept: experiment 0 was kept)" in listed
    with lock(night / "lock"):
        told = checkout.python("prepare.py", "clean", "--runs", "--yes").stdout
    assert told.count("(kept: the night is running)") == len(before)
    assert told.endswith("removed 0, 0.0 MB\n")
    refused = checkout.python("prepare.py", "clean", "--runs", "nights/plain/runs/e0000-r1", check=False)
    assert (refused.returncode, refused.stderr) == (
        1, "error: nights/plain/runs/e0000-r1 is kept (experiment 0 was kept); nothing was removed\n"
    )  # fmt: skip
    assert whole() == before
    checkout.python("prepare.py", "clean", "--runs", "--yes")
    assert whole() == {name for name in before if name.startswith(tuple(kept)) or name.startswith("replay-0-")}
    assert "preflight" in before - whole()
    assert sorted((night / "runs").glob("*/train.py")) == records
    assert "2 experiments" in checkout.python("agent_loop.py", "status", "--tag", "plain").stdout
    assert "report.html" in checkout.python("agent_loop.py", "report", "--tag", "plain", "--no-stories").stdout


def test_killed_at_random_moments_nothing_is_lost_or_doubled(checkout):
    draw = random.Random(int(os.environ.get("KILL_SEED", "5")))
    command = checkout.command(
        "agent_loop.py", "run", "--agent", "search", "--tag", "kills", "--minutes", MINUTES, "--max-experiments", 1
    )
    for _ in range(3):
        loop = subprocess.Popen(
            command, **checkout.where(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(1, 9))
        victims = [loop.pid] + [int(p) for p in children(loop.pid)]
        os.kill(draw.choice(victims), signal.SIGKILL)
        time.sleep(0.3)
        if loop.poll() is None:
            os.kill(loop.pid, signal.SIGKILL)
        loop.wait()
    run_loop(checkout, "kills", "--max-experiments", 0, "--rigor", "none")
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
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return own + [c for child in own for c in children(int(child))]


def test_several_processes_train_as_one_inside_the_sandbox(tmp_path):
    checkout = Checkout(tmp_path)
    current = checkout.cache / "current.json"
    record = json.loads(current.read_text())
    record["preset"]["batch"] |= {"rows": 2, "processes": 2}
    current.write_text(json.dumps(record))
    run_loop(checkout, "pair", "--max-experiments", 1, "--rigor", "none")
    runs = [r for r in read(checkout.night("pair").path) if r["event"] == "run"]
    assert [r["status"] for r in runs] == ["ok", "ok"]
    facts = json.loads((checkout.folder / "nights/pair/runs/e0000-r1/result.json").read_text())
    assert facts["processes"] == (2 if available() == "bubblewrap" else 1)
