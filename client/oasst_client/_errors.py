"""Everything the SDK raises, and the one table that turns gRPC's errors into it.

OasstError
|-- ProtocolError               the server's answer breaks the contract
'-- APIError                    the server, or the way to it, said no
    |-- InvalidArgumentError    field_violations tell what and what is allowed
    |-- MessageTooLargeError
    |-- OverloadedError         retry_after_s tells when to try again
    |-- UnavailableError
    |-- DeadlineExceededError
    |-- RequestCancelledError
    |-- RequestConflictError    the request id is in use for another request
    |-- NotFoundError
    |-- AbortedError            the request was given up
    |   '-- StreamDivergedError an answer that was lost and generated anew is not the same
    |-- UnauthenticatedError
    |-- PermissionDeniedError
    |-- UnimplementedError
    '-- InternalError
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # generated, without stubs
from oasst.v1 import chat_pb2

__all__ = [
    "APIError",
    "AbortedError",
    "DeadlineExceededError",
    "FieldViolation",
    "InternalError",
    "InvalidArgumentError",
    "MessageTooLargeError",
    "NotFoundError",
    "OasstError",
    "OverloadedError",
    "PermissionDeniedError",
    "ProtocolError",
    "RequestCancelledError",
    "RequestConflictError",
    "StreamDivergedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "client_closed",
    "error_from_call",
    "error_from_failed",
    "request_given_up",
    "stream_closed",
]

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that was refused."""

    # Path in the request, for example "limits.stop[3]".
    field: str
    description: str


class OasstError(Exception):
    """The root of everything this package raises about the service."""


class ProtocolError(OasstError):
    """The server's answer breaks the contract: a gap or a repeat in a stream, or a stream without an end."""


class APIError(OasstError):
    """The service did not do what was asked.

    Attributes:
        code: the gRPC status code's name, for example "INVALID_ARGUMENT".
        reason: the stable name programs may depend on; empty when the error comes from the connection.
        message: for people.
        retry_after_s: when a retry is worth it, if the server told.
        field_violations: every refused field, for invalid arguments.
        metadata: what the server adds to its reason, for example "cause" where a queue refuses writes.
        request_id: of the request that failed, where there was one.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        reason: str = "",
        retry_after_s: float | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.field_violations = field_violations
        self.metadata: Mapping[str, str] = metadata or {}
        self.request_id = request_id

    def __str__(self) -> str:
        violations = (f"{violation.field}: {violation.description}" for violation in self.field_violations)
        untold = [each for each in violations if each not in self.message]
        return "; ".join([f"{self.message} ({self.reason or self.code})", *untold])


class InvalidArgumentError(APIError):
    """The request cannot be served as it is; `field_violations` tell why."""


class MessageTooLargeError(APIError):
    """The request or the answer is larger than one gRPC message may be. Trying again does not help."""


class OverloadedError(APIError):
    """The service is full or a share is used up; `retry_after_s` tells when to try again."""


class UnavailableError(APIError):
    """The service, or what it needs, cannot be reached now."""


class DeadlineExceededError(APIError):
    """The request did not end in the time it was given."""


class RequestCancelledError(APIError):
    """The request was cancelled."""


class RequestConflictError(APIError):
    """The request id is in use for another request."""


class NotFoundError(APIError):
    """There is no such request or model."""


class AbortedError(APIError):
    """The request was given up: for example, it made workers crash."""


class StreamDivergedError(AbortedError):
    """The server lost part of an answer, and what it generated in its place differs from what had come."""


class UnauthenticatedError(APIError):
    """The caller did not prove who it is."""


class PermissionDeniedError(APIError):
    """The caller may not do this."""


class UnimplementedError(APIError):
    """The server does not have this call."""


class InternalError(APIError):
    """The service failed at something it should have done."""


_ERROR_OF_CODE: dict[grpc.StatusCode, type[APIError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidArgumentError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.ALREADY_EXISTS: RequestConflictError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}
# StatusCode by the number that google.rpc.Code and the wire share.
_CODE_OF_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_from_call(call: grpc.RpcError, *, request_id: str = "") -> APIError:
    """The typed error of a failed call, of either gRPC API, with what its rich error details tell."""
    code = call.code()
    info, retry, bad_request = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.BadRequest(),
    )
    metadata: Sequence[tuple[str, str | bytes]] = tuple(call.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs
    for detail in _details(metadata):
        # Unpack fills the one message of the detail's own type and leaves the others alone.
        for known in (info, retry, bad_request):
            detail.Unpack(known)
    told_s = retry.retry_delay.ToMicroseconds() / 1e6 if retry.HasField("retry_delay") else _pushback_s(metadata)
    return _error_class(code, info.reason, told_s)(
        call.details() or code.name,
        code=code.name,
        reason=info.reason,
        retry_after_s=told_s,
        field_violations=tuple(FieldViolation(each.field, each.description) for each in bad_request.field_violations),
        metadata=dict(info.metadata),
        request_id=request_id,
    )


def error_from_failed(failed: chat_pb2.Failed, *, request_id: str) -> APIError:
    """The typed error of a stream's `failed` event."""
    code = _CODE_OF_NUMBER.get(failed.code, grpc.StatusCode.UNKNOWN)
    return _error_class(code, failed.reason, None)(
        failed.message or code.name, code=code.name, reason=failed.reason, request_id=request_id
    )


def stream_closed(request_id: str) -> RequestCancelledError:
    """What a reader is told whose stream was closed under it."""
    return RequestCancelledError("the stream was closed", code=grpc.StatusCode.CANCELLED.name, request_id=request_id)


def client_closed(request_id: str) -> RequestCancelledError:
    """What a caller is told whose client was closed under it."""
    return RequestCancelledError("the client was closed", code=grpc.StatusCode.CANCELLED.name, request_id=request_id)


def request_given_up(request_id: str) -> RequestCancelledError:
    """What ends a request that is not wanted any more, before its next attempt."""
    return RequestCancelledError("the request was given up", code=grpc.StatusCode.CANCELLED.name, request_id=request_id)


def _error_class(code: grpc.StatusCode, reason: str, retry_after_s: float | None) -> type[APIError]:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not reason and retry_after_s is None:
        # gRPC's own limit on message sizes shares this code with overload, but waiting does not help against it.
        return MessageTooLargeError
    return _ERROR_OF_CODE.get(code, InternalError)


def _pushback_s(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    """When to retry, in gRPC's own way of telling it, for servers and proxies that know no other."""
    told = next((str(value) for key, value in metadata if key == _PUSHBACK_KEY), "")
    return int(told) / 1000 if told.isdecimal() else None


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Sequence[any_pb2.Any]:
    packed = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    if not isinstance(packed, bytes):
        return ()
    try:
        details: Sequence[any_pb2.Any] = status_pb2.Status.FromString(packed).details
    except DecodeError:
        # What stands beside the status code is a courtesy; without it the error is still told.
        return ()
    return details
