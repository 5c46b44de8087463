"""The loss: the mean cross-entropy of the tokens that count, of one micro batch."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import GPTNeoXForCausalLM

__all__ = ["CountedLogits", "mean_loss"]


class CountedLogits(nn.Module):
    """A model that computes logits only where they count: most positions are the prompter's, and the head is wide."""

    def __init__(self, model: GPTNeoXForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, label_mask: Tensor) -> Tensor:
        """The logits [counted, vocabulary] of the positions where `label_mask` is true. Both are [rows, length]."""
        # No attention mask: padding stands on the right, where no earlier token looks.
        hidden = self.model.gpt_neox(input_ids, use_cache=False).last_hidden_state
        return cast(Tensor, self.model.lm_head(hidden[label_mask]))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, 0 if nothing counts (as in a window of the prompter's words alone)."""
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (targets.numel() + 1e-8)
