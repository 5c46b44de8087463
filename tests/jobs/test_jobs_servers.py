"""Servers of every kind: with users of few rights, behind TLS, replicated, named by sentinels, in a cluster."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio
import redis.exceptions
from job_samples import MODEL, finished, make_entry, make_job, news_of
from oasst.jobs.v1 import job_pb2
from oasst_jobs import (
    Claimer,
    Durability,
    Inbox,
    JobState,
    PushItem,
    PushStatus,
    QueueClient,
    QueueLimits,
    QueueUnavailableError,
    Reconciler,
    ServerAddress,
    Submitter,
    Sweeper,
    UnavailableReason,
    connect,
)
from oasst_jobs.__main__ import main
from oasst_jobs.acl import Role, acl_rules
from oasst_jobs.library import LIBRARY
from valkey_server import ValkeyServer, free_port, start_sentinel
from waiting import until


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ValkeyServer]]:
    """Starts servers on loopback ports, and stops them."""
    servers: list[ValkeyServer] = []

    def start(name: str, port: int, *options: str) -> ValkeyServer:
        folder = tmp_path / name
        folder.mkdir()
        server = ValkeyServer(folder, "--port", str(port), "--bind", "127.0.0.1", *options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


async def serve_one(gateway: QueueClient, worker: QueueClient, request_id: str) -> None:
    """A job is submitted, claimed, generated and read to its end."""
    job = make_job(request_id)
    submitter = Submitter(gateway, gateway_id="gateway-1", limits=QueueLimits())
    claimer = Claimer(worker, worker_id="worker-1", model=MODEL)
    inbox = Inbox(gateway, gateway_id="gateway-1")
    reading = asyncio.create_task(inbox.run())
    try:
        async with inbox.subscribe(job.job_id) as subscription, asyncio.timeout(20):
            await submitter.submit(job, digest=b"digest", timeout_ms=60_000)
            await claimer.wait_for_work(1.0)
            [claimed] = await claimer.claim(max_jobs=1, max_tokens=1000)
            push = PushItem(job.job_id, claimed.fence, 0, make_entry(0, 3), finished(3))
            assert await claimer.push([push]) == [PushStatus.OK]
            assert [news async for news in news_of(subscription)] == [make_entry(0, 3), finished(3)]
    finally:
        reading.cancel()
        await asyncio.wait([reading])


# --- Users


@pytest.fixture
async def users(valkey_url: str) -> AsyncIterator[dict[Role, redis.asyncio.Redis]]:
    """A connection for each role, as a user with that role's rights and no more."""
    owner = connect(valkey_url)
    clients = {}
    for role in Role:
        await owner.execute_command("ACL", "SETUSER", role, "on", ">secret", *acl_rules(role))
        clients[role] = connect(valkey_url.replace("unix://", f"unix://{role}:secret@"))
    yield clients
    for client in (owner, *clients.values()):
        await client.aclose()


async def test_with_the_users_rights_everything_works(users: dict[Role, redis.asyncio.Redis]) -> None:
    await QueueClient(users[Role.ADMIN]).check_server()
    gateway, worker = QueueClient(users[Role.GATEWAY]), QueueClient(users[Role.WORKER])
    for client in (gateway, worker):
        await client.check_server()
    await serve_one(gateway, worker, "served")

    submitter = Submitter(gateway, gateway_id="gateway-1", limits=QueueLimits())
    claimer = Claimer(worker, worker_id="worker-1", model=MODEL)
    for request_id in ("released", "cancelled"):
        await submitter.submit(make_job(request_id), digest=b"digest", timeout_ms=None)
    await claimer.release(await claimer.claim(max_jobs=1, max_tokens=1000))
    assert await submitter.cancel(make_job("cancelled").job_id) is JobState.CANCELLED
    assert await submitter.attach(make_job("released").job_id) is not None
    await gateway.shards[0].trim_updates("gateway-1", "0-1")
    await claimer.heartbeat(job_pb2.WorkerStatus(worker_id="worker-1", model=MODEL))
    assert (await submitter.load(MODEL)).waiting_jobs == 1
    for client in (gateway, worker):
        await Sweeper(client).sweep()
        assert await Reconciler(client, interval_s=0.0).walk() == 0
    assert await QueueClient(users[Role.ADMIN]).dead(10) == []


