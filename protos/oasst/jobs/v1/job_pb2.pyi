from oasst.v1 import chat_pb2 as _chat_pb2
from oasst.v1 import generation_pb2 as _generation_pb2
from oasst.v1 import scoring_pb2 as _scoring_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Job(_message.Message):
    __slots__ = ("version", "job_id", "tenant", "model", "prompt_token_ids", "sampling", "limits", "n", "logprobs", "priority", "dropped_turns", "request_id", "cache_salt", "score_items", "score_token_logprobs", "traceparent", "tracestate")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DROPPED_TURNS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SCORE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    SCORE_TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    version: int
    job_id: str
    tenant: str
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generation_pb2.SamplingParams
    limits: _generation_pb2.GenerationLimits
    n: int
    logprobs: int
    priority: _chat_pb2.Priority
    dropped_turns: int
    request_id: str
    cache_salt: bytes
    score_items: _containers.RepeatedCompositeFieldContainer[_scoring_pb2.ScoreItem]
    score_token_logprobs: bool
    traceparent: str
    tracestate: str
    def __init__(self, version: _Optional[int] = ..., job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., limits: _Optional[_Union[_generation_pb2.GenerationLimits, _Mapping]] = ..., n: _Optional[int] = ..., logprobs: _Optional[int] = ..., priority: _Optional[_Union[_chat_pb2.Priority, str]] = ..., dropped_turns: _Optional[int] = ..., request_id: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., score_items: _Optional[_Iterable[_Union[_scoring_pb2.ScoreItem, _Mapping]]] = ..., score_token_logprobs: _Optional[bool] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class LogEntry(_message.Message):
    __slots__ = ("end_position", "deltas", "scores")
    END_POSITION_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    end_position: int
    deltas: _containers.RepeatedCompositeFieldContainer[_generation_pb2.Delta]
    scores: _containers.RepeatedCompositeFieldContainer[_scoring_pb2.ItemScore]
    def __init__(self, end_position: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[_generation_pb2.Delta, _Mapping]]] = ..., scores: _Optional[_Iterable[_Union[_scoring_pb2.ItemScore, _Mapping]]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("finished", "failed")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    finished: _chat_pb2.Finished
    failed: _chat_pb2.Failed
    def __init__(self, finished: _Optional[_Union[_chat_pb2.Finished, _Mapping]] = ..., failed: _Optional[_Union[_chat_pb2.Failed, _Mapping]] = ...) -> None: ...

class JobUpdate(_message.Message):
    __slots__ = ("job_id", "start_position", "entry", "outcome")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    start_position: int
    entry: LogEntry
    outcome: Outcome
    def __init__(self, job_id: _Optional[str] = ..., start_position: _Optional[int] = ..., entry: _Optional[_Union[LogEntry, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class UpdateBatch(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[JobUpdate]
    def __init__(self, updates: _Optional[_Iterable[_Union[JobUpdate, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "model", "running_sequences", "max_sequences", "kv_tokens_used", "kv_tokens_total", "tokens_per_second", "version")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    running_sequences: int
    max_sequences: int
    kv_tokens_used: int
    kv_tokens_total: int
    tokens_per_second: float
    version: str
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., running_sequences: _Optional[int] = ..., max_sequences: _Optional[int] = ..., kv_tokens_used: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., version: _Optional[str] = ...) -> None: ...
