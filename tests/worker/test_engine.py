"""The engine's decisions, on an executor that needs no tensors: a token is a function of the tokens before it."""

import random

import pytest
from oasst_worker.engine import (
    Batch,
    Engine,
    EngineConfig,
    FinishReason,
    GenerationParams,
    OutOfDeviceMemoryError,
    Sample,
    Sequence,
)
from token_cache_executor import EOS, VOCABULARY, TokenCacheExecutor, expected_tokens, make_engine, run_to_end

SEEDS = range(30)


def test_a_sequence_runs_to_its_length():
    engine, _ = make_engine()
    params = GenerationParams(max_new_tokens=10, ignore_eos=True)
    engine.add(Sequence("a", [1, 2, 3], params))
    outputs = run_to_end(engine)["a"]
    assert [output.token_id for output in outputs] == expected_tokens([1, 2, 3], params)
    assert [output.finish for output in outputs] == [None] * 9 + [FinishReason.LENGTH]
    assert engine.kv_tokens_used == 0


def test_end_of_text_ends_a_sequence_unless_it_is_ignored():
    prompt = next([n] for n in range(999) if len(expected_tokens([n], GenerationParams(max_new_tokens=20))) < 20)
    engine, _ = make_engine()
    engine.add(Sequence("ends", prompt, GenerationParams(max_new_tokens=20)))
    engine.add(Sequence("goes on", prompt, GenerationParams(max_new_tokens=20, ignore_eos=True)))
    outputs = run_to_end(engine)
    assert outputs["ends"][-1].finish is FinishReason.END_OF_TEXT
    assert outputs["ends"][-1].token_id == EOS
    assert len(outputs["goes on"]) == 20


def test_a_stop_token_id_counts_only_after_the_least_number_of_tokens():
    tokens = expected_tokens([7], GenerationParams(max_new_tokens=12, ignore_eos=True))
    stop = frozenset([tokens[1], tokens[8]])
    engine, _ = make_engine()
    limits = {"max_new_tokens": 12, "ignore_eos": True, "stop_token_ids": stop}
    engine.add(Sequence("early", [7], GenerationParams(**limits)))
    engine.add(Sequence("late", [7], GenerationParams(**limits, min_new_tokens=5)))
    outputs = run_to_end(engine)
    assert (outputs["early"][-1].finish, len(outputs["early"])) == (
        FinishReason.STOP_TOKEN,
        tokens.index(tokens[1]) + 1,
    )
    assert (outputs["late"][-1].finish, len(outputs["late"])) == (FinishReason.STOP_TOKEN, 9)


def test_a_long_prompt_comes_in_chunks_that_end_at_tiles_and_never_delays_who_decodes():
    engine, executor = make_engine()
    engine.add(Sequence("short", [5], GenerationParams(max_new_tokens=30, ignore_eos=True)))
    engine.step()
    engine.add(Sequence("long", range(1, 71), GenerationParams(max_new_tokens=2, ignore_eos=True)))
    while engine.has_work():
        before = {output.sequence_id for output in engine.step()}
        if engine.num_running == 2:
            assert "short" in before
    ends = [chunk.end for batch in executor.batches for chunk in batch.chunks if chunk.sequence.sequence_id == "long"]
    assert ends[-2:] == [70, 71]
    assert all(end % executor.prefill_tile == 0 for end in ends[:-2])
    assert max(batch.num_tokens for batch in executor.batches) <= engine.config.step_tokens


def test_a_resumed_sequence_goes_on_where_it_stopped():
    params = GenerationParams(max_new_tokens=20, ignore_eos=True)
    whole = expected_tokens([3, 4], params)
    engine, _ = make_engine()
    engine.add(Sequence("a", [3, 4], params, output_ids=whole[:13]))
    assert [output.token_id for output in run_to_end(engine)["a"]] == whole[13:]


def test_a_sequence_knows_each_id_it_has_seen_once_if_that_is_penalized():
    penalized = GenerationParams(max_new_tokens=8, repetition_penalty=1.2)
    sequence = Sequence("penalized", [5, 3, 5, 3, 9], penalized, output_ids=[9, 4])
    sequence.append(3)
    sequence.append(1)
    assert list(sequence.seen_ids) == [5, 3, 9, 4, 1]
    assert list(sequence.sibling("other", penalized, [7]).seen_ids) == [5, 3, 9, 7]
    assert not Sequence("plain", [5, 3, 5], GenerationParams(max_new_tokens=8), output_ids=[9]).seen_ids


