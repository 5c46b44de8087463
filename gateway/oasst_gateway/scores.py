"""The life of a request to score in this gateway: prepared, submitted, and watched until all its scores are there."""

import functools
import logging
import time
import uuid

from oasst.jobs.v1 import job_pb2
from oasst.v1 import scoring_pb2
from oasst_jobs import Subscription
from oasst_telemetry import Span

from oasst_gateway.admission import Admission
from oasst_gateway.arrival import Arrival
from oasst_gateway.derived_secrets import DerivedSecrets
from oasst_gateway.errors import ChatFailedError, GatewayLeavingError
from oasst_gateway.metrics import GatewayMetrics
from oasst_gateway.model import ServedModel
from oasst_gateway.offloading import TenantThreads, is_big
from oasst_gateway.open_requests import OpenRequests
from oasst_gateway.preparation import PreparedJob, prepare_score
from oasst_gateway.spans import describe_score, submitting, trace_of
from oasst_gateway.tenants import Tenant
from oasst_gateway.watches import Watches

__all__ = ["Scores", "read_scores"]

logger = logging.getLogger(__name__)


class Scores:
    """All requests to score of this gateway. Admitted by their own queue: chats do not wait for them."""

    def __init__(
        self,
        *,
        model: ServedModel,
        watches: Watches,
        open_requests: OpenRequests,
        admission: Admission,
        metrics: GatewayMetrics,
        secrets: DerivedSecrets,
        threads: TenantThreads,
        grace_s: float,
    ) -> None:
        self._model = model
        self._watches = watches
        self._open_requests = open_requests
        self._admission = admission
        self._metrics = metrics
        self._secrets = secrets
        self._threads = threads
        self._grace_s = grace_s
        self._followed: set[Subscription] = set()

    async def score(
        self, request: scoring_pb2.ScoreRequest, *, tenant: Tenant, remaining_s: float | None, span: Span
    ) -> scoring_pb2.ScoreResponse:
        """The scores of all items, once the last one is logged; left before that, the job's grace begins.

        Raises:
            InvalidRequestError, NoWorkerError, RefusedError, QueueError: the request was not accepted.
            ChatFailedError: it could not be scored, or was cancelled, or its deadline has passed.
        """
        arrival = self._admission.arrival_of(tenant, request.request_id)
        async with self._open_requests.opened(arrival):
            await self._admission.check_open(arrival)
            started_s = time.perf_counter()
            prepared = await self._prepare(request, tenant, remaining_s)
            job = prepared.job
            # Subscribed before it is submitted, so that no news falls between the two.
            async with self._watches.open(job.job_id) as watch:
                job = await self._submit(prepared, tenant, arrival, span)
                watch.job.begin()
                scores, outcome = await self._follow(watch.subscription)
                watch.job.see_outcome(outcome)
            self._tell_end(job, len(scores), outcome, elapsed_s=time.perf_counter() - started_s)
            if outcome.HasField("failed"):
                raise ChatFailedError(outcome.failed)
            return scoring_pb2.ScoreResponse(scores=scores)

    def leave(self) -> None:
        """Open requests end now, and their callers are told to go on elsewhere."""
        for subscription in self._followed:
            subscription.fail(GatewayLeavingError())

    async def _prepare(
        self, request: scoring_pb2.ScoreRequest, tenant: Tenant, remaining_s: float | None
    ) -> PreparedJob:
        prepare = functools.partial(
            prepare_score,
            request,
            self._model,
            tenant=tenant,
            request_id=request.request_id or str(uuid.uuid4()),
            cache_salt=self._secrets.cache_salt(tenant.name),
            remaining_s=remaining_s,
            grace_s=self._grace_s,
        )
        return await self._threads.run(tenant, prepare, off_loop=is_big(request))

    async def _submit(self, prepared: PreparedJob, tenant: Tenant, arrival: Arrival, span: Span) -> job_pb2.Job:
        with submitting(prepared.job, span):
            submitted = await self._admission.submit(prepared, tenant, arrival)
        job = submitted.job
        if span.is_recorded:
            span.note(describe_score(job))
        if submitted.is_new:
            self._metrics.tenant_requests.labels(tenant.name).inc()
        else:
            span.link(trace_of(job))
        fields = (job.job_id, job.request_id, submitted.is_new, submitted.queue_position, len(job.score_items))
        logger.info(
            "accepted to score job_id=%s request_id=%s is_new=%s ahead=%d items=%d",
            *fields,
            extra=trace_of(job).log_fields,
        )
        return job

    def _tell_end(self, job: job_pb2.Job, num_scores: int, outcome: job_pb2.Outcome, *, elapsed_s: float) -> None:
        if outcome.HasField("finished"):
            self._metrics.scored_items.inc(num_scores)
        event = "scored" if outcome.HasField("finished") else "failed"
        logger.info(
            event + " job_id=%s scores=%d elapsed_s=%.3f reason=%s",
            job.job_id,
            num_scores,
            elapsed_s,
            outcome.failed.reason,
            extra=trace_of(job).log_fields,
        )

    async def _follow(self, subscription: Subscription) -> tuple[list[scoring_pb2.ItemScore], job_pb2.Outcome]:
        self._followed.add(subscription)
        try:
            return await read_scores(subscription)
        finally:
            self._followed.discard(subscription)


async def read_scores(subscription: Subscription) -> tuple[list[scoring_pb2.ItemScore], job_pb2.Outcome]:
    """All scores, in the items' order, and how the job ended."""
    scores: list[scoring_pb2.ItemScore] = []
    while True:
        for news in await subscription.take():
            if isinstance(news, job_pb2.Outcome):
                return scores, news
            # Items that were scored again, because the queue lost the end of the log, come once more.
            del scores[news.end_position - len(news.scores) :]
            scores += news.scores
