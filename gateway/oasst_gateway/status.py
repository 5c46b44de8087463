"""The one table from our errors to what a gRPC caller sees (AIP-193): code, reason, details and when to come back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # without stubs
from grpc_status import rpc_status  # type: ignore[import-untyped]  # without stubs
from oasst_jobs import PoisonedPromptError, QueueError, QueueUnavailableError, RequestConflictError, UnavailableReason

from oasst_gateway.errors import (
    ChatFailedError,
    GatewayError,
    GatewayLeavingError,
    InvalidRequestError,
    NotTrustedError,
    NoWorkerError,
    RefusedError,
    UnauthenticatedError,
    UnknownChatError,
    Violation,
)

__all__ = ["DOMAIN", "UNFORESEEN", "RpcStatus", "status_of"]

DOMAIN = "oasst.v1"
UNFORESEEN = "INTERNAL"  # The reason of errors that are defects.

_UNAVAILABLE_RETRY_S = 1.0
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How an RPC ends that does not succeed."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # Of the ErrorInfo.

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The rich error, and the pushback that gRPC's own retries obey."""
        number, _ = self.code.value
        status = status_pb2.Status(code=number, message=self.message)
        status.details.extend(_pack(detail) for detail in self._details())
        metadata = tuple(rpc_status.to_status(status).trailing_metadata)
        if self.retry_after_s is not None:
            metadata += (("grpc-retry-pushback-ms", str(round(self.retry_after_s * 1000))),)
        return metadata

    def _details(self) -> list[Message]:
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]
        if self.violations:
            fields = [
                error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
                for violation in self.violations
            ]
            details.append(error_details_pb2.BadRequest(field_violations=fields))
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromMilliseconds(round(self.retry_after_s * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        return details


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed


def _invalid(error: InvalidRequestError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.INVALID_ARGUMENT, error.reason, str(error), violations=error.violations)


def _failed(error: ChatFailedError) -> RpcStatus:
    code = _CODES.get(error.failed.code, grpc.StatusCode.UNKNOWN)
    return RpcStatus(code, error.failed.reason, error.failed.message)


def _refused(error: RefusedError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, error.reason, str(error), retry_after_s=error.retry_after_s)


def _no_worker(error: NoWorkerError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.UNAVAILABLE, "NO_WORKER", str(error), retry_after_s=error.retry_after_s)


def _leaving(error: GatewayLeavingError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.UNAVAILABLE, "GATEWAY_LEAVING", str(error), retry_after_s=0.0)


def _unauthenticated(error: UnauthenticatedError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", str(error))


def _not_trusted(error: NotTrustedError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.PERMISSION_DENIED, "NOT_TRUSTED", str(error))


def _poisoned(error: PoisonedPromptError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.ABORTED, "POISON", str(error))


def _conflict(error: RequestConflictError) -> RpcStatus:
    message = "another request has this request_id; a retry must be the same request"
    return RpcStatus(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_CONFLICT", message)


# Whether the call was carried out is unknown for most of these. It may be made again with every one.
_WHY_UNAVAILABLE = {
    UnavailableReason.UNREACHABLE: "the queue cannot be reached",
    UnavailableReason.TIMEOUT: "the queue did not answer in time",
    UnavailableReason.ACCESS_DENIED: "the queue does not let this gateway in",
    UnavailableReason.LOADING: "the queue is starting",
    UnavailableReason.BUSY: "the queue is busy",
    UnavailableReason.READ_ONLY: "the queue takes nothing now: another server is to take its place",
    UnavailableReason.TOO_FEW_REPLICAS: "the queue takes nothing now: it has too few replicas",
    UnavailableReason.STORAGE_FULL: "the queue takes nothing now: it cannot write to its disk",
    UnavailableReason.MEMORY_FULL: "the queue takes nothing now: its memory is full",
    UnavailableReason.CLUSTER_DOWN: "a part of the queue is down",
    UnavailableReason.NOT_REPLICATED: "the queue has it, but no replica of the queue confirmed that in time",
    UnavailableReason.SPREAD_OTHERWISE: "the queue was spread over another number of shards than this gateway's",
}


def _queue_unavailable(error: QueueUnavailableError) -> RpcStatus:
    return RpcStatus(
        grpc.StatusCode.UNAVAILABLE,
        "QUEUE_UNAVAILABLE",
        f"{_WHY_UNAVAILABLE[error.reason]}; the same call may be made again",
        retry_after_s=_UNAVAILABLE_RETRY_S,
        metadata={"cause": error.reason},
    )


def _unknown_chat(error: UnknownChatError) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.NOT_FOUND, "CHAT_NOT_FOUND", str(error))


def _internal(error: Exception) -> RpcStatus:
    return RpcStatus(grpc.StatusCode.INTERNAL, UNFORESEEN, "the gateway failed; its log says why")


# The first row that fits is taken: subclasses stand before their bases.
_TABLE: tuple[tuple[type[Exception], Callable[..., RpcStatus]], ...] = (
    (InvalidRequestError, _invalid),
    (ChatFailedError, _failed),
    (UnknownChatError, _unknown_chat),
    (UnauthenticatedError, _unauthenticated),
    (NotTrustedError, _not_trusted),
    (GatewayLeavingError, _leaving),
    (NoWorkerError, _no_worker),
    (RefusedError, _refused),
    (RequestConflictError, _conflict),
    (PoisonedPromptError, _poisoned),
    (QueueUnavailableError, _queue_unavailable),
    (QueueError, _internal),
    (GatewayError, _internal),
    (Exception, _internal),
)


def status_of(error: Exception) -> RpcStatus:
    """What the caller is told of `error`. What was not foreseen is INTERNAL, without details."""
    return next(translate(error) for kind, translate in _TABLE if isinstance(error, kind))
