"""What a gateway puts in, asks for and takes back."""

import asyncio

import pytest
import redis.asyncio
from job_samples import MODEL, finished, make_entry, make_job, make_scoring_job
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import (
    Claimer,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueFullError,
    QueueLimits,
    RequestConflictError,
    Submitted,
    Submitter,
    TenantFullError,
    TenantPolicy,
    TooMuchAheadError,
    job_id_for,
)


async def submit(submitter: Submitter, *jobs: job_pb2.Job, timeout_ms: int | None = None) -> None:
    for job in jobs:
        await submitter.submit(job, digest=b"digest", timeout_ms=timeout_ms)


def test_job_id_depends_on_tenant_and_request_and_keeps_them_apart() -> None:
    assert job_id_for("a", "request") == job_id_for("a", "request")
    assert len({job_id_for("a", "bc"), job_id_for("ab", "c"), job_id_for("", "abc"), job_id_for("a", "bd")}) == 4
    assert job_id_for("tenant", "{injected}:*\r\n").isalnum()


async def test_a_submitted_job_waits_behind_those_before_it(submitter: Submitter) -> None:
    first, second = make_job("first"), make_job("second")
    submitted = [await submitter.submit(job, digest=b"", timeout_ms=None) for job in (first, second)]
    assert submitted == [
        Submitted(True, JobState.WAITING, queue_position=0, tokens_ahead=0, job=first),
        Submitted(True, JobState.WAITING, queue_position=1, tokens_ahead=20, job=second),
    ]

    snapshot = await submitter.status(second.job_id)
    assert snapshot is not None
    assert (snapshot.state, snapshot.end_position) == (JobState.WAITING, 0)
    assert (snapshot.queue_position, snapshot.tokens_ahead) == (1, 20)
    assert snapshot.job == second
    assert snapshot.outcome is None


async def test_submitting_again_attaches_to_the_same_job(submitter: Submitter, claimer: Claimer) -> None:
    job = make_job("again")
    await submit(submitter, job)
    redrawn = make_job("again", max_new_tokens=3)
    again = await submitter.submit(redrawn, digest=b"digest", timeout_ms=None)
    assert again == Submitted(is_new=False, state=JobState.WAITING, queue_position=0, tokens_ahead=0, job=job)

    assert len(await claimer.claim(max_jobs=8, max_tokens=1000)) == 1
    again = await submitter.submit(redrawn, digest=b"digest", timeout_ms=None)
    assert again == Submitted(is_new=False, state=JobState.RUNNING, queue_position=0, tokens_ahead=0, job=job)
    assert await claimer.claim(max_jobs=8, max_tokens=1000) == []


async def test_the_same_id_with_another_request_is_a_conflict(submitter: Submitter) -> None:
    job = make_job("conflict")
    await submit(submitter, job)
    with pytest.raises(RequestConflictError) as caught:
        await submitter.submit(job, digest=b"another", timeout_ms=None)
    assert caught.value.job_id == job.job_id


async def test_a_full_queue_refuses_new_jobs_but_not_known_ones(client: QueueClient) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(max_waiting_jobs=2))
    known = make_job("known")
    await submit(submitter, known, make_job("other"))

    with pytest.raises(QueueFullError) as caught:
        await submit(submitter, make_job("one too many"))
    assert (caught.value.waiting_jobs, caught.value.waiting_tokens) == (2, 40)
    assert (await submitter.submit(known, digest=b"digest", timeout_ms=None)).is_new is False


@pytest.mark.parametrize("limits", [QueueLimits(max_waiting_jobs=12), QueueLimits(max_waiting_tokens=240)])
async def test_whoever_fills_the_queue_keeps_no_other_tenant_out(client: QueueClient, limits: QueueLimits) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=limits)

    async def fill(tenant: str, weight: float = 1.0) -> int:
        """How many of the tenant's jobs are let in."""
        for number in range(30):
            job = make_job(f"{tenant} {number}", tenant=tenant)
            try:
                await submitter.submit(job, digest=b"", timeout_ms=None, policy=TenantPolicy(weight=weight))
            except QueueFullError:
                return number
        return 30

    assert await fill("flood") == 12
    assert await fill("guest") == 6
    assert await fill("heavy", weight=2.0) == 6  # Half of it; the flood has no place above its share.
    assert await fill("late") == 0  # What waits is twice the limit: nobody is let in.


