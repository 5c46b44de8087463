"""How log entries become events, and what a chat tells while it waits."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_gateway.backlog import Backlog
from oasst_gateway.chat import Chat
from oasst_gateway.events import delta_events
from oasst_gateway.metrics import ChatMeter, GatewayMetrics
from oasst_gateway.presets import resolve_sampling
from prometheus_client import CollectorRegistry


def entry(end_position: int, *deltas: generation_pb2.Delta) -> job_pb2.LogEntry:
    return job_pb2.LogEntry(end_position=end_position, deltas=deltas)


def delta(choice: int, position: int, text: str, *token_ids: int) -> generation_pb2.Delta:
    logprobs = [generation_pb2.TokenLogprob(logprob=-token_id) for token_id in token_ids]
    return generation_pb2.Delta(choice=choice, position=position, text=text, token_ids=token_ids, logprobs=logprobs)


def test_one_entry_becomes_one_event_for_each_choice() -> None:
    events = delta_events([entry(6, delta(0, 2, "a", 1), delta(1, 2, "b", 2))], position=4)
    assert [event.delta.text for event in events] == ["a", "b"]
    assert [event.next_position for event in events] == [4, 6]


def test_entries_that_waited_together_become_one_delta_for_each_choice() -> None:
    entries = [
        entry(2, delta(0, 0, "a", 1), delta(1, 0, "x", 7)),
        entry(4, delta(0, 1, "b", 2), delta(1, 1, "y", 8)),
        entry(5, delta(0, 2, "c", 3)),
    ]
    events = delta_events(entries, position=0)
    assert [event.delta for event in events] == [delta(0, 0, "abc", 1, 2, 3), delta(1, 0, "xy", 7, 8)]
    assert [event.next_position for event in events] == [0, 5]
    assert entries[0].deltas[0].text == "a"


class Subscription:
    """A subscription whose news the test brings."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[job_pb2.LogEntry | job_pb2.Outcome | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[job_pb2.LogEntry | job_pb2.Outcome]:
        while True:
            news = await self.news.get()
            if isinstance(news, Exception):
                raise news
            yield news


async def test_a_backlog_gathers_what_came_between_two_looks() -> None:
    subscription = Subscription()
    async with Backlog(subscription.__aiter__()).reading() as backlog:
        assert await backlog.take(timeout_s=0.001) is None
        for position in (1, 2, 3):
            subscription.news.put_nowait(entry(position))
        subscription.news.put_nowait(job_pb2.Outcome())
        await asyncio.sleep(0)
        news = await backlog.take(timeout_s=5)
        assert news is not None
        assert [e.end_position for e in news.entries] == [1, 2, 3]
        assert news.outcome == job_pb2.Outcome()


async def test_a_broken_subscription_is_heard_where_it_is_read() -> None:
    subscription = Subscription()
    subscription.news.put_nowait(ConnectionError("gone"))
    async with Backlog(subscription.__aiter__()).reading() as backlog:
        with pytest.raises(ConnectionError, match="gone"):
            await backlog.take(timeout_s=5)


async def test_a_chat_tells_its_place_again_while_it_waits() -> None:
    subscription = Subscription()
    places = [chat_pb2.QueueStatus(position=2), None, chat_pb2.QueueStatus(position=1)]

    async def ask_queue() -> chat_pb2.QueueStatus | None:
        place = places.pop(0)
        if not places:
            subscription.news.put_nowait(entry(1, delta(0, 0, "a", 1)))
            subscription.news.put_nowait(job_pb2.Outcome(finished=chat_pb2.Finished()))
        return place

    async with Backlog(subscription.__aiter__()).reading() as backlog:
        chat = Chat(
            chat_pb2.Accepted(request_id="r-1"),
            job_id="j-1",
            backlog=backlog,
            meter=ChatMeter(GatewayMetrics(CollectorRegistry())),
            ask_queue=ask_queue,
            ask_interval_s=0.001,
        )
        events = [event async for event in chat.events()]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", "waiting", "waiting", "delta", "finished"]
    assert [event.waiting.position for event in events[1:3]] == [2, 1]


def test_a_meter_measures_first_token_gaps_and_tokens() -> None:
    registry = CollectorRegistry()
    times_s = iter([0.0, 1.0, 1.25, 1.5])
    meter = ChatMeter(GatewayMetrics(registry), clock=lambda: next(times_s))
    meter.saw_delta(delta(0, 0, "a", 1))
    meter.saw_delta(delta(0, 1, "bc", 2, 3))
    meter.saw_finished(chat_pb2.Finished())

    def sample(name: str) -> float | None:
        return registry.get_sample_value(f"oasst_gateway_{name}")

    assert sample("time_to_first_token_seconds_sum") == 1.0
    assert sample("inter_token_latency_seconds_sum") == 0.25
    assert sample("time_per_output_token_seconds_sum") == 0.25
    assert sample("generated_tokens_total") == 3


def test_a_preset_gives_its_values_and_the_request_overrides_them() -> None:
    requested = generation_pb2.SamplingParams(preset="k50", temperature=0.0)
    resolved = resolve_sampling(requested, seed=7)
    assert (resolved.temperature, resolved.top_k, resolved.top_p) == (0.0, 50, 0.95)
    assert (resolved.repetition_penalty, resolved.typical_p, resolved.min_p) == (1.2, 1.0, 0.0)
    assert resolved.seed == 7


def test_without_a_preset_what_is_not_asked_for_is_off() -> None:
    resolved = resolve_sampling(generation_pb2.SamplingParams(seed=0), seed=7)
    assert all(resolved.HasField(field.name) for field in resolved.DESCRIPTOR.fields if field.has_presence)
    assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.repetition_penalty) == (1.0, 0, 1.0, 1.0)
    assert resolved.seed == 0
