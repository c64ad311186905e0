"""A child process with restricted file access and no network.

Files are an allow-list: the system's programs and libraries, this Python with its packages, and the paths of a
`Policy`. Of nested paths the deepest rule applies. Three kinds of sandbox work without root:

  bubblewrap  Linux, the program `bwrap`: a root of bind mounts; own process, IPC and network namespaces.
  landlock    Linux 6.2 or later, no package. landlock.py lists what it does not cover.
              Both also filter system calls (seccomp.py).
  seatbelt    macOS, /usr/bin/sandbox-exec with a generated profile. Not run on a Mac; only its text is tested.

Where MLX uses an NVIDIA GPU, its device files are let through too (lab/machine/device.py). Landlock then also allows
the names of the child's own threads, which the driver sets, and local sockets of packets, without which it does not
start. What else the driver and NVRTC need is readable anyway: /sys, /proc, the driver's libraries in /usr, and those in
the packages of this Python. They keep kernels in HOME and TMPDIR, which are this child's alone. With Landlock MLX
computes on an H100; bubblewrap was not installed there.

Not covered: memory, time and disk (see guard.py), and kernel bugs. Hidden paths must exist when the child starts. No
kind provides shared memory under /dev/shm, which the locks of `multiprocessing` need. A sandbox does not protect the
metric: the score comes from another process, which must not share TMPDIR with this one, because MLX loads compiled
kernels from there.
"""

import functools
import json
import os
import platform
import resource
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
from lab.machine import device
from lab.trial.landlock import DEVICES

KINDS = ("seatbelt", "bubblewrap", "landlock", "none")
SANDBOX_EXEC = "/usr/bin/sandbox-exec"
# Of /etc only what the linker, the compiler and user names need: root could read everything in it.
ETC = tuple(f"/etc/{name}" for name in ("passwd", "group", "nsswitch.conf", "localtime", "ld.so.cache",
                                        "ld.so.conf", "ld.so.conf.d", "alternatives"))  # fmt: skip
LINUX = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/nix/store", "/sys", *ETC)
MACOS = ("/System", "/usr", "/bin", "/sbin", "/Library", "/opt", "/private/etc", "/private/var/db/dyld",
         "/private/var/db/timezone")  # fmt: skip
KERNEL = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")  # of it, as runc has them
MOUNTS = {"read": "--ro-bind", "write": "--bind", "device": "--dev-bind"}  # of bubblewrap
SYSTEM = {"Linux": LINUX, "Darwin": MACOS}
PASSED = ("PATH", "LANG", "LC_ALL", "TMPDIR")
PASSED_PREFIXES = ("AGX_", "AUTORESEARCH_", "CUDA_", "MLX_", "NVIDIA_", "OPENBLAS_")
KERNEL_CACHES = ("CUDA_CACHE_PATH", "MLX_PTX_CACHE_DIR")  # not passed: a child could leave kernels there for the scorer


@dataclass(frozen=True)
class Policy:
    """Folders that the child may write (the first becomes its HOME), other paths that it may read, and hidden paths."""

    writable: tuple[Path, ...]
    readable: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()


def grammar(root: Path) -> tuple[Path, ...]:
    """The code of a checkout that writes the text of the offline preset, its validation text included."""
    return tuple(sorted((root / "lab" / "data").rglob("stor*.py*")))


def environment(variables: Mapping[str, str], policy: Policy) -> dict[str, str]:
    """The few of `variables` that a child gets: no keys, tokens or agent sockets.

    HOME is the first writable folder. TMPDIR, where MLX stores compiled kernels, is kept if it is writable; otherwise
    it is `tmp` in HOME."""
    clean = {key: text for key, text in variables.items() if key in PASSED or key.startswith(PASSED_PREFIXES)}
    clean = {key: text for key, text in clean.items() if key not in KERNEL_CACHES}
    home = policy.writable[0].resolve()
    temporary = Path(clean.get("TMPDIR", "/")).resolve()
    if not any(temporary.is_relative_to(folder.resolve()) for folder in policy.writable):
        temporary = home / "tmp"
    return clean | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}


def wrap(command: list[str], policy: Policy, kind: str) -> list[str]:
    """The command that runs `command` in a sandbox of this kind; pass it to Popen with `environment(...)`.

    Raises UserError for an unknown kind, a missing writable folder, or a hidden path inside one."""
    rules = _rules(policy)
    if kind == "seatbelt":
        return [SANDBOX_EXEC, "-p", seatbelt_profile(rules), *command]
    if kind == "bubblewrap":
        return [*launcher("lab.trial.seccomp", "filtered"), *_bubblewrap(rules, policy), "--", *command]
    if kind == "landlock":
        encoded = json.dumps([(str(path), mode) for path, mode in rules])
        return [*launcher("lab.trial.landlock", "enter"), encoded, *command]
    if kind == "none":
        return list(command)
    raise UserError(f"unknown sandbox {kind!r}; choose one of {', '.join(KINDS)}")


