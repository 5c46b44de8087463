"""What the API allows, checked field by field before any text is tokenized. Pure: a request in, violations out.

Every rule stands in the comments of `oasst/v1/*.proto`; descriptions say what is allowed and never repeat the
caller's own text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration
from oasst.presets import PRESETS
from oasst.prompt import Speaker, Turn, TurnOrderError, check_turns
from oasst.v1 import chat_pb2, generation_pb2, model_pb2, scoring_pb2

from oasst_gateway.errors import PROMPT_TOO_LONG, InvalidRequestError, Violation
from oasst_gateway.model import ModelLimits

__all__ = [
    "check_chat",
    "check_chat_name",
    "check_detokenize",
    "check_model_name",
    "check_score",
    "check_tokenize",
    "check_watch",
    "duration_ms",
    "split_system",
]

MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 64
MAX_STOP_TOKEN_IDS: Final = 16
MAX_LOGIT_BIASES: Final = 300
MAX_LOGPROBS: Final = 20
MAX_DETACH_GRACE_S: Final = 3600
MAX_TIMEOUT_S: Final = 7 * 24 * 3600
MAX_BATCH: Final = 256  # Texts or sequences of one Tokenize or Detokenize.
MAX_BATCH_CHARS: Final = 1_000_000
MAX_BATCH_IDS: Final = 1_000_000
MAX_SCORE_ITEMS: Final = 256
MAX_SCORE_TOKENS: Final = 131_072  # Of all items of one request.

# So many are told; more would outgrow the metadata that clients accept.
_MAX_VIOLATIONS: Final = 16
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SPEAKERS = {
    chat_pb2.ROLE_PROMPTER: Speaker.PROMPTER,
    chat_pb2.ROLE_USER: Speaker.PROMPTER,
    chat_pb2.ROLE_ASSISTANT: Speaker.ASSISTANT,
}


@dataclass(frozen=True, slots=True)
class _Range:
    """The values a number may have. NaN is in no range."""

    low: float
    high: float | None = None
    includes_low: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = f"at least {self.low:g}" if self.includes_low else f"above {self.low:g}"
        return f"must be {low}" if self.high is None else f"must be {low} and at most {self.high:g}"


_SAMPLING_RANGES: dict[str, _Range] = {
    "repetition_penalty": _Range(0, 1e6, includes_low=False),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "temperature": _Range(0, 100),
    "top_k": _Range(0),
    "top_p": _Range(0, 1, includes_low=False),
    "min_p": _Range(0, 1),
    "typical_p": _Range(0, 1, includes_low=False),
}
_LOGIT_BIAS = _Range(-100, 100)


def check_chat(request: chat_pb2.ChatRequest, *, model_name: str, limits: ModelLimits) -> None:
    """Every field of `request` is as the API allows; whether its prompt fits is known only once it is tokenized.

    Raises:
        InvalidRequestError: with every violation.
    """
    _raise_if_any(
        _check_request_id(request.request_id, required=False),
        _check_model_name(request.model, "model", model_name),
        _check_input(request, limits),
        _check_sampling(request.sampling, limits),
        _check_limits(request.limits, limits),
        _check_options(request, limits),
    )


def check_chat_name(request_id: str) -> None:
    """`request_id` can be a chat's."""
    _raise_if_any(_check_request_id(request_id, required=True))


def check_watch(request: chat_pb2.WatchChatRequest, limits: ModelLimits) -> None:
    """`request` names a chat, and a position that one can have."""
    _raise_if_any(
        _check_request_id(request.request_id, required=True),
        _check_position(request.after, limits),
    )


def check_model_name(name: str, field: str, model_name: str) -> None:
    """`name` is the served model's or empty."""
    _raise_if_any(_check_model_name(name, field, model_name))


def check_tokenize(request: model_pb2.TokenizeRequest, *, model_name: str) -> None:
    """`request` is small enough to answer."""
    _raise_if_any(
        _check_model_name(request.model, "model", model_name),
        _check_texts(request.texts),
    )


