"""Attempts to get out of the sandbox: small programs, and by what each is refused.

A program may use: HOME, READABLE and HIDDEN, folders of its own outside with a `file` (as $HOME, the laboratory and the
validation data); NAME, which is in the names of files that it leaves in shared folders; VICTIM, the number of a process
of the same user that stands for the loop; the addresses of servers; `call` for a system call by name; and `did`, which
reports a success that leaves no trace outside. It got out if it tells a secret, or if something outside has changed.

`refused`: by bubblewrap (b), Landlock (l), the macOS profile (m). `mac`: the operation on macOS and its path, where the
attempt concerns macOS and the profile decides on it.
"""

import os
import platform
from typing import NamedTuple

ROOT = os.geteuid() == 0
MACHINE = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)
CALLS = {  # numbers of system calls without a function in libc: x86-64, arm64
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "ioprio_set": (251, 30),
    "mq_open": (240, 180),
    "mq_timedreceive": (243, 183),
}
NUMBERS = {name: numbers[MACHINE] for name, numbers in CALLS.items()}


class Attempt(NamedTuple):
    """`control`: whether it is run without a sandbox too, where it must succeed. It is not if it would change this
    machine, or where only root can do it. `landlock`: the version of Landlock that refuses it."""

    name: str
    program: str
    refused: str = "blm"
    mac: tuple[str, str] | None = None
    control: bool = True
    landlock: int = 3


READ, WRITE, CREATE = "file-read-data", "file-write-data", "file-write-create"

