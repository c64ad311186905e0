"""A child process that reads only what it needs, writes only where it may, and has no network.

Files are an allow-list: the system's programs and libraries, this Python with its packages, and what a
`Policy` names. Among nested paths the deepest decides. Three kinds do the work without root:

  bubblewrap  Linux, the program `bwrap`: a root of bind mounts; own process, IPC and network namespaces.
  landlock    Linux 6.2 or later, no package: landlock.py says what it leaves open.
  seatbelt    macOS, /usr/bin/sandbox-exec with a generated profile. Not run on a Mac, its text is tested.

Not covered: memory, time and disk (see trial.py), and faults of the kernel. What is to be hidden has to
exist when the child starts. No kind offers shared memory under /dev/shm, which the locks of `multiprocessing`
need. A sandbox does not protect the metric: a score comes from another process, which must not share TMPDIR
with this one, because MLX loads the kernels it finds compiled there.
"""

import functools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError
from lab.files import ROOT
from lab.trial.landlock import DEVICES

KINDS = ("seatbelt", "bubblewrap", "landlock", "none")
SANDBOX_EXEC = "/usr/bin/sandbox-exec"
# Of /etc only what the linker, the compiler and user names need: as root all of it could be read.
ETC = tuple(f"/etc/{name}" for name in ("passwd", "group", "nsswitch.conf", "localtime", "ld.so.cache",
                                        "ld.so.conf", "ld.so.conf.d", "alternatives"))  # fmt: skip
LINUX = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/nix/store", "/sys", *ETC)
MACOS = ("/System", "/usr", "/bin", "/sbin", "/Library", "/opt", "/private/etc", "/private/var/db/dyld",
         "/private/var/db/timezone")  # fmt: skip
SYSTEM = {"Linux": LINUX, "Darwin": MACOS}
PASSED = ("PATH", "LANG", "LC_ALL", "TMPDIR")
PASSED_PREFIXES = ("AGX_", "AUTORESEARCH_", "MLX_", "OPENBLAS_")


@dataclass(frozen=True)
class Policy:
    """Folders the child may write (the first becomes its home), what it may read besides, what of that is hidden."""

    writable: tuple[Path, ...]
    readable: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()


def environment(variables: Mapping[str, str], policy: Policy) -> dict[str, str]:
    """The few of `variables` that a child gets; keys, tokens and agents' sockets stay behind.

    HOME is the first writable folder. TMPDIR, where MLX keeps compiled kernels, is passed if it is writable,
    else it is `tmp` in HOME."""
    clean = {key: text for key, text in variables.items() if key in PASSED or key.startswith(PASSED_PREFIXES)}
    home = policy.writable[0].resolve()
    temporary = Path(clean.get("TMPDIR", "/")).resolve()
    if not any(temporary.is_relative_to(folder.resolve()) for folder in policy.writable):
        temporary = home / "tmp"
    return clean | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}


def wrap(command: list[str], policy: Policy, kind: str) -> list[str]:
    """The command that runs `command` in a sandbox of this kind; give it to Popen with `environment(...)`.

    Raises UserError for an unknown kind, a writable folder that is missing, a hidden path inside it."""
    rules = _rules(policy)
    if kind == "seatbelt":
        return [SANDBOX_EXEC, "-p", seatbelt_profile(rules), *command]
    if kind == "bubblewrap":
        return [*_bubblewrap(rules, policy), "--", *command]
    if kind == "landlock":
        words = json.dumps([(str(path), mode) for path, mode in rules])
        return [*launcher("lab.trial.landlock", "enter"), words, *command]
    if kind == "none":
        return list(command)
    raise UserError(f"no sandbox is called {kind!r}; choose one of {', '.join(KINDS)}")


def available() -> str:
    """The first kind that passes its self-test on this machine, else "none"."""
    kinds = ("seatbelt",) if sys.platform == "darwin" else ("bubblewrap", "landlock")
    return next((kind for kind in kinds if not self_test(kind)), "none")


def launcher(module: str, function: str) -> list[str]:
    """The command that calls a function of the laboratory in a clean interpreter, from any folder."""
    call = f"from {module} import {function}; {function}(*sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}"]


def _rules(policy: Policy) -> list[tuple[Path, str]]:
    """(resolved path, "read" | "write" | "hide"), parents first: the last that contains a file decides."""
    for path in policy.writable:
        if not path.is_dir():
            raise UserError(f"{path} is no folder that the child could write in; create it first")
    writable, hidden = ([path.resolve() for path in paths] for paths in (policy.writable, policy.hidden))
    for path in hidden:
        if any(path.is_relative_to(folder) for folder in writable):
            raise UserError(f"{path} cannot be hidden inside a folder that the child writes; keep it outside")
    python = (sys.prefix, sys.base_prefix, Path(sys.executable).resolve().parent.parent)
    readable = [Path(path) for path in (*SYSTEM.get(platform.system(), ()), *python, *policy.readable)]
    rules = {path.resolve(): "read" for path in readable if path.exists()}
    rules |= dict.fromkeys(hidden, "hide") | dict.fromkeys(writable, "write")
    # Inside a writable folder all is writable: Landlock could not take that right away again.
    outer = [path for path in rules if not any(folder in path.parents for folder in writable)]
    return [(path, rules[path]) for path in sorted(outer, key=lambda path: len(path.parts))]


