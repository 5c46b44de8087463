"""The training loop: AdamW on the masked loss, warm-up, then linear decay to nothing."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPTNeoXForCausalLM

from oasst_training.collator import Batch, DialogueCollator
from oasst_training.curriculum import Curriculum

__all__ = ["Progress", "TrainingConfig", "masked_loss", "train"]

# Rows are drawn for so many steps at a time, so that each step finds rows of about equal length.
_STEPS_PER_DRAW = 16


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How to train. The same values give the same weights, bit for bit, on the same machine."""

    num_steps: int
    seed: int = 0
    # Sums depend on how they are split among threads, so the number is part of the recipe.
    num_threads: int = 2
    tokens_per_step: int = 1536
    # Each step draws one of these: the length its chats have at least.
    chat_lengths: tuple[int, ...] = (0, 0, 128, 512, 1024)
    learning_rate: float = 3e-3
    num_warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the training has come."""

    step: int
    num_steps: int
    loss: float
    elapsed_s: float

    @property
    def remaining_s(self) -> float:
        """The time that the rest will take if it goes on like this."""
        return self.elapsed_s / self.step * (self.num_steps - self.step)


def train(
    model: GPTNeoXForCausalLM,
    curriculum: Curriculum,
    collator: DialogueCollator,
    config: TrainingConfig,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Trains the model in place and calls `report` after every step."""
    torch.set_num_threads(config.num_threads)
    torch.use_deterministic_algorithms(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, config))
    started_s = time.monotonic()
    model.train()
    for step, batch in enumerate(_batches(curriculum, collator, config), start=1):
        # No attention mask: padding stands on the right, where no earlier token looks.
        loss = masked_loss(model(batch.input_ids).logits, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(Progress(step, config.num_steps, loss.item(), time.monotonic() - started_s))
    model.train(False)


def masked_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy over the positions that count. `logits` are [rows, length, vocabulary]."""
    return functional.cross_entropy(logits[batch.label_mask].float(), batch.targets[batch.label_mask])


def _batches(curriculum: Curriculum, collator: DialogueCollator, config: TrainingConfig) -> Iterator[Batch]:
    """`num_steps` batches. Rows of a batch are about equally long, so that little of it is padding."""
    rng = Random(config.seed)  # noqa: S311 - it draws dialogues, not secrets.
    pending: list[list[list[int]]] = []
    for _ in range(config.num_steps):
        if not pending:
            pending = _draw_groups(curriculum, config, rng)
        yield collator(pending.pop(), rng)


def _draw_groups(curriculum: Curriculum, config: TrainingConfig, rng: Random) -> list[list[list[int]]]:
    """Rows for several steps, sorted by length and cut into groups; the groups come in random order."""
    rows: list[list[int]] = []
    while sum(map(len, rows)) < _STEPS_PER_DRAW * config.tokens_per_step:
        rows.append(curriculum.row(rng, num_tokens=rng.choice(config.chat_lengths)))
    groups: list[list[list[int]]] = [[]]
    for row in sorted(rows, key=len):
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > config.tokens_per_step:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups


def _learning_rate_factor(step: int, config: TrainingConfig) -> float:
    warmup = (step + 1) / config.num_warmup_steps
    decay = (config.num_steps - step) / max(1, config.num_steps - config.num_warmup_steps)
    return min(1.0, warmup, decay)