FILES = [
    Attempt("reads a file in $HOME", "tell(open(HOME + '/file').read())", mac=(READ, "HOME")),
    Attempt("reads the validation data", "tell(open(HIDDEN + '/file').read())", mac=(READ, "HIDDEN")),
    Attempt("lists the names beside hidden files", "os.listdir(HIDDEN + '/..'); did()", "bm", (READ, "HIDDEN")),
    Attempt("sees size and time of a file in $HOME", "os.stat(HOME + '/file'); did()",
            "b", ("file-read-metadata", "HOME")),
    Attempt("watches a folder in $HOME",
            "libc.inotify_add_watch(libc.inotify_init(), (HOME).encode(), 0xFFF) > 0 and did()"),
    Attempt("reads through /proc/self/root", "tell(open('/proc/self/root' + HOME + '/file').read())"),
    Attempt("reads through ../..", "tell(open('../' * 40 + HOME[1:] + '/file').read())", mac=(READ, "HOME")),
    Attempt("reads through a link of its own", "os.symlink(HOME, 'way'); tell(open('way/file').read())",
            mac=(READ, "HOME")),
    Attempt("hard-links a secret into its folder", "os.link(HOME + '/file', 'mine'); tell(open('mine').read())",
            mac=(READ, "HOME")),
    Attempt("renames a secret into its folder", "os.rename(HOME + '/file', 'mine'); tell(open('mine').read())",
            mac=("file-write-unlink", "HOME")),
    Attempt("reads with a program in memory", """
        memory = os.memfd_create('cat')
        os.write(memory, open(shutil.which('cat'), 'rb').read())
        tell(subprocess.check_output([f'/proc/self/fd/{memory}', HOME + '/file'], pass_fds=[memory]).decode())"""),
    Attempt("reads by a file handle, without a path", """
        handle, mount = struct.pack('ii', 120, 0) + bytes(120), ctypes.c_int()
        handle = ctypes.create_string_buffer(handle)
        check(libc.name_to_handle_at(-100, (HOME + '/file').encode(), handle, ctypes.byref(mount), 0))
        tell(os.read(check(libc.open_by_handle_at(os.open('.', 0), handle, 0)), 99).decode())""", control=ROOT),
    Attempt("reads files that the loop has open", """
        for number in range(3, 256):
            with suppress(OSError): tell(os.pread(number, 99, 0).decode())""", control=False),
    Attempt("writes a new file in $HOME", "open(HOME + '/new', 'w').write('x')", mac=(CREATE, "HOME")),
    Attempt("writes a new file beside the code", "open(READABLE + '/new', 'w').write('x')", mac=(CREATE, "READABLE")),
    Attempt("appends to the code", "open(READABLE + '/file', 'a').write('x')", mac=(WRITE, "READABLE")),
    Attempt("writes through a link of its own", "os.symlink(READABLE, 'to'); open('to/file', 'w').write('x')",
            mac=(WRITE, "READABLE")),
    Attempt("truncates the code", "os.truncate(READABLE + '/file', 0)", mac=(WRITE, "READABLE")),
    Attempt("opens the code to read, truncating it", "os.open(READABLE + '/file', os.O_RDONLY | os.O_TRUNC)",
            mac=(WRITE, "READABLE")),
    Attempt("reopens an open file for writing", """
        number = os.open(READABLE + '/file', os.O_RDONLY)
        os.write(os.open(f'/proc/self/fd/{number}', os.O_WRONLY), b'x')"""),
    Attempt("maps the code to write it", """
        with open(READABLE + '/file', 'r+b') as file, mmap.mmap(file.fileno(), 0) as memory: memory[0] = 88""",
            mac=(WRITE, "READABLE")),
    Attempt("deletes the code", "os.unlink(READABLE + '/file')", mac=("file-write-unlink", "READABLE")),
    Attempt("renames a file of its own over the code", "open('f', 'w'); os.rename('f', READABLE + '/file')",
            mac=(CREATE, "READABLE")),
    Attempt("links a file of its own into $HOME", "open('f', 'w'); os.link('f', HOME + '/new')", mac=(CREATE, "HOME")),
    Attempt("names a nameless file in $HOME", """
        number = os.open('.', os.O_TMPFILE | os.O_WRONLY, 0o600)
        check(libc.linkat(-100, f'/proc/self/fd/{number}'.encode(), -100, (HOME + '/new').encode(), 0x400))"""),
    Attempt("leaves a FIFO in $HOME", "os.mkfifo(HOME + '/fifo')", mac=(CREATE, "HOME")),
    Attempt("leaves a git hook", "open(READABLE + '/.git/hooks/post-checkout', 'w').write('x')",
            mac=(CREATE, "READABLE")),
    Attempt("leaves compiled code in a cache", "open(READABLE + '/__pycache__/f.pyc', 'w').write('x')",
            mac=(CREATE, "READABLE")),
    Attempt("leaves a .pth file among the packages", """
        path = sysconfig.get_path('purelib') + f'/{NAME}.pth'
        open(path, 'w').close(); os.unlink(path); did()""", mac=(CREATE, "PACKAGES"), control=False),
    Attempt("leaves a file in /tmp", "open(f'/tmp/{NAME}', 'w').write('x')", mac=(CREATE, "/private/tmp/x")),
    Attempt("leaves a file where other programs keep theirs", "open(f'/var/tmp/{NAME}', 'w').write('x')",
            "bl", (CREATE, "/private/var/folders/x/T/file")),
    Attempt("leaves a file in /dev/shm", "open(f'/dev/shm/{NAME}', 'w').write('x')"),
    Attempt("changes permissions of the code", "os.chmod(READABLE + '/file', 0)", mac=("file-write-mode", "READABLE")),
    Attempt("changes permissions by an open file", "os.fchmod(os.open(READABLE + '/file', 0), 0o777)",
            mac=("file-write-mode", "READABLE")),
    Attempt("opens a folder of $HOME to everyone", "os.chmod(HOME, 0o777)", mac=("file-write-mode", "HOME")),
    Attempt("gives a file away", "os.chown(HOME + '/file', 12345, 12345)",
            mac=("file-write-owner", "HOME"), control=ROOT),
    Attempt("changes the time of the code", "os.utime(READABLE + '/file', (1, 1))",
            mac=("file-write-times", "READABLE")),
    Attempt("sets an extended attribute", "os.setxattr(READABLE + '/file', 'user.x', b'x')",
            mac=("file-write-xattr", "READABLE")),
    Attempt("sets a flag of a file (chattr +d)", """
        number, flags = os.open(READABLE + '/file', 0), bytearray(8)
        fcntl.ioctl(number, 0x80086601, flags)
        flags[0] |= 0x40
        fcntl.ioctl(number, 0x40086602, bytes(flags))""", mac=("file-write-flags", "READABLE")),
    Attempt("reads the disk as a device", """
        device = os.stat(HOME).st_dev
        os.mknod('disk', 0o60600, device)
        os.read(os.open('disk', os.O_RDONLY), 512); did()""", mac=("file-write-create", "HOME"), control=False),
    Attempt("mounts $HOME into its folder", """
        unshare()
        os.mkdir('m'); check(libc.mount(HOME.encode(), b'm', None, 0x1000, None)); tell(open('m/file').read())"""),
    Attempt("unmounts what hides the data", """
        unshare()
        check(libc.umount2(os.path.dirname(HIDDEN).encode(), 2)); tell(open(HIDDEN + '/file').read())""",
            control=False),
    Attempt("mounts the folder around the hidden one elsewhere", """
        unshare()
        around = os.path.dirname(os.path.dirname(HIDDEN))
        os.mkdir('m'); check(libc.mount(around.encode(), b'm', None, 0x1000, None))
        tell(open('m' + HIDDEN[len(around):] + '/file').read())"""),
    Attempt("makes a read-only folder writable by mounting", """
        unshare()
        check(libc.mount(None, os.path.dirname(READABLE).encode(), None, 0x1020, None))
        open(READABLE + '/file', 'w').write('x')""",
            control=False),
]  # fmt: skip

