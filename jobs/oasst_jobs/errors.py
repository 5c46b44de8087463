"""What the queue can refuse or fail with, and the one table that translates Redis's errors."""

from enum import StrEnum

import redis.exceptions

__all__ = [
    "JobNotAcceptedError",
    "LibraryMissingError",
    "OtherShardsError",
    "PoisonedPromptError",
    "QueueError",
    "QueueFullError",
    "QueueUnavailableError",
    "RequestConflictError",
    "TenantFullError",
    "TooMuchAheadError",
    "UnavailableReason",
    "UnsupportedServerError",
    "translate",
]


class UnavailableReason(StrEnum):
    """Why the queue cannot be used now. Each may pass by itself."""

    UNREACHABLE = "QUEUE_UNREACHABLE"
    TIMEOUT = "QUEUE_TIMEOUT"
    ACCESS_DENIED = "QUEUE_ACCESS_DENIED"
    LOADING = "QUEUE_LOADING"
    BUSY = "QUEUE_BUSY"
    READ_ONLY = "QUEUE_READ_ONLY"
    TOO_FEW_REPLICAS = "QUEUE_TOO_FEW_REPLICAS"
    STORAGE_FULL = "QUEUE_STORAGE_FULL"
    MEMORY_FULL = "QUEUE_MEMORY_FULL"
    CLUSTER_DOWN = "QUEUE_CLUSTER_DOWN"
    NOT_REPLICATED = "QUEUE_NOT_REPLICATED"
    SPREAD_OTHERWISE = "QUEUE_SPREAD_OTHERWISE"


class QueueError(Exception):
    """Anything that went wrong between us and the queue."""


