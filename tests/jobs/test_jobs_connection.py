"""What is said when the server is gone, wrong, or not ready, and how the queue comes back by itself."""

import asyncio
import time
from pathlib import Path

import pytest
import redis.asyncio
import redis.exceptions
from job_samples import MODEL, finished, make_entry, make_job
from oasst_jobs import (
    Claimer,
    Durability,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueError,
    QueueLimits,
    QueueUnavailableError,
    Submission,
    Submitter,
    Sweeper,
    UnavailableReason,
    UnsupportedServerError,
    connect,
)
from oasst_jobs.errors import translate
from oasst_jobs.functions import Shard
from oasst_jobs.library import LIBRARY
from valkey_server import free_port


async def submit(submitter: Submitter, request_id: str = "job") -> str:
    job = make_job(request_id)
    await submitter.submit(job, digest=b"digest", timeout_ms=None)
    return job.job_id


async def test_the_library_is_loaded_by_the_first_call_and_again_when_it_is_gone(
    submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter)
    await redis_client.function_flush()
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await redis_client.function_flush()
    item = PushItem(job_id, claimed.fence, 0, make_entry(0, 1), finished(1))
    assert await claimer.push([item]) == [PushStatus.OK]


async def test_many_clients_may_load_the_library_at_once(redis_client: redis.asyncio.Redis) -> None:
    await asyncio.gather(*(QueueClient(redis_client).check_server() for _ in range(10)))
    assert len(await redis_client.function_list()) == 1


async def test_a_flushed_server_serves_again(submitter: Submitter, redis_client: redis.asyncio.Redis) -> None:
    job_id = await submit(submitter)
    await redis_client.flushall()
    await redis_client.function_flush()
    assert await submitter.status(job_id) is None
    await submit(submitter)
    assert await submitter.cancel(job_id) is JobState.CANCELLED


