"""One accepted request, as one RPC sees it: the events from its acceptance to its end."""

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from google.rpc import code_pb2  # type: ignore[import-untyped]  # without stubs
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import STREAM_DIVERGED, failpoints

from oasst_gateway.errors import ChatFailedError
from oasst_gateway.events import IndivisibleDeltaError, StreamMessage, build_response, delta_events, entries_after
from oasst_gateway.metrics import ChatMeter
from oasst_gateway.offloading import TenantThreads, is_long
from oasst_gateway.spans import trace_of
from oasst_gateway.tenants import Tenant

__all__ = ["Chat", "NewsSource"]

logger = logging.getLogger(__name__)


class NewsSource(Protocol):
    """What a chat needs of a job's subscription."""

    async def take(self) -> list[job_pb2.LogEntry | job_pb2.Outcome]:
        """What came since the last time; may be nothing, after a call."""

    def call(self) -> None:
        """`take` returns."""

    def fail(self, failure: Exception) -> None:
        """`take` raises."""


@dataclass(frozen=True, slots=True)
class _News:
    """What came since the last look, in order: log entries, then perhaps how the job ended."""

    start_position: int
    entries: Sequence[job_pb2.LogEntry]
    outcome: job_pb2.Outcome | None

    @property
    def end_position(self) -> int:
        return self.entries[-1].end_position if self.entries else self.start_position


class Chat:
    """Follows a job from a position to its end."""

    def __init__(
        self,
        job: job_pb2.Job,
        accepted: chat_pb2.Accepted,
        *,
        source: NewsSource,
        meter: ChatMeter,
        threads: TenantThreads,
        tenant: Tenant,
        ask_queue: Callable[[], Awaitable[chat_pb2.QueueStatus | None]],
        after: int = 0,
    ) -> None:
        """`ask_queue` tells where the job stands; None if it does not wait, or that cannot be told now."""
        self._job = job
        self._accepted = accepted
        self._source = source
        self._meter = meter
        self._threads = threads
        self._tenant = tenant
        self._ask_queue = ask_queue
        self._position = after
        self._is_quiet = False  # Nothing came since the last `remind`.
        self.outcome: job_pb2.Outcome | None = None  # How the job ended, once it has.

    async def events(self) -> AsyncIterator[StreamMessage]:
        """`accepted`, where the job stands as long as it waits, deltas as they come, then `finished`.

        Raises:
            ChatFailedError: after a `failed` event, if the job ended otherwise.
        """
        yield chat_pb2.ChatEvent(next_position=self._position, accepted=self._accepted)
        async for news in self._follow():
            if isinstance(news, chat_pb2.QueueStatus):
                yield chat_pb2.ChatEvent(next_position=self._position, waiting=news)
                continue
            show = functools.partial(delta_events, news.entries, position=news.start_position)
            for event in await self._threads.run(self._tenant, show, off_loop=is_long(news.entries)):
                failpoints.reach("gateway.sending")
                yield event
            if news.outcome is not None:
                yield _last_event(news.outcome, news.end_position)
                _raise_if_failed(news.outcome)

    async def response(self) -> chat_pb2.ChatResponse:
        """The whole answer, once the job has finished.

        Raises:
            ChatFailedError: if it ended otherwise.
        """
        entries: list[job_pb2.LogEntry] = []
        finished = None
        async for news in self._follow():
            if isinstance(news, chat_pb2.QueueStatus):
                continue
            entries += news.entries
            if news.outcome is not None:
                _raise_if_failed(news.outcome)
                finished = news.outcome.finished
        build = functools.partial(
            build_response,
            self._accepted,
            entries,
            model=self._job.model,
            num_choices=self._job.n,
            finished=finished,
        )
        return await self._threads.run(self._tenant, build, off_loop=is_long(entries))

    def remind(self) -> None:
        """A chat that heard nothing since it was last reminded tells where its job stands."""
        if self._is_quiet:
            self._source.call()
        self._is_quiet = True

    def leave(self, reason: Exception) -> None:
        """The chat ends with `reason` once it has told what came; its job goes on."""
        self._source.fail(reason)

    async def _follow(self) -> AsyncIterator[_News | chat_pb2.QueueStatus]:
        """What is new of the job behind the chat's position, measured; where it stands while there is nothing."""
        while self.outcome is None:
            items = await self._source.take()
            if items:
                self._is_quiet = False
                news = self._read(items)
                self._measure(news)
                self.outcome = news.outcome
                yield news
                self._position = news.end_position
            elif (queue_status := await self._ask_queue()) is not None:
                yield queue_status

    def _read(self, items: list[job_pb2.LogEntry | job_pb2.Outcome]) -> _News:
        """The news without what lies before the chat's position."""
        outcome = items[-1] if isinstance(items[-1], job_pb2.Outcome) else None
        try:
            entries = entries_after([item for item in items if isinstance(item, job_pb2.LogEntry)], self._position)
        except IndivisibleDeltaError:
            # Only if Redis lost what this caller saw, and the log was written anew in other pieces.
            message = f"what is stored cannot be divided at position {self._position}"
            failed = chat_pb2.Failed(code=code_pb2.ABORTED, reason=STREAM_DIVERGED, message=message)
            entries, outcome = [], job_pb2.Outcome(failed=failed)
        return _News(self._position, entries, outcome)

    def _measure(self, news: _News) -> None:
        self._meter.saw_tokens(news.end_position - news.start_position)
        if news.outcome is None:
            return
        elapsed_s = self._meter.elapsed_s()
        log_fields = trace_of(self._job).log_fields
        if news.outcome.HasField("finished"):
            self._meter.saw_finished(news.outcome.finished)
            fields = (self._job.job_id, news.end_position, elapsed_s)
            logger.info("finished job_id=%s tokens=%d elapsed_s=%.3f", *fields, extra=log_fields)
        else:
            logger.info(
                "failed job_id=%s tokens=%d elapsed_s=%.3f code=%d reason=%s",
                self._job.job_id,
                news.end_position,
                elapsed_s,
                news.outcome.failed.code,
                news.outcome.failed.reason,
                extra=log_fields,
            )


def _last_event(outcome: job_pb2.Outcome, position: int) -> chat_pb2.ChatEvent:
    if outcome.HasField("finished"):
        return chat_pb2.ChatEvent(next_position=position, finished=outcome.finished)
    return chat_pb2.ChatEvent(next_position=position, failed=outcome.failed)


def _raise_if_failed(outcome: job_pb2.Outcome) -> None:
    if outcome.HasField("failed"):
        raise ChatFailedError(outcome.failed)