FORBIDDEN = [
    "KEYS *",
    "GET other",
    "SET other value",
    "HGETALL another:{0}:job:1",
    "DEL other",
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET *",
    "CONFIG SET dir /tmp",
    "EVAL return(1) 0",
    "SCRIPT LOAD return(1)",
    "FUNCTION FLUSH",
    "ACL LIST",
    "ACL WHOAMI",
    "SHUTDOWN NOSAVE",
    "REPLICAOF 127.0.0.1 1",
    "MONITOR",
    "CLIENT LIST",
    "MIGRATE 127.0.0.1 1 oasst:{0}:counters 0 10",
    "PUBLISH channel message",
    "SAVE",
    "MODULE LIST",
]


@pytest.mark.parametrize("role", Role)
async def test_nothing_else_is_allowed(users: dict[Role, redis.asyncio.Redis], role: Role) -> None:
    assert [command for command in FORBIDDEN if not await _is_refused(users[role], command)] == []


async def _is_refused(client: redis.asyncio.Redis, command: str) -> bool:
    try:
        await client.execute_command(*command.split())
    except (redis.exceptions.NoPermissionError, redis.exceptions.AuthorizationError):
        return True
    return False


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.WORKER])
async def test_who_may_not_load_functions_says_who_should(users: dict[Role, redis.asyncio.Redis], role: Role) -> None:
    with pytest.raises(QueueUnavailableError, match="python -m oasst_jobs load") as caught:
        await QueueClient(users[role]).check_server()
    assert caught.value.reason is UnavailableReason.ACCESS_DENIED


async def test_a_wrong_password_is_told_as_such(users: dict[Role, redis.asyncio.Redis], valkey_url: str) -> None:
    client = connect(valkey_url.replace("unix://", "unix://gateway:wrong@"))
    with pytest.raises(QueueUnavailableError) as caught:
        await QueueClient(client).load(MODEL)
    assert caught.value.reason is UnavailableReason.ACCESS_DENIED
    await client.aclose()


async def test_the_command_prints_users_that_a_server_takes_and_loads_the_functions(
    valkey_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["acl"]) == 0
    nobody, *users = capsys.readouterr().out.splitlines()
    assert nobody == "user default off"  # Which this test still is.
    owner = connect(valkey_url)
    for line in users:
        await owner.execute_command("ACL", "SETUSER", *line.split()[1:])
    names = {line.split()[1] for line in users}
    assert names == {"oasst-gateway", "oasst-worker", "oasst-admin", "oasst-exporter"}

    assert await asyncio.to_thread(main, ["load", "--redis-url", valkey_url]) == 0
    [library] = await owner.function_list()
    assert library[1] == LIBRARY.name.encode()
    await owner.aclose()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--redis-url", f"unix://{tmp_path}/none.sock"]) == 1
    assert "oasst_jobs: Redis:" in capsys.readouterr().err


# --- URLs


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://host", "must begin with redis://"),
        ("host:6379", "must begin with redis://"),
        ("redis+other://host", "must begin with redis://"),
        ("unix://", "needs the path of a socket"),
        ("unix+cluster:///a", "needs the path of a socket"),
        ("redis+sentinel://host:26379", "needs the name of the service"),
        ("redis+cluster://a:1,,b:2", "names no host between the commas"),
        ("redis://host?ssl_ca_cert=x", "unknown option: ssl_ca_cert"),
        ("redis://host:port", "Port could not be cast"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_with_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        connect(url)


def test_a_refused_url_keeps_its_password_to_itself() -> None:
    with pytest.raises(ValueError, match="must begin") as caught:
        connect("http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_hosts_options_and_passwords_are_read_from_the_url() -> None:
    address = ServerAddress.parse("rediss+sentinel://u:p%40@a,b:1/main?sentinel_password=s&ssl_ca_certs=/ca.pem")
    assert (address.nodes, address.service, address.is_tls) == ((("a", 26379), ("b", 1)), "main", True)
    assert address.options == {"username": "u", "password": "p@", "ssl_ca_certs": "/ca.pem"}
    assert address.sentinel_options == {"password": "s"}


# --- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that vouches for itself, and its key in the same folder."""
    path = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"),
            *("-keyout", str(tmp_path / "key.pem"), "-out", str(path)),
        ],
        check=True,
        capture_output=True,
    )
    return path


