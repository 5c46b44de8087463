"""Every job is checked again in the worker, and goes on exactly where its log ends."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oasst.jobs.v1.job_pb2 import Job, LogEntry
from oasst.v1.generation_pb2 import Delta
from oasst.v1.scoring_pb2 import ItemScore
from oasst_jobs import JOB_VERSION, ClaimedJob
from oasst_worker.engine import FinishReason, TokenOutput
from oasst_worker.intake import JobRefusedError
from oasst_worker.loop import EngineLoop
from scripted_worker import EOS, VOCAB_SIZE, ScriptedExecutor, make_engine, make_intake, make_job
from waiting import wait_until


def claim(job: Job, *log: LogEntry) -> ClaimedJob:
    end_position = log[-1].end_position if log else 0
    return ClaimedJob(job.job_id, "1-fence", job, log, end_position, 1, 0)


def entry(end_position: int, *deltas: Delta) -> LogEntry:
    return LogEntry(end_position=end_position, deltas=deltas)


def set_limits(**values) -> Callable[[Job], None]:
    return lambda job: job.limits.MergeFrom(type(job.limits)(**values))


def set_sampling(**values) -> Callable[[Job], None]:
    return lambda job: job.sampling.MergeFrom(type(job.sampling)(**values))


def set_job(**values) -> Callable[[Job], None]:
    return lambda job: job.MergeFrom(Job(**values))


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (set_job(version=99), "UNKNOWN_JOB_VERSION", "version is 99"),
        (lambda job: job.ClearField("prompt_token_ids"), "INVALID_JOB", "prompt must not be empty"),
        (set_job(prompt_token_ids=[VOCAB_SIZE]), "INVALID_JOB", "prompt token ids"),
        (lambda job: job.ClearField("n"), "INVALID_JOB", "n must be"),
        (set_job(n=1000), "INVALID_JOB", "n must be"),
        (set_job(logprobs=21), "INVALID_JOB", "logprobs"),
        (set_limits(max_new_tokens=0), "INVALID_JOB", "max_new_tokens"),
        (set_limits(max_new_tokens=1021), "INVALID_JOB", "1024 positions"),
        (set_limits(min_new_tokens=17), "INVALID_JOB", "min_new_tokens"),
        (set_limits(stop=["a"] * 5), "INVALID_JOB", "stop texts"),
        (set_limits(stop=[""]), "INVALID_JOB", "stop texts"),
        (set_limits(stop=["a" * 65]), "INVALID_JOB", "stop texts"),
        (set_limits(stop_token_ids=range(17)), "INVALID_JOB", "stop ids"),
        (set_limits(stop_token_ids=[VOCAB_SIZE]), "INVALID_JOB", "stop token ids"),
        (set_sampling(temperature=float("nan")), "INVALID_JOB", "temperature"),
        (set_sampling(temperature=-1), "INVALID_JOB", "temperature"),
        (set_sampling(top_p=0), "INVALID_JOB", "top_p"),
        (set_sampling(top_k=-1), "INVALID_JOB", "top_k"),
        (set_sampling(repetition_penalty=0), "INVALID_JOB", "repetition_penalty"),
        (set_sampling(repetition_penalty=float("inf")), "INVALID_JOB", "repetition_penalty"),
        (set_sampling(presence_penalty=3), "INVALID_JOB", "presence_penalty"),
        (set_sampling(logit_bias={VOCAB_SIZE: 1.0}), "INVALID_JOB", "logit bias ids"),
        (set_sampling(logit_bias={1: float("nan")}), "INVALID_JOB", "logit biases"),
        (lambda job: job.sampling.ClearField("seed"), "INVALID_JOB", "seed must be set"),
    ],
)
def test_what_would_hurt_the_engine_is_refused_with_a_reason(spoil, reason, message):
    job = make_job("bad")
    spoil(job)
    with pytest.raises(JobRefusedError, match=message) as refused:
        make_intake().accept(claim(job))
    assert refused.value.failed.reason == reason


def test_a_job_of_the_last_release_is_run(monkeypatch):
    monkeypatch.setattr("oasst_worker.intake.JOB_VERSION", JOB_VERSION + 1)
    assert make_intake().accept(claim(make_job("older")))


def test_a_job_that_can_never_fit_the_kv_cache_is_told_both_numbers():
    with pytest.raises(JobRefusedError, match="needs 116 positions of KV cache; this worker has 64") as refused:
        make_intake(kv_tokens=64).accept(claim(make_job("big", prompt_tokens=100)))
    assert refused.value.failed.reason == "EXCEEDS_KV_CACHE"


@pytest.mark.parametrize(
    "log",
    [
        [entry(2, Delta(position=1, token_ids=[1, 2]))],
        [entry(2, Delta(token_ids=[1, 2])), entry(3, Delta(position=1, token_ids=[3]))],
        [entry(1, Delta(choice=1, token_ids=[1]))],
        [entry(9, Delta(token_ids=[1, 2]))],
        [entry(1, Delta(token_ids=[VOCAB_SIZE]))],
        [entry(17, Delta(token_ids=[1] * 17))],
        [entry(2, Delta(token_ids=[EOS, 1]))],
        [entry(1, Delta(token_ids=[EOS])), entry(2, Delta(position=1, token_ids=[1]))],
    ],
    ids=["gap", "repeat", "unknown choice", "wrong end", "unknown id", "too long", "behind its end", "after its end"],
)
def test_a_log_that_is_not_contiguous_is_refused(log):
    with pytest.raises(JobRefusedError) as refused:
        make_intake().accept(claim(make_job("damaged"), *log))
    assert refused.value.failed.reason == "INVALID_JOB"


def test_a_log_with_more_scores_than_the_job_has_items_is_refused():
    job = make_job("scored", prompt_tokens=0)
    job.score_items.add(token_ids=[1, 2], context_length=1)
    log = LogEntry(end_position=2, scores=[ItemScore(), ItemScore()])
    with pytest.raises(JobRefusedError, match="scores of 2 items, the job has 1"):
        make_intake().accept_scoring(claim(job, log))


def test_every_value_of_the_job_reaches_the_engine():
    job = make_job("full", n=2, max_new_tokens=9, min_new_tokens=3, stop_token_ids=[5], ignore_eos=True, logprobs=4)
    set_sampling(temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, typical_p=0.9, repetition_penalty=1.2)(job)
    set_sampling(presence_penalty=0.3, frequency_penalty=-0.4, logit_bias={3: 2.0}, seed=11)(job)
    first, second = (resumed.choice.sequence for resumed in make_intake().accept(claim(job)))
    assert (first.sequence_id, second.sequence_id) == (f"{job.job_id}/0", f"{job.job_id}/1")
    assert list(first.prompt_ids) == list(job.prompt_token_ids)
    params = second.params
    assert (params.max_new_tokens, params.min_new_tokens, params.ignore_eos) == (9, 3, True)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p) == (0.5, 7, 0.8, 0.1, 0.9)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.3, -0.4)
    assert (params.seed, params.choice, params.logprobs) == (11, 1, 4)
    assert (dict(params.logit_bias), params.stop_token_ids) == ({3: 2.0}, frozenset({5}))


def run_to_end(job: Job, token_ids: list[int]) -> list[tuple[int, str, object]]:
    """What the engine and the loop give for a choice that draws these tokens: id, text, finish."""
    executor = ScriptedExecutor()
    executor.scripts[f"{job.job_id}/0"] = token_ids
    loop = EngineLoop(make_engine(executor), max_steps_ahead=1000)
    loop.start(lambda: None)
    [resumed] = make_intake().accept(claim(job))
    loop.add(resumed.choice)
    given = []

    def has_ended() -> bool:
        given.extend(output for report in loop.take() for output in report.outputs)
        return bool(given) and given[-1].finish is not None

    wait_until(has_ended)
    loop.stop()
    loop.join(timeout_s=10)
    return [(output.token_id, output.text, output.finish) for output in given]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.integers(0, 4),
    st.lists(st.sampled_from(["a", "ab", "bc", "aab"]), max_size=2),
    st.lists(st.integers(1, 3), max_size=1),
    st.booleans(),
    st.data(),
)
def test_a_replayed_log_ends_where_the_engine_ended_it_and_goes_on_with_the_same_text(
    token_ids, min_new_tokens, stops, stop_ids, ignore_eos, data
):
    job = make_job(
        "replayed",
        max_new_tokens=8,
        min_new_tokens=min_new_tokens,
        stop=stops,
        stop_token_ids=stop_ids,
        ignore_eos=ignore_eos,
    )
    undisturbed = run_to_end(job, token_ids)
    logged = data.draw(st.integers(0, len(undisturbed)))
    ids = [token_id for token_id, _, _ in undisturbed[:logged]]
    [resumed] = make_intake().accept(claim(job, *([entry(logged, Delta(token_ids=ids))] if ids else [])))
    assert resumed.num_logged_tokens == logged
    assert resumed.finish == (undisturbed[logged - 1][2] if logged else None)
    for token_id, text, finish in undisturbed[logged:]:
        reason = _reason_told_by_engine(finish, token_id, ignore_eos)
        output = resumed.choice.take(TokenOutput("", token_id, finish=reason))
        assert (output.text, output.finish) == (text, finish)


def _reason_told_by_engine(finish, token_id: int, ignore_eos: bool) -> FinishReason | None:
    if finish is None or finish.HasField("stop"):
        return None
    if finish.HasField("stop_token_id"):
        return FinishReason.STOP_TOKEN
    return FinishReason.END_OF_TEXT if token_id == EOS and not ignore_eos else FinishReason.LENGTH
