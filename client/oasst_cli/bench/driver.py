"""Sends a load and records what happens to each request."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from random import Random

from oasst_client import APIError, AsyncClient, ChatOptions, Delta, Finished, OasstError, Usage

from oasst_cli.bench.arrivals import ClosedLoad, Load, OpenLoad
from oasst_cli.bench.measurement import Distribution, Overhead, RequestRecord
from oasst_cli.bench.workload import Request

__all__ = ["run_load"]

_LOOP_CHECK_S = 0.01

# Sends a request that is due at this time, and records what happens to it.
_Send = Callable[[Request, float], Coroutine[None, None, None]]


async def run_load(
    client: AsyncClient,
    load: Load,
    requests: Sequence[Request],
    options: ChatOptions,
    *,
    random: Random,
    on_record: Callable[[RequestRecord], None],
) -> tuple[list[RequestRecord], Overhead]:
    """Every request was sent and has ended; what happened to each, and what the sending itself took.

    `options` are for all requests; what a request asks for itself comes on top.
    """
    records: list[RequestRecord] = []
    loop_delays_s: list[float] = []
    start_s = time.perf_counter()
    cpu_start_s = time.process_time()

    async def send(request: Request, due_s: float) -> None:
        together: ChatOptions = {**options, **request.options}
        record = await _send(client, request, together, start_s, due_s)
        records.append(record)
        on_record(record)

    watch = asyncio.create_task(_watch_loop(loop_delays_s))
    try:
        if isinstance(load, OpenLoad):
            await _send_when_due(load, requests, send, start_s, random)
        else:
            await _keep_busy(load, requests, send, start_s)
    finally:
        watch.cancel()
    cpu_s = time.process_time() - cpu_start_s
    num_tokens = sum(record.num_tokens for record in records)
    send_delays = Distribution.of([record.sent_s - record.due_s for record in records])
    loop_delays = Distribution.of(loop_delays_s)
    return records, Overhead(
        cpu_share=cpu_s / (time.perf_counter() - start_s),
        cpu_s_per_token=cpu_s / max(1, num_tokens),
        send_delay_p99_s=send_delays.p99 if send_delays else 0.0,
        loop_delay_p99_s=loop_delays.p99 if loop_delays else 0.0,
    )


async def _send_when_due(
    load: OpenLoad, requests: Sequence[Request], send: _Send, start_s: float, random: Random
) -> None:
    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(requests, load.due_times_s(random), strict=False):
            await asyncio.sleep(max(0.0, start_s + due_s - time.perf_counter()))
            group.create_task(send(request, due_s))


async def _keep_busy(load: ClosedLoad, requests: Sequence[Request], send: _Send, start_s: float) -> None:
    waiting = iter(requests)

    async def call_again_and_again() -> None:
        for request in waiting:
            await send(request, time.perf_counter() - start_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(call_again_and_again())


async def _send(
    client: AsyncClient, request: Request, options: ChatOptions, start_s: float, due_s: float
) -> RequestRecord:
    """One request from its sending to its end, however it ends."""
    delta_times_s: list[float] = []
    delta_tokens: list[int] = []
    usage, queue_s, error = Usage(), 0.0, ""
    sent_s = time.perf_counter() - start_s
    try:
        async with client.stream(request.messages, token_ids=request.token_ids, **options) as stream:
            async for event in stream.events():
                if isinstance(event, Delta) and event.token_ids:
                    delta_times_s.append(time.perf_counter() - start_s)
                    delta_tokens.append(len(event.token_ids))
                elif isinstance(event, Finished):
                    usage, queue_s = event.usage, event.timings.queue_s
    except APIError as failure:
        error = failure.reason or failure.code
    except OasstError as failure:
        error = type(failure).__name__
    return RequestRecord(
        due_s=due_s,
        sent_s=sent_s,
        ended_s=time.perf_counter() - start_s,
        delta_times_s=tuple(delta_times_s),
        delta_tokens=tuple(delta_tokens),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        queue_s=queue_s,
        error=error,
    )


async def _watch_loop(delays_s: list[float]) -> None:
    """Until cancelled, `delays_s` gets how late the event loop wakes a sleeper."""
    while True:
        before_s = time.perf_counter()
        await asyncio.sleep(_LOOP_CHECK_S)
        delays_s.append(time.perf_counter() - before_s - _LOOP_CHECK_S)
