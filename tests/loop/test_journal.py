"""The journal: what survives a kill, what is refused, what the state costs, and results.tsv to the byte."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from lab.errors import UserError
from lab.loop.history import CLOSING, FIELDS, State
from lab.loop.journal import Journal, lock, read
from lab.loop.verdict import BASELINE_RUNS, CONTROLS, FRESH, SLOPE

WRITER = Path(__file__).parents[1] / "night_writer.py"
ROOT = WRITER.parents[1]


def _propose(journal, commit="c" * 40, hypothesis="an idea", fingerprint="", nodes=9):
    number = len(journal.state.experiments)
    given = {"commit": commit, "source": "", "fingerprint": fingerprint or f"f{number}", "nodes": nodes}
    journal.record("proposal", id=number, agent="search", hypothesis=hypothesis, **given)


def _run(journal, value=None, status="ok", memory=1.0, **more):
    """The next run, after the verdict that asks for it."""
    if journal.state.step().action == "judge":
        assert _judge(journal).verdict == "again"
    step = journal.state.step()
    measured = {"memory_gb": memory, "minutes": 5.0, "reason": "ValueError: no" if status == "crash" else ""} | more
    journal.record(
        "run", id=step.id, who=step.who, run=step.run, seed=step.seed, status=status, val_bpb=value, **measured
    )


def _judge(journal, rigor="none"):
    found = journal.state.judge(rigor)
    journal.record("verdict", id=journal.state.step().id, **vars(found))
    return found


def _settle(journal):
    step = journal.state.step()
    event = {status: event for event, status in CLOSING.items()}[step.verdict]
    journal.record(event, id=step.id, reason="")


def _experiment(journal, value, rigor="none", **proposal):
    _propose(journal, **proposal)
    _run(journal, value, "ok" if value else "crash")
    if value:
        _judge(journal, rigor)
    _settle(journal)


def _started(folder):
    journal = Journal(folder)
    journal.record("start", tag="t", commit="b" * 40)
    journal.gain = 0.0  # of the incumbent, for `_judged`
    return journal


def _same(one: State, other: State):
    assert vars(one) == vars(other)


def test_reading_folds_to_the_same_state_as_writing(tmp_path):
    journal = _started(tmp_path)
    for value in (1.0, 0.9, None, 1.1):
        _experiment(journal, value)
        _same(Journal(tmp_path).state, journal.state)
    journal.record("refused", agent="ollama", hypothesis="again", fingerprint="f1", reason="duplicate of 1")
    journal.record("note", text="hot")
    _same(Journal(tmp_path).state, journal.state)
    assert [record["n"] for record in read(journal.path)] == list(range(1, journal.state.n + 1))


def test_results_tsv_is_upstreams_to_the_byte(tmp_path):
    journal = _started(tmp_path)
    _experiment(journal, 0.9979, commit="a1b2c3d4" + "0" * 32, hypothesis="baseline")
    _experiment(journal, 0.99321, commit="b2c3d4e5" + "0" * 32, hypothesis="increase LR\tto\n0.04")
    _experiment(journal, 1.005, commit="c3d4e5f6" + "0" * 32, hypothesis="switch to GeLU")
    _experiment(journal, None, commit="d4e5f6a7" + "0" * 32, hypothesis="double width (OOM) ±")
    _propose(journal)  # under way: no row yet
    journal.write_results()
    assert (tmp_path / "results.tsv").read_bytes() == (
        b"commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
        b"a1b2c3d\t0.997900\t1.0\tkeep\tbaseline\n"
        b"b2c3d4e\t0.993210\t1.0\tkeep\tincrease LR to 0.04\n"
        b"c3d4e5f\t1.005000\t1.0\tdiscard\tswitch to GeLU\n"
        + "d4e5f6a\t0.000000\t0.0\tcrash\tdouble width (OOM) ±\n".encode()
    )


def _judged(journal, gain, pace=None):
    """One experiment by the full rule, `gain` better than what seeds alone give; the events of its runs."""
    if not journal.state.pending:
        _propose(journal)
    began = journal.state.n
    while (step := journal.state.step()).action != "settle":
        if step.action == "judge":
            _judge(journal, "full")
        else:
            own = gain if step.who == "candidate" else journal.gain
            _run(journal, 1 + 0.007 * math.sin(5 * step.seed) - own, pace=pace)
    journal.gain = gain if step.verdict == "keep" else journal.gain
    _settle(journal)
    return [record for record in read(journal.path) if record["event"] == "run" and record["n"] > began]


def test_a_kept_change_brings_its_runs_along_and_runs_with_new_seeds_before_the_next(tmp_path):
    journal = _started(tmp_path)
    assert [r["seed"] for r in _judged(journal, 0.0)] == list(range(1, BASELINE_RUNS + 1))
    runs = _judged(journal, 0.0025)
    best = journal.state.incumbent
    assert (best.id, best.status, best.selected) == (1, "keep", len(best.results))
    assert [run.seed for run in best.results] == [r["seed"] for r in runs if r["who"] == "candidate"]
    later = _judged(journal, -0.05)
    assert [r["who"] for r in later] == ["incumbent"] * FRESH + ["candidate"]
    assert {r["seed"] for r in later[:-1]}.isdisjoint(range(1, BASELINE_RUNS + 1))
    assert later[-1]["seed"] in {r["seed"] for r in later[:-1]}
    assert best.val_bpb == pytest.approx(journal.state.baseline.val_bpb - 0.0025, abs=0.001)
    _same(Journal(tmp_path).state, journal.state)


def test_the_pace_of_a_run_reaches_the_verdict(tmp_path):
    deltas = []
    for pace in (None, 1.0, 0.9):
        journal = _started(tmp_path / str(pace))
        _judged(journal, 0.0, pace and 1.0)
        _propose(journal)
        _judge(journal, "full")
        _run(journal, 1.003 + 0.007 * math.sin(5 * journal.state.step().seed), pace=pace)
        deltas.append(journal.state.judge("full").delta)
    assert deltas == pytest.approx([0.003, 0.003, 0.003 + SLOPE * -math.log(0.9)], abs=5e-4)


OLD = WRITER.with_name("journal_without_pairs.jsonl")  # verdicts without seeds: it is the number of the run


@pytest.mark.parametrize("lines", range(1, 75))
def test_a_journal_of_an_earlier_version_goes_on_from_every_line(tmp_path, lines):
    (tmp_path / "journal.jsonl").write_text("".join(OLD.read_text().splitlines(keepends=True)[:lines]))
    journal = Journal(tmp_path)
    journal.gain = 0.0
    known = len(journal.state.experiments)
    _judged(journal, 0.0)
    _judged(journal, -0.05)
    assert len(journal.state.experiments) > known
    for e in journal.state.experiments:
        assert len(e.results) - len({run.seed for run in e.results}) <= 2 * CONTROLS
    _same(Journal(tmp_path).state, journal.state)


def test_seeds_of_an_earlier_version_are_those_of_its_runs():
    state = State()
    for line in OLD.read_text().splitlines():
        state.check(json.loads(line)["event"], json.loads(line))
        state.apply(json.loads(line))
    assert [run.seed for run in state.incumbent.results] == [1, 2, 3, 4, 5]
    assert [run.seed for run in state.experiments[2].results] == [2, 3, 4]  # its first run was invalid
    assert state.noise.pair is None
    assert all(e.error > 0 for e in state.experiments if e.results)


def test_an_invalid_run_is_repeated_and_a_crash_settles(tmp_path):
    journal = _started(tmp_path)
    _experiment(journal, 1.0)
    _propose(journal)
    _judge(journal)
    seed = journal.state.step().seed
    _run(journal, status="invalid")
    assert (journal.state.step().run, journal.state.step().seed) == ("e0001-r2", seed)
    assert journal.state.experiments[1].values == []
    _run(journal, status="crash")
    assert journal.state.step().verdict == "crash"
    assert journal.state.head() == journal.state.incumbent.commit


def test_an_incumbent_that_crashes_is_not_measured_again_for_this_experiment(tmp_path):
    journal = _started(tmp_path)
    _judged(journal, 0.0)
    _judged(journal, 0.0025)
    _propose(journal)
    assert _judge(journal, "full").who == "incumbent"
    _run(journal, status="crash")
    assert _judge(journal, "full").who == "candidate"
    _run(journal, 1.1)
    assert _judge(journal, "full").verdict == "discard"
    _settle(journal)
    assert journal.state.incumbent.status == "keep"
    _propose(journal)
    assert journal.state.remeasure


def test_the_branch_belongs_on_the_candidate_until_it_is_discarded(tmp_path):
    journal = _started(tmp_path)
    assert journal.state.head() == "b" * 40
    _experiment(journal, 1.0, commit="0" * 40)
    _propose(journal, commit="1" * 40)
    assert journal.state.head() == "1" * 40
    _run(journal, 2.0)
    assert journal.state.head() == "1" * 40
    _judge(journal)
    assert journal.state.head() == "0" * 40


@pytest.mark.parametrize("cut", [1, 7, 40, -2])
def test_a_torn_last_line_is_ignored_and_removed(tmp_path, cut):
    journal = _started(tmp_path)
    whole = journal.path.read_bytes()
    journal.record("note", text="the last words ✓")
    journal.path.write_bytes(whole + journal.path.read_bytes()[len(whole) :][:cut])
    resumed = Journal(tmp_path)
    assert resumed.state.n == 1
    resumed.record("note", text="on")
    assert [record["n"] for record in read(journal.path)] == [1, 2]
    assert Journal(tmp_path).state.n == 2


def test_a_journal_that_is_only_a_torn_line_starts_afresh(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"n": 1, "ev')
    assert _started(tmp_path).state.n == 1
    assert Journal(tmp_path).state.start["tag"] == "t"


@pytest.mark.parametrize(
    "damage",
    [lambda lines: lines[1:], lambda lines: [lines[0], *lines[2:]], lambda lines: [*lines, lines[-1]],
     lambda lines: [lines[0], b"\x00\xff\n", *lines[2:]], lambda lines: [lines[0], b"[1]\n", *lines[2:]]],
)  # fmt: skip
def test_any_other_damage_is_one_clear_line(tmp_path, damage):
    journal = _started(tmp_path)
    journal.record("note", text="a")
    journal.record("note", text="b")
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join(damage(lines)))
    with pytest.raises(UserError, match=r"line \d is not event \d"):
        Journal(tmp_path)


def test_a_bit_that_flipped_is_named_or_changes_nothing(tmp_path):
    journal = _started(tmp_path)
    _experiment(journal, 1.25)
    whole, records = journal.path.read_bytes(), list(read(journal.path))
    rng = random.Random(3)
    named = 0
    for at in range(len(whole)):
        changed = bytes([whole[at] ^ 1 << rng.randrange(8)])
        journal.path.write_bytes(whole[:at] + changed + whole[at + 1 :])
        try:
            found = list(read(journal.path))
        except UserError as error:
            named += "journal.jsonl: line" in str(error)
            continue
        assert [{key: record[key] for key in known} for record, known in zip(found, records, strict=True)] == records
    assert named > 0.9 * len(whole)  # the others are in the word "check"


def test_a_last_line_without_its_newline_counts_once_it_is_whole(tmp_path):
    journal = _started(tmp_path)
    journal.record("note", text="a")
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    resumed = Journal(tmp_path)
    resumed.record("note", text="b")
    resumed.record("note", text="c")
    assert [record["n"] for record in read(journal.path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 60, None], ids=["emptied", "cut", "removed"])
def test_a_journal_that_another_program_changes_during_the_night_is_named_at_once(tmp_path, size):
    journal = _started(tmp_path)
    journal.record("note", text="a")
    journal.path.unlink() if size is None else os.truncate(journal.path, size)
    before = journal.path.read_bytes() if journal.path.exists() else None
    with pytest.raises(UserError, match=r"journal\.jsonl was changed"):
        journal.record("note", text="b")
    assert (journal.path.read_bytes() if journal.path.exists() else None) == before


def test_an_event_that_does_not_follow_is_named_when_reading(tmp_path):
    journal = _started(tmp_path)
    with open(journal.path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"n": 2, "time": "", "event": "kept", "id": 0}) + "\n")
    with pytest.raises(UserError, match="event 2 is invalid"):
        Journal(tmp_path)


def test_events_out_of_turn_are_refused_and_not_written(tmp_path):
    journal = _started(tmp_path)
    _propose(journal)
    size = journal.path.stat().st_size
    run = {"id": 0, "who": "candidate", "run": "e0000-r1", "seed": 1, "status": "ok", "val_bpb": 1.0}
    run |= {"memory_gb": 1.0, "minutes": 1.0, "reason": "", "pace": None}
    wrong = [
        ("kept", {"id": 0}),
        ("proposal", dict.fromkeys(FIELDS["proposal"], "")),
        ("run", run | {"run": "e0000-r2"}),
        ("run", run | {"id": 5}),
        ("run", run | {"who": "incumbent"}),
        ("run", run | {"status": "fine"}),
        ("run", run | {"val_bpb": float("nan")}),
        ("run", run | {"pace": 0.0}),
        ("run", {key: value for key, value in run.items() if key != "seed"}),
        ("party", {}),
    ]  # fmt: skip
    for event, fields in wrong:
        with pytest.raises(ValueError, match=r"."):
            journal.record(event, **fields)
    assert journal.path.stat().st_size == size
    journal.record("run", **run)
    with pytest.raises(ValueError, match="does not follow"):
        journal.record("run", **run)
    _same(Journal(tmp_path).state, journal.state)


def test_nothing_comes_before_start(tmp_path):
    with pytest.raises(ValueError, match="before start"):
        Journal(tmp_path / "new").record("note", text="")
    assert not (tmp_path / "new").exists()


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path):
    hold = "with lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    code = f"import sys, time; from lab.loop.journal import lock\n{hold}"
    path = tmp_path / "tag" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid};"), lock(path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with lock(path):
        assert path.read_text() == f"{os.getpid()}\n"
    with lock(path):
        pass


def test_the_lock_does_not_pass_to_children(tmp_path):
    code = "import time; print('started', flush=True); time.sleep(60)"
    with lock(tmp_path / "lock"):
        child = subprocess.Popen([sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "started\n"  # before exec it does share the lock
    try:
        with lock(tmp_path / "lock"):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _night(folder, experiments, kill_after=None):
    """Run the writer; kill -9 it `kill_after` seconds after it has the lock. True if it came to its end."""
    command = [sys.executable, WRITER, folder, str(experiments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "locked\n"
    if kill_after is not None:
        time.sleep(kill_after)
        writer.send_signal(signal.SIGKILL)
    writer.wait(timeout=60)
    writer.stdout.close()
    return writer.returncode == 0


def test_kill_nine_at_random_moments_loses_and_doubles_nothing(tmp_path):
    rng = random.Random(6)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    killed.mkdir()
    straight.mkdir()
    assert _night(straight, 60)
    moments = [rng.uniform(0, _seconds(straight) / 16) for _ in range(20)]
    kills = sum(not _night(killed, 60, kill_after=moment) for moment in moments)
    assert kills >= 8  # some nights of a quick disk are over before
    assert _night(killed, 60)
    _night_is_whole(killed)
    # Every number follows from its run's name, so a night that was killed comes out as one that was not.
    assert (killed / "results.tsv").read_bytes() == (straight / "results.tsv").read_bytes()


def _seconds(folder):
    """Between the writer's first file and its last."""
    return (folder / "branch").stat().st_mtime - (folder / "lock").stat().st_mtime


