"""Which jobs this gateway watches, told to the queue: a job that nobody watches any more begins its grace."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from oasst.jobs.v1 import job_pb2
from oasst_jobs import Inbox, QueueUnavailableError, Submitter, Subscription, is_end_of_job

from oasst_gateway.departures import Departures

__all__ = ["Watch", "WatchedJob", "Watches"]

logger = logging.getLogger(__name__)

_CLOSE_GRACE_S = 1.0


@dataclass(slots=True)
class WatchedJob:
    """What RPCs of this gateway that watch a job know of it together."""

    num_rpcs: int = 0
    is_watched: bool = False  # The queue counts this gateway among the job's watchers, or may.
    has_ended: bool = False  # The job has; nothing is left to take back.

    def begin(self) -> None:
        """The queue has a job that may still run, and counts this gateway among its watchers."""
        self.is_watched = True
        self.has_ended = False  # One of the same name may have ended before.

    def see_outcome(self, outcome: job_pb2.Outcome) -> None:
        """A reader has been told how it ended, or why it cannot read on."""
        self.has_ended = self.has_ended or is_end_of_job(outcome)


@dataclass(frozen=True, slots=True)
class Watch:
    """One RPC's subscription, and the job that it shares with others."""

    subscription: Subscription
    job: WatchedJob


class Watches:
    """All watches of this gateway."""

    def __init__(self, submitter: Submitter, inbox: Inbox) -> None:
        self._submitter = submitter
        self._inbox = inbox
        self._jobs: dict[str, WatchedJob] = {}  # By id.
        self._departures = Departures(submitter)
        self._is_leaving = False

    @asynccontextmanager
    async def open(self, job_id: str, *, after: int = 0) -> AsyncIterator[Watch]:
        """This gateway watches the job as long as the context is open, and says so once nobody here does any more."""
        async with self._inbox.subscribe(job_id, after=after) as subscription:
            job = self._jobs.setdefault(job_id, WatchedJob())
            job.num_rpcs += 1
            try:
                if await self._departures.take_back(job_id):
                    job.is_watched = True  # As it was.
                yield Watch(subscription, job)
            except (QueueUnavailableError, asyncio.CancelledError):
                job.is_watched = True  # It may be: nobody knows what became of the call.
                raise
            finally:
                job.num_rpcs -= 1
                if not job.num_rpcs:
                    del self._jobs[job_id]
                    if job.is_watched and not job.has_ended and not self._is_leaving:
                        self._departures.begin(job_id)

    async def keep_alive(self) -> None:
        """The queue knows what is watched here, for a while longer."""
        try:
            for job_id in await self._submitter.keep_watching(list(self._jobs)):
                job = self._jobs.get(job_id)
                if job is not None and job.is_watched:  # The queue lost that it is.
                    await self._submitter.attach(job_id)
        except QueueUnavailableError as error:
            logger.warning("watched jobs were not kept alive, trying again soon error=%s", error)

    def leave(self) -> None:
        """From now on jobs go on as if they were still watched here: their callers go on elsewhere."""
        self._is_leaving = True

    async def aclose(self) -> None:
        """Nothing runs in the background any more, nor begins to."""
        self._is_leaving = True
        await self._departures.aclose(grace_s=_CLOSE_GRACE_S)
