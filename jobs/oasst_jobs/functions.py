"""One typed call for each function of `functions.lua`, to one shard."""

import asyncio
import hashlib
from array import array
from collections.abc import Coroutine, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2

from oasst_jobs.connection import MAX_BLOCK_S, RedisClient, check_server, send, send_and_wait
from oasst_jobs.errors import (
    LibraryMissingError,
    PoisonedPromptError,
    QueueFullError,
    QueueUnavailableError,
    RequestConflictError,
    TenantFullError,
    TooMuchAheadError,
    UnavailableReason,
)
from oasst_jobs.framing import update_head
from oasst_jobs.keys import ShardKeys
from oasst_jobs.library import LIBRARY, FunctionLibrary, install, remove_unused
from oasst_jobs.outcomes import outcome_of, state_of
from oasst_jobs.records import (
    DeadLetter,
    Durability,
    JobSnapshot,
    JobState,
    LogSnapshot,
    PushItem,
    PushStatus,
    QueueLoad,
    Submission,
    Submitted,
    SweepReport,
)

__all__ = [
    "JOB_VERSION",
    "PUSH_ITEMS_PER_CALL",
    "WATCHED_PER_CALL",
    "ClaimReply",
    "Shard",
    "job_size",
    "num_prompt_tokens",
    "scoring_queue",
]

T = TypeVar("T")

# The version of the Job message this package writes, and the newest it reads.
JOB_VERSION = 1

# A call over more items would keep Redis from everyone else for too long.
PUSH_ITEMS_PER_CALL = 128

# As many jobs as one call keeps watched.
WATCHED_PER_CALL = 256

# Jobs that one sweep looks at in each index before it lets others in.
_SWEEP_LIMIT = 100

# How soon a cancellation that was swallowed is repeated.
_CANCEL_AGAIN_S = 0.02

# How long a submit waits for a replica to confirm it.
_REPLICATION_TIMEOUT_MS = 1000

# Most batches one read of a gateway's stream brings.
_UPDATES_PER_READ = 256

# Priority -> lane; jobs in a lower lane go first.
_LANES = {
    chat_pb2.PRIORITY_HIGH: 0,
    chat_pb2.PRIORITY_NORMAL: 1,
    chat_pb2.PRIORITY_UNSPECIFIED: 1,
    chat_pb2.PRIORITY_BULK: 2,
}

_ENTRY_FIELD = job_pb2.JobUpdate.ENTRY_FIELD_NUMBER
_OUTCOME_FIELD = job_pb2.JobUpdate.OUTCOME_FIELD_NUMBER
_STATUSES = {status.value.encode(): status for status in PushStatus}

# What a function takes and a command sends.
Argument = str | bytes | int


class ClaimReply(NamedTuple):
    """A claimed job as Redis tells it; ClaimedJob says what the fields mean."""

    job_id: str
    fence: str
    job: bytes
    log: Sequence[bytes]
    end_position: int
    attempt: int
    waited_ms: int
    is_solo: int
    is_first_claim: int


def job_size(job: job_pb2.Job) -> int:
    """Positions a job may come to hold: its prompt, and all the tokens each of its choices may generate.

    Tokens already logged are among those, so a job that is resumed has the size it always had. A job that scores counts
    its items, which its log holds, beside their tokens.
    """
    if job.score_items:
        return num_prompt_tokens(job) + len(job.score_items)
    return num_prompt_tokens(job) + max(job.n, 1) * job.limits.max_new_tokens


def num_prompt_tokens(job: job_pb2.Job) -> int:
    """Tokens that come with the job."""
    return len(job.prompt_token_ids) + sum(len(item.token_ids) for item in job.score_items)


def scoring_queue(name: str) -> str:
    """The queue of what is to be scored by a model of this name. That of its chats has the model's own name.

    A queue of its own never stands in a chat's way: neither its order nor its limits know of the other. And a worker
    that cannot score never looks into it. A tenant is named the same way there, so that what it has to be scored does
    not count against its chats.
    """
    return name + ":scoring"


