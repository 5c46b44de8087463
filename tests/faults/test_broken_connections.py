"""A connection that the network broke is replaced, whatever event loop a process runs on."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from link import Link, linked
from oasst_jobs import QueueClient, connect
from valkey_server import ValkeyServer


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
async def test_calls_go_on_over_connections_that_were_reset(
    valkey: ValkeyServer, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async with linked(valkey.url.removeprefix("unix://")) as link:
        await asyncio.to_thread(_call_over_resets, link, asyncio.get_running_loop(), new_loop)


def _call_over_resets(
    link: Link, loop_of_link: asyncio.AbstractEventLoop, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def call_over_resets() -> None:
        redis = connect(f"redis://{link.address}/0")
        client = QueueClient(redis)
        for _ in range(5):
            await asyncio.gather(*(client.load("tiny") for _ in range(4)))
            loop_of_link.call_soon_threadsafe(link.reset)
            await asyncio.sleep(0.02)  # The loop hears of the RST.
        await redis.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(call_over_resets())
