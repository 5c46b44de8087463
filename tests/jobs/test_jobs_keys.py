"""Nothing is stored that keys.py does not name, and nothing stays for ever."""

import re

import oasst_jobs.keys
import pytest
import redis.asyncio
from job_samples import MODEL, finished, make_entry, make_job
from oasst.jobs.v1 import job_pb2
from oasst_jobs import Claimer, JobState, PushItem, QueueClient, QueueLimits, Submitter, Sweeper
from waiting import until

# Kind of key -> type and most milliseconds to its expiry, None for a key that others keep or that stays.
KINDS = {
    "job": ("hash", None),
    "log": ("stream", None),
    "waiting": ("zset", None),
    "waiting_tokens": ("hash", None),
    "tenants": ("hash", None),
    "tenant_jobs": ("hash", None),
    "tenant_tokens": ("hash", None),
    "tenant_weights": ("hash", None),
    "flows": ("zset", 3_600_000),
    "running": ("zset", None),
    "leases": ("zset", None),
    "deadlines": ("zset", None),
    "watched": ("zset", None),
    "claim": ("string", 10_000),
    "suspects": ("set", 120_000),
    "dead": ("zset", None),
    "poison": ("string", 3_600_000),
    "wake": ("list", 10_000),
    "updates": ("stream", 60_000),
    "workers": ("hash", 15_000),
    "heartbeats": ("zset", 15_000),
    "versions": ("zset", 3_600_000),
    "counters": ("hash", None),
}


async def live(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    """Jobs end in every way there is; one runs; one waits, was passed over, and a worker keeps itself for it."""
    for request_id in ("finished", "failed", "cancelled", "expired", "running", "waiting"):
        timeout_ms = 60_000 if request_id == "expired" else None
        await submitter.submit(make_job(request_id), digest=b"digest", timeout_ms=timeout_ms, grace_ms=1_000)
    claims = {claimed.job.request_id: claimed for claimed in await claimer.claim(max_jobs=5, max_tokens=1000)}
    items = [
        PushItem(claimed.job_id, claimed.fence, 0, make_entry(0, 2), finished(2) if name == "finished" else None)
        for name, claimed in claims.items()
        if name != "running"
    ]
    await claimer.push(items)
    await submitter.cancel(claims["cancelled"].job_id)
    poisoned = claims["failed"].job_id
    await redis_client.hset(f"{client.shards[0].keys.root}:job:{poisoned}", "charge", 11)
    await redis_client.zadd(f"{client.shards[0].keys.root}:leases", {poisoned: 1})
    await redis_client.zadd(f"{client.shards[0].keys.root}:deadlines", {claims["expired"].job_id: 1})
    await sweeper.sweep()
    for _ in range(2):
        await claimer.claim(max_jobs=1, max_tokens=1)
        await redis_client.hset(f"{client.shards[0].keys.root}:job:{make_job('waiting').job_id}", "passed_over_ms", 1)
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL))


async def test_every_key_is_one_that_is_named_and_has_its_type_and_expiry(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await live(submitter, claimer, sweeper, client, redis_client)
    seen = set()
    for key in await redis_client.keys():
        name = key.decode()
        assert name.startswith(f"{client.shards[0].keys.root}:")
        kind = name.removeprefix(f"{client.shards[0].keys.root}:").partition(":")[0]
        key_type, max_ttl_ms = KINDS[kind]
        assert (await redis_client.type(key)).decode() == key_type, name
        if max_ttl_ms is not None:
            assert 0 < await redis_client.pttl(key) <= max_ttl_ms, name
        seen.add(kind)
    # Expired just now is what could expire: `deadlines` is gone with its only job.
    assert seen == set(KINDS) - {"deadlines"}


def test_every_kind_of_key_is_described() -> None:
    described = re.findall(r"^`oasst:\{0\}:(\w+)", oasst_jobs.keys.__doc__ or "", flags=re.MULTILINE)
    assert sorted(described) == sorted(KINDS)


async def test_every_field_of_a_job_is_described(
    submitter: Submitter, claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await live(submitter, claimer, sweeper, client, redis_client)
    stored = set()
    for key in await redis_client.keys(f"{client.shards[0].keys.root}:job:*"):
        stored |= {field.decode() for field in await redis_client.hkeys(key)}
    fields = (oasst_jobs.keys.__doc__ or "").partition("Fields of a job hash.")[2]
    described = {name for line in fields.splitlines() for name in re.findall(r"^(?:`\w+` ?)+", line)}
    assert stored == set(re.findall(r"\w+", " ".join(described)))


@pytest.mark.parametrize("request_id", ["finished", "failed", "cancelled", "expired"])
async def test_what_has_ended_goes_after_its_retention(
    submitter: Submitter,
    claimer: Claimer,
    sweeper: Sweeper,
    client: QueueClient,
    redis_client: redis.asyncio.Redis,
    request_id: str,
) -> None:
    await live(submitter, claimer, sweeper, client, redis_client)
    job_id = make_job(request_id).job_id
    snapshot = await submitter.status(job_id)
    assert snapshot is not None
    assert snapshot.state is JobState(request_id)
    for kind in ("job", "log"):
        longest_ms = 86_400_000 if request_id == "failed" else 300_000  # That one is dead.
        assert 0 < await redis_client.pttl(f"{client.shards[0].keys.root}:{kind}:{job_id}") <= longest_ms


async def test_after_a_drain_only_the_counters_have_no_expiry(
    claimer: Claimer, sweeper: Sweeper, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(retention_s=0.05))
    await live(submitter, claimer, sweeper, client, redis_client)
    for request_id in ("running", "waiting"):
        await submitter.cancel(make_job(request_id).job_id)
    dead = make_job("failed").job_id
    for kind in ("job", "log"):
        await redis_client.delete(f"{client.shards[0].keys.root}:{kind}:{dead}")
    await redis_client.zadd(f"{client.shards[0].keys.root}:dead", {dead: 1})
    await sweeper.sweep()

    root = client.shards[0].keys.root.encode()

    async def is_drained() -> bool:
        return not await redis_client.keys(f"{client.shards[0].keys.root}:[jl]o*")

    await until(is_drained)
    lasting = [key for key in await redis_client.keys() if await redis_client.pttl(key) == -1]
    assert lasting == [root + b":counters"]


async def test_a_gateway_id_within_another_is_another(
    submitter: Submitter, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    job = make_job("watched")
    for gateway_id in ("gateway-11", "gateway-1", "gateway-11", "1"):
        await Submitter(client, gateway_id=gateway_id, limits=QueueLimits()).submit(
            job, digest=b"digest", timeout_ms=None
        )
    watchers = await redis_client.hget(f"{client.shards[0].keys.root}:job:{job.job_id}", "watchers")
    assert watchers == b"gateway-11 gateway-1 1"
