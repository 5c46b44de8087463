"""How log entries become events, and what a chat tells while it waits."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2
from oasst_gateway.chat import Chat
from oasst_gateway.errors import ChatFailedError
from oasst_gateway.events import IndivisibleDeltaError, StreamMessage, build_response, delta_events, entries_after
from oasst_gateway.metrics import ChatMeter, GatewayMetrics
from oasst_gateway.offloading import TenantThreads
from oasst_gateway.presets import resolve_sampling
from oasst_gateway.tenants import Tenant
from prometheus_client import CollectorRegistry


def entry(end_position: int, *deltas: generation_pb2.Delta) -> job_pb2.LogEntry:
    return job_pb2.LogEntry(end_position=end_position, deltas=deltas)


def delta(choice: int, position: int, text: str, *token_ids: int) -> generation_pb2.Delta:
    logprobs = [generation_pb2.TokenLogprob(logprob=-token_id) for token_id in token_ids]
    return generation_pb2.Delta(choice=choice, position=position, text=text, token_ids=token_ids, logprobs=logprobs)


def pieces(choice: int, position: int, *texts: str) -> generation_pb2.Delta:
    """One token for each text, and the lengths that tell which is whose."""
    whole = delta(choice, position, "".join(texts), *range(10 + position, 10 + position + len(texts)))
    whole.text_lengths.extend(map(len, texts))
    return whole


def on_the_wire(message: StreamMessage) -> chat_pb2.ChatEvent:
    """The message as its receiver reads it."""
    return chat_pb2.ChatEvent.FromString(message.SerializeToString())


def test_an_entry_with_one_delta_is_an_event_as_it_stands() -> None:
    logged = entry(3, delta(0, 2, "a", 1))
    (message,) = delta_events([logged], position=2)
    assert message is logged
    assert on_the_wire(message) == chat_pb2.ChatEvent(next_position=3, delta=delta(0, 2, "a", 1))


def test_each_delta_of_an_entry_has_a_position_to_come_back_to() -> None:
    events = delta_events([entry(6, delta(0, 2, "a", 1), delta(1, 2, "b", 2))], position=4)
    assert [event.delta.text for event in events] == ["a", "b"]
    assert [event.next_position for event in events] == [5, 6]


def test_entries_that_waited_together_become_one_delta_for_each_choice() -> None:
    entries = [
        entry(2, delta(0, 0, "a", 1), delta(1, 0, "x", 7)),
        entry(4, delta(0, 1, "b", 2), delta(1, 1, "y", 8)),
        entry(5, delta(0, 2, "c", 3)),
    ]
    events = delta_events(entries, position=0)
    assert [event.delta.text for event in events] == ["abc", "xy"]
    assert [list(event.delta.token_ids) for event in events] == [[1, 2, 3], [7, 8]]
    assert [list(event.delta.text_lengths) for event in events] == [[1, 1, 1], [1, 1]]
    assert [event.delta.position for event in events] == [0, 0]
    assert [len(event.delta.logprobs) for event in events] == [3, 2]
    assert [event.next_position for event in events] == [0, 5]
    assert entries[0].deltas[0].text == "a"


def test_a_log_is_cut_exactly_at_every_position() -> None:
    """Two choices, three entries of several tokens: whatever the position, the rest is what was not told."""
    entries = [
        entry(4, pieces(0, 0, "a", "bc"), pieces(1, 0, "", "xy")),
        entry(5, pieces(0, 2, "d")),
        entry(8, pieces(0, 3, "", "ef"), pieces(1, 2, "z")),
    ]
    tokens = [
        (part.choice, part.position + index, part.token_ids[index], text)
        for logged in entries
        for part in logged.deltas
        for index, text in enumerate(_texts(part))
    ]
    for position in range(9):
        # As the queue gives it: every entry that ends behind the position.
        behind = [logged for logged in entries if logged.end_position > position]
        rest = [
            (part.choice, part.position + index, part.token_ids[index], text)
            for logged in entries_after(behind, position)
            for part in logged.deltas
            for index, text in enumerate(_texts(part))
        ]
        assert rest == tokens[position:]
        assert all(
            len(part.logprobs) == len(part.token_ids)
            for logged in entries_after(behind, position)
            for part in logged.deltas
        )


def _texts(part: generation_pb2.Delta) -> list[str]:
    ends = [sum(part.text_lengths[: index + 1]) for index in range(len(part.text_lengths))]
    return [part.text[end - length : end] for end, length in zip(ends, part.text_lengths, strict=True)]


def test_text_of_several_tokens_without_lengths_is_not_cut_by_guess() -> None:
    with pytest.raises(IndivisibleDeltaError):
        entries_after([entry(2, delta(0, 0, "ab", 1, 2))], 1)
    assert entries_after([entry(2, delta(0, 0, "", 1, 2))], 1) == [entry(2, delta(0, 1, "", 2))]


def test_a_log_without_an_end_is_an_answer_so_far() -> None:
    accepted = chat_pb2.Accepted(request_id="r-1", prompt_tokens=7, seed=5)
    response = build_response(accepted, [entry(1, delta(1, 0, "x", 7))], model="m", num_choices=2, finished=None)
    assert [choice.text for choice in response.choices] == ["", "x"]
    assert (response.seed, response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 7, 1)
    assert response.choices[1].finish == generation_pb2.ChoiceFinish(choice=1)


class Source:
    """A subscription whose news the test brings."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[list[job_pb2.LogEntry | job_pb2.Outcome] | Exception] = asyncio.Queue()

    async def take(self) -> list[job_pb2.LogEntry | job_pb2.Outcome]:
        news = await self.news.get()
        if isinstance(news, Exception):
            raise news
        return news

    def call(self) -> None:
        self.news.put_nowait([])

    def fail(self, failure: Exception) -> None:
        self.news.put_nowait(failure)