@contextlib.asynccontextmanager
async def tls_in_front_of(socket_path: str, certificate: Path) -> AsyncIterator[int]:
    """A port that speaks TLS and passes everything on: the wheel's server has none of its own."""
    connections: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(socket_path)
        for task in (pump(reader, server_writer), pump(server_reader, writer)):
            connections.add(asyncio.create_task(task))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def test_over_tls_a_server_is_used_that_its_certificate_vouches_for(valkey_url: str, certificate: Path) -> None:
    async with tls_in_front_of(valkey_url.removeprefix("unix://"), certificate) as port:
        trusting = connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")
        client = QueueClient(trusting)
        await serve_one(client, client, "encrypted")
        doubting = connect(f"rediss://127.0.0.1:{port}")
        with pytest.raises(QueueUnavailableError, match="certificate"):
            await QueueClient(doubting).load(MODEL)
        for redis_client in (trusting, doubting):
            await redis_client.aclose()


# --- Replicas


async def test_a_job_counts_as_submitted_once_a_replica_has_it(start_server, monkeypatch: pytest.MonkeyPatch) -> None:
    primary_port, replica_port = free_port(), free_port()
    primary = start_server("primary", primary_port)
    redis_client = connect(primary.url)
    submitter = Submitter(
        QueueClient(redis_client), gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.REPLICATED
    )
    job = make_job("kept")
    with pytest.raises(QueueUnavailableError) as caught:
        await submitter.submit(job, digest=b"digest", timeout_ms=None)
    assert caught.value.reason is UnavailableReason.NOT_REPLICATED

    replica = start_server("replica", replica_port, "--replicaof", f"127.0.0.1 {primary_port}")
    replica_client = connect(replica.url)

    async def is_replicating() -> bool:
        return (await replica_client.info("replication"))["master_link_status"] == "up"

    await until(is_replicating)
    # A frozen replica confirms nothing: the same request, sent again on another connection, is not accepted either.
    replica.pause()
    for _ in range(2):
        other_client = connect(primary.url)
        other = Submitter(
            QueueClient(other_client), gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.REPLICATED
        )
        with pytest.raises(QueueUnavailableError) as caught:
            await other.submit(make_job("unconfirmed"), digest=b"digest", timeout_ms=None)
        assert caught.value.reason is UnavailableReason.NOT_REPLICATED
        await other_client.aclose()
    replica.resume()
    assert not (await submitter.submit(job, digest=b"digest", timeout_ms=None)).is_new

    # It is the replica's word that ends the wait, not the time.
    monkeypatch.setattr("oasst_jobs.functions._REPLICATION_TIMEOUT_MS", 30_000)
    accepted = make_job("accepted")
    async with asyncio.timeout(10):
        await submitter.submit(accepted, digest=b"digest", timeout_ms=None)
    primary.kill()
    root = QueueClient(replica_client).shards[0].keys.root
    assert await replica_client.hget(f"{root}:job:{accepted.job_id}", "state") == b"waiting"
    for client in (redis_client, replica_client):
        await client.aclose()


# --- Sentinels


async def test_the_queue_goes_on_when_sentinels_make_a_replica_the_primary(start_server) -> None:
    ports = {name: free_port() for name in ("primary", "replica", "sentinel")}
    primary = start_server("primary", ports["primary"])
    start_server("replica", ports["replica"], "--replicaof", f"127.0.0.1 {ports['primary']}")
    folder = Path(primary.url.removeprefix("unix://")).parent
    sentinel = start_sentinel(folder, ports["sentinel"], ports["primary"], down_after_ms=300)
    redis_client = connect(f"redis+sentinel://127.0.0.1:{ports['sentinel']}/main")
    try:
        client = QueueClient(redis_client)
        await eventually_served(client, "before")
        primary.kill()
        await eventually_served(client, "after")
    finally:
        await redis_client.aclose()
        sentinel.kill()
        sentinel.wait()


async def eventually_served(client: QueueClient, request_id: str) -> None:
    number = 0

    async def is_served() -> bool:
        nonlocal number
        number += 1
        try:
            await serve_one(client, client, f"{request_id} {number}")
        except (QueueUnavailableError, TimeoutError, ValueError):
            return False
        return True

    await until(is_served)


# --- Cluster


@pytest.fixture
def cluster_ports() -> list[int]:
    return [free_port() for _ in range(3)]


