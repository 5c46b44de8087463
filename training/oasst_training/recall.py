"""How well a model recalls its dialogues: is every reply what it would say, and by how much?

Greedy decoding gives a reply word by word if the model, reading the dialogue as written, ranks each of its tokens
first. So one forward pass over a dialogue answers for all its replies at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import GPTNeoXForCausalLM

from oasst_training.collator import Batch, DialogueCollator

__all__ = ["Recall", "measure_recall"]

_ROWS_PER_BATCH = 32


@dataclass(frozen=True, slots=True)
class Recall:
    """The smallest margin of each dialogue: the logit of the right token minus the best other, over all its replies."""

    margins: tuple[float, ...]

    @property
    def num_recalled(self) -> int:
        """How many dialogues greedy decoding gives in every word."""
        return sum(margin > 0 for margin in self.margins)

    @property
    def smallest_margin(self) -> float:
        """How close any reply comes to another token. Negative if one is wrong."""
        return min(self.margins)


def measure_recall(model: GPTNeoXForCausalLM, rows: Sequence[Sequence[int]], collator: DialogueCollator) -> Recall:
    """The recall of dialogues given as token ids. Margins are in the order of `rows`."""
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    margins = [0.0] * len(rows)
    for start in range(0, len(by_length), _ROWS_PER_BATCH):
        indices = by_length[start : start + _ROWS_PER_BATCH]
        batch = collator([rows[index] for index in indices], Random(0))  # noqa: S311 - no row is cut.
        for index, margin in zip(indices, _smallest_margins(model, batch), strict=True):
            margins[index] = margin
    return Recall(tuple(margins))


@torch.inference_mode()
def _smallest_margins(model: GPTNeoXForCausalLM, batch: Batch) -> Iterator[float]:
    """For each row, over the positions that are followed by a reply's token or its end."""
    logits = model(batch.input_ids).logits.float()
    targets = batch.targets.unsqueeze(-1)
    right = logits.gather(-1, targets)
    best_other = logits.scatter(-1, targets, -torch.inf).amax(-1, keepdim=True)
    # What follows the end of a reply is the next turn's `<|prompter|>`: learned, but never generated.
    in_reply = batch.label_mask & (batch.input_ids != model.config.eos_token_id)
    margins = (right - best_other).squeeze(-1).masked_fill(~in_reply, torch.inf)
    return iter(margins.amin(-1).tolist())
