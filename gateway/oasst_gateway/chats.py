"""The life of a chat in this gateway: prepared, submitted, watched to its end, and left when its caller leaves."""

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import (
    JobSnapshot,
    JobState,
    LogSnapshot,
    QueueUnavailableError,
    Submitted,
    Submitter,
    job_id_for,
)
from oasst_telemetry import Span

from oasst_gateway.admission import Admission
from oasst_gateway.arrival import Arrival
from oasst_gateway.chat import Chat
from oasst_gateway.derived_secrets import DerivedSecrets
from oasst_gateway.errors import GatewayLeavingError, UnknownChatError
from oasst_gateway.events import build_response
from oasst_gateway.metrics import ChatMeter, GatewayMetrics
from oasst_gateway.model import ServedModel
from oasst_gateway.monitor import QueueMonitor
from oasst_gateway.offloading import TenantThreads, is_big, is_long
from oasst_gateway.open_requests import OpenRequests
from oasst_gateway.preparation import PreparedJob, prepare_chat
from oasst_gateway.spans import describe_chat, submitting, trace_of
from oasst_gateway.tenants import Tenant
from oasst_gateway.validation import check_chat_name, check_watch
from oasst_gateway.watches import Watch, Watches

__all__ = ["Chats"]

logger = logging.getLogger(__name__)