async def test_the_share_of_a_tenant_is_among_those_that_wait(client: QueueClient, claimer: Claimer) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(max_waiting_jobs=4))
    await submit(submitter, *(make_job(f"gone {number}", tenant="gone") for number in range(4)))
    assert len(await claimer.claim(max_jobs=4, max_tokens=1000)) == 4
    await submit(submitter, *(make_job(f"flood {number}", tenant="flood") for number in range(4)))
    await submit(submitter, *(make_job(f"guest {number}", tenant="guest") for number in range(2)))
    with pytest.raises(QueueFullError):
        await submit(submitter, make_job("guest 2", tenant="guest"))


async def test_the_share_of_a_tenant_is_among_those_that_wait_in_the_same_queue(client: QueueClient) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(max_waiting_jobs=4))
    await submit(submitter, make_job("elsewhere", tenant="other", model="other"), make_scoring_job("to be scored"))
    await submit(submitter, *(make_job(f"flood {number}", tenant="flood") for number in range(4)))
    await submit(submitter, *(make_job(f"guest {number}", tenant="guest") for number in range(2)))  # Its half.
    with pytest.raises(QueueFullError):
        await submit(submitter, make_job("guest 2", tenant="guest"))


async def test_a_share_among_very_many_tenants_takes_few_commands(
    client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(max_waiting_jobs=1200))
    for first in range(0, 1200, 50):  # No more at once than there are connections.
        jobs = [make_job("job", tenant=f"tenant {number}") for number in range(first, first + 50)]
        await asyncio.gather(*(submitter.submit(job, digest=b"", timeout_ms=None) for job in jobs))

    async def submit_guest(number: int) -> None:
        job, policy = make_job(str(number), tenant="guest"), TenantPolicy(weight=100.0)
        await submitter.submit(job, digest=b"", timeout_ms=None, policy=policy)

    for number in range(1200 * 100 // (1200 + 100)):
        await submit_guest(number)
    await redis_client.config_resetstat()
    with pytest.raises(QueueFullError):
        await submit_guest(1200)
    stats = await redis_client.info("commandstats")
    assert sum(command["calls"] for command in stats.values()) < 30


async def test_tokens_that_wait_have_a_limit_of_their_own(client: QueueClient) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(max_waiting_tokens=100))
    await submit(submitter, make_job("alone", prompt_tokens=400))
    with pytest.raises(QueueFullError) as caught:
        await submit(submitter, make_job("too much"))
    assert (caught.value.waiting_jobs, caught.value.waiting_tokens) == (1, 416)
    await submit(submitter, make_job("elsewhere", model="other"))


async def test_a_tenant_with_as_much_waiting_as_it_may_is_refused_and_others_are_not(
    submitter: Submitter,
) -> None:
    for policy in (TenantPolicy(max_waiting_jobs=2), TenantPolicy(max_waiting_tokens=50)):
        await submit(submitter, make_job("a1"), make_job("a2", model="other"))
        with pytest.raises(TenantFullError) as caught:
            await submitter.submit(make_job("a3"), digest=b"digest", timeout_ms=None, policy=policy)
        assert (caught.value.waiting_jobs, caught.value.waiting_tokens) == (2, 40)
        await submitter.submit(make_job("b1", tenant="other"), digest=b"digest", timeout_ms=None, policy=policy)