def _night_is_whole(folder):
    runs = [record for record in read(folder / "journal.jsonl") if record["event"] == "run"]
    names = [record["run"] for record in runs]
    assert len(set(names)) == len(names)
    on_disk = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}
    assert set(on_disk) == set(names)
    assert all(on_disk[r["run"]] == {"status": r["status"], "val_bpb": r["val_bpb"]} for r in runs)
    state = Journal(folder).state
    assert state.pending is None
    assert len(state.experiments) == 60
    assert (folder / "branch").read_text() == state.head() == state.incumbent.commit


def _line(n, event, **fields):
    return {"n": n, "time": "2026-11-01T00:00:00+00:00", "event": event, **fields}


def _long_night(state, experiments):
    rng = random.Random(7)
    records = 0

    def apply(event, **fields):
        nonlocal records
        records += 1
        state.check(event, fields)
        state.apply(_line(records, event, **fields))

    apply("start", tag="t", commit="b" * 40)
    for number in range(experiments):
        given = {"commit": f"{number:040x}", "source": "x" * 64, "fingerprint": f"{number:064x}", "nodes": 5}
        apply("proposal", id=number, agent="ollama", hypothesis="why " * 10_000, **given)
        while (step := state.step()).action != "settle":
            if step.action == "run":
                measured = {"status": "ok", "memory_gb": 1.0, "minutes": 5.0, "reason": ""}
                apply(
                    "run", id=number, who=step.who, run=step.run, seed=step.seed, val_bpb=rng.gauss(1, 0.01), **measured
                )
            else:
                apply("verdict", id=number, **vars(state.judge()))
        apply("kept" if step.verdict == "keep" else "discarded", id=number)
        for _ in range(3):
            apply("refused", agent="a", hypothesis="h" * 9000, fingerprint="same", reason="r" * 9000)


def test_many_experiments_cost_little_memory_and_the_same_time_each():
    state, halves = State(), []
    tracemalloc.start()
    try:
        _long_night(state, 150)
        memory = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert memory < 150 * 3000  # bytes; a hypothesis as given is 40,000
    assert len(state.refusals) == 20
    assert state.refused == 450
    for size in (60, 480):
        began = time.process_time()
        _long_night(State(), size)
        halves.append((time.process_time() - began) / size)
    assert halves[1] < 2.5 * halves[0]


def test_a_long_journal_opens_in_a_moment(tmp_path):
    state, lines = State(), []
    keep, state.apply = state.apply, lambda record: (lines.append(json.dumps(record)), keep(record))
    _long_night(state, 500)
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    began = time.process_time()
    journal = Journal(tmp_path)
    assert time.process_time() - began < 3
    assert len(journal.state.experiments) == 500
    journal.write_results()
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 501
