"""Scores are the log-likelihoods that transformers gives, whatever else runs, and cost what they must."""

import random

import pytest
import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, ScoreOutput, ScoringSequence, Sequence
from oasst_worker.model.config import load_config
from oasst_worker.model.neox import NeoX
from oasst_worker.model.scorer import score_targets
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import scoring as runtime_scoring
from oasst_worker.runtime.runner import ModelRunner

MAX_POSITIONS = 64
VOCAB_SIZE = 96


@pytest.fixture
def make_engine(make_checkpoint):
    """Makes an engine on a tiny checkpoint, and the runner below it."""

    def make(*, num_blocks=64, step_tokens=128, max_positions=MAX_POSITIONS, **fields) -> tuple[Engine, ModelRunner]:
        folder = make_checkpoint(max_position_embeddings=max_positions, **fields)
        config = load_config(folder)
        weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"))
        runner = ModelRunner(NeoX(config, weights), num_blocks=num_blocks, banned_token_ids=range(90, 96))
        settings = EngineConfig(eos_token_id=0, max_positions=max_positions, max_sequences=8, step_tokens=step_tokens)
        return Engine(runner, settings, clock=lambda: 0.0), runner

    return make


def sequence_of(name: str, token_ids: list[int], context_length: int, *others: int) -> ScoringSequence:
    """The item of these tokens, and those that end otherwise."""
    return ScoringSequence(name, token_ids[:-1], context_length, [token_ids[-1], *others])


def score(engine: Engine, *sequences: Sequence) -> dict[str, ScoreOutput]:
    for sequence in sequences:
        engine.add(sequence)
    outputs = {}
    while engine.has_work():
        outputs |= {each.sequence_id: each for each in engine.step() if isinstance(each, ScoreOutput)}
    return outputs


def logprobs_of(output: ScoreOutput, continuation: int = 0) -> list[float]:
    return [each.logprob for each in output.continuations[continuation]]


def draw_items(number: int, *, seed: int = 0) -> list[tuple[list[int], int]]:
    dice = random.Random(seed)
    items = []
    for _ in range(number):
        length = dice.randint(2, MAX_POSITIONS + 1)
        items.append(([dice.randrange(VOCAB_SIZE) for _ in range(length)], dice.randint(1, length - 1)))
    return items


@torch.no_grad()
def reference_scores(model, token_ids: list[int], context_length: int) -> tuple[list[float], list[bool]]:
    """By transformers, one item alone, the last token not fed."""
    logits = model(torch.tensor([token_ids[:-1]])).logits[0].float()
    targets = torch.tensor(token_ids[1:])
    logprobs = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    is_best = logits.argmax(dim=1) == targets
    return logprobs[context_length - 1 :].tolist(), is_best[context_length - 1 :].tolist()


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"use_parallel_residual": False}],
    ids=["untied", "tied", "sequential"],
)
def test_every_token_has_the_log_probability_that_transformers_gives(make_engine, make_model, fields):
    engine, _ = make_engine(**fields)
    model = make_model(**fields)
    items = draw_items(24)
    outputs = score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items)))
    for index, (token_ids, context_length) in enumerate(items):
        logprobs, is_best = reference_scores(model, token_ids, context_length)
        assert logprobs_of(outputs[str(index)]) == pytest.approx(logprobs, abs=1e-4)
        assert [each.is_best for each in outputs[str(index)].continuations[0]] == is_best


def test_what_the_model_would_say_itself_is_greedy(make_engine):
    engine, _ = make_engine()
    prompt = [5, 6, 7]
    engine.add(Sequence("said", prompt, GenerationParams(max_new_tokens=8, temperature=0, ignore_eos=True)))
    said = []
    while engine.has_work():
        said += [output.token_id for output in engine.step()]
    assert max(said) < 90  # Else this checkpoint would say what is never drawn.
    other = [(said[-1] + 1) % VOCAB_SIZE]
    outputs = score(engine, sequence_of("said", prompt + said, 3), sequence_of("other", prompt + said[:-1] + other, 3))
    is_best = {name: [each.is_best for each in output.continuations[0]] for name, output in outputs.items()}
    assert all(is_best["said"])
    assert is_best["other"] == [True] * 7 + [False]


def test_of_equally_likely_tokens_the_lowest_id_is_the_greedy_one():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    logprobs, is_best, is_finite = score_targets(logits, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 0, 2]))
    assert is_best.tolist() == [True, False, True, False]
    assert logprobs[0] == logprobs[1]
    assert is_finite.all()


