"""What has come for a chat and was not sent yet, so that a caller who falls behind is sent it in one piece."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from oasst.jobs.v1 import job_pb2

__all__ = ["Backlog", "News"]


@dataclass(frozen=True, slots=True)
class News:
    """Everything that came since the last look, in order: log entries, then perhaps how the job ended."""

    entries: list[job_pb2.LogEntry]
    outcome: job_pb2.Outcome | None


class Backlog:
    """Reads a subscription ahead of its one reader."""

    def __init__(self, subscription: AsyncIterator[job_pb2.LogEntry | job_pb2.Outcome]) -> None:
        self._subscription = subscription
        self._entries: list[job_pb2.LogEntry] = []
        self._outcome: job_pb2.Outcome | None = None
        self._error: Exception | None = None
        self._has_news = asyncio.Event()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator["Backlog"]:
        """The subscription is read as long as the context is open."""
        reader = asyncio.create_task(self._read())
        try:
            yield self
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def take(self, timeout_s: float | None) -> News | None:
        """What came since the last call, waiting for some; None if nothing came within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_news.wait()
        except TimeoutError:
            return None
        if self._error is not None:
            raise self._error
        self._has_news.clear()
        news = News(self._entries, self._outcome)
        self._entries = []
        return news

    async def _read(self) -> None:
        try:
            async for item in self._subscription:
                if isinstance(item, job_pb2.LogEntry):
                    self._entries.append(item)
                else:
                    self._outcome = item
                self._has_news.set()
        except Exception as error:  # Raised where it is heard: in `take`.
            self._error = error
            self._has_news.set()
