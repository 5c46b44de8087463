"""The engine's thread: reports in order, errors alone, never far ahead, and a watchdog that knows a stall."""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
from oasst.v1.generation_pb2 import FINISH_REASON_END_OF_TEXT, FINISH_REASON_LENGTH, FINISH_REASON_STOP, ChoiceFinish
from oasst_jobs import ClaimedJob
from oasst_worker.choice import Choice, ChoiceOutput
from oasst_worker.loop import EngineLoop, EngineStalledError, StepWatchdog
from scripted_worker import EOS, ScriptedExecutor, expected_text, make_engine, make_intake, make_job
from waiting import wait_until

A, B, C = 1, 2, 3  # Token ids of letters.


def choices_of(request_id: str, **job) -> list[Choice]:
    made = make_job(request_id, **job)
    claimed = ClaimedJob(made.job_id, "1-fence", made, [], 0, 1, 0)
    return [resumed.choice for resumed in make_intake().accept(claimed)]


def choice_of(request_id: str, **job) -> Choice:
    [choice] = choices_of(request_id, **job)
    return choice


def scripted(executor: ScriptedExecutor, choice: Choice, token_ids: Sequence[int]) -> Choice:
    executor.scripts[choice.sequence.sequence_id] = list(token_ids)
    return choice


@pytest.fixture
def executor() -> ScriptedExecutor:
    return ScriptedExecutor()


@pytest.fixture
def make_loop(executor: ScriptedExecutor) -> Iterator[Callable[..., EngineLoop]]:
    """Makes running loops and ends them."""
    loops: list[EngineLoop] = []

    def make(*, max_steps_ahead: int = 1000, **config) -> EngineLoop:
        loop = EngineLoop(make_engine(executor, **config), max_steps_ahead=max_steps_ahead)
        loops.append(loop)
        loop.start(lambda: None)
        return loop

    yield make
    executor.allow(math.inf)
    for loop in loops:
        loop.stop()
        assert loop.join(timeout_s=10)


def outputs_of(loop: EngineLoop, *choices: Choice) -> dict[Choice, list[ChoiceOutput]]:
    """All outputs of these choices, until each has ended."""
    outputs: dict[Choice, list[ChoiceOutput]] = {choice: [] for choice in choices}

    def have_ended() -> bool:
        for report in loop.take():
            for output in report.outputs:
                outputs[output.part].append(output)
        return all(given and (given[-1].finish or given[-1].error) for given in outputs.values())

    wait_until(have_ended)
    return outputs