class Shard:
    """Calls the functions of one shard.

    The library is loaded when the server does not have it: at the first call, or after its functions were flushed.
    A call that has begun comes to its end even if its caller is cancelled, and only then does the cancellation go on:
    no reply is ever left on a connection, and whoever gave up on a submit can be sure that a cancel finds the job.

    Every method raises QueueUnavailableError when Redis cannot serve it now. Whether the call was applied is then
    unknown, and it may be made again with the same arguments.
    """

    def __init__(
        self, redis: RedisClient, number: int = 0, *, num_shards: int = 1, library: FunctionLibrary = LIBRARY
    ) -> None:
        self.keys = ShardKeys(number)
        self._num_shards = num_shards
        self._redis = redis
        self._library = library
        self._calls: set[asyncio.Task[Any]] = set()

    async def spreading(self) -> tuple[int | None, bool]:
        """The number of shards that jobs are spread over, if anybody has said, and whether any wait or run here."""
        num_shards, has_jobs = await self._call("spreading")
        return num_shards or None, bool(has_jobs)

    async def spread(self) -> int:
        """Jobs are spread over as many shards as this client has from now on, if none waits or runs here.

        Tells the number that holds now.
        """
        return int(await self._call("spread", self._num_shards))

    async def enqueue(self, submission: Submission) -> Submitted:
        """Puts a job into the queue, or adds the gateway to the watchers of the one that is there.

        Raises:
            RequestConflictError: if the one that is there came from another request.
            JobNotAcceptedError: if a new job is not let in; its subclasses say why.
        """
        job, limits, policy = submission.job, submission.limits, submission.policy
        verdict, *about = await self._call(
            "enqueue",
            job.job_id,
            job.SerializeToString(),
            submission.digest,
            _queue_name(job, job.model),
            job.version,
            num_prompt_tokens(job),
            job_size(job),
            _LANES[job.priority],
            _queue_name(job, job.tenant),
            repr(policy.weight),
            _or_empty(submission.timeout_ms),
            round(limits.retention_s * 1000),
            submission.gateway_id,
            _or_empty(limits.max_waiting_jobs),
            _or_empty(limits.max_waiting_tokens),
            _or_empty(policy.max_waiting_jobs),
            _or_empty(policy.max_waiting_tokens),
            _or_empty(submission.max_tokens_ahead),
            max(job.n, 1),
            _prompt_digest(job),
            _or_empty(submission.grace_ms),
            self._num_shards,
            durability=submission.durability,
        )
        match verdict:
            case b"spread_otherwise":
                raise self._spread_otherwise(about[0])
            case b"conflict":
                raise RequestConflictError(job.job_id)
            case b"poisoned":
                raise PoisonedPromptError
            case b"queue_full":
                raise QueueFullError(waiting_jobs=about[0], waiting_tokens=about[1])
            case b"tenant_full":
                raise TenantFullError(waiting_jobs=about[0], waiting_tokens=about[1])
            case b"too_much_ahead":
                raise TooMuchAheadError(jobs_ahead=about[0], tokens_ahead=about[1])
        is_new, state, queue_position, tokens_ahead, *stored = about
        return Submitted(
            is_new=bool(is_new),
            state=JobState(state.decode()),
            queue_position=queue_position,
            tokens_ahead=tokens_ahead,
            job=job_pb2.Job.FromString(stored[0]) if stored else job,
        )

    async def attach(self, job_id: str, gateway_id: str) -> JobSnapshot | None:
        """Adds the gateway to a job's watchers."""
        return _read_snapshot(await self._call("attach", job_id, gateway_id))

    async def keep_watching(self, gateway_id: str, job_ids: Sequence[str]) -> list[bool]:
        """Puts off the end of at most WATCHED_PER_CALL jobs that the gateway watches.

        Tells of each whether it may still run and does not name the gateway as a watcher.
        """
        return [bool(is_unwatched) for is_unwatched in await self._call("keep_watching", gateway_id, *job_ids)]

    async def unwatch(self, job_id: str, gateway_id: str) -> JobState | None:
        """Takes the gateway from a job's watchers; if it was the last, the job's grace begins. Tells its state."""
        state = await self._call("unwatch", job_id, gateway_id)
        return None if state is None else JobState(state.decode())

    async def status(self, job_id: str) -> JobSnapshot | None:
        return _read_snapshot(await self._call("status", job_id))

    async def read(self, job_id: str, after: int) -> LogSnapshot | None:
        """What a job has logged behind position `after`."""
        reply = await self._call("read", job_id, after)
        if reply is None:
            return None
        name, end_position, written, prompt_tokens, entries = reply
        state = JobState(name.decode())
        return LogSnapshot(
            state=state,
            end_position=end_position,
            outcome=outcome_of(state, written, prompt_tokens=prompt_tokens, end_position=end_position),
            entries=[job_pb2.LogEntry.FromString(entry) for entry in entries],
        )

    async def cancel(self, job_id: str) -> JobState | None:
        """Ends a job that has not ended. Tells the state it is in now."""
        state = await self._call("cancel", job_id)
        return None if state is None else JobState(state.decode())

    async def load(self, model: str) -> QueueLoad:
        """What waits for a model and runs, and on which workers."""
        *counts, workers = await self._call("load", model, scoring_queue(model))
        waiting_jobs, waiting_tokens, running_jobs, dead_jobs, scoring_jobs, scoring_tokens = counts
        statuses = [job_pb2.WorkerStatus.FromString(status) for status in workers[::2]]
        ages_ms = workers[1::2]
        return QueueLoad(
            waiting_jobs,
            waiting_tokens,
            running_jobs,
            dead_jobs,
            workers=[told for told in zip(statuses, ages_ms, strict=True) if told[0].model == model],
            waiting_scoring_jobs=scoring_jobs,
            waiting_scoring_tokens=scoring_tokens,
        )

    async def claim(
        self,
        worker_id: str,
        claim_id: str,
        *,
        model: str,
        lease_ms: int,
        max_jobs: int,
        max_tokens: int,
        max_choices: int,
        tokens_per_choice: int,
        is_idle: bool,
    ) -> tuple[list[ClaimReply], bool]:
        """Takes jobs in the queue's order. The same claim id again gets the same jobs.

        Also tells whether the worker now keeps itself for a job that it has no room for.
        """
        is_kept, claims, num_shards = await self._call(
            "claim",
            worker_id,
            claim_id,
            model,
            lease_ms,
            max_jobs,
            max_tokens,
            max_choices,
            JOB_VERSION,
            tokens_per_choice,
            int(is_idle),
            self._num_shards,
        )
        if num_shards != self._num_shards:
            raise self._spread_otherwise(num_shards)
        return [ClaimReply(job_id.decode(), fence.decode(), *rest) for job_id, fence, *rest in claims], bool(is_kept)

    async def push(self, worker_id: str, items: Sequence[PushItem], *, lease_ms: int) -> list[PushStatus]:
        """Applies at most PUSH_ITEMS_PER_CALL items in one call."""
        statuses = await self._call("push", lease_ms, worker_id, len(items), *_push_arguments(items))
        return [_STATUSES[status] for status in statuses]

    async def release(self, claims: Sequence[tuple[str, str]]) -> int:
        """Gives back jobs by id and fence. Tells how many were still held."""
        return int(await self._call("release", *chain.from_iterable(claims)))

    async def heartbeat(self, status: job_pb2.WorkerStatus) -> None:
        await self._call("heartbeat", status.worker_id, status.SerializeToString())

    async def sweep(self, *, stall_ms: int) -> tuple[SweepReport, bool]:
        """Sets right what time has changed. Also tells whether there is more to do at once."""
        *counts, is_cut_off = await self._call("sweep", stall_ms, _SWEEP_LIMIT)
        return SweepReport(*counts), bool(is_cut_off)

    async def reconcile(self, *, max_keys: int, pause_ms: int) -> tuple[int, int]:
        """Walks on over the jobs, if nobody has for `pause_ms`. Tells how many it looked at, and its repairs."""
        num_jobs, num_repairs = await self._call("reconcile", max_keys, pause_ms)
        return num_jobs, num_repairs

    async def dead(self, max_jobs: int) -> list[DeadLetter]:
        """Jobs whose workers died with them, the last to die first."""
        return [
            DeadLetter(job_id.decode(), age_ms, end_position, job_pb2.Job.FromString(job))
            for job_id, age_ms, end_position, job in await self._call("dead", max_jobs)
        ]

    async def revive(self, job_id: str) -> bool:
        """Has a dead job wait again. False: it was not dead."""
        return bool(await self._call("revive", job_id))

    async def wait_for_wake(self, model: str, timeout_s: float) -> None:
        """Returns when a job of the model was queued, and at the latest after the timeout or MAX_BLOCK_S."""
        # Redis takes a timeout of 0 for "never".
        block_s = max(0.001, min(timeout_s, MAX_BLOCK_S))
        await self._carry_out(self._send("BLPOP", self.keys.wake(model), block_s), is_wait=True)

    async def last_update_id(self, gateway_id: str) -> str:
        """Id of the newest batch in a gateway's stream, for `read_updates` to go on from."""
        key = self.keys.updates(gateway_id)
        newest = await self._carry_out(self._send("XREVRANGE", key, "+", "-", "COUNT", 1))
        return newest[0][0].decode() if newest else "0-0"

    async def read_updates(self, gateway_id: str, after_id: str) -> list[tuple[str, job_pb2.UpdateBatch]]:
        """Batches behind an id. Waits at most MAX_BLOCK_S for one."""
        key = self.keys.updates(gateway_id)
        block_ms = int(MAX_BLOCK_S * 1000)
        command = ("XREAD", "COUNT", _UPDATES_PER_READ, "BLOCK", block_ms, "STREAMS", key, after_id)
        reply = await self._carry_out(self._send(*command), is_wait=True)
        return [
            (batch_id.decode(), job_pb2.UpdateBatch.FromString(fields[b"batch"]))
            for _, batches in reply or ()
            for batch_id, fields in batches
        ]

    async def trim_updates(self, gateway_id: str, read_id: str) -> None:
        """Drops batches before an id, which their gateway has read."""
        key = self.keys.updates(gateway_id)
        await self._carry_out(self._send("XTRIM", key, "MINID", "~", read_id))

    def _spread_otherwise(self, num_shards: int) -> QueueUnavailableError:
        message = f"the queue's jobs are spread over {num_shards} shards, not {self._num_shards}"
        return QueueUnavailableError(UnavailableReason.SPREAD_OTHERWISE, message)

    async def _call(self, name: str, *arguments: Argument, durability: Durability = Durability.LOCAL) -> Any:
        # Any: each function answers in its own shape, which the method that calls it takes apart.
        return await self._carry_out(self._call_loaded(name, arguments, durability))

    async def _call_loaded(self, name: str, arguments: Sequence[Argument], durability: Durability) -> Any:
        """Calls a function; where the server does not know it, loads the library and calls again."""
        command = ("FCALL", self._library.function(name), 1, self.keys.root, *arguments)
        call = self._send if durability is Durability.LOCAL else self._send_replicated
        try:
            return await call(*command)
        except LibraryMissingError:
            await self._install()
        return await call(*command)

    async def _install(self) -> None:
        """The library is loaded, and others that nobody uses any more are gone."""
        await check_server(self._redis)
        await install(self._redis, self._library)
        versions = await self._send("ZRANGE", self.keys.versions, 0, -1)
        used = {self._library.version, *(version.decode() for version in versions)}
        await remove_unused(self._redis, used)

    async def _send(self, *command: Argument | float) -> Any:
        return await send(self._redis, self.keys.root, *command)

    async def _send_replicated(self, *command: Argument) -> Any:
        reply, num_replicas = await send_and_wait(
            self._redis, self.keys.root, *command, num_replicas=1, timeout_ms=_REPLICATION_TIMEOUT_MS
        )
        if num_replicas < 1:
            raise QueueUnavailableError(UnavailableReason.NOT_REPLICATED, "no replica has confirmed the job in time")
        return reply

    async def _carry_out(self, call: Coroutine[Any, Any, T], *, is_wait: bool = False) -> T:
        """The call's result. If the caller is cancelled, the call still comes to its end before the cancellation.

        A call that only waits for something is cancelled as well, until it hears: below Python 3.12, `asyncio.wait_for`
        inside the client library can swallow a cancellation.
        """
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while is_wait and not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)
            await asyncio.wait([task])
            raise


