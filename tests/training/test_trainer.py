"""The training loop, in small: it learns, and it does so reproducibly."""

from dataclasses import replace
from random import Random

import pytest
import torch
from oasst_training.collator import collator_for
from oasst_training.curriculum import Curriculum, casually
from oasst_training.dialogues import format_dialogue
from oasst_training.model import ModelShape, build_model, export_model
from oasst_training.recall import measure_recall
from oasst_training.tokenizer import encode_parts
from oasst_training.trainer import TrainingConfig, masked_loss, train
from torch.nn import functional
from transformers import GPTNeoXForCausalLM

SHAPE = ModelShape(num_layers=2, hidden_size=32, num_heads=2)
CONFIG = TrainingConfig(num_steps=6, num_threads=1, tokens_per_step=128, chat_lengths=(0, 64), num_warmup_steps=2)


@pytest.fixture(autouse=True)
def torch_settings_are_put_back():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def few_dialogues(dialogues):
    return sorted(dialogues, key=lambda dialogue: len(dialogue.turns[1].text))[:3]


def trained(dialogues, tokenizer, *, seed=0, **changes) -> tuple[GPTNeoXForCausalLM, list[float]]:
    model = build_model(SHAPE, tokenizer, seed=seed)
    losses: list[float] = []
    config = replace(CONFIG, seed=seed, **changes)
    curriculum = Curriculum(dialogues, tokenizer)
    train(model, curriculum, collator_for(tokenizer), config, lambda progress: losses.append(progress.loss))
    return model, losses


def test_training_twice_gives_the_same_weights_bit_for_bit(dialogues, tokenizer):
    once, losses = trained(dialogues, tokenizer)
    again, losses_again = trained(dialogues, tokenizer)
    assert losses == losses_again
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in once.state_dict().items())


def test_another_seed_gives_other_weights(dialogues, tokenizer):
    once, _ = trained(dialogues, tokenizer, num_steps=1)
    other, _ = trained(dialogues, tokenizer, num_steps=1, seed=1)
    assert not torch.equal(once.lm_head.weight, other.lm_head.weight)


def test_a_few_dialogues_are_learned_by_heart(few_dialogues, tokenizer):
    model, losses = trained(few_dialogues, tokenizer, num_steps=150, learning_rate=1e-2, chat_lengths=(0,))
    assert losses[0] > 5
    assert losses[-1] < 0.5
    rows = Curriculum(few_dialogues, tokenizer).rows()
    before = measure_recall(build_model(SHAPE, tokenizer, seed=0), rows, collator_for(tokenizer))
    after = measure_recall(model, rows, collator_for(tokenizer))
    assert before.num_recalled == 0
    assert before.smallest_margin < 0
    assert after.num_recalled == len(rows)
    assert after.smallest_margin > 0


def test_progress_tells_the_time_that_is_left(few_dialogues, tokenizer):
    reports = []
    model = build_model(SHAPE, tokenizer, seed=0)
    train(model, Curriculum(few_dialogues, tokenizer), collator_for(tokenizer), CONFIG, reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[2].remaining_s == pytest.approx(reports[2].elapsed_s)
    assert reports[-1].remaining_s == 0


def test_the_loss_is_the_mean_over_what_counts(dialogues, tokenizer):
    collator = collator_for(tokenizer)
    rows = [encode_parts(tokenizer, format_dialogue(dialogue.turns)) for dialogue in dialogues[:4]]
    batch = collator(rows, Random(0))
    model = build_model(SHAPE, tokenizer, seed=0)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    labels = batch.targets.masked_fill(~batch.label_mask, -100)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(masked_loss(logits, batch), expected)


def test_padding_on_the_right_does_not_change_the_loss(dialogues, tokenizer):
    collator = collator_for(tokenizer)
    row = encode_parts(tokenizer, format_dialogue(dialogues[0].turns))
    model = build_model(SHAPE, tokenizer, seed=0)
    narrow, wide = collator([row], Random(0)), replace(collator, pad_to_multiple_of=256)([row], Random(0))
    assert narrow.input_ids.shape[1] < wide.input_ids.shape[1]
    torch.testing.assert_close(
        masked_loss(model(narrow.input_ids).logits, narrow), masked_loss(model(wide.input_ids).logits, wide)
    )


def test_the_smallest_margin_is_the_right_logit_minus_the_best_other(tokenizer, dialogues):
    """Computed here token by token, without batches and masks."""
    dialogue = next(each for each in dialogues if len(each.turns) == 2)
    prompt = encode_parts(tokenizer, format_dialogue(dialogue.turns)[:-2])
    row = encode_parts(tokenizer, format_dialogue(dialogue.turns))
    model = build_model(SHAPE, tokenizer, seed=0)
    margins = []
    for position in range(len(prompt), len(row)):
        logits = model(torch.tensor([row[:position]])).logits[0, -1]
        right = logits[row[position]].item()
        logits[row[position]] = -torch.inf
        margins.append(right - logits.max().item())
    other_row = encode_parts(tokenizer, format_dialogue(dialogues[-1].turns))
    recall = measure_recall(model, [row, other_row], collator_for(tokenizer))
    assert recall.margins[0] == pytest.approx(min(margins), abs=1e-4)


def test_a_chat_has_at_least_the_length_asked_for_and_whole_dialogues(dialogues, tokenizer):
    curriculum = Curriculum(dialogues, tokenizer, casual_probability=0.0)
    alone = {tuple(row) for row in curriculum.rows()}
    assert tuple(curriculum.row(Random(0), num_tokens=0)) in alone
    chat = curriculum.row(Random(0), num_tokens=300)
    assert len(chat) >= 300
    assert any(tuple(chat[:end]) in alone for end in range(len(chat)))


def test_a_casual_question_has_small_letters_and_no_final_mark():
    assert casually("What is a GPU?") == "what is a gpu"
    assert casually("Hello!") == "hello"


def test_the_embedding_has_padding_rows_up_to_a_multiple_of_sixteen(tokenizer):
    model = build_model(SHAPE, tokenizer, seed=0)
    assert model.config.vocab_size % 16 == 0
    assert 0 < model.config.vocab_size - tokenizer.get_vocab_size() <= 16
    assert model.lm_head.weight.shape == model.gpt_neox.embed_in.weight.shape == (model.config.vocab_size, 32)


def test_an_exported_model_is_loaded_as_it_was_rounded_to_fp16(tokenizer, tmp_path):
    model = build_model(SHAPE, tokenizer, seed=0)
    export_model(model, tmp_path)
    loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert model.dtype == torch.float32
    weights = loaded.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight.half(), weights[name]) for name, weight in model.state_dict().items())
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 0)
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert loaded.config.max_position_embeddings == 2048
    assert loaded.config.use_parallel_residual
    assert not loaded.config.tie_word_embeddings
