"""Connections to Redis or Valkey, alone or many, with timeouts that suit short function calls."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import hiredis
import redis.asyncio
import redis.exceptions
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import ExponentialWithJitterBackoff

from oasst_jobs.errors import QueueUnavailableError, UnavailableReason, UnsupportedServerError, translate

__all__ = [
    "MAX_BLOCK_S",
    "Primary",
    "RedisClient",
    "ServerAddress",
    "ask",
    "check_server",
    "connect",
    "least_replicas",
    "of_all",
    "of_those_that_answer",
    "on_all_primaries",
    "on_each_primary",
    "send",
    "send_and_wait",
    "translated",
]

T = TypeVar("T")

RedisClient = redis.asyncio.Redis | RedisCluster

# A server that may hold a shard.
Primary = redis.asyncio.Redis | ClusterNode

# A read that takes longer means that the server hangs. Blocking reads (BLPOP, XREAD) must end well before.
_SOCKET_TIMEOUT_S = 3.0
MAX_BLOCK_S = 1.0

_CONNECT_TIMEOUT_S = 2.0
# For calls; those that wait for news of a shard have their own: a gateway for its stream, a worker for jobs to generate
# and jobs to score.
_MAX_CONNECTIONS = 64
_MAX_CONNECTIONS_PER_CLUSTER_NODE = 1024  # A cluster's pools do not wait for a free one.
_READERS_PER_SHARD = 2

# What uvloop says, as a RuntimeError, of a connection that broke since its last use; the client library passes it on.
_BROKEN_ON_UVLOOP = "the handler is closed"

# What a node of a cluster answers, or does not, when another may have its slots by now.
_STALE = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.MovedError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.ReadOnlyError,
)

# The first versions with everything that is used here.
_MIN_REDIS = (7, 0)
_MIN_VALKEY = (7, 2)

_SENTINEL_PORT = 26379
_REDIS_PORT = 6379


class _FastPacking:
    """Commands are packed by hiredis: in a large push, redis-py's own packing costs more than all the rest."""

    def pack_command(self, *arguments: Any) -> list[bytes]:
        # Any: whatever a command takes.
        name, *rest = arguments
        return [hiredis.pack_command((*name.split(), *rest))]


class _Connection(_FastPacking, Connection):
    pass


class _SSLConnection(_FastPacking, SSLConnection):
    pass


class _UnixConnection(_FastPacking, UnixDomainSocketConnection):
    pass


class _SentinelConnection(_FastPacking, SentinelManagedConnection):
    pass


class _SentinelSSLConnection(_FastPacking, SentinelManagedSSLConnection):
    pass


class _BlockingSentinelPool(SentinelConnectionPool, redis.asyncio.BlockingConnectionPool):
    """Connections to the primary that the sentinels name; whoever finds all in use waits for one."""


class _Cluster(RedisCluster):
    """Knows which node holds what as soon as any of them tells.

    The base class asks the first primary for a table of all commands as well, and fails when just that one is away.
    Here only whoever needs the table asks for it: the client's own `execute_command`.
    """

    async def initialize(self, *arguments: Any, **options: Any) -> "_Cluster":
        # Any: as the base class has it, and nobody gives it any.
        if self._initialize:
            await self.nodes_manager.initialize(*arguments, **options)
            self.commands_parser.node = self.nodes_manager.default_node
            self._initialize = False
        return self


