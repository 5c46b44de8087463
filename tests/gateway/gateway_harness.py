"""A gateway as its callers see it, and a worker that answers by rule."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, chat_pb2_grpc, generation_pb2, model_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from oasst_gateway.gateway import running_gateway
from oasst_gateway.model import ServedModel
from oasst_gateway.settings import GatewaySettings
from oasst_jobs import (
    ClaimedJob,
    Claimer,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueLimits,
    QueueUnavailableError,
    Submitter,
    job_id_for,
)
from prometheus_client import CollectorRegistry

__all__ = [
    "SECRET",
    "ErrorDetails",
    "Gateway",
    "RuleWorker",
    "ask",
    "details_of",
    "read_into",
    "read_text",
    "rule_text",
    "start_gateway",
    "state_of",
    "timeout_ms_of",
]

SECRET = "a secret that all gateways share"

# A call that has just ended is given this long to hear how.
_STATUS_GRACE_S = 2.0


@dataclass(frozen=True)
class Gateway:
    """A running gateway and the stubs of a caller."""

    listen: str
    metrics_listen: str
    registry: CollectorRegistry
    channel: grpc.aio.Channel
    reload: Callable[[], None]

    @property
    def chat(self) -> chat_pb2_grpc.ChatServiceStub:
        return chat_pb2_grpc.ChatServiceStub(self.channel)

    @property
    def model(self) -> model_pb2_grpc.ModelServiceStub:
        return model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def scoring(self) -> scoring_pb2_grpc.ScoringServiceStub:
        return scoring_pb2_grpc.ScoringServiceStub(self.channel)

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 if it was never touched."""
        return self.registry.get_sample_value(f"oasst_gateway_{name}", labels) or 0.0


@asynccontextmanager
async def start_gateway(
    model: ServedModel, valkey_url: str, *, recheck_s: float = 5.0, **settings: object
) -> AsyncIterator[Gateway]:
    """A gateway on a free port, as `python -m oasst_gateway` would run it."""
    options = {
        "model": "unused, it is loaded",
        "redis_url": valkey_url,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "drain_grace_s": 2.0,
        "detach_grace_s": 0.0,
        "worker_wait_s": 0.0,
        **settings,
    }
    registry = CollectorRegistry()
    async with (
        AsyncExitStack() as callers,  # Their connections outlive the gateway.
        running_gateway(GatewaySettings.model_validate(options), model, registry, recheck_s=recheck_s) as running,
    ):
        channel = grpc.aio.insecure_channel(running.listen)
        callers.push_async_callback(channel.close, _STATUS_GRACE_S)
        yield Gateway(running.listen, running.metrics, registry, channel, running.reload)


async def state_of(queue: QueueClient, request_id: str) -> JobState | None:
    """That of a request's job; None if the queue knows none."""
    submitter = Submitter(queue, gateway_id="test", limits=QueueLimits())
    snapshot = await submitter.status(job_id_for("default", request_id))
    return snapshot.state if snapshot is not None else None


async def timeout_ms_of(queue: QueueClient, request_id: str) -> int | None:
    """How long a request's job may take in all; None for as long as it takes."""
    job_id = job_id_for("default", request_id)
    key = f"{queue.shard_of(job_id).keys.root}:job:{job_id}"
    enqueued_ms, deadline_ms = await queue.redis.hmget(key, "enqueued_ms", "deadline_ms")
    return None if deadline_ms is None else int(deadline_ms) - int(enqueued_ms)