def available() -> str:
    """The first kind that passes its self-test on this machine, else "none"."""
    kinds = ("seatbelt",) if sys.platform == "darwin" else ("bubblewrap", "landlock")
    return next((kind for kind in kinds if not self_test(kind)), "none")


def launcher(module: str, function: str) -> list[str]:
    """The command that calls a function of this project in an isolated interpreter, from any folder."""
    call = f"from {module} import {function}; {function}(*sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}"]


def bound(command: list[str], file_bytes: int = resource.RLIM_INFINITY) -> list[str]:
    """The command that runs `command` so that it ends with the thread that starts it, also by a kill (Linux), and
    writes no file beyond `file_bytes`. Without threads in the way, unlike a `preexec_fn`."""
    return [*launcher("lab.trial.child", "under"), str(os.getpid()), str(file_bytes), *command]


def _rules(policy: Policy) -> list[tuple[Path, str]]:
    """(resolved path, "read", "write", "hide" or "device"), parents first: the last rule with a file in it applies."""
    for path in policy.writable:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder, so the experiment cannot write to it; create it first")
    writable, hidden = ([path.resolve() for path in paths] for paths in (policy.writable, policy.hidden))
    for path in hidden:
        if any(path.is_relative_to(folder) for folder in writable):
            raise UserError(f"{path} cannot be hidden inside a folder that the experiment may write; move it elsewhere")
    python = (sys.prefix, sys.base_prefix, Path(sys.executable).resolve().parent.parent)
    readable = [Path(path) for path in (*SYSTEM.get(platform.system(), ()), *python, *policy.readable)]
    rules = {path.resolve(): "read" for path in readable if path.exists()}
    rules |= dict.fromkeys(hidden, "hide") | dict.fromkeys(writable, "write") | dict.fromkeys(device.nodes(), "device")
    # Everything inside a writable folder is writable: Landlock cannot revoke a right that it granted.
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
            arguments += [MOUNTS[mode], str(path), str(path)]
        elif path.exists() and any(path.is_relative_to(folder) for folder in mounted):
            arguments += ["--tmpfs", str(path)] if path.is_dir() else ["--ro-bind", "/dev/null", str(path)]
    closed = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--tmpfs"]
    if any(mode == "device" for _, mode in rules):  # a GPU's driver names its threads in /proc/self/task
        arguments += [word for path in KERNEL if os.path.exists(path) for word in ("--ro-bind", path, path)]
    else:
        closed += ["/proc"]
    return arguments + [word for path in (*closed, "/dev", "/") for word in ("--remount-ro", path)]


def _links(path: Path) -> Iterator[tuple[Path, str]]:
    """Symbolic links on the way to `path`, which need to exist in the new root too."""
    parts = Path(os.path.abspath(path)).parts
    for depth in range(2, len(parts) + 1):
        step = Path(*parts[:depth])
        if step.is_symlink():
            yield step, os.readlink(step)
            yield from _links(step.parent / os.readlink(step) / Path(*parts[depth:]))
            return


def seatbelt_profile(rules: list[tuple[Path, str]]) -> str:
    """The profile for macOS's sandbox-exec; the last rule that matches applies. Not run on a Mac.

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
inside, outside, port, driver = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
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
if driver:
    import ctypes
    open(inside + "/gpu", "w").write(str(ctypes.CDLL(driver).cuInit(0)))
"""


@functools.cache
def self_test(kind: str) -> str:
    """How a sandbox of this kind fails here, "" if it works.

    A real child reads, writes, truncates, sends TCP and UDP to a loopback port, and opens the NVIDIA GPU if MLX uses
    one. About 0.1 s."""
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
        opened = (inside / "gpu").read_text(encoding="utf-8") if (inside / "gpu").exists() else "0"
        faults = {
            fault: fault != "",
            "cannot read allowed files": not fault and not seen.startswith(b"plain"),
            "reads a hidden file": b"secret" in seen,
            "writes outside": (outside / "new").exists() or (outside / "plain").read_bytes() != b"plain",
            "opens a TCP connection": _reached(tcp),
            "sends UDP": _reached(udp),
            f"cannot use the GPU (CUDA error {opened})": opened != "0",
        }
    return ", ".join(fault for fault, present in faults.items() if present)


def _run_probe(kind: str, inside: Path, outside: Path, port: int) -> str:
    """Why the probe could not run, "" if it ran."""
    policy = Policy((inside,), (outside,), (outside / "hidden",))
    driver = device.DRIVER if device.nodes() else ""
    command = [sys.executable, "-I", "-S", "-c", PROBE, str(inside), str(outside), str(port), driver]
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
