"""Queues that do not answer, or not all of them."""

import asyncio
import time
from collections.abc import Callable

import redis.asyncio
import redis.exceptions

__all__ = ["FIRST_SHARD", "PartlyAway", "SlowlyLosingClaims"]


FIRST_SHARD = "oasst:{0}"


class PartlyAway(redis.asyncio.Redis):
    """Calls with a word that begins with `away` fail: the name of a function, or of a shard's keys.

    If they hang, they do so until they are `released`, and fail then.
    """

    away: str | None = None
    hangs = False

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.released = asyncio.Event()

    async def execute_command(self, *command: object, **options: object) -> object:
        if self.away is not None and any(str(word).startswith(self.away) for word in command):
            if self.hangs:
                await self.released.wait()
            raise redis.exceptions.ConnectionError("away")
        return await super().execute_command(*command, **options)


class SlowlyLosingClaims(redis.asyncio.Redis):
    """The answer to the first claim that brings a job does not come, which takes `silence_s` of its clock to notice."""

    silence_s = 0.0
    num_lost = 0
    on_loss: Callable[[], object] = staticmethod(lambda: None)

    def clock(self) -> float:
        return time.monotonic() + self.num_lost * self.silence_s

    async def execute_command(self, *command: object, **options: object) -> object:
        reply = await super().execute_command(*command, **options)
        if not self.num_lost and str(command[1]).startswith("oasst_claim") and reply[1]:
            self.num_lost += 1
            self.on_loss()
            raise redis.exceptions.TimeoutError("no answer")
        return reply