def test_padding_rows_of_the_vocabulary_count_as_they_do_in_transformers(make_engine, make_model):
    engine, _ = make_engine()
    item = [3, 4, 95]  # Never drawn, and scored all the same.
    logprobs, _ = reference_scores(make_model(), item, 1)
    assert logprobs_of(score(engine, sequence_of("a", item, 1))["a"]) == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("step_tokens", [80, 128, 512])
def test_an_items_scores_are_the_same_bits_in_any_company(make_engine, step_tokens):
    items = draw_items(40, seed=1)
    engine, _ = make_engine(step_tokens=step_tokens, num_blocks=256)
    together = score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items)))
    for index in (0, 17, 39):
        engine, _ = make_engine()
        alone = score(engine, sequence_of("alone", *items[index]))
        assert logprobs_of(alone["alone"]) == logprobs_of(together[str(index)])


def test_an_items_scores_are_the_same_bits_beside_chats(make_engine):
    items = draw_items(6, seed=2)
    engine, _ = make_engine(num_blocks=256)
    for number in range(4):
        engine.add(Sequence(f"chat {number}", [number + 1] * 9, GenerationParams(max_new_tokens=40, ignore_eos=True)))
    beside = score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items)))
    engine, _ = make_engine()
    alone = score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items)))
    assert beside == alone


def test_a_chat_says_the_same_beside_what_is_scored(make_engine):
    params = GenerationParams(max_new_tokens=30, seed=5, ignore_eos=True)

    def tokens_of(engine) -> list[int]:
        tokens = []
        while engine.has_work():
            tokens += [each.token_id for each in engine.step() if not isinstance(each, ScoreOutput)]
        return tokens

    alone, _ = make_engine()
    alone.add(Sequence("chat", [1, 2, 3], params))
    beside, _ = make_engine()
    beside.add(Sequence("chat", [1, 2, 3], params))
    for index, item in enumerate(draw_items(20, seed=3)):
        beside.add(sequence_of(str(index), *item))
    assert tokens_of(alone) == tokens_of(beside)


def test_the_longest_item_has_one_token_more_than_there_are_positions(make_engine, make_model):
    engine, _ = make_engine()
    token_ids = [index % VOCAB_SIZE for index in range(MAX_POSITIONS + 1)]
    outputs = score(engine, sequence_of("longest", token_ids, 1))
    logprobs, _ = reference_scores(make_model(), token_ids, 1)
    assert logprobs_of(outputs["longest"]) == pytest.approx(logprobs, abs=1e-4)
    with pytest.raises(ValueError, match="do not fit the model's 64 positions"):
        engine.add(sequence_of("longer", [*token_ids, 1], 1))


def test_continuations_that_differ_in_their_last_token_are_computed_once(make_engine, make_model):
    engine, _ = make_engine()
    context = list(range(1, 20))
    outputs = score(engine, sequence_of("choices", [*context, 30], 19, 31, 32, 33))
    for continuation, token_id in enumerate((30, 31, 32, 33)):
        logprobs, _ = reference_scores(make_model(), [*context, token_id], 19)
        assert logprobs_of(outputs["choices"], continuation) == pytest.approx(logprobs, abs=1e-4)
    assert engine.num_prompt_tokens == 19


def test_items_that_share_a_context_compute_it_once(make_engine, make_model):
    engine, _ = make_engine()
    context = [index * 7 % VOCAB_SIZE for index in range(50)]
    items = [[*context, choice, choice + 1, choice + 2] for choice in (10, 20, 30, 40)]
    outputs = score(engine, *(sequence_of(str(index), item, 50) for index, item in enumerate(items)))
    assert engine.num_cached_tokens == 3 * 48  # Whole blocks of 16, each but the first item's.
    for index, item in enumerate(items):
        logprobs, _ = reference_scores(make_model(), item, 50)
        assert logprobs_of(outputs[str(index)]) == pytest.approx(logprobs, abs=1e-4)
    assert engine.kv_tokens_used == 0


def test_logits_of_a_few_rows_are_in_memory_at_once(make_engine, monkeypatch):
    engine, runner = make_engine()
    items = draw_items(10, seed=4)
    expected = score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items)))

    monkeypatch.setattr(runtime_scoring, "_ROWS_AT_ONCE", 7)
    most_rows = 0
    to_logits = runner.model.logits

    def count_rows(hidden):
        nonlocal most_rows
        most_rows = max(most_rows, len(hidden))
        return to_logits(hidden)

    monkeypatch.setattr(runner.model, "logits", count_rows)
    assert score(engine, *(sequence_of(str(index), *item) for index, item in enumerate(items))) == expected
    assert most_rows == 7


