"""From logits to the likelihood of given tokens, by the raw logits of all rows of the vocabulary.

A row's outcome depends on that row alone: neither the other rows nor their number change it.
"""

import torch
from torch import Tensor

__all__ = ["TargetLogprobs", "score_targets"]

# Log-probabilities of the targets [targets] fp32, whether each is the most likely token, whether its row is finite.
TargetLogprobs = tuple[Tensor, Tensor, Tensor]


@torch.inference_mode()
def score_targets(logits: Tensor, rows: Tensor, target_ids: Tensor) -> TargetLogprobs:
    """The targets `target_ids` [targets] by the logits [rows, vocab] fp32 of the rows they name.

    Of tokens that are equally likely the lowest id counts as the most likely one: that is what argmax takes.
    """
    is_finite = logits.isfinite().all(dim=1)
    best = logits.argmax(dim=1)
    logprobs = logits.log_softmax(dim=1)
    return logprobs[rows, target_ids], best[rows] == target_ids, is_finite[rows]
