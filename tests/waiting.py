"""Waiting for what servers, processes and threads bring about, which set no event that a test could wait for."""

import asyncio
import inspect
import time
from collections.abc import Callable

__all__ = ["until", "wait_until"]

_POLL_S = 0.005
_TIMEOUT_S = 20.0


async def until(is_true: Callable[[], object], what: str = "", timeout_s: float = _TIMEOUT_S) -> None:
    """It is true now. It may be a question to others, that is, give an awaitable.

    Raises:
        AssertionError: if it has not become true in time; tells `what` was waited for, by default the question itself.
    """
    try:
        async with asyncio.timeout(timeout_s) as limit:
            while not (await answer if inspect.isawaitable(answer := is_true()) else answer):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        if not limit.expired():
            raise  # The question's own.
        raise _in_vain(is_true, what, timeout_s) from None


def wait_until(is_true: Callable[[], object], what: str = "", timeout_s: float = _TIMEOUT_S) -> None:
    """As `until`, where no event loop runs."""
    give_up_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > give_up_s:
            raise _in_vain(is_true, what, timeout_s)
        time.sleep(_POLL_S)


def _in_vain(is_true: Callable[[], object], what: str, timeout_s: float) -> AssertionError:
    return AssertionError(f"waited {timeout_s:g} s for {what or _source_of(is_true)}")


def _source_of(is_true: Callable[[], object]) -> str:
    try:
        return inspect.getsource(is_true).strip()
    except TypeError:  # It is not a function, but something that can be called like one.
        return repr(is_true)