async def test_libraries_in_use_stay_and_others_go_when_the_next_is_loaded(
    client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    for version in ("used", "unused"):
        code = f"redis.register_function('oasst_push_{version}', function() return 1 end)"
        await redis_client.function_load(f"#!lua name=oasst_jobs_{version}\n{code}")
    await redis_client.function_load("#!lua name=another\nredis.register_function('theirs', function() return 1 end)")
    await redis_client.zadd(client.shards[0].keys.versions, {"used": 1})
    await client.check_server()

    names = {library[1] for library in await redis_client.function_list()}
    assert names == {b"oasst_jobs_used", b"another", LIBRARY.name.encode()}
    assert await redis_client.fcall("oasst_push_used", 0) == 1


class Overtaken(redis.asyncio.Redis):
    """Another process does first what it is about to do with libraries."""

    async def execute_command(self, *command: object, **options: object) -> object:
        if command[:2] == ("FUNCTION", "DELETE"):
            await super().execute_command(*command, **options)
        return await super().execute_command(*command, **options)


async def test_whoever_finds_a_library_removed_already_goes_on(redis_client: redis.asyncio.Redis) -> None:
    await redis_client.function_load("#!lua name=oasst_jobs_old\nredis.register_function('old', function() end)")
    await QueueClient(Overtaken(connection_pool=redis_client.connection_pool)).check_server()
    assert [library[1] for library in await redis_client.function_list()] == [LIBRARY.name.encode()]


async def test_whoever_sweeps_keeps_its_library_in_use(
    client: QueueClient, sweeper: Sweeper, redis_client: redis.asyncio.Redis
) -> None:
    await sweeper.sweep()
    assert await redis_client.zrange(client.shards[0].keys.versions, 0, -1) == [LIBRARY.version.encode()]


async def test_two_shards_know_nothing_of_each_other(redis_client: redis.asyncio.Redis, claimer: Claimer) -> None:
    shard = Shard(redis_client, 1)
    await shard.enqueue(Submission(make_job("elsewhere"), b"digest", QueueLimits()))
    assert await claimer.claim(max_jobs=1, max_tokens=1000) == []
    assert (await shard.load(MODEL)).waiting_jobs == 1


async def test_a_server_that_is_gone_is_unreachable_and_serves_again_when_it_is_back(
    valkey, submitter: Submitter, claimer: Claimer
) -> None:
    job_id = await submit(submitter)
    valkey.kill()
    for call in (submitter.status(job_id), claimer.claim(max_jobs=1, max_tokens=10), claimer.wait_for_work(1.0)):
        started_s = time.monotonic()
        with pytest.raises(QueueUnavailableError) as caught:
            await call
        assert caught.value.reason is UnavailableReason.UNREACHABLE
        assert time.monotonic() - started_s < 2.0
    valkey.start()
    snapshot = await submitter.status(job_id)
    assert snapshot is not None
    assert snapshot.state is JobState.WAITING


async def test_a_socket_that_never_was_is_unreachable(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nowhere.sock")
    with pytest.raises(QueueUnavailableError) as caught:
        await QueueClient(client).load(MODEL)
    assert caught.value.reason is UnavailableReason.UNREACHABLE
    assert "Redis" in str(caught.value)
    await client.aclose()


async def test_a_cluster_that_never_was_is_unavailable_to_replicated_submits_too() -> None:
    client = connect(f"redis+cluster://127.0.0.1:{free_port()}")
    submitter = Submitter(
        QueueClient(client), gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.REPLICATED
    )
    with pytest.raises(QueueUnavailableError) as caught:
        await submit(submitter)
    assert caught.value.reason is UnavailableReason.CLUSTER_DOWN
    await client.aclose()


async def test_a_submit_whose_wait_for_a_replica_is_refused_says_so(
    valkey_url: str, client: QueueClient, redis_client: redis.asyncio.Redis
) -> None:
    await client.check_server()
    await redis_client.execute_command("ACL", "SETUSER", "hasty", "on", ">secret", "~*", "+@all", "-wait")
    hasty_client = connect(valkey_url.replace("unix://", "unix://hasty:secret@"))
    submitter = Submitter(
        QueueClient(hasty_client), gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.REPLICATED
    )
    with pytest.raises(QueueUnavailableError) as caught:
        await submit(submitter)
    assert caught.value.reason is UnavailableReason.ACCESS_DENIED
    await hasty_client.aclose()


async def test_a_server_that_hangs_is_noticed(valkey, submitter: Submitter) -> None:
    job_id = await submit(submitter)
    valkey.pause()
    try:
        started_s = time.monotonic()
        with pytest.raises(QueueUnavailableError) as caught:
            await submitter.status(job_id)
        assert caught.value.reason is UnavailableReason.TIMEOUT
        assert time.monotonic() - started_s < 5.0
    finally:
        valkey.resume()
    assert await submitter.status(job_id) is not None


async def test_a_full_memory_refuses_new_jobs_and_lets_the_others_end(
    submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    running, waiting = await submit(submitter, "running"), await submit(submitter, "waiting")
    [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
    await redis_client.config_set("maxmemory", 1)

    with pytest.raises(QueueUnavailableError) as caught:
        await submit(submitter, "new")
    assert caught.value.reason is UnavailableReason.MEMORY_FULL
    item = PushItem(running, claimed.fence, 0, make_entry(0, 1), finished(1))
    assert await claimer.push([item]) == [PushStatus.OK]
    assert len(await claimer.claim(max_jobs=1, max_tokens=1000)) == 1
    assert await submitter.cancel(waiting) is JobState.CANCELLED


async def test_a_server_that_became_a_replica_is_read_only(
    submitter: Submitter, claimer: Claimer, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await submit(submitter)
    await redis_client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(QueueUnavailableError) as caught:
        await claimer.claim(max_jobs=1, max_tokens=1000)
    assert caught.value.reason in (UnavailableReason.READ_ONLY, UnavailableReason.CLUSTER_DOWN)
    await redis_client.execute_command("REPLICAOF", "NO", "ONE")
    assert await submitter.cancel(job_id) is JobState.CANCELLED


async def test_too_few_replicas_have_their_own_reason(submitter: Submitter, redis_client: redis.asyncio.Redis) -> None:
    await redis_client.config_set("min-replicas-to-write", 1)
    with pytest.raises(QueueUnavailableError) as caught:
        await submit(submitter)
    assert caught.value.reason is UnavailableReason.TOO_FEW_REPLICAS


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (redis.exceptions.ConnectionError("Connection refused"), UnavailableReason.UNREACHABLE),
        (redis.exceptions.TimeoutError("Timeout reading"), UnavailableReason.TIMEOUT),
        (redis.exceptions.BusyLoadingError("Redis is loading"), UnavailableReason.LOADING),
        (redis.exceptions.ReadOnlyError("You can't write"), UnavailableReason.READ_ONLY),
        (redis.exceptions.AuthenticationError("invalid password"), UnavailableReason.ACCESS_DENIED),
        (redis.exceptions.ResponseError("MISCONF Errors writing to the AOF"), UnavailableReason.STORAGE_FULL),
        (redis.exceptions.OutOfMemoryError("command not allowed"), UnavailableReason.MEMORY_FULL),
        (redis.exceptions.ClusterDownError("CLUSTERDOWN Hash slot not served"), UnavailableReason.CLUSTER_DOWN),
        (redis.exceptions.ResponseError("BUSY Valkey is busy running a script"), UnavailableReason.BUSY),
    ],
)
def test_each_trouble_of_the_server_has_its_reason(
    error: redis.exceptions.RedisError, reason: UnavailableReason
) -> None:
    translated = translate(error)
    assert isinstance(translated, QueueUnavailableError)
    assert translated.reason is reason


def test_whoever_waits_for_news_of_every_shard_leaves_connections_for_calls() -> None:
    one, many = (connect("redis://127.0.0.1", num_shards=number) for number in (1, 1024))
    assert many.connection_pool.max_connections - one.connection_pool.max_connections == 2 * 1023


async def test_whoever_finds_no_free_connection_is_told_that_the_queue_is_busy(valkey_url: str) -> None:
    redis_client = connect(valkey_url)
    redis_client.connection_pool.max_connections = 1
    redis_client.connection_pool.timeout = 0.01
    async with redis_client.pipeline(transaction=False) as pipeline:
        await pipeline.watch("holds the only connection")
        with pytest.raises(QueueUnavailableError) as caught:
            await QueueClient(redis_client).status("unknown")
    assert caught.value.reason is UnavailableReason.BUSY
    await redis_client.aclose()


def test_a_defect_is_not_taken_for_an_unavailable_server() -> None:
    translated = translate(redis.exceptions.ResponseError("WRONGTYPE Operation against a key"))
    assert type(translated) is QueueError


async def test_a_server_that_may_evict_jobs_is_refused(client: QueueClient, redis_client: redis.asyncio.Redis) -> None:
    await redis_client.config_set("maxmemory-policy", "allkeys-lru")
    await client.check_server()
    await redis_client.config_set("maxmemory", 100_000_000)
    with pytest.raises(UnsupportedServerError, match="set maxmemory-policy to noeviction"):
        await client.check_server()


class _OldServer(redis.asyncio.Redis):
    """A real server that tells an older version of itself, and knows no functions."""

    about: dict[str, str]

    async def execute_command(self, *command: object, **options: object) -> object:
        if command[0] == "INFO":
            return self.about
        raise redis.exceptions.ResponseError("unknown command 'FCALL', with args beginning with: 'oasst_load'")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14 is too old"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.9"}, "Valkey 7.1.9 is too old"),
    ],
)
async def test_an_old_server_is_refused_with_a_sentence(about: dict[str, str], message: str) -> None:
    server = _OldServer()
    server.about = about
    for call in (QueueClient(server).check_server(), QueueClient(server).load(MODEL)):
        with pytest.raises(UnsupportedServerError, match=message):
            await call


async def test_cancelled_calls_never_leave_their_answer_to_the_next(valkey_url: str) -> None:
    redis_client = connect(valkey_url)
    client = QueueClient(redis_client)
    ids = [make_job(str(number)) for number in range(30)]
    await asyncio.gather(*(client.enqueue(Submission(job, b"digest", QueueLimits())) for job in ids))

    async def ask(job_id: str) -> None:
        snapshot = await client.status(job_id)
        assert snapshot is not None
        assert snapshot.job.job_id == job_id

    for _ in range(20):
        calls = [asyncio.create_task(ask(job.job_id)) for job in ids]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        assert results[1::2] == [None] * 15
    await redis_client.aclose()
