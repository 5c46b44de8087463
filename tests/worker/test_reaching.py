"""Calls to a queue that does not answer: tried again, counted, and not held against it once they are over."""

import asyncio
from collections.abc import Callable

import pytest
from oasst_jobs import QueueUnavailableError, UnavailableReason
from oasst_worker.reaching import QueueCaller
from prometheus_client import CollectorRegistry, Counter


class Queue:
    """Fails so many calls, and then answers."""

    def __init__(self, num_failures: float = float("inf"), on_failure: Callable[[], object] = lambda: None) -> None:
        self._num_failures = num_failures
        self._on_failure = on_failure

    async def ask(self) -> str:
        if self._num_failures:
            self._num_failures -= 1
            self._on_failure()
            raise QueueUnavailableError(UnavailableReason.UNREACHABLE, "away")
        return "answer"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def changes() -> list[bool]:
    """Whether the queue answered everything, each time that changed."""
    return []


@pytest.fixture
def caller(registry, changes) -> QueueCaller:
    errors = Counter("errors", "Calls without an answer.", ["operation"], registry=registry)
    caller = QueueCaller(errors, longest_delay_s=0, on_change=lambda: changes.append(caller.is_answered))
    return caller


async def test_a_call_is_made_until_it_is_answered(caller, changes, registry):
    assert await caller.call("push", Queue(3).ask, give_up=asyncio.Event()) == "answer"
    assert changes == [False, True]
    assert registry.get_sample_value("errors_total", {"operation": "push"}) == 3


async def test_a_call_that_is_answered_at_once_changes_nothing(caller, changes):
    assert await caller.call("push", Queue(0).ask, give_up=asyncio.Event()) == "answer"
    assert changes == []


async def test_a_call_that_was_given_up_is_held_against_the_queue_no_longer(caller, changes):
    give_up = asyncio.Event()
    assert await caller.call("claim", Queue(on_failure=give_up.set).ask, give_up=give_up) is None
    assert changes == [False, True]


async def test_a_call_that_fails_for_another_reason_is_held_against_the_queue_no_longer(caller, changes):
    queue = Queue(2)

    async def ask() -> str:
        await queue.ask()
        raise ValueError("answered, but not so")

    with pytest.raises(ValueError, match="answered"):
        await caller.call("push", ask, give_up=asyncio.Event())
    assert changes == [False, True]
