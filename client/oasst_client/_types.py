"""What callers give and get: plain frozen values, free of gRPC and protobuf."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

__all__ = [
    "Accepted",
    "ChatOptions",
    "ChatSnapshot",
    "ChatState",
    "Choice",
    "ChoiceFinish",
    "Completion",
    "ControlTokens",
    "Delta",
    "Event",
    "FinishReason",
    "Finished",
    "ItemScore",
    "Load",
    "Message",
    "MessageLike",
    "Model",
    "Preset",
    "Priority",
    "QueueStatus",
    "Role",
    "ScoreItem",
    "ScoreItemLike",
    "Timings",
    "Token",
    "TokenAlternative",
    "TokenLogprob",
    "Truncation",
    "Usage",
    "Waiting",
    "WorkerLoad",
]


class Role(StrEnum):
    """Who speaks. `USER` is the familiar name of `PROMPTER`."""

    PROMPTER = "prompter"
    ASSISTANT = "assistant"
    USER = "user"
    SYSTEM = "system"


class FinishReason(StrEnum):
    """Why a choice ended."""

    END_OF_TEXT = "end_of_text"
    STOP = "stop"
    LENGTH = "length"
    # A reason of a server newer than this client.
    UNKNOWN = "unknown"


class Truncation(StrEnum):
    """What happens to a prompt that does not fit beside the tokens to generate."""

    ERROR = "error"
    DROP_OLDEST_TURNS = "drop_oldest_turns"


class Priority(StrEnum):
    """How urgent a request is beside others of the same tenant."""

    BULK = "bulk"
    NORMAL = "normal"
    HIGH = "high"


class ChatState(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"
    # A state of a server newer than this client.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


# A turn in any of the shapes people write it: Message, ("user", "Hi"), {"role": "user", "content": "Hi"}.
MessageLike = Message | tuple[str, str] | Mapping[str, str]


class ChatOptions(TypedDict, total=False):
    """The keyword options of every call that generates. What is left out is the server's default.

    The numbers' ranges stand in `oasst/v1/generation.proto`; the server checks them and names the field it refuses.
    """

    # The model's name as `models()` tells it; left out, the server's only model.
    model: str

    # A named preset; the fields below override its values one by one.
    preset: str
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    # Token id -> what is added to its logit.
    logit_bias: Mapping[int, float]
    # 0 takes the most likely token each time.
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    # The same request with the same seed gives the same tokens.
    seed: int

    max_new_tokens: int
    min_new_tokens: int
    # Generation ends before this text, or any of these.
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    # Goes on past end-of-text; for measurements.
    ignore_eos: bool

    # Completions of the same prompt.
    n: int
    # Returns each token's log-probability, with this many alternatives.
    logprobs: int
    truncation: Truncation | str
    priority: Priority | str
    # How long the request runs on after its caller has left, or was lost. Left out, whoever leaves cancels it, and
    # whoever is lost has the server's own time to come back.
    detach_grace_s: float
    # How long the whole call may take, retries included.
    timeout_s: float
    # Drawn when left out. Calling again with the same id and request attaches to what already runs.
    request_id: str


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """A token that could have stood in a generated one's place."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a generated token's probability, from the model's own logits."""

    logprob: float
    # Best first.
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, as `stream(...).tokens()` yields it."""

    token_id: int
    # Natural logarithm of its probability, from the model's own logits; None unless the request asked for it.
    logprob: float | None = None
    # Best first.
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int = 0
    # Prompt tokens whose keys and values were reused.
    cached_tokens: int = 0
    # Over all choices.
    completion_tokens: int = 0
    # Oldest turns left out by `truncation="drop_oldest_turns"`.
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, as the server measured it."""

    # From acceptance to the worker's claim.
    queue_s: float = 0.0
    # From the claim to the first token.
    prefill_s: float = 0.0
    # From the first token to the last.
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Where a waiting request stands."""

    # Requests ahead of it.
    position: int
    # None while the server knows no speed.
    estimated_wait_s: float | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is in the queue and will reach exactly one end."""

    request_id: str
    queue: QueueStatus
    prompt_tokens: int
    dropped_turns: int
    # The seed in use, drawn by the server if the request had none.
    seed: int
    # Lets its holder see and cancel the request from elsewhere.
    resume_token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The request still waits."""

    queue: QueueStatus


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one choice."""

    choice: int
    # Index of the first token among the choice's generated tokens.
    position: int
    # Empty while a character or a possible stop text is incomplete.
    text: str
    token_ids: tuple[int, ...]
    # One per token where the request asked for them.
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def tokens(self) -> tuple[Token, ...]:
        if not self.logprobs:
            return tuple(map(Token, self.token_ids))
        pairs = zip(self.token_ids, self.logprobs, strict=True)
        return tuple(Token(token_id, each.logprob, each.alternatives) for token_id, each in pairs)


