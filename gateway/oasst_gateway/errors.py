"""What the gateway refuses, in its own words. `status` gives each its gRPC code."""

from collections.abc import Sequence
from dataclasses import dataclass

from oasst.v1 import chat_pb2

__all__ = [
    "INVALID_FIELD",
    "INVALID_UTF8",
    "MALFORMED",
    "PROMPT_TOO_LONG",
    "TOO_MANY_RETRY_S",
    "ChatFailedError",
    "GatewayError",
    "GatewayLeavingError",
    "InvalidRequestError",
    "NoWorkerError",
    "NotTrustedError",
    "RefusedError",
    "StartError",
    "UnauthenticatedError",
    "UnknownChatError",
    "Violation",
]

INVALID_FIELD = "INVALID_FIELD"
INVALID_UTF8 = "INVALID_UTF8"
MALFORMED = "MALFORMED"
PROMPT_TOO_LONG = "PROMPT_TOO_LONG"

# When to come back to a gateway that has as much to do as it may.
TOO_MANY_RETRY_S = 1.0


class StartError(Exception):
    """The gateway cannot start; the message is one sentence that says why."""


class GatewayError(Exception):
    """A request cannot be served. The message is shown to the caller and never repeats the caller's text."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One field that is not as the API allows."""

    field: str  # Its path in the request, for example "limits.stop[3]".
    description: str  # What is allowed.
    reason: str = INVALID_FIELD


class InvalidRequestError(GatewayError):
    """The request itself is wrong; sending it again does not help. Its reason is the one that all violations share."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = tuple(violations)
        reasons = {violation.reason for violation in violations}
        self.reason = reasons.pop() if len(reasons) == 1 else INVALID_FIELD


class UnauthenticatedError(GatewayError):
    """The caller did not prove who it is. What was wrong with the proof is not told."""

    def __init__(self) -> None:
        super().__init__("send a valid API key or token as metadata: authorization: Bearer ...")


class NotTrustedError(GatewayError):
    """The caller's tenant may not form turns itself."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is for tenants with is_trusted; send a conversation")


class NoWorkerError(GatewayError):
    """Nobody could run the request, and its deadline passes before a worker can be expected."""

    def __init__(self, *, retry_after_s: float) -> None:
        super().__init__("no worker serves this model now; nothing was queued")
        self.retry_after_s = retry_after_s


class RefusedError(GatewayError):
    """There is no place for the request now; `reason` says what is full, or too slow."""

    def __init__(self, reason: str, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class GatewayLeavingError(GatewayError):
    """This gateway stops; if the request was accepted it goes on, and another gateway tells the rest."""

    def __init__(self) -> None:
        super().__init__("this gateway is stopping; send the request, or watch it, through another")


class UnknownChatError(GatewayError):
    """No such request is known to this caller, or it ended longer ago than results are kept."""

    def __init__(self) -> None:
        super().__init__("no such request is known, or it ended longer ago than results are kept")


class ChatFailedError(GatewayError):
    """A request was accepted and ended without finishing."""

    def __init__(self, failed: chat_pb2.Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed
