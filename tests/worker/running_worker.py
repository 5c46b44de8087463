"""A consumer between a real queue and a scripted engine, in the test's own process."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from oasst_jobs import ClaimedJob, Claimer, PushItem, PushStatus, QueueClient
from oasst_telemetry import NO_TRACER
from oasst_worker.consumer import Consumer
from oasst_worker.loop import EngineLoop, StepWatchdog
from oasst_worker.metrics import WorkerMetrics
from prometheus_client import CollectorRegistry
from scripted_worker import MODEL, ScriptedExecutor, make_engine, make_intake

__all__ = ["RunningWorker"]


class WatchedClaimer(Claimer):
    """Remembers what it was asked, and can be kept from pushing."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.push_sizes: list[int] = []
        self.is_claiming = False
        self.may_push = asyncio.Event()
        self.may_push.set()

    async def claim(self, **room) -> list[ClaimedJob]:
        self.is_claiming = True
        claimed = await super().claim(**room)
        self.is_claiming = False
        return claimed

    async def push(self, items: Sequence[PushItem]) -> list[PushStatus]:
        await self.may_push.wait()
        self.push_sizes.append(len(items))
        return await super().push(items)


# In the queue. None lapses by itself while a test runs; `Queue.lose_lease` takes one away.
_LEASE_MS = 60_000


class RunningWorker:
    """A consumer on a scripted engine, as a task. It takes its leases for as long as `lease_s` on their `clock`."""

    def __init__(
        self,
        client: QueueClient,
        worker_id: str,
        *,
        kv_tokens: int = 4096,
        lease_s: float = _LEASE_MS / 1000,
        clock: Callable[[], float] = time.monotonic,
        **config,
    ) -> None:
        self.executor = ScriptedExecutor(num_blocks=kv_tokens // ScriptedExecutor.block_size)
        self.claimer = WatchedClaimer(client, worker_id=worker_id, model=MODEL, lease_ms=_LEASE_MS, clock=clock)
        self.loop = EngineLoop(make_engine(self.executor, **config), max_steps_ahead=8, clock=clock)
        self.registry = CollectorRegistry()
        intake = make_intake(kv_tokens)
        metrics = WorkerMetrics(self.registry)
        watchdog = StepWatchdog(floor_s=60)
        self.consumer = Consumer(
            self.claimer, self.loop, intake, metrics, watchdog, NO_TRACER, lease_s=lease_s, clock=clock
        )
        self.task = asyncio.create_task(self.consumer.run())

    @property
    def claimed(self) -> float:
        """Jobs claimed so far."""
        return self.registry.get_sample_value("oasst_worker_claimed_jobs_total") or 0

    @property
    def num_pushes(self) -> float:
        """Pushes that were answered."""
        return self.registry.get_sample_value("oasst_worker_push_seconds_count") or 0

    def jobs_by(self, outcome: str) -> float:
        return self.registry.get_sample_value("oasst_worker_jobs_total", {"outcome": outcome}) or 0

    def num_errors(self, operation: str) -> float:
        """Calls that the queue did not answer."""
        return self.registry.get_sample_value("oasst_worker_queue_errors_total", {"operation": operation}) or 0

    async def die(self) -> None:
        """The worker is gone without a word to the queue."""
        self.task.cancel()
        await asyncio.wait([self.task])
        self.executor.allow(math.inf)
        self.loop.stop()
        assert self.loop.join(timeout_s=10)
