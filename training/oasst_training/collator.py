"""Rows of token ids become padded batches, with the loss on the assistant's words only.

Which positions count, for `<|prompter|>Hi<|endoftext|><|assistant|>Yes<|endoftext|>`:

    input    <|prompter|>  Hi             <|endoftext|>  <|assistant|>  Yes            <|endoftext|>
    target   Hi            <|endoftext|>  <|assistant|>  Yes            <|endoftext|>  (none)
    counts   no            no             no             yes            yes            no

In a longer dialogue the assistant's `<|endoftext|>` counts too, with the next `<|prompter|>` as its target. This is
Open-Assistant's `DialogueDataCollator`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from oasst.prompt import ControlToken
from tokenizers import Tokenizer
from torch import Tensor

from oasst_training.tokenizer import control_id

__all__ = ["Batch", "DialogueCollator", "collator_for"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of equal length, padded on the right. Every tensor is [rows, length]."""

    input_ids: Tensor
    attention_mask: Tensor  # False where padded.
    label_mask: Tensor  # True where the target counts.
    targets: Tensor  # The next token. Meaningless where it does not count.

    @property
    def counted_targets(self) -> Tensor:
        """The targets that count, [counted], row after row."""
        return self.targets[self.label_mask]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on this device."""
        tensors = (self.input_ids, self.attention_mask, self.label_mask, self.targets)
        return Batch(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class DialogueCollator:
    """Makes batches. Ids are those of the checkpoint's own tokenizer."""

    prompter_id: int
    assistant_id: int
    padding_id: int
    # Longer rows are cut to so many tokens: mostly to a window at a random place, else to their beginning.
    max_length: int = 2048
    random_offset_probability: float = 0.8
    pad_to_multiple_of: int = 16
    label_masking: bool = True  # False: every target counts.

    def __call__(self, rows: Sequence[Sequence[int]], rng: Random) -> Batch:
        """The batch of these rows; `rng` places the windows."""
        windows = [self._cut(torch.tensor(row, dtype=torch.long), rng) for row in rows]
        length = _round_up(max(len(ids) for ids, _ in windows), self.pad_to_multiple_of)
        input_ids = torch.full((len(rows), length), self.padding_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        label_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, (ids, mask) in enumerate(windows):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = True
            label_mask[index, : len(ids)] = mask
        return Batch(input_ids, attention_mask, label_mask, targets=input_ids.roll(-1, dims=1))

    def label_mask(self, ids: Tensor) -> Tensor:
        """True from each `<|assistant|>` up to the token before the next `<|prompter|>`, but not at the row's end."""
        if not self.label_masking:
            return _all_but_last(ids)
        turns_opened = ((ids == self.prompter_id) | (ids == self.assistant_id)).cumsum(0)
        return (turns_opened > 0) & (turns_opened % 2 == 0) & _all_but_last(ids)

    def _cut(self, ids: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
        """A window of the row and its label mask. Turns are counted before the cut, so that the mask stays true."""
        mask = self.label_mask(ids)
        if len(ids) <= self.max_length:
            return ids, mask
        start = 0
        if rng.random() < self.random_offset_probability:
            start = rng.randint(0, len(ids) - self.max_length)
        window = ids[start : start + self.max_length]
        # The target of its last token is outside.
        return window, mask[start : start + self.max_length] & _all_but_last(window)


def collator_for(tokenizer: Tokenizer) -> DialogueCollator:
    """The collator that knows this tokenizer's control ids, with the values of the original recipe otherwise."""
    return DialogueCollator(
        prompter_id=control_id(tokenizer, ControlToken.PROMPTER),
        assistant_id=control_id(tokenizer, ControlToken.ASSISTANT),
        padding_id=control_id(tokenizer, ControlToken.PADDING),
    )


def _all_but_last(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)) < len(ids) - 1


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
