"""From a job's log to what its caller is shown: coalesced events, or one whole completion. Pure."""

from collections.abc import Sequence

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2

__all__ = ["IndivisibleDeltaError", "StreamMessage", "build_response", "delta_events", "entries_after"]

# What a stream sends. An entry with one delta is sent as it is: its bytes are those of the event that says the same.
StreamMessage = chat_pb2.ChatEvent | job_pb2.LogEntry


class IndivisibleDeltaError(ValueError):
    """Several tokens share one piece of text, and nothing tells which part of it is whose."""


def entries_after(entries: Sequence[job_pb2.LogEntry], position: int) -> Sequence[job_pb2.LogEntry]:
    """What `entries` tell behind `position`, where a gapless read of the log began: the first may reach back.

        tokens of the first entry:  | told before |  new  |
                                  start        position  end

    Raises:
        IndivisibleDeltaError: if `position` lies inside a delta that cannot be cut.
    """
    if not entries:
        return entries
    first = entries[0]
    num_told = position - (first.end_position - sum(len(delta.token_ids) for delta in first.deltas))
    if num_told <= 0:
        return entries
    rest = job_pb2.LogEntry(end_position=first.end_position)
    for delta in first.deltas:
        num_cut = min(num_told, len(delta.token_ids))
        num_told -= num_cut
        if num_cut < len(delta.token_ids):
            rest.deltas.append(_cut(delta, num_cut))
    return [rest, *entries[1:]]


def delta_events(entries: Sequence[job_pb2.LogEntry], *, position: int) -> Sequence[StreamMessage]:
    """The events of log entries that follow `position`; entries that waited together become one delta per choice.

    A caller who comes back goes on after an event's `next_position`. Deltas of one entry follow each other in the log,
    so each has its own. Merged ones do not: only the last of them reaches the end, the others stay at `position`, and
    whoever was cut off between them is sent all of them again.
    """
    if len(entries) == 1:
        (entry,) = entries
        if len(entry.deltas) == 1:
            return entries
        events = []
        for delta in entry.deltas:
            position += len(delta.token_ids)
            events.append(chat_pb2.ChatEvent(next_position=position, delta=delta))
        return events
    events = [chat_pb2.ChatEvent(next_position=position, delta=delta) for delta in _merge_deltas(entries)]
    if events:
        events[-1].next_position = entries[-1].end_position
    return events


def build_response(
    accepted: chat_pb2.Accepted,
    entries: Sequence[job_pb2.LogEntry],
    *,
    model: str,
    num_choices: int,
    finished: chat_pb2.Finished | None,
) -> chat_pb2.ChatResponse:
    """All that a log tells, as one answer; whole if it is told how the request finished."""
    response = chat_pb2.ChatResponse(request_id=accepted.request_id, model=model, seed=accepted.seed)
    for choice in range(num_choices):
        response.choices.add(finish=generation_pb2.ChoiceFinish(choice=choice))
    for delta in _merge_deltas(entries):
        whole = response.choices[delta.choice]
        whole.text = delta.text
        whole.token_ids.extend(delta.token_ids)
        whole.logprobs.extend(delta.logprobs)
    if finished is None:
        response.usage.prompt_tokens = accepted.prompt_tokens
        response.usage.dropped_turns = accepted.dropped_turns
        response.usage.completion_tokens = entries[-1].end_position if entries else 0
    else:
        response.usage.CopyFrom(finished.usage)
        response.timings.CopyFrom(finished.timings)
        for finish in finished.finishes:
            response.choices[finish.choice].finish.CopyFrom(finish)
    return response


def _cut(delta: generation_pb2.Delta, num_tokens: int) -> generation_pb2.Delta:
    """The delta without its first tokens."""
    rest = generation_pb2.Delta()
    rest.CopyFrom(delta)
    if num_tokens == 0:
        return rest
    if delta.text and len(delta.text_lengths) != len(delta.token_ids):
        raise IndivisibleDeltaError(f"{len(delta.token_ids)} tokens share one text")
    rest.position += num_tokens
    rest.text = delta.text[sum(delta.text_lengths[:num_tokens]) :]
    del rest.token_ids[:num_tokens]
    del rest.logprobs[:num_tokens]
    del rest.text_lengths[:num_tokens]
    return rest


def _merge_deltas(entries: Sequence[job_pb2.LogEntry]) -> list[generation_pb2.Delta]:
    """One delta per choice that says what all its deltas said; the entries stay as they are."""
    merged: dict[int, generation_pb2.Delta] = {}
    positions: dict[int, int] = {}
    texts: dict[int, list[str]] = {}
    for delta in (delta for entry in entries for delta in entry.deltas):
        choice = delta.choice
        if choice not in merged:
            merged[choice], positions[choice], texts[choice] = generation_pb2.Delta(), delta.position, []
        merged[choice].MergeFrom(delta)
        texts[choice].append(delta.text)
        if not delta.text_lengths:
            merged[choice].text_lengths.extend(_lengths_of_one(delta))
    for choice, whole in merged.items():
        # Of these, merging kept the last.
        whole.position = positions[choice]
        whole.text = "".join(texts[choice])
        if len(whole.text_lengths) != len(whole.token_ids):
            whole.ClearField("text_lengths")  # Some delta did not tell.
    return list(merged.values())


def _lengths_of_one(delta: generation_pb2.Delta) -> Sequence[int]:
    """The text's length, where all of it is one token's."""
    return (len(delta.text),) if len(delta.token_ids) == 1 else ()
