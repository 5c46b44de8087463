"""Guessing ahead changes no token, no number and nobody's turn; it only saves steps."""

import itertools
import zlib
from array import array
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oasst_worker.engine import Engine, EngineConfig, FinishReason, GenerationParams, Sequence
from oasst_worker.engine.pace import StepCost
from oasst_worker.engine.speculation import Speculator
from oasst_worker.model.attention import PlainAttention, build_attention
from oasst_worker.model.config import load_config
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime.runner import ModelRunner
from token_cache_executor import expected_tokens, make_engine, run_to_end

PARAMS = GenerationParams(max_new_tokens=60, ignore_eos=True)


def counts_to_seven(token_ids) -> int:
    """Text that repeats itself: every guess is right once it has been all round."""
    return token_ids[-1] % 7 + 1


def follows_two(token_ids) -> int:
    """Repeats itself in part: guesses are right and wrong by turns."""
    return zlib.crc32(array("q", token_ids[-2:]).tobytes()) % (2 + len(token_ids) % 5)


def token_ids_of(outputs) -> list[int]:
    return [output.token_id for output in outputs]


def test_text_that_repeats_itself_takes_fewer_steps_and_is_the_same():
    engine, executor = make_engine(next_token=counts_to_seven, speculate=4)
    engine.add(Sequence("a", [1, 2, 3], PARAMS))
    assert token_ids_of(run_to_end(engine)["a"]) == expected_tokens([1, 2, 3], PARAMS, counts_to_seven)
    assert len(executor.batches) < 30
    assert engine.num_accepted_tokens == engine.num_drafted_tokens == 60 - len(executor.batches)


def test_a_guess_that_was_wrong_leaves_nothing_behind():
    engine, _ = make_engine(next_token=follows_two, speculate=6)
    engine.add(Sequence("a", [1, 1, 2, 1, 1, 2, 1, 1], PARAMS))
    assert token_ids_of(run_to_end(engine)["a"]) == expected_tokens([1, 1, 2, 1, 1, 2, 1, 1], PARAMS, follows_two)
    assert 0 < engine.num_accepted_tokens < engine.num_drafted_tokens


@pytest.mark.parametrize("max_new_tokens", range(20, 30))
def test_a_sequence_ends_at_its_length_though_more_was_guessed(max_new_tokens):
    engine, _ = make_engine(next_token=counts_to_seven, speculate=8)
    params = GenerationParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    engine.add(Sequence("a", [1], params))
    outputs = run_to_end(engine)["a"]
    assert token_ids_of(outputs) == expected_tokens([1], params, counts_to_seven)
    assert [output.finish for output in outputs] == [None] * (max_new_tokens - 1) + [FinishReason.LENGTH]
    assert engine.kv_tokens_used == 0


def test_a_stop_token_among_right_guesses_ends_the_sequence_there():
    engine, executor = make_engine(next_token=counts_to_seven, speculate=8)
    params = GenerationParams(max_new_tokens=60, min_new_tokens=30, stop_token_ids=frozenset([4]))
    engine.add(Sequence("a", [1], params))
    outputs = run_to_end(engine)["a"]
    assert token_ids_of(outputs) == [2, 3, 4, 5, 6, 7, 1] * 4 + [2, 3, 4]
    assert outputs[-1].finish is FinishReason.STOP_TOKEN
    assert any(chunk.drafts for chunk in executor.batches[-1].chunks)


def test_numbers_that_are_not_finite_behind_right_guesses_end_the_sequence_with_what_was_right():
    engine, executor = make_engine(next_token=counts_to_seven, speculate=4)
    executor.next_token = lambda token_ids: None if len(token_ids) == 40 else counts_to_seven(token_ids)
    engine.add(Sequence("a", [1], PARAMS))
    outputs = run_to_end(engine)["a"]
    assert token_ids_of(outputs) == [*expected_tokens([1], PARAMS, counts_to_seven)[:39], None]
    assert outputs[-1].finish is FinishReason.ERROR


def test_a_sequence_whose_guesses_are_wrong_is_soon_left_alone():
    bigrams = itertools.cycle([(1, 2), (3, 1), (2, 4), (1, 5), (2, 3)])
    speculator = Speculator(4, StepCost())
    sequence = Sequence("a", [1, 2] * 4, GenerationParams(max_new_tokens=1000))
    for _ in range(40):
        for token_id in next(bigrams):
            sequence.append(token_id)
        if drafts := speculator.draft(sequence, num_rows=1):
            speculator.record(sequence, num_drafted=len(drafts), num_accepted=0)
    assert 0 < speculator.num_drafted < 30


def test_the_fuller_a_step_the_fewer_tokens_are_guessed():
    def num_drafts(num_rows: int) -> int:
        sequence = Sequence("a", [1, 2, 3] * 5, PARAMS)
        return len(Speculator(8, StepCost()).draft(sequence, num_rows=num_rows))

    guessed = [num_drafts(num_rows) for num_rows in (1, 2, 4, 16, 64)]
    assert guessed == sorted(guessed, reverse=True)
    assert guessed[0] >= 2
    assert guessed[-1] == 0


