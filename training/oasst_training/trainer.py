"""One step of training: micro batches, their gradients' mean, clipped, and AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DummyOptim
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from oasst_training.collator import Batch, DialogueCollator
from oasst_training.datasets import Row
from oasst_training.loss import CountedLogits, mean_loss
from oasst_training.recipe import Recipe
from oasst_training.sampling import SampleOrder, micro_batch_seed
from oasst_training.schedule import learning_rate_factor

__all__ = ["StepResult", "Trainer"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one process saw of a step. On the device, so that nobody waits for it."""

    loss: Tensor  # The mean over the process's micro batches.
    num_tokens: int  # Without padding.


class Trainer:
    """Trains a model, step by step, on the process's share of every step's micro batches.

    The micro batches of a step are numbered through over processes and accumulation, and what is random in one depends
    on its number alone. So a step does not depend on the steps that this process did before, nor, up to the order of
    additions, on how many processes share it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: GPTNeoXForCausalLM,
        rows: Sequence[Row],
        collator: DialogueCollator,
        recipe: Recipe,
    ) -> None:
        self._accelerator = accelerator
        self._rows = rows
        self._collator = collator
        self._recipe = recipe
        self._order = SampleOrder(
            [len(row) for row in rows],
            batch_size=recipe.per_device_train_batch_size,
            seed=recipe.rng_seed,
            sort_by_length=recipe.sort_by_length,
        )
        optimizer = _make_optimizer(model, recipe, accelerator)
        self.module, self._optimizer = accelerator.prepare(CountedLogits(model), optimizer)
        self.module.train()

    @property
    def micro_batches_per_step(self) -> int:
        """Of all processes together."""
        num_processes: int = self._accelerator.num_processes
        return self._recipe.gradient_accumulation_steps * num_processes

    @property
    def num_steps(self) -> int:
        """How many steps all epochs have. The remainder of a step at the end is left out."""
        num_batches = int(self._recipe.num_train_epochs * self._order.num_batches_per_epoch)
        return max(1, num_batches // self.micro_batches_per_step)

    def learning_rate(self, step: int) -> float:
        """The rate of this step, counted from 0."""
        factor = learning_rate_factor(step, num_warmup_steps=self._recipe.warmup_steps, num_steps=self.num_steps)
        return self._recipe.learning_rate * factor

    def epoch_after(self, step: int) -> float:
        """How often the rows were seen after so many steps."""
        return step * self.micro_batches_per_step / self._order.num_batches_per_epoch

    def step(self, step: int) -> StepResult:
        """The weights after this step, counted from 0, are in place."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        losses = []
        num_tokens = 0
        first = step * self.micro_batches_per_step + self._accelerator.process_index
        for number in range(first, (step + 1) * self.micro_batches_per_step, self._accelerator.num_processes):
            seed = micro_batch_seed(self._recipe.rng_seed, number)
            rows = [self._rows[index] for index in self._order.micro_batch(number)]
            batch = self._collator(rows, Random(seed))  # noqa: S311 - it places windows.
            num_tokens += int(batch.attention_mask.sum())
            torch.manual_seed(seed)
            losses.append(self._accumulate(batch.to(self._accelerator.device)))
        return StepResult(torch.stack(losses).mean(), num_tokens)

    def _accumulate(self, batch: Batch) -> Tensor:
        """The micro batch's gradient is added to those of its step; after the last one the weights change."""
        with self._accelerator.accumulate(self.module):
            logits = self.module(batch.input_ids, batch.label_mask)
            loss = mean_loss(logits, batch.counted_targets)
            self._accelerator.backward(loss)
            if self._accelerator.sync_gradients:
                self._accelerator.clip_grad_norm_(self.module.parameters(), self._recipe.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return loss.detach()


def _make_optimizer(
    model: GPTNeoXForCausalLM, recipe: Recipe, accelerator: Accelerator
) -> torch.optim.Optimizer | DummyOptim:
    """AdamW; biases and layer norms do not decay. With DeepSpeed, which makes its own, a stand-in for that."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return DummyOptim(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)
