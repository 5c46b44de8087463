"""Too few blocks for all: who gives way, that nobody starves, and that it costs as little as it can."""

from hypothesis import given, settings
from hypothesis import strategies as st
from oasst_worker.engine import Engine, GenerationParams, Sequence
from token_cache_executor import expected_tokens, make_engine, next_token, run_to_end


def add(engine: Engine, name: str, *, prompt_tokens: int, max_new_tokens: int) -> Sequence:
    prompt = [ord(name[0]), *range(1, prompt_tokens)]
    sequence = Sequence(name, prompt, GenerationParams(max_new_tokens=max_new_tokens, ignore_eos=True))
    engine.add(sequence)
    return sequence


@settings(max_examples=80, deadline=None)
@given(data=st.data(), num_blocks=st.integers(12, 30), max_sequences=st.integers(1, 8), speculate=st.integers(0, 4))
def test_every_sequence_ends_and_the_oldest_never_loses_a_token(data, num_blocks, max_sequences, speculate):
    engine, _ = make_engine(num_blocks, max_sequences=max_sequences, max_positions=48, speculate=speculate)
    expected, drawn, sequences = {}, {}, []
    work = 0
    for number in range(data.draw(st.integers(2, 12))):
        prompt = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=24))
        params = GenerationParams(max_new_tokens=data.draw(st.integers(1, 24)), ignore_eos=True)
        sequences.append(Sequence(str(number), prompt, params))
        expected[str(number)] = expected_tokens(prompt, params, next_token)
        work += len(prompt) + params.max_new_tokens
        engine.add(sequences[-1])
        if data.draw(st.booleans()):
            for output in engine.step():
                drawn.setdefault(output.sequence_id, []).append(output.token_id)
    num_steps = num_idle = 0
    while engine.has_work():
        oldest = next(each for each in sequences if len(drawn.get(each.sequence_id, ())) < each.params.max_new_tokens)
        # One that gave way to others that are done by now may wait for younger ones to end.
        runs, before = bool(oldest.blocks), oldest.num_computed
        for output in engine.step():
            drawn.setdefault(output.sequence_id, []).append(output.token_id)
        assert oldest.num_computed >= before
        # A step in sixteen is kept free of prompts, to learn what it takes without any.
        num_idle = 0 if not runs or oldest.num_computed > before else num_idle + 1
        assert num_idle <= 1
        num_steps += 1
    assert num_steps <= work
    assert drawn == expected


def test_of_the_younger_ones_the_one_with_the_least_to_compute_again_gives_way():
    engine, _ = make_engine(num_blocks=19, max_sequences=3, step_tokens=64)
    oldest = add(engine, "oldest", prompt_tokens=20, max_new_tokens=40)
    short = add(engine, "short", prompt_tokens=4, max_new_tokens=30)
    long = add(engine, "long", prompt_tokens=28, max_new_tokens=20)
    while not engine.num_preemptions:
        before = {each: each.num_computed for each in (oldest, short, long)}
        engine.step()
    lost = [each for each in (oldest, short, long) if each.num_computed < before[each]]
    assert lost == [short]


def test_who_was_preempted_comes_back_before_who_came_later():
    engine, _ = make_engine(num_blocks=14, max_sequences=4, step_tokens=64)
    for name in ("a", "b"):
        add(engine, name, prompt_tokens=20, max_new_tokens=20)
    while not engine.num_preemptions:
        engine.step()
    add(engine, "c", prompt_tokens=20, max_new_tokens=4)
    ends = [name for name, outputs in run_to_end(engine).items() if outputs[-1].finish]
    assert ends == ["a", "b", "c"]


def test_nobody_is_admitted_who_would_be_preempted_at_the_next_block():
    engine, _ = make_engine(num_blocks=12, max_sequences=2, step_tokens=64)
    add(engine, "a", prompt_tokens=23, max_new_tokens=16)
    engine.step()
    add(engine, "b", prompt_tokens=23, max_new_tokens=2)
    run_to_end(engine)
    assert engine.num_preemptions == 0