async def test_what_runs_or_has_ended_does_not_count_against_its_tenant(submitter: Submitter, claimer: Claimer) -> None:
    policy = TenantPolicy(max_waiting_jobs=1, max_waiting_tokens=20)
    for request_id in ("runs", "is cancelled", "waits"):
        job = make_job(request_id)
        await submitter.submit(job, digest=b"digest", timeout_ms=None, policy=policy)
        if request_id == "runs":
            assert len(await claimer.claim(max_jobs=1, max_tokens=1000)) == 1
        elif request_id == "is cancelled":
            await submitter.cancel(job.job_id)


async def test_many_submits_at_once_stay_within_the_tenants_limit(submitter: Submitter) -> None:
    policy = TenantPolicy(max_waiting_jobs=7)
    submits = [
        submitter.submit(make_job(str(number)), digest=b"digest", timeout_ms=None, policy=policy)
        for number in range(40)
    ]
    results = await asyncio.gather(*submits, return_exceptions=True)
    assert sum(isinstance(result, Submitted) for result in results) == 7
    assert sum(isinstance(result, TenantFullError) for result in results) == 33


async def test_a_job_with_too_much_ahead_of_it_is_refused(submitter: Submitter) -> None:
    await submit(submitter, make_job("first"), make_job("second"))
    with pytest.raises(TooMuchAheadError) as caught:
        await submitter.submit(make_job("third"), digest=b"digest", timeout_ms=None, max_tokens_ahead=39)
    assert (caught.value.jobs_ahead, caught.value.tokens_ahead) == (2, 40)
    assert (await submitter.load(MODEL)).waiting_jobs == 2
    await submitter.submit(make_job("third"), digest=b"digest", timeout_ms=None, max_tokens_ahead=40)


async def test_only_what_is_served_earlier_counts_as_ahead(submitter: Submitter) -> None:
    await submit(submitter, *(make_job(str(number)) for number in range(10)))
    for job in (make_job("urgent", priority=chat_pb2.PRIORITY_HIGH), make_job("other", tenant="other")):
        submitted = await submitter.submit(job, digest=b"digest", timeout_ms=None, max_tokens_ahead=40)
        assert submitted.queue_position <= 2


