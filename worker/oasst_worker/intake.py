"""A claimed job is checked once more, and becomes parts of the engine that go on where its log ends.

The gateway has validated every job, but whoever can write to Redis can write a job: what would hurt the engine is
refused here, and fails alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.rpc import code_pb2  # type: ignore[import-untyped]  # the package ships no types
from oasst.jobs.v1.job_pb2 import Job, LogEntry
from oasst.v1.chat_pb2 import Failed
from oasst.v1.generation_pb2 import ChoiceFinish
from oasst_jobs import JOB_VERSION, ClaimedJob

from oasst_worker import engine
from oasst_worker.choice import Choice
from oasst_worker.detokenizer import ChoiceText, Detokenizer
from oasst_worker.engine import GenerationParams, TokenOutput, finish_reason
from oasst_worker.scoring import ScoredRun, scored_runs

__all__ = ["Intake", "JobRefusedError", "ModelFacts", "ResumedChoice"]

_OLDEST_JOB_VERSION = 1
_MAX_CHOICES = 128
_MAX_STOPS = 4
_MAX_STOP_CHARACTERS = 64
_MAX_STOP_TOKEN_IDS = 16
_MAX_LOGIT_BIASES = 300
_MAX_LOGPROBS = 20
_MAX_ITEMS = 256
# Field of SamplingParams -> smallest and largest value. A lower bound of 0 that stands in _POSITIVE is excluded.
_RANGES = {
    "repetition_penalty": (0.0, math.inf),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "temperature": (0.0, 100.0),
    "top_k": (0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "seed": (0, math.inf),
}
_POSITIVE = frozenset({"repetition_penalty", "top_p", "typical_p"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What decides whether this worker can run a job."""

    vocab_size: int  # Rows of the embedding.
    max_positions: int  # Prompt and generated tokens of one choice.
    kv_tokens: int  # Positions of KV cache in all.
    eos_token_id: int


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """A choice as its log left it: nothing generated yet, in the middle, or ended."""

    choice: Choice
    num_logged_tokens: int
    finish: ChoiceFinish | None