@dataclass(frozen=True, slots=True)
class ChoiceFinish:
    """How one choice ended."""

    choice: int
    reason: FinishReason
    # The stop text that matched, if one did.
    stop: str | None = None
    # The stop token id that matched, if one did.
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ran to its end."""

    finishes: tuple[ChoiceFinish, ...]
    usage: Usage
    timings: Timings


# What `stream(...).events()` yields: Accepted, then Waiting and Delta, then Finished. A failure is raised instead.
Event = Accepted | Waiting | Delta | Finished


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole completion of the prompt."""

    text: str
    # End-of-text included.
    token_ids: tuple[int, ...]
    # One per token where the request asked for them.
    logprobs: tuple[TokenLogprob, ...]
    finish: ChoiceFinish


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request. `text`, `token_ids`, `logprobs` and `finish_reason` are the first choice's."""

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    seed: int

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish.reason


@dataclass(frozen=True, slots=True)
class ChatSnapshot:
    """A request at one moment."""

    request_id: str
    state: ChatState
    # What each choice has generated so far.
    texts: tuple[str, ...]
    # Set once it has finished.
    completion: Completion | None
    # Set while it waits.
    queue: QueueStatus | None
    # Set if it was cancelled, expired or failed.
    error: Exception | None

    @property
    def text(self) -> str:
        """What the first choice has generated so far."""
        return self.texts[0] if self.texts else ""


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A context and a continuation whose likelihood is asked for, as token ids."""

    # Context, then continuation: at most one more than the model has positions, for the last one is never fed.
    token_ids: Sequence[int]
    # How many of them are context: at least 1, and less than all.
    context_length: int


# An item as token ids, or as the texts (context, continuation).
ScoreItemLike = ScoreItem | tuple[str, str]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """How likely a continuation is after its context, by the model's raw logits."""

    # Sum of the continuation's log-probabilities, natural logarithm.
    logprob: float
    # Whether every token of the continuation is the most likely one; of equals the lowest id.
    is_greedy: bool
    # One per token of the continuation where they were asked for.
    token_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Ids of the tokens that form turns."""

    prompter: int
    assistant: int
    end_of_text: int
    system: int | None = None
    prefix_begin: int | None = None
    prefix_end: int | None = None
    padding: int | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """A named set of sampling values; those it leaves alone are not in `values`."""

    name: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Model:
    """A served model and its limits."""

    name: str
    vocab_size: int
    tokenizer_size: int
    # Prompt and generated tokens together.
    max_positions: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_choices: int
    control_tokens: ControlTokens
    presets: tuple[Preset, ...]


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy one worker is."""

    worker_id: str
    running_sequences: int
    max_sequences: int
    kv_tokens_used: int
    kv_tokens_total: int
    tokens_per_second: float
    # Since the worker last told.
    age_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """How much waits and runs."""

    waiting_requests: int
    waiting_tokens: int
    running_requests: int
    workers: tuple[WorkerLoad, ...]
    # For a request that came now; None while the server knows no speed.
    estimated_wait_s: float | None
    # The answering server's clock, in seconds since 1970; None of a server that does not tell.
    server_time_s: float | None = None
    server_version: str = ""
