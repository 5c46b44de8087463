"""Who comes next: tenants by weight, a tenant's own jobs by priority, equals by arrival."""

import random
from collections import Counter

import redis.asyncio
from job_samples import MODEL, finished, make_entry, make_job
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2
from oasst_jobs import ClaimedJob, Claimer, PushItem, QueueClient, Submitter, TenantPolicy

BULK, NORMAL, HIGH = chat_pb2.PRIORITY_BULK, chat_pb2.PRIORITY_NORMAL, chat_pb2.PRIORITY_HIGH


async def submit(submitter: Submitter, *jobs: job_pb2.Job, weight: float = 1.0) -> None:
    for job in jobs:
        await submitter.submit(job, digest=b"digest", timeout_ms=None, policy=TenantPolicy(weight=weight))


def jobs_of(tenant: str, number: int, **about) -> list[job_pb2.Job]:
    return [make_job(f"{tenant}{index}", tenant=tenant, **about) for index in range(number)]


async def serve(claimer: Claimer, number: int) -> list[ClaimedJob]:
    """One job after the other, as workers with little room take them."""
    served = []
    while len(served) < number and (claims := await claimer.claim(max_jobs=1, max_tokens=100_000)):
        served += claims
    return served


def tokens_by_tenant(served: list[ClaimedJob]) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for claimed in served:
        tokens[claimed.job.tenant] += len(claimed.job.prompt_token_ids) + claimed.job.limits.max_new_tokens
    return tokens


async def end(claimer: Claimer, claimed: ClaimedJob, num_tokens: int) -> None:
    entry = make_entry(0, num_tokens)
    await claimer.push([PushItem(claimed.job_id, claimed.fence, 0, entry, finished(num_tokens))])


async def test_one_tenants_flood_does_not_delay_anothers_job(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *jobs_of("flood", 200))
    await serve(claimer, 20)
    await submit(submitter, *jobs_of("guest", 1))
    assert "guest" in [claimed.job.tenant for claimed in await serve(claimer, 2)]


async def test_tenants_with_work_share_what_is_served_by_weight(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *jobs_of("heavy", 120), weight=3.0)
    await submit(submitter, *jobs_of("light", 120), weight=1.0)
    served = tokens_by_tenant(await serve(claimer, 120))
    assert 2.8 < served["heavy"] / served["light"] < 3.2


async def test_shares_are_of_tokens_not_of_jobs(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *jobs_of("long", 60, max_new_tokens=396), *jobs_of("short", 240, max_new_tokens=36))
    served = tokens_by_tenant(await serve(claimer, 110))
    assert 0.9 < served["long"] / served["short"] < 1.1


async def test_any_mix_of_tenants_gets_its_shares(submitter: Submitter, claimer: Claimer) -> None:
    dice = random.Random(5)
    weights = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 4.0}
    for tenant, weight in weights.items():
        for job in jobs_of(tenant, 150):
            job.limits.max_new_tokens = dice.randint(10, 200)
            await submit(submitter, job, weight=weight)
    served = tokens_by_tenant(await serve(claimer, 200))
    fair = {tenant: served.total() * weight / sum(weights.values()) for tenant, weight in weights.items()}
    # Nobody is ahead or behind by more than two of its own jobs.
    assert all(abs(served[tenant] - fair[tenant]) <= 2 * 204 for tenant in weights), (served, fair)


async def test_a_tenant_that_was_idle_has_saved_nothing_up(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *jobs_of("busy", 100))
    await serve(claimer, 50)
    await submit(submitter, *jobs_of("idle", 50))
    served = Counter(claimed.job.tenant for claimed in await serve(claimer, 20))
    assert served == {"busy": 10, "idle": 10}