def make_chat(source: Source, *places: chat_pb2.QueueStatus | None, after: int = 0) -> Chat:
    waiting = list(places)

    async def ask_queue() -> chat_pb2.QueueStatus | None:
        return waiting.pop(0)

    return Chat(
        job_pb2.Job(job_id="j-1", n=1),
        chat_pb2.Accepted(request_id="r-1"),
        source=source,
        meter=ChatMeter(GatewayMetrics(CollectorRegistry())),
        threads=TenantThreads(),
        tenant=Tenant(name="tenant"),
        ask_queue=ask_queue,
        after=after,
    )


async def test_a_chat_tells_its_place_again_while_it_waits() -> None:
    source = Source()
    chat = make_chat(source, chat_pb2.QueueStatus(position=2), None, chat_pb2.QueueStatus(position=1))
    for _ in range(4):  # The first finds it heard of just now.
        chat.remind()
    source.news.put_nowait([entry(1, delta(0, 0, "a", 1)), job_pb2.Outcome(finished=chat_pb2.Finished())])
    events = [on_the_wire(event) async for event in chat.events()]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["accepted", "waiting", "waiting", "delta", "finished"]
    assert [event.waiting.position for event in events[1:3]] == [2, 1]


async def test_a_chat_that_is_heard_of_is_not_asked_for_its_place() -> None:
    source = Source()
    chat = make_chat(source)
    events = chat.events()
    await anext(events)
    chat.remind()
    source.news.put_nowait([entry(1, delta(0, 0, "a", 1))])
    await anext(events)
    chat.remind()
    assert source.news.empty()


@pytest.mark.parametrize(("num_entries", "off_loop"), [(64, False), (65, True)])
async def test_a_long_log_is_put_together_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, num_entries: int, off_loop: bool
) -> None:
    threads: list[int] = []

    def noting(function: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **named: object) -> object:
            threads.append(threading.get_ident())
            return function(*arguments, **named)

        return noted

    monkeypatch.setattr("oasst_gateway.chat.delta_events", noting(delta_events))
    monkeypatch.setattr("oasst_gateway.chat.build_response", noting(build_response))
    entries = [entry(index + 1, delta(0, index, "a", 1)) for index in range(num_entries)]
    news = [*entries, job_pb2.Outcome(finished=chat_pb2.Finished())]
    source = Source()
    source.news.put_nowait(news)
    events = [event async for event in make_chat(source).events()]
    source.news.put_nowait(news)
    response = await make_chat(source).response()
    assert events[1].delta.text == response.choices[0].text == "a" * num_entries
    assert [thread != threading.get_ident() for thread in threads] == [off_loop, off_loop]


async def test_a_chat_whose_log_cannot_be_divided_ends_rather_than_repeat() -> None:
    source = Source()
    chat = make_chat(source, after=1)
    source.news.put_nowait([entry(2, delta(0, 0, "ab", 1, 2))])
    events = chat.events()
    assert on_the_wire(await anext(events)).HasField("accepted")
    assert on_the_wire(await anext(events)).failed.reason == "STREAM_DIVERGED"
    with pytest.raises(ChatFailedError):
        await anext(events)


def test_a_meter_measures_first_token_gaps_and_tokens() -> None:
    registry = CollectorRegistry()
    times_s = iter([0.0, 1.0, 1.25, 1.5])
    meter = ChatMeter(GatewayMetrics(registry), clock=lambda: next(times_s))
    meter.saw_tokens(1)
    meter.saw_tokens(2)
    meter.saw_finished(chat_pb2.Finished())

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert sample("gen_ai_server_time_to_first_token_seconds_sum", gen_ai_operation_name="chat") == 1.0
    assert sample("oasst_gateway_inter_token_latency_seconds_sum") == 0.25
    assert sample("gen_ai_server_time_per_output_token_seconds_sum", gen_ai_operation_name="chat") == 0.25
    assert sample("oasst_gateway_generated_tokens_total") == 3


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
