"""From a request to the job that is put into the queue: valid, formatted, tokenized, every value concrete. Pure."""

import functools
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oasst.jobs.v1 import job_pb2
from oasst.prompt import Turn, drop_oldest, format_prompt
from oasst.v1 import chat_pb2, generation_pb2, scoring_pb2
from oasst_jobs import JOB_VERSION, job_id_for

from oasst_gateway.errors import PROMPT_TOO_LONG, InvalidRequestError, NotTrustedError, Violation
from oasst_gateway.model import ModelLimits, ServedModel
from oasst_gateway.presets import preset_max_new_tokens, resolve_sampling
from oasst_gateway.tenants import Tenant
from oasst_gateway.tokenizer import ControlTokenInTextError
from oasst_gateway.validation import check_chat, check_score, duration_ms, split_system

__all__ = ["PreparedJob", "prepare_chat", "prepare_score"]


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job and what the gateway must know to watch over it."""

    job: job_pb2.Job
    digest: bytes  # Of the request as its client sent it: the same id with another digest is another request.
    timeout_ms: int | None
    grace_ms: int | None  # How long it runs on with nobody watching; None for as long as it takes.


@dataclass(frozen=True, slots=True)
class _Prompt:
    field: str  # The request's field it came from.
    token_ids: Sequence[int]
    dropped_turns: int = 0


def prepare_chat(
    request: chat_pb2.ChatRequest,
    model: ServedModel,
    *,
    tenant: Tenant,
    request_id: str,
    cache_salt: bytes = b"",
    remaining_s: float | None = None,
    default_grace_s: float | None = None,
) -> PreparedJob:
    """The job of `request`, whose RPC has `remaining_s` left.

    Raises:
        InvalidRequestError: if a field is not as the API allows, or the prompt does not fit.
        NotTrustedError: if the tenant may not send this form of input.
    """
    _check_trust(request, tenant)
    check_chat(request, model_name=model.name, limits=model.limits)
    prompt = _build_prompt(request, model)
    job = job_pb2.Job(
        version=JOB_VERSION,
        job_id=job_id_for(tenant.name, request_id),
        tenant=tenant.name,
        model=model.name,
        prompt_token_ids=prompt.token_ids,
        sampling=resolve_sampling(request.sampling, seed=secrets.randbits(64)),
        limits=_resolve_limits(request, prompt, model.limits),
        n=request.n if request.HasField("n") else 1,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        priority=request.priority or chat_pb2.PRIORITY_NORMAL,
        dropped_turns=prompt.dropped_turns,
        request_id=request_id,
        cache_salt=cache_salt,
    )
    return PreparedJob(
        job=job,
        digest=_digest(request),
        timeout_ms=_timeout_ms(request, remaining_s),
        grace_ms=_grace_ms(request, default_grace_s),
    )


def prepare_score(
    request: scoring_pb2.ScoreRequest,
    model: ServedModel,
    *,
    tenant: Tenant,
    request_id: str,
    cache_salt: bytes,
    remaining_s: float | None,
    grace_s: float,
) -> PreparedJob:
    """The job of `request`, whose RPC has `remaining_s` left, and which runs on for `grace_s` without it.

    Raises:
        InvalidRequestError: if a field is not as the API allows.
    """
    check_score(request, model_name=model.name, limits=model.limits)
    job = job_pb2.Job(
        version=JOB_VERSION,
        job_id=job_id_for(tenant.name, request_id),
        tenant=tenant.name,
        model=model.name,
        priority=chat_pb2.PRIORITY_BULK,
        request_id=request_id,
        cache_salt=cache_salt,
        score_items=request.items,
        score_token_logprobs=request.token_logprobs,
    )
    return PreparedJob(
        job=job, digest=_digest(request), timeout_ms=_milliseconds(remaining_s), grace_ms=round(grace_s * 1000)
    )


def _check_trust(request: chat_pb2.ChatRequest, tenant: Tenant) -> None:
    form = request.WhichOneof("input")
    if form in ("prompt", "token_ids") and not tenant.is_trusted:
        raise NotTrustedError(form)


def _digest(request: chat_pb2.ChatRequest | scoring_pb2.ScoreRequest) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _timeout_ms(request: chat_pb2.ChatRequest, remaining_s: float | None) -> int | None:
    """The request's own timeout or what its RPC has left, the smaller."""
    timeouts_ms = [duration_ms(request.timeout)] if request.HasField("timeout") else []
    remaining_ms = _milliseconds(remaining_s)
    if remaining_ms is not None:
        timeouts_ms.append(remaining_ms)
    return min(timeouts_ms, default=None)