async def test_virtual_time_is_not_lost_to_rounding(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    """Sizes by a weight of 3 have no end in decimals."""
    for number in range(30):
        await submit(submitter, make_job(str(number)), weight=3.0)
        await serve(claimer, 1)
        assert await redis_client.zscore(f"{client.shards[0].keys.root}:flows:{MODEL}", "now") is not None


async def test_a_tenant_that_was_served_does_not_come_behind_a_whole_flood_of_newcomers(
    submitter: Submitter, claimer: Claimer
) -> None:
    policy = TenantPolicy(weight=3.0)
    for number in range(30):
        newcomers = jobs_of(f"newcomer {number} ", 9)
        await submit(submitter, *newcomers, weight=3.0)
        job = make_job(str(number), tenant="regular")
        submitted = await submitter.submit(job, digest=b"digest", timeout_ms=None, policy=policy)
        assert submitted.queue_position <= 2
        for newcomer in newcomers:
            await submitter.cancel(newcomer.job_id)
        await serve(claimer, 1)


async def test_jobs_of_different_tenants_that_come_at_the_same_virtual_time_keep_their_order(
    submitter: Submitter, claimer: Claimer
) -> None:
    tenants = [f"tenant {number}" for number in range(50)]
    await submit(submitter, *(make_job("only", tenant=tenant) for tenant in tenants))
    assert [claimed.job.tenant for claimed in await serve(claimer, 50)] == tenants


async def test_an_urgent_job_passes_the_tenants_own_others(submitter: Submitter, claimer: Claimer) -> None:
    await submit(submitter, *jobs_of("tenant", 100, priority=BULK))
    await submit(submitter, make_job("normal", priority=NORMAL), make_job("high", priority=HIGH))
    assert [claimed.job.request_id for claimed in await serve(claimer, 2)] == ["high", "normal"]


async def test_priority_does_not_raise_a_tenants_share(submitter: Submitter, claimer: Claimer) -> None:
    for number in range(40):
        for priority in (BULK, NORMAL, HIGH):
            job = make_job(f"{priority} {number}", tenant="pushy", priority=priority, max_new_tokens=996)
            await submit(submitter, job)
    await submit(submitter, *jobs_of("modest", 120, max_new_tokens=996))
    served = Counter(claimed.job.tenant for claimed in await serve(claimer, 160))
    # Each lane served as a tenant of its own would leave 40. Half would be 80: what came early in an urgent lane has a
    # place before what the same tenant asked for earlier still, and keeps it.
    assert served["modest"] >= 60


async def test_a_bulk_job_is_served_in_time_however_many_urgent_ones_another_sends(
    submitter: Submitter, claimer: Claimer
) -> None:
    await submit(submitter, make_job("patient", tenant="patient", priority=BULK))
    for number in range(30):
        await submit(submitter, make_job(str(number), tenant="pushy", priority=HIGH, max_new_tokens=996))
        if "patient" in [claimed.job.tenant for claimed in await serve(claimer, 1)]:
            return
    raise AssertionError("the bulk job starved")


async def test_what_a_job_did_not_use_is_given_back_to_its_tenant(submitter: Submitter, claimer: Claimer) -> None:
    """One tenant asks for far more than it takes. Both take the same, and come to get the same."""
    await submit(submitter, *jobs_of("asks much", 2, max_new_tokens=996), *jobs_of("asks little", 2))
    served: Counter[str] = Counter()
    for number in range(200):
        [claimed] = await serve(claimer, 1)
        tenant = claimed.job.tenant
        served[tenant] += number >= 100
        await end(claimer, claimed, 16)
        asked = 996 if tenant == "asks much" else 16
        await submit(submitter, make_job(f"more {number}", tenant=tenant, max_new_tokens=asked))
    assert 45 <= served["asks much"] <= 55


async def test_a_cancelled_job_costs_its_tenant_nothing(submitter: Submitter, claimer: Claimer) -> None:
    cancelled = jobs_of("fickle", 50, max_new_tokens=996)
    await submit(submitter, *cancelled)
    for job in cancelled:
        await submitter.cancel(job.job_id)
    await submit(submitter, *jobs_of("steady", 20), make_job("last", tenant="fickle"))
    assert "fickle" in [claimed.job.tenant for claimed in await serve(claimer, 2)]


async def test_a_returned_job_comes_next_even_after_virtual_time_was_forgotten(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter, *jobs_of("tenant", 30))
    claims = await serve(claimer, 30)
    await redis_client.delete(f"{client.shards[0].keys.root}:flows:{MODEL}")
    await submit(submitter, *jobs_of("later", 3))
    await claimer.release(claims[-1:])
    assert claims[-1].job_id in [claimed.job_id for claimed in await serve(claimer, 2)]


async def test_idle_tenants_are_forgotten(
    submitter: Submitter, claimer: Claimer, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await submit(submitter, *(make_job("only", tenant=f"tenant {number}") for number in range(50)))
    await submit(submitter, *jobs_of("busy", 50))
    await serve(claimer, 100)
    members = await redis_client.zrange(f"{client.shards[0].keys.root}:flows:{MODEL}", 0, -1)
    assert sorted(members) == [b"1busy", b"2busy", b"now"]