def test_numbers_that_are_not_finite_end_one_sequence_alone():
    engine, executor = make_engine()
    params = GenerationParams(max_new_tokens=5, ignore_eos=True)
    for name in ("good", "bad"):
        engine.add(Sequence(name, [1, 2], params))
    executor.broken.add("bad")
    outputs = run_to_end(engine)
    assert [output.finish for output in outputs["bad"]] == [FinishReason.ERROR]
    assert [output.token_id for output in outputs["good"]] == expected_tokens([1, 2], params)


def test_a_removed_sequence_frees_its_blocks_and_says_no_more():
    engine, _ = make_engine()
    engine.add(Sequence("a", [1] * 9, GenerationParams(max_new_tokens=50, ignore_eos=True)))
    engine.step()
    assert engine.kv_tokens_used
    engine.remove("a")
    engine.remove("a")
    assert (engine.kv_tokens_used, engine.has_work(), engine.step()) == (0, False, [])


def run_at_random(seed: int) -> Engine:
    """Sequences of any kind came at any time, and each gave its own tokens."""
    rng = random.Random(seed)
    engine, executor = make_engine(num_blocks=rng.randint(12, 40), max_sequences=rng.randint(1, 8))
    jobs = {}
    for number in range(25):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 30))]
        params = GenerationParams(max_new_tokens=rng.randint(1, 18), ignore_eos=rng.random() < 0.5)
        already = expected_tokens(prompt, params)
        jobs[str(number)] = (prompt, params, already[: rng.randint(0, len(already) - 1)] if rng.random() < 0.3 else [])
    arrivals = list(jobs)
    outputs: dict[str, list[int]] = {name: list(already) for name, (_, _, already) in jobs.items()}
    steps = 0
    while arrivals or engine.has_work():
        for _ in range(rng.randint(0, 4)):
            if arrivals:
                name = arrivals.pop()
                prompt, params, already = jobs[name]
                engine.add(Sequence(name, prompt, params, output_ids=already))
        for output in engine.step():
            outputs[output.sequence_id].append(output.token_id)
        assert engine.num_running <= engine.max_sequences
        steps += 1
        assert steps < 2000
    for name, (prompt, params, _) in jobs.items():
        assert outputs[name] == expected_tokens(prompt, params)
    assert engine.kv_tokens_used == 0
    assert max(batch.num_tokens for batch in executor.batches) <= engine.config.step_tokens
    return engine


@pytest.mark.parametrize("seed", SEEDS)
def test_every_sequence_gives_its_own_tokens_under_preemption_and_random_arrival(seed):
    run_at_random(seed)


def test_some_of_those_runs_did_preempt():
    assert any(run_at_random(seed).num_preemptions for seed in SEEDS)


@pytest.mark.parametrize(
    ("prompt_length", "max_new_tokens", "message"),
    [
        (100, 29, "129 tokens do not fit the model's 128 positions"),
        (60, 60, "120 tokens do not fit the KV cache of 80"),
    ],
)
def test_a_sequence_that_could_never_end_is_refused(prompt_length, max_new_tokens, message):
    engine, _ = make_engine(num_blocks=20)
    with pytest.raises(ValueError, match=message):
        engine.add(Sequence("a", [1] * prompt_length, GenerationParams(max_new_tokens=max_new_tokens)))


def test_a_budget_too_small_for_its_sequences_is_refused():
    with pytest.raises(ValueError, match="step_tokens must be at least max_sequences \\+ 4 = 12, not 11"):
        make_engine(step_tokens=11)


def num_computed_tokens(executor: TokenCacheExecutor) -> int:
    return sum(batch.num_tokens for batch in executor.batches)


def generate(engine: Engine, sequence: Sequence) -> list[int]:
    engine.add(sequence)
    return [output.token_id for output in run_to_end(engine)[sequence.sequence_id]]


PARAMS = GenerationParams(max_new_tokens=9, ignore_eos=True)


def test_a_second_turn_computes_only_what_the_first_did_not():
    engine, executor = make_engine()
    prompt = list(range(1, 11))
    answer = generate(engine, Sequence("first turn", prompt, PARAMS))
    before = num_computed_tokens(executor)
    longer = [*prompt, *answer, 5, 6, 7]
    second = Sequence("second turn", longer, PARAMS)
    assert generate(engine, second) == expected_tokens(longer, PARAMS)
    # Of the first turn's 19 tokens the last was never computed, and 16 of the others fill blocks of 4.
    assert second.num_cached_tokens == 16
    assert num_computed_tokens(executor) - before == len(longer) - 16 + PARAMS.max_new_tokens - 1
    assert (engine.num_prompt_tokens, engine.num_cached_tokens) == (len(prompt) + len(longer), 16)