class Chats:
    """All chats of this gateway."""

    def __init__(
        self,
        *,
        model: ServedModel,
        submitter: Submitter,
        watches: Watches,
        open_requests: OpenRequests,
        monitor: QueueMonitor,
        admission: Admission,
        metrics: GatewayMetrics,
        secrets: DerivedSecrets,
        threads: TenantThreads,
        log_threads: TenantThreads,
        default_grace_s: float,
        remind_interval_s: float = 5.0,
    ) -> None:
        """Requests are prepared in `threads`, and logs put together in `log_threads`: no answer waits for a prompt."""
        self._model = model
        self._submitter = submitter
        self._watches = watches
        self._open_requests = open_requests
        self._monitor = monitor
        self._admission = admission
        self._metrics = metrics
        self._secrets = secrets
        self._threads = threads
        self._log_threads = log_threads
        self._default_grace_s = default_grace_s
        self._remind_interval_s = remind_interval_s
        self._chats: set[Chat] = set()

    async def run(self) -> None:
        """Keeps watched jobs alive, and has quiet chats tell where they stand, until cancelled."""
        while True:
            await asyncio.sleep(self._remind_interval_s)
            for chat in self._chats:
                chat.remind()
            await self._watches.keep_alive()

    @asynccontextmanager
    async def open(
        self, request: chat_pb2.ChatRequest, *, tenant: Tenant, remaining_s: float | None, span: Span
    ) -> AsyncIterator[Chat]:
        """The request is in the queue, and its chat can be followed; left before its end, its grace begins.

        Raises:
            InvalidRequestError, NotTrustedError, NoWorkerError, RefusedError, QueueError: the request was not accepted.
        """
        arrival = self._admission.arrival_of(tenant, request.request_id)
        async with self._open_requests.opened(arrival):
            await self._admission.check_open(arrival)
            started_s = time.perf_counter()
            prepared = await self._prepare(request, tenant, remaining_s, default_grace_s=self._default_grace_s)
            # Subscribed before it is submitted, so that no news falls between the two.
            async with self._watches.open(prepared.job.job_id) as watch:
                submitted = await self._submit(prepared, tenant, arrival, span)
                watch.job.begin()
                meter = ChatMeter(self._metrics, span, is_first=submitted.is_new, started_s=started_s)
                accepted = self._accepted(submitted.job, self._describe_queue(submitted))
                with self._following(watch, prepared.job, tenant, accepted, meter, is_new=submitted.is_new) as chat:
                    yield chat

    async def submit(self, request: chat_pb2.ChatRequest, *, tenant: Tenant, span: Span) -> chat_pb2.Accepted:
        """The request is in the queue, and nobody needs to watch it. Raises what `open` raises."""
        arrival = self._admission.arrival_of(tenant, request.request_id)
        async with self._open_requests.opened(arrival):
            await self._admission.check_open(arrival)
            # The RPC's own deadline is for being accepted, not for the answer.
            prepared = await self._prepare(request, tenant, remaining_s=None, default_grace_s=None)
            submitted = await self._submit(prepared, tenant, arrival, span, is_watched=False)
            return self._accepted(submitted.job, self._describe_queue(submitted))

    @asynccontextmanager
    async def watch(self, request: chat_pb2.WatchChatRequest, *, tenant: Tenant, span: Span) -> AsyncIterator[Chat]:
        """A request that was accepted before, by any gateway, can be followed from where its caller left it.

        Raises:
            UnknownChatError: if the tenant has none of that name, or the resume token is not its own.
            InvalidRequestError, RefusedError, QueueUnavailableError
        """
        check_watch(request, self._model.limits)
        job_id = self._find(request.request_id, request.resume_token, tenant)
        async with self._open_requests.opened(Arrival(self._submitter, tenant, job_id, was_accepted=True)):
            meter = ChatMeter(self._metrics, span, is_first=False)
            async with self._watches.open(job_id, after=request.after) as watch:
                snapshot = await self._submitter.attach(job_id)
                if snapshot is None:
                    raise UnknownChatError
                watch.job.begin()
                accepted = self._accepted(snapshot.job, self._describe_queue(snapshot))
                if span.is_recorded:
                    span.note(describe_chat(snapshot.job))
                    span.link(trace_of(snapshot.job))
                logger.info(
                    "watched job_id=%s after=%d", job_id, request.after, extra=trace_of(snapshot.job).log_fields
                )
                with self._following(watch, snapshot.job, tenant, accepted, meter, after=request.after) as chat:
                    yield chat

    async def get(self, request: chat_pb2.GetChatRequest, *, tenant: Tenant) -> chat_pb2.GetChatResponse:
        """The request's state, and all it has generated so far.

        Raises what `watch` raises.
        """
        check_chat_name(request.request_id)
        job_id = self._find(request.request_id, request.resume_token, tenant)
        async with self._open_requests.opened(Arrival(self._submitter, tenant, job_id, was_accepted=True)):
            snapshot, log = await self._submitter.status(job_id), await self._submitter.read(job_id)
            if snapshot is None or log is None:
                raise UnknownChatError
            describe = functools.partial(self._describe, snapshot, log)
            return await self._log_threads.run(tenant, describe, off_loop=is_long(log.entries))

    async def cancel(self, request: chat_pb2.CancelChatRequest, *, tenant: Tenant) -> JobState:
        """The request has ended; its state is returned.

        Raises:
            UnknownChatError: if the tenant has none of that name, or a resume token is given and not its own.
        """
        check_chat_name(request.request_id)
        job_id = job_id_for(tenant.name, request.request_id)
        if request.resume_token:
            job_id = self._find(request.request_id, request.resume_token, tenant)
        state = await self._submitter.cancel(job_id)
        if state is None:
            raise UnknownChatError
        logger.info("cancelled job_id=%s state=%s", job_id, state)
        return state

    def leave(self) -> None:
        """Open chats end now, and their callers are told to go on elsewhere."""
        for chat in self._chats:
            chat.leave(GatewayLeavingError())

    async def _prepare(
        self,
        request: chat_pb2.ChatRequest,
        tenant: Tenant,
        remaining_s: float | None,
        *,
        default_grace_s: float | None,
    ) -> PreparedJob:
        prepare = functools.partial(
            prepare_chat,
            request,
            self._model,
            tenant=tenant,
            request_id=request.request_id or str(uuid.uuid4()),
            cache_salt=self._secrets.cache_salt(tenant.name),
            remaining_s=remaining_s,
            default_grace_s=default_grace_s,
        )
        return await self._threads.run(tenant, prepare, off_loop=is_big(request))

    @contextmanager
    def _following(
        self,
        watch: Watch,
        job: job_pb2.Job,
        tenant: Tenant,
        accepted: chat_pb2.Accepted,
        meter: ChatMeter,
        *,
        after: int = 0,
        is_new: bool = False,
    ) -> Iterator[Chat]:
        chat = Chat(
            job,
            accepted,
            source=watch.subscription,
            meter=meter,
            threads=self._log_threads,
            tenant=tenant,
            ask_queue=functools.partial(self._ask_queue, job.job_id),
            after=after,
        )
        self._chats.add(chat)
        try:
            yield chat
        finally:
            self._chats.discard(chat)
            if chat.outcome is not None:
                watch.job.see_outcome(chat.outcome)
                # Of all who follow a job, here and elsewhere, one brought it: counted by that one, it counts once.
                if is_new and chat.outcome.HasField("finished"):
                    self._monitor.saw_finished(job, chat.outcome.finished)

    async def _submit(
        self, prepared: PreparedJob, tenant: Tenant, arrival: Arrival, span: Span, *, is_watched: bool = True
    ) -> Submitted:
        with submitting(prepared.job, span):
            submitted = await self._admission.submit(prepared, tenant, arrival, is_watched=is_watched)
        job = submitted.job
        if span.is_recorded:
            span.note(describe_chat(job))
        if not submitted.is_new:
            span.link(trace_of(job))
        else:
            self._metrics.prompt_tokens.inc(len(job.prompt_token_ids))
            self._metrics.tenant_requests.labels(tenant.name).inc()
            self._metrics.tenant_prompt_tokens.labels(tenant.name).inc(len(job.prompt_token_ids))
        logger.info(
            "accepted job_id=%s request_id=%s is_new=%s ahead=%d prompt_tokens=%d max_new_tokens=%d n=%d",
            job.job_id,
            job.request_id,
            submitted.is_new,
            submitted.queue_position,
            len(job.prompt_token_ids),
            job.limits.max_new_tokens,
            job.n,
            extra=trace_of(job).log_fields,
        )
        return submitted

    def _describe(self, snapshot: JobSnapshot, log: LogSnapshot) -> chat_pb2.GetChatResponse:
        outcome = log.outcome or job_pb2.Outcome()
        return chat_pb2.GetChatResponse(
            state=f"CHAT_STATE_{log.state.name}",
            response=build_response(
                self._accepted(snapshot.job, None),
                log.entries,
                model=snapshot.job.model,
                num_choices=snapshot.job.n,
                finished=outcome.finished if outcome.HasField("finished") else None,
            ),
            queue=self._describe_queue(snapshot) if log.state is JobState.WAITING else None,
            failed=outcome.failed if outcome.HasField("failed") else None,
        )

    def _accepted(self, job: job_pb2.Job, queue: chat_pb2.QueueStatus | None) -> chat_pb2.Accepted:
        return chat_pb2.Accepted(
            request_id=job.request_id,
            resume_token=self._secrets.resume_token(job.job_id),
            queue=queue,
            prompt_tokens=len(job.prompt_token_ids),
            dropped_turns=job.dropped_turns,
            seed=job.sampling.seed,
        )

    def _describe_queue(self, place: Submitted | JobSnapshot) -> chat_pb2.QueueStatus:
        status = chat_pb2.QueueStatus(position=place.queue_position)
        wait_s = self._monitor.look_out().told_wait_s(place.tokens_ahead)
        if wait_s is not None:
            status.estimated_wait.FromMilliseconds(round(wait_s * 1000))
        return status

    async def _ask_queue(self, job_id: str) -> chat_pb2.QueueStatus | None:
        """Where the job stands; None if it does not wait, or the queue is away."""
        try:
            snapshot = await self._submitter.status(job_id)
        except QueueUnavailableError:
            return None
        if snapshot is None or snapshot.state is not JobState.WAITING:
            return None
        return self._describe_queue(snapshot)

    def _find(self, request_id: str, resume_token: str, tenant: Tenant) -> str:
        """The job's id, if the token is its own; whoever has none learns nothing, not even whether it exists."""
        job_id = job_id_for(tenant.name, request_id)
        if not self._secrets.is_resume_token(resume_token, job_id):
            raise UnknownChatError
        return job_id
