"""The speed of the machine during a run on the CPU, measured from outside the run.

Other programs take CPU time from a run, and they and heat make every operation slower. The kernel accounts for the
first (Linux). The second shows in the CPU time of a matrix product that a thread computes every few seconds meanwhile,
with a thousandth of one core. docs/LOOP.md says how well the two together predict the number of tokens.
"""

import os
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Self

import numpy as np
from threadpoolctl import ThreadpoolController

from lab import quota
from lab.machine import hardware

SECONDS = 4.0  # between two products
SIZE = 512  # of its matrices: 3 MB, larger than a core's own cache
ACCOUNTS = Path("/proc/stat")
BUSY = (1, 2, 3, 6, 7, 8)  # columns of it: user, nice, system, irq, softirq, steal


class Watch:
    """`with Watch() as watch:` around a run."""

    def __enter__(self) -> Self:
        self.times, self.stop = [], threading.Event()
        self.began, self.busy, self.own = time.monotonic(), busy_seconds(), time.process_time()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        a = np.ones((SIZE, SIZE), np.float32)
        with ThreadpoolController().limit(limits=1):
            while not self.stop.wait(SECONDS):
                began = time.thread_time()
                a @ a
                self.times.append(time.thread_time() - began)

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.seconds = time.monotonic() - self.began
        self.busy, self.own = busy_seconds() - self.busy, time.process_time() - self.own

    def speed(self, cpu_seconds: float) -> float | None:
        """GFLOP/s of one core, times the share of all cores that other programs left. `cpu_seconds`: what the run used.
        None for a run that was too short."""
        if not self.times:
            return None
        taken = max(0.0, self.busy - self.own - cpu_seconds) / (self.seconds * quota.cpus())
        return 2e-9 * SIZE**3 / fmean(self.times) * max(0.0, 1 - taken) or None


def supported() -> bool:
    return hardware.describe()["backend"] == "cpu" and ACCOUNTS.is_file()


def busy_seconds(accounts: str | None = None) -> float:
    """CPU seconds that the cores of this process have been busy since boot, or taken by a hypervisor."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in (accounts or ACCOUNTS.read_text(encoding="utf-8")).splitlines()]
    return sum(int(line[i]) for line in lines if line[0] in cores for i in BUSY) / os.sysconf("SC_CLK_TCK")
