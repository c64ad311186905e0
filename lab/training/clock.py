"""The time budget, outside the experiment.

`for step in clock` runs until the budget is spent. The first WARMUP_STEPS steps, in which kernels are compiled and
caches filled, are not billed, up to WARMUP_SECONDS in total. The clock stops while the machine sleeps; the time slept
is recorded, so that such a run can be repeated. In data-parallel training rank 0's time counts: it is sent to all ranks
before every step, so that they use the same rates and end together.
"""

import time
from collections.abc import Callable, Iterator

from lab.errors import UserError
from lab.machine.hardware import seconds_with_sleep

WARMUP_STEPS = 2  # the first step compiles; with one step in flight the second still waits for it
# Unbilled at most. For NVIDIA GPUs MLX compiles some 50 kernels at their first use, 3 to 4 s each on an H100's machine.
WARMUP_SECONDS = {"cpu": 45.0, "metal": 45.0, "cuda": 900.0}


class Clock:
    """`minutes` of training, or exactly `steps` steps when given (`minutes` is then ignored)."""

    def __init__(self, minutes: float, steps: int | None = None, agree: Callable[[float], float] | None = None):
        """`agree` maps this process's seconds to those that all ranks use."""
        from lab.machine.backend import KIND  # slow to import

        self.agree, self._agreed = agree, 0.0
        self.unbilled = WARMUP_SECONDS[KIND]
        self.budget = minutes * 60  # seconds
        self.steps = steps
        self.step = 0  # steps handed out so far
        self.begun = 0.0
        self.billed_from = 0.0
        self._asleep_at_start = 0.0

    def __iter__(self) -> Iterator[int]:
        self.begun = self.billed_from = time.perf_counter()
        self._asleep_at_start = self._sleep_gap()
        while not self._spent():
            yield self.step
            self.step += 1
            if self.step <= WARMUP_STEPS:
                self.billed_from = min(time.perf_counter(), self.begun + self.unbilled)
        if not self.step:
            raise UserError(f"{self.budget / 60:g} minutes end before the first step; increase --minutes")

    @property
    def elapsed(self) -> float:
        """Billed seconds, 0 before the first step."""
        return time.perf_counter() - self.billed_from if self.begun else 0.0

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1: what schedules depend on."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        return min(1.0, (self._agreed if self.agree else self.elapsed) / self.budget)

    @property
    def remaining(self) -> float:
        """Billed seconds left; for a budget in steps, estimated from the speed so far."""
        if self.steps is not None:
            return self.elapsed / self.step * (self.steps - self.step) if self.step else 0.0
        return max(0.0, self.budget - self.elapsed)

    @property
    def slept(self) -> float:
        """Seconds that the machine has slept since the clock started."""
        return max(0.0, self._sleep_gap() - self._asleep_at_start)

    def _spent(self) -> bool:
        if self.agree:
            self._agreed = self.agree(self.elapsed)
        return self.step >= self.steps if self.steps is not None else self.progress >= 1

    @staticmethod
    def _sleep_gap() -> float:
        return seconds_with_sleep() - time.perf_counter()