class QueueUnavailableError(QueueError):
    """Redis cannot do it now. Whether it did is unknown; every call may be made again with the same arguments."""

    def __init__(self, reason: UnavailableReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnsupportedServerError(QueueError):
    """The server is too old, or set up so that it may drop jobs."""


class OtherShardsError(QueueError):
    """The queue has jobs that are spread over another number of shards."""

    def __init__(self, *, num_shards: int, wanted: int) -> None:
        super().__init__(
            f"the queue's jobs are spread over {num_shards} shards, not {wanted}: name {num_shards} of them"
            " (--queue-shards), or keep callers away until none of its jobs waits or runs"
        )


class LibraryMissingError(QueueError):
    """The server does not have our functions; for QueueClient, which then loads them."""


class JobNotAcceptedError(QueueError):
    """The job was not let in, and nothing of it is stored. It may come again later."""


class QueueFullError(JobNotAcceptedError):
    """As many jobs or tokens wait for the model as may, and the tenant has its share of them."""

    def __init__(self, *, waiting_jobs: int, waiting_tokens: int) -> None:
        super().__init__(f"{waiting_jobs} jobs with {waiting_tokens} tokens wait already")
        self.waiting_jobs = waiting_jobs
        self.waiting_tokens = waiting_tokens


class TenantFullError(JobNotAcceptedError):
    """As many jobs or tokens of the tenant wait as may."""

    def __init__(self, *, waiting_jobs: int, waiting_tokens: int) -> None:
        super().__init__(f"{waiting_jobs} jobs with {waiting_tokens} tokens of the tenant wait already")
        self.waiting_jobs = waiting_jobs
        self.waiting_tokens = waiting_tokens


class TooMuchAheadError(JobNotAcceptedError):
    """More tokens would be served before the job than its submitter allowed."""

    def __init__(self, *, jobs_ahead: int, tokens_ahead: int) -> None:
        super().__init__(f"{jobs_ahead} jobs with {tokens_ahead} tokens would come before it")
        self.jobs_ahead = jobs_ahead
        self.tokens_ahead = tokens_ahead


class PoisonedPromptError(JobNotAcceptedError):
    """The tenant's same prompt killed its workers a short while ago."""

    def __init__(self) -> None:
        super().__init__("this prompt killed every worker that ran it a short while ago")


class RequestConflictError(QueueError):
    """The same id was used before with another request."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id} exists and came from a different request")
        self.job_id = job_id


# How a server says that it does not have a function, a library, or functions at all (Redis 6).
_MISSING_LIBRARY = ("function not found", "library not found", "unknown command")

# First word of an error reply -> why it says that the queue is unavailable.
_REASON_OF_REPLY = {
    "BUSY": UnavailableReason.BUSY,
    "CLUSTERDOWN": UnavailableReason.CLUSTER_DOWN,
    "LOADING": UnavailableReason.LOADING,
    "MASTERDOWN": UnavailableReason.CLUSTER_DOWN,
    "MISCONF": UnavailableReason.STORAGE_FULL,
    "NOAUTH": UnavailableReason.ACCESS_DENIED,
    "NOPERM": UnavailableReason.ACCESS_DENIED,
    "NOREPLICAS": UnavailableReason.TOO_FEW_REPLICAS,
    "OOM": UnavailableReason.MEMORY_FULL,
    "READONLY": UnavailableReason.READ_ONLY,
    "TRYAGAIN": UnavailableReason.CLUSTER_DOWN,
    "UNBLOCKED": UnavailableReason.READ_ONLY,
    "WRONGPASS": UnavailableReason.ACCESS_DENIED,
}

# What the client library says, as a ConnectionError, when all connections stayed in use for too long.
_ALL_IN_USE = "No connection available"

# The client library turns some replies into classes of their own and cuts the first word off. Subclasses come first.
_REASON_OF_CLASS: tuple[tuple[type[Exception], UnavailableReason], ...] = (
    (redis.exceptions.AuthenticationError, UnavailableReason.ACCESS_DENIED),
    (redis.exceptions.AuthorizationError, UnavailableReason.ACCESS_DENIED),
    (redis.exceptions.NoPermissionError, UnavailableReason.ACCESS_DENIED),
    (redis.exceptions.BusyLoadingError, UnavailableReason.LOADING),
    (redis.exceptions.ReadOnlyError, UnavailableReason.READ_ONLY),
    (redis.exceptions.OutOfMemoryError, UnavailableReason.MEMORY_FULL),
    (redis.exceptions.ClusterDownError, UnavailableReason.CLUSTER_DOWN),
    (redis.exceptions.AskError, UnavailableReason.CLUSTER_DOWN),
    (redis.exceptions.RedisClusterException, UnavailableReason.CLUSTER_DOWN),
    (redis.exceptions.MasterDownError, UnavailableReason.CLUSTER_DOWN),
    (redis.exceptions.TryAgainError, UnavailableReason.CLUSTER_DOWN),
    (redis.exceptions.TimeoutError, UnavailableReason.TIMEOUT),
    (redis.exceptions.MaxConnectionsError, UnavailableReason.BUSY),
    (redis.exceptions.ConnectionError, UnavailableReason.UNREACHABLE),
)


def translate(error: redis.exceptions.RedisError | redis.exceptions.RedisClusterException) -> QueueError:
    """Our error for one of the client library's; a plain QueueError is a defect, not a state of the server."""
    message = f"Redis: {str(error) or type(error).__name__}"
    if isinstance(error, redis.exceptions.ConnectionError) and str(error).startswith(_ALL_IN_USE):
        return QueueUnavailableError(UnavailableReason.BUSY, message)
    # What a server says to a new connection comes wrapped into "no connection".
    refusal = error.__cause__ if type(error) is redis.exceptions.ConnectionError else None
    for error_class, reason in _REASON_OF_CLASS:
        if isinstance(error, error_class) or isinstance(refusal, error_class):
            return QueueUnavailableError(reason, message)
    if str(error).lower().startswith(_MISSING_LIBRARY):
        return LibraryMissingError(message)
    first_word = str(error).partition(" ")[0]
    if first_word in _REASON_OF_REPLY:
        return QueueUnavailableError(_REASON_OF_REPLY[first_word], message)
    return QueueError(message)