class ServerKind(Enum):
    """What a URL leads to."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True)
class ServerAddress:
    """Where the queue's server is, out of a URL:

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]          one server
    unix://[[USER]:PASSWORD@]PATH[?db=DB]               one server on this machine
    redis+sentinel://[...@]HOST[:PORT],.../SERVICE      the primary that these sentinels name
    redis+cluster://[...@]HOST[:PORT],...               a cluster with some of its nodes

    `rediss` in place of `redis` is TLS; its files go behind the URL: `?ssl_ca_certs=FILE`, `ssl_certfile`,
    `ssl_keyfile`, and redis-py's other options. `sentinel_username` and `sentinel_password` are for the sentinels.
    """

    kind: ServerKind
    nodes: tuple[tuple[str, int], ...]  # Sentinels, or nodes of a cluster.
    service: str
    is_tls: bool
    options: dict[str, Any]  # What redis-py's connections take. Any: each has its own type.
    sentinel_options: dict[str, str]

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """
        Raises:
            ValueError: with a sentence that says what is wrong; it does not repeat a password.
        """
        parts = urlsplit(url)
        base, _, suffix = parts.scheme.partition("+")
        if base not in ("redis", "rediss", "unix") or suffix not in ("", "sentinel", "cluster"):
            raise ValueError(
                "must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
                " (rediss+... for TLS)"
            )
        if base == "unix" and (suffix or not parts.path):
            raise ValueError("unix:// needs the path of a socket")
        kind = ServerKind(suffix or "single")
        user_info, _, hosts = parts.netloc.rpartition("@")
        service = unquote(parts.path.strip("/")) if kind is ServerKind.SENTINEL else ""
        if kind is ServerKind.SENTINEL and not service:
            raise ValueError("redis+sentinel:// needs the name of the service behind the hosts: /SERVICE")
        if kind is ServerKind.SINGLE:
            options = _parse_options(url)
            nodes: tuple[tuple[str, int], ...] = ()
        else:
            options = _parse_options(f"{base}://{user_info and user_info + '@'}?{parts.query}")
            port = _SENTINEL_PORT if kind is ServerKind.SENTINEL else _REDIS_PORT
            nodes = tuple(_parse_node(node, default_port=port) for node in hosts.split(","))
        options.pop("connection_class", None)
        sentinel_options = {
            name.removeprefix("sentinel_"): options.pop(name)
            for name in ("sentinel_username", "sentinel_password")
            if name in options
        }
        _check_options(options)
        return cls(kind, nodes, service, base == "rediss", options, sentinel_options)


def _parse_options(url: str) -> dict[str, Any]:
    return dict(parse_url(url))


def _parse_node(node: str, *, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{node}")
    if not parts.hostname:
        raise ValueError("names no host between the commas")
    return parts.hostname, parts.port or default_port


def _check_options(options: dict[str, Any]) -> None:
    known = {"path"}
    for connection_class in (SSLConnection, Connection, AbstractConnection):
        known |= set(inspect.signature(connection_class).parameters)
    for name in options:
        if name not in known:
            raise ValueError(f"has an unknown option: {name}")


def connect(url: str, *, num_shards: int = 1) -> RedisClient:
    """A client for the servers of a ServerAddress that hold a queue of so many shards. It sends nothing yet.

    A call that meets a dead connection is sent once more on a fresh one: every function may be applied twice. A server
    that has become a replica (READONLY) is left and looked up again. Timeouts are not retried; their caller decides.

    Raises:
        ValueError: if the URL is none; the sentence says what is wrong with it.
    """
    address = ServerAddress.parse(url)
    is_cluster = address.kind is ServerKind.CLUSTER
    num_for_calls = _MAX_CONNECTIONS_PER_CLUSTER_NODE if is_cluster else _MAX_CONNECTIONS
    settings: dict[str, Any] = {
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        "protocol": 2,
        "decode_responses": False,
        "max_connections": num_for_calls + _READERS_PER_SHARD * num_shards,
        **address.options,
    }
    if is_cluster:
        return _connect_cluster(address, settings)
    settings["retry"] = Retry(
        ExponentialWithJitterBackoff(base=0.02, cap=0.2),
        retries=1,
        supported_errors=(
            redis.exceptions.ConnectionError,
            redis.exceptions.ReadOnlyError,
            RuntimeError,  # type: ignore[arg-type]  # any exception will do; see _BROKEN_ON_UVLOOP
        ),
    )
    settings = {"timeout": _SOCKET_TIMEOUT_S, **settings}
    if address.kind is ServerKind.SENTINEL:
        return _connect_sentinel(address, settings)
    connection_class = _UnixConnection if "path" in settings else _SSLConnection if address.is_tls else _Connection
    return redis.asyncio.Redis.from_pool(
        redis.asyncio.BlockingConnectionPool(connection_class=connection_class, **settings)
    )


def _connect_sentinel(address: ServerAddress, settings: dict[str, Any]) -> redis.asyncio.Redis:
    timeouts = {"socket_timeout": _CONNECT_TIMEOUT_S, "socket_connect_timeout": _CONNECT_TIMEOUT_S}
    tls = {name: value for name, value in address.options.items() if name.startswith("ssl_")}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # theirs
        address.nodes, sentinel_kwargs={**timeouts, "ssl": address.is_tls, **tls, **address.sentinel_options}
    )
    pool = _BlockingSentinelPool(  # type: ignore[no-untyped-call]  # theirs
        address.service,
        sentinel,
        connection_class=_SentinelSSLConnection if address.is_tls else _SentinelConnection,
        **settings,
    )
    return redis.asyncio.Redis.from_pool(pool)


def _connect_cluster(address: ServerAddress, settings: dict[str, Any]) -> RedisCluster:
    return _Cluster(
        startup_nodes=[ClusterNode(host, port) for host, port in address.nodes], ssl=address.is_tls, **settings
    )


async def send(client: RedisClient, key: str, *command: str | bytes | int | float) -> Any:
    """The reply to a command about one key, from whichever server holds it."""
    # Any: replies have the shape that their command gives them.
    if isinstance(client, RedisCluster):
        return await translated(_ask_node(client, key, lambda node: node.execute_command(*command)))
    return await translated(client.execute_command(*command))  # type: ignore[no-untyped-call]  # theirs


async def _ask_node(client: RedisCluster, key: str, ask: Callable[[ClusterNode], Awaitable[T]]) -> T:
    """What the node that holds the key gives, asked once more if another may hold it by now.

    The client's own `execute_command` closes the connections to all nodes after one's error, in use or not, and has the
    calls to all wait until it has looked the nodes up again.
    """
    node = await _node_of(client, key)
    try:
        return await ask(node)
    except _STALE as error:
        await _look_up_nodes(client, node)
        if isinstance(error, redis.exceptions.TimeoutError):
            raise
    return await ask(await _node_of(client, key))


async def _look_up_nodes(client: RedisCluster, failed: ClusterNode) -> None:
    """The client knows which node holds which slots, if any node tells; until then calls go by what it knew."""
    with suppress(redis.exceptions.RedisError, redis.exceptions.RedisClusterException):
        await client.nodes_manager.initialize(last_failed_node_name=failed.name)


async def _node_of(client: RedisCluster, key: str) -> ClusterNode:
    await client.initialize()
    node = client.get_node_from_key(key)
    if node is None:
        raise redis.exceptions.ClusterDownError("no node holds the key's slot")
    return node


async def send_and_wait(
    client: RedisClient, key: str, *command: str | bytes | int, num_replicas: int, timeout_ms: int
) -> tuple[Any, int]:
    """The reply to a command about one key, and how many replicas had carried it out by the timeout.

    WAIT counts the replicas that have what its own connection wrote, so both go over one.
    """
    wait = ("WAIT", num_replicas, timeout_ms)
    if isinstance(client, RedisCluster):
        return await translated(_ask_node(client, key, lambda node: _send_both(node, command, wait)))
    pipeline = client.pipeline(transaction=False)
    for part in (command, wait):
        pipeline.execute_command(*part)
    replies = await translated(pipeline.execute(raise_on_error=False))
    for reply in replies:
        if isinstance(reply, redis.exceptions.RedisError):
            raise translate(reply) from reply
    return replies[0], replies[1]


async def _send_both(node: ClusterNode, command: Iterable[Any], wait: Iterable[Any]) -> tuple[Any, int]:
    connection = node.acquire_connection()
    try:
        await connection.send_command(*command)
        reply = await connection.read_response()
        await connection.send_command(*wait)
        return reply, await connection.read_response()
    finally:
        node.release(connection)


async def on_all_primaries(client: RedisClient, *command: str | bytes | int) -> list[Any]:
    """The replies to a command of all servers that may hold a shard and are not away. Raises like on_each_primary."""
    return await on_each_primary(client, lambda server: ask(server, *command))


async def on_each_primary(client: RedisClient, call: Callable[[Primary], Awaitable[T]]) -> list[T]:
    """What all servers give that may hold a shard and are not away. All are asked at once.

    Raises:
        QueueUnavailableError: if all are away.
    """
    if not isinstance(client, RedisCluster):
        return [await call(client)]
    await translated(client.initialize())
    return await of_those_that_answer(map(call, client.get_primaries()))


async def ask(server: Primary, *command: str | bytes | int) -> Any:
    """One server's reply to a command."""
    # Any: replies have the shape that their command gives them.
    return await translated(server.execute_command(*command))


