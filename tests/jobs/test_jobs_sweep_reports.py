"""A sweeper tells whoever counts."""

import asyncio

from job_samples import make_job
from oasst_jobs import QueueClient, Submitter, Sweeper, SweepReport


async def test_a_running_sweeper_tells_what_it_did(submitter: Submitter, client: QueueClient) -> None:
    await submitter.submit(make_job("late"), digest=b"digest", timeout_ms=1)
    reports: asyncio.Queue[SweepReport] = asyncio.Queue()
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(Sweeper(client, interval_s=0.01, on_sweep=reports.put_nowait).run())
        while await reports.get() != SweepReport(expired=1):
            pass
        running.cancel()