NETWORK = [
    Attempt("TCP", "send(socket.AF_INET, socket.SOCK_STREAM, TCP)", mac=("network-outbound", "")),
    Attempt("TCP by IPv6", "send(socket.AF_INET6, socket.SOCK_STREAM, TCP6)", mac=("network-outbound", "")),
    Attempt("UDP", "send(socket.AF_INET, socket.SOCK_DGRAM, UDP)", mac=("network-outbound", "")),
    Attempt("UDP by IPv6", "send(socket.AF_INET6, socket.SOCK_DGRAM, UDP6)", mac=("network-outbound", "")),
    Attempt("a question to a name server", """
        question = b'\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0' + bytes([len(NAME)]) + NAME.encode() + b'\\0\\0\\1\\0\\1'
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(question, tuple(UDP))""", mac=("network-outbound", "")),
    Attempt("a request to a local HTTP server, as Ollama", """
        import urllib.request
        tell(urllib.request.urlopen(f'http://127.0.0.1:{HTTP[1]}/api/{NAME}', timeout=3).read().decode())""",
            mac=("network-outbound", "")),
    Attempt("a server of its own that others reach", """
        own = socket.create_server(('127.0.0.1', 0))
        open('port', 'w').write(str(own.getsockname()[1]))
        own.settimeout(1)
        own.accept()[0].sendall(NAME.encode())""", mac=("network-bind", "")),
    Attempt("a Unix socket in $HOME", "send(socket.AF_UNIX, socket.SOCK_STREAM, SOCKET)", mac=("network-outbound", "")),
    Attempt("a Unix socket in a readable folder", "send(socket.AF_UNIX, socket.SOCK_STREAM, READABLE_SOCKET)",
            "lm", ("network-outbound", "")),
    Attempt("a datagram to a Unix socket, as to syslog", "send(socket.AF_UNIX, socket.SOCK_DGRAM, DATAGRAMS)",
            mac=("network-outbound", "")),
    Attempt("a datagram by a socket pair", """
        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(NAME.encode(), DATAGRAMS)""",
            mac=("network-outbound", "")),
    Attempt("an abstract Unix socket", "send(socket.AF_UNIX, socket.SOCK_STREAM, ABSTRACT)"),
    Attempt("a FIFO in a readable folder", "os.write(os.open(FIFO, os.O_WRONLY | os.O_NONBLOCK), NAME.encode())",
            "lm", (WRITE, "READABLE")),
    Attempt("netlink: the machine's interfaces", "{name for _, name in socket.if_nameindex()} - {'lo'} and did()",
            control=False),
    Attempt("a packet socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); did()",
            mac=("network-outbound", ""), control=ROOT),
    Attempt("a raw socket", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); did()",
            mac=("network-outbound", ""), control=ROOT),
    Attempt("a socket to the host of a virtual machine", "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); did()",
            control=False),
]  # fmt: skip