class JobRefusedError(Exception):
    """This worker cannot run the job, and trying again would not help."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.failed = Failed(code=code, reason=reason, message=message)


class Intake:
    """Makes parts of jobs."""

    def __init__(self, detokenizer: Detokenizer, model: ModelFacts) -> None:
        self._detokenizer = detokenizer
        self._model = model

    def accept(self, claimed: ClaimedJob) -> list[ResumedChoice]:
        """The job's choices, in order, each with its logged tokens replayed.

        Raises:
            JobRefusedError: if the job or its log is not as the contract says, or the job can never fit.
        """
        _check_job(claimed.job, self._model)
        logged_ids = _logged_ids(claimed.job, claimed.log, self._model)
        sequences = _sequences(claimed, logged_ids)
        return [
            self._resume(claimed.job, index, sequence, token_ids)
            for index, (sequence, token_ids) in enumerate(zip(sequences, logged_ids, strict=True))
        ]

    def accept_scoring(self, claimed: ClaimedJob) -> list[ScoredRun]:
        """What is still to be scored of the job.

        Raises:
            JobRefusedError: as `accept`.
        """
        job = claimed.job
        _check_version(job)
        _check(_scoring_requirements(job, self._model))
        _check_room(max(len(item.token_ids) for item in job.score_items) - 1, self._model)
        if sum(len(entry.scores) for entry in claimed.log) != claimed.end_position:
            raise _invalid(f"the log does not hold the scores of {claimed.end_position} items")
        if claimed.end_position > len(job.score_items):
            raise _invalid(f"the log has scores of {claimed.end_position} items, the job has {len(job.score_items)}")
        return list(scored_runs(claimed))

    def _resume(self, job: Job, index: int, sequence: engine.Sequence, logged_ids: Sequence[int]) -> ResumedChoice:
        params = sequence.params
        text = ChoiceText(self._detokenizer.start(), job.limits.stop, min_new_tokens=params.min_new_tokens)
        choice = Choice(index, sequence, text)
        finish = None
        for num_tokens, token_id in enumerate(logged_ids, start=1):
            if finish is not None:
                raise _invalid(f"the log goes on behind the end of choice {index}")
            reason = finish_reason(
                params, token_id, num_output_tokens=num_tokens, eos_token_id=self._model.eos_token_id
            )
            finish = choice.take(TokenOutput(sequence.sequence_id, token_id, finish=reason)).finish
        return ResumedChoice(choice, len(logged_ids), finish)


def _sequences(claimed: ClaimedJob, logged_ids: Sequence[Sequence[int]]) -> list[engine.Sequence]:
    """A sequence for each choice, which goes on after what is logged of it."""
    job = claimed.job
    first = engine.Sequence(
        f"{claimed.job_id}/0", job.prompt_token_ids, _generation_params(job, 0), logged_ids[0], salt=job.cache_salt
    )
    others = (
        first.sibling(f"{claimed.job_id}/{index}", _generation_params(job, index), token_ids)
        for index, token_ids in enumerate(logged_ids[1:], start=1)
    )
    return [first, *others]


def _check_job(job: Job, model: ModelFacts) -> None:
    _check_version(job)
    _check(_requirements(job, model))
    _check_room(len(job.prompt_token_ids) + job.limits.max_new_tokens, model)


def _check_version(job: Job) -> None:
    # Older ones too: a fleet is replaced while jobs of the last release wait.
    if not _OLDEST_JOB_VERSION <= job.version <= JOB_VERSION:
        raise JobRefusedError(
            code_pb2.FAILED_PRECONDITION,
            "UNKNOWN_JOB_VERSION",
            f"the job's version is {job.version}; this worker knows {_OLDEST_JOB_VERSION} to {JOB_VERSION}",
        )


def _check(requirements: Iterable[tuple[bool, str]]) -> None:
    for is_true, requirement in requirements:
        if not is_true:
            raise _invalid(requirement)


def _check_room(longest: int, model: ModelFacts) -> None:
    if longest > model.kv_tokens:
        raise JobRefusedError(
            code_pb2.FAILED_PRECONDITION,
            "EXCEEDS_KV_CACHE",
            f"it needs {longest} positions of KV cache; this worker has {model.kv_tokens}",
        )


def _requirements(job: Job, model: ModelFacts) -> Iterable[tuple[bool, str]]:
    """What must hold of a job, each with the sentence that says so."""
    limits, sampling = job.limits, job.sampling
    num_prompt_tokens = len(job.prompt_token_ids)
    yield num_prompt_tokens >= 1, "the prompt must not be empty"
    yield _are_token_ids(job.prompt_token_ids, model), f"prompt token ids must be below {model.vocab_size}"
    yield 1 <= job.n <= _MAX_CHOICES, f"n must be 1 to {_MAX_CHOICES}"
    yield limits.max_new_tokens >= 1, "max_new_tokens must be at least 1"
    yield 0 <= limits.min_new_tokens <= limits.max_new_tokens, "min_new_tokens must be 0 to max_new_tokens"
    fits = num_prompt_tokens + limits.max_new_tokens <= model.max_positions
    yield fits, f"prompt and new tokens must fit {model.max_positions} positions"
    yield len(limits.stop) <= _MAX_STOPS, f"there must be at most {_MAX_STOPS} stop texts"
    are_short = all(1 <= len(stop) <= _MAX_STOP_CHARACTERS for stop in limits.stop)
    yield are_short, f"stop texts must have 1 to {_MAX_STOP_CHARACTERS} characters"
    yield len(limits.stop_token_ids) <= _MAX_STOP_TOKEN_IDS, f"there must be at most {_MAX_STOP_TOKEN_IDS} stop ids"
    yield _are_token_ids(limits.stop_token_ids, model), f"stop token ids must be below {model.vocab_size}"
    yield job.logprobs <= _MAX_LOGPROBS, f"logprobs must be at most {_MAX_LOGPROBS}"
    for field, (low, high) in _RANGES.items():
        yield sampling.HasField(field), f"{field} must be set"
        value = getattr(sampling, field)
        above = value > low if field in _POSITIVE else value >= low
        yield above and value <= high and math.isfinite(value), f"{field} is out of range"
    yield len(sampling.logit_bias) <= _MAX_LOGIT_BIASES, f"there must be at most {_MAX_LOGIT_BIASES} logit biases"
    yield _are_token_ids(sampling.logit_bias, model), f"logit bias ids must be below {model.vocab_size}"
    yield all(-100 <= bias <= 100 for bias in sampling.logit_bias.values()), "logit biases must be -100 to 100"


def _scoring_requirements(job: Job, model: ModelFacts) -> Iterable[tuple[bool, str]]:
    yield len(job.score_items) <= _MAX_ITEMS, f"there must be at most {_MAX_ITEMS} items"
    for item in job.score_items:
        num_tokens = len(item.token_ids)
        # The last one is never fed.
        yield 2 <= num_tokens <= model.max_positions + 1, f"items must have 2 to {model.max_positions + 1} tokens"
        yield 1 <= item.context_length < num_tokens, "some of an item's tokens must be context, and some not"
        yield _are_token_ids(item.token_ids, model), f"token ids must be below {model.vocab_size}"


def _are_token_ids(ids: Iterable[int], model: ModelFacts) -> bool:
    return all(token_id < model.vocab_size for token_id in ids)


def _generation_params(job: Job, choice: int) -> GenerationParams:
    limits, sampling = job.limits, job.sampling
    return GenerationParams(
        max_new_tokens=limits.max_new_tokens,
        min_new_tokens=limits.min_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        choice=choice,
        stop_token_ids=frozenset(limits.stop_token_ids),
        ignore_eos=limits.ignore_eos,
        logprobs=job.logprobs if job.HasField("logprobs") else None,
    )


def _logged_ids(job: Job, log: Iterable[LogEntry], model: ModelFacts) -> list[list[int]]:
    """The generated token ids of each choice.

    Raises:
        JobRefusedError: if the log has a gap, a repeat or an id the model does not have.
    """
    logged: list[list[int]] = [[] for _ in range(job.n)]
    for entry in log:
        for delta in entry.deltas:
            if delta.choice >= job.n or delta.position != len(logged[delta.choice]):
                raise _invalid(f"the log is not contiguous at position {delta.position} of choice {delta.choice}")
            logged[delta.choice] += delta.token_ids
        if entry.end_position != sum(map(len, logged)):
            raise _invalid(f"the log's entry {entry.end_position} does not end there")
    for token_ids in logged:
        if not _are_token_ids(token_ids, model):
            raise _invalid(f"logged token ids must be below {model.vocab_size}")
        if len(token_ids) > job.limits.max_new_tokens:
            raise _invalid("the log has more tokens than max_new_tokens")
    return logged


def _invalid(message: str) -> JobRefusedError:
    return JobRefusedError(code_pb2.INTERNAL, "INVALID_JOB", message)
