"""What becomes of a worker's speed when too much is asked for, with steps that take a given time."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

from oasst_client import AsyncClient, DeadlineExceededError, OverloadedError, RetryPolicy
from rich.table import Table

from bench.options import Measured, Options
from bench.services import MODEL, TimedService, steps_of, timed_service
from bench.turns import median_of

__all__ = ["GoodputRow", "goodput_table", "measure"]

# Multiples of what a worker of these steps can do.
_LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
_SEQUENCES = 16
_STEP_S = 0.02
_TOKENS = 64
_ARRIVALS_S = 15.0
# Twice the time that a request takes on an idle worker, and a second.
_TIMEOUT_S = 2 * _TOKENS * _STEP_S + 1


@dataclass(frozen=True)
class GoodputRow:
    """Medians of the rounds."""

    load: float
    requests: float
    refused: float
    late: float  # Accepted, and not done by their deadline.
    good_tokens_per_s: float  # Of requests done by their deadline, from the first arrival to the last end.
    worker_tokens_per_s: float  # With all places taken, by the mean seconds of its steps.
    share: float  # Of the first in the second.


def measure(options: Options) -> Measured:
    rows = [median_of([_measure(load) for _ in range(options.rounds)]) for load in _LOADS]
    return rows, [goodput_table(rows)]


def goodput_table(rows: list[GoodputRow]) -> Table:
    table = Table(title="Tokens per second of requests that were done by their deadline")
    for heading in ("load", "requests", "refused", "late", "good tokens/s", "of the worker's rate", "of the best"):
        table.add_column(heading, justify="right")
    best = max(row.good_tokens_per_s for row in rows)
    for row in rows:
        table.add_row(
            f"{row.load:g}x",
            f"{row.requests:.0f}",
            f"{row.refused:.0f}",
            f"{row.late:.0f}",
            f"{row.good_tokens_per_s:.0f}",
            f"{row.share:.2f}",
            f"{row.good_tokens_per_s / best:.2f}",
        )
    return table


def _measure(load: float) -> GoodputRow:
    """Requests at random times, all with the same time to be done in."""
    with timed_service(_SEQUENCES, _STEP_S) as service:
        return asyncio.run(_arrive(service, load))


async def _arrive(service: TimedService, load: float) -> GoodputRow:
    outcomes: Counter[str] = Counter()
    draw = random.Random(0)
    async with AsyncClient(service.address, retry=RetryPolicy(max_attempts=1)) as client:

        async def ask() -> None:
            try:
                await client.chat("Hello!", model=MODEL, max_new_tokens=_TOKENS, ignore_eos=True, timeout_s=_TIMEOUT_S)
                outcomes["good"] += 1
            except OverloadedError:
                outcomes["refused"] += 1
            except DeadlineExceededError:
                outcomes["late"] += 1

        # So that the gateway has seen how fast the worker is.
        await asyncio.gather(*(client.chat("Hello!", max_new_tokens=_TOKENS, ignore_eos=True) for _ in range(16)))
        await asyncio.sleep(1.5)
        before = steps_of(service.worker_metrics)
        rate = load * _SEQUENCES / _STEP_S / _TOKENS
        started_s = time.perf_counter()
        first_s = due_s = started_s + draw.expovariate(rate)
        async with asyncio.TaskGroup() as tasks:
            while due_s < started_s + _ARRIVALS_S:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                tasks.create_task(ask())
                due_s += draw.expovariate(rate)
        elapsed_s = time.perf_counter() - first_s
    num_steps, seconds = (now - then for now, then in zip(steps_of(service.worker_metrics), before, strict=True))
    good, own = outcomes["good"] * _TOKENS / elapsed_s, _SEQUENCES * num_steps / seconds
    return GoodputRow(load, outcomes.total(), outcomes["refused"], outcomes["late"], good, own, good / own)
