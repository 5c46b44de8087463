"""Exit codes: what a script learns without reading a word."""

from enum import IntEnum

from oasst_client import (
    DeadlineExceededError,
    InvalidArgumentError,
    MessageTooLargeError,
    NotFoundError,
    OasstError,
    OverloadedError,
    PermissionDeniedError,
    ProfileError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)

__all__ = ["EXIT_CODES", "Exit", "exit_of"]


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    # An option, a file or the input is such that trying again never helps.
    UNUSABLE = 2
    UNREACHABLE = 3
    OVERLOADED = 4
    DENIED = 5
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0, done or stopped as asked; 1, something failed; 2, an option, a file or the input cannot be used; "
    "3, the service cannot be reached; 4, the service is full, retry later; 5, access denied; "
    "130, stopped by Ctrl-C."
)

_EXITS: dict[type[OasstError], Exit] = {
    InvalidArgumentError: Exit.UNUSABLE,
    MessageTooLargeError: Exit.UNUSABLE,
    NotFoundError: Exit.UNUSABLE,
    ProfileError: Exit.UNUSABLE,
    UnimplementedError: Exit.UNUSABLE,
    DeadlineExceededError: Exit.UNREACHABLE,
    UnavailableError: Exit.UNREACHABLE,
    OverloadedError: Exit.OVERLOADED,
    PermissionDeniedError: Exit.DENIED,
    UnauthenticatedError: Exit.DENIED,
}


def exit_of(error: OasstError) -> Exit:
    """The exit code of a command that ended with `error`."""
    return next((code for kind, code in _EXITS.items() if isinstance(error, kind)), Exit.FAILED)
