"""One step of training, against plain PyTorch."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
import torch
from accelerate import Accelerator
from oasst_training.collator import Batch, collator_for
from oasst_training.datasets import load_datasets
from oasst_training.dialogues import format_dialogue
from oasst_training.evaluation import evaluate
from oasst_training.loss import CountedLogits, mean_loss
from oasst_training.sampling import SampleOrder, micro_batch_seed
from oasst_training.tokenizer import encode_parts
from oasst_training.trainer import Trainer
from torch.nn import functional
from transformers import GPTNeoXForCausalLM

END = 0


@pytest.fixture
def batch(dialogues, tokenizer) -> Batch:
    rows = [encode_parts(tokenizer, format_dialogue(dialogue.turns)) for dialogue in dialogues[:4]]
    return collator_for(tokenizer)(rows, Random(0))


@pytest.fixture
def make_trainer(tiny_recipe, tokenizer, data_folder, make_tiny_model) -> Callable[..., Trainer]:
    """A trainer of a fresh tiny model on the recipe `tiny` without dropout, with these keys overruled."""

    def make(**keys) -> Trainer:
        recipe = tiny_recipe(**{"residual_dropout": 0, "warmup_steps": 0} | keys)
        rows = [row for dataset in load_datasets(recipe, tokenizer, [data_folder]) for row in dataset.training]
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=recipe.gradient_accumulation_steps)
        model = make_tiny_model()
        return Trainer(accelerator, model, rows, collator_for(tokenizer), recipe)

    return make


def plain_loss(model, batch: Batch) -> torch.Tensor:
    """The loss as labels with an ignored value, over all logits, with an attention mask."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    labels = batch.targets.masked_fill(~batch.label_mask, -100)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_loss_and_gradients_are_those_of_a_plain_reference(batch, make_tiny_model):
    ours, reference = make_tiny_model(), make_tiny_model()
    loss = mean_loss(CountedLogits(ours)(batch.input_ids, batch.label_mask), batch.counted_targets)
    expected = plain_loss(reference, batch)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.autograd.backward([loss, expected])
    gradients = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-6, rtol=1e-4)


def test_where_nothing_counts_the_loss_is_nothing_and_no_weight_moves(batch, make_tiny_model):
    model = make_tiny_model()
    nothing = torch.zeros_like(batch.label_mask)
    loss = mean_loss(CountedLogits(model)(batch.input_ids, nothing), batch.targets[nothing])
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_a_step_is_the_mean_of_its_micro_batches_clipped_and_adam(make_trainer, tokenizer, make_tiny_model):
    """Written out once more, without accelerate."""
    trainer = make_trainer(max_grad_norm=0.5)
    recipe, rows = trainer._recipe, trainer._rows
    reference = make_tiny_model().train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0)
    order = SampleOrder([len(row) for row in rows], batch_size=4, seed=recipe.rng_seed)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(step)
        losses = []
        for number in (2 * step, 2 * step + 1):
            draw = Random(micro_batch_seed(recipe.rng_seed, number))
            batch = collator_for(tokenizer)([rows[index] for index in order.micro_batch(number)], draw)
            losses.append(plain_loss(reference, batch))
        torch.autograd.backward(sum(losses) / 2)
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norm > 0.5  # There is something to clip.
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.step(step).loss.item() == pytest.approx((sum(losses) / 2).item(), abs=1e-5)
    assert [trainer.learning_rate(step) for step in range(2)] == [0, 1e-2]


def test_steps_tokens_and_epochs_are_counted(make_trainer):
    trainer = make_trainer()
    assert trainer.micro_batches_per_step == 2
    assert trainer.num_steps == 2 * 13 // 2  # 50 rows or so, 4 to a micro batch, 2 epochs.
    assert trainer.epoch_after(13) == 2
    batch_tokens = sum(len(trainer._rows[index]) for number in (0, 1) for index in trainer._order.micro_batch(number))
    assert trainer.step(0).num_tokens == batch_tokens


def test_gradient_checkpointing_changes_memory_alone(make_trainer):
    plain, checkpointed = make_trainer(), make_trainer()
    model = checkpointed.module.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for step in range(2):
        assert checkpointed.step(step).loss.item() == plain.step(step).loss.item()
    weights = plain.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in checkpointed.module.state_dict().items())


def test_biases_and_norms_do_not_decay(make_trainer):
    groups = make_trainer(weight_decay=0.1)._optimizer.param_groups
    decays = {(parameter.ndim, group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert decays == {(2, 0.1), (1, 0.0)}


def test_an_evaluation_is_over_tokens_whatever_the_batches(dialogues, tokenizer, demo_checkpoint):
    """Counted here row by row, token by token, on replies to other questions: the model knows them in part."""
    crossed = [(one.turns[0], other.turns[1]) for one, other in pairwise(dialogues[:8])]
    rows = [encode_parts(tokenizer, format_dialogue(turns)) for turns in crossed]
    collator = collator_for(tokenizer)
    model = GPTNeoXForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    losses, is_right, is_end = [], [], []
    for row in rows:
        batch = collator([row], Random(0))
        log_probs = model(batch.input_ids).logits[0].log_softmax(-1)
        for position in batch.label_mask[0].nonzero().flatten().tolist():
            target = row[position + 1]
            losses.append(-log_probs[position, target].item())
            is_right.append(log_probs[position].argmax().item() == target)
            is_end.append(target == END)
    words = [right for right, end in zip(is_right, is_end, strict=True) if not end]
    accelerator = Accelerator(cpu=True)
    for batch_size in (1, 3):
        module = CountedLogits(model)
        result = evaluate(accelerator, module, rows, collator, batch_size=batch_size, end_id=END)
        assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        assert result.accuracy == pytest.approx(sum(is_right) / len(is_right))
        assert result.accuracy_without_ends == pytest.approx(sum(words) / len(words))
        assert result.num_tokens == len(losses)
    assert 0 < result.accuracy_without_ends != result.accuracy < 1


def test_padding_on_the_right_does_not_change_the_loss(dialogues, tokenizer, make_tiny_model):
    row = encode_parts(tokenizer, format_dialogue(dialogues[0].turns))
    module = CountedLogits(make_tiny_model())
    losses = []
    for multiple in (16, 256):
        padded = collator_for(tokenizer)
        padded = type(padded)(padded.prompter_id, padded.assistant_id, padded.padding_id, pad_to_multiple_of=multiple)
        batch = padded([row], Random(0))
        losses.append(mean_loss(module(batch.input_ids, batch.label_mask), batch.counted_targets))
    torch.testing.assert_close(*losses)
