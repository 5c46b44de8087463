"""What steps cost is learnt from them, and a prompt that comes in holds those who decode up no more than allowed."""

import random
import statistics

import pytest
from oasst_worker.engine import Batch, Engine, EngineConfig, GenerationParams, Sample, Sequence
from oasst_worker.engine.pace import StepCost
from token_cache_executor import EOS, TokenCacheExecutor


class TimedExecutor(TokenCacheExecutor):
    """A step takes as long as it would on a device of which a row takes `row_s` and reading the weights a second."""

    def __init__(self, row_s: float) -> None:
        super().__init__(num_blocks=2048)
        self.row_s = row_s
        self.slowness = 1.0
        self.now_s = 0.0
        self.steps_s: list[float] = []

    def execute(self, batch: Batch) -> list[Sample]:
        self.steps_s.append((1 + batch.num_tokens * self.row_s) * self.slowness)
        self.now_s += self.steps_s[-1]
        return super().execute(batch)


def make_engine(row_s: float) -> tuple[Engine, TimedExecutor]:
    executor = TimedExecutor(row_s)
    config = EngineConfig(EOS, max_positions=4096, max_sequences=32, step_tokens=512)
    return Engine(executor, config, clock=lambda: executor.now_s), executor


def add(engine: Engine, name: str, *, prompt_tokens: int, max_new_tokens: int = 300) -> None:
    prompt = [sum(name.encode()), *range(prompt_tokens - 1)]
    engine.add(Sequence(name, prompt, GenerationParams(max_new_tokens, ignore_eos=True)))


@pytest.mark.parametrize("row_cost", [0.002, 0.05, 0.3])
def test_the_cost_of_a_row_is_learnt_from_steps_of_several_sizes(row_cost):
    cost, rng = StepCost(), random.Random(0)
    for _ in range(400):
        num_rows = rng.randint(1, 40)
        cost.record(0.02 * (1 + num_rows * row_cost) * rng.uniform(0.98, 1.02), decoding=num_rows, prompts=0)
    assert cost.row_cost == pytest.approx(row_cost, rel=0.3, abs=0.002)


def test_a_step_that_was_held_up_by_something_else_changes_little():
    cost = StepCost()
    for num_rows in [*range(1, 60)] * 4:
        cost.record(0.01 * (1 + num_rows * 0.1), decoding=num_rows, prompts=0)
    for _ in range(40):
        cost.record(0.01 * (1 + 8 * 0.1 + 20 * 0.1), decoding=8, prompts=20)
    cost.record(5.0, decoding=3, prompts=0)
    cost.record(5.0, decoding=3, prompts=10)
    assert cost.row_cost == pytest.approx(0.1, rel=0.2)
    assert cost.prompt_rows_within(2, beside=8) == pytest.approx(18, rel=0.3)


def test_steps_of_one_size_do_not_unlearn_what_a_row_costs():
    cost = StepCost()
    for num_rows in [*range(1, 60)] * 4:
        cost.record(0.01 * (1 + num_rows * 0.05), decoding=num_rows, prompts=0)
    for _ in range(5000):
        cost.record(0.014, decoding=8, prompts=0)
    assert cost.row_cost == pytest.approx(0.05, rel=0.3)


def test_what_prompts_may_have_follows_what_their_rows_cost_farther_back():
    cost = StepCost()
    for _ in range(50):
        cost.record(1.0, decoding=8, prompts=0)
    for position in range(0, 2000, 8):
        row_s = 0.05 * (1 + position / 1000)
        cost.record(1.0 + 8 * row_s, decoding=8, prompts=8)
        assert position < 100 or cost.prompt_rows_within(2, beside=8) == pytest.approx(1 / row_s, rel=0.1)


def test_prompts_get_no_step_for_themselves_when_they_seemed_to_cost_nothing_once():
    cost = StepCost()
    for _ in range(50):
        cost.record(1.0, decoding=8, prompts=0)
    before = cost.prompt_rows_within(2, beside=8)
    cost.record(0.9, decoding=8, prompts=16)
    assert before < cost.prompt_rows_within(2, beside=8) < 3 * before


def test_prompts_are_paced_by_what_a_step_takes_now_where_the_machine_has_got_slower():
    engine, executor = make_engine(row_s=0.01)
    for number in range(8):
        add(engine, f"stream {number}", prompt_tokens=5, max_new_tokens=3000)
    for _ in range(30):
        engine.step()
    add(engine, "a long prompt", prompt_tokens=3800, max_new_tokens=1)
    for _ in range(10):
        engine.step()
    before = engine.last_batch.num_tokens
    executor.slowness = 3.0
    after = []
    while not any(output.sequence_id == "a long prompt" for output in engine.step()):
        after.append(engine.last_batch.num_tokens)
    assert min(after) < before / 2  # At first it looks as if the prompt had got dear.
    assert statistics.median(after[-20:]) == pytest.approx(before, rel=0.3)


@pytest.mark.parametrize("num_decoding", [1, 8, 24])
@pytest.mark.parametrize("row_s", [0.01, 0.1])
def test_a_long_prompt_makes_steps_of_those_who_decode_at_most_twice_as_long(num_decoding, row_s):
    engine, executor = make_engine(row_s)
    for number in range(num_decoding):
        add(engine, f"stream {number}", prompt_tokens=5)
    for _ in range(30):
        engine.step()
    alone_s = executor.steps_s[-1]
    add(engine, "a long prompt", prompt_tokens=2000)
    started = len(executor.steps_s)
    while not any(output.sequence_id == "a long prompt" for output in engine.step()):
        pass
    held_up_s = executor.steps_s[started:]
    assert max(held_up_s) <= 2.1 * alone_s
    assert sum(held_up_s) / len(held_up_s) > 1.5 * alone_s  # What is allowed is used.


def test_a_burst_of_prompts_comes_in_at_the_full_budget():
    engine, _ = make_engine(row_s=0.1)
    add(engine, "stream", prompt_tokens=5)
    engine.step()
    for number in range(20):
        add(engine, f"prompt {number}", prompt_tokens=100)
    engine.step()
    assert engine.last_batch.num_tokens > 500


def test_a_prompt_comes_in_at_the_full_budget_while_nobody_decodes():
    engine, _ = make_engine(row_s=0.1)
    add(engine, "prompt", prompt_tokens=2000)
    engine.step()
    assert engine.last_batch.num_tokens == 512