def test_choices_of_one_request_compute_their_prompt_once():
    engine, executor = make_engine(step_tokens=64)
    prompt = list(range(1, 31))
    first = Sequence("0", prompt, PARAMS)
    others = [first.sibling(str(number), PARAMS) for number in range(1, 5)]
    for sequence in (first, *others):
        engine.add(sequence)
    outputs = run_to_end(engine)
    for name in "01234":
        assert [output.token_id for output in outputs[name]] == expected_tokens(prompt, PARAMS)
    # 28 of the 30 tokens fill blocks of 4; each of the others computes the two behind them.
    assert [sequence.num_cached_tokens for sequence in (first, *others)] == [0, 28, 28, 28, 28]
    assert num_computed_tokens(executor) == 30 + 4 * 2 + 5 * (PARAMS.max_new_tokens - 1)


def test_who_waits_for_a_prompt_that_another_computes_lets_the_next_in_line_pass():
    engine, _ = make_engine(step_tokens=12, max_sequences=4)
    shared = list(range(1, 31))
    for name, prompt in (("first", shared), ("second", [*shared, 7]), ("third", [9, 9])):
        engine.add(Sequence(name, prompt, PARAMS))
    first_seen = {}
    step = 0
    while engine.has_work():
        step += 1
        for output in engine.step():
            first_seen.setdefault(output.sequence_id, step)
    # Chunks of 12, 12 and 6; what the last one leaves of the step is the third's.
    assert first_seen == {"first": 3, "third": 3, "second": 4}


def test_who_waits_for_a_prompt_computes_it_itself_once_the_other_is_gone():
    engine, _ = make_engine(step_tokens=12, max_sequences=4)
    prompt = list(range(1, 31))
    engine.add(Sequence("first", prompt, PARAMS))
    second = Sequence("second", prompt, PARAMS)
    engine.add(second)
    engine.step()
    assert second.num_cached_tokens is None
    engine.remove("first")
    assert [output.token_id for output in run_to_end(engine)["second"]] == expected_tokens(prompt, PARAMS)
    assert second.num_cached_tokens == 12


def test_the_last_token_of_a_known_prompt_is_computed_all_the_same():
    engine, _ = make_engine()
    prompt = list(range(1, 9))
    assert generate(engine, Sequence("first", prompt, PARAMS)) == expected_tokens(prompt, PARAMS)
    again = Sequence("again", prompt, PARAMS)
    assert generate(engine, again) == expected_tokens(prompt, PARAMS)
    assert again.num_cached_tokens == 4


def test_sequences_of_different_salts_share_nothing():
    engine, _ = make_engine()
    prompt = list(range(1, 13))
    generate(engine, Sequence("one", prompt, PARAMS, salt=b"one tenant"))
    other = Sequence("other", prompt, PARAMS, salt=b"another")
    assert generate(engine, other) == expected_tokens(prompt, PARAMS)
    assert other.num_cached_tokens == 0


def test_where_positions_are_not_exact_only_whole_tiles_of_prompts_are_used_again():
    engine = Engine(TokenCacheExecutor(64, block_size=2, is_position_exact=False), EngineConfig(EOS, max_positions=128))
    prompt = list(range(1, 11))
    answer = generate(engine, Sequence("first turn", prompt, PARAMS))
    second = Sequence("second turn", [*prompt, *answer], PARAMS)
    assert generate(engine, second) == expected_tokens([*prompt, *answer], PARAMS)
    assert second.num_cached_tokens == 8  # Two tiles of 4, though five blocks of 2 hold the prompt.
    resumed = Sequence("resumed", prompt[:6], PARAMS, output_ids=[*prompt[6:], 1, 2])
    generate(engine, resumed)
    assert resumed.num_cached_tokens == 4  # What it generated itself must have the bits of generated tokens.


def test_a_sequence_that_failed_leaves_nothing_to_others():
    engine, executor = make_engine()
    prompt = list(range(1, 13))
    executor.broken.add("fails")
    engine.add(Sequence("fails", prompt, PARAMS))
    assert run_to_end(engine)["fails"][-1].finish is FinishReason.ERROR
    other = Sequence("other", prompt, PARAMS)
    generate(engine, other)
    assert other.num_cached_tokens == 0


