"""One accepted request, as one RPC sees it: the events from its acceptance to its end."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import failpoints

from oasst_gateway.backlog import Backlog
from oasst_gateway.errors import ChatFailedError
from oasst_gateway.events import delta_events
from oasst_gateway.metrics import ChatMeter

__all__ = ["Chat"]

logger = logging.getLogger(__name__)


class Chat:
    """Follows a job until it ends."""

    def __init__(
        self,
        accepted: chat_pb2.Accepted,
        *,
        job_id: str,
        backlog: Backlog,
        meter: ChatMeter,
        ask_queue: Callable[[], Awaitable[chat_pb2.QueueStatus | None]],
        ask_interval_s: float,
    ) -> None:
        """`ask_queue` tells where the job stands; None if it does not wait, or that cannot be told now."""
        self._accepted = accepted
        self._job_id = job_id
        self._backlog = backlog
        self._meter = meter
        self._ask_queue = ask_queue
        self._ask_interval_s = ask_interval_s
        self.has_ended = False  # Nothing more comes; there is nothing left to cancel.

    async def events(self) -> AsyncIterator[chat_pb2.ChatEvent]:
        """`accepted`, where the job stands as long as it waits, deltas as they come, then `finished`.

        Raises:
            ChatFailedError: after a `failed` event, if the job ended otherwise.
        """
        yield chat_pb2.ChatEvent(accepted=self._accepted)
        position = 0
        while not self.has_ended:
            news = await self._backlog.take(self._ask_interval_s if position == 0 else None)
            if news is None:
                queue_status = await self._ask_queue()
                if queue_status is not None:
                    yield chat_pb2.ChatEvent(waiting=queue_status)
                continue
            if news.entries:
                for event in delta_events(news.entries, position=position):
                    self._meter.saw_delta(event.delta)
                    failpoints.reach("gateway.sending")
                    yield event
                position = news.entries[-1].end_position
            if news.outcome is not None:
                self.has_ended = True
                yield self._end(news.outcome, position)
                if news.outcome.HasField("failed"):
                    raise ChatFailedError(news.outcome.failed)

    def _end(self, outcome: job_pb2.Outcome, position: int) -> chat_pb2.ChatEvent:
        elapsed_s = self._meter.elapsed_s()
        if outcome.HasField("finished"):
            self._meter.saw_finished(outcome.finished)
            logger.info("finished job_id=%s tokens=%d elapsed_s=%.3f", self._job_id, position, elapsed_s)
            return chat_pb2.ChatEvent(next_position=position, finished=outcome.finished)
        failed = outcome.failed
        logger.info(
            "failed job_id=%s tokens=%d elapsed_s=%.3f code=%d reason=%s",
            self._job_id,
            position,
            elapsed_s,
            failed.code,
            failed.reason,
        )
        return chat_pb2.ChatEvent(next_position=position, failed=failed)