@pytest.fixture
def cluster_nodes(start_server, cluster_ports: list[int]) -> list[ValkeyServer]:
    """They go on when one of them is away."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-require-full-coverage", "no")
    return [start_server(f"node-{port}", port, *options) for port in cluster_ports]


@pytest.fixture
async def cluster_url(cluster_nodes: list[ValkeyServer], cluster_ports: list[int]) -> str:
    """Three nodes that share the slots."""
    ports, nodes = cluster_ports, [connect(node.url) for node in cluster_nodes]
    slots = [(0, 5460), (5461, 10922), (10923, 16383)]
    for node, (first, last) in zip(nodes, slots, strict=True):
        await node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
    for port in ports[1:]:
        await nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)

    async def is_ready() -> bool:
        states = [await node.execute_command("CLUSTER", "INFO") for node in nodes]
        return all(_is_ok(state) for state in states)

    await until(is_ready)
    for node in nodes:
        await node.aclose()
    return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


def _is_ok(state: object) -> bool:
    if isinstance(state, dict):
        return state["cluster_state"] == "ok" and state["cluster_known_nodes"] == "3"
    return b"cluster_state:ok" in bytes(state) and b"cluster_known_nodes:3" in bytes(state)  # type: ignore[call-overload]


async def test_a_cluster_holds_the_shards_of_the_queue(cluster_url: str) -> None:
    redis_client = connect(cluster_url)
    client = QueueClient(redis_client, num_shards=8)
    await client.check_server()
    for number in range(3):
        await serve_one(client, client, f"job {number}")

    submitter = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.LOCAL)
    jobs = [make_job(str(number)) for number in range(40)]
    for job in jobs:
        await submitter.submit(job, digest=b"digest", timeout_ms=60_000)
    key = f"{client.shard_of(jobs[0].job_id).keys.root}:job:{jobs[0].job_id}"
    assert await redis_client.hget(key, "state") == b"waiting"  # The client's own commands work as well.
    nodes = {redis_client.get_node_from_key(client.shard_of(job.job_id).keys.root).name for job in jobs}
    assert len(nodes) == 3
    assert (await submitter.load(MODEL)).waiting_jobs == 40

    claimer = Claimer(client, worker_id="worker-1", model=MODEL)
    claims = []
    while claimed := await claimer.claim(max_jobs=3, max_tokens=10_000):
        claims += claimed
    assert sorted(claim.job_id for claim in claims) == sorted(job.job_id for job in jobs)
    items = [PushItem(claim.job_id, claim.fence, 0, make_entry(0, 1), finished(1)) for claim in claims]
    assert await claimer.push(items) == [PushStatus.OK] * 40
    await Sweeper(client).sweep()
    assert await Reconciler(client, interval_s=0.0).walk() == 0
    for job in jobs:
        assert (snapshot := await submitter.status(job.job_id)) is not None
        assert snapshot.state is JobState.FINISHED

    replicated = Submitter(client, gateway_id="gateway-1", limits=QueueLimits(), durability=Durability.REPLICATED)
    with pytest.raises(QueueUnavailableError) as caught:
        await replicated.submit(make_job("alone"), digest=b"digest", timeout_ms=None)
    assert caught.value.reason is UnavailableReason.NOT_REPLICATED
    await redis_client.aclose()


async def test_the_nodes_that_answer_get_the_functions_and_serve(
    cluster_url: str, cluster_nodes: list[ValkeyServer]
) -> None:
    await asyncio.to_thread(cluster_nodes[0].kill)
    redis_client = connect(cluster_url)
    client = QueueClient(redis_client, num_shards=8)
    await client.check_server()
    submitter, submitted = Submitter(client, gateway_id="gateway", limits=QueueLimits()), []
    for job in map(make_job, "abcdef"):
        with contextlib.suppress(QueueUnavailableError):
            await submitter.submit(job, digest=b"", timeout_ms=None)
            submitted.append(job.job_id)
    claimer = Claimer(client, worker_id="worker", model=MODEL)
    claimed = [job.job_id for _ in range(8) for job in await claimer.claim(max_jobs=6, max_tokens=10_000)]
    assert sorted(claimed) == sorted(submitted) != []
    await asyncio.to_thread(cluster_nodes[1].kill)
    await asyncio.to_thread(cluster_nodes[2].kill)
    with pytest.raises(QueueUnavailableError):
        await client.check_server()
    await redis_client.aclose()
