"""How the worker is: alive while its steps end, ready while jobs are claimed."""

import time
from collections.abc import Callable

from oasst_telemetry import Check

__all__ = ["WorkerHealth"]


class WorkerHealth:
    """What the worker's parts last told of themselves. Written by the event loop, read by any thread."""

    def __init__(self, *, silence_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """After `silence_limit_s` without a sign of the event loop the worker does not count as alive any more."""
        self._silence_limit_s = silence_limit_s
        self._clock = clock
        self._seen_s: float | None = None
        self._step_stuck_s = 0.0
        self._step_limit_s = float("inf")
        self._unready: str | None = "starting"

    def record_progress(self, *, step_stuck_s: float, step_limit_s: float) -> None:
        """The event loop runs; the engine's step has been in progress for this long."""
        self._step_stuck_s, self._step_limit_s = step_stuck_s, step_limit_s
        self._seen_s = self._clock()

    def record_readiness(self, unready: str | None) -> None:
        """Jobs are claimed if `unready` is None; otherwise it says why not."""
        self._unready = unready

    def liveness(self) -> Check:
        if self._seen_s is None:
            return Check(True, "starting")
        silent_s = self._clock() - self._seen_s
        if silent_s > self._silence_limit_s:
            return Check(False, f"the event loop has been silent for {silent_s:.1f} s")
        if self._step_stuck_s > self._step_limit_s:
            return Check(False, f"a step has been in progress for {self._step_stuck_s:.1f} s")
        return Check(True, "in progress")

    def readiness(self) -> Check:
        alive = self.liveness()
        if not alive.ok:
            return alive
        return Check(True, "serving") if self._unready is None else Check(False, self._unready)
