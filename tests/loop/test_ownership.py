"""A night never enters, resets or removes what is not its own: a file is planted wherever one could be lost."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from checkout import Checkout, git
from conftest import ROOT, edit, refusal
from simulated import begin

from lab.errors import UserError
from lab.interface.housekeeping import remove
from lab.loop.branch import Branch, check_tag
from lab.loop.git import run
from lab.trial.sandbox import available

needs_sandbox = pytest.mark.skipif(available() == "none", reason="no sandbox on this machine (install bubblewrap)")
RESUME = ("agent_loop.py", "run", "--agent", "search", "--max-experiments", "0", "--tag")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Checkout:
    """A checkout with a night whose baseline has run. Never changed: see `checkout`."""
    made = Checkout(tmp_path_factory.mktemp("base"))
    made.python(*RESUME, "n", "--minutes", "0.02")
    return made


@pytest.fixture
def checkout(base, tmp_path) -> Checkout:
    """This test's own checkout with that night, moved here."""
    return copied(base, tmp_path / "repo")


@pytest.fixture
def night(tmp_path):
    return partial(begin, tmp_path)


def copied(checkout: Checkout, folder: Path) -> Checkout:
    shutil.copytree(checkout.folder, folder, symlinks=True)
    return checkout.at(folder)


def planted(folder: Path) -> Path:
    """A file that must be there afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.txt").write_text("mine\n")
    return folder / "mine.txt"


def repository(folder: Path) -> Path:
    """Somebody's repository with one commit, and a file that git does not know."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "-b", "main")
    (folder / "theirs.py").write_text("theirs\n")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", "theirs")
    planted(folder)
    return folder


def untouched(folder: Path) -> bool:
    """Whether that repository is as it was made."""
    return (
        (folder / "mine.txt").read_text() == "mine\n"
        and git(folder, "for-each-ref", "--format=%(refname)") == "refs/heads/main"
        and git(folder, "worktree", "list", "--porcelain").count("worktree ") == 1
        and git(folder, "status", "--porcelain") == "?? mine.txt"
    )


def agrees(checkout: Checkout, tag: str) -> bool:
    """Whether branch and worktree of a night are in this checkout's own repository, on the journal's commit."""
    head = checkout.night(tag).state.head()
    worktree = checkout.folder / "nights" / tag / "worktree"
    common = Path(git(worktree, "rev-parse", "--path-format=absolute", "--git-common-dir"))
    return common == checkout.folder / ".git" and [head] * 2 == [
        checkout.git("rev-parse", f"autoresearch/{tag}"), git(worktree, "rev-parse", "HEAD")
    ]  # fmt: skip


# ---- what git inherits


@needs_sandbox
@pytest.mark.parametrize(
    "name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"]
)
def test_gits_environment_variables_have_no_effect(checkout, tmp_path, name):
    theirs = repository(tmp_path / "theirs")
    inner = {"GIT_WORK_TREE": "", "GIT_INDEX_FILE": ".git/index", "GIT_OBJECT_DIRECTORY": ".git/objects"}
    before = sorted(path for path in theirs.rglob("*") if "objects" in path.parts)
    for tag, rigor in (("new", "none"), ("n", "full")):
        value = str(theirs / inner.get(name, ".git"))
        checkout.python(*RESUME, tag, "--minutes", "0.02", "--rigor", rigor, **{name: value})
        assert agrees(checkout, tag)
    assert untouched(theirs)
    assert sorted(path for path in theirs.rglob("*") if "objects" in path.parts) == before


HOOKS = ("pre-commit", "prepare-commit-msg", "commit-msg", "post-commit", "post-checkout", "reference-transaction",
         "post-index-change", "fsmonitor", "pre-auto-gc")  # fmt: skip
