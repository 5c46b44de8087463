"""One worker, from its parts: what starts first stops last."""

import asyncio
import json
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from oasst_jobs import Claimer, OtherShardsError, QueueClient, QueueUnavailableError, Reconciler, Sweeper, connect
from oasst_telemetry import Tracer
from prometheus_client import CollectorRegistry

from oasst_worker.consumer import Consumer
from oasst_worker.health import WorkerHealth
from oasst_worker.heartbeat import beat
from oasst_worker.loop import EngineLoop, StepWatchdog
from oasst_worker.metrics import WorkerMetrics
from oasst_worker.settings import WorkerSettings

if TYPE_CHECKING:  # A type alone: it brings PyTorch with it.
    from oasst_worker.served_model import ServedModel

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_QUEUE_RETRY_S = 0.5


class Worker:
    """A loaded model that serves the queue's jobs."""

    def __init__(
        self,
        settings: WorkerSettings,
        model: "ServedModel",
        registry: CollectorRegistry,
        health: WorkerHealth,
        tracer: Tracer,
    ) -> None:
        self._settings = settings
        self._model = model
        self._health = health
        self._tracer = tracer
        self._metrics = WorkerMetrics(registry)
        self._loop = EngineLoop(model.engine, max_steps_ahead=settings.max_steps_ahead)
        self._watchdog = StepWatchdog(floor_s=settings.step_limit_s)

    async def serve(self, *, metrics_address: str) -> None:
        """Serves until asked to stop by SIGTERM or SIGINT, and drained. The second signal ends the drain.

        Raises:
            QueueUnavailableError: if the queue does not answer at the start.
            BaseExceptionGroup: if a part failed; EngineStalledError is one of the reasons.
        """
        settings = self._settings
        async with AsyncExitStack() as stack:
            redis = connect(settings.redis_url, num_shards=settings.queue_shards)
            stack.push_async_callback(redis.aclose)
            client = QueueClient(redis, num_shards=settings.queue_shards)
            claimer = Claimer(
                client,
                worker_id=settings.worker_id,
                model=self._model.name,
                lease_ms=round(settings.lease_s * 1000),
            )
            consumer = Consumer(
                claimer,
                self._loop,
                self._model.intake,
                self._metrics,
                self._watchdog,
                self._tracer,
                lease_s=settings.lease_s,
            )
            failures = self._metrics.loop_failures.labels
            sweeper = Sweeper(client, on_sweep=self._metrics.record_sweep, on_defect=failures("sweeper").inc)
            reconciler = Reconciler(client, on_defect=failures("reconciler").inc)
            self._stop_on_signals(consumer)
            await self._wait_for_queue(client, consumer)
            async with asyncio.TaskGroup() as tasks:
                companions = [
                    tasks.create_task(sweeper.run(), name="sweep"),
                    tasks.create_task(reconciler.run(), name="reconcile"),
                    tasks.create_task(self._watch(consumer, reconciler), name="watch"),
                    tasks.create_task(self._await_engine(), name="engine"),
                    tasks.create_task(self._await_loss_of_rank(), name="ranks"),
                    tasks.create_task(
                        beat(claimer, consumer, self._loop, worker_id=settings.worker_id, model=self._model.name),
                        name="heartbeat",
                    ),
                ]
                self._health.record_readiness(_why_unready(consumer))  # Whoever reads that it serves may ask at once.
                self._announce(metrics_address)
                await consumer.run()
                for companion in companions:
                    companion.cancel()

    def join_engine(self, timeout_s: float) -> bool:
        """Waits for the engine's thread to end, and ends the ranks it led; False if it is stuck in a step."""
        has_ended = self._loop.join(timeout_s)
        ranks = self._model.ranks
        if ranks is not None:
            if not has_ended:  # It may be stuck in telling them, with their pipes locked.
                ranks.kill()
            ranks.close()
        return has_ended

    def _stop_on_signals(self, consumer: Consumer) -> None:
        def stop() -> None:
            logger.info("asked to stop")
            consumer.drain(0 if consumer.is_draining else self._settings.drain_s)

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)

    async def _wait_for_queue(self, client: QueueClient, consumer: Consumer) -> None:
        """The queue has answered, or the worker was asked to stop before."""
        give_up_s = time.monotonic() + self._settings.redis_wait_s
        is_first_try = True
        while not consumer.is_draining:
            try:
                await client.check_server()
            except (QueueUnavailableError, OtherShardsError) as error:  # A gateway that starts may change the number.
                if time.monotonic() > give_up_s:
                    raise
                if is_first_try:
                    logger.warning("queue away, waiting for it error=%s", error)
                is_first_try = False
                await asyncio.sleep(_QUEUE_RETRY_S)
            else:
                return

    async def _watch(self, consumer: Consumer, reconciler: Reconciler) -> None:
        """Health and gauges show how the worker does; a step that does not end ends this with EngineStalledError."""
        num_repairs = 0
        while True:
            self._watchdog.observe(self._loop.step_in_progress, time.monotonic())
            self._health.record_progress(step_stuck_s=self._watchdog.stuck_s, step_limit_s=self._watchdog.limit_s)
            self._health.record_readiness(_why_unready(consumer))
            self._metrics.record_load(
                self._loop.load, max_sequences=self._loop.max_sequences, kv_tokens_total=self._loop.kv_tokens_total
            )
            self._metrics.reconcile_repairs.inc(reconciler.num_repairs - num_repairs)
            num_repairs = reconciler.num_repairs
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def _await_engine(self) -> None:
        """Ends with the engine's thread, and with its error."""
        await asyncio.wrap_future(self._loop.ended)

    async def _await_loss_of_rank(self) -> None:
        """Fails when another process of a split model has ended."""
        if self._model.ranks is not None:
            await asyncio.wrap_future(self._model.ranks.lost)

    def _announce(self, metrics_address: str) -> None:
        event = {"event": "serving", "role": "worker", "id": self._settings.worker_id, "metrics": metrics_address}
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def _why_unready(consumer: Consumer) -> str | None:
    if consumer.is_draining:
        return "draining"
    return None if consumer.queue_is_reachable else "the queue is away"
