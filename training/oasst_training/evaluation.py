"""How well a model predicts the assistant's words of conversations that it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from oasst_training.collator import DialogueCollator
from oasst_training.datasets import Row
from oasst_training.loss import CountedLogits

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over all tokens that count, whatever batches and processes they came in."""

    loss: float
    accuracy: float  # The share of tokens that the model ranks first.
    # The same without the end of each turn. The original's figure: its end token had id 0, which its metric left out.
    accuracy_without_ends: float
    num_tokens: int


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    module: CountedLogits,
    rows: Sequence[Row],
    collator: DialogueCollator,
    *,
    batch_size: int,
    end_id: int,
) -> Evaluation:
    """Evaluates on rows, each process on its part. Long rows are cut to what `collator` makes of them."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    sums = torch.zeros(5, dtype=torch.float64)
    module.eval()
    for batch_rows in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = collator(batch_rows, Random(0)).to(accelerator.device)  # noqa: S311 - it places windows.
        logits = module(batch.input_ids, batch.label_mask)
        sums += _sums(logits, batch.counted_targets, end_id)
    module.train()
    loss, right, right_words, count, words = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    return Evaluation(loss / max(1, count), right / max(1, count), right_words / max(1, words), int(count))


def _sums(logits: Tensor, targets: Tensor, end_id: int) -> Tensor:
    """Loss, tokens ranked first, the same but ends, tokens, the same but ends."""
    is_right = logits.argmax(-1) == targets
    is_word = targets != end_id
    loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
    counts = [is_right.sum(), (is_right & is_word).sum(), torch.tensor(len(targets)), is_word.sum()]
    return torch.tensor([loss.item(), *(count.item() for count in counts)], dtype=torch.float64)