def test_a_guess_takes_no_block_that_another_will_need():
    engine, _ = make_engine(num_blocks=6, next_token=counts_to_seven, speculate=8, max_sequences=2)
    for name in ("a", "b"):
        engine.add(Sequence(name, [1], GenerationParams(max_new_tokens=12, ignore_eos=True)))
    run_to_end(engine)
    assert engine.num_preemptions == 0


def test_what_was_guessed_right_is_known_to_who_begins_alike():
    engine, _ = make_engine(next_token=counts_to_seven, speculate=8)
    params = GenerationParams(max_new_tokens=41, ignore_eos=True)
    engine.add(Sequence("first turn", [1, 2, 3], params))
    answer = token_ids_of(run_to_end(engine)["first turn"])
    second = Sequence("second turn", [1, 2, 3, *answer, 9], params)
    engine.add(second)
    drawn = token_ids_of(run_to_end(engine)["second turn"])
    assert drawn == expected_tokens(second.prompt_ids, params, counts_to_seven)
    assert second.num_cached_tokens >= 40


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    speculate=st.integers(1, 9),
    num_blocks=st.integers(14, 40),
    max_sequences=st.integers(1, 8),
    is_position_exact=st.booleans(),
)
def test_every_sequence_gives_its_own_tokens_whatever_is_guessed(
    data, speculate, num_blocks, max_sequences, is_position_exact
):
    engine, executor = make_engine(
        num_blocks,
        is_position_exact=is_position_exact,
        next_token=follows_two,
        speculate=speculate,
        max_sequences=max_sequences,
        max_positions=56,
    )
    expected, drawn = {}, {}
    for number in range(data.draw(st.integers(1, 10))):
        prompt = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=30))
        params = GenerationParams(
            max_new_tokens=data.draw(st.integers(1, 26)), ignore_eos=data.draw(st.booleans()), seed=number
        )
        expected[str(number)] = expected_tokens(prompt, params, follows_two)
        engine.add(Sequence(str(number), prompt, params))
        for _ in range(data.draw(st.integers(0, 4))):
            for output in engine.step():
                drawn.setdefault(output.sequence_id, []).append(output.token_id)
    for name, rest in run_to_end(engine).items():
        drawn.setdefault(name, []).extend(token_ids_of(rest))
    assert drawn == expected
    assert engine.kv_tokens_used == 0
    assert max(batch.num_tokens for batch in executor.batches) <= engine.config.step_tokens


class RecordingRunner(ModelRunner):
    """Keeps the logits that each position of each sequence drew from last."""

    def __init__(self, model: NeoX, num_blocks: int) -> None:
        super().__init__(model, num_blocks=num_blocks)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}

    def _draw(self, batch, logits, last_ids=None):
        rows = iter(logits)
        for chunk in batch.chunks:
            for position in range(chunk.end, chunk.end + chunk.num_draws):
                self.logits[chunk.sequence.sequence_id, position] = next(rows).clone()
        return super()._draw(batch, logits, last_ids)


@pytest.fixture(params=[build_attention, PlainAttention], ids=["fastest attention", "plain attention"])
def make_runner(request, make_checkpoint) -> Callable[[], RecordingRunner]:
    """Runners on one tiny checkpoint."""
    folder = make_checkpoint(max_position_embeddings=256)
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    model = NeoX(config, weights, make_attention=request.param)
    return lambda: RecordingRunner(model, num_blocks=64)


# Answers of three letters repeat themselves by chance, now and then.
LETTERS = {0: 40.0, 7: 40.0, 9: 40.0}
SAMPLINGS = {
    "greedy": {"temperature": 0.0, "logit_bias": {}},
    "sampled": {"temperature": 0.6, "top_k": 20},
    "penalized": {"temperature": 0.6, "repetition_penalty": 1.02, "presence_penalty": 0.1, "frequency_penalty": 0.01},
    "with logprobs": {"temperature": 0.6, "logprobs": 3},
    "not to end early": {"temperature": 0.6, "min_new_tokens": 90, "ignore_eos": False},
}


def generate(runner: RecordingRunner, sampling, *, speculate: int):
    config = EngineConfig(eos_token_id=0, max_positions=256, max_sequences=4, speculate=speculate)
    engine = Engine(runner, config, clock=lambda: 0.0)
    for number in range(4):
        sampled = {"ignore_eos": True, "logit_bias": LETTERS} | sampling
        params = GenerationParams(max_new_tokens=100, seed=number, **sampled)
        engine.add(Sequence(str(number), [5 + number, 7, 9, 7, 9, 7], params))
    outputs, num_steps = {}, 0
    while engine.has_work():
        num_steps += 1
        for output in engine.step():
            outputs.setdefault(output.sequence_id, []).append(output)
    return outputs, engine, num_steps


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_model_draws_the_same_tokens_from_the_same_bits(make_runner, sampling):
    plain, guessing = make_runner(), make_runner()
    expected, _, num_steps = generate(plain, sampling, speculate=0)
    outputs, engine, fewer_steps = generate(guessing, sampling, speculate=6)
    assert outputs == expected  # Log-probabilities among them.
    assert engine.num_accepted_tokens > 10
    assert fewer_steps < num_steps
    assert plain.logits
    for place, logits in plain.logits.items():
        assert torch.equal(guessing.logits[place], logits), place