async def of_those_that_answer(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What the calls give to servers that are not away; if all are, the first call's error is raised."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    present = [answer for answer in answers if not isinstance(answer, QueueUnavailableError)]
    return [_answer_or_raise(answer) for answer in present or answers]


async def of_all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What all calls give. All of them end before the first one's error is raised."""
    return [_answer_or_raise(answer) for answer in await asyncio.gather(*calls, return_exceptions=True)]


def _answer_or_raise(answer: T | BaseException) -> T:
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def check_server(client: RedisClient) -> None:
    """Every server that is not away is new enough, and never drops a job to make room.

    Raises:
        UnsupportedServerError: with a sentence that says what to change.
        QueueUnavailableError: if all are away.
    """
    for info in await on_all_primaries(client, "INFO", "server", "memory"):
        _check_info(info)


async def least_replicas(client: RedisClient) -> int:
    """How many replicas that server has which has the fewest, of those that are not away.

    Raises:
        QueueUnavailableError: if all are away.
    """
    return min(int(info["connected_slaves"]) for info in await on_all_primaries(client, "INFO", "replication"))


def _check_info(info: dict[str, Any]) -> None:
    valkey_version = info.get("valkey_version")
    name, version, needed = (
        ("Valkey", valkey_version, _MIN_VALKEY) if valkey_version else ("Redis", info["redis_version"], _MIN_REDIS)
    )
    if _version_numbers(version) < needed:
        raise UnsupportedServerError(f"{name} {version} is too old: Redis 7.0 or Valkey 7.2 is needed")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        raise UnsupportedServerError(
            f"the server may drop jobs when its memory is full: set maxmemory-policy to noeviction, it is {policy}"
        )


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


async def translated(reply: Awaitable[T]) -> T:
    """The reply, or our own error for the client library's."""
    try:
        return await reply
    except RuntimeError as error:
        if _BROKEN_ON_UVLOOP not in str(error):
            raise
        raise QueueUnavailableError(UnavailableReason.UNREACHABLE, "Redis: the connection broke") from error
    except (redis.exceptions.RedisError, redis.exceptions.RedisClusterException) as error:
        raise translate(error) from error