def _read_snapshot(reply: Any) -> JobSnapshot | None:
    if reply is None:
        return None
    name, queue_position, tokens_ahead, end_position, written, job_bytes = reply
    state, job = JobState(name.decode()), job_pb2.Job.FromString(job_bytes)
    return JobSnapshot(
        state=state,
        queue_position=queue_position,
        tokens_ahead=tokens_ahead,
        end_position=end_position,
        outcome=outcome_of(state, written, prompt_tokens=len(job.prompt_token_ids), end_position=end_position),
        job=job,
    )


def _or_empty(number: int | None) -> Argument:
    """How a function takes a number that may be absent."""
    return "" if number is None else number


def _queue_name(job: job_pb2.Job, name: str) -> str:
    """What a model or a tenant is called in the queue of such a job."""
    return scoring_queue(name) if job.score_items else name


def _prompt_digest(job: job_pb2.Job) -> str:
    """The same for a tenant's same prompt to the same model."""
    digest = hashlib.blake2b(array("I", job.prompt_token_ids).tobytes(), digest_size=16, person=b"oasst.prompt")
    for item in job.score_items:
        digest.update(array("I", [len(item.token_ids), item.context_length, *item.token_ids]).tobytes())
    for name in (job.tenant, job.model):
        digest.update(len(name.encode()).to_bytes(4) + name.encode())
    return digest.hexdigest()


def _push_arguments(items: Sequence[PushItem]) -> list[Argument]:
    """What `push` takes for these items."""
    arguments: list[Argument] = []
    outcomes: list[Argument] = []
    for number, item in enumerate(items, start=1):
        job_id, start_position, entry, outcome = item.job_id, item.start_position, item.entry, item.outcome
        renews = "1" if item.renews else ""
        end_position = start_position
        if entry is not None:
            end_position = entry.end_position
            if end_position <= start_position:
                raise ValueError(f"an entry from {start_position} to {end_position} holds no token")
            body = entry.SerializeToString()
            head = update_head(job_id, start_position, field=_ENTRY_FIELD, length=len(body))
            arguments += (job_id, item.fence, start_position, end_position, head, body, renews)
        elif outcome is not None:
            arguments += (job_id, item.fence, start_position, end_position, b"", b"", renews)
        else:
            arguments += (job_id, item.fence, "", "", b"", b"", renews)
        if outcome is not None:
            body = outcome.SerializeToString()
            head = update_head(job_id, end_position, field=_OUTCOME_FIELD, length=len(body))
            outcomes += (number, head, body, state_of(outcome))
    return arguments + outcomes
