"""Paths as people write them: FILES= and AUTORESEARCH_CACHE."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, refusal, run_script

import prepare
from lab.errors import UserError
from lab.files import cache_root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with texts in it."""
    for name in ("books/a.txt", "books/b.JSONL", "books/.DS_Store", "books/more/c.txt", "with space [1]/a[1].txt"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "home" / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("~/books/*.txt", ["books/a.txt"]),
        ("~/books", ["books/a.txt", "books/b.JSONL"]),
        ("books/", ["books/a.txt", "books/b.JSONL"]),
        ("books/*", ["books/a.txt", "books/b.JSONL", "books/.DS_Store", "books/more/c.txt"]),
        ("books/**", ["books/a.txt", "books/b.JSONL", "books/more/c.txt"]),
        ("books/**/*.txt", ["books/a.txt", "books/more/c.txt"]),
        ("with space [1]/a[1].txt", ["with space [1]/a[1].txt"]),
        ("with space [1]", ["with space [1]/a[1].txt"]),
        ("with*/*.txt", ["with space [1]/a[1].txt"]),
        ("books/[ab].*", ["books/a.txt", "books/b.JSONL"]),
        ("./books/../books/a.txt", ["books/a.txt"]),
        ("", []),
        (None, []),
    ],
)
def test_files_are_found_as_they_are_written(home, pattern, names):
    found = [str(Path(path).relative_to(home)) for path in prepare._expand(pattern)]
    assert found == sorted(name for name in names if ".DS_Store" not in name)


@pytest.mark.parametrize("pattern", ["~/nothing", "books/*.parquet", "~nobody-of-this-name/*", "books/[x].txt"])
def test_a_pattern_that_matches_nothing_is_one_line(home, pattern):
    with pytest.raises(UserError, match=r"no file matches '.*'; check the path, and quote the pattern$"):
        prepare._expand(pattern)


def test_a_folder_without_text_is_one_line(home):
    with pytest.raises(UserError, match=r"no file matches '.*/empty'"):
        prepare._expand("~/empty")


def test_a_loop_of_links_is_left_to_the_reader(home):
    os.symlink("loop.txt", home / "loop.txt")
    assert prepare._expand("loop.txt") == (str(home / "loop.txt"),)


def test_a_name_that_is_not_utf8(home, tmp_path, text_file):
    name = os.path.join(os.fsencode(home), b"caf\xe9.jsonl")
    os.link(text_file, name)
    done = run_script(tmp_path / "cache", "prepare.py", "--vocab", 300, "--files", f"{home}/caf*.jsonl")
    assert done.returncode == 0, done.stderr


CACHES = {"~/kept": "home/kept", "here": "here", "./here/": "here", "a b/[c]": "a b/[c]", "../up": "../up"}


@pytest.mark.parametrize("written", CACHES)
def test_a_cache_folder_is_where_it_is_written_for_every_process(home, tmp_path, written):
    """A child that starts in another folder uses the same."""
    child = [sys.executable, "-c", "from lab.files import cache_root; print(cache_root())"]
    code = f"import lab, subprocess; subprocess.run({child}, cwd='/', check=True)"
    env = os.environ | {"AUTORESEARCH_CACHE": written, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == os.path.normpath(tmp_path / CACHES[written]) + "\n"


def test_no_home_folder_is_one_line(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # of nobody
    with pytest.raises(UserError, match="no home folder is known; set AUTORESEARCH_CACHE"):
        cache_root()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/cache", "/sys/cache"])
def test_a_cache_that_cannot_be_a_folder_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    cache = tmp_path / place
    line = refusal(run_script(cache, "prepare.py", "--preset", "offline"))
    assert str(cache) in line
    assert "AUTORESEARCH_CACHE" in line


def test_prepared_in_a_relative_cache_is_trained_on(tmp_path, text_file):
    cache = os.path.relpath(tmp_path / "of mine", ROOT) + "/"
    done = run_script(cache, "prepare.py", "--preset", "offline", "--vocab", 300, "--files", text_file)
    assert done.returncode == 0, done.stderr
    current = json.loads((tmp_path / "of mine" / "current.json").read_text())
    assert Path(current["prepared"]).parent == tmp_path / "of mine" / "prepared"


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_what_may_not_be_read_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    powers = "--bounding-set=-dac_override,-dac_read_search"  # with which root reads everything
    as_others = ["setpriv", powers] if os.geteuid() == 0 else []
    command = [*as_others, sys.executable, "prepare.py", "--no-fit", "--files", tmp_path / name]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path / "cache"), capture_output=True, text=True)
    assert refusal(done) == (
        f"error: {tmp_path / name}: cannot be read (Permission denied); check FILES and the permissions"
    )