PROCESSES = [
    Attempt("reads the loop's variables", "tell(open(f'/proc/{VICTIM}/environ').read())"),
    Attempt("reads the loop's memory", """
        for line in open(f'/proc/{VICTIM}/maps'):
            if '[stack]' in line:
                first, last = (int(word, 16) for word in line.split()[0].split('-'))
                tell(os.pread(os.open(f'/proc/{VICTIM}/mem', 0), last - first, first).decode('latin-1'))"""),
    Attempt("reads through the loop's root", "tell(open(f'/proc/{VICTIM}/root{HOME}/file').read())"),
    Attempt("reads through the loop's working folder", "tell(open(f'/proc/{VICTIM}/cwd/file').read())"),
    Attempt("reads a file that the loop has open", "tell(open(f'/proc/{VICTIM}/fd/0').read())"),
    Attempt("takes an open file of the loop", """
        number = os.pidfd_open(VICTIM)
        tell(os.pread(check(libc.syscall(438, number, 0, 0)), 99, 0).decode())"""),
    Attempt("sees the loop's command line", "tell(open(f'/proc/{VICTIM}/cmdline').read())", "b"),
    Attempt("attaches to the loop with ptrace", "check(libc.ptrace(16, VICTIM, 0, 0)); did()",
            mac=("process-info*", "others")),
    Attempt("kills the loop", "os.kill(VICTIM, 9)", mac=("signal", "others"), landlock=6),
    Attempt("stops the guard", "os.kill(VICTIM, signal.SIGSTOP)", mac=("signal", "others"), landlock=6),
    Attempt("signals the loop by a descriptor", "signal.pidfd_send_signal(os.pidfd_open(VICTIM), signal.SIGSTOP)",
            landlock=6),
    Attempt("signals the loop by a file's owner (SIGIO)", """
        one, two = os.pipe()
        fcntl.fcntl(one, fcntl.F_SETOWN, VICTIM)
        fcntl.fcntl(one, fcntl.F_SETSIG, signal.SIGSTOP)
        fcntl.fcntl(one, fcntl.F_SETFL, fcntl.fcntl(one, fcntl.F_GETFL) | os.O_ASYNC)
        os.write(two, b'x')""", landlock=6),
    Attempt("sets a limit of the loop", "resource.prlimit(VICTIM, resource.RLIMIT_CORE, (0, 0))"),
    Attempt("slows the loop down (nice)", "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)"),
    Attempt("slows the loop down (idle class)", "os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0))"),
    Attempt("moves the loop to one core", "os.sched_setaffinity(VICTIM, {max(os.sched_getaffinity(VICTIM))}); did()"),
    Attempt("slows the loop's disk down", "check(call('ioprio_set', 1, VICTIM, 3 << 13)); did()"),
    Attempt("makes the loop the first to be killed", "open(f'/proc/{VICTIM}/oom_score_adj', 'w').write('900')"),
    Attempt("enters the loop's namespaces", """
        check(libc.setns(os.pidfd_open(VICTIM), 0x20000)); did()""", control=ROOT),
    Attempt("reads shared memory of another program", """
        libc.shmat.restype = ctypes.c_void_p
        place = libc.shmat(SHARED, None, 0)
        place != 2**64 - 1 and tell(ctypes.string_at(place, 20).decode())""", mac=("ipc-sysv-shm", "")),
    Attempt("removes shared memory of another program", "check(libc.shmctl(SHARED, 0, None))",
            mac=("ipc-sysv-shm", "")),
    Attempt("reads named shared memory", "tell(open(f'/dev/shm/{NAMED}').read())", refused="bl",
            mac=("ipc-posix-shm", "")),
    Attempt("reads a message queue", """
        number = check(call('mq_open', QUEUE.encode(), os.O_RDONLY, 0, 0))
        text = ctypes.create_string_buffer(8192)
        check(call('mq_timedreceive', number, text, 8192, None, None)); tell(text.value.decode())"""),
    Attempt("reads a key of the user", """
        number = check(call('keyctl', 10, -4, b'user', KEY.encode(), 0))
        text = ctypes.create_string_buffer(99)
        check(call('keyctl', 11, number, text, 99)); tell(text.value.decode())"""),
    Attempt("leaves a key to later processes", "check(call('add_key', b'user', NAME.encode(), b'x', 1, -4))"),
]  # fmt: skip

