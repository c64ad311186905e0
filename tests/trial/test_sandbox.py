"""The sandbox with real children: every kind available here must pass its self-test, and "none" must fail it."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from outside import landlock_version

from lab.errors import UserError
from lab.trial import sandbox
from lab.trial.sandbox import Policy

REAL_KINDS = ("bubblewrap", "landlock", "seatbelt")


@pytest.fixture(params=REAL_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    fault = sandbox.self_test(request.param)
    if fault:
        pytest.skip(f"{request.param} does not work here: {fault}")
    return request.param


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder like a project's: readable code, a hidden file and a hidden folder in it, the child's own folder."""
    (tmp_path / "repo" / "runs" / "1").mkdir(parents=True)
    (tmp_path / "repo" / "runs" / "journal.jsonl").write_text("SECRET")
    (tmp_path / "repo" / "code.py").write_text("NAME = 'readable'")
    (tmp_path / "repo" / "val").mkdir()
    (tmp_path / "repo" / "val" / "shard").write_text("SECRET")
    (tmp_path / "repo" / "answers").write_text("SECRET")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("SECRET")
    return tmp_path


def policy(room: Path) -> Policy:
    repo = room / "repo"
    return Policy((repo / "runs" / "1",), (repo,), (repo / "runs", repo / "val", repo / "answers"))


