"""Data-parallel training: several processes on this machine, or several Macs through `mlx.launch`.

Every rank holds the whole model and takes its share of each step's rows; gradients are averaged over the ring, so all
ranks stay equal. Rank 0 keeps the time, writes the records and is scored; the others only compute. A single process is
rank 0 of a group of one, and sends nothing.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from lab import quota
from lab.errors import INTERRUPTED
from lab.trial.child import die_with_parent, interrupts_left_to_child

POLL_SECONDS = 0.05
GRACE_SECONDS = 0.5
PIECE = 2**17  # numbers per message: 512 KB; on loopback one of 1 MB takes 7 to 12 ms, two of 512 KB under 1 ms
LAST_SECONDS = 60.0  # that the other ranks may take to end after rank 0
LOST_PEER = 75  # exit status of a rank that ended because another one had ended
PARENT = "AUTORESEARCH_PARENT"  # id of the process that launched the ranks of this machine


def launched() -> bool:
    """Whether this process is a rank that `launch` or `mlx.launch` started."""
    return "MLX_RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("MLX_RANK", "0"))


@cache
def size() -> int:
    """Number of ranks. The first call joins the group."""
    from lab.machine.backend import mx

    if parent := os.environ.get(PARENT):
        die_with_parent(int(parent))
    return mx.distributed.init(strict=True, backend="ring").size() if launched() else 1


def lost_peer(error: RuntimeError) -> bool:
    """Whether this is MLX's error for a neighbour in the ring that has ended."""
    return launched() and str(error).startswith("[ring]")


def average(loss: Any, gradients: Any) -> tuple[Any, Any]:
    """Mean over the ranks, of a scalar and of a tree of arrays."""
    from lab.machine.backend import tree_flatten, tree_unflatten

    if size() == 1:
        return loss, gradients
    names, leaves = zip(*tree_flatten((loss, gradients)), strict=True)
    means = [total / size() for total in _all_sum(leaves)]
    loss, gradients = tree_unflatten(list(zip(names, means, strict=True)))
    return loss, gradients


def in_shares(function: Callable[[Any], Any], stacks: list[Any]) -> list[Any]:
    """function(stack) of each (N, R, C) stack, for a function that treats each matrix separately: every rank computes
    its share of every stack and gets the whole result."""
    from lab.machine.backend import mx

    if size() == 1:
        return [function(stack) for stack in stacks]
    shares = []
    for stack in stacks:
        first, last = (len(stack) * number // size() for number in (rank(), rank() + 1))
        share = [function(stack[first:last])] if last > first else []
        before, after = (mx.zeros((count, *stack.shape[1:])) for count in (first, len(stack) - last))
        shares.append(mx.concatenate([before, *share, after]))
    return _all_sum(shares)


def _all_sum(arrays: Sequence[Any]) -> list[Any]:
    """Each of these arrays, summed over the ranks in float32: sent as one vector, in pieces.

    The calls of a step must depend on each other. MLX orders independent operations by the shape of the graph, which
    differs between ranks, so that pieces that do not belong together would be summed."""
    from lab.machine.backend import mx

    vector = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])
    pieces = mx.split(vector, range(PIECE, vector.size, PIECE))
    total = mx.concatenate([mx.distributed.all_sum(piece) for piece in pieces])
    parts = mx.split(total, list(accumulate(array.size for array in arrays[:-1])))
    return [part.reshape(array.shape).astype(array.dtype) for part, array in zip(parts, arrays, strict=True)]


def from_rank_0(value: float) -> float:
    """The value that rank 0 passed. Every rank has to call this."""
    from lab.machine.backend import mx

    if size() == 1:
        return value
    return mx.distributed.all_sum(mx.array(value if rank() == 0 else 0.0)).item()


def launch(processes: int) -> int:
    """Run this command line as `processes` ranks on this machine, each on its own cores. Returns the exit status.

    A rank that fails ends the others and is named in the error."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = min(len(cores), quota.cores()) // processes
    ranks: list[subprocess.Popen] = []
    with interrupts_left_to_child(), tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in _free_ports(processes)], hosts)
        hosts.flush()
        try:
            for number in range(processes):
                env = os.environ | {"MLX_RANK": str(number), "MLX_HOSTFILE": hosts.name, PARENT: str(os.getpid())}
                if share:
                    os.sched_setaffinity(0, cores[number * share : (number + 1) * share])  # inherited
                ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=env))
            return _watch(ranks)
        finally:
            if share:
                os.sched_setaffinity(0, cores)
            for process in ranks:
                process.kill()
                process.wait()


def _watch(ranks: list[subprocess.Popen]) -> int:
    """Wait for all ranks to end. Returns 0, or the exit status of a failure."""
    deadline = None
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks):
            time.sleep(GRACE_SECONDS)  # a rank that lost a neighbour may end before the rank that caused it
            break
        if ranks[0].returncode == 0:
            deadline = deadline or time.monotonic() + LAST_SECONDS
            if time.monotonic() > deadline:
                break
        time.sleep(POLL_SECONDS)
    statuses = {number: process.poll() for number, process in enumerate(ranks)}
    failed = {number: status for number, status in statuses.items() if status != 0}
    failed = {number: status for number, status in failed.items() if status != LOST_PEER} or failed
    killed = {number: status for number, status in failed.items() if status is not None and status < 0}
    for number, status in (killed or failed).items():
        if status != INTERRUPTED and (number or killed):  # rank 0 prints its own error
            print(f"error: process {number} of {len(ranks)} {_failure(status)}", file=sys.stderr)
    return max((128 - status if status and status < 0 else status or 1 for status in failed.values()), default=0)


def _failure(status: int | None) -> str:
    if status is None:
        return "did not end; run again"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}; free memory if it ran out, then run again"
    return f"failed with exit status {status}; its error is above"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
