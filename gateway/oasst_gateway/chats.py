"""The life of a chat in this gateway: prepared, submitted, watched to its end, and ended when its caller leaves."""

import asyncio
import functools
import hmac
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

from oasst.v1 import chat_pb2
from oasst_jobs import (
    Inbox,
    JobState,
    QueueError,
    QueueLoad,
    QueueUnavailableError,
    Submitter,
    failpoints,
    job_id_for,
)

from oasst_gateway.backlog import Backlog
from oasst_gateway.chat import Chat
from oasst_gateway.errors import TooManyChatsError, UnknownChatError
from oasst_gateway.metrics import ChatMeter, GatewayMetrics
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor
from oasst_gateway.preparation import PreparedChat, prepare_chat
from oasst_gateway.validation import check_cancel

__all__ = ["Chats"]

logger = logging.getLogger(__name__)

TENANT = "default"  # Until callers are told apart, all are one.

_TOO_MANY_RETRY_S = 1.0
_CANCEL_RETRY_S = 0.5
_CLOSE_GRACE_S = 1.0
# Larger requests are prepared in a thread: tokenizing them would hold up every other stream.
_BIG_REQUEST_BYTES = 8 * 1024


class Chats:
    """All chats of this gateway."""

    def __init__(
        self,
        *,
        model: ServedModel,
        submitter: Submitter,
        inbox: Inbox,
        monitor: QueueMonitor,
        metrics: GatewayMetrics,
        resume_secret: bytes,
        max_open: int,
        queue_status_interval_s: float = 5.0,
    ) -> None:
        self._model = model
        self._submitter = submitter
        self._inbox = inbox
        self._monitor = monitor
        self._metrics = metrics
        self._resume_secret = resume_secret
        self._max_open = max_open
        self._ask_interval_s = queue_status_interval_s
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_watching: Counter[str] = Counter()  # RPCs of this gateway that watch a job, by its id.
        self._departures: set[asyncio.Task[None]] = set()
        self._abandoned = asyncio.Event()

    @asynccontextmanager
    async def open(self, request: chat_pb2.ChatRequest, *, remaining_s: float | None) -> AsyncIterator[Chat]:
        """The request is in the queue, and its chat can be followed; left before its end, it is cancelled.

        Raises:
            InvalidRequestError, TooManyChatsError, QueueError: the request was not accepted.
        """
        if self._num_open >= self._max_open:
            raise TooManyChatsError(self._max_open, retry_after_s=_TOO_MANY_RETRY_S)
        self._num_open += 1
        self._idle.clear()
        try:
            meter = ChatMeter(self._metrics)
            prepared = await self._prepare(request, remaining_s)
            async with self._watch(prepared, meter) as chat:
                yield chat
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()

    async def cancel(self, request: chat_pb2.CancelChatRequest) -> JobState:
        """The request has ended; its state is returned.

        Raises:
            UnknownChatError: if there is none, or the resume token is another's.
        """
        check_cancel(request)
        job_id = job_id_for(TENANT, request.request_id)
        expected = self._resume_token(job_id)
        if request.resume_token and not hmac.compare_digest(expected.encode(), request.resume_token.encode()):
            raise UnknownChatError
        state = await self._submitter.cancel(job_id)
        if state is None:
            raise UnknownChatError
        logger.info("cancelled job_id=%s state=%s", job_id, state)
        return state

    async def load(self) -> QueueLoad:
        """How much waits and runs, and on which workers, as the queue knows it now."""
        return await self._submitter.load()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether no chat is open any more, after at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abandon(self) -> None:
        """From now on a chat that is left goes on in the queue: it is the gateway that leaves, not the caller."""
        self._abandoned.set()

    async def aclose(self) -> None:
        """Nothing runs in the background any more."""
        self.abandon()
        if self._departures:
            _, unfinished = await asyncio.wait(self._departures, timeout=_CLOSE_GRACE_S)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _prepare(self, request: chat_pb2.ChatRequest, remaining_s: float | None) -> PreparedChat:
        def prepare() -> PreparedChat:
            request_id = request.request_id or str(uuid.uuid4())
            return prepare_chat(request, self._model, tenant=TENANT, request_id=request_id, remaining_s=remaining_s)

        if request.ByteSize() > _BIG_REQUEST_BYTES:
            return await asyncio.to_thread(prepare)
        return prepare()

    @asynccontextmanager
    async def _watch(self, prepared: PreparedChat, meter: ChatMeter) -> AsyncIterator[Chat]:
        job_id = prepared.job.job_id
        async with AsyncExitStack() as stack:
            departure = stack.enter_context(ExitStack())
            stack.enter_context(self._counted(job_id))
            # Subscribed before it is submitted, so that no news falls between the two.
            subscription = await stack.enter_async_context(self._inbox.subscribe(job_id))
            departure.callback(self._leave, prepared)
            try:
                accepted = await self._submit(prepared)
            except QueueError:
                # Refused, or nobody knows whether it was queued; then whoever sends it again attaches to it.
                departure.pop_all()
                raise
            backlog = await stack.enter_async_context(Backlog(subscription).reading())
            chat = Chat(
                accepted,
                job_id=job_id,
                backlog=backlog,
                meter=meter,
                ask_queue=functools.partial(self._ask_queue, job_id),
                ask_interval_s=self._ask_interval_s,
            )
            try:
                yield chat
            finally:
                if chat.has_ended:
                    departure.pop_all()

    @contextmanager
    def _counted(self, job_id: str) -> Iterator[None]:
        """The job has one watcher more as long as the context is open."""
        self._num_watching[job_id] += 1
        try:
            yield
        finally:
            self._num_watching[job_id] -= 1
            if not self._num_watching[job_id]:
                del self._num_watching[job_id]

    async def _submit(self, prepared: PreparedChat) -> chat_pb2.Accepted:
        job = prepared.job
        failpoints.reach("gateway.submitting")
        submitted = await self._submitter.submit(job, digest=prepared.digest, timeout_ms=prepared.timeout_ms)
        failpoints.reach("gateway.submitted")
        if submitted.is_new:
            self._metrics.prompt_tokens.inc(len(job.prompt_token_ids))
        else:
            # What was drawn for the first request with this id holds for all.
            snapshot = await self._submitter.status(job.job_id)
            job = snapshot.job if snapshot is not None else job
        logger.info(
            "accepted job_id=%s request_id=%s is_new=%s ahead=%d prompt_tokens=%d max_new_tokens=%d n=%d",
            job.job_id,
            job.request_id,
            submitted.is_new,
            submitted.queue_position,
            len(job.prompt_token_ids),
            job.limits.max_new_tokens,
            job.n,
        )
        return chat_pb2.Accepted(
            request_id=job.request_id,
            resume_token=self._resume_token(job.job_id),
            queue=self._monitor.describe_queue(submitted.queue_position),
            prompt_tokens=len(job.prompt_token_ids),
            dropped_turns=job.dropped_turns,
            seed=job.sampling.seed,
        )

    async def _ask_queue(self, job_id: str) -> chat_pb2.QueueStatus | None:
        """Where the job stands; None if it does not wait, or the queue is away."""
        try:
            snapshot = await self._submitter.status(job_id)
        except QueueUnavailableError:
            return None
        if snapshot is None or snapshot.state is not JobState.WAITING:
            return None
        return self._monitor.describe_queue(snapshot.queue_position)

    def _resume_token(self, job_id: str) -> str:
        """Proves a right to the job. Derived, so that every gateway with the same secret knows it."""
        return hmac.digest(self._resume_secret, job_id.encode(), "sha256")[:16].hex()

    def _leave(self, prepared: PreparedChat) -> None:
        """The job is cancelled after its grace, unless another RPC of this gateway watches it then."""
        task = asyncio.create_task(self._cancel_later(prepared.job.job_id, prepared.detach_grace_s))
        self._departures.add(task)
        task.add_done_callback(self._departures.discard)

    async def _cancel_later(self, job_id: str, grace_s: float) -> None:
        logger.info("left job_id=%s grace_s=%g", job_id, grace_s)
        try:
            async with asyncio.timeout(grace_s):
                await self._abandoned.wait()
        except TimeoutError:
            if not self._num_watching[job_id]:
                await self._cancel_until_heard(job_id)

    async def _cancel_until_heard(self, job_id: str) -> None:
        while True:
            try:
                state = await self._submitter.cancel(job_id)
            except QueueUnavailableError:
                await asyncio.sleep(_CANCEL_RETRY_S)
            else:
                logger.info("cancelled job_id=%s state=%s", job_id, state)
                return
