"""Who is let into the queue, and when to come back if not. The policy is pure: numbers in, numbers out."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from oasst_jobs import (
    QueueFullError,
    Submitted,
    Submitter,
    TenantFullError,
    TenantPolicy,
    TooMuchAheadError,
    failpoints,
    job_id_for,
    job_size,
)

from oasst_gateway.arrival import Arrival
from oasst_gateway.errors import NoWorkerError, RefusedError
from oasst_gateway.preparation import PreparedJob
from oasst_gateway.tenants import Tenant

__all__ = ["Admission", "Outlook", "SpeedEstimate"]

_MIN_RETRY_AFTER_S = 0.2
_MAX_RETRY_AFTER_S = 30.0
_RETRY_AFTER_WITHOUT_SPEED_S = 1.0
_RETRY_AFTER_WITHOUT_WORKER_S = 1.0
# In a flood, more calls at once would only wait for each other's connections, and then fail for having waited.
_SUBMISSIONS_AT_ONCE = 32
_LONGEST_TOLD_WAIT_S = 86_400.0
# What runs already is not counted as ahead: it is taken for requests like this one, half done.
_HALF_DONE = 0.5
# For so long a shard that was full is taken to be so still, without asking.
_STAYS_FULL_S = 0.1
# What one request is taken to have asked for, and to have used, before any has finished.
_TYPICAL_TOKENS = 256.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What whoever comes now can expect of the queue. Tokens are those that requests ask for, prompts included."""

    has_workers: bool
    tokens_per_s: float | None  # Of all workers together; None while no speed is known.
    token_s: float = 0.0  # What a token of one request takes once it runs.

    def wait_s(self, tokens_ahead: int) -> float | None:
        """How long it takes until so many tokens are served."""
        return None if self.tokens_per_s is None else tokens_ahead / self.tokens_per_s

    def told_wait_s(self, tokens_ahead: int) -> float | None:
        """As `wait_s`, for callers: what is more than a day nobody knows."""
        wait_s = self.wait_s(tokens_ahead)
        return None if wait_s is None or wait_s > _LONGEST_TOLD_WAIT_S else wait_s

    def max_tokens_ahead(self, remaining_s: float | None, *, own_tokens: int = 0) -> int | None:
        """The most tokens that can be served before a request of so many must begin; None if any number may be."""
        if remaining_s is None or self.tokens_per_s is None:
            return None
        needed_s = (1 + _HALF_DONE) * own_tokens * self.token_s
        return int(max(0.0, remaining_s - needed_s) * self.tokens_per_s)

    def retry_after_s(self, waiting_tokens: int, *, spread: float) -> float:
        """When to come back to so many tokens; `spread` keeps those refused together from coming back together."""
        wait_s = self.wait_s(waiting_tokens)
        wait_s = _RETRY_AFTER_WITHOUT_SPEED_S if wait_s is None else wait_s
        return min(max(wait_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S) * spread


class SpeedEstimate:
    """How many of the tokens asked for the workers serve in a second.

    Workers tell how many they generate, which is less while little is asked of them: so the recent peak counts, of one
    of them, for as many as there are now.
    Requests ask for more than they use, since most end by themselves: so what finished of late tells how much more.
    """

    def __init__(self, *, decay: float = 0.98, smoothing: float = 0.05) -> None:
        self._decay = decay
        self._smoothing = smoothing
        self._generated_per_s_each = 0.0
        self._num_workers = 0
        self._generated_token_s = 0.0
        # Moving means over requests. One of their ratios would follow whoever generates a single token.
        self._asked = _TYPICAL_TOKENS
        self._generated = _TYPICAL_TOKENS

    @property
    def asked_token_s(self) -> float:
        """What a token asked for takes, of one request that runs; 0 while that is not known."""
        return self._generated_token_s / self._asked_per_generated

    @property
    def asked_per_s(self) -> float | None:
        """None while no speed is known."""
        return self._generated_per_s * self._asked_per_generated or None

    def saw_speed(
        self, generated_per_s: float, *, num_workers: int = 1, num_running: int = 0, num_waiting: int = 0
    ) -> None:
        """The speed of all workers now, with so much running and waiting. Told in even intervals, while there are some.

        A peak counts for about fifty of those in which something waits: otherwise workers may be slow for want of work.
        """
        peak = self._generated_per_s_each * (self._decay if num_waiting else 1.0)
        self._generated_per_s_each = max(generated_per_s / num_workers, peak)
        self._num_workers = num_workers
        if num_running and generated_per_s:
            # Of late they ran as many or fewer: nobody can be slower than all of them at the peak.
            self._generated_token_s = num_running / self._generated_per_s

    def saw_finished(self, *, asked: int, generated: int) -> None:
        """A request has finished that asked for so many tokens, and generated so many."""
        self._asked += self._smoothing * (asked - self._asked)
        self._generated += self._smoothing * (generated - self._generated)

    @property
    def _generated_per_s(self) -> float:
        return self._generated_per_s_each * self._num_workers

    @property
    def _asked_per_generated(self) -> float:
        return self._asked / max(1.0, self._generated)


class Admission:
    """Lets requests into the queue, or refuses them before they cost anything."""

    def __init__(
        self,
        submitter: Submitter,
        *,
        look_out: Callable[[], Outlook],
        worker_wait_s: float,
        max_waiting_jobs: int,
        clock: Callable[[], float] = time.monotonic,
        draw_spread: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311  # Protects nothing.
    ) -> None:
        """`worker_wait_s` is how soon a worker can be expected while there is none.

        While `max_waiting_jobs` wait, of several shards in each its part of them, a queue is full for requests of any
        size.
        """
        self._submitter = submitter
        self._look_out = look_out
        self._worker_wait_s = worker_wait_s
        self._max_waiting_jobs = max_waiting_jobs
        self._clock = clock
        self._draw_spread = draw_spread
        self._turn = asyncio.Semaphore(_SUBMISSIONS_AT_ONCE)
        # By tenant and shard, for others may have a place: what the queue said when it was full last, and until when
        # that counts.
        self._full: dict[tuple[str, int | None], tuple[QueueFullError, float]] = {}

    def arrival_of(self, tenant: Tenant, request_id: str) -> Arrival:
        """A request of the tenant has come, with the id it brought, if any."""
        return Arrival(self._submitter, tenant, job_id_for(tenant.name, request_id) if request_id else None)

    async def check_open(self, arrival: Arrival) -> None:
        """The queue may have a place. Costs next to nothing, so that a flood is turned away before it is read.

        Raises:
            RefusedError: it had none just now.
            QueueUnavailableError
        """
        full, until_s = self._full.get((arrival.tenant.name, arrival.shard_number), (None, 0.0))
        if full is not None and self._clock() < until_s and not await arrival.has_place():
            raise self._queue_full(full)

    async def submit(
        self, prepared: PreparedJob, tenant: Tenant, arrival: Arrival, *, is_watched: bool = True
    ) -> Submitted:
        """The request is in the queue.

        Raises:
            NoWorkerError, RefusedError: it is not, and tells when to come back.
            RequestConflictError, QueueUnavailableError
        """
        async with self._turn:
            await self.check_open(arrival)
            failpoints.reach("gateway.submitting")
            submitted = await self._submit(prepared, tenant, arrival, is_watched=is_watched)
            failpoints.reach("gateway.submitted")
            return submitted

    async def _submit(self, prepared: PreparedJob, tenant: Tenant, arrival: Arrival, *, is_watched: bool) -> Submitted:
        outlook = self._look_out()
        remaining_s = None if prepared.timeout_ms is None else prepared.timeout_ms / 1000
        is_too_soon = not outlook.has_workers and remaining_s is not None and remaining_s < self._worker_wait_s
        if is_too_soon and not await arrival.has_place():
            raise NoWorkerError(retry_after_s=_RETRY_AFTER_WITHOUT_WORKER_S * self._draw_spread())
        try:
            return await self._submitter.submit(
                prepared.job,
                digest=prepared.digest,
                timeout_ms=prepared.timeout_ms,
                grace_ms=prepared.grace_ms,
                is_watched=is_watched,
                policy=_policy_of(tenant),
                max_tokens_ahead=outlook.max_tokens_ahead(remaining_s, own_tokens=job_size(prepared.job)),
            )
        except QueueFullError as error:
            if error.waiting_jobs >= self._max_waiting_jobs:  # Otherwise a smaller request may have a place.
                self._note_full(tenant, self._submitter.shard_number(prepared.job.job_id), error)
            raise self._queue_full(error) from error
        except TenantFullError as error:
            message = f"this tenant's share of the queue is full: {error.waiting_jobs} of its requests wait"
            raise self._refused("TENANT_LIMIT", message, error.waiting_tokens) from error
        except TooMuchAheadError as error:
            message = f"{error.jobs_ahead} requests are ahead, which takes longer than this one's deadline allows"
            raise self._refused("DEADLINE_UNREACHABLE", message, error.tokens_ahead) from error

    def _note_full(self, tenant: Tenant, shard_number: int, error: QueueFullError) -> None:
        now_s = self._clock()
        self._full = {place: full for place, full in self._full.items() if now_s < full[1]}
        self._full[tenant.name, shard_number] = error, now_s + _STAYS_FULL_S

    def _queue_full(self, error: QueueFullError) -> RefusedError:
        message = f"the queue is full: {error.waiting_jobs} requests with {error.waiting_tokens} tokens wait"
        return self._refused("QUEUE_FULL", message, error.waiting_tokens)

    def _refused(self, reason: str, message: str, waiting_tokens: int) -> RefusedError:
        retry_after_s = self._look_out().retry_after_s(waiting_tokens, spread=self._draw_spread())
        return RefusedError(reason, message, retry_after_s=retry_after_s)


def _policy_of(tenant: Tenant) -> TenantPolicy:
    return TenantPolicy(
        weight=tenant.weight,
        max_waiting_jobs=tenant.max_waiting_requests,
        max_waiting_tokens=tenant.max_waiting_tokens,
    )
