"""What lies around a sandbox, for attempts to get out (attempts.py): folders, servers, processes, shared memory.

It notices what an attempt has reached there: a file changed, a server heard it, a process was touched.
"""

import ctypes
import fcntl
import http.server
import os
import resource
import socket
import struct
import subprocess
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from attempts import NUMBERS, Attempt

from lab.trial import landlock

SECRET = b"SECRET"
FOLDERS = {"HOME": "home", "READABLE": "repo", "HIDDEN": "repo/val"}  # names in the programs
SHARED = ("/tmp", "/var/tmp", "/dev/shm")
GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS
INET, INET6, UNIX, STREAM, DATAGRAM = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX,
                                       socket.SOCK_STREAM, socket.SOCK_DGRAM)  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


class Outside:
    """`own` is the run folder, `home`, `repo` and `repo/val` stand for $HOME, the laboratory and hidden data."""

    def __init__(self, folder: Path, mark: str, stack: ExitStack) -> None:
        self.folder, self.mark, self.stack = folder, mark, stack
        self.own = folder / "own"
        for name in ("own", *FOLDERS.values()):
            (folder / name).mkdir(parents=True)
        self.ends, self.heard, self.before, self.victims, self.segments = [], b"", {}, {}, {}
        self.names = (
            self.serve() | self.share() | {"NUMBERS": NUMBERS, "FIFO": self.fifo(), "TERMINAL": self.terminal()}
        )
        self.ended = threading.Event()
        visitor = threading.Thread(target=self.visit)
        visitor.start()
        stack.callback(visitor.join)
        stack.callback(self.ended.set)

    def listen(self, family: int, kind: int, address: object) -> object:
        end = self.stack.enter_context(socket.socket(family, kind))
        try:
            end.bind(address)
        except OSError:  # no IPv6 here
            return address
        if kind == STREAM:
            end.listen()
        end.setblocking(False)
        self.ends.append(end)
        return address if family == UNIX else end.getsockname()[:2]

    def serve(self) -> dict[str, object]:
        """Servers of each kind, by the name under which the programs know their address."""

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(SECRET)

            def log_message(self, *_: object) -> None:
                pass

        web = self.stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
        self.stack.callback(web.shutdown)
        return {
            "HTTP": web.server_address,
            "TCP": self.listen(INET, STREAM, ("127.0.0.1", 0)),
            "TCP6": self.listen(INET6, STREAM, ("::1", 0)),
            "UDP": self.listen(INET, DATAGRAM, ("127.0.0.1", 0)),
            "UDP6": self.listen(INET6, DATAGRAM, ("::1", 0)),
            "SOCKET": self.listen(UNIX, STREAM, str(self.folder / "home/socket")),
            "DATAGRAMS": self.listen(UNIX, DATAGRAM, str(self.folder / "home/log")),
            "READABLE_SOCKET": self.listen(UNIX, STREAM, str(self.folder / "repo/socket")),
            "ABSTRACT": self.listen(UNIX, STREAM, f"\0{self.mark}"),
        }

    def visit(self) -> None:
        """Connect to every port that a program writes to its file `port`."""
        while not self.ended.wait(0.05):
            for path in self.own.glob("*/port"):
                with (
                    suppress(OSError, ValueError),
                    socket.create_connection(("127.0.0.1", int(path.read_text()))) as end,
                ):
                    self.heard += end.recv(99)

    def share(self) -> dict[str, object]:
        """A secret in named shared memory, in a message queue and in a key."""
        named, mark = Path("/dev/shm", f"{self.mark}named"), self.mark.encode()
        named.write_bytes(SECRET)
        self.stack.callback(named.unlink)
        queue = libc.syscall(NUMBERS["mq_open"], mark, os.O_CREAT | os.O_RDWR, 0o600, None)
        libc.mq_send(queue, SECRET, len(SECRET), 0)
        self.stack.callback(libc.mq_unlink, b"/" + mark)
        self.stack.callback(os.close, queue)
        key = libc.syscall(NUMBERS["add_key"], b"user", mark, SECRET, len(SECRET), -4)
        libc.syscall(NUMBERS["keyctl"], 5, key, 0x3F3F0000)  # this user may read it
        self.stack.callback(remove_key, self.mark)
        return {"NAMED": named.name, "QUEUE": self.mark, "KEY": self.mark}

    def segment(self) -> int:
        """System V shared memory with a secret."""
        libc.shmat.restype = ctypes.c_void_p
        number = libc.shmget(0, 4096, 0o1600)
        place = ctypes.c_void_p(libc.shmat(number, None, 0))
        ctypes.memmove(place, SECRET, len(SECRET))
        libc.shmdt(place)
        self.stack.callback(libc.shmctl, number, 0, None)
        return number

    def fifo(self) -> str:
        path = self.folder / "repo/fifo"
        os.mkfifo(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.stack.callback(os.close, self.reader)
        return str(path)

    def terminal(self) -> str:
        self.master, slave = os.openpty()
        os.set_blocking(self.master, False)
        self.stack.callback(os.close, self.master)
        self.stack.callback(os.close, slave)
        return os.ttyname(slave)

    def victim(self, folder: Path) -> subprocess.Popen:
        """A process of this user with a secret in its memory, its command line, its folder and an open file."""
        (folder / "SECRET").touch()
        with open(folder / "file", "rb") as file:
            victim = subprocess.Popen(["tail", "-f", "SECRET"], stdin=file, stdout=subprocess.DEVNULL, cwd=folder,
                                      env={"TOKEN": "SECRET"}, preexec_fn=drop_capabilities)  # fmt: skip
        self.stack.callback(victim.wait)
        self.stack.callback(victim.kill)
        return victim

    def set_up(self, number: int, attempt: Attempt) -> dict[str, object]:
        """Give an attempt its folders, its victim and its shared memory. Returns the names in its program."""
        names = self.names | {"NAME": self.name(number)}
        for name, place in FOLDERS.items():
            folder = self.folder / place / str(number)
            for made in (".git/hooks", "__pycache__"):
                (folder / made).mkdir(parents=True)
            (folder / "file").write_bytes(b"code" if name == "READABLE" else SECRET)
            names[name] = str(folder)
        if "VICTIM" in attempt.program:
            self.victims[number] = self.victim(Path(names["HOME"]))
            names["VICTIM"] = self.victims[number].pid
        if "SHARED" in attempt.program:
            names["SHARED"] = self.segments[number] = self.segment()
        self.before[number] = self.state(number)
        return names

    def name(self, number: int) -> str:
        return f"{self.mark}n{number}n"

    def state(self, number: int) -> list[object]:
        """What an attempt could have changed."""
        folders = [self.folder / place / str(number) for place in FOLDERS.values()]
        found = [status(path) for folder in folders for path in [folder, *sorted(folder.rglob("*"))]]
        found += [os.path.lexists(f"{folder}/{self.name(number)}") for folder in SHARED]
        if victim := self.victims.get(number):
            found.append(process(victim))
        if number in self.segments:
            found.append(libc.shmctl(self.segments[number], 2, ctypes.create_string_buffer(200)))
        return found

    def listen_again(self) -> None:
        """Take what has arrived at the servers, the FIFO and the terminal."""
        for end in self.ends:
            with suppress(BlockingIOError):
                while True:
                    if end.type == STREAM:
                        with end.accept()[0] as accepted:
                            accepted.settimeout(1)
                            self.heard += accepted.recv(999) + b"\n"
                    else:
                        self.heard += end.recv(999) + b"\n"
        for number in (self.reader, self.master):
            with suppress(BlockingIOError):
                self.heard += os.read(number, 9999)

    def reached(self, number: int) -> str:
        """What an attempt has reached, "" for nothing."""
        told = self.own / str(number) / "told"
        facts = {
            "told": told.is_file() and SECRET in told.read_bytes(),
            "changed": self.state(number) != self.before[number],
            "heard": self.name(number).encode() in self.heard,
            "key": remove_key(self.name(number)),
        }
        for folder in SHARED:
            Path(folder, self.name(number)).unlink(missing_ok=True)
        return ", ".join(fact for fact, true in facts.items() if true)


def drop_capabilities() -> None:
    """As root: be no more than a user. The kernel protects a process that has more capabilities than the attempt."""
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, so that exec does not give them back
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def landlock_version() -> int:
    """0 without Landlock."""
    return max(libc.syscall(landlock.CREATE_RULESET, None, 0, 1), 0)


def remove_key(name: str) -> bool:
    """Remove the user's key of this name. Returns whether there was one."""
    number = libc.syscall(NUMBERS["keyctl"], 10, -4, b"user", name.encode(), 0)
    return number >= 0 and libc.syscall(NUMBERS["keyctl"], 9, number, -4) == 0


def status(path: Path) -> tuple[object, ...]:
    """Everything about a file that can be changed, but for the time of its last reading."""
    seen = path.lstat()
    attributes = [(name, os.getxattr(path, name)) for name in os.listxattr(path)] if path.is_file() else []
    content, flags = b"", bytearray(8)
    if path.is_file() and not path.is_symlink() and seen.st_mode & 0o400:
        with open(path, "rb") as file, suppress(OSError):
            content = file.read()
            fcntl.ioctl(file, GET_FLAGS, flags)
    facts = (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_nlink, seen.st_mtime_ns)
    return path.name, *facts, attributes, content, bytes(flags)


def process(victim: subprocess.Popen) -> object:
    """Everything about a process that another may change."""
    if victim.poll() is not None:
        return "ended"
    pid = victim.pid
    stopped = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] in "Tt"
    limits = resource.prlimit(pid, resource.RLIMIT_CORE)
    score = Path(f"/proc/{pid}/oom_score_adj").read_text("utf-8")
    return stopped, limits, score, os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid)