CONFIGURATION = """
[core]
    hooksPath = {hooks}
    fsmonitor = {hooks}/fsmonitor
    attributesFile = {attributes}
    excludesFile = {attributes}
    autocrlf = true
    eol = crlf
    safecrlf = true
    sparseCheckout = true
    editor = false
    pager = false
    ignoreStat = true
[commit]
    gpgsign = true
    template = /absent
    cleanup = scissors
[gpg]
    program = {hooks}/fsmonitor
[filter "breaks"]
    smudge = false
    clean = false
    required = true
[diff "breaks"]
    textconv = false
[user]
    useConfigOnly = true
    name = Half
[submodule]
    recurse = true
[log]
    showSignature = true
[i18n]
    commitEncoding = UTF-16
[checkout]
    defaultRemote = absent
[color]
    ui = always
[init]
    templateDir = {hooks}
"""


@pytest.fixture(params=["global", "local"])
def configured(request, tmp_path, night, monkeypatch):
    """A night in a checkout with every configuration that could interfere."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in HOOKS:
        (hooks / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/ran\nexit 1\n")
        (hooks / name).chmod(0o755)
    (tmp_path / "attributes").write_text("*.py filter=breaks diff=breaks text eol=crlf\n*\n")
    text = CONFIGURATION.format(hooks=hooks, attributes=tmp_path / "attributes")
    n = night()
    if request.param == "global":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / ".gitconfig").write_text(text)
        for key, value in {"HOME": tmp_path / "home", "XDG_CONFIG_HOME": tmp_path / "home"}.items():
            monkeypatch.setenv(key, str(value))
    else:
        with open(n.branch.repository / ".git" / "config", "a", encoding="utf-8") as file:
            file.write(text)
        shutil.copy(tmp_path / "attributes", n.branch.repository / ".git" / "info" / "attributes")
    return n


def test_no_configuration_stops_or_changes_a_commit(configured, tmp_path):
    n = configured
    assert n.go(2) == "done"
    state = n.journal.state
    assert n.branch.source(state.experiments[0].commit) == (ROOT / "train.py").read_text()
    assert n.branch.head == state.head()
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.parametrize(
    ("settings", "author"),
    [
        ("[user]\nname = Ada ±\nemail = ada@example.org\n", "Ada ± <ada@example.org>"),
        ("[user]\nname = Ada\n", "autoresearch <autoresearch@localhost>"),
        ("[user]\nemail = ada@example.org\n", "autoresearch <autoresearch@localhost>"),
        ("[user]\nname = <>\nemail = ada@example.org\n", "autoresearch <autoresearch@localhost>"),
        ("[user\n", "autoresearch <autoresearch@localhost>"),
        ("", "autoresearch <autoresearch@localhost>"),
    ],
)
def test_a_commit_is_by_the_user_where_name_and_address_are_known(night, tmp_path, monkeypatch, settings, author):
    (tmp_path / ".gitconfig").write_text(settings)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody else")
    n = night()
    commit = n.branch.commit("x = 1  # ±\n", "wider: ±")
    assert n.branch.source(commit) == "x = 1  # ±\n"
    shown = git(n.branch.worktree, "show", "-s", "--format=%an <%ae>|%cn <%ce>|%B", commit)
    assert shown == f"{author}|{author}|wider: ±"


def test_a_git_that_hangs_is_ended_with_its_children_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nsleep 321 & sleep 321\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("lab.loop.git.SECONDS", 0.3)
    with pytest.raises(UserError, match="took longer than"):
        run(tmp_path, "status")
    sleeping = subprocess.run(["pgrep", "-f", "^sleep 321$"], capture_output=True, text=True).stdout
    assert sleeping == ""


def test_without_git_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git is not installed"):
        run(tmp_path, "status")


# ---- tags


@pytest.fixture
def empty(base, tmp_path) -> Checkout:
    """A checkout without a night."""
    made = copied(base, tmp_path / "repo")
    shutil.rmtree(made.folder / "nights")
    git(made.folder, "worktree", "prune")
    return made


BAD_TAGS = ["..", "../x", ".", "", " ", "a b", "a/b", "/tmp/x", ".hidden", "-dash", "x.lock", "a..b", "@{", "a~1",
            "a:b", "dot.", "n" * 300, "nacht±", "line\nbreak", "\x1b[31m", "$(touch x)"]  # fmt: skip


@pytest.mark.parametrize("tag", BAD_TAGS)
def test_a_tag_that_git_or_a_shell_would_misread_is_invalid(tag):
    with pytest.raises(UserError, match="letters, digits") as refused:
        check_tag(tag)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("tag", ["nov22", "Nov-22_b.2", "1", "n" * 80])
def test_a_plain_tag_is_taken(tag):
    assert check_tag(tag) == tag


@pytest.mark.parametrize("tag", ["../x", "a b", "", "n" * 300])
def test_a_tag_that_cannot_be_a_night_is_refused_before_anything_is_made(empty, tag):
    kept = planted(empty.folder.parent / "x" / "worktree"), planted(empty.folder / "worktree")
    done = empty.python("agent_loop.py", "run", "--agent", "search", f"--tag={tag}", check=False)
    assert all(path.is_file() for path in kept)
    line = refusal(done)
    assert "letters, digits" in line
    assert line.isprintable()
    assert not (empty.folder / "nights").exists()


@pytest.mark.parametrize("command", ["try -m x", "status", "replay 0", "report", "sample"])
def test_every_command_refuses_such_a_tag(empty, command):
    script = "prepare.py" if command == "sample" else "agent_loop.py"
    planted(empty.folder.parent / "x" / "worktree")
    assert "letters, digits" in refusal(empty.python(script, *command.split(), "--tag", "../x", check=False))
    assert (empty.folder.parent / "x" / "worktree" / "mine.txt").is_file()
    assert not (empty.folder / "nights").exists()


@pytest.mark.parametrize("command", ["status", "replay 0", "report"])
def test_a_night_that_is_not_there_is_not_made(checkout, command):
    line = refusal(checkout.python("agent_loop.py", *command.split(), "--tag", "absent", check=False))
    assert line == "error: there is no night absent; there are: n"
    assert sorted(path.name for path in (checkout.folder / "nights").glob("*/")) == ["n"]


def test_a_night_that_cannot_begin_leaves_no_folder(empty, tmp_path):
    done = empty.python(*RESUME, "new", check=False, AUTORESEARCH_CACHE=str(tmp_path / "empty"))
    assert "nothing is prepared" in refusal(done)
    assert not (empty.folder / "nights" / "new").exists()


# ---- links


@needs_sandbox
@pytest.mark.parametrize("link", ["nights", "nights/n", "nights/n/worktree", "nights/n/runs", "nights/n/sent"])
def test_a_link_that_leads_out_is_not_followed(checkout, tmp_path, link):
    at = checkout.folder / link
    elsewhere = tmp_path / "elsewhere"
    shutil.move(at, elsewhere) if at.exists() else elsewhere.mkdir()
    at.symlink_to(elsewhere)
    kept = [
        planted(elsewhere / name)
        for name in (".", "n/worktree", "worktree", "e0001-r1", "preflight", "n/runs/preflight")
    ]
    done = checkout.python(*RESUME[:5], "1", "--tag", "n", "--rigor", "none", check=False)
    assert all(path.is_file() for path in kept)
    assert "leads out" in refusal_after_a_log(done)


def refusal_after_a_log(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_cleaning_follows_no_link(checkout, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(checkout.folder / "nights/n", theirs / "night", symlinks=True)
    shutil.copytree(checkout.folder / "nights/n/runs/preflight", theirs / "run")
    (checkout.folder / "nights/linked").symlink_to(theirs / "night")
    (checkout.folder / "nights/n/runs/linked").symlink_to(theirs / "run")
    before = sorted(theirs.rglob("*"))
    checkout.python("prepare.py", "clean", "--runs", "--all")
    assert sorted(theirs.rglob("*")) == before


def test_a_link_in_the_cache_is_not_followed(base, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(base.cache, cache)
    [prepared] = (cache / "prepared").iterdir()
    shutil.copytree(prepared, tmp_path / "theirs")
    (cache / "prepared" / "linked").symlink_to(tmp_path / "theirs")
    done = base.python("prepare.py", "clean", "prepared/linked", "--all", check=False, AUTORESEARCH_CACHE=str(cache))
    assert "Traceback" not in done.stderr
    assert (tmp_path / "theirs" / "manifest.json").is_file()


# ---- a worktree that is lost


LOST = ("removed", "pruned", "folder", "repository", "foreign", "users", "lock", "head", "detached", "branch",
        "other branch", "index", "dirty", "commondir", "reference")  # fmt: skip


@pytest.mark.parametrize("how", LOST)
def test_a_worktree_that_is_lost_during_a_run_is_made_again_and_the_checkout_is_not_touched(night, tmp_path, how):
    n = night()
    user, worktree = n.branch.repository, n.branch.worktree
    theirs = repository(tmp_path / "theirs")
    (user / "train.py").write_text("# an edit that is not committed\n")
    planted(user)

    def lose(*_: object) -> None:
        entry = Path(git(worktree, "rev-parse", "--absolute-git-dir"))
        if how in ("removed", "pruned", "repository", "foreign", "users"):
            (worktree / ".git").unlink()
            planted(worktree)
        if how == "pruned":
            git(user, "worktree", "prune")
        elif how == "folder":
            shutil.rmtree(worktree)
        elif how == "repository":
            git(worktree, "init", "--quiet")
        elif how in ("foreign", "users"):
            (worktree / ".git").write_text(f"gitdir: {(theirs if how == 'foreign' else user) / '.git'}\n")
        elif how == "lock":
            for lock in (entry / "index.lock", entry / "HEAD.lock", user / ".git/refs/heads/autoresearch/n.lock"):
                lock.touch()
        elif how == "head":
            (entry / "HEAD").write_text("")
        elif how == "detached":
            git(worktree, "checkout", "--quiet", "--detach")
        elif how == "branch":
            git(user, "update-ref", "-d", "refs/heads/autoresearch/n")
        elif how == "other branch":
            git(worktree, "checkout", "--quiet", "-b", "other")
        elif how == "index":
            (entry / "index").write_bytes(b"DIRC")
        elif how == "dirty":
            (worktree / "train.py").write_text("broken")
        elif how == "commondir":
            (entry / "commondir").write_text("../")
        elif how == "reference":
            (user / ".git/refs/heads/autoresearch/n").write_text("")

    healthy, lost = n.runner.run, []

    def run(*arguments: object) -> object:
        if arguments[0] == "e0000-r2" and not lost:
            lost.append(lose())
        return healthy(*arguments)

    n.runner.run = run
    assert n.go(1) == "done"
    assert lost
    assert (user / "train.py").read_text() == "# an edit that is not committed\n"
    assert (user / "mine.txt").is_file()
    assert git(user, "rev-parse", "--abbrev-ref", "HEAD") == "main"
    assert git(user, "rev-list", "--count", "main") == "1"
    assert untouched(theirs)
    assert git(worktree, "rev-parse", "HEAD") == n.journal.state.head() == git(user, "rev-parse", "autoresearch/n")
    assert git(worktree, "status", "--porcelain") == ""
    if how in ("pruned", "repository"):  # the owner of the files is not known any more
        assert (worktree.with_name("worktree-1") / "mine.txt").is_file()


def test_a_change_that_is_in_the_journal_is_never_pruned(night, monkeypatch):
    n = night()
    n.go(0)
    record = n.journal.record

    def then_prune(event: str, **fields: object) -> None:
        record(event, **fields)
        if event == "proposal":
            git(n.branch.repository, "reflog", "expire", "--expire=now", "--all")
            git(n.branch.repository, "gc", "--quiet", "--prune=now")

    monkeypatch.setattr(n.journal, "record", then_prune)
    assert n.go(1) == "done"


def test_a_night_whose_branch_the_user_has_checked_out_is_refused(night):
    n = night()
    git(n.branch.worktree, "checkout", "--quiet", "--detach")
    git(n.branch.repository, "checkout", "--quiet", "autoresearch/n")
    (n.branch.repository / "train.py").write_text("# an edit that is not committed\n")
    with pytest.raises(UserError, match="checked out in"):
        n.go(1)
    assert (n.branch.repository / "train.py").read_text() == "# an edit that is not committed\n"


def test_a_night_runs_in_a_checkout_that_is_a_worktree_itself(night, tmp_path):
    main = night().branch.repository
    linked = tmp_path / "linked"
    git(main, "worktree", "add", "--quiet", "--detach", linked)
    branch = Branch(linked, linked / "nights" / "m" / "worktree", "autoresearch/m")
    branch.reset(git(main, "rev-parse", "HEAD"))
    assert (branch.worktree / "train.py").read_text() == (main / "train.py").read_text()
    git(linked, "switch", "--quiet", "--ignore-other-worktrees", "autoresearch/m")
    with pytest.raises(UserError, match="is checked out in"):
        branch.reset(git(main, "rev-parse", "HEAD"))


def test_worktrees_of_the_user_are_not_pruned(night, tmp_path):
    """One on a disk that is not plugged in looks like one that is gone."""
    n = night()
    git(n.branch.repository, "worktree", "add", "--quiet", tmp_path / "disk" / "theirs")
    shutil.move(tmp_path / "disk", tmp_path / "unplugged")
    (n.branch.worktree / ".git").unlink()
    shutil.rmtree(n.branch.worktree)
    n.go(0)
    shutil.move(tmp_path / "unplugged", tmp_path / "disk")
    assert git(tmp_path / "disk" / "theirs", "rev-parse", "--abbrev-ref", "HEAD") == "theirs"


# ---- a checkout at another place


@needs_sandbox
def test_a_night_in_a_copied_checkout_goes_on_in_the_copy(base, tmp_path):
    refs, kept = base.git("for-each-ref"), planted(base.folder / "nights" / "n" / "worktree")
    copy = copied(base, tmp_path / "copy")
    copy.python(*RESUME, "n")
    copy.python("agent_loop.py", "replay", "0", "--tag", "n")
    assert agrees(copy, "n")
    assert base.git("for-each-ref") == refs
    assert kept.is_file()
    kept.unlink()
    assert agrees(base, "n")


@needs_sandbox
def test_a_night_in_a_moved_checkout_goes_on(checkout, tmp_path):
    moved = checkout.at(tmp_path / "with space ±")
    checkout.folder.rename(moved.folder)
    moved.python(*RESUME, "n")
    assert agrees(moved, "n")


@needs_sandbox
def test_a_copied_night_is_a_night_of_its_own(checkout):
    nights = checkout.folder / "nights"
    shutil.copytree(nights / "n", nights / "copy", symlinks=True)
    kept = planted(nights / "n" / "worktree")
    checkout.python(*RESUME, "copy")
    assert agrees(checkout, "copy")
    assert kept.is_file()


@needs_sandbox
def test_a_checkout_of_another_user_works(checkout):
    if os.getuid():
        pytest.skip("only root can give files away")
    subprocess.run(["chown", "-R", "12345:12345", checkout.folder], check=True)
    checkout.python(*RESUME, "n")


@pytest.mark.parametrize("place", ["alone", "within another repository", "copied worktree"])
def test_without_a_repository_of_its_own_a_night_is_refused_in_one_line(base, tmp_path, place):
    theirs = repository(tmp_path / "theirs")
    at = base.at((tmp_path if place == "alone" else theirs) / "autoresearch")
    if place == "copied worktree":
        git(base.folder, "worktree", "add", "--quiet", "--detach", tmp_path / "linked")
        at = base.at(tmp_path / "copy")
        shutil.copytree(tmp_path / "linked", at.folder)
    else:
        shutil.copytree(base.folder, at.folder, ignore=shutil.ignore_patterns(".git", "nights"))
    refs, status = base.git("for-each-ref"), git(theirs, "status", "--porcelain")
    line = refusal(at.python(*RESUME, "new", check=False))
    assert "separate git repository" in line
    assert "git clone" in line
    assert not (at.folder / "nights").exists()
    assert base.git("for-each-ref") == refs
    assert git(theirs, "status", "--porcelain") == status
    assert git(theirs, "for-each-ref", "--format=%(refname)") == "refs/heads/main"


def test_a_checkout_in_which_no_folder_can_be_created_is_one_error(empty):
    (empty.folder / "nights").write_text("mine")
    assert "clone the project into a folder that you can write to" in refusal(empty.python(*RESUME, "new", check=False))
    assert (empty.folder / "nights").read_text() == "mine"


def test_a_repository_without_a_commit_is_refused_in_one_line(base, tmp_path):
    at = base.at(tmp_path / "repo")
    shutil.copytree(base.folder, at.folder, ignore=shutil.ignore_patterns(".git", "nights"))
    at.git("init", "--quiet")
    assert "git commit" in refusal(at.python(*RESUME, "new", check=False))
    assert not (at.folder / "nights").exists()


# ---- prepared data


def test_another_checkout_does_not_remove_what_a_night_needs(base, tmp_path):
    one, two = (copied(base, tmp_path / name) for name in ("one", "two"))
    shutil.rmtree(two.folder / "nights")
    cache = {"AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    shutil.copytree(base.cache, tmp_path / "cache")
    [needed] = (tmp_path / "cache" / "prepared").iterdir()
    settings = one.folder / "nights/n/settings.json"
    edit(settings, prepared=str(needed))
    one.python(*RESUME, "n", **cache)
    text = base.folder.parent / "text.jsonl"
    two.python("prepare.py", "--no-fit", "--preset", "offline", "--vocab", "300", "--files", text, **cache)
    printed = two.python("prepare.py", "clean", "--all", **cache).stdout
    assert (needed / "manifest.json").is_file(), printed
    assert f"(kept: for night n in {one.folder})" in printed
    shutil.rmtree(one.folder)
    assert "removed 1," in two.python("prepare.py", "clean", "--all", **cache).stdout


def test_prepared_data_older_than_the_record_of_its_users_goes_only_by_name(prepared, cache):
    (cache / "current.json").unlink()
    os.utime(prepared / "manifest.json", (0, 0))
    assert f"removed 0, 0.0 MB; NAMES='prepared/{prepared.name}' removes" in remove((), everything=True)
    assert remove((f"prepared/{prepared.name}",), everything=False).startswith("removed 1,")
    assert not prepared.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_night_with_damaged_settings_may_need_anything(prepared, cache, tmp_path, content):
    (cache / "current.json").unlink()
    night = tmp_path / "other" / "nights" / "n"
    night.mkdir(parents=True)
    (night / "settings.json").write_text(content)
    (cache / "users" / "other.path").write_text(str(tmp_path / "other"))
    assert remove((), everything=True).startswith("removed 0,")
    with pytest.raises(UserError, match=r"its settings\.json is damaged"):
        remove((f"prepared/{prepared.name}",), everything=False)
    shutil.rmtree(tmp_path / "other")
    assert remove((), everything=True).startswith("removed 1,")


@needs_sandbox
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_night_with_missing_prepared_data_ends_with_an_error_and_refuses_nothing(checkout, tmp_path, when):
    settings = checkout.folder / "nights/n/settings.json"
    record = json.loads(settings.read_text())
    shutil.copytree(record["prepared"], tmp_path / "data")
    edit(settings, prepared=str(tmp_path / "data"))
    before = checkout.night("n").path.read_text()
    if when == "before":
        shutil.rmtree(tmp_path / "data")
    script = f"rm -rf {tmp_path / 'data'}; sed -i 's/^MATRIX_LR = .*/MATRIX_LR = 0.013/' train.py"
    flags = ("--agent", "command", "--command", script, "--max-experiments", "1", "--tag", "n")
    line = refusal_after_a_log(checkout.python("agent_loop.py", "run", *flags, check=False))
    assert str(tmp_path / "data") in line
    assert "make prepare PRESET=offline" in line
    assert checkout.night("n").path.read_text() == before
