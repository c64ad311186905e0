"""A checkout, nights or a cache that cannot be written: one line that names the folder and what to do, and nothing is
half made. A mount namespace makes them read-only for root too."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from checkout import Checkout
from conftest import ROOT, environment

# Runs commands in one process, which has read-only what its arguments name, and prints their status and words.
CHILD = """
import io, json, sys
import agent_loop, prepare, train
from lab.training import run
run.outlast_reader = prepare.outlast_reader = lambda: None
done = []
for script, *words in json.loads(sys.argv[1]):
    sys.argv, code = [script, *words], 0
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        if script == "train.py":
            run.execute(train.main, train.__file__)
        else:
            group = prepare.command if script == "prepare.py" else agent_loop.command
            sys.argv = [script, *words[1:]] if words[0] in group.commands else sys.argv
            run.guarded(group.commands.get(words[0], group))
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    texts = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    done.append([code, *texts])
print(json.dumps(done), file=sys.__stdout__)
"""
MOUNT = 'for d in $PLACES; do mount --bind "$d" "$d"; mount -o remount,bind,ro "$d"; done; exec "$@"'
NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-ec", MOUNT, "sh")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    made = Checkout(tmp_path_factory.mktemp("ro"))
    made.python("train.py", "--steps", 1, "--run-dir", "runs/a", "--no-score")
    night = made.folder / "nights" / "n"
    night.mkdir(parents=True)
    shutil.copy(made.folder / "tests/journal_without_pairs.jsonl", night / "journal.jsonl")
    unused = shutil.copytree(next((made.cache / "prepared").iterdir()), made.cache / "prepared" / "unused")
    assert (unused / "manifest.json").exists()
    return made


def ended(checkout: Checkout, places: list, commands: list) -> list:
    """Status, output and errors of commands with these folders read-only."""
    where = checkout.where()
    where["env"] |= {"PLACES": " ".join(map(str, places))}
    child = [sys.executable, "-c", CHILD, json.dumps([[str(word) for word in command] for command in commands])]
    done = subprocess.run([*NAMESPACE, *child], **where, capture_output=True, text=True, timeout=100)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def there(checkout: Checkout) -> dict:
    """Every file with its size."""
    return {
        str(path): path.stat().st_size
        for folder in (checkout.folder, checkout.cache)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


RUN = ("agent_loop.py", "run", "--agent", "search", "--max-experiments", 0, "--sandbox", "none", "--tag")
REFUSED = {
    "checkout": {
        ("train.py", "--steps", 1, "-q"): "/runs",
        (*RUN, "new"): "/nights/new",
        (*RUN, "n"): "/nights/n/lock",
        ("agent_loop.py", "try", "--tag", "n", "-m", "x"): "/nights/n/lock",
        ("agent_loop.py", "replay", 0, "--tag", "n"): "/nights/n/lock",
        ("agent_loop.py", "report", "--no-stories"): "/nights/n/",
        ("prepare.py", "score", "runs/a", "--sandbox", "none"): "/runs/a/",
        ("prepare.py", "sample", "runs/a"): "/runs/a/",
        ("prepare.py", "sample", "runs/a", "--export", "exported"): "exported",
    },
    "cache": {
        ("prepare.py", "--preset", "offline", "--seq", "32", "--no-fit"): "/prepared/",
        ("prepare.py", "clean", "prepared/unused"): "/prepared/unused",
    },
}
REMEDY = {"checkout": "clone the project into a folder that you can write to", "cache": "allow "}
WORKING = {
    "checkout": [("agent_loop.py", "status"), ("prepare.py", "clean")],
    "cache": [("train.py", "--steps", 1, "-q", "--no-score", "--run-dir", "runs/b"), ("prepare.py", "clean")],
}


@pytest.mark.skipif(not hasattr(os, "unshare") and sys.platform != "linux", reason="needs mount namespaces")
@pytest.mark.parametrize("place", ["checkout", "cache"])
def test_a_read_only_place_is_one_line_and_nothing_is_half_made(checkout, place):
    folder = checkout.folder if place == "checkout" else checkout.cache
    before = there(checkout)
    wrong = []
    commands = [*REFUSED[place], *WORKING[place]]
    for command, (code, out, err) in zip(commands, ended(checkout, [folder], commands), strict=True):
        said = [line for line in err.splitlines() if not line.startswith(("warning: no sandbox", "training the token"))]
        text = f"{code}" if isinstance(code, str) else " ".join(said)
        if command in REFUSED[place]:
            told = REFUSED[place][command] in text and REMEDY[place] in text
            good = text.startswith("error: ") and told and said == []
        else:
            good = code == 0 and said == []
        wrong += [] if good else [(command, code, out[-200:], err[-300:])]
    assert wrong == [], "\n".join(map(str, wrong))
    made = {path: size for path, size in there(checkout).items() if "/runs/b/" not in path}
    assert made == before


def test_a_folder_that_an_experiment_closed_is_removed_and_what_it_links_to_stays(tmp_path):
    """Root may do anything, so this is done by another user."""
    code = """if True:
        import os, shutil, sys
        from pathlib import Path
        from lab.files import remove
        here = Path(sys.argv[1])
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
        (here / "run/closed/inner").mkdir(parents=True)
        (here / "kept").mkdir(mode=0o500)
        (here / "run/closed/link").symlink_to(here / "kept")
        (here / "run/closed/inner").chmod(0)
        (here / "run/closed").chmod(0)
        remove(here / "run", here)
        print(sorted(path.name for path in here.iterdir()), oct((here / "kept").stat().st_mode)[-3:])
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        command = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['kept'] 500\n", "")
