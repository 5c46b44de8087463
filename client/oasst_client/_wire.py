"""Between this package's values and the protobuf messages: pure, used by both shells."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from google.protobuf import duration_pb2
from google.protobuf.message import Message as ProtoMessage
from oasst.v1 import chat_pb2, generation_pb2, model_pb2

from oasst_client._batches import batches
from oasst_client._errors import ProtocolError, error_from_failed
from oasst_client._request_id import new_request_id
from oasst_client._types import (
    Accepted,
    ChatOptions,
    ChatSnapshot,
    ChatState,
    Choice,
    ChoiceFinish,
    Completion,
    ControlTokens,
    Delta,
    FinishReason,
    Load,
    Message,
    MessageLike,
    Model,
    Preset,
    Priority,
    QueueStatus,
    Role,
    Timings,
    TokenAlternative,
    TokenLogprob,
    Truncation,
    Usage,
    WorkerLoad,
)

__all__ = [
    "accepted_from",
    "cancel_request",
    "chat_request",
    "completion_from",
    "delta_from",
    "detokenize_requests",
    "finish_from",
    "get_request",
    "load_from",
    "message_from",
    "model_from",
    "queue_status_from",
    "snapshot_from",
    "state_from",
    "submit_request",
    "timings_from",
    "tokenize_requests",
    "usage_from",
    "watch_request",
]

_SAMPLING_FIELDS = tuple(field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields)
_LIMIT_FIELDS = tuple(field.name for field in generation_pb2.GenerationLimits.DESCRIPTOR.fields)
_REQUEST_FIELDS = ("request_id", "model", "n", "logprobs", "truncation", "priority", "detach_grace")
_OPTION_NAMES = frozenset(ChatOptions.__annotations__)

# Of one request to tokenize, or back: what a server takes, and its answer's room in one message.
_TEXTS_PER_CALL = 256
_CHARS_PER_CALL = 500_000
_IDS_PER_CALL = 500_000


# ---------------------------------------------------------------------------------------------------- to the server


def chat_request(
    messages: str | Iterable[MessageLike] | None,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    options: ChatOptions,
) -> chat_pb2.ChatRequest:
    """The request of a call, with an id of its own.

    Raises:
        TypeError: not exactly one of messages, prompt and token_ids, or an unknown option.
        ValueError: a value no request can carry, for example an unknown role or an id that is no 32-bit number.
    """
    if unknown := options.keys() - _OPTION_NAMES:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    if sum(each is not None for each in (messages, prompt, token_ids)) != 1:
        raise TypeError("give exactly one of messages, prompt and token_ids")
    fields = _proto_fields(options)
    request = chat_pb2.ChatRequest()
    _fill(request, fields, _REQUEST_FIELDS)
    _fill(request.sampling, fields, _SAMPLING_FIELDS)
    _fill(request.limits, fields, _LIMIT_FIELDS)
    if messages is not None:
        request.conversation.CopyFrom(_conversation_proto(messages))
    elif prompt is not None:
        request.prompt = prompt
    else:
        request.token_ids.CopyFrom(chat_pb2.TokenIds(ids=token_ids))
    return request


def submit_request(
    messages: str | Iterable[MessageLike] | None,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    options: ChatOptions,
) -> chat_pb2.ChatRequest:
    """As `chat_request`, with the timeout in it: no call is open that could have one."""
    request = chat_request(messages, prompt, token_ids, options)
    if (timeout_s := options.get("timeout_s")) is not None and timeout_s != math.inf:
        request.timeout.CopyFrom(_duration(timeout_s))
    return request


def watch_request(request_id: str, resume_token: str) -> chat_pb2.WatchChatRequest:
    return chat_pb2.WatchChatRequest(request_id=request_id, resume_token=resume_token)


def get_request(request_id: str, resume_token: str) -> chat_pb2.GetChatRequest:
    return chat_pb2.GetChatRequest(request_id=request_id, resume_token=resume_token)


def cancel_request(request_id: str, resume_token: str) -> chat_pb2.CancelChatRequest:
    return chat_pb2.CancelChatRequest(request_id=request_id, resume_token=resume_token)


def tokenize_requests(
    texts: Sequence[str], model: str, parse_control_tokens: bool
) -> Iterator[model_pb2.TokenizeRequest]:
    """Requests that hold all the texts, in order."""
    for part in batches(texts, map(len, texts), most=_TEXTS_PER_CALL, most_cost=_CHARS_PER_CALL):
        yield model_pb2.TokenizeRequest(model=model, texts=part, parse_control_tokens=parse_control_tokens)


def detokenize_requests(
    sequences: Sequence[Sequence[int]], model: str, skip_control_tokens: bool
) -> Iterator[model_pb2.DetokenizeRequest]:
    """Requests that hold all the sequences, in order."""
    for part in batches(sequences, map(len, sequences), most=_TEXTS_PER_CALL, most_cost=_IDS_PER_CALL):
        yield model_pb2.DetokenizeRequest(
            model=model,
            sequences=[model_pb2.TokenSequence(ids=ids) for ids in part],
            skip_control_tokens=skip_control_tokens,
        )


def message_from(message: MessageLike) -> Message:
    """The message, whichever way it was written.

    >>> message_from({"role": "user", "content": "Hi"}) == message_from(("user", "Hi"))
    True
    """
    if isinstance(message, Message):
        return Message(Role(message.role), message.content)
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise ValueError(f"a message has a role and a content, not {', '.join(map(str, message)) or 'nothing'}")
        return Message(Role(message["role"]), message["content"])
    role, content = message
    return Message(Role(role), content)


def _conversation_proto(messages: str | Iterable[MessageLike]) -> chat_pb2.Conversation:
    turns = [(Role.USER, messages)] if isinstance(messages, str) else messages
    return chat_pb2.Conversation(
        messages=[
            chat_pb2.Message(role=f"ROLE_{turn.role.name}", content=turn.content) for turn in map(message_from, turns)
        ]
    )


def _proto_fields(options: ChatOptions) -> dict[str, object]:
    """The options that were given, as values of the protobuf fields of the same names."""
    fields: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    fields["request_id"] = options.get("request_id") or new_request_id()
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if (truncation := options.get("truncation")) is not None:
        fields["truncation"] = f"TRUNCATION_{Truncation(truncation).name}"
    if (priority := options.get("priority")) is not None:
        fields["priority"] = f"PRIORITY_{Priority(priority).name}"
    if (detach_grace_s := options.get("detach_grace_s")) is not None:
        fields["detach_grace"] = _duration(detach_grace_s)
    return fields


def _fill(target: ProtoMessage, given: Mapping[str, object], names: Sequence[str]) -> None:
    """Sets the named fields that were given; errors name the option, which protobuf's own do not."""
    for name in names:
        if name not in given:
            continue
        try:
            # MergeFrom of a fresh message takes scalars, lists and maps alike.
            target.MergeFrom(type(target)(**{name: given[name]}))
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        except ValueError as error:  # Not of its own type: a UnicodeEncodeError cannot be made of a text.
            raise ValueError(f"{name}: {error}") from error