def check_score(request: scoring_pb2.ScoreRequest, *, model_name: str, limits: ModelLimits) -> None:
    """Every field of `request` is as the API allows."""
    _raise_if_any(
        _check_request_id(request.request_id, required=False),
        _check_model_name(request.model, "model", model_name),
        _check_score_items(request.items, limits),
    )


def check_detokenize(request: model_pb2.DetokenizeRequest, *, model_name: str, limits: ModelLimits) -> None:
    """`request` is small enough to answer, and every id stands for a token."""
    _raise_if_any(
        _check_model_name(request.model, "model", model_name),
        _check_sequences(request.sequences, limits),
    )


def split_system(conversation: chat_pb2.Conversation) -> tuple[str, list[Turn]]:
    """The system text (empty if there is none) and the turns of a conversation that passed `check_chat`."""
    messages = list(conversation.messages)
    system = messages.pop(0).content if messages and messages[0].role == chat_pb2.ROLE_SYSTEM else ""
    return system, [Turn(_SPEAKERS[message.role], message.content) for message in messages]


def duration_ms(duration: Duration) -> int:
    """Whole milliseconds, rounded up: a positive duration never becomes none."""
    return int(duration.seconds * 1000 + -(-duration.nanos // 1_000_000))


def _raise_if_any(*checks: Iterable[Violation]) -> None:
    violations = [violation for check in checks for violation in check]
    if len(violations) > _MAX_VIOLATIONS:
        more = len(violations) - _MAX_VIOLATIONS
        violations[_MAX_VIOLATIONS:] = [Violation("request", f"{more} more fields are not as allowed")]
    if violations:
        raise InvalidRequestError(violations)


def _check_request_id(request_id: str, *, required: bool) -> Iterator[Violation]:
    if (request_id or required) and not _REQUEST_ID.fullmatch(request_id):
        yield Violation("request_id", "must be 1 to 64 characters of A-Z, a-z, 0-9, _ and -")


def _check_position(after: int, limits: ModelLimits) -> Iterator[Violation]:
    most = limits.max_choices * limits.max_new_tokens
    if after > most:
        yield Violation("after", f"must be at most {most}, the most tokens a request can have")


def _check_model_name(name: str, field: str, model_name: str) -> Iterator[Violation]:
    if name not in ("", model_name):
        yield Violation(field, f"must be empty or one of the served models: {model_name}")


def _check_input(request: chat_pb2.ChatRequest, limits: ModelLimits) -> Iterator[Violation]:
    match request.WhichOneof("input"):
        case "conversation":
            yield from _check_conversation(request.conversation, request.truncation, limits)
        case "prompt":
            yield from _check_prompt(request.prompt, limits)
        case "token_ids":
            yield from _check_prompt_ids(request.token_ids.ids, limits)
        case _:
            yield Violation("input", "must be one of conversation, prompt and token_ids")


def _check_conversation(
    conversation: chat_pb2.Conversation, truncation: chat_pb2.Truncation, limits: ModelLimits
) -> Iterator[Violation]:
    messages = conversation.messages
    if not messages:
        yield Violation("conversation.messages", "must have at least one message")
        return
    if len(messages) > limits.max_positions:
        yield Violation(
            "conversation.messages", f"must have at most {limits.max_positions} messages, has {len(messages)}"
        )
        return
    for index, message in enumerate(messages):
        yield from _check_message(f"conversation.messages[{index}]", index, message)
    yield from _check_order(messages)
    # With truncation only the system text and the last turn must stay.
    may_drop = truncation == chat_pb2.TRUNCATION_DROP_OLDEST_TURNS
    kept = [*messages[: _num_system(messages)], messages[-1]] if may_drop else messages
    yield from _check_length("conversation", sum(len(message.content) for message in kept), limits)


def _check_message(path: str, index: int, message: chat_pb2.Message) -> Iterator[Violation]:
    if message.role == chat_pb2.ROLE_SYSTEM:
        if index > 0:
            yield Violation(f"{path}.role", "must not be system: only the first message may be")
    elif message.role not in _SPEAKERS:
        yield Violation(f"{path}.role", "must be prompter (or user), assistant or system")
    # The model may have answered nothing, and that answer is part of the conversation.
    if not message.content and message.role != chat_pb2.ROLE_ASSISTANT:
        yield Violation(f"{path}.content", "must not be empty")


def _num_system(messages: Sequence[chat_pb2.Message]) -> int:
    """How many messages come before the turns: one system message, or none."""
    return int(messages[0].role == chat_pb2.ROLE_SYSTEM)


def _check_order(messages: Sequence[chat_pb2.Message]) -> Iterator[Violation]:
    first = _num_system(messages)
    if any(message.role not in _SPEAKERS for message in messages[first:]):
        return  # Told already, role by role.
    try:
        check_turns([Turn(_SPEAKERS[message.role], "") for message in messages[first:]])
    except TurnOrderError as error:
        path = f"conversation.messages[{first + error.index}].role" if messages[first:] else "conversation.messages"
        yield Violation(path, "turns must alternate between prompter and assistant, a prompter's first and last")


def _check_prompt(prompt: str, limits: ModelLimits) -> Iterator[Violation]:
    if not prompt:
        yield Violation("prompt", "must not be empty")
    yield from _check_length("prompt", len(prompt), limits)


def _check_length(field: str, num_chars: int, limits: ModelLimits) -> Iterator[Violation]:
    """Refuses what cannot fit, however well it is tokenized."""
    if num_chars > limits.max_prompt_chars:
        description = (
            f"has {num_chars} characters: at most {limits.max_prompt_chars} can fit the"
            f" {limits.max_prompt_tokens} tokens that may be prompt"
        )
        yield Violation(field, description, PROMPT_TOO_LONG)


def _check_prompt_ids(ids: Sequence[int], limits: ModelLimits) -> Iterator[Violation]:
    if not ids:
        yield Violation("token_ids.ids", "must not be empty")
    yield from _check_token_ids("token_ids.ids", ids, limits)


def _check_token_ids(field: str, ids: Sequence[int], limits: ModelLimits) -> Iterator[Violation]:
    """Tells the first id that stands for no token."""
    for index, token_id in enumerate(ids):
        if token_id >= limits.tokenizer_size:
            yield Violation(f"{field}[{index}]", f"must be below {limits.tokenizer_size}, the tokenizer's size")
            return


def _check_sampling(sampling: generation_pb2.SamplingParams, limits: ModelLimits) -> Iterator[Violation]:
    if sampling.preset and sampling.preset not in PRESETS:
        yield Violation("sampling.preset", f"must be empty or one of: {', '.join(PRESETS)}")
    for field, allowed in _SAMPLING_RANGES.items():
        if sampling.HasField(field) and getattr(sampling, field) not in allowed:
            yield Violation(f"sampling.{field}", str(allowed))
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        yield Violation("sampling.logit_bias", f"must have at most {MAX_LOGIT_BIASES} entries")
        return
    for token_id, bias in sorted(sampling.logit_bias.items()):
        if token_id >= limits.tokenizer_size:
            yield Violation(f"sampling.logit_bias[{token_id}]", f"token id must be below {limits.tokenizer_size}")
        if bias not in _LOGIT_BIAS:
            yield Violation(f"sampling.logit_bias[{token_id}]", str(_LOGIT_BIAS))


def _check_limits(requested: generation_pb2.GenerationLimits, limits: ModelLimits) -> Iterator[Violation]:
    allowed = _Range(1, limits.max_new_tokens)
    if requested.HasField("max_new_tokens") and requested.max_new_tokens not in allowed:
        yield Violation("limits.max_new_tokens", str(allowed))
    most = requested.max_new_tokens if requested.HasField("max_new_tokens") else limits.max_new_tokens
    if requested.HasField("min_new_tokens") and not 0 <= requested.min_new_tokens <= max(most, 0):
        yield Violation("limits.min_new_tokens", "must be from 0 to max_new_tokens")
    if len(requested.stop) > MAX_STOPS:
        yield Violation("limits.stop", f"must have at most {MAX_STOPS} texts, has {len(requested.stop)}")
    for index, stop in enumerate(requested.stop[:MAX_STOPS]):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            yield Violation(f"limits.stop[{index}]", f"must have 1 to {MAX_STOP_CHARS} characters")
    if len(requested.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield Violation("limits.stop_token_ids", f"must have at most {MAX_STOP_TOKEN_IDS} ids")
    yield from _check_token_ids("limits.stop_token_ids", requested.stop_token_ids[:MAX_STOP_TOKEN_IDS], limits)


def _check_options(request: chat_pb2.ChatRequest, limits: ModelLimits) -> Iterator[Violation]:
    choices, logprobs = _Range(1, limits.max_choices), _Range(0, MAX_LOGPROBS)
    if request.HasField("n") and request.n not in choices:
        yield Violation("n", str(choices))
    if request.HasField("logprobs") and request.logprobs not in logprobs:
        yield Violation("logprobs", str(logprobs))
    if request.truncation not in chat_pb2.Truncation.values():
        yield Violation("truncation", "must be a value of Truncation")
    if request.priority not in chat_pb2.Priority.values():
        yield Violation("priority", "must be a value of Priority")
    if request.HasField("detach_grace") and not _is_within(request.detach_grace, MAX_DETACH_GRACE_S):
        yield Violation("detach_grace", f"must be from 0 to {MAX_DETACH_GRACE_S} seconds")
    if request.HasField("timeout") and not (
        _is_within(request.timeout, MAX_TIMEOUT_S) and duration_ms(request.timeout) > 0
    ):
        yield Violation("timeout", f"must be above 0 and at most {MAX_TIMEOUT_S} seconds")


def _is_within(duration: Duration, most_s: int) -> bool:
    """A duration as protobuf means it (nanoseconds of one second, one sign), from 0 to `most_s`."""
    return 0 <= duration.seconds <= most_s and 0 <= duration.nanos < 1_000_000_000


def _check_texts(texts: Sequence[str]) -> Iterator[Violation]:
    if len(texts) > MAX_BATCH:
        yield _too_many_entries("texts", len(texts))
        return
    num_chars = sum(map(len, texts))
    if num_chars > MAX_BATCH_CHARS:
        yield Violation("texts", f"must have at most {MAX_BATCH_CHARS} characters in all, have {num_chars}")


def _check_sequences(sequences: Sequence[model_pb2.TokenSequence], limits: ModelLimits) -> Iterator[Violation]:
    if len(sequences) > MAX_BATCH:
        yield _too_many_entries("sequences", len(sequences))
        return
    num_ids = sum(len(sequence.ids) for sequence in sequences)
    if num_ids > MAX_BATCH_IDS:
        yield Violation("sequences", f"must have at most {MAX_BATCH_IDS} ids in all, have {num_ids}")
        return
    for index, sequence in enumerate(sequences):
        yield from _check_token_ids(f"sequences[{index}].ids", sequence.ids, limits)


def _too_many_entries(field: str, size: int) -> Violation:
    return Violation(field, f"must have at most {MAX_BATCH} entries, has {size}")


def _check_score_items(items: Sequence[scoring_pb2.ScoreItem], limits: ModelLimits) -> Iterator[Violation]:
    if not 1 <= len(items) <= MAX_SCORE_ITEMS:
        yield Violation("items", f"must have 1 to {MAX_SCORE_ITEMS} entries, has {len(items)}")
        return
    num_tokens = sum(len(item.token_ids) for item in items)
    if num_tokens > MAX_SCORE_TOKENS:
        yield Violation("items", f"must have at most {MAX_SCORE_TOKENS} token ids in all, have {num_tokens}")
        return
    # The last token is scored and never fed.
    most = limits.max_positions + 1
    for index, item in enumerate(items):
        size = len(item.token_ids)
        if not 2 <= size <= most:
            yield Violation(f"items[{index}].token_ids", f"must have 2 to {most} ids, has {size}")
        elif not 1 <= item.context_length < size:
            yield Violation(f"items[{index}].context_length", f"must be from 1 to {size - 1}, less than all its ids")
        yield from _check_token_ids(f"items[{index}].token_ids", item.token_ids[:most], limits)