def child(code: str, kind: str, rules: Policy) -> str:
    """What the code prints when it runs in the sandbox."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(sandbox.wrap(command, rules, kind), env=sandbox.environment(os.environ, rules),
                          cwd=rules.writable[0], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=30)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def attempt(expression: str, kind: str, rules: Policy) -> str:
    """What the expression gives, or "denied"."""
    return child(f"import os, socket\ntry: print({expression})\nexcept OSError: print('denied')", kind, rules)


def test_self_test_finds_every_fault_of_no_sandbox() -> None:
    assert sandbox.self_test("none") == "reads a hidden file, writes outside, opens a TCP connection, sends UDP"


def test_self_test_reports_a_sandbox_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.self_test.cache_clear()
    monkeypatch.setattr(sandbox, "SANDBOX_EXEC", "/no/such/program")
    assert sandbox.self_test("seatbelt").startswith("does not start")
    sandbox.self_test.cache_clear()


def test_available_prefers_the_strongest_that_works() -> None:
    working = [kind for kind in ("seatbelt", "bubblewrap", "landlock") if not sandbox.self_test(kind)]
    assert sandbox.available() == (working[0] if working else "none")


def test_reads_code_and_packages_but_nothing_hidden(kind: str, room: Path) -> None:
    rules = policy(room)
    repo = room / "repo"
    assert attempt(f"open({str(repo / 'code.py')!r}).read()", kind, rules) == "NAME = 'readable'"
    for path in (repo / "val" / "shard", repo / "answers", repo / "runs" / "journal.jsonl", room / "home" / "key"):
        content = attempt(f"open({str(path)!r}).read()", kind, rules)
        assert content in ("denied", ""), path


def test_imports_from_a_folder_around_a_hidden_one(kind: str, room: Path) -> None:
    repo = str(room / "repo")
    (room / "repo" / "laboratory.py").write_text("NAME = 'imported'")
    program = f"import sys; sys.path.insert(0, {repo!r}); import laboratory, numpy; print(laboratory.NAME)"
    assert child(program, kind, policy(room)) == "imported"


def test_reads_a_name_that_leads_through_a_link(kind: str, room: Path) -> None:
    (room / "link").symlink_to("repo")
    rules = Policy((room / "repo" / "runs" / "1",), (room / "link",), (room / "repo" / "val",))
    assert attempt(f"open({str(room / 'link' / 'code.py')!r}).read()", kind, rules) == "NAME = 'readable'"
    assert attempt(f"open({str(room / 'link' / 'val' / 'shard')!r}).read()", kind, rules) == "denied"


def test_a_link_does_not_lead_out(kind: str, room: Path) -> None:
    (room / "repo" / "out").symlink_to(room / "home" / "key")
    assert attempt(f"open({str(room / 'repo' / 'out')!r}).read()", kind, policy(room)) == "denied"
    own = f"(os.symlink({str(room / 'home')!r}, 'mine'), open('mine/key').read())"
    assert attempt(own, kind, policy(room)) == "denied"


def test_writes_only_in_its_own_folder(kind: str, room: Path) -> None:
    rules = policy(room)
    repo = room / "repo"
    assert attempt("open('mine', 'w').write('abc')", kind, rules) == "3"
    assert (repo / "runs" / "1" / "mine").read_text() == "abc"
    before = {path: path.read_bytes() for path in room.rglob("*") if path.is_file()}
    outside = [repo / "new", repo / "code.py", repo / "val" / "new", repo / "runs" / "new", room / "home" / "new"]
    for path in [*outside, Path("/tmp/lab-sandbox-new"), Path("/dev/shm/lab-sandbox-new"), Path("/usr/lab-new")]:
        assert attempt(f"open({str(path)!r}, 'a').write('x')", kind, rules) == "denied", path
        assert not path.name.endswith("new") or not path.exists()
    for expression in (
        f"os.truncate({str(repo / 'code.py')!r}, 0)",
        f"os.open({str(repo / 'code.py')!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.unlink({str(repo / 'code.py')!r})",
        f"os.rename({str(repo / 'code.py')!r}, 'taken')",
        f"os.rename('mine', {str(repo / 'given')!r})",
        f"os.link({str(room / 'home' / 'key')!r}, 'linked')",
    ):
        assert attempt(expression, kind, rules) == "denied", expression
    assert {path: path.read_bytes() for path in room.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("form", ["tcp", "udp", "unix", "abstract"])
def test_reaches_no_server(kind: str, room: Path, form: str) -> None:
    address = {"unix": str(room / "home" / "s"), "abstract": f"\0lab-{os.getpid()}"}.get(form, ("127.0.0.1", 0))
    family = socket.AF_INET if form in ("tcp", "udp") else socket.AF_UNIX
    stream = socket.SOCK_DGRAM if form == "udp" else socket.SOCK_STREAM
    with socket.socket(family, stream) as server:
        server.bind(address)
        if form != "udp":
            server.listen()
        server.settimeout(0.3)
        code = f"""
            import socket
            try:
                end = socket.socket({int(family)}, {int(stream)})
                end.connect({server.getsockname()!r})
                end.send(b"out")
            except OSError as error:
                print("denied")
            """
        said = child(code, kind, policy(room))
        with pytest.raises(TimeoutError):
            server.recv(10) if form == "udp" else server.accept()
    assert said == "denied" or form == "udp"  # in a network of its own a datagram leaves for nowhere


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_does_not_see_the_loops_variables(kind: str, room: Path) -> None:
    assert attempt(f"open('/proc/{os.getpid()}/environ', 'rb').read()", kind, policy(room)) == "denied"


def test_cannot_signal_the_loop(kind: str, room: Path) -> None:
    if kind == "landlock" and landlock_version() < 6:
        pytest.skip("Landlock restricts signals from version 6 on")
    assert attempt(f"os.kill({os.getpid()}, 0)", kind, policy(room)) == "denied"


def test_compiles_as_mlx_does_on_a_cpu(kind: str, room: Path) -> None:
    (room / "repo" / "runs" / "1" / "tmp").mkdir()
    code = """
        import ctypes, os, shutil, subprocess, tempfile
        folder = tempfile.mkdtemp()
        open(folder + "/a.c", "w").write("int four(void) { return 4; }")
        subprocess.run([shutil.which("cc"), "-shared", "-fPIC", "-o", folder + "/a.so", folder + "/a.c"], check=True)
        print(ctypes.CDLL(folder + "/a.so").four())
        """
    assert child(code, kind, policy(room)) == "4"


def test_environment_is_scrubbed(room: Path) -> None:
    rules = policy(room)
    given = {"PATH": "/bin", "HF_TOKEN": "s", "SSH_AUTH_SOCK": "s", "OPENAI_API_KEY": "s", "LD_PRELOAD": "s",
             "PYTHONPATH": "s", "AUTORESEARCH_SETTINGS": "a", "TMPDIR": "/tmp",
             "OPENBLAS_NUM_THREADS": "1", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1"}  # fmt: skip
    run_dir = str((room / "repo" / "runs" / "1").resolve())
    assert sandbox.environment(given, rules) == {
        "PATH": "/bin", "AUTORESEARCH_SETTINGS": "a", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1", "HOME": run_dir, "TMPDIR": run_dir + "/tmp"}  # fmt: skip


def test_environment_keeps_a_writable_compile_cache(room: Path) -> None:
    rules = Policy((room / "repo" / "runs" / "1", room / "home"))
    assert sandbox.environment({"TMPDIR": str(room / "home")}, rules)["TMPDIR"] == str((room / "home").resolve())


def test_invalid_policies_are_refused(room: Path) -> None:
    with pytest.raises(UserError, match="create it first"):
        sandbox.wrap(["true"], Policy((room / "missing",)), "none")
    with pytest.raises(UserError, match="cannot be hidden"):
        sandbox.wrap(["true"], Policy((room,), hidden=(room / "home",)), "bubblewrap")
    with pytest.raises(UserError, match="unknown sandbox 'chroot'; choose one of seatbelt"):
        sandbox.wrap(["true"], Policy((room,)), "chroot")


def test_seatbelt_profile_text(room: Path) -> None:
    """The last rule that matches decides, so parents come first and the network last. Not run on a Mac."""
    odd = room / 'a "quoted" name'
    odd.mkdir()
    rules = policy(room)
    rules = Policy((*rules.writable, odd), rules.readable, rules.hidden)
    command = sandbox.wrap(["python", "train.py"], rules, "seatbelt")
    assert command[:2] == ["/usr/bin/sandbox-exec", "-p"]
    assert command[3:] == ["python", "train.py"]
    profile, repo = command[2], (room / "repo").resolve()
    assert profile.startswith("(version 1)(deny default)")
    assert profile.endswith("(deny network*)")
    order = [
        f'(allow file-read* file-map-executable (subpath "{repo}"))(deny file-write* (subpath "{repo}"))',
        f'(deny file-read-data file-write* (subpath "{repo}/runs"))',
        f'(allow file-read* file-write* file-map-executable (subpath "{repo}/runs/1"))',
    ]
    places = [profile.index(rule) for rule in order]
    assert places == sorted(places)
    assert f"(subpath {json.dumps(str(odd.resolve()))})" in profile
    for needed in ("AGXDeviceUserClient", "com.apple.MTLCompilerService", "/private/var/folders", "process-fork"):
        assert needed in profile
    outside_strings = "".join(profile.replace('\\"', "").split('"')[::2])
    assert outside_strings.count("(") == outside_strings.count(")")