class RuleWorker:
    """Answers each claimed job with known tokens: token i of choice c is id 10 + i, its text "c.i ". Item i scores -i.

    It goes on only while `allowance` lasts, one per push, so that a test says how far it gets.
    """

    def __init__(self, client: QueueClient, *, model_name: str) -> None:
        self._claimer = Claimer(client, worker_id="rule-worker", model=model_name, lease_ms=2_000)
        self._allowance = asyncio.Semaphore(0)
        self._is_free = asyncio.Event()
        self._is_free.set()
        self.claimed: list[ClaimedJob] = []
        self.dropped: list[PushStatus] = []
        self.failure: chat_pb2.Failed | None = None  # How the next jobs end, instead of finishing.

    def hold(self) -> None:
        """From now on only what is allowed is pushed."""
        self._is_free.clear()

    def allow(self, num_pushes: int) -> None:
        for _ in range(num_pushes):
            self._allowance.release()

    def free(self) -> None:
        """From now on everything is pushed at once."""
        self._is_free.set()
        self.allow(1)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    for is_scoring in (False, True):
                        jobs = await self._claimer.claim(max_jobs=8, max_tokens=200_000, is_scoring=is_scoring)
                        for claimed in jobs:
                            self.claimed.append(claimed)
                            group.create_task(self._answer(claimed))
                    await self._claimer.wait_for_work(0.05)
                except QueueUnavailableError:
                    await asyncio.sleep(0.05)

    async def _answer(self, claimed: ClaimedJob) -> None:
        job, position = claimed.job, claimed.end_position
        num_positions = len(job.score_items) or job.n * job.limits.max_new_tokens
        while position < num_positions and self.failure is None:
            if not await self._may_push(claimed, position):
                return
            entry = _next_entry(job, position)
            if not await self._push(PushItem(claimed.job_id, claimed.fence, position, entry=entry)):
                return
            position = entry.end_position
        if await self._may_push(claimed, position):
            await self._push(
                PushItem(claimed.job_id, claimed.fence, position, outcome=self._outcome(claimed, position))
            )

    async def _may_push(self, claimed: ClaimedJob, position: int) -> bool:
        """Waits for the test's leave; meanwhile the lease is kept. False once the job is no longer ours."""
        while not self._is_free.is_set():
            try:
                async with asyncio.timeout(0.05):
                    await self._allowance.acquire()
                return True
            except TimeoutError:
                if not await self._push(PushItem(claimed.job_id, claimed.fence, position)):
                    return False
        return True

    async def _push(self, item: PushItem) -> bool:
        """Whether the job is still ours. A push that was lost on the way is made again."""
        while True:
            try:
                (status,) = await self._claimer.push([item])
            except QueueUnavailableError:
                await asyncio.sleep(0.05)
                continue
            if status is not PushStatus.OK:
                self.dropped.append(status)
            return status is PushStatus.OK

    def _outcome(self, claimed: ClaimedJob, position: int) -> job_pb2.Outcome:
        if self.failure is not None:
            return job_pb2.Outcome(failed=self.failure)
        finishes = [
            generation_pb2.ChoiceFinish(choice=choice, reason=generation_pb2.FINISH_REASON_LENGTH)
            for choice in range(claimed.job.n)
        ]
        usage = chat_pb2.Usage(
            prompt_tokens=len(claimed.job.prompt_token_ids),
            completion_tokens=position,
            dropped_turns=claimed.job.dropped_turns,
        )
        finished = chat_pb2.Finished(finishes=finishes, usage=usage)
        finished.timings.queue.FromMilliseconds(claimed.waited_ms)
        return job_pb2.Outcome(finished=finished)


def _next_entry(job: job_pb2.Job, position: int) -> job_pb2.LogEntry:
    if job.score_items:
        return job_pb2.LogEntry(end_position=position + 1, scores=[scoring_pb2.ItemScore(logprob=-position)])
    index = position // job.n
    deltas = [
        generation_pb2.Delta(choice=choice, position=index, text=f"{choice}.{index} ", token_ids=[10 + index])
        for choice in range(job.n)
    ]
    if job.HasField("logprobs"):
        for delta in deltas:
            delta.logprobs.add(logprob=-0.5)
    return job_pb2.LogEntry(end_position=position + job.n, deltas=deltas)


def rule_text(num_tokens: int, *, choice: int = 0) -> str:
    """What a RuleWorker answers."""
    return "".join(f"{choice}.{index} " for index in range(num_tokens))


def ask(*texts: str, max_new_tokens: int = 4, **fields: object) -> chat_pb2.ChatRequest:
    """A conversation in which prompter and assistant speak in turn."""
    roles = (chat_pb2.ROLE_PROMPTER, chat_pb2.ROLE_ASSISTANT)
    messages = [chat_pb2.Message(role=roles[index % 2], content=text) for index, text in enumerate(texts)]
    return chat_pb2.ChatRequest(
        conversation=chat_pb2.Conversation(messages=messages),
        limits=generation_pb2.GenerationLimits(max_new_tokens=max_new_tokens),
        **fields,
    )


async def read_into(events: list[chat_pb2.ChatEvent], call: grpc.aio.UnaryStreamCall) -> None:
    """The events that were still to come are in `events`, however the call ended."""
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)


async def read_text(call: grpc.aio.UnaryStreamCall) -> str:
    """The text that is still to come."""
    events: list[chat_pb2.ChatEvent] = []
    await read_into(events, call)
    return "".join(event.delta.text for event in events)


@dataclass(frozen=True)
class ErrorDetails:
    """The rich error of a failed RPC."""

    code: grpc.StatusCode
    reason: str
    domain: str
    violations: dict[str, str]  # Field -> what is allowed.
    retry_after_s: float | None
    pushback_ms: int | None


def details_of(error: grpc.aio.AioRpcError) -> ErrorDetails:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers[rpc_status.GRPC_DETAILS_METADATA_KEY])
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        has_retry = detail.Unpack(retry) or has_retry
    return ErrorDetails(
        code=error.code(),
        reason=info.reason,
        domain=info.domain,
        violations={violation.field: violation.description for violation in request.field_violations},
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        pushback_ms=int(trailers["grpc-retry-pushback-ms"]) if "grpc-retry-pushback-ms" in trailers else None,
    )
