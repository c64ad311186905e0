"""The process above a trusted command, such as a coding CLI: no sandbox and no limits, but nothing it started stays.

It ends the command and all its descendants when the command exits or when its own standard input closes, which also
happens when the loop dies. On Linux it adopts what detaches itself (setsid, double fork, nohup), so nothing escapes.
On macOS a process that leaves both its parent and its process group within INTERVAL is missed. Killed itself, it takes
the command with it (Linux), but not what the command had started. Servers that were running before are not descendants
and stay; so does what another service starts on request (cron, systemd-run, docker, a tmux server).
"""

import os
import select
import subprocess
import sys
from functools import partial

from lab.machine import processes
from lab.trial.child import die_with_parent

INTERVAL = 0.25  # seconds between two looks at the descendants


def supervise(grace: str, *command: str) -> None:
    """Run `command`; give its descendants `grace` seconds between SIGTERM and SIGKILL. Exits with its status, as a
    shell does: 128 + signal."""
    processes.adopt_orphans()
    bound = partial(die_with_parent, os.getpid())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=bound)
    tree = processes.Tree(child)
    while child.poll() is None and not select.select([0], [], [], INTERVAL)[0]:
        tree.members()  # remembers them: on macOS a later look cannot find those that detached
    tree.end(float(grace))
    sys.exit(child.wait() if child.returncode >= 0 else 128 - child.returncode)
