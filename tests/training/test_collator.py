"""Which tokens the loss counts, and how rows become batches."""

from array import array
from random import Random

import pytest
import torch
from oasst.prompt import ControlToken
from oasst_training.collator import DialogueCollator, collator_for
from oasst_training.tokenizer import encode_parts

PROMPTER, ASSISTANT, END, PADDING = 1, 2, 0, 9
TWO_EXCHANGES = [PROMPTER, 11, END, ASSISTANT, 12, 13, END, PROMPTER, 14, END, ASSISTANT, 15, END]


def make_collator(**options) -> DialogueCollator:
    return DialogueCollator(prompter_id=PROMPTER, assistant_id=ASSISTANT, padding_id=PADDING, **options)


def counted_inputs(batch, row=0):
    return batch.input_ids[row][batch.label_mask[row]].tolist()


def counted_targets(batch, row=0):
    return batch.targets[row][batch.label_mask[row]].tolist()


def test_the_loss_starts_at_the_assistant_token_and_targets_its_words_and_end(tokenizer):
    parts = [ControlToken.PROMPTER, "Dummy Question?", ControlToken.END_OF_TEXT]
    parts += [ControlToken.ASSISTANT, "Dummy Answer.", ControlToken.END_OF_TEXT]
    batch = collator_for(tokenizer)([encode_parts(tokenizer, parts)], Random(0))

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    assert decode(counted_inputs(batch)) == "<|assistant|>Dummy Answer."
    assert decode(counted_targets(batch)) == "Dummy Answer.<|endoftext|>"


def test_between_exchanges_the_end_of_a_reply_targets_the_next_prompter_token():
    batch = make_collator()([TWO_EXCHANGES], Random(0))
    assert counted_inputs(batch) == [ASSISTANT, 12, 13, END, ASSISTANT, 15]
    assert counted_targets(batch) == [12, 13, END, PROMPTER, 15, END]


def test_text_before_the_first_turn_does_not_count():
    batch = make_collator()([[21, 22, *TWO_EXCHANGES]], Random(0))
    assert counted_inputs(batch) == [ASSISTANT, 12, 13, END, ASSISTANT, 15]


def test_rows_are_padded_on_the_right_to_a_multiple_and_padding_does_not_count():
    short = TWO_EXCHANGES[:7]
    batch = make_collator(pad_to_multiple_of=4)([short, TWO_EXCHANGES], Random(0))
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == short + [PADDING] * 9
    assert batch.attention_mask.sum(1).tolist() == [len(short), len(TWO_EXCHANGES)]
    assert counted_targets(batch, 0) == [12, 13, END]
    assert counted_targets(batch, 1) == [12, 13, END, PROMPTER, 15, END]


@pytest.mark.parametrize("length", range(2, len(TWO_EXCHANGES)))
def test_a_window_keeps_ids_mask_and_targets_aligned(length):
    whole = make_collator()([TWO_EXCHANGES], Random(0))
    collator = make_collator(max_length=length, random_offset_probability=1.0, pad_to_multiple_of=1)
    starts = set()
    for seed in range(30):
        batch = collator([TWO_EXCHANGES], Random(seed))
        window = batch.input_ids[0].tolist()
        start = next(i for i in range(len(TWO_EXCHANGES)) if TWO_EXCHANGES[i : i + length] == window)
        starts.add(start)
        inside = slice(start, start + length - 1)
        assert torch.equal(batch.label_mask[0, :-1], whole.label_mask[0, inside])
        assert torch.equal(batch.targets[0, :-1], whole.targets[0, inside])
        assert not batch.label_mask[0, -1], "its target is outside the window"
    assert len(starts) > 1


def test_without_a_random_offset_a_long_row_keeps_its_beginning():
    collator = make_collator(max_length=5, random_offset_probability=0.0, pad_to_multiple_of=1)
    for seed in range(10):
        assert collator([TWO_EXCHANGES], Random(seed)).input_ids[0].tolist() == TWO_EXCHANGES[:5]


def test_without_label_masking_everything_but_the_last_token_and_padding_counts():
    batch = make_collator(label_masking=False, max_length=8)([TWO_EXCHANGES, TWO_EXCHANGES[:4]], Random(0))
    assert batch.label_mask.sum(1).tolist() == [7, 3]
    assert counted_targets(batch, 1) == TWO_EXCHANGES[1:4]


def test_a_row_may_be_an_array_of_ids():
    batches = [make_collator()([row], Random(0)) for row in (TWO_EXCHANGES, array("i", TWO_EXCHANGES))]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert batches[1].input_ids.dtype == torch.long