def _bubblewrap(rules: list[tuple[Path, str]], policy: Policy) -> list[str]:
    program = shutil.which("bwrap") or "bwrap"
    alone = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--cap-drop", "ALL"]
    arguments = [program, "--die-with-parent", *alone, "--proc", "/proc", "--dev", "/dev"]
    mounted = [path for path, mode in rules if mode != "hide"]
    names = (*LINUX, sys.executable, sys.base_prefix, *policy.readable, *policy.writable)
    links = {link: target for name in names for link, target in _links(Path(name))}
    for link, target in links.items():
        if not any(link.is_relative_to(path) for path in mounted):
            arguments += ["--symlink", target, str(link)]
    for path, mode in rules:
        if mode != "hide":
            arguments += ["--bind" if mode == "write" else "--ro-bind", str(path), str(path)]
        elif path.exists() and any(path.is_relative_to(folder) for folder in mounted):
            arguments += ["--tmpfs", str(path)] if path.is_dir() else ["--ro-bind", "/dev/null", str(path)]
    empty = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--tmpfs"]
    return arguments + [word for path in (*empty, "/dev", "/") for word in ("--remount-ro", path)]


def _links(path: Path) -> Iterator[tuple[Path, str]]:
    """Symbolic links on the way to `path`: a name that leads through one needs it in the new root, too."""
    parts = Path(os.path.abspath(path)).parts
    for depth in range(2, len(parts) + 1):
        step = Path(*parts[:depth])
        if step.is_symlink():
            yield step, os.readlink(step)
            yield from _links(step.parent / os.readlink(step) / Path(*parts[depth:]))
            return


def seatbelt_profile(rules: list[tuple[Path, str]]) -> str:
    """macOS's sandbox profile, where the last rule that matches decides. Not run on a Mac.

    Metal needs its user clients, its compiler service and the shader cache under /private/var/folders."""
    operations = {
        "read": "(allow file-read* file-map-executable {0})(deny file-write* {0})",
        "write": "(allow file-read* file-write* file-map-executable {0})",
        "hide": "(deny file-read-data file-write* {0})",
    }
    devices = " ".join(f'(literal "{device}")' for device in (*DEVICES, "/dev/dtracehelper"))
    fixed = [
        '(version 1)(deny default)(import "system.sb")',
        "(allow process-exec*)(allow process-fork)(allow process-info* (target same-sandbox))",
        "(allow signal (target same-sandbox))(allow sysctl-read)(allow ipc-posix-sem)(allow ipc-posix-shm)",
        '(allow iokit-open (iokit-user-client-class "AGXDeviceUserClient")'
        '(iokit-user-client-class "AGXSharedUserClient")(iokit-user-client-class "IOSurfaceRootUserClient"))',
        '(allow iokit-get-properties)(allow mach-lookup (global-name "com.apple.MTLCompilerService"))',
        '(allow file-read-metadata)(allow file-read* (literal "/"))',
        f"(allow file-read* file-write-data {devices})",
        '(allow file-read* file-write* file-map-executable (subpath "/private/var/folders"))',
    ]
    quoted = [(json.dumps(str(path), ensure_ascii=False), mode) for path, mode in rules]
    paths = [operations[mode].format(f"(subpath {path})") for path, mode in quoted]
    return "\n".join([*fixed, *paths, "(deny network*)"])


PROBE = """
import os, socket, sys
inside, outside, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
def attempt(action):
    try:
        return action()
    except OSError:
        return b""
def send(kind):
    with socket.socket(socket.AF_INET, kind) as end:
        end.settimeout(2)
        end.connect(("127.0.0.1", port))
        end.send(b"out")
seen = [attempt(lambda: open(outside + name, "rb").read()) for name in ("/plain", "/hidden/key")]
attempt(lambda: open(outside + "/new", "w").write("x"))
attempt(lambda: os.truncate(outside + "/plain", 0))
attempt(lambda: send(socket.SOCK_STREAM))
attempt(lambda: send(socket.SOCK_DGRAM))
open(inside + "/seen", "wb").write(b"".join(seen))
"""


@functools.cache
def self_test(kind: str) -> str:
    """What a small child can or cannot do against the rules in such a sandbox, in words; "" if the sandbox
    holds.

    The child runs for real: reads, writes, truncates, and sends TCP and UDP to a loopback port. About 0.1
    s."""
    if kind == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
    with tcp, udp, tempfile.TemporaryDirectory() as folder:
        udp.bind(tcp.getsockname())
        inside, outside = Path(folder, "inside"), Path(folder, "outside")
        inside.mkdir()
        (outside / "hidden").mkdir(parents=True)
        (outside / "plain").write_bytes(b"plain")
        (outside / "hidden" / "key").write_bytes(b"secret")
        fault = _run_probe(kind, inside, outside, tcp.getsockname()[1])
        seen = b"" if fault else (inside / "seen").read_bytes()
        faults = {
            fault: fault != "",
            "cannot read what it may": not fault and not seen.startswith(b"plain"),
            "reads a hidden file": b"secret" in seen,
            "writes outside": (outside / "new").exists() or (outside / "plain").read_bytes() != b"plain",
            "opens a TCP connection": _reached(tcp),
            "sends UDP": _reached(udp),
        }
    return ", ".join(fault for fault, present in faults.items() if present)


def _run_probe(kind: str, inside: Path, outside: Path, port: int) -> str:
    """Why the probe could not run; "" if it did."""
    policy = Policy((inside,), (outside,), (outside / "hidden",))
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(inside), str(outside), str(port)]
    try:
        child = subprocess.run(wrap(command, policy, kind), env=environment(os.environ, policy), timeout=30,
                               stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                               errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start: {error}"
    return f"does not start: {child.stderr.strip()[-200:]}" if child.returncode else ""


def _reached(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        end.accept() if end.type == socket.SOCK_STREAM else end.recv(10)
    except BlockingIOError:
        return False
    return True