def _duration(seconds: float) -> duration_pb2.Duration:
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} seconds are no duration")
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


# -------------------------------------------------------------------------------------------------- from the server


def accepted_from(accepted: chat_pb2.Accepted) -> Accepted:
    return Accepted(
        request_id=accepted.request_id,
        queue=queue_status_from(accepted.queue),
        prompt_tokens=accepted.prompt_tokens,
        dropped_turns=accepted.dropped_turns,
        seed=accepted.seed,
        resume_token=accepted.resume_token,
    )


def queue_status_from(queue: chat_pb2.QueueStatus) -> QueueStatus:
    wait_s = _seconds(queue.estimated_wait) if queue.HasField("estimated_wait") else None
    return QueueStatus(position=queue.position, estimated_wait_s=wait_s)


def delta_from(delta: generation_pb2.Delta) -> Delta:
    return Delta(
        choice=delta.choice,
        position=delta.position,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=_logprobs(delta.logprobs),
    )


def finish_from(finish: generation_pb2.ChoiceFinish) -> ChoiceFinish:
    reasons = {
        generation_pb2.FINISH_REASON_END_OF_TEXT: FinishReason.END_OF_TEXT,
        generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
        generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    }
    return ChoiceFinish(
        choice=finish.choice,
        reason=reasons.get(finish.reason, FinishReason.UNKNOWN),
        stop=finish.stop if finish.HasField("stop") else None,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
    )