MACHINE_WIDE = [
    Attempt("types into the terminal (TIOCSTI)", """
        os.setsid()
        terminal = os.open(TERMINAL, os.O_RDWR)
        for letter in NAME: fcntl.ioctl(terminal, 0x5412, letter.encode())""", mac=(WRITE, "/dev/ttys001")),
    Attempt("writes to the terminal", "os.write(os.open(TERMINAL, os.O_WRONLY | os.O_NOCTTY), NAME.encode())",
            mac=(WRITE, "/dev/ttys001")),
    Attempt("opens /dev/tty", "open('/dev/tty').fileno(); did()", mac=(WRITE, "/dev/tty"), control=False),
    Attempt("changes a setting of the kernel", "open('/proc/sys/vm/swappiness', 'r+').fileno(); did()",
            mac=("sysctl-write", ""), control=ROOT),
    Attempt("presses SysRq", "os.open('/proc/sysrq-trigger', os.O_WRONLY); did()", control=False),
    Attempt("writes to /sys", "os.open('/sys/kernel/mm/transparent_hugepage/enabled', os.O_WRONLY); did()",
            control=ROOT),
    Attempt("reads the kernel's log", "check(libc.klogctl(3, ctypes.create_string_buffer(99), 99)); did()",
            control=ROOT),
    Attempt("opens a device (/dev/kmsg)", "os.open('/dev/kmsg', os.O_WRONLY); did()", control=ROOT),
    Attempt("sets the clock", "time.clock_settime(time.CLOCK_REALTIME, time.time()); did()",
            mac=("system-set-time", ""), control=False),
    Attempt("changes the computer's name", "socket.sethostname(socket.gethostname()); did()", control=False),
    Attempt("opens files by io_uring", "check(call('io_uring_setup', 4, ctypes.create_string_buffer(200))); did()"),
]  # fmt: skip