def test_an_item_whose_logits_are_not_finite_fails_alone(make_engine):
    engine, runner = make_engine()
    runner.model._embedding[77] = torch.nan
    bad, good = sequence_of("bad", [1, 77, 3, 4], 1), sequence_of("good", [1, 2, 3, 4], 1)
    outputs = score(engine, bad, good)
    assert outputs["bad"].error == "the logits are not finite numbers"
    assert outputs["bad"].continuations == ()
    assert outputs["good"].error is None
    assert engine.kv_tokens_used == 0


def test_an_item_gives_its_blocks_to_a_chat_and_is_scored_again_to_the_same_end(make_engine):
    item = ([index % 90 for index in range(200)], 2)
    engine, _ = make_engine(max_positions=256)
    expected = score(engine, sequence_of("item", *item))

    engine, _ = make_engine(max_positions=256, num_blocks=16, step_tokens=80)
    engine.add(sequence_of("item", *item))
    engine.step()
    assert engine.kv_tokens_used == 80
    for number in (1, 2):
        prompt = [number, *(index % 90 for index in range(99))]
        engine.add(Sequence(f"chat {number}", prompt, GenerationParams(max_new_tokens=14, ignore_eos=True)))
    assert score(engine) == expected
    assert engine.num_preemptions == 1


def chat(name: str, *, prompt_tokens: int = 3, max_new_tokens: int = 40) -> Sequence:
    params = GenerationParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return Sequence(name, [ord(name) % 90, *(index % 90 for index in range(1, prompt_tokens))], params)


def test_beside_items_a_chat_gets_a_token_in_every_step_and_items_a_few_rows(make_engine):
    engine, _ = make_engine(num_blocks=512, step_tokens=256)
    engine.add(chat("a"))
    engine.step()
    for index, item in enumerate(draw_items(60)):
        engine.add(sequence_of(str(index), *item))
    num_scored_steps = 0
    for _ in range(30):
        outputs = engine.step()
        assert "a" in {output.sequence_id for output in outputs}
        num_scored = sum(each.num_tokens for each in engine.last_batch.chunks if each.sequence.sequence_id != "a")
        assert num_scored <= 16
        num_scored_steps += num_scored > 0
    assert num_scored_steps >= 28  # Now and then a step goes without, to see what it takes alone.


def test_a_chats_prompt_is_computed_before_any_item(make_engine):
    engine, _ = make_engine(num_blocks=512, step_tokens=128, max_positions=512)
    for index, item in enumerate(draw_items(60)):
        engine.add(sequence_of(str(index), *item))
    engine.step()
    engine.add(chat("a", prompt_tokens=400))
    for end in (128, 256, 384, 400):
        engine.step()
        (chunk,) = [each for each in engine.last_batch.chunks if each.sequence.sequence_id == "a"]
        assert chunk.end == end
        assert engine.last_batch.chunks[0] is chunk


def test_items_take_no_slot_of_a_chat(make_engine):
    engine, _ = make_engine(num_blocks=512, step_tokens=256)
    for index, item in enumerate(draw_items(60)):
        engine.add(sequence_of(str(index), *item))
    engine.step()
    names = "abcdefgh"
    for name in names:
        engine.add(chat(name))
    assert {each.sequence_id for each in engine.step()} >= set(names)


def test_a_chat_waits_for_no_item_that_begins_as_it_does(make_engine):
    engine, _ = make_engine(num_blocks=512, step_tokens=128, max_positions=512)
    prompt = [index % 90 for index in range(300)]
    engine.add(sequence_of("item", [*prompt, 1], 299))
    engine.step()
    engine.add(Sequence("chat", prompt, GenerationParams(max_new_tokens=2, ignore_eos=True)))
    engine.step()
    chunk = engine.last_batch.chunks[0]
    assert (chunk.sequence.sequence_id, chunk.start) == ("chat", 128)  # And it uses what the item has computed.


def test_without_chats_items_fill_the_step(make_engine):
    engine, _ = make_engine(num_blocks=512, step_tokens=256)
    for index in range(60):
        engine.add(sequence_of(str(index), [index, *range(60)], 1))
    engine.step()
    assert engine.last_batch.num_tokens > 256 - 64


def test_a_removed_item_leaves_nothing_behind(make_engine):
    engine, _ = make_engine(max_positions=256, step_tokens=80)
    engine.add(sequence_of("running", [index % 90 for index in range(200)], 2))
    engine.step()
    engine.add(sequence_of("waiting", [1, 2, 3], 2))
    engine.remove("running")
    engine.remove("waiting")
    assert (engine.has_work(), engine.kv_tokens_used, engine.num_running, engine.num_waiting) == (False, 0, 0, 0)