def usage_from(usage: chat_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        dropped_turns=usage.dropped_turns,
    )


def timings_from(timings: chat_pb2.Timings) -> Timings:
    return Timings(
        queue_s=_seconds(timings.queue), prefill_s=_seconds(timings.prefill), decode_s=_seconds(timings.decode)
    )


def completion_from(response: chat_pb2.ChatResponse) -> Completion:
    if not response.choices:
        raise ProtocolError(f"request {response.request_id} was answered without a choice")
    return Completion(
        request_id=response.request_id,
        choices=tuple(
            Choice(
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                logprobs=_logprobs(choice.logprobs),
                finish=finish_from(choice.finish),
            )
            for choice in response.choices
        ),
        usage=usage_from(response.usage),
        timings=timings_from(response.timings),
        seed=response.seed,
    )


def snapshot_from(response: chat_pb2.GetChatResponse, request_id: str) -> ChatSnapshot:
    state = state_from(response.state)
    return ChatSnapshot(
        request_id=request_id,
        state=state,
        texts=tuple(choice.text for choice in response.response.choices),
        completion=completion_from(response.response) if state is ChatState.FINISHED else None,
        queue=queue_status_from(response.queue) if response.HasField("queue") else None,
        error=error_from_failed(response.failed, request_id=request_id) if response.HasField("failed") else None,
    )


def state_from(state: chat_pb2.ChatState) -> ChatState:
    name = chat_pb2.ChatState.Name(state) if state in chat_pb2.ChatState.values() else ""
    return ChatState.__members__.get(name.removeprefix("CHAT_STATE_"), ChatState.UNKNOWN)


def model_from(model: model_pb2.Model) -> Model:
    return Model(
        name=model.name,
        vocab_size=model.vocab_size,
        tokenizer_size=model.tokenizer_size,
        max_positions=model.max_positions,
        max_prompt_tokens=model.max_prompt_tokens,
        max_new_tokens=model.max_new_tokens,
        max_choices=model.max_choices,
        control_tokens=_control_tokens(model.control_tokens),
        presets=tuple(_preset(each) for each in model.presets),
    )


def load_from(load: model_pb2.GetLoadResponse) -> Load:
    return Load(
        waiting_requests=load.waiting_requests,
        waiting_tokens=load.waiting_tokens,
        running_requests=load.running_requests,
        workers=tuple(
            WorkerLoad(
                worker_id=worker.worker_id,
                running_sequences=worker.running_sequences,
                max_sequences=worker.max_sequences,
                kv_tokens_used=worker.kv_tokens_used,
                kv_tokens_total=worker.kv_tokens_total,
                tokens_per_second=worker.tokens_per_second,
                age_s=_seconds(worker.age),
            )
            for worker in load.workers
        ),
        estimated_wait_s=_seconds(load.estimated_wait) if load.HasField("estimated_wait") else None,
        server_time_s=load.server_time.ToNanoseconds() / 1e9 if load.HasField("server_time") else None,
        server_version=load.server_version,
    )


def _control_tokens(tokens: model_pb2.ControlTokens) -> ControlTokens:
    # Fields that are set, unless they cannot be unset: an id may be 0.
    given = {
        field.name: getattr(tokens, field.name)
        for field in tokens.DESCRIPTOR.fields
        if not field.has_presence or tokens.HasField(field.name)
    }
    return ControlTokens(**given)


def _preset(params: generation_pb2.SamplingParams) -> Preset:
    values = {field.name: value for field, value in params.ListFields() if field.name != "preset"}
    return Preset(name=params.preset, values=values)


def _logprobs(logprobs: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            logprob=each.logprob,
            alternatives=tuple(TokenAlternative(other.token_id, other.logprob) for other in each.alternatives),
        )
        for each in logprobs
    )


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
