"""Upkeep: what a dead worker held waits again, and what nobody answered in time expires."""

import asyncio
import logging
from collections.abc import Callable

from oasst_jobs.client import QueueClient
from oasst_jobs.errors import QueueUnavailableError
from oasst_jobs.functions import Shard
from oasst_jobs.records import SweepReport

__all__ = ["Sweeper"]

_log = logging.getLogger(__name__)


class Sweeper:
    """Sweeps each shard again and again.

    Any number of processes may; each sweep is one atomic call that can be repeated.

    When no sweep has run for `stall_s`, Redis or every process was halted, and live workers could not renew their
    leases either. The next sweep then extends all leases once instead of taking live workers' jobs away.
    """

    def __init__(
        self,
        client: QueueClient,
        *,
        interval_s: float = 1.0,
        stall_s: float = 2.0,
        on_sweep: Callable[[SweepReport], object] = lambda report: None,
        on_defect: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_sweep` is told of every sweep of `run`, `on_defect` of each error that is no state of the queue."""
        if not 0 < interval_s < stall_s:
            raise ValueError(f"sweeps every {interval_s} s would look like a stall of {stall_s} s each time")
        self._client = client
        self._interval_s = interval_s
        self._stall_ms = round(stall_s * 1000)
        self._on_sweep = on_sweep
        self._on_defect = on_defect

    async def run(self) -> None:
        """Sweeps until cancelled; a shard that is unavailable is tried again at its next turn."""
        async with asyncio.TaskGroup() as tasks:
            for shard in self._client.shards:
                tasks.create_task(self._keep_swept(shard))

    async def sweep(self) -> SweepReport:
        """Everything that is due now is done: leases taken back, deadlines enforced."""
        return sum(await self._client.on_each_shard(self._sweep_shard), start=SweepReport())

    async def _keep_swept(self, shard: Shard) -> None:
        while True:
            try:
                report = await self._sweep_shard(shard)
            except QueueUnavailableError as error:
                _log.warning("sweep skipped shard=%d reason=%s", shard.keys.shard, error.reason)
            except Exception:
                _log.exception("sweep failed shard=%d", shard.keys.shard)
                self._on_defect()
            else:
                self._on_sweep(report)
                if report != SweepReport():
                    _log.info("swept %s", report)
            await asyncio.sleep(self._interval_s)

    async def _sweep_shard(self, shard: Shard) -> SweepReport:
        report, is_cut_off = await shard.sweep(stall_ms=self._stall_ms)
        while is_cut_off:
            part, is_cut_off = await shard.sweep(stall_ms=self._stall_ms)
            report += part
        return report
