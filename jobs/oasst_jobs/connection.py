"""One pool of connections to Redis or Valkey, with timeouts that suit short function calls."""

from collections.abc import Awaitable
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from oasst_jobs.errors import QueueUnavailableError, UnavailableReason, UnsupportedServerError, translate

__all__ = ["MAX_BLOCK_S", "check_server", "connect", "translated"]

T = TypeVar("T")

# A read that takes longer means that the server hangs. Blocking reads (BLPOP, XREAD) must end well before.
_SOCKET_TIMEOUT_S = 3.0
MAX_BLOCK_S = 1.0

_CONNECT_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 64

# What uvloop says, as a RuntimeError, of a connection that broke since its last use; the client library passes it on.
_BROKEN_ON_UVLOOP = "the handler is closed"

# The first versions with everything that is used here.
_MIN_REDIS = (7, 0)
_MIN_VALKEY = (7, 2)


def connect(url: str) -> redis.asyncio.Redis:
    """A client for `redis://`, `rediss://` or `unix://`. Nothing is sent before the first call.

    A call that meets a dead connection is sent once more on a fresh one: every function may be applied twice. A server
    that has become a replica (READONLY) is left and looked up again. Timeouts are not retried; their caller decides.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=_SOCKET_TIMEOUT_S,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        retry=Retry(
            ExponentialWithJitterBackoff(base=0.02, cap=0.2),
            retries=1,
            supported_errors=(
                redis.exceptions.ConnectionError,
                redis.exceptions.ReadOnlyError,
                RuntimeError,  # type: ignore[arg-type]  # any exception will do; see _BROKEN_ON_UVLOOP
            ),
        ),
        protocol=2,
        decode_responses=False,
    )
    return redis.asyncio.Redis.from_pool(pool)


async def check_server(client: redis.asyncio.Redis) -> None:
    """The server is new enough, and never drops a job to make room.

    Raises:
        UnsupportedServerError: with a sentence that says what to change.
        QueueUnavailableError: if it cannot be asked.
    """
    info = await translated(client.info("server", "memory"))
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


async def translated(reply: Awaitable[Any]) -> Any:
    """The reply, or our own error for the client library's."""
    # Any: replies have the shape that their command gives them.
    try:
        return await reply
    except RuntimeError as error:
        if _BROKEN_ON_UVLOOP not in str(error):
            raise
        raise QueueUnavailableError(UnavailableReason.UNREACHABLE, "Redis: the connection broke") from error
    except redis.exceptions.RedisError as error:
        raise translate(error) from error