@pytest.mark.parametrize("weight", [0.0, -1.0, 1000.0, float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        TenantPolicy(weight=weight)


async def test_unknown_jobs_are_none(submitter: Submitter) -> None:
    assert await submitter.status("unknown") is None
    assert await submitter.attach("unknown") is None
    assert await submitter.cancel("unknown") is None


async def test_attaching_to_an_unknown_job_leaves_nothing_behind(
    submitter: Submitter, redis_client: redis.asyncio.Redis
) -> None:
    await submitter.attach("unknown")
    assert await redis_client.dbsize() == 0


async def test_a_gateway_id_is_one_word(client: QueueClient) -> None:
    for gateway_id in ("", "two words", "line\n"):
        with pytest.raises(ValueError, match="one word"):
            Submitter(client, gateway_id=gateway_id, limits=QueueLimits())


async def test_a_waiting_job_is_cancelled_at_once_and_never_claimed(submitter: Submitter, claimer: Claimer) -> None:
    job = make_job("cancelled")
    await submit(submitter, job)
    assert await submitter.cancel(job.job_id) is JobState.CANCELLED
    assert await submitter.cancel(job.job_id) is JobState.CANCELLED

    snapshot = await submitter.status(job.job_id)
    assert snapshot is not None
    assert snapshot.outcome is not None
    assert snapshot.outcome.failed.reason == "CANCELLED"
    assert snapshot.outcome.failed.usage == chat_pb2.Usage(prompt_tokens=4)
    assert await claimer.claim(max_jobs=8, max_tokens=1000) == []


async def test_a_running_job_is_cancelled_at_once_and_its_worker_hears_it_from_its_next_push(
    submitter: Submitter, claimer: Claimer
) -> None:
    job = make_job("cancelled")
    await submit(submitter, job)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await claimer.push([PushItem(job.job_id, claimed.fence, 0, make_entry(0, 3))])

    assert await submitter.cancel(job.job_id) is JobState.CANCELLED
    assert await claimer.push([PushItem(job.job_id, claimed.fence, 3, make_entry(3, 4))]) == [PushStatus.CANCELLED]
    snapshot = await submitter.status(job.job_id)
    assert snapshot is not None
    assert snapshot.end_position == 3
    assert snapshot.outcome is not None
    assert snapshot.outcome.failed.usage == chat_pb2.Usage(prompt_tokens=4, completion_tokens=3)


async def test_cancelling_a_finished_job_changes_nothing(submitter: Submitter, claimer: Claimer) -> None:
    job = make_job("finished")
    await submit(submitter, job)
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await claimer.push([PushItem(job.job_id, claimed.fence, 0, make_entry(0, 1), finished(1))])

    assert await submitter.cancel(job.job_id) is JobState.FINISHED
    snapshot = await submitter.status(job.job_id)
    assert snapshot is not None
    assert snapshot.outcome == finished(1)


async def test_a_cancelled_submit_has_been_carried_out_when_the_cancellation_goes_on(submitter: Submitter) -> None:
    job = make_job("interrupted")
    call = asyncio.create_task(submitter.submit(job, digest=b"digest", timeout_ms=None))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await submitter.cancel(job.job_id) is JobState.CANCELLED


async def test_load_counts_what_waits_and_runs_of_its_model_alone(submitter: Submitter, claimer: Claimer) -> None:
    async def load_of(model: str) -> tuple[int, int, int]:
        load = await submitter.load(model)
        return load.waiting_jobs, load.waiting_tokens, load.running_jobs

    await submit(
        submitter,
        make_job("a", prompt_tokens=10, max_new_tokens=20, n=2),
        make_job("b", prompt_tokens=1, max_new_tokens=1, model="other"),
        make_job("c", prompt_tokens=7, max_new_tokens=3),
    )
    assert [await load_of(MODEL), await load_of("other")] == [(2, 50 + 10, 0), (1, 2, 0)]

    claimed = await claimer.claim(max_jobs=1, max_tokens=1000)
    assert [await load_of(MODEL), await load_of("other")] == [(1, 10, 1), (1, 2, 0)]
    await claimer.release(claimed)
    assert await load_of(MODEL) == (2, 50 + 10, 0)

    await claimer.claim(max_jobs=1, max_tokens=1000)
    for request_id in "abc":
        await submitter.cancel(job_id_for("tenant", request_id))
    assert [await load_of(MODEL), await load_of("other")] == [(0, 0, 0), (0, 0, 0)]


async def test_load_shows_the_workers_of_its_model_alone(submitter: Submitter, claimer: Claimer) -> None:
    for worker_id, model in (("worker-1", MODEL), ("worker-2", "other")):
        await claimer.heartbeat(job_pb2.WorkerStatus(worker_id=worker_id, model=model))
    assert [status.worker_id for status, _ in (await submitter.load("other")).workers] == ["worker-2"]


async def test_load_shows_each_workers_last_status_and_its_age(submitter: Submitter, claimer: Claimer) -> None:
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL, running_sequences=1))
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-2", model=MODEL, running_sequences=2))
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL, running_sequences=3))

    workers = {
        status.worker_id: (status.running_sequences, age_ms) for status, age_ms in (await submitter.load(MODEL)).workers
    }
    assert {worker_id: running for worker_id, (running, _) in workers.items()} == {"worker-1": 3, "worker-2": 2}
    assert all(0 <= age_ms < 10_000 for _, age_ms in workers.values())


async def test_a_worker_silent_for_long_is_shown_no_more(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="silent", model=MODEL))
    await redis_client.zincrby(f"{client.shards[0].keys.root}:heartbeats", -60_000, "silent")
    assert (await submitter.load(MODEL)).workers == []

    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="alive", model=MODEL))
    assert await redis_client.hkeys(f"{client.shards[0].keys.root}:workers") == [b"alive"]
