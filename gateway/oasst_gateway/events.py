"""From a job's log to what its caller is shown: coalesced events, or one whole completion. Pure."""

from collections.abc import Sequence
from typing import Final

from oasst.jobs.v1 import job_pb2
from oasst.v1 import chat_pb2, generation_pb2

__all__ = ["CompletionBuilder", "delta_events", "merge_deltas"]


def delta_events(entries: Sequence[job_pb2.LogEntry], *, position: int) -> list[chat_pb2.ChatEvent]:
    """The events of log entries that follow `position`; entries that waited together become one delta per choice.

    A caller who comes back goes on after an event's `next_position`. Only the last event of the batch reaches the end
    of its last entry, the others stay at `position`: whoever was cut off between them is sent all of them again.
    """
    deltas = entries[0].deltas if len(entries) == 1 else merge_deltas(entries)
    events = [chat_pb2.ChatEvent(next_position=position, delta=delta) for delta in deltas]
    if events:
        events[-1].next_position = entries[-1].end_position
    return events


def merge_deltas(entries: Sequence[job_pb2.LogEntry]) -> list[generation_pb2.Delta]:
    """One delta per choice that says what all its deltas said; the entries stay as they are."""
    merged: dict[int, generation_pb2.Delta] = {}
    texts: dict[int, list[str]] = {}
    for delta in (delta for entry in entries for delta in entry.deltas):
        whole = merged.get(delta.choice)
        if whole is None:
            whole = merged[delta.choice] = generation_pb2.Delta(choice=delta.choice, position=delta.position)
            texts[delta.choice] = []
        texts[delta.choice].append(delta.text)
        whole.token_ids.extend(delta.token_ids)
        whole.logprobs.extend(delta.logprobs)
    for choice, whole in merged.items():
        whole.text = "".join(texts[choice])
    return list(merged.values())


class CompletionBuilder:
    """Gathers a request's events into the answer of the unary RPC."""

    def __init__(self, *, model: str) -> None:
        self._response: Final = chat_pb2.ChatResponse(model=model)
        self._entries: list[job_pb2.LogEntry] = []

    def add(self, event: chat_pb2.ChatEvent) -> None:
        """Takes the next event; `accepted` comes first, `finished` last."""
        match event.WhichOneof("event"):
            case "accepted":
                self._response.request_id = event.accepted.request_id
                self._response.seed = event.accepted.seed
            case "delta":
                self._entries.append(job_pb2.LogEntry(deltas=[event.delta]))
            case "finished":
                self._finish(event.finished)
            case _:
                pass  # Where the request stands in the queue is no part of its answer.

    def build(self) -> chat_pb2.ChatResponse:
        """The whole answer."""
        return self._response

    def _finish(self, finished: chat_pb2.Finished) -> None:
        self._response.usage.CopyFrom(finished.usage)
        self._response.timings.CopyFrom(finished.timings)
        deltas = {delta.choice: delta for delta in merge_deltas(self._entries)}
        for finish in finished.finishes:
            delta = deltas.get(finish.choice, generation_pb2.Delta())
            self._response.choices.add(
                text=delta.text, token_ids=delta.token_ids, logprobs=delta.logprobs, finish=finish
            )