def output_text(outputs: Sequence[ChoiceOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_tokens_come_in_order_as_text_and_end_with_their_reason(make_loop):
    loop, choice = make_loop(), choice_of("one", max_new_tokens=20)
    loop.add(choice)
    outputs = outputs_of(loop, choice)[choice]
    assert output_text(outputs) == expected_text(make_job("one").job_id, 20)
    assert [output.finish for output in outputs[:-1]] == [None] * 19
    assert outputs[-1].finish == ChoiceFinish(choice=0, reason=FINISH_REASON_LENGTH)


def test_choices_of_a_job_run_side_by_side(make_loop):
    loop, choices = make_loop(), choices_of("many", n=3)
    for choice in choices:
        loop.add(choice)
    outputs = outputs_of(loop, *choices)
    job_id = make_job("many").job_id
    assert [output_text(outputs[choice]) for choice in choices] == [
        expected_text(job_id, 16, index) for index in range(3)
    ]


def test_end_of_text_is_a_token_without_text(make_loop, executor):
    loop, choice = make_loop(), scripted(executor, choice_of("eos"), [A, B, EOS])
    loop.add(choice)
    outputs = outputs_of(loop, choice)[choice]
    assert [output.token_id for output in outputs] == [A, B, EOS]
    assert output_text(outputs) == "ab"
    assert outputs[-1].finish == ChoiceFinish(choice=0, reason=FINISH_REASON_END_OF_TEXT)


def test_a_stop_token_is_a_token_without_text(make_loop, executor):
    loop, choice = make_loop(), scripted(executor, choice_of("id", stop_token_ids=[C]), [A, B, C])
    loop.add(choice)
    outputs = outputs_of(loop, choice)[choice]
    assert [output.token_id for output in outputs] == [A, B, C]
    assert output_text(outputs) == "ab"
    assert outputs[-1].finish == ChoiceFinish(choice=0, reason=FINISH_REASON_STOP, stop_token_id=C)


def test_a_stop_text_ends_the_choice_and_frees_the_engine(make_loop, executor):
    loop, choice = make_loop(), scripted(executor, choice_of("stop", stop=["bc"]), [A, B, C, A, A, A])
    loop.add(choice)
    outputs = outputs_of(loop, choice)[choice]
    assert [output.token_id for output in outputs] == [A, B, C]
    assert output_text(outputs) == "a"
    assert outputs[-1].finish == ChoiceFinish(choice=0, reason=FINISH_REASON_STOP, stop="bc")
    assert loop.load.num_running == loop.load.kv_tokens_used == 0


def test_what_a_step_gave_behind_a_stop_text_is_dropped(make_loop, executor):
    choice = choice_of("guessed", stop=["ab" * 6 + "a"], max_new_tokens=60)
    loop, choice = make_loop(speculate=8), scripted(executor, choice, [A, B] * 30)
    loop.add(choice)
    outputs = outputs_of(loop, choice)[choice]
    assert [output.token_id for output in outputs] == [A, B] * 6 + [A]
    assert loop.load.num_accepted_tokens > 0
    assert executor.num_steps + loop.load.num_accepted_tokens > 13  # The last step gave more than was wanted.


def test_text_held_for_a_stop_comes_with_the_last_token(make_loop, executor):
    loop, choice = make_loop(), scripted(executor, choice_of("held", stop=["bcb"], max_new_tokens=3), [A, B, C])
    loop.add(choice)
    assert [output.text for output in outputs_of(loop, choice)[choice]] == ["a", "", "bc"]


def test_a_choice_whose_logits_are_not_finite_fails_alone(make_loop, executor):
    loop, bad, good = make_loop(), choice_of("bad"), choice_of("good")
    executor.broken.add(bad.sequence.sequence_id)
    loop.add(bad)
    loop.add(good)
    outputs = outputs_of(loop, bad, good)
    assert [output.error and output.error.reason for output in outputs[bad]] == ["NUMERIC"]
    assert output_text(outputs[good]) == expected_text(make_job("good").job_id, 16)


def test_a_choice_whose_text_fails_fails_alone(make_loop, monkeypatch):
    loop, bad, good = make_loop(), choice_of("bad"), choice_of("good")
    monkeypatch.setattr(bad, "_text", None)
    loop.add(bad)
    loop.add(good)
    outputs = outputs_of(loop, bad, good)
    assert [output.error and output.error.reason for output in outputs[bad]] == ["INTERNAL"]
    assert output_text(outputs[good]) == expected_text(make_job("good").job_id, 16)


def test_a_choice_that_the_engine_refuses_is_reported(make_loop):
    loop, choice = make_loop(max_positions=8), choice_of("long")
    loop.add(choice)
    [output] = outputs_of(loop, choice)[choice]
    assert output.error is not None
    assert "positions" in output.error.message


def test_a_removed_choice_frees_the_engine_at_the_next_turn(make_loop, executor):
    loop, choice = make_loop(), choice_of("gone", max_new_tokens=900)
    executor.allow(0)
    loop.add(choice)
    wait_until(lambda: loop.step_in_progress)
    loop.remove(choice)
    executor.allow(math.inf)
    wait_until(lambda: loop.step_in_progress is None and loop.load.num_running == 0)
    assert len(loop.take()) == 1


def test_the_loop_runs_ahead_only_up_to_its_bound_and_still_obeys(make_loop, executor):
    loop = make_loop(max_steps_ahead=5)
    loop.add(choice_of("first", max_new_tokens=100))
    wait_until(lambda: executor.num_steps == 5)
    loop.add(choice_of("second"))
    wait_until(lambda: loop.load.num_waiting == 1)
    assert executor.num_steps == 5
    assert len(loop.take()) == 5
    wait_until(lambda: executor.num_steps == 10)


def test_no_token_is_lost_at_the_bound(make_loop):
    loop, choice = make_loop(max_steps_ahead=1), choice_of("one", max_new_tokens=200)
    loop.add(choice)
    assert output_text(outputs_of(loop, choice)[choice]) == expected_text(make_job("one").job_id, 200)


def test_reports_tell_what_the_step_computed(make_loop):
    loop, choice = make_loop(), choice_of("one", prompt_tokens=100, max_new_tokens=2)
    loop.add(choice)
    wait_until(lambda: loop.load.num_running == 0 and choice.sequence.num_output_tokens == 2)
    reports = loop.take()
    assert [(report.num_prefill_tokens, report.num_decode_tokens) for report in reports] == [(64, 0), (36, 0), (0, 1)]
    assert [report.num_sequences for report in reports] == [1, 1, 1]


def test_whoever_takes_is_told_once_for_many_reports(executor):
    told: list[int] = []
    loop = EngineLoop(make_engine(executor), max_steps_ahead=1000)
    loop.start(lambda: told.append(executor.num_steps))
    choice = choice_of("one")
    loop.add(choice)
    wait_until(lambda: loop.load.num_running == 0 and choice.sequence.num_output_tokens == 16)
    loop.stop()
    assert loop.join(timeout_s=10)
    assert told == [1]


@pytest.mark.parametrize(("max_steps_ahead", "expected"), [(1000, [1, 16]), (8, [1, 5, 9, 13, 16])])
def test_whoever_took_is_left_alone_but_for_firsts_and_lasts_and_a_loop_far_ahead(executor, max_steps_ahead, expected):
    told: list[int] = []

    def take() -> None:
        told.append(executor.num_steps)
        loop.take()

    loop = EngineLoop(make_engine(executor), max_steps_ahead=max_steps_ahead)
    loop.start(take, quiet_s=3600)
    choice = choice_of("one")
    loop.add(choice)
    wait_until(lambda: loop.load.num_running == 0 and choice.sequence.num_output_tokens == 16)
    loop.stop()
    assert loop.join(timeout_s=10)
    assert told == expected


def test_a_step_that_ends_after_the_quiet_is_told_at_once(executor):
    told: list[int] = []
    now_s = 0.0
    loop = EngineLoop(make_engine(executor), max_steps_ahead=1000, clock=lambda: now_s)

    def take() -> None:
        nonlocal now_s
        told.append(executor.num_steps)
        loop.take()
        assert loop.take() == []  # Finding nothing begins no new quiet.
        now_s += 1.0

    loop.start(take, quiet_s=1.0)
    choice = choice_of("one", max_new_tokens=4)
    loop.add(choice)
    wait_until(lambda: loop.load.num_running == 0 and choice.sequence.num_output_tokens == 4)
    loop.stop()
    assert loop.join(timeout_s=10)
    assert told == [1, 2, 3, 4]


def test_an_executor_that_fails_ends_the_thread_with_its_error(make_loop, executor):
    loop = make_loop()
    executor.failure = RuntimeError("CUDA error: device-side assert")
    loop.add(choice_of("one"))
    assert loop.ended.exception(timeout=10) is executor.failure


def test_stopping_ends_the_thread_between_steps(make_loop):
    loop = make_loop()
    loop.add(choice_of("one", max_new_tokens=900))
    loop.stop()
    assert loop.ended.result(timeout=10) is None


class Steps:
    """A watchdog that is shown steps and time by hand."""

    def __init__(self, **settings) -> None:
        self.watchdog = StepWatchdog(**settings)
        self.now_s = 0.0

    def watch(self, step: int | None, seconds: float, interval_s: float = 1.0) -> None:
        for _ in range(round(seconds / interval_s)):
            self.now_s += interval_s
            self.watchdog.observe(step, self.now_s)


def test_a_step_that_overruns_the_limit_is_a_stall():
    steps = Steps(floor_s=20)
    steps.watch(7, 20)
    with pytest.raises(EngineStalledError, match="step 7 has not ended after 2"):
        steps.watch(7, 2)


def test_steps_that_end_are_no_stall_and_neither_is_an_idle_engine():
    steps = Steps(floor_s=5)
    for step in range(50):
        steps.watch(step, 1)
    steps.watch(None, 100)
    assert steps.watchdog.stuck_s == 0


def test_the_limit_is_ten_times_the_slowest_usual_step():
    watchdog = StepWatchdog(floor_s=20)
    for _ in range(99):
        watchdog.record(1.0)
    assert watchdog.limit_s == 20
    watchdog.record(3.0)
    watchdog.record(3.0)
    assert watchdog.limit_s == 30


def test_a_process_that_was_stopped_in_a_step_has_not_stalled():
    steps = Steps(floor_s=20)
    steps.watch(7, 2)
    steps.now_s += 3600
    steps.watch(7, 2)
    assert steps.watchdog.stuck_s < 10