@pytest.mark.parametrize("is_position_exact", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_sequences_that_begin_alike_generate_what_they_would_alone(seed, is_position_exact):
    rng = random.Random(seed)
    engine, _ = make_engine(
        num_blocks=rng.randint(24, 60), is_position_exact=is_position_exact, max_positions=90, step_tokens=20
    )
    beginnings = [[rng.randrange(1, 9) for _ in range(30)] for _ in range(2)]
    expected, outputs = {}, {}
    for number in range(40):
        prompt = rng.choice(beginnings)[: rng.randint(1, 30)] + [rng.randrange(1, 9) for _ in range(rng.randint(0, 20))]
        params = GenerationParams(max_new_tokens=rng.randint(1, 30), ignore_eos=True)
        expected[str(number)] = expected_tokens(prompt, params)
        engine.add(Sequence(str(number), prompt, params))
        for _ in range(rng.randint(0, 6)):
            for output in engine.step():
                outputs.setdefault(output.sequence_id, []).append(output.token_id)
    for name, rest in run_to_end(engine).items():
        outputs.setdefault(name, []).extend(output.token_id for output in rest)
    assert outputs == expected
    assert engine.num_cached_tokens > 0
    assert engine.kv_tokens_used == 0


class CrampedExecutor(TokenCacheExecutor):
    """Has memory for batches of so many tokens only, as long as it is cramped."""

    limit = 10**6

    def execute(self, batch: Batch) -> list[Sample]:
        if batch.num_tokens > self.limit:
            raise OutOfDeviceMemoryError(f"{batch.num_tokens} tokens")
        return super().execute(batch)


def make_cramped_engine(**config) -> tuple[Engine, CrampedExecutor]:
    executor = CrampedExecutor(64)
    settings = {"eos_token_id": EOS, "max_positions": 128, "max_sequences": 8, "step_tokens": 40} | config
    return Engine(executor, EngineConfig(**settings), clock=lambda: 0.0), executor


@pytest.mark.parametrize("limit", [4, 5, 7, 15])
def test_a_step_without_memory_is_tried_again_with_a_smaller_batch_and_nothing_is_lost(limit):
    engine, executor = make_cramped_engine()
    params = GenerationParams(max_new_tokens=20, ignore_eos=True)
    prompts = {str(number): [number + 1] * (3 + 5 * number) for number in range(8)}
    for name, prompt in prompts.items():
        engine.add(Sequence(name, prompt, params))
    for _ in range(4):
        engine.step()
    executor.limit = limit
    outputs = run_to_end(engine)
    for name, prompt in prompts.items():
        drawn = [output.token_id for output in outputs[name]]
        assert drawn == expected_tokens(prompt, params)[-len(drawn) :]
        assert outputs[name][-1].finish is FinishReason.LENGTH
    assert engine.num_out_of_memory > 0
    assert engine.kv_tokens_used == 0


def test_the_oldest_go_on_in_the_step_that_had_no_memory():
    engine, executor = make_cramped_engine()
    for number in range(8):
        engine.add(Sequence(str(number), [number + 1], GenerationParams(max_new_tokens=20, ignore_eos=True)))
    engine.step()
    executor.limit = 4
    assert [output.sequence_id for output in engine.step()] == ["0", "1", "2", "3"]
    assert (engine.num_running, engine.num_waiting, engine.num_preemptions) == (4, 4, 4)


def test_steps_grow_back_once_there_is_memory_again():
    engine, executor = make_cramped_engine()
    for number in range(40):
        engine.add(Sequence(str(number), [1 + number], GenerationParams(max_new_tokens=60, ignore_eos=True)))
    engine.step()
    executor.limit = 1
    engine.step()
    executor.limit = 10**6
    sizes = []
    while engine.num_waiting:
        engine.step()
        sizes.append(len(engine.last_batch.chunks))
    first = {size: sizes.index(size) for size in (1, 2, 4, 8)}
    assert [first[2], first[4] - first[2], first[8] - first[4]] == [63, 64, 64]


def test_no_memory_for_the_smallest_batch_ends_the_engine():
    engine, executor = make_cramped_engine()
    for number in range(5):
        engine.add(Sequence(str(number), [1] * 30, GenerationParams(max_new_tokens=20, ignore_eos=True)))
    executor.limit = 0
    with pytest.raises(OutOfDeviceMemoryError):
        engine.step()