# Left in the run folder for the loop and its scorer, which have no sandbox. They must not run IMPORTED.
LEFT = [
    Attempt("a link where the loop writes train.py", "os.symlink(HOME + '/file', f'.train.py.{LOOP}.tmp')"),
    Attempt("a link where the loop writes its settings", "os.symlink(HOME + '/file', f'.settings.json.{LOOP}.tmp')"),
    Attempt("FIFOs where the scorer writes", "for n in range(LOOP, LOOP + 500): os.mkfifo(f'.score.json.{n}.tmp')"),
    Attempt("a link as the record of training", "os.symlink(HOME + '/file', 'train.json')"),
    Attempt("a FIFO as the list of steps", "os.mkfifo('steps.jsonl')"),
    Attempt("a folder as train.py", "os.unlink('train.py'); os.makedirs('train.py/x')"),
    Attempt("a folder as the settings", "os.makedirs('settings.json/x')"),
    Attempt("a folder as the score", "os.makedirs('score.json/x')"),
    Attempt("a link as the result", "os.symlink(HOME + '/file', 'result.json')"),
    Attempt("a link as the model's folder", "os.symlink(HOME, 'score')"),
    Attempt("a link as the model's output", "os.symlink(HOME + '/file', 'score.log')"),
    Attempt("a link to a secret as its own output", "os.unlink('run.log'); os.symlink(HOME + '/file', 'run.log')"),
    Attempt("a package with the name of the laboratory's",
            "os.mkdir('lab'); open('lab/__init__.py', 'w').write(IMPORTED)"),
    Attempt("a module with the name of numpy", "open('numpy.py', 'w').write(IMPORTED)"),
    Attempt("a module that Python imports at its start", "open('sitecustomize.py', 'w').write(IMPORTED)"),
    Attempt("a module that Python imports for the user", """
        os.makedirs(packages := site.getusersitepackages())
        open(packages + '/usercustomize.py', 'w').write(IMPORTED)"""),
    Attempt("folders 1,500 deep", """
        here = os.getcwd()
        for _ in range(1500): os.mkdir('d'); os.chdir('d')
        os.chdir(here)"""),
    Attempt("a program that runs as the user (setuid)",
            "os.close(os.open('program', os.O_CREAT | os.O_WRONLY, 0o4755))"),
    Attempt("a folder that cannot be entered",
            "os.makedirs('closed/x/y'); os.chmod('closed/x', 0); os.chmod('closed', 0)"),
    Attempt("a run folder that cannot be entered", "os.chmod('.', 0)"),
]  # fmt: skip

CHECKPOINTS = {  # in place of the model's parameters; PATH is the file
    "a link to another file": "os.symlink('/etc/passwd', PATH)",
    "a FIFO": "os.mkfifo(PATH)",
    "a folder": "os.mkdir(PATH)",
    "a pickle that runs a program": "pickle = 'cos\\nsystem\\n(S\\'touch ' + PATH + '.ran\\'\\ntR.'\n"
    "open(PATH, 'w').write(pickle)",
}

# (program, how the run must end), with 20 MiB of disk, 1 MiB of output, 200 MiB of memory and 2 seconds.
RESOURCES = {
    "prints without end": ("while True: print('x' * 99999)", "output"),
    "a file without end": ("file = open('f', 'wb')\nwhile True: file.write(bytes(1 << 20))", "disk"),
    "a file with a hole of a terabyte": ("os.truncate(os.open('f', os.O_CREAT | os.O_WRONLY), 1 << 40)", "disk"),
    "10,000 empty files": ("for n in range(10_000): open(str(n), 'w').close()", "disk"),
    "deleted files": (
        "files = [open(f'f{n}', 'wb') for n in range(9)]; [os.unlink(f'f{n}') for n in range(9)]\n"
        "for file in files: file.write(bytes(5 << 20)); file.flush()\ntime.sleep(9)", "disk"),
    "files in memory": (
        "for n in range(9): os.write(os.memfd_create(str(n)), bytes(5 << 20))\ntime.sleep(9)", "disk"),
    "files too deep to look into": (
        "for _ in range(30): os.mkdir('d' * 200); os.chdir('d' * 200)\n"
        "for n in range(9): open(str(n), 'wb').write(bytes(5 << 20))", "disk"),
    "files in a folder that cannot be listed": (
        "os.mkdir('d', 0o300)\nfor n in range(9): open(f'd/{n}', 'wb').write(bytes(5 << 20))", "disk"),
    "memory of many children": (
        "for _ in range(8): os.fork() or (bytearray(b'x' * (40 << 20)), time.sleep(9))\ntime.sleep(9)", "memory"),
    "waits for ever, deaf to signals": ("signal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(9)", "timeout"),
    "100 detached processes": ("for _ in range(100): os.fork() or (os.setsid(), time.sleep(60))", "ok"),
    "a detached process that stops itself": ("os.fork() or (os.setsid(), os.kill(os.getpid(), 19))", "ok"),
}  # fmt: skip

ATTEMPTS = {
    "files": FILES,
    "network": NETWORK,
    "other processes": PROCESSES,
    "the machine and its terminal": MACHINE_WIDE,
}