def _milliseconds(remaining_s: float | None) -> int | None:
    return None if remaining_s is None else max(1, int(remaining_s * 1000))


def _grace_ms(request: chat_pb2.ChatRequest, default_s: float | None) -> int | None:
    if request.HasField("detach_grace"):
        return duration_ms(request.detach_grace)
    return None if default_s is None else round(default_s * 1000)


def _build_prompt(request: chat_pb2.ChatRequest, model: ServedModel) -> _Prompt:
    # A preset's max_new_tokens is a cap, not a wish: only what the request itself asks for must fit.
    new_tokens = request.limits.max_new_tokens if request.limits.HasField("max_new_tokens") else 1
    budget = min(model.limits.max_prompt_tokens, model.limits.max_positions - new_tokens)
    match request.WhichOneof("input"):
        case "prompt":
            prompt = _Prompt("prompt", model.tokenizer.encode_prompt(request.prompt))
        case "token_ids":
            prompt = _Prompt("token_ids", request.token_ids.ids)
        case _:
            prompt = _format_conversation(request, model, budget)
    if len(prompt.token_ids) > budget:
        raise _prompt_too_long(prompt, new_tokens, model.limits)
    return prompt


def _format_conversation(request: chat_pb2.ChatRequest, model: ServedModel, budget: int) -> _Prompt:
    """All turns of the conversation, or the newest that fit if the oldest may be dropped."""
    system, all_turns = split_system(request.conversation)
    turns: Sequence[Turn] = all_turns
    encode_part = functools.cache(model.tokenizer.encode_part)
    try:
        if request.truncation == chat_pb2.TRUNCATION_DROP_OLDEST_TURNS:
            # First by what their characters must take: a long history is not tokenized only to be dropped.
            turns = _newest_turns(turns, lambda text: len(text) // model.limits.longest_token, budget)
            # Beside them stand the system text and, at the end, the assistant's token.
            left = budget - len(encode_part(system)) - 1
            turns = _newest_turns(turns, lambda text: len(encode_part(text)), left)
        token_ids = [token_id for part in format_prompt(turns, system=system) for token_id in encode_part(part)]
    except ControlTokenInTextError as error:
        raise InvalidRequestError([Violation("conversation", "must not encode to control tokens")]) from error
    return _Prompt("conversation", token_ids, dropped_turns=len(all_turns) - len(turns))


def _newest_turns(turns: Sequence[Turn], num_tokens_of: Callable[[str], int], budget: int) -> Sequence[Turn]:
    """The newest turns that fit by these numbers of tokens of their texts, and the last one in any case."""
    sizes = [2 + num_tokens_of(turn.text) for turn in turns]  # With its speaker and its end.
    num_tokens = sum(sizes)
    while num_tokens > budget and (shorter := drop_oldest(turns)):
        num_tokens -= sum(sizes[-len(turns) : -len(shorter)])
        turns = shorter
    return turns


def _prompt_too_long(prompt: _Prompt, new_tokens: int, limits: ModelLimits) -> InvalidRequestError:
    description = (
        f"has {len(prompt.token_ids)} tokens: with {new_tokens} to generate it must fit {limits.max_positions}"
        f" positions, and at most {limits.max_prompt_tokens} may be prompt"
    )
    return InvalidRequestError([Violation(prompt.field, description, PROMPT_TOO_LONG)])


def _resolve_limits(
    request: chat_pb2.ChatRequest, prompt: _Prompt, limits: ModelLimits
) -> generation_pb2.GenerationLimits:
    resolved = generation_pb2.GenerationLimits()
    resolved.CopyFrom(request.limits)
    if not resolved.HasField("max_new_tokens"):
        left = min(limits.max_positions - len(prompt.token_ids), limits.max_new_tokens)
        resolved.max_new_tokens = min(left, preset_max_new_tokens(request.sampling.preset) or left)
    if not resolved.HasField("min_new_tokens"):
        resolved.min_new_tokens = 0
    if resolved.min_new_tokens > resolved.max_new_tokens:
        allowed = f"must be at most {resolved.max_new_tokens}, the tokens that can be generated"
        raise InvalidRequestError([Violation("limits.min_new_tokens", allowed)])
    return resolved
